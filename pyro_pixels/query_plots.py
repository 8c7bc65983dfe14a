"""Pictures of answers with uncertainty: regions around tracks, bands over time, counts, evidence, reliability.

Arguments are tensors or arrays as in `plotting`, whose looks these figures have; NaN draws nothing. Regions hold 95 %
of a Gaussian, bands reach two standard deviations.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from pyro_pixels.plotting import (
    _CIRCLE,
    _TEXT,
    QUIET,
    SEEN,
    TRUTH,
    Data,
    Floats,
    _colour,
    _draw,
    _grid,
    _legend,
    _plane,
    _read,
    _read_tracks,
    _style,
)

RADIUS_95 = 5.991464547**0.5  # of the region of a two-dimensional Gaussian that holds 95 %, in standard deviations


def plot_regions(
    mean: Data,
    cov: Data,
    *,
    known: Data,
    truth: Data | None = None,
    n_objects: Data | None = None,
    size: tuple[int, int] | None = None,
    titles: Sequence[str] = (),
    columns: int = 3,
) -> Figure:
    """Tracks with the region of every position, a colour an object.

    Args:
        mean: (B, N, T, 2); cov: (B, N, T, 2, 2).
        known: (B, N, T) bool, frames with dots; the regions of the others are outlined.
        truth: (B, N, T, 2), a thin black line.
        size: (H, W) of the images, whose edges then bound the plots.
        titles: one a sequence.
    """
    tracks = _read_tracks({"mean": mean} | ({} if truth is None else {"truth": truth}), n_objects)
    B, N, T, _ = tracks["mean"].shape
    covs = _read(f"{B} {N} {T} 2 2", {"cov": cov})["cov"]
    seen = _read(f"{B} {N} {T}", {"known": known})["known"] > 0
    figure, cells = _grid(B, columns, 2.4, [2.4 * (size[0] / size[1] if size else 1)])
    for b, (ax,) in enumerate(cells):
        for n in range(N):
            colour, a = _colour("", n), tracks["mean"][b, n]
            for frames, edge, alpha in ((seen[b, n], "none", 0.15), (~seen[b, n], colour, 0.1)):
                there = frames & np.isfinite(a).all(-1)
                outlines = list(_ellipses(a[there], covs[b, n, there]))
                ax.add_collection(PolyCollection(outlines, facecolor=colour, edgecolor=edge, alpha=alpha))
            _draw(ax, a[None], colour, linewidth=1.1)
            ax.scatter(*a[seen[b, n]].T, s=5, color=colour, zorder=3)
        if truth is not None:
            _draw(ax, tracks["truth"][b], TRUTH, linewidth=0.7)
        _plane(ax, size)
        if len(titles):
            ax.set_title(titles[b], **_TEXT)
    dot = Line2D([], [], ls="", marker="o", ms=3, color=QUIET, label="seen")
    region = Patch(facecolor=QUIET, alpha=0.4, edgecolor=QUIET, label="95 % region")
    line = Line2D([], [], color=QUIET, label="mean")
    return _legend(figure, () if truth is None else ("truth",), [line, dot, region])


def plot_over_time(
    means: Mapping[str, Data], stds: Mapping[str, Data], *, truth: Data | None = None, titles: Sequence[str] = (),
    label: str = "", seen: Data | None = None, columns: int = 3,
) -> Figure:  # fmt: skip
    """Quantities (R, T) against the frame, a panel each, with bands of two standard deviations.

    Args:
        means, stds: name -> (R, T); truth: (R, T), black.
        titles: one a panel; label: of the vertical axis; seen: (R, T) bool, frames that are shaded.
    """
    lines = _read("R T", means)
    bands = _read("R T", stds, like=lines)
    true = (
        None if truth is None else _read("R T", {"truth": truth}, like={"truth": next(iter(lines.values()))})["truth"]
    )
    R, T = next(iter(lines.values())).shape
    frame, shaded = np.arange(T) + 1, np.zeros((R, T)) if seen is None else np.asarray(seen)
    figure, cells = _grid(R, columns, 2.6, [1.9])
    for r, (ax,) in enumerate(cells):
        for i, (name, line) in enumerate(lines.items()):
            colour = _colour("", i)
            ax.fill_between(
                frame, line[r] - 2 * bands[name][r], line[r] + 2 * bands[name][r], color=colour, alpha=0.18, lw=0
            )
            ax.plot(frame, line[r], color=colour, linewidth=1.2)
        if true is not None:
            ax.plot(frame, true[r], color=TRUTH, linewidth=0.8)
        for t in np.flatnonzero(shaded[r]):
            ax.axvspan(t + 0.5, t + 1.5, color=SEEN, alpha=0.2, linewidth=0)
        ax.set_xlim(0.5, T + 0.5)
        _style(ax, "frame", label if r % columns == 0 else " ")
        if len(titles):
            ax.set_title(titles[r], **_TEXT)
    handles = [Line2D([], [], color=_colour("", i), label=name) for i, name in enumerate(lines)]
    band = Patch(facecolor=QUIET, alpha=0.4, label="2 standard deviations")
    shade = [Patch(facecolor=SEEN, alpha=0.3, label="seen")] if seen is not None else []
    return _legend(figure, () if truth is None else ("truth",), [*handles, band, *shade])


def plot_reliability(curves: Mapping[str, tuple[Data, Data]]) -> Figure:
    """Share of true positions in the predicted regions against their level; on the diagonal what is stated is true.

    Args:
        curves: name -> levels (L,), shares (L,).
    """
    figure, [(ax,)] = _grid(1, 1, 3.6, [3.2])
    ax.plot((0, 1), (0, 1), color=QUIET, linewidth=0.8)
    for i, (name, (levels, shares)) in enumerate(curves.items()):
        points = _read("L", {"levels": levels, "shares": shares})
        style = "--" if "corrected" in name else "-"
        ax.plot(
            *points.values(), color=_colour("", i % max(1, _kinds(curves))), linestyle=style, linewidth=1.4, label=name
        )
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _style(ax, "level of the region", "share of true positions within")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_TEXT["fontsize"])
    return figure


def plot_counts(n_objects: Data, counted: Data, log_evidence: Data) -> Figure:
    """How often N objects were counted as how many, and by how many nats the true N won over the best other one.

    Args:
        n_objects, counted: (B,); log_evidence: (B, max_objects + 1).
    """
    true, told = (np.asarray(x, int) for x in (n_objects, counted))
    evidence = _read(f"{len(true)} M", {"log_evidence": log_evidence})["log_evidence"]
    M = evidence.shape[1]
    table = np.zeros((M, M), int)
    np.add.at(table, (true, told), 1)
    figure, [(left,), (right,)] = _grid(2, 2, 3.4, [2.8])
    left.imshow(table / np.maximum(1, table.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1.2)
    for i, j in np.ndindex(M, M):
        left.text(j, i, str(table[i, j]), ha="center", va="center", **_TEXT)
    left.set(xticks=range(M), yticks=range(M))
    _style(left, "counted", "true N")
    rows = np.arange(len(true))
    own = evidence[rows, true]
    others = evidence.copy()
    others[rows, true] = -np.inf
    lead = own - others.max(1)
    for n in np.unique(true):
        x = np.sort(lead[true == n])
        right.plot(
            x, (np.arange(len(x)) + 0.5) / len(x), marker=".", markersize=3, color=_colour("", n - 1), label=f"N = {n}"
        )
    right.axvline(0, color=QUIET, linewidth=0.8)
    right.set_xscale("symlog", linthresh=10)
    _style(right, "lead of the true N (nats)", "share of sequences")
    right.legend(frameon=False, fontsize=_TEXT["fontsize"])
    return figure


def plot_evidence(bound: Data, log_evidence: Data, effective_samples: Data, n_objects: Data, n_frames: int) -> Figure:
    """Each sequence's bound of Eq (7) (grey) and importance-weighted bound (coloured by N), and how far to trust it.

    Args:
        bound, log_evidence, effective_samples, n_objects: (B,), nats and numbers.
        n_frames: T; shown is nats per frame.
    """
    given = _read("B", {"bound": bound, "log_evidence": log_evidence, "effective": effective_samples, "n": n_objects})
    n = given["n"].astype(int)
    order = np.lexsort((-given["log_evidence"], n))
    low, high, effective, n = (
        x[order] for x in (given["bound"] / n_frames, given["log_evidence"] / n_frames, given["effective"], n)
    )
    figure, [(top, below)] = _grid(1, 1, 5.0, [2.4, 1.3], sharex=True)
    x = np.arange(len(n))
    colours = [_colour("", k - 1) for k in n]
    top.add_collection(LineCollection([[(i, a), (i, b)] for i, a, b in zip(x, low, high)], color=QUIET, linewidth=0.8))
    top.scatter(x, low, s=5, color=QUIET)
    top.scatter(x, high, s=9, color=colours, zorder=3)
    below.bar(x, effective, color=colours)
    _style(top, "", "nats per frame")
    _style(below, "sequence", "effective samples")
    marks = [
        Line2D([], [], ls="", marker="o", ms=3.5, color=_colour("", k - 1), label=f"N = {k}") for k in np.unique(n)
    ]
    return _legend(figure, (), [Line2D([], [], ls="", marker="o", ms=3, color=QUIET, label="bound, Eq (7)"), *marks])


def _ellipses(mean: Floats, cov: Floats) -> NDArray[np.float64]:
    """Outlines (F, 40, 2) of the 95 % regions of F Gaussians."""
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    return mean[:, None] + RADIUS_95 * _CIRCLE @ root.swapaxes(-1, -2)


def _kinds(curves: Mapping[str, object]) -> int:
    return len([name for name in curves if "corrected" not in name])
