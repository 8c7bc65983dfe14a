"""Draws how positions and identities are learned: errors and switch rates on validation sequences over training steps.

Reads a summary of `sweep_recurrent`, such as docs/results/recurrent_long.json. Thin lines: as inferred; thick lines:
with identities corrected by p(a); dashed lines: the errors and rates to reach (docs/learning.md).
"""

from examples._common import read_json, say_where, start

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from pyro_pixels._options import result_file
from pyro_pixels.plots.paper import figure_beside, save_figure
from pyro_pixels.plots.style import OBJECTS

BARS = {"error_px": (0.4, 0.8, 1.2), "switch_rate": (0.10, 0.25)}
TITLES = {"error_px": "position error, pixels", "switch_rate": "switch rate, %"}


@dataclass
class Arguments:
    summary: Path = field(default_factory=lambda: Path("runs/recurrent/long.json"))
    """Summary of a suite of `sweep_recurrent`."""
    out: Path | None = None
    """The figure. By default a .png next to the summary."""


def curves_of(summary: Any, path: Path) -> list[list[dict[str, Any]]]:
    """Returns the curve of each run, or raises a ValueError."""
    try:
        curves = [run["curve"] for runs in summary["variants"].values() for run in runs]
        complete = [len(curve) > 1 and all(TITLES.keys() <= point.keys() for point in curve) for curve in curves]
    except (TypeError, AttributeError, KeyError):
        complete = []
    if not complete or not all(complete):
        raise ValueError(f"{path} has no learning curves; wanted a summary written by `sweep_recurrent`")
    return curves


def main(args: Arguments) -> None:
    out = result_file(args.out or figure_beside(args.summary), ".png")
    curves = curves_of(read_json(args.summary), args.summary)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, TITLES.items()):
        factor = 100.0 if key == "switch_rate" else 1.0
        first = 4 - len(BARS[key])  # the smallest N with this measure
        for i, bar in enumerate(BARS[key]):
            colour = OBJECTS[first + i - 1]
            axis.axhline(factor * bar, color=colour, lw=0.8, ls="--")
            for curve in curves:
                steps = [point["step"] for point in curve]
                for prefix, width in (("", 0.7), ("untangled_", 1.8)):
                    y = factor * np.array([point[f"{prefix}{key}"][i] for point in curve], dtype=float)  # None: NaN
                    label = f"N = {first + i}" if prefix and curve is curves[0] else None
                    axis.plot(steps, y, color=colour, lw=width, label=label)
        axis.set(title=title, xlabel="training step", ylim=(0, None), xlim=(0, None))
    axes[0].set_ylim(0, 3)
    axes[0].legend(frameon=False)
    save_figure(figure, out)
    say_where([out])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
