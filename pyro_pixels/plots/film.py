"""A contact sheet of a prepared film: the source, what the model will see, and statistics that reveal problems."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyro_pixels.plots.style import FONT, OBJECTS, QUIET, SEEN, TEXT, TRUTH, style_axes

SHOWN = 6  # number of frames shown


def plot_contact_sheet(
    source: ArrayLike, images: ArrayLike, counts: ArrayLike, n_objects: ArrayLike, *, threshold: float | None = None,
    notes: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Draws frames of the source above those that the model will see, the histogram of pixels, and component counts.

    Args:
        source: (T, H, W), the film's own frames of the first sequence.
        images: (n, T, H, W), the sequences, NaN in unobserved frames.
        counts: (n, T), the number of connected components in each frame; negative where there is no frame.
        n_objects: (n,).
        threshold: the threshold of the pixels, if one was used.
        notes: lines of text below the figure.
    """
    film, v = np.asarray(source), np.asarray(images, float)
    c, n = np.asarray(counts), np.asarray(n_objects)
    seen = np.flatnonzero(np.isfinite(v[0]).all((1, 2)))
    frames = seen[np.linspace(0, len(seen) - 1, min(SHOWN, len(seen))).round().astype(int)]
    figure = Figure((9, 6.2 + 0.16 * len(notes)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 2 * SHOWN, height_ratios=[1.3, 1.3, 1.6])
    for i, t in enumerate(frames):
        for row, (picture, name) in enumerate(((film[t], "source"), (v[0, t], "what the model sees"))):
            ax = figure.add_subplot(grid[row, 2 * i : 2 * i + 2])
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[0, picture.shape[1] - 1], yticks=[0, picture.shape[0] - 1] if i == 0 else [])
            ax.tick_params(labelsize=FONT - 2, length=2)
            ax.set_title(f"frame {t + 1}" if row == 0 else "", **TEXT)
            if i == 0:
                ax.set_ylabel(f"{name}, pixels", **TEXT)
    left, right = figure.add_subplot(grid[2, :SHOWN]), figure.add_subplot(grid[2, SHOWN:])
    left.hist(film.ravel(), bins=64, range=(0, 1), color=QUIET, log=True, label="source")
    values = v[np.isfinite(v)]
    left.hist(values, bins=64, range=(0, 1), color=OBJECTS[0], log=True, histtype="step", label="what the model sees")
    if threshold is not None:
        left.axvline(threshold, color=SEEN, linewidth=1.2, label="threshold, of the brightness of objects")
    style_axes(left, "grey value", "pixels")
    left.set_title("histogram of pixels", **TEXT)
    left.legend(fontsize=FONT - 1, frameon=False)
    most = int(max(c.max(), n.max())) + 1
    for k in np.unique(n):
        shares = np.bincount(c[n == k][c[n == k] >= 0], minlength=most + 1)
        right.plot(np.arange(len(shares)), shares / max(1, shares.sum()), "o-", color=OBJECTS[(k - 1) % len(OBJECTS)],
                   linewidth=1.2, label=f"sequences with N = {k}")  # fmt: skip
    right.set(xticks=np.arange(most + 1))
    style_axes(right, "connected components in a frame", "share of the frames")
    right.set_title("component counts", **TEXT)
    right.legend(fontsize=FONT - 1, frameon=False)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=FONT, color=TRUTH)
    return figure
