"""What all figures share: colours, the reading of arrays, grids of axes, tracks, legends.

`plotting` and `query_plots` draw on it; figures of one's own can, too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Data = ArrayLike | Tensor
Named = Mapping[str, Data]
Floats = NDArray[np.float64]

TRUTH, INFERRED, GENERATED, INTERPOLATED = "#1a1a1a", "#2b5fc4", "#d8323c", "#12b5cf"
OBJECTS = ("#2b5fc4", "#e07b1f", "#2a9d6a", "#b04fa8", "#8a6d3b", "#6b7a8f")  # one colour an object, then round again
SEEN, QUIET = "#f2a93b", "#a6a6a6"  # frames that a model was shown; what is to be looked past
FONT = 8.0  # points
_ROLES = {"truth": TRUTH, "infer": INFERRED, "generat": GENERATED, "interpolat": INTERPOLATED}
TEXT: dict[str, Any] = {"fontsize": FONT, "color": TRUTH}
CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 40)) for f in (np.cos, np.sin)], -1)


def read(form: str, named: Named, like: Mapping[str, Floats] | None = None) -> dict[str, Floats]:
    """Arrays as float64, all of one shape, such as "B N T 2"; ``like`` has the names allowed, and that shape."""
    if not (named or like) or (like is not None and named.keys() - like.keys()):
        raise ValueError(f"there are {sorted(named)}; wanted {f'some of {sorted(like)}' if like else 'at least one'}")
    arrays = {k: np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64) for k, x in named.items()}
    axes, shape = form.split(), next(iter((like or arrays).values())).shape
    for name, x in arrays.items():
        fits = len(axes) == x.ndim and x.size and all(a.isalpha() or a == str(n) for a, n in zip(axes, x.shape))
        if not fits or x.shape != shape:
            wanted = f"({', '.join(axes)})" + f" = {shape}" * (x.shape != shape)
            raise ValueError(f"{name} has shape {x.shape}; wanted {wanted}")
        if form.endswith("H W") and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"{name} has values from {x.min():g} to {x.max():g}; wanted 0 to 1 (divide bytes by 255)")
    return arrays


def read_tracks(named: Named, n_objects: Data | None) -> dict[str, Floats]:
    """Tracks (B, N, T, 2) of one shape, NaN beyond ``n_objects`` (B,)."""
    tracks = read("B N T 2", named)
    B, N = next(iter(tracks.values())).shape[:2]
    n = np.full(B, N) if n_objects is None else read(f"{B}", {"n_objects": n_objects})["n_objects"]
    return {name: np.where((np.arange(N) < n[:, None])[:, :, None, None], x, np.nan) for name, x in tracks.items()}


def seen_frames(seen: Any, n_frames: int) -> NDArray[np.bool_]:
    """A mask (T,) of the frames seen: the first so many, a slice, indices or a mask."""
    frames = np.arange(n_frames)
    try:
        return np.isin(frames, frames[slice(seen) if isinstance(seen, int | np.integer) else seen])
    except IndexError:
        raise ValueError(f"seen is {seen}; wanted a number, slice, indices or mask of {n_frames} frames") from None


def grid(n: int, columns: int, width: float, heights: list[float], **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of n cells, each of axes below each other, so many inches wide and high."""
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
    """Tracks (N, T, 2), with ellipses of two ``sd`` in a tint that hides what is below, so that they make a ribbon."""
    for n, track in enumerate(tracks):
        there = np.isfinite(track).all(-1)
        if not there.any():
            continue
        if sd is not None:
            ellipses = track[there][:, None] + 2 * sd[n][there][:, None] * CIRCLE
            ax.add_collection(PolyCollection(ellipses, facecolor=0.83 + 0.17 * np.array(to_rgb(colour)), zorder=1))
        ax.plot(*track.T, color=colour, solid_joinstyle="round", **{"linewidth": 1.3, **style})
        if start:
            ax.scatter(*track[there][0], s=22, facecolor="white", edgecolor=colour, linewidths=0.9, zorder=3)


def plane(ax: Axes, size: tuple[int, int] | None = None, *, latent: bool = False) -> None:
    """Axes for positions: rows downwards within ``size`` (H, W) or where they lie, or latent units."""
    ax.set_aspect("equal", adjustable="box" if size else "datalim")
    if size:
        ax.set(xlim=(0, size[1] - 1), ylim=(size[0] - 1, 0), xticks=[0, size[1] - 1], yticks=[0, size[0] - 1])
    else:
        ax.locator_params(nbins=4)
        ax.yaxis.set_inverted(not latent)
    style_axes(ax)


def style_axes(ax: Axes, x: str = "", y: str = "") -> None:
    """Quiet axes with labels; without a label for y, a frame."""
    ax.tick_params(which="both", labelsize=FONT - 1.5, colors="#777777", length=2, pad=2)
    ax.spines[:].set(color=QUIET, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(not y)
    ax.set_xlabel(x, **TEXT)
    ax.set_ylabel(y, **TEXT)


def colour_of(name: str, i: int = 0) -> str:
    """The colour of a role that the name begins with, such as "generated"; else that of the i-th object."""
    return next((c for stem, c in _ROLES.items() if name.lower().startswith(stem)), OBJECTS[i % len(OBJECTS)])


def add_legend(figure: Figure, names: Iterable[str], extra: Iterable[Any] = ()) -> Figure:
    """Puts a legend below: a line a name, and handles of one's own."""
    handles = [*(Line2D([], [], color=colour_of(name, i), label=name) for i, name in enumerate(names)), *extra]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=FONT, handlelength=1.4)
    return figure
