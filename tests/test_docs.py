"""The code in README and docs runs as it stands, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
def test_code_blocks_run(page, tmp_path):
    """All blocks of a page, top to bottom, in one process."""
    (tmp_path / "page.py").write_text("\n".join(BLOCK.findall(page.read_text())))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_to_files_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            places = [page.parent / target, page.parent / f"{target}.md"]
            assert any(p.exists() for p in places), f"{page.name} links to {target}"


def test_reference_has_every_module_after_those_that_it_imports():
    listed = re.findall(r"^\.\. automodule:: pyro_pixels\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    modules = {path.stem: path.read_text() for path in (ROOT / "pyro_pixels").glob("*.py") if path.stem != "__init__"}
    assert sorted(listed) == sorted(modules)
    for i, name in enumerate(listed):
        imported = set(re.findall(r"^from pyro_pixels\.(\w+) import", modules[name], re.MULTILINE))
        imported |= set(re.findall(r"^from pyro_pixels import (\w+)", modules[name], re.MULTILINE))
        assert imported <= set(listed[:i]), f"{name} imports {imported - set(listed[:i])}, which stand after it"


def test_every_page_is_in_the_index_and_has_its_pictures():
    """Pages in the toctree, each once; pictures of the gallery small enough to load quickly, all of them shown."""
    index = (ROOT / "docs/index.md").read_text()
    toctree = re.search(r"```{toctree}\n(?::.*\n)*\n(.*?)```", index, re.DOTALL)[1].split()
    assert sorted(toctree) == sorted(path.stem for path in PAGES if path.stem not in ("README", "index"))
    gallery = (ROOT / "docs/gallery.md").read_text()
    for picture in (ROOT / "docs/figures/gallery").iterdir():
        assert f"figures/gallery/{picture.name}" in gallery
        assert picture.stat().st_size < (500_000 if picture.suffix == ".gif" else 150_000)
