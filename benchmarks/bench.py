"""Measures time and memory of pyro_pixels, beside a literal Pyro program of the paper, and saves the results.

Writes benchmarks/results/NAME.json (and NAME_growth.png); parts that are not measured keep their earlier results.
Tables are printed; with --page they are also inserted into that page, between <!-- begin NAME PART --> and
<!-- end NAME PART -->. `--only` without a part measures nothing, but redraws the figure and refills the page.
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

from benchmarks import against, asking, by_hand, densities, growth, kernels, memory, parts_of_step, report, steps
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
    "kernels": kernels.measure,
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
    "kernels",
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
    """Parts to measure."""
    paper: bool = False
    """Measure step and memory also at the paper preset's sizes (takes minutes, and 1 GB per program)."""
    rounds: Seeds = 15
    """How many times each call is timed."""
    seconds: Positive = 12.0
    """Time limit of a comparison, in seconds; at least 3 rounds are run."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    name: str | None = None
    """Name of the results; default: cpu, or the device's name."""
    out: Path = Path("benchmarks/results")
    page: Path | None = None
    """A page with markers, such as docs/performance.md, into which the tables are inserted."""


def measured_with(device: torch.device) -> dict[str, Any]:
    """Returns the machine, the versions, the load average and the date."""
    return {
        **environment(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def name_of(device: torch.device) -> str:
    """Returns a file name for the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_results(file: Path) -> dict[str, Any]:
    """Returns the results already in the file, or an empty dictionary."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it, or give another --name") from None


def fill(page: Path, name: str, found: dict[str, Any]) -> None:
    """Inserts the tables between the page's markers, and saves the figure beside the page."""
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
        found[part] = json.loads(json.dumps(result))  # sizes become strings, as in the file
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
