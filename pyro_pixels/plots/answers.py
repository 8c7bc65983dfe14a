"""Figures of answers with uncertainty: regions around tracks, bands over time, counts, evidence, reliability.

Arguments are tensors or arrays as in `pyro_pixels.plots.paper`, and the style is the same; NaN draws nothing. Regions
contain 95 % of a Gaussian's mass, and bands show two standard deviations.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from pyro_pixels.plots.paper import overlay
from pyro_pixels.plots.style import (
    CIRCLE,
    FONT,
    QUIET,
    SEEN,
    TEXT,
    TRUTH,
    Data,
    Floats,
    add_legend,
    colour_of,
    draw_tracks,
    grid,
    plane,
    read,
    read_tracks,
    style_axes,
    whole_numbers,
)

RADIUS_95 = 5.991464547**0.5  # radius of the 95 % region of a two-dimensional Gaussian, in standard deviations


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
    """Draws tracks with the 95 % region of every position, one colour per object.

    Args:
        mean: (B, N, T, 2).
        cov: (B, N, T, 2, 2).
        known: (B, N, T) bool, observed frames, marked by dots; the regions of other frames are outlined.
        truth: (B, N, T, 2), drawn as a thin black line.
        n_objects: (B,); slots beyond are left out.
        size: (H, W) of the images, which then sets the limits of the axes.
        titles: one per sequence.
        columns: the number of plots in a row.
    """
    tracks = read_tracks({"mean": mean} | ({} if truth is None else {"truth": truth}), n_objects)
    B, N, T, _ = tracks["mean"].shape
    covs = read(f"{B} {N} {T} 2 2", {"cov": cov})["cov"]
    seen = read(f"{B} {N} {T}", {"known": known})["known"] > 0
    figure, cells = grid(B, columns, 2.4, [2.4 * (size[0] / size[1] if size else 1)])
    for b, (ax,) in enumerate(cells):
        for n in range(N):
            colour, a = colour_of("", n), tracks["mean"][b, n]
            for frames, edge, alpha in ((seen[b, n], "none", 0.15), (~seen[b, n], colour, 0.1)):
                drawn = frames & np.isfinite(a).all(-1)
                outlines = list(_ellipses(a[drawn], covs[b, n, drawn]))
                ax.add_collection(PolyCollection(outlines, facecolor=colour, edgecolor=edge, alpha=alpha))
            draw_tracks(ax, a[None], colour, linewidth=1.1)
            ax.scatter(*a[seen[b, n]].T, s=5, color=colour, zorder=3)
        if truth is not None:
            draw_tracks(ax, tracks["truth"][b], TRUTH, linewidth=0.7)
        plane(ax, size)
        if len(titles):
            ax.set_title(titles[b], **TEXT)
    dot = Line2D([], [], ls="", marker="o", ms=3, color=QUIET, label="seen")
    region = Patch(facecolor=QUIET, alpha=0.4, edgecolor=QUIET, label="95 % region")
    line = Line2D([], [], color=QUIET, label="mean")
    handles = [line, dot, region] if seen.any() else [line, region]
    return add_legend(figure, () if truth is None else ("truth",), handles)


def plot_moves(
    tracks: Data,
    moves: Data,
    *,
    truth: tuple[Data, Data] | None = None,
    n_objects: Data | None = None,
    size: tuple[int, int] | None = None,
    titles: Sequence[str] = (),
    every: int = 4,
    stretch: float = 4.0,
    columns: int = 3,
) -> Figure:
    """Draws velocities as arrows along tracks, one colour per object.

    Args:
        tracks: (B, N, T, 2).
        moves: (B, N, T, 2), the displacement within one frame.
        truth: the true tracks and moves, drawn thin and black.
        n_objects: (B,); slots beyond are left out.
        size: (H, W) of the images, which then sets the limits of the axes.
        titles: one per sequence.
        every: the number of frames between arrows.
        stretch: the length of an arrow, in multiples of the displacement within one frame.
        columns: the number of plots in a row.
    """
    given = {"tracks": tracks, "moves": moves} | dict(zip(("true tracks", "true moves"), truth or ()))
    paths = read_tracks(given, n_objects)
    B, N = paths["tracks"].shape[:2]
    figure, cells = grid(B, columns, 2.4, [2.4 * (size[0] / size[1] if size else 1)])
    heads = {"headwidth": 3, "headlength": 3.5, "headaxislength": 3.5}
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1 / stretch, **heads}
    for b, (ax,) in enumerate(cells):
        for n in range(N):
            start, move = paths["tracks"][b, n], paths["moves"][b, n]
            draw_tracks(ax, start[None], colour_of("", n), linewidth=0.6, alpha=0.5)
            ax.quiver(*start[::every].T, *move[::every].T, color=colour_of("", n), width=0.01, **arrows)
            if truth is not None:
                start, move = paths["true tracks"][b, n], paths["true moves"][b, n]
                ax.quiver(*start[::every].T, *move[::every].T, color=TRUTH, width=0.004, zorder=3, **arrows)
        plane(ax, size)
        if len(titles):
            ax.set_title(titles[b], **TEXT)
    arrow = Line2D([], [], color=QUIET, linewidth=2.5, label=f"inferred velocity, {stretch:g} frames long")
    return add_legend(figure, () if truth is None else ("truth",), [arrow])


def plot_starts(
    mean: Data,
    cov: Data,
    found: Data,
    component: Data,
    *,
    sides: Data | None = None,
    size: tuple[int, int] | None = None,
) -> Figure:
    """Draws the components of Eq (4) as regions, and the starts of objects in the colour of their component.

    Args:
        mean: (K, 4), position and velocity.
        cov: (K, 4, 4).
        found: (M, 4), the starts of objects.
        component: (M,), the likeliest z of each object.
        sides: (M,), 0 for objects that were launched on the left and 1 on the right, shown by different markers.
        size: (H, W) of the images, which then sets the limits of the position plot.
    """
    K, M = np.shape(mean)[0], np.shape(found)[0]
    centre, spread = (read(form, {"starts": x})["starts"] for form, x in ((f"{K} 4", mean), (f"{K} 4 4", cov)))
    starts = read(f"{M} 4", {"found": found})["found"]
    z, side = read(f"{M}", {"component": component, "sides": np.zeros(M) if sides is None else sides}).values()
    figure, [(left,), (right,)] = grid(2, 2, 3.4, [3.2])
    for ax, i in ((left, 0), (right, 2)):
        outlines = _ellipses(centre[:, i : i + 2], spread[:, i : i + 2, i : i + 2])
        for k, outline in enumerate(outlines):
            ax.fill(*outline.T, facecolor=colour_of("", k), alpha=0.15)
            ax.plot(*outline.T, color=colour_of("", k), linewidth=1.0)
        for s, mark in enumerate("o^"):
            chosen = side == s
            colours = [colour_of("", int(k)) for k in z[chosen]]
            ax.scatter(*starts[chosen, i : i + 2].T, s=12, marker=mark, c=colours, linewidths=0, alpha=0.8)
        plane(ax, size if ax is left else None)
    left.set_title("position in the first frame", **TEXT)
    right.set_title("velocity in the first frame, per frame", **TEXT)
    patches = [Patch(color=colour_of("", k), alpha=0.5, label=f"component {k + 1}, 95 % region") for k in range(K)]
    names = () if sides is None else (("o", "launched on the left"), ("^", "on the right"))
    marks = [Line2D([], [], ls="", marker=m, ms=4, color=QUIET, label=name) for m, name in names]
    return add_legend(figure, (), [*patches, *marks])


def plot_fan(
    samples: Data,
    *,
    n_seen: int,
    images: Data | None = None,
    truth: Data | None = None,
    n_objects: Data | None = None,
    titles: Sequence[str] = (),
    columns: int = 3,
) -> Figure:
    """Draws sampled tracks, one colour per object, over the images: observed frames are dark, later ones light.

    Args:
        samples: (S, B, N, T, 2), in pixels if there are ``images``.
        n_seen: the number of frames observed at the start.
        images: (B, T, H, W).
        truth: (B, N, T, 2), drawn in black.
        n_objects: (B,); slots beyond are left out.
        titles: one per sequence.
        columns: the number of plots in a row.
    """
    S, B, N = np.shape(samples)[:3]
    drawn = read("S B N T 2", {"samples": samples})["samples"]
    drawn = [read_tracks({"samples": x}, n_objects)["samples"] for x in drawn]
    true = None if truth is None else read_tracks({"truth": truth}, n_objects)["truth"]
    frames = None if images is None else read(f"{B} T H W", {"images": images})["images"]
    size = None if frames is None else frames.shape[2:]
    figure, cells = grid(B, columns, 2.4, [2.4 * (size[0] / size[1] if size else 1)])
    for b, (ax,) in enumerate(cells):
        if frames is not None:
            picture = np.maximum(overlay(frames[b, :n_seen]), 0.3 * frames[b, n_seen:].max(0))
            ax.imshow(picture, cmap="gray_r", vmin=0, vmax=2.6, interpolation="nearest")
        for n in range(N):
            for track in drawn:
                draw_tracks(ax, track[b, n : n + 1, n_seen - 1 :], colour_of("", n), linewidth=0.5, alpha=0.4)
                ax.scatter(*track[b, n, -1], s=7, color=colour_of("", n), zorder=3)
        if true is not None:
            draw_tracks(ax, true[b], TRUTH, linewidth=1.0)
        plane(ax, size)
        if len(titles):
            ax.set_title(titles[b], **TEXT)
    fan = Line2D([], [], color=QUIET, linewidth=0.7, label=f"{S} sampled futures, from frame {n_seen} on")
    end = Line2D([], [], ls="", marker="o", ms=3, color=QUIET, label="their last frame")
    return add_legend(figure, () if truth is None else ("truth",), [fan, end])


def plot_over_time(
    means: Mapping[str, Data], stds: Mapping[str, Data], *, truth: Data | None = None, titles: Sequence[str] = (),
    label: str = "", seen: Data | None = None, columns: int = 3,
) -> Figure:  # fmt: skip
    """Draws quantities (R, T) against the frame, one panel for each of the R, with bands of two standard deviations.

    Args:
        means: name -> (R, T).
        stds: name -> (R, T), of the same names.
        truth: (R, T), drawn in black.
        titles: one per panel.
        label: the label of the vertical axis.
        seen: (R, T) bool, the frames to shade.
        columns: the number of panels in a row.
    """
    lines = read("R T", means)
    bands = read("R T", stds, like=lines)
    true = None if truth is None else read("R T", {"truth": truth}, like={"truth": next(iter(lines.values()))})["truth"]
    R, T = next(iter(lines.values())).shape
    frame, shaded = np.arange(T) + 1, np.zeros((R, T)) if seen is None else np.asarray(seen)
    figure, cells = grid(R, columns, 2.6, [1.9])
    for r, (ax,) in enumerate(cells):
        for i, (name, line) in enumerate(lines.items()):
            colour = colour_of("", i)
            ax.fill_between(
                frame, line[r] - 2 * bands[name][r], line[r] + 2 * bands[name][r], color=colour, alpha=0.18, lw=0
            )
            ax.plot(frame, line[r], color=colour, linewidth=1.2)
        if true is not None:
            ax.plot(frame, true[r], color=TRUTH, linewidth=0.8)
        for t in np.flatnonzero(shaded[r]):
            ax.axvspan(t + 0.5, t + 1.5, color=SEEN, alpha=0.2, linewidth=0)
        ax.set_xlim(0.5, T + 0.5)
        style_axes(ax, "frame", label if r % columns == 0 else " ")
        whole_numbers(ax)
        if len(titles):
            ax.set_title(titles[r], **TEXT)
    handles = [Line2D([], [], color=colour_of("", i), label=name) for i, name in enumerate(lines)]
    band = Patch(facecolor=QUIET, alpha=0.4, label="2 standard deviations")
    shade = [Patch(facecolor=SEEN, alpha=0.3, label="seen")] if seen is not None else []
    return add_legend(figure, () if truth is None else ("truth",), [*handles, band, *shade])


def plot_reliability(curves: Mapping[str, tuple[Data, Data]]) -> Figure:
    """Draws a reliability diagram: the coverage of predicted regions against their level; calibrated is the diagonal.

    Args:
        curves: name -> levels (L,) and coverages (L,); names with "corrected" are dashed.
    """
    figure, [(ax,)] = grid(1, 1, 3.6, [3.2])
    ax.plot((0, 1), (0, 1), color=QUIET, linewidth=0.8)
    for i, (name, (levels, shares)) in enumerate(curves.items()):
        points = read("L", {"levels": levels, "shares": shares})
        style = "--" if "corrected" in name else "-"
        colour = colour_of("", i % max(1, _n_uncorrected(curves)))
        ax.plot(*points.values(), color=colour, linestyle=style, linewidth=1.4, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    style_axes(ax, "level of the region", "share of true positions within")
    return add_legend(figure, (), ax.lines[1:])


def plot_counts(n_objects: Data, counted: Data, log_evidence: Data) -> Figure:
    """Draws the confusion matrix of counted objects, and the margin of the true N over the best other N in nats.

    Args:
        n_objects: (B,), the true numbers.
        counted: (B,), the inferred numbers.
        log_evidence: (B, max_objects + 1), for every N from 0 on.
    """
    true, inferred = (np.asarray(x, int) for x in (n_objects, counted))
    evidence = read(f"{len(true)} M", {"log_evidence": log_evidence})["log_evidence"]
    M = evidence.shape[1]
    table = np.zeros((M, M), int)
    np.add.at(table, (true, inferred), 1)
    figure, [(left,), (right,)] = grid(2, 2, 3.4, [2.8])
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1.2)
    for i, j in np.ndindex(M, M):
        colour = "white" if shares[i, j] > 0.5 else TRUTH
        left.text(j, i, str(table[i, j]), ha="center", va="center", fontsize=FONT, color=colour)
    left.set(xticks=range(M), yticks=range(M))
    style_axes(left, "counted", "true N")
    rows = np.arange(len(true))
    own = evidence[rows, true]
    others = evidence.copy()
    others[rows, true] = -np.inf
    margin = own - others.max(1)
    for n in np.unique(true):
        x = np.sort(margin[true == n])
        shares = (np.arange(len(x)) + 0.5) / len(x)
        right.plot(x, shares, marker=".", markersize=3, color=colour_of("", n - 1), label=f"N = {n}")
    right.axvline(0, color=QUIET, linewidth=0.8)
    right.set_xscale("symlog", linthresh=10)
    style_axes(right, "lead of the true N (nats)", "share of sequences")
    right.legend(frameon=False, fontsize=FONT)
    return figure


def plot_evidence(bound: Data, log_evidence: Data, effective_samples: Data, n_objects: Data, n_frames: Data) -> Figure:
    """Draws each sequence's ELBO (grey), importance-weighted bound (coloured by N) and effective sample size.

    Args:
        bound: (B,), the ELBO of Eq (7) in nats.
        log_evidence: (B,), the importance-weighted bound in nats.
        effective_samples: (B,).
        n_objects: (B,).
        n_frames: the number of observed frames, (B,) or one for all; the bounds are shown in nats per frame.
    """
    given = read("B", {"bound": bound, "log_evidence": log_evidence, "effective": effective_samples, "n": n_objects})
    n, frames = given["n"].astype(int), np.asarray(n_frames, np.float64)
    order = np.lexsort((-given["log_evidence"], n))
    low, high, effective, n = (
        x[order] for x in (given["bound"] / frames, given["log_evidence"] / frames, given["effective"], n)
    )
    figure, [(top, below)] = grid(1, 1, 5.0, [2.4, 1.3], sharex=True)
    x = np.arange(len(n))
    colours = [colour_of("", k - 1) for k in n]
    top.add_collection(LineCollection([[(i, a), (i, b)] for i, a, b in zip(x, low, high)], color=QUIET, linewidth=0.8))
    top.scatter(x, low, s=5, color=QUIET)
    top.scatter(x, high, s=9, color=colours, zorder=3)
    below.bar(x, effective, color=colours)
    style_axes(top, "", "nats per frame")
    style_axes(below, "sequences, sorted", "effective samples")
    whole_numbers(below)
    marks = [
        Line2D([], [], ls="", marker="o", ms=3.5, color=colour_of("", k - 1), label=f"N = {k}") for k in np.unique(n)
    ]
    return add_legend(figure, (), [Line2D([], [], ls="", marker="o", ms=3, color=QUIET, label="bound, Eq (7)"), *marks])


def _ellipses(mean: Floats, cov: Floats) -> NDArray[np.float64]:
    """Returns the outlines (F, 40, 2) of the 95 % regions of F Gaussians."""
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    return mean[:, None] + RADIUS_95 * CIRCLE @ root.swapaxes(-1, -2)


def _n_uncorrected(curves: Mapping[str, object]) -> int:
    """Returns the number of curves that are not those of a corrected model."""
    return len([name for name in curves if "corrected" not in name])
