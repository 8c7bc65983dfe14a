"""The structure of the code: imports between rooms, sizes of modules, public names, and docstrings."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import pyro_pixels

ROOT = Path(__file__).parent.parent
FOLDERS = ("pyro_pixels", "examples", "benchmarks", "docs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "_build" not in path.parts)
LONGEST = 400  # lines of a module
INHERITED = {"forward", "backward", "encode", "encode_observed", "log_prob", "rsample", "mean", "variance", "expand",
             "move", "true_dynamics", "take", "begin", "advance", "read_totals", "stream", "seed", "random_state",
             "set_random_state", "set"}  # fmt: skip
"""Methods that override documented ones of a base class."""


def _load_rooms():
    """The script that draws the diagram of the architecture page."""
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs/draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = _load_rooms()
ARROWS = rooms.arrows()
FOLDER_ARROWS = {
    box: {other for other in others if (rooms.PACKAGE / other).is_dir()}
    for box, others in ARROWS.items()
    if (rooms.PACKAGE / box).is_dir()
}


def name_of(path):
    return str(path.relative_to(ROOT))


def test_imports_include_those_within_functions(tmp_path):
    (tmp_path / "module.py").write_text(
        "import pyro_pixels.data\n"
        "from pyro_pixels.guides import base\n"
        "def f():\n    from pyro_pixels.queries.predict import infer\n    import pyro_pixels.worlds.base as b\n"
    )
    assert rooms.imports(tmp_path / "module.py") == {"data", "guides.base", "queries.predict", "worlds.base"}


def test_a_circle_is_found():
    with pytest.raises(ValueError, match="a -> b -> a"):
        rooms.longest_path({"a": {"b"}, "b": {"a"}}, "a")
    assert rooms.longest_path({"a": {"b", "c"}, "b": {"c"}, "c": set()}, "a") == ["a", "b", "c"]


def test_imports_between_modules_and_between_rooms_have_no_circle():
    for box in ARROWS:
        rooms.longest_path(ARROWS, box)
    modules = {name: rooms.imports(path) - {name, ""} for name, path in rooms.modules().items() if name}
    for name in modules:
        rooms.longest_path(modules, name)


def test_chains_of_folders_have_at_most_three_arrows():
    assert len(FOLDER_ARROWS) >= 8
    for box in FOLDER_ARROWS:
        path = rooms.longest_path(FOLDER_ARROWS, box)
        assert len(path) <= 4, " -> ".join(path)


def test_the_diagram_is_that_of_the_code():
    assert rooms.FIGURE.read_text() == rooms.draw(), "imports have changed; run python docs/draw_rooms.py"


def test_what_needs_no_pyro_does_not_import_it():
    for module in ("lgssm.kalman", "lgssm.marginal", "data", "worlds.base", "worlds.cannonballs", "evaluation.metrics"):
        seen, todo = set(), {module}
        while todo:
            name = todo.pop()
            seen.add(name)
            path = rooms.modules()[name]
            names = {
                alias.name if isinstance(node, ast.Import) else node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not [n for n in names if n.split(".")[0] == "pyro"], f"{module} imports Pyro through {name}"
            todo |= rooms.imports(path) - seen - {""}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "tests"], ids=name_of)
def test_no_module_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_the_package_exports_few_names():
    assert len(pyro_pixels.__all__) <= 30
    assert sorted(set(pyro_pixels.__all__)) == sorted(pyro_pixels.__all__)
    assert all(hasattr(pyro_pixels, name) for name in pyro_pixels.__all__)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_edits_the_search_path(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path"), f"line {node.lineno} uses sys.path"


def test_no_script_imports_another_script():
    """Scripts share code through modules that users do not run; `benchmarks.memory` runs only in its own processes."""
    guard = '\nif __name__ == "__main__":'
    scripts = {path.stem: path for path in FILES if guard in path.read_text() and "tests" not in path.parts}
    del scripts["memory"]
    assert len(scripts) > 10
    for path in scripts.values():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[-1] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("pyro_pixels"):
                imported |= {(node.module or "").split(".")[-1], *(alias.name for alias in node.names)}
        assert not imported & (scripts.keys() - {path.stem}), name_of(path)


def public_definitions(tree, prefix=""):
    """Public functions, classes and methods with their names, but for the bodies `...` of protocols."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "...":
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


PUBLIC = [path for path in rooms.PACKAGE.rglob("*.py") if path.name == "__init__.py" or path.name[0] != "_"]


@pytest.mark.parametrize("path", sorted(PUBLIC), ids=name_of)
def test_public_docstrings_are_sentences(path):
    """The module and all that is public in it have a docstring whose first sentence ends with a period."""
    tree = ast.parse(path.read_text())
    entries = [("module", tree), *public_definitions(tree)]
    for name, node in entries:
        doc = ast.get_docstring(node)
        if doc is None:
            assert "." in name, f"{name} has no docstring"
            assert name.split(".")[-1] in INHERITED, f"{name} has no docstring"
            continue
        paragraph = " ".join(re.split(r"\n\s*\n", doc)[0].split())
        assert re.search(r"[a-z0-9)`\]'\"]\.(\s|$)", paragraph, re.IGNORECASE), f"{name}: no sentence in {paragraph!r}"
        assert paragraph[0].isupper() or paragraph[0] == "`", f"{name}: {paragraph!r}"
