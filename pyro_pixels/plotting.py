"""Figures and GIFs (Figs 1, 3, 4, 5, 6, 8, 9 and 10-13) of plain tensors or numpy arrays.

B sequences, N objects, T frames. Images (B, T, H, W) have values in [0, 1]; positions (B, N, T, 2) are (column, row)
in pixels or latent units; NaN draws nothing, nor do slots beyond ``n_objects`` (B,). Every figure is a `Figure` of its
own: pyplot, its settings and its backend are left alone. ValueErrors say which shape or value was wanted.

Departures from the paper: the truth that it repeats in red behind inferred positions (Fig 3) is grey, as red means
generated throughout; Fig 9 has the true images once, between the generated and the interpolated ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pyro_pixels.data import atomic_write

Data = ArrayLike | Tensor
Named = Mapping[str, Data]
Seen = int | slice | ArrayLike | Tensor  # frames that a model was shown: the first so many, a slice, indices, (T,) bool
Floats = NDArray[np.float64]

TRUTH, INFERRED, GENERATED, INTERPOLATED = "#1a1a1a", "#2b5fc4", "#d8323c", "#12b5cf"
OBJECTS = ("#2b5fc4", "#e07b1f", "#2a9d6a", "#b04fa8", "#8a6d3b", "#6b7a8f")  # one colour an object, then round again
SEEN, QUIET = "#f2a93b", "#a6a6a6"  # frames that a model was shown; what is to be looked past
FONT = 8.0  # points
DARKEST = 0.28  # the shade of the first frame in an overlay; the last is 1
_ROLES = {"truth": TRUTH, "infer": INFERRED, "generat": GENERATED, "interpolat": INTERPOLATED}


def overlay(images: Data) -> Floats:
    """A sequence (T, H, W) as one image (H, W), overlaid in time: lighter shades are more recent, on top (Fig 1)."""
    images = _read("images", images, "T H W")
    shades = np.linspace(1.0, DARKEST, len(images))[::-1]
    return (shades[:, None, None] * images).max(0)


def plot_sequences(images: Data, *, columns: int = 4, titles: Sequence[str] | None = None) -> Figure:
    """Sequences (B, T, H, W), each overlaid in time (Fig 1)."""
    images = _read("images", images, "B T H W")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"there are {len(titles)} titles for {len(images)} sequences; wanted one each")
    figure, cells = _grid(len(images), columns, 1.6, [1.6 * images.shape[2] / images.shape[3]])
    for b, (ax,) in enumerate(cells):
        _show(ax, _mosaic([images[b]]), titles[b : b + 1] if titles else ())
    return figure


def plot_positions(
    truth: Data, inferred: Data, *, n_objects: Data | None = None, size: tuple[int, int] | None = None, columns: int = 3
) -> Figure:
    """True (left) and inferred (right) positions (B, N, T, 2) of each sequence, circles where they start (Fig 3).

    The truth is in pixels. Inferred positions are in latent units, each plot at its own scale, or in pixels where
    ``size`` (H, W) is given; then the truth is behind them in grey. There are ``columns`` pairs in a row.
    """
    tracks = _read_tracks({"truth": truth, "inferred": inferred}, n_objects)
    figure, cells = _grid(2 * len(tracks["truth"]), 2 * columns, 1.6, [1.6])
    for b, ((left,), (right,)) in enumerate(zip(cells[::2], cells[1::2])):
        _draw(left, tracks["truth"][b], TRUTH, start=True)
        if size is not None:
            _draw(right, tracks["truth"][b], QUIET, linewidth=0.8)
        _draw(right, tracks["inferred"][b], INFERRED, start=True)
        _plane(left, size)
        _plane(right, size, latent=size is None)
    return _legend(figure, tracks)


def plot_start(h: Data, a: Data) -> Figure:
    """A draw of h (dots) and a (crosses) from the dynamics before learning, one colour an object (Fig 4).

    Both are (N, T, 2) in latent units; h may also be states (N, T, 4), of which the positions are drawn.
    """
    draws = _read_all("draws", {"a": a, "h": _array(h)[..., :2]}, "N T 2")
    figure, [(ax,)] = _grid(1, 1, 3.4, [3.2])
    for n, (crosses, dots) in enumerate(zip(*draws.values())):
        ax.scatter(*crosses.T, s=18, marker="x", linewidths=0.9, color=_colour("", n), alpha=0.7)
        ax.scatter(*dots.T, s=9, color=_colour("", n), zorder=3)
    _plane(ax, latent=True)
    return _legend(figure, (), [Line2D([], [], ls="", color=TRUTH, ms=4, marker=m, label=s) for m, s in ("oh", "xa")])


def plot_inference_means(snapshots: Named) -> Figure:
    """Inferred means of a batch at several stages of training, one colour per object index (Fig 5(a)).

    ``snapshots`` maps the name of a stage to positions (B, N, T, 2) in latent units; every stage has its own scale.
    """
    stages = _read_all("snapshots", snapshots, "B N T 2")
    figure, cells = _grid(len(stages), len(stages), 2.2, [2.3])
    for (ax,), (name, means) in zip(cells, stages.items()):
        for n in range(means.shape[1]):
            _draw(ax, means[:, n], _colour("", n), linewidth=0.5, marker="o", markersize=1.2, alpha=0.6)
        _plane(ax, latent=True)
        ax.set_title(name, fontsize=FONT, color=TRUTH)
    return _legend(figure, [f"object {n + 1}" for n in range(means.shape[1])])


def plot_generated_images(generated: Data | Named, truth: Data, *, rows: int = 1, frame: int | None = None) -> Figure:
    """Generated (left) and true (right) images (B, T, H, W), overlaid in time (Figs 6, 10 and 11).

    ``generated`` may map the names of models to their images; each has ``rows`` rows of pairs. ``frame`` is the index
    of a frame to show by itself above the overlay (-1 in Figs 10 and 11).
    """
    truth = _read("truth", truth, "B T H W")
    models = generated if isinstance(generated, Mapping) else {"": generated}
    models = _read_all("generated", models, "B T H W", like=dict.fromkeys(models, truth))
    pictures = [[_mosaic(pair, frame) for pair in zip(images, truth)] for images in models.values()]
    columns = -(-len(truth) // rows)
    figure, cells = _grid(len(models) * rows * columns, columns, 2.0, [2.0 * _aspect(pictures[0][0])])
    for i, (ax,) in enumerate(cells):
        m, b = divmod(i, rows * columns)
        if b < len(truth):
            _show(ax, pictures[m][b], ("generated", "truth") if i < columns else ())
        ax.set_axis_off()
        if b == 0:
            ax.text(-0.03, 0.5, list(models)[m], _TEXT, transform=ax.transAxes, rotation=90, ha="right", va="center")
    return figure


def plot_trajectories(
    truth: Data | None, inferred: Data | None = None, generated: Data | None = None, interpolated: Data | None = None,
    *, n_objects: Data | None = None, size: tuple[int, int] | None = None, bands: Named | None = None,
    images: Named | None = None, frame: int | None = None, columns: int = 4,
) -> Figure:  # fmt: skip
    """Trajectories (B, N, T, 2) of each sequence, in pixels (Fig 8), and images below them (Figs 9, 12 and 13).

    Args:
        truth, inferred, generated, interpolated: black, blue, red and cyan; NaN frames are left out.
        size: (H, W) of the images, whose edges then bound the plots.
        bands: some of the four names -> standard deviations (B, N, T, 2); the ellipses drawn are two of them wide.
        images: name -> (B, T, H, W), shown side by side, overlaid in time.
        frame: index of a frame to show by itself above the overlays (-1 in Figs 12 and 13).
    """
    given = {"truth": truth, "inferred": inferred, "generated": generated, "interpolated": interpolated}
    tracks = _read_tracks({name: x for name, x in given.items() if x is not None}, n_objects)
    sds = _read_all("bands", bands or {}, "B N T 2", like=tracks)
    B = len(next(iter(tracks.values())))
    pictures = []
    if images:
        pictures = [_mosaic(parts, frame) for parts in zip(*_read_all("images", images, f"{B} T H W").values())]
    heights = [2.2 * (size[0] / size[1] if size else 1), *(2.2 * _aspect(p) + 0.15 for p in pictures[:1])]
    figure, cells = _grid(B, columns, 2.2, heights)
    for b, (ax, *rest) in enumerate(cells):
        for name, x in tracks.items():
            sd = sds[name][b] if name in sds else None
            _draw(ax, x[b], _colour(name), start=name == "truth", sd=sd, linewidth=0.8 if name == "truth" else 1.4)
        _plane(ax, size)
        for below in rest:
            _show(below, pictures[b], list(images or {}))
    return _legend(figure, tracks)


def plot_error_over_time(errors: Named, *, floors: Named | None = None, seen: Seen | None = None) -> Figure:
    """Mean error in each frame, (T,) in pixels for each name, with frames ``seen`` shaded (extends Sec 3.4).

    ``floors``, for some of the names, are the least that is possible, and dashed.
    """
    solid = _read_all("errors", errors, "T")
    dashed = _read_all("floors", floors or {}, "T", like=solid)
    figure, [(ax,)] = _grid(1, 1, 4.8, [2.6])
    T = len(next(iter(solid.values())))
    for i, (name, error) in enumerate(solid.items()):
        ax.plot(np.arange(T) + 1, error, color=_colour(name, i), linewidth=1.4)
        if name in dashed:
            ax.plot(np.arange(T) + 1, dashed[name], color=_colour(name, i), linewidth=1.2, linestyle="--")
    for t in np.flatnonzero(_seen_frames(0 if seen is None else seen, T)):
        ax.axvspan(t + 0.5, t + 1.5, color=SEEN, alpha=0.2, linewidth=0)
    ax.set(xlim=(0.5, T + 0.5), ylim=(0, None))
    _style(ax, "frame", "mean error (pixels)")
    extra: list[Artist] = [Line2D([], [], color=QUIET, linewidth=1.2, linestyle="--", label="floor")] if floors else []
    return _legend(figure, solid, extra + ([Patch(color=SEEN, alpha=0.2, label="seen")] if seen is not None else []))


def plot_training(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """The bound of Eq (7) in training and validation, its KL and the KL's weight beta, from metrics.jsonl's lines.

    The first tenth of training may lie below the plot of the bound.
    """
    panels = {
        "nats per frame": ("bound_per_frame", "validation_bound_per_frame", "log_likelihood_per_frame"),
        "KL (nats)": ("kl_per_frame",),
        "KL weight": ("kl_weight",),
    }
    needed = {"step", "bound_per_frame", "log_likelihood_per_frame", "kl_per_frame", "kl_weight"}
    if not metrics or any(needed - line.keys() for line in metrics):
        raise ValueError(f"metrics have {len(metrics)} lines; wanted at least one, each with {sorted(needed)}")
    figure, [axes] = _grid(1, 1, 4.8, [2.4, 1.1, 1.1], sharex=True)
    step = np.array([line["step"] for line in metrics])
    for ax, (label, keys) in zip(axes, panels.items()):
        for i, key in enumerate(keys):
            values = np.array([line.get(key, np.nan) for line in metrics])
            ax.plot(step, values, color=(OBJECTS[0], OBJECTS[1], QUIET)[i], linewidth=1.3, zorder=3 - i)
        _style(ax, "step" if ax is axes[-1] else "", label)
    late = np.concatenate([line.get_ydata()[step >= step[-1] / 10] for line in axes[0].lines])
    axes[0].set_ylim(bottom=np.nanmin(late) - 0.1 * np.ptp(late[np.isfinite(late)]) - 1e-6)
    axes[2].set_yscale("log")
    names = ("bound", "validation bound", "log p(v|a)")
    return _legend(figure, (), [Line2D([], [], color=x.get_color(), label=s) for x, s in zip(axes[0].lines, names)])


def gif(
    path: str | Path, panels: Named, *,
    scale: int = 6, frames_per_second: float = 12, mark: Mapping[str, Seen] | None = None,
) -> None:  # fmt: skip
    """Writes an endless GIF with the panels side by side, their names above, and a line that tells the time below.

    Args:
        path: of the file; an older one stays until it is whole.
        panels: name -> (T, H, W), or (R, T, H, W) for R sequences below each other; all of one shape.
        scale: a pixel becomes so many pixels wide and high.
        frames_per_second: about, as GIFs count in hundredths of a second. The last frame stays for a second.
        mark: some of the names -> the frames that a model was shown; then the panel says so, with a border.
    """
    stacks = {name: x[None] if (x := _array(panel)).ndim == 3 else x for name, panel in panels.items()}
    images = _read_all("panels", stacks, "R T H W")
    R, T, H, W = next(iter(images.values())).shape
    if not (mark or {}).keys() <= images.keys():
        raise ValueError(f"marks are for {sorted(mark or ())}; wanted some of {sorted(images)}")
    seen = {name: _seen_frames((mark or {}).get(name, 0), T) for name in images}

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 12)
    shades = [np.linspace(255, 255 * np.array(to_rgb(c)), n) for c, n in (("black", 224), (SEEN, 16), (QUIET, 16))]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate(shades).round().astype(np.uint8).tobytes())
    margin, width, height = 8, W * scale, H * scale
    room = margin + max(width, *(int(font.getlength(f"{name}  seen")) + 1 for name in images))
    tops = [24 + r * (height + margin) for r in range(R)]
    pages = []
    for t in range(T):
        page = Image.new("RGB", (margin + len(images) * room, tops[-1] + height + 2 * margin), "white")
        draw = ImageDraw.Draw(page)
        for i, (name, panel) in enumerate(images.items()):
            left = margin + i * room
            draw.text((left, 5), name, TRUTH, font)
            if seen[name][t]:
                draw.text((left + font.getlength(f"{name}  "), 5), "seen", SEEN, font)
                for top in tops:
                    draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), SEEN)
            for top, image in zip(tops, panel[:, t]):
                picture = Image.fromarray((255 * image).round().astype(np.uint8))
                page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        end = margin + (page.width - 2 * margin) * (t + 1) / T  # the line also keeps equal frames from being merged
        draw.rectangle((margin, page.height - 7, end, page.height - 6), QUIET)
        pages.append(page.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [round(1000 / frames_per_second)] * (T - 1) + [1000]
    with atomic_write(path) as file:
        pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the path ends in, PNG if none; an older file stays until it is whole."""
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=130, bbox_inches="tight")


_TEXT = {"fontsize": FONT, "color": TRUTH}
_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 40)), np.sin(np.linspace(0, 2 * np.pi, 40))], -1)


def _array(x: Data) -> NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _read(name: str, x: Data, form: str, like: Floats | None = None) -> Floats:
    """``x`` as float64 of the shape that ``form`` names, such as "B N T 2", and of that of ``like``."""
    x, axes = _array(x).astype(np.float64), form.split()
    fits = len(axes) == x.ndim and x.size and all(a.isalpha() or a == str(n) for a, n in zip(axes, x.shape))
    if not fits or (like is not None and x.shape != like.shape):
        wanted = f"({', '.join(axes)})" if like is None else f"({', '.join(axes)}) = {like.shape}"
        raise ValueError(f"{name} has shape {x.shape}; wanted {wanted}")
    if form.endswith("H W") and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"{name} has values from {x.min():g} to {x.max():g}; wanted 0 to 1 (divide grey values by 255)")
    return x


def _read_all(kind: str, named: Named, form: str, like: Mapping[str, Floats] | None = None) -> dict[str, Floats]:
    """Arrays of one shape; ``like`` has the names that are allowed, and their shapes."""
    if not (named or like):
        raise ValueError(f"there are no {kind}; wanted at least one")
    if like is not None and not named.keys() <= like.keys():
        raise ValueError(f"{kind} are for {sorted(named)}; wanted some of {sorted(like)}")
    arrays: dict[str, Floats] = {}
    for name, x in named.items():
        arrays[name] = _read(f"{kind} {name!r}", x, form, next(iter((like or arrays).values()), None))
    return arrays


def _read_tracks(named: Named, n_objects: Data | None) -> dict[str, Floats]:
    tracks = _read_all("positions", named, "B N T 2")
    B, N = next(iter(tracks.values())).shape[:2]
    n = np.full(B, N) if n_objects is None else _read("n_objects", n_objects, f"{B}")
    absent = np.arange(N) >= n[:, None]
    return {name: np.where(absent[:, :, None, None], np.nan, x) for name, x in tracks.items()}


def _seen_frames(seen: Seen, n_frames: int) -> NDArray[np.bool_]:
    frames = np.zeros(n_frames, bool)
    try:
        frames[slice(seen) if isinstance(seen, int) else seen if isinstance(seen, slice) else _array(seen)] = True
    except IndexError:
        raise ValueError(f"seen is {seen}; wanted how many, a slice, indices or booleans of {n_frames} frames") from None
    return frames


def _grid(n: int, columns: int, width: float, heights: Sequence[float], **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of n cells, each of axes below each other: so many inches wide and high."""
    columns, k = min(columns, n), len(heights)
    rows = -(-n // columns)
    figure = Figure((columns * width, rows * sum(heights) + 0.3), layout="constrained", facecolor="white")
    axes = figure.subplots(k * rows, columns, squeeze=False, height_ratios=[*heights] * rows, **options)
    cells = [list(axes[i // columns * k :, i % columns][:k]) for i in range(rows * columns)]
    for ax in sum(cells[n:], []):
        ax.remove()
    return figure, cells[:n]


def _mosaic(sequences: Iterable[Floats], frame: int | None = None) -> Floats:
    """Sequences (T, H, W) side by side, overlaid in time, below their frame by itself if any; NaN between them."""
    rows = [[] if frame is None else [x[frame] for x in sequences], [overlay(x) for x in sequences]]
    return np.block([[np.pad(x, 1, constant_values=np.nan) for x in row] for row in rows if row])


def _aspect(picture: Floats) -> float:
    return picture.shape[0] / picture.shape[1]


def _show(ax: Axes, picture: Floats, labels: Sequence[str] = ()) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    for i, label in enumerate(labels):
        ax.text((i + 0.5) / len(labels), 1, label, _TEXT, transform=ax.transAxes, ha="center", va="bottom")


def _draw(ax: Axes, tracks: Floats, colour: str, *, start: bool = False, sd: Floats | None = None, **style: Any) -> None:
    """Tracks (N, T, 2), with ellipses of two ``sd`` in a tint that hides what is below, so that they make a ribbon."""
    for n, track in enumerate(tracks):
        there = np.isfinite(track).all(-1)
        if not there.any():
            continue
        if sd is not None:
            ellipses = track[there][:, None] + 2 * sd[n][there][:, None] * _CIRCLE
            ax.add_collection(PolyCollection(ellipses, facecolor=0.8 + 0.2 * np.array(to_rgb(colour)), zorder=1))
        ax.plot(*track.T, color=colour, **{"linewidth": 1.3, **style})
        if start:
            ax.scatter(*track[there][0], s=22, facecolor="white", edgecolor=colour, linewidths=0.9, zorder=3)


def _plane(ax: Axes, size: tuple[int, int] | None = None, *, latent: bool = False) -> None:
    ax.set_aspect("equal", adjustable="box" if size else "datalim")
    if size:
        ax.set(xlim=(0, size[1] - 1), ylim=(size[0] - 1, 0), xticks=[0, size[1] - 1], yticks=[0, size[0] - 1])
    else:
        ax.locator_params(nbins=4)
        ax.yaxis.set_inverted(not latent)
    _style(ax)


def _style(ax: Axes, x: str = "", y: str = "") -> None:
    ax.tick_params(labelsize=FONT - 1.5, colors="#777777", length=2, pad=2)
    ax.spines[:].set(color=QUIET, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(not y)
    ax.set_xlabel(x, **_TEXT)
    ax.set_ylabel(y, **_TEXT)


def _colour(name: str, i: int = 0) -> str:
    return next((c for stem, c in _ROLES.items() if name.lower().startswith(stem)), OBJECTS[i % len(OBJECTS)])


def _legend(figure: Figure, names: Iterable[str], extra: Sequence[Artist] = ()) -> Figure:
    lines = [Line2D([], [], color=_colour(name, i), label=name) for i, name in enumerate(names)]
    options = {"ncols": 6, "frameon": False, "fontsize": FONT, "labelcolor": TRUTH, "handlelength": 1.4}
    figure.legend(handles=[*lines, *extra], loc="outside lower center", **options)
    return figure
