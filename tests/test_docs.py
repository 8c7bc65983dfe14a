"""The code in README and docs runs or is quoted from the sources, and links, names and paths lead somewhere."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", *(p for p in ROOT.rglob("*.py") if p.parts[len(ROOT.parts)][0] != ".")]
BLOCK = re.compile(r"^```(?:python|\{code-cell\})\n(.*?)^```", re.DOTALL | re.MULTILINE)
QUOTE = re.compile(r"^```py\n(.*?)^```", re.DOTALL | re.MULTILINE)
ROOMS = sorted(path.parent.name for path in (ROOT / "pyro_pixels").glob("*/__init__.py"))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
def test_code_blocks_run(page, tmp_path):
    """All blocks of a page, top to bottom, in one process; of notebooks without the lines that only Jupyter knows."""
    code = "\n".join(BLOCK.findall(page.read_text()))
    (tmp_path / "page.py").write_text(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))
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


@pytest.mark.parametrize("page", [p for p in PAGES if QUOTE.search(p.read_text())], ids=lambda p: p.stem)
def test_quoted_lines_are_in_the_code(page):
    """Every line of a block marked ``py`` stands in the package or an example, comments and spaces aside."""

    def bare(line):
        return re.sub(r"\s", "", re.sub(r"(^|\s+)# .*", "", line))

    sources = [*(ROOT / "pyro_pixels").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    lines = {bare(line) for path in sources for line in path.read_text().splitlines()}
    for block in QUOTE.findall(page.read_text()):
        for line in block.splitlines():
            assert bare(line) in lines | {"..."}, f"{page.name} quotes a line that is nowhere in the code: {line}"


def test_modules_and_names_with_a_dotted_path_exist():
    for text in TEXTS:
        for found in re.finditer(r"\bpyro_pixels((?:\.[A-Za-z_]\w*)+)", text.read_text()):
            parts = found[1].strip(".").split(".")
            thing = importlib.import_module("pyro_pixels")
            for i, part in enumerate(parts):
                if not hasattr(thing, part):
                    name = ".".join(("pyro_pixels", *parts[: i + 1]))
                    assert importlib.util.find_spec(name), f"{text.relative_to(ROOT)} speaks of {found[0]}"
                    importlib.import_module(name)
                thing = getattr(thing, part)


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"\b((?:pyro_pixels|examples|benchmarks|tests|docs)/[\w/]+\.(?:py|json|md|svg))", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_reference_has_every_room_after_those_that_it_imports():
    listed = re.findall(r"^\.\. automodule:: pyro_pixels\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert set(ROOMS) | {"data", "config", "presets", "runs"} <= set(listed)
    order = [name for name in listed if name in ROOMS]
    assert sorted(order) == ROOMS
    for i, room in enumerate(order):
        code = "\n".join(path.read_text() for path in (ROOT / "pyro_pixels" / room).glob("*.py"))
        imported = set(re.findall(r"^ *from pyro_pixels\.(\w+)[. ]", code, re.MULTILINE)) & set(ROOMS) - {room}
        assert imported <= set(order[:i]), f"{room} imports {imported - set(order[:i])}, which are listed after it"


def test_the_reference_lists_what_the_package_exports():
    page = (ROOT / "docs/api.md").read_text()
    listed = re.search(r"exports what most programs need: (.*?)\n\n", page, re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(importlib.import_module("pyro_pixels").__all__)


def test_the_reading_path_is_short():
    """Seven files, fewer than 1,200 lines."""
    page = (ROOT / "docs/architecture.md").read_text()
    files = re.findall(r"^\d\. `([\w/.]+)`", page, re.MULTILINE)
    assert len(files) == 7
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) < 1_200


def test_the_site_needs_no_network():
    """Equations are set by the MathJax that the site ships."""
    conf = (ROOT / "docs/conf.py").read_text()
    assert re.search(r'^mathjax_path = "(?!https?:)', conf, re.MULTILINE)
    assert importlib.util.find_spec("sphinx-mathjax-offline")


def test_every_page_is_in_the_index_and_has_its_pictures():
    """Pages in the toctree, each once; pictures of the gallery small enough to load quickly, all of them shown."""
    index = (ROOT / "docs/index.md").read_text()
    toctree = re.search(r"```{toctree}\n(?::.*\n)*\n(.*?)```", index, re.DOTALL)[1].split()
    assert sorted(toctree) == sorted(path.stem for path in PAGES if path.stem not in ("README", "index"))
    gallery = (ROOT / "docs/gallery.md").read_text()
    for picture in (ROOT / "docs/figures/gallery").iterdir():
        assert f"figures/gallery/{picture.name}" in gallery
        assert picture.stat().st_size < (500_000 if picture.suffix == ".gif" else 150_000)
