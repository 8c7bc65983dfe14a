"""The diagram of the package's rooms and their imports, docs/figures/rooms.svg, drawn from the code.

`python docs/draw_rooms.py` rewrites the figure. `imports` and `longest_path` also serve tests/test_structure.py, which
holds the figure and the rules about imports to the code.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_pixels"
FIGURE = ROOT / "docs/figures/rooms.svg"
TITLES = {
    "lgssm": ("lgssm/", "exact inference in", "linear-Gaussian models"),
    "worlds": ("worlds/", "simulated image", "sequences (Sec 3.1)"),
    "model": ("model/", "renderer, likelihoods,", "the Pyro model (Sec 2.1)"),
    "guides": ("guides/", "amortised inference", "q(a | v) (Sec 2.2.1)"),
    "training": ("training/", "ELBO, KL annealing,", "the loop (Sec 2.2.2)"),
    "queries": ("queries/", "infer, predict, ask", "(Secs 3.3-3.5)"),
    "evaluation": ("evaluation/", "errors, floors,", "calibration, baselines"),
    "plots": ("plots/", "the paper's figures,", "figures of answers"),
    "video": ("video/", "films of one's own:", "reading and tracks"),
    "shared": ("data, _batch, ...", "the data container", "and small helpers"),
    "top": ("config, presets, run*", "configurations, runs on", "disk and their figures"),
}
COLUMNS = {
    "top": 3.5,
    "evaluation": 0.5,
    "training": 0,
    "queries": 1,
    "video": 2,
    "model": 0,
    "guides": 1,
    "plots": 2.5,
    "worlds": 3.5,
    "shared": 1.5,
    "lgssm": 1.5,
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 178, 74, 22, 56, 16


def modules() -> dict[str, Path]:
    """Returns the dotted name of every module below the package -> its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def node_of(module: str) -> str | None:
    """Returns the box of a module: its folder, "shared" or "top" for root modules, None for plain helpers.

    "shared" are the data container and the modules with an underscore, which every room may use. Plain helpers are the
    modules among them that import nothing from the package; they are not drawn.
    """
    head = module.split(".")[0]
    if not head.startswith("_") and head != "data":
        return head if (PACKAGE / head).is_dir() else "top"
    return "shared" if imports(modules()[head]) else None


def imports(path: Path) -> set[str]:
    """Returns the modules of the package that a file imports, also within functions, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name.startswith("pyro_pixels"):
                if name.removeprefix("pyro_pixels").removeprefix(".") in modules():
                    found.add(name.removeprefix("pyro_pixels").removeprefix("."))
                    break
                name = name.rpartition(".")[0]
    return found


def arrows() -> dict[str, set[str]]:
    """Returns box -> the boxes that its modules import."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        box = node_of(module) if module else None
        if box:
            others = {node_of(name) for name in imports(path) if name}
            found.setdefault(box, set()).update(other for other in others if other and other != box)
    return found


def longest_path(graph: dict[str, set[str]], start: str, seen: tuple[str, ...] = ()) -> list[str]:
    """Returns the longest chain of imports that begins at a box.

    Raises:
        ValueError: if the boxes import each other in a circle.
    """
    if start in seen:
        raise ValueError(f"imports run in a circle: {' -> '.join((*seen, start))}")
    tails = [longest_path(graph, name, (*seen, start)) for name in sorted(graph.get(start, ()))]
    return [start, *max(tails, key=len, default=[])]


def draw() -> str:
    """Returns the diagram as SVG: rooms above what they import, without arrows that a longer path implies."""
    graph = arrows()
    level = {name: len(longest_path(graph, name)) for name in graph}
    for name in (name for name in graph if not graph[name]):
        level[name] = min(level[other] for other in graph if name in graph[other]) - 1
    n_rows = max(level.values())
    width = round(2 * MARGIN + (max(COLUMNS.values()) + 1) * (WIDTH + GAP_X) - GAP_X)
    height = 2 * MARGIN + n_rows * (HEIGHT + GAP_Y) - GAP_Y
    place = {
        name: (MARGIN + COLUMNS[name] * (WIDTH + GAP_X), MARGIN + (n_rows - level[name]) * (HEIGHT + GAP_Y))
        for name in TITLES
    }
    reach = {name: _reachable(graph, name) for name in graph}
    lines = []
    for name in sorted(graph):
        for other in sorted(graph[name]):
            if not any(other in reach[between] for between in graph[name] - {other}):
                (x, y), (x_to, y_to) = place[name], place[other]
                lines.append(
                    f'<line x1="{x + WIDTH / 2:g}" y1="{y + HEIGHT:g}" x2="{x_to + WIDTH / 2:g}" y2="{y_to - 3:g}" '
                    'stroke="#6b7a8f" stroke-width="1.3" marker-end="url(#head)"/>'
                )
    boxes = []
    for name, (x, y) in place.items():
        title, *text = TITLES[name]
        fill = "#f4f1ea" if name in ("shared", "top") else "#e9effa"
        boxes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" stroke="#2b5fc4"/>'
        )
        for k, words in enumerate((title, *text)):
            style = 'font-weight="bold" font-size="14"' if k == 0 else 'font-size="12"'
            boxes.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 22 + 19 * k:g}" {style}>{words}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#6b7a8f"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *lines,
        '<g font-family="sans-serif" text-anchor="middle" fill="#1a1a1a">',
        *boxes,
        "</g>",
        "</svg>\n",
    ])  # fmt: skip


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Returns the boxes that a box imports directly or indirectly."""
    return set().union(*({name} | _reachable(graph, name) for name in graph.get(start, ())))


if __name__ == "__main__":
    FIGURE.write_text(draw())
    print(f"wrote {FIGURE.relative_to(ROOT)}")
