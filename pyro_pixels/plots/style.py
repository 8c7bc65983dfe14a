"""The common style of all figures: colours, input checks, grids of axes, tracks and legends.

`pyro_pixels.plots.paper` and `pyro_pixels.plots.answers` are built on it, and your own figures can be, too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Data = ArrayLike | Tensor
Named = Mapping[str, Data]
Floats = NDArray[np.float64]

TRUTH, INFERRED, GENERATED, INTERPOLATED = "#1a1a1a", "#2b5fc4", "#d8323c", "#12b5cf"
OBJECTS = ("#2b5fc4", "#e07b1f", "#2a9d6a", "#b04fa8", "#8a6d3b", "#6b7a8f")  # one colour per object, reused in turn
SEEN, QUIET = "#f2a93b", "#a6a6a6"  # observed frames; background elements
FONT = 8.0  # points
_ROLES = {"truth": TRUTH, "infer": INFERRED, "generat": GENERATED, "interpolat": INTERPOLATED}
TEXT: dict[str, Any] = {"fontsize": FONT, "color": TRUTH}
LABEL: dict[str, Any] = {"fontsize": FONT - 1.5, "color": "#777777", "labelpad": 1}  # of the axes of positions
CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 40)) for f in (np.cos, np.sin)], -1)


def read(form: str, named: Named, like: Mapping[str, Floats] | None = None) -> dict[str, Floats]:
    """Converts named arrays to float64 and checks that they share one shape.

    Args:
        form: the dimensions, such as "B N T 2"; images, "... H W", must also lie in [0, 1], and frames that are NaN,
            which means unobserved, become black.
        named: name -> array.
        like: if given, arrays whose names and shape ``named`` must match.

    Raises:
        ValueError: if there are no arrays, or names, shapes or values differ from what is wanted.
    """
    if not (named or like) or (like is not None and named.keys() - like.keys()):
        raise ValueError(f"names are {sorted(named)}; wanted {f'some of {sorted(like)}' if like else 'at least one'}")
    arrays = {k: np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64) for k, x in named.items()}
    axes, shape = form.split(), next(iter((like or arrays).values())).shape
    for name, x in arrays.items():
        fits = len(axes) == x.ndim and x.size and all(a.isalpha() or a == str(n) for a, n in zip(axes, x.shape))
        if not fits or x.shape != shape:
            wanted = f"({', '.join(axes)})" + f" = {shape}" * (x.shape != shape)
            raise ValueError(f"{name} has shape {x.shape}; wanted {wanted}")
        if form.endswith("H W"):
            arrays[name] = x = np.where(np.isnan(x).all((-2, -1), keepdims=True), 0.0, x)
            if np.isnan(x).any():
                raise ValueError(f"{name} has NaN in part of a frame; only whole frames may be NaN (unobserved)")
            if x.min() < 0 or x.max() > 1:
                raise ValueError(
                    f"{name} has values from {x.min():g} to {x.max():g}; wanted 0 to 1 (divide bytes by 255)"
                )
    return arrays


def read_tracks(named: Named, n_objects: Data | None) -> dict[str, Floats]:
    """Checks named tracks (B, N, T, 2) as `read` does and sets slots beyond ``n_objects`` (B,) to NaN."""
    tracks = read("B N T 2", named)
    B, N = next(iter(tracks.values())).shape[:2]
    n = np.full(B, N) if n_objects is None else read(f"{B}", {"n_objects": n_objects})["n_objects"]
    return {name: np.where((np.arange(N) < n[:, None])[:, :, None, None], x, np.nan) for name, x in tracks.items()}


def seen_frames(seen: Any, n_frames: int) -> NDArray[np.bool_]:
    """Returns a mask (T,) of the observed frames, given as their number from the start, a slice, indices or a mask."""
    frames = np.arange(n_frames)
    try:
        return np.isin(frames, frames[slice(seen) if isinstance(seen, int | np.integer) else seen])
    except IndexError:
        raise ValueError(f"seen is {seen}; wanted a number, slice, indices or mask of {n_frames} frames") from None


def grid(n: int, columns: int, width: float, heights: list[float], **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """Makes a figure of ``n`` cells, each a column of axes; ``width`` and ``heights`` of the axes are in inches."""
    columns, k = min(columns, n), len(heights)
    rows = -(-n // columns)
    figure = Figure((columns * width, rows * sum(heights) + 0.2), layout="constrained", facecolor="white")
    axes = figure.subplots(k * rows, columns, squeeze=False, height_ratios=[*heights] * rows, **options)
    cells = [list(axes[i // columns * k :, i % columns][:k]) for i in range(rows * columns)]
    for ax in (ax for cell in cells[n:] for ax in cell):
        ax.remove()
    return figure, cells[:n]


def draw_tracks(
    ax: Axes, tracks: Floats, colour: str, start: bool = False, sd: Floats | None = None, **style: Any
) -> None:
    """Draws tracks (N, T, 2); with ``sd``, ellipses of two standard deviations form a ribbon around each track.

    The ellipses are opaque, in a light tint of the track's colour, so that they merge into one band.
    """
    for n, track in enumerate(tracks):
        valid = np.isfinite(track).all(-1)
        if not valid.any():
            continue
        if sd is not None:
            ellipses = track[valid][:, None] + 2 * sd[n][valid][:, None] * CIRCLE
            ax.add_collection(PolyCollection(ellipses, facecolor=0.83 + 0.17 * np.array(to_rgb(colour)), zorder=1))
        ax.plot(*track.T, color=colour, solid_joinstyle="round", **{"linewidth": 1.3, **style})
        if start:
            ax.scatter(*track[valid][0], s=22, facecolor="white", edgecolor=colour, linewidths=0.9, zorder=3)


def plane(ax: Axes, size: tuple[int, int] | None = None, *, latent: bool = False) -> None:
    """Sets up axes for positions: in pixels with rows counted downwards, or in latent units with y upwards.

    Args:
        ax: the axes.
        size: (H, W) of the images, which then sets the limits; None fits the limits to the data.
        latent: True for latent units.
    """
    ax.set_aspect("equal", adjustable="box" if size else "datalim")
    if size:
        ax.set(xlim=(0, size[1] - 1), ylim=(size[0] - 1, 0), xticks=[0, size[1] - 1], yticks=[0, size[0] - 1])
    else:
        ax.locator_params(nbins=4)
        ax.yaxis.set_inverted(not latent)
    style_axes(ax)
    unit, place = ("latent units" if latent else "pixels"), ax.get_subplotspec()
    ax.set_xlabel(f"x, {unit}", **LABEL)
    if place is None or place.is_first_col():
        ax.set_ylabel(f"y, {unit}", **LABEL)


def style_axes(ax: Axes, x: str = "", y: str = "") -> None:
    """Applies the common style to axes and labels them; axes without a label for y keep all four spines."""
    ax.tick_params(which="both", labelsize=FONT - 1.5, colors="#777777", length=2, pad=2)
    ax.spines[:].set(color=QUIET, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(not y)
    ax.set_xlabel(x, **TEXT)
    ax.set_ylabel(y, **TEXT)


def whole_numbers(ax: Axes) -> None:
    """Puts the ticks of x, which counts something, at whole numbers."""
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)


def colour_of(name: str, i: int = 0) -> str:
    """Returns the colour of the role that ``name`` begins with, such as "generated", else that of object ``i``."""
    return next((c for stem, c in _ROLES.items() if name.lower().startswith(stem)), OBJECTS[i % len(OBJECTS)])


START = Line2D([], [], ls="", marker="o", ms=4.5, mfc="white", mec=TRUTH, mew=0.9, label="start")


def add_legend(figure: Figure, names: Iterable[str], extra: Iterable[Any] = ()) -> Figure:
    """Adds a legend below the figure with one line per name, followed by ``extra`` handles.

    It has as many columns as the width of the figure allows, and the figure grows if that is too few.
    """
    handles = [*(Line2D([], [], color=colour_of(name, i), label=name) for i, name in enumerate(names)), *extra]
    style = {"frameon": False, "fontsize": FONT, "handlelength": 1.4, "handletextpad": 0.8, "columnspacing": 2.0}
    around = FONT * (1.4 + 0.8 + 2.0)  # the handle, and the space on both sides of the text
    widths = [TextPath((0, 0), str(x.get_label()), size=FONT).get_extents().width + around for x in handles]
    room = 72 * figure.get_figwidth()
    if widths and max(widths) > room:
        room = max(widths)
        figure.set_figwidth(room / 72)
    fits = (n for n in range(min(6, len(widths)), 1, -1) if sum(max(x) for x in np.array_split(widths, n)) <= room)
    columns = next(fits, 1)
    figure.set_figheight(figure.get_figheight() + 1.6 * FONT / 72 * (-(-len(widths) // columns) - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **style)
    return figure
