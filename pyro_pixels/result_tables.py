"""Markdown tables of results, the environment they were measured in, and their insertion into documentation pages."""

import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def per_n(result: Row, value: Callable[[Row], float | None], digits: int) -> str:
    """Returns a value for each N of an evaluation, such as "0.14 / 0.18 / 0.22", without those that do not apply."""
    values = [value(row) for row in result["by_n_objects"].values()]
    return " / ".join(f"{v:.{digits}f}" for v in values if v is not None) or "-"


def medians(rows: Sequence[Row]) -> Row:
    """Returns the median of each value over several rows of an evaluation, None where it does not apply."""
    return {key: None if rows[0][key] is None else float(np.median([row[key] for row in rows])) for key in rows[0]}


def medians_per_n(results: Sequence[Row]) -> Row:
    """Returns the medians over several evaluations for each N."""
    return {"by_n_objects": {n: medians([r["by_n_objects"][n] for r in results]) for n in results[0]["by_n_objects"]}}


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share as text, such as "1.6 %", or "-" for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Returns the hardware and the software versions of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": platform.processor() if name is None else name[1],
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }


def machine(result: Row) -> str:
    """Returns the hardware and the software versions of a result as a sentence."""
    e = result["environment"]
    where = e["processor"] if e["device"] == "cpu" else e["device"]
    return f"{where}, Python {e['python']}, torch {e['torch']}, pyro {e['pyro']}."


def seeds_table(result: Row) -> str:
    """Returns the table of a sweep: medians over seeds (for N = 1 / 2 / 3 where there are three) and success counts.

    Args:
        result: the summary that examples/experiments/sweep.py writes.
    """
    header = ["", "seeds within the bars", "position error, px", "switch rate, %", "generation / floor",
              "interpolation / floor", "launch side correct, %", "bound, nats per frame", "seconds"]  # fmt: skip
    rows = []
    if "tracker" in result:
        rows.append(["classical tracker, true dynamics and radius", "-", *_errors(result["tracker"]), "-", "-", "-"])
    for name, variant in result["variants"].items():
        runs = variant["runs"]
        middle = medians_per_n(runs)
        every = medians([r["all"] for r in runs])
        low, high = (100 * x for x in variant["interval95"])
        rows.append([
            name, f"{variant['successes']} of {len(runs)} ({low:.0f} to {high:.0f} %)",
            *_errors(middle),
            f"{100 * every['side_accuracy']:.1f}", f"{every['bound_per_frame_nats']:.1f}",
            f"{np.median([r['seconds'] for r in runs]):.0f}",
        ])  # fmt: skip
    return markdown(header, rows)


def _errors(result: Row) -> list[str]:
    return [
        per_n(result, lambda r: r["position_error_px"], 2),
        per_n(result, lambda r: None if r["switch_rate"] is None else 100 * r["switch_rate"], 1),
        per_n(result, lambda r: r["generation_error_px"] / r["generation_floor_px"], 2),
        per_n(result, lambda r: r["interpolation_error_px"] / r["interpolation_floor_px"], 2),
    ]


def insert(page: str, part: str, text: str) -> str:
    """Returns the page with the text between <!-- begin PART --> and <!-- end PART --> replaced.

    Raises:
        ValueError: if the markers are missing.
    """
    pattern = re.compile(rf"(<!-- begin {part} -->\n).*?(<!-- end {part} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(
            f"the page has no <!-- begin {part} --> ... <!-- end {part} -->; put them where the part belongs"
        )
    return pattern.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page)
