"""Measures what pyro_pixels costs, beside a literal Pyro program of the paper, and writes it down.

Leaves benchmarks/results/NAME.json (and NAME_growth.png); parts that are not measured stay as they are in the file.
Tables are printed; with --page they are also put into docs/performance.md, between its markers <!-- begin NAME PART -->
and <!-- end NAME PART -->. `--only` without a part measures nothing and does the tables and the figure again.
"""

from examples._common import device_of, new_folder, say_where, start, write_json

import datetime
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import against, asking, by_hand, densities, growth, memory, parts_of_step, report, steps
from benchmarks.timing import Stopwatch
from pyro_pixels._checks import check_name
from pyro_pixels._files import atomic_write
from pyro_pixels._options import Positive, Seeds
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.result_tables import environment, insert

PARTS: dict[str, Callable[[Stopwatch], dict[str, Any]]] = {
    "step": partial(steps.measure, preset="quick"),
    "against": against.measure,
    "by_hand": by_hand.measure,
    "parts_of_step": parts_of_step.measure,
    "density": densities.measure,
    "queries": asking.measure,
    "memory": partial(memory.measure, preset="quick"),
    "growth": growth.measure,
    "memory_growth": memory.measure_growth,
    "paper_step": partial(steps.measure, preset="paper"),
    "paper_memory": partial(memory.measure, preset="paper"),
}
Part = Literal[
    "step",
    "against",
    "by_hand",
    "parts_of_step",
    "density",
    "queries",
    "memory",
    "growth",
    "memory_growth",
    "paper_step",
    "paper_memory",
]


@dataclass
class Arguments:
    only: tuple[Part, ...] = ("step", "against", "density", "queries", "memory", "growth", "memory_growth")
    """What to measure."""
    paper: bool = False
    """The steps also at the sizes of the paper's preset (minutes, and 1 GB a program)."""
    rounds: Seeds = 15
    """How often each call is timed."""
    seconds: Positive = 12.0
    """A comparison ends after so many seconds, though not before 3 rounds."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    name: str | None = None
    """Of the results; default: cpu, or the device's own."""
    out: Path = Path("benchmarks/results")
    page: Path | None = None
    """A page with markers, such as docs/performance.md, to put the tables into."""


def measured_with(device: torch.device) -> dict[str, Any]:
    """The machine, and how busy it was with other things as well."""
    return {
        **environment(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def name_of(device: torch.device) -> str:
    """A file name for the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_results(file: Path) -> dict[str, Any]:
    """What the file holds already, or nothing."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it, or give another --name") from None


def fill(page: Path, name: str, found: dict[str, Any]) -> None:
    """Puts the tables between the page's markers, and the figure beside it."""
    text = page.read_text()
    for part, result in found.items():
        shown = report.describe(part, result)
        if part == "growth":
            figure = page.parent / "figures" / "performance" / f"{name}_growth.png"
            save_figure(report.plot_growth(result, found.get("density"), found.get("memory_growth")), figure)
            shown += f"\n\n![growth]({figure.relative_to(page.parent)})"
        text = insert(text, f"{name} {part}", shown)
    with atomic_write(page) as out:
        out.write(text.encode())
    print(f"  {page}")


def main(args: Arguments) -> None:
    if args.page is not None and not args.page.exists():
        raise ValueError(f"there is no {args.page}; give --page a page with markers")
    watch = Stopwatch(device_of(args.device), args.rounds, args.seconds)
    name = check_name("--name", args.name or name_of(watch.device))
    file = new_folder(args.out) / f"{name}.json"
    found = read_results(file)
    also = [f"paper_{part}" for part in args.only if f"paper_{part}" in PARTS] if args.paper else []
    torch.manual_seed(0)
    for part in (*args.only, *also):
        print(f"{part} ...", flush=True)
        with_what = measured_with(watch.device)
        result = {**PARTS[part](watch), "environment": with_what}
        found[part] = json.loads(json.dumps(result))  # sizes become strings, as they are in the file
        write_json(file, found)
        print(f"\n{report.describe(part, found[part])}\n")
    paths = [file]
    if "growth" in found:
        figure = report.plot_growth(found["growth"], found.get("density"), found.get("memory_growth"))
        paths.append(args.out / f"{name}_growth.png")
        save_figure(figure, paths[-1])
    say_where(paths)
    if args.page is not None:
        fill(args.page, name, found)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
