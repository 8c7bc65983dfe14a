"""The paper's figures (Figs 1, 3, 4, 5, 6, 8, 9 and 10-13) and GIFs, from plain tensors or numpy arrays.

B sequences, N objects, T frames. Images (B, T, H, W) have values in [0, 1]; frames of NaN, unobserved, are black.
Positions (B, N, T, 2) are (column, row) in pixels or latent units; NaN and slots beyond ``n_objects`` (B,) are not
drawn. Every function returns a new `Figure` and leaves pyplot, its settings and its backend alone. A ValueError names
the shape or value that was wanted.

Departures from the paper: the truth that Fig 3 repeats in red behind the inferred positions is grey, because red stands
for generated positions everywhere; Fig 9 shows the true images once, between the generated and interpolated ones.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from pyro_pixels._files import atomic_write
from pyro_pixels.plots.style import (
    FONT,
    INFERRED,
    INTERPOLATED,
    OBJECTS,
    QUIET,
    SEEN,
    START,
    TEXT,
    TRUTH,
    Data,
    Floats,
    Named,
    add_legend,
    colour_of,
    draw_tracks,
    grid,
    plane,
    read,
    read_tracks,
    seen_frames,
    style_axes,
    whole_numbers,
)

SOFTWARE = "pyro_pixels"  # in PNG files, to tell figures that may be replaced from pictures of others
DARKEST = 0.28  # the shade of the first frame of an overlay; the last has 1


def overlay(images: Data) -> Floats:
    """Overlays the frames of a sequence (T, H, W) in one image (H, W); later frames are lighter and on top (Fig 1)."""
    images = read("T H W", {"images": images})["images"]
    shades = np.linspace(1.0, DARKEST, len(images))[::-1]
    return (shades[:, None, None] * images).max(0)


def plot_sequences(images: Data, *, columns: int = 4, titles: Sequence[str] | None = None) -> Figure:
    """Draws sequences (B, T, H, W), each overlaid in time (Fig 1)."""
    images = read("B T H W", {"images": images})["images"]
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"there are {len(titles)} titles for {len(images)} sequences; wanted one per sequence")
    figure, cells = grid(len(images), columns, 1.6, [1.6 * images.shape[2] / images.shape[3]])
    for b, (ax,) in enumerate(cells):
        _show(ax, [images[b]], titles[b : b + 1] if titles else ())
    return figure


def plot_frames(sequences: Named) -> Figure:
    """Draws the frames of each named sequence (T, H, W) side by side, one row per sequence."""
    rows = read("T H W", sequences)
    T, H, W = next(iter(rows.values())).shape
    figure, cells = grid(len(rows), 1, 1.2 * T, [1.2 * H / W])
    for (ax,), (name, images) in zip(cells, rows.items()):
        _show(ax, [images[t : t + 1] for t in range(T)])
        _name(ax, name)
    return figure


def plot_positions(
    truth: Data, inferred: Data, *, n_objects: Data | None = None, size: tuple[int, int] | None = None, columns: int = 3
) -> Figure:
    """Draws true (left) and inferred (right) positions (B, N, T, 2), with circles at their starts (Fig 3).

    The truth is in pixels. Without ``size`` inferred positions are in latent units, each plot on its own scale; with
    ``size`` (H, W) they are in pixels, and the truth is shown behind them in grey. A row has ``columns`` pairs.
    """
    tracks = read_tracks({"truth": truth, "inferred": inferred}, n_objects)
    figure, cells = grid(2 * len(tracks["truth"]), 2 * columns, 1.6, [1.6])
    for b, ((left,), (right,)) in enumerate(zip(cells[::2], cells[1::2])):
        draw_tracks(left, tracks["truth"][b], TRUTH, start=True)
        draw_tracks(right, tracks["truth"][b][: None if size else 0], QUIET, linewidth=0.8)
        draw_tracks(right, tracks["inferred"][b], INFERRED, start=True)
        plane(left, size)
        plane(right, size, latent=size is None)
    return add_legend(figure, tracks, [START])


def plot_start(h: Data, a: Data) -> Figure:
    """Draws h (dots) and a (crosses), (N, T, 2) in latent units, sampled before training (Fig 4)."""
    draws = read("N T 2", {"h": h, "a": a})
    figure, [(ax,)] = grid(1, 1, 3.4, [3.2])
    for n, (dots, crosses) in enumerate(zip(*draws.values())):
        ax.scatter(*crosses.T, s=18, marker="x", linewidths=0.9, color=colour_of("", n), alpha=0.7)
        ax.scatter(*dots.T, s=9, color=colour_of("", n), zorder=3)
    plane(ax, latent=True)
    marks = [Line2D([], [], ls="", color=TRUTH, ms=4, marker=m, label=s) for m, s in ("oh", "xa")]
    return add_legend(figure, (), marks)


def plot_inference_means(snapshots: Named) -> Figure:
    """Draws the inferred means (B, N, T, 2) of a batch, in latent units, at named stages of training (Fig 5(a))."""
    stages = read("B N T 2", snapshots)
    objects = [f"object {n + 1}" for n in range(next(iter(stages.values())).shape[1])]
    figure, cells = grid(len(stages), len(stages), 2.2, [2.3])
    for (ax,), (name, means) in zip(cells, stages.items()):
        for n in range(len(objects)):
            draw_tracks(ax, means[:, n], colour_of("", n), linewidth=0.5, marker="o", markersize=1.2, alpha=0.6)
        plane(ax, latent=True)
        ax.set_title(name, **TEXT)
    return add_legend(figure, objects)


def plot_generated_images(generated: Data | Named, truth: Data, *, rows: int = 1) -> Figure:
    """Draws generated (left) and true (right) images (B, T, H, W), overlaid in time (Figs 6, 10 and 11).

    ``generated`` may also map the names of several models to their images; each model has ``rows`` rows of pairs.
    """
    truth = read("B T H W", {"truth": truth})["truth"]
    models = generated if isinstance(generated, Mapping) else {"generated": generated}
    models = read("B T H W", models, like=dict.fromkeys(models, truth))
    columns = -(-len(truth) // rows)
    figure, cells = grid(len(models) * rows * columns, columns, 2.0, [truth.shape[2] / truth.shape[3]])
    for i, (ax,) in enumerate(cells):
        (name, images), b = [*models.items()][i // (rows * columns)], i % (rows * columns)
        ax.set_axis_off()
        if b < len(truth):
            _show(ax, [images[b], truth[b]], ("generated", "truth") if i < columns else ())
        if b == 0 and isinstance(generated, Mapping):
            _name(ax, name)
    return figure


def plot_trajectories(
    truth: Data | None, inferred: Data | None = None, generated: Data | None = None, interpolated: Data | None = None,
    *, n_objects: Data | None = None, size: tuple[int, int] | None = None, bands: Named | None = None,
    images: Named | None = None, columns: int = 4, titles: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Draws the trajectories (B, N, T, 2) of each sequence in pixels (Fig 8), and images below (Figs 9, 12 and 13).

    Args:
        truth: drawn in black, thin and above the others; frames with NaN are left out, here and below.
        inferred: drawn in blue.
        generated: drawn in red.
        interpolated: drawn in cyan.
        n_objects: (B,); slots beyond are left out.
        size: (H, W) of the images, which then sets the limits of the axes.
        bands: some of the four names -> standard deviations (B, N, T, 2), shown as ellipses of twice their size.
        images: name -> (B, T, H, W), shown side by side, overlaid in time.
        columns: the number of sequences in a row.
        titles: one per sequence.
    """
    given = {"truth": truth, "inferred": inferred, "generated": generated, "interpolated": interpolated}
    tracks = read_tracks({name: x for name, x in given.items() if x is not None}, n_objects)
    sds = read("B N T 2", bands or {}, like=tracks)
    B = len(next(iter(tracks.values())))
    shown = read(f"{B} T H W", images) if images else {}
    heights = [x.shape[2] / x.shape[3] / len(shown) for x in shown.values()][:1]
    heights = [2.2 * (size[0] / size[1] if size else 1), *(2.2 * height + 0.1 for height in heights)]
    figure, cells = grid(B, columns, 2.2, heights)
    for b, (ax, *below) in enumerate(cells):
        for name, x in tracks.items():
            first, sd = name == next(iter(tracks)), sds[name][b] if name in sds else None
            style = {"linewidth": 0.7, "zorder": 2.5} if name == "truth" else {"linewidth": 1.8}
            draw_tracks(ax, x[b], colour_of(name), start=first, sd=sd, **style)
        plane(ax, size)
        if len(titles):
            ax.set_title(titles[b], **TEXT)
        for picture_ax in below:
            _show(picture_ax, [x[b] for x in shown.values()], [*shown])
    return add_legend(figure, tracks, [START])


def plot_error_over_time(
    errors: Named, *, floors: Named | None = None, seen: Data | slice | None = None,
    seen_by_interpolation: Data | slice | None = None,
) -> Figure:  # fmt: skip
    """Draws mean errors (T,) in pixels against the frame.

    Args:
        errors: name -> (T,).
        floors: some of the names -> (T,), drawn dashed.
        seen: the observed frames, which are shaded: their number from the start, a slice, indices or a mask.
        seen_by_interpolation: likewise; those that are not in ``seen``, too, are shaded in the colour of interpolation.
    """
    solid = read("T", errors)
    dashed = read("T", floors or {}, like=solid)
    figure, [(ax,)] = grid(1, 1, 4.8, [2.6])
    T = len(next(iter(solid.values())))
    for i, (name, error) in enumerate(solid.items()):
        ax.plot(np.arange(T) + 1, error, color=colour_of(name, i), linewidth=1.4)
        if name in dashed:
            ax.plot(np.arange(T) + 1, dashed[name], color=colour_of(name, i), linewidth=1.2, linestyle="--")
    shown, ends = (seen_frames(0 if x is None else x, T) for x in (seen, seen_by_interpolation))
    kinds = {"seen": (shown, SEEN), "seen by interpolation only": (ends & ~shown, INTERPOLATED)}
    shades = []
    for label, (frames, colour) in kinds.items():
        spans = [
            ax.axvspan(t + 0.5, t + 1.5, color=colour, alpha=0.2, lw=0, label=label) for t in np.flatnonzero(frames)
        ]
        shades += spans[:1]
    ax.set(xlim=(0.5, T + 0.5), ylim=(0, None))
    style_axes(ax, "frame", "mean error (pixels)")
    whole_numbers(ax)
    floor = [Line2D([], [], color=QUIET, linewidth=1.2, linestyle="--", label="floor")] if floors else []
    return add_legend(figure, solid, [*floor, *shades])


def plot_training(metrics: Sequence[Mapping[str, float | None]]) -> Figure:
    """Draws the ELBO of Eq (7), the KL and the KL weight from the lines of metrics.jsonl; early lows are cut off.

    Curves have gaps where values are None or not finite.
    """
    names = {"bound_per_frame": "bound", "validation_bound_per_frame": "validation bound",
             "log_likelihood_per_frame": "log p(v|a)", "kl_per_frame": "KL", "kl_weight": "KL weight"}  # fmt: skip
    needed = {"step", *names} - {"validation_bound_per_frame"}
    if not metrics or any(needed - line.keys() for line in metrics):
        raise ValueError(f"metrics have {len(metrics)} lines; wanted at least one, each with {sorted(needed)}")
    figure, [axes] = grid(1, 1, 4.8, [2.4, 1.1, 1.1], sharex=True)
    for i, (key, name) in enumerate(names.items()):
        points = np.array([(line["step"], line[key]) for line in metrics if key in line], dtype=float)  # None: NaN
        if len(points):
            points[~np.isfinite(points)] = np.nan
            axes[max(0, i - 2)].plot(*points.T, color=OBJECTS[i], linewidth=1.3, label=name)
    step, bound = np.concatenate([line.get_xydata() for line in axes[0].lines]).T
    known = np.isfinite(bound)
    if known.any():
        late = known & (step >= step[known].max() / 10)
        low, high = bound[late].min(), bound[known].max()
        axes[0].set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes[2].set_yscale("log", subs=[])
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for ax, label in zip(axes, ("nats per frame", "KL per frame", "KL weight")):
        style_axes(ax, "step" if ax is axes[-1] else "", label)
        ax.yaxis.set_major_formatter("{x:g}")
    whole_numbers(axes[-1])
    return add_legend(figure, (), axes[0].lines)


def plot_learning_curves(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float | None]]]], marks: Named | None = None
) -> Figure:
    """Draws errors in pixels against seconds of training on logarithmic axes, one line per seed.

    Args:
        curves: name -> for each seed, the (seconds, error) pairs of its evaluations; gaps where an error is None.
        marks: name -> (seconds, error), points for comparison, in the colour of the curve whose name begins theirs.
    """
    if not any(len(seed) for seeds in curves.values() for seed in seeds):
        raise ValueError("there are no evaluations to draw; wanted at least one (seconds, error)")
    figure, [(ax,)] = grid(1, 1, 4.8, [2.8])
    names = [*curves]
    for i, seeds in enumerate(curves.values()):
        for seed in seeds:
            ax.plot(*np.array(seed, dtype=float).reshape(-1, 2).T, color=colour_of("", i), linewidth=1.0, alpha=0.7)
    crosses = []
    for name, point in (marks or {}).items():
        i = next((i for i, curve in enumerate(names) if name.startswith(curve)), len(names))
        crosses += ax.plot(*np.reshape(point, (2, 1)), "x", color=colour_of("", i), markersize=6, label=name)
    ax.set(xscale="log", yscale="log")
    style_axes(ax, "seconds of training", "mean error (pixels)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    lines = [Line2D([], [], color=colour_of("", i), label=name) for i, name in enumerate(names)]
    return add_legend(figure, (), [*lines, *crosses])


def gif(
    path: str | Path, panels: Named, *, scale: int = 6, frames_per_second: float = 12, mark: Named | None = None
) -> None:
    """Writes a looping GIF with the panels side by side, their names above and a progress bar below.

    Args:
        path: the file to write.
        panels: name -> (T, H, W), or (R, T, H, W) for R sequences below each other; all of one shape.
        scale: the side of a pixel in the file.
        frames_per_second: the speed, rounded to hundredths of a second per frame; the last frame stays for a second.
        mark: some of the names -> observed frames, as in `plot_error_over_time`, marked by a border and "seen".
    """
    form = "T H W" if all(np.ndim(x) == 3 for x in panels.values()) else "R T H W"
    images = {name: x.reshape(-1, *x.shape[-3:]) for name, x in read(form, panels).items()}
    R, T, H, W = next(iter(images.values())).shape
    if not (mark or {}).keys() <= images.keys():
        raise ValueError(f"marks are for {sorted(mark or ())}; wanted some of {sorted(images)}")
    seen = {name: seen_frames((mark or {}).get(name, 0), T) for name in images}
    white, border, margin = 223, 239, 10  # the palette runs from black to white, and on to the colour of SEEN
    ramps = [np.interp(np.arange(border + 1), (0, white, border), (0, 255, 255 * c)) for c in to_rgb(SEEN)]
    font = ImageFont.load_default(13)
    room = margin + max(W * scale, *(int(font.getlength(f"{name}  seen")) + 1 for name in images))
    pages = []
    for t in range(T):
        page = Image.new("L", (margin + len(images) * room, 24 + R * (H * scale + margin) + margin), white)
        draw = ImageDraw.Draw(page)
        for left, (name, panel) in zip(range(margin, page.width, room), images.items()):
            draw.text((left, 4), name, 20, font)
            draw.text((left + font.getlength(f"{name}  "), 4), "seen" if seen[name][t] else "", border, font)
            for top, image in zip(range(24, page.height, H * scale + margin), panel[:, t]):
                picture = np.kron((white * image).round(), np.ones((scale, scale)))
                picture = np.pad(picture, 3, constant_values=border if seen[name][t] else white)
                page.paste(Image.fromarray(picture.astype(np.uint8)), (left - 3, top - 3))
        end = margin + (page.width - 2 * margin) * (t + 1) / T  # the line also keeps equal frames from being merged
        draw.rectangle((margin, page.height - 8, end, page.height - 7), 150)
        page.putpalette(np.stack(ramps, 1).round().astype(np.uint8).tobytes())
        pages.append(page)
    durations = [round(1000 / frames_per_second)] * (T - 1) + [1000]
    with atomic_write(path) as file:
        pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)


def save_figure(figure: Figure, path: str | Path, title: str = "") -> None:
    """Writes a figure in the format of the path's suffix, PNG without one, replacing an older file atomically.

    Args:
        figure: a figure from one of the functions here.
        path: the file to write.
        title: written above the figure, wrapped to its width.
    """
    if title:
        letters = max(20, int(figure.get_figwidth() * 72 / (0.55 * (FONT + 1))))
        lines = textwrap.wrap(title, letters)
        if not figure.get_suptitle():
            figure.set_figheight(figure.get_figheight() + 1.2 * (FONT + 1) / 72 * (len(lines) - 1))
        figure.suptitle("\n".join(lines), fontsize=FONT + 1, color=TRUTH)
    layout, box = figure.get_layout_engine(), "tight"
    if layout is not None and len(figure.texts) == bool(title):  # margins are right then, and the file is drawn once
        for _ in range(2):  # axes of equal scales change their size in the first, and their titles move
            layout.execute(figure)
        figure.set_layout_engine("none")
        box = None
    kind = Path(path).suffix[1:] or "png"
    with atomic_write(path) as file:
        metadata = {"Software": SOFTWARE} if kind == "png" else None
        figure.savefig(file, format=kind, dpi=130, bbox_inches=box, metadata=metadata)


def figure_beside(path: Path) -> Path:
    """Returns the path of the figure beside a result: the same name, with .png.

    Raises:
        ValueError: if a file of that name is there that `save_figure` did not write.
    """
    figure = path.with_suffix(".png")
    if figure.exists() and not _is_ours(figure):
        raise ValueError(f"{figure} was not drawn by this program and would be overwritten; choose another name")
    return figure


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False


def _show(ax: Axes, sequences: Sequence[Floats], labels: Sequence[str] = ()) -> None:
    """Draws sequences (T, H, W) side by side, each overlaid in time and below its label."""
    picture = np.hstack([np.pad(overlay(x), 1, constant_values=np.nan) for x in sequences])
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    for i, label in enumerate(labels):
        ax.text((i + 0.5) / len(labels), 1, label, transform=ax.transAxes, ha="center", va="bottom", **TEXT)


def _name(ax: Axes, name: str) -> None:
    """Writes a name to the left of a row."""
    ax.text(-0.03, 0.5, name, transform=ax.transAxes, rotation=90, ha="right", va="center", **TEXT)
