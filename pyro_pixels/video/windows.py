"""Windows of a crowded film: still squares, each with a few whole objects in all frames of a clip.

The objects of a clip sweep out regions of the image. A window is placed around a region so that its edge crosses none:
objects in it stay in it, and all others stay outside.
"""

from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from pyro_pixels.guides.pixel_evidence import WITHIN_FRAMES
from pyro_pixels.video.check import count_components, number_of_objects

EDGE = 2  # pixels at a window's edge that no object enters
MOST = 3  # objects in a window
DUST = 1 / 4  # components with a smaller share of the median size are no objects


class Window(NamedTuple):
    """A window of one clip."""

    corner: tuple[int, int]
    """(column, row) of its first pixel."""
    counts: NDArray[np.int64]
    """(T,), the number of components in each frame."""
    area: int
    """The number of pixels of objects, over all frames, that no earlier window shows."""


def without_dust(white: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Returns white pixels (T, H, W) without components smaller than ``least`` pixels or far smaller than most."""
    labels, n = scipy.ndimage.label(white, WITHIN_FRAMES)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    large = sizes >= least
    large[0] = False
    if large.any():
        large &= sizes >= DUST * np.median(sizes[large])
    return large[labels]


def find_windows(white: NDArray[np.bool_], side: int) -> list[Window]:
    """Returns windows of ``side`` pixels, each with one to three objects, around all regions for which there is one.

    Of all places around a region at whose edge there is no object, the one with the fewest regions is chosen, and among
    these the most central. Regions that an earlier window holds get none of their own.

    Args:
        white: (T, H, W), the objects' pixels, without noise.
        side: at least 8.
    """
    swept = np.asarray(white.any(0))
    labels, n = scipy.ndimage.label(swept, np.ones((3, 3)))
    boxes, pixels = scipy.ndimage.find_objects(labels), _Sums(swept)
    firsts = np.zeros(swept.shape, bool)  # a pixel of each region
    for i, (down, _) in enumerate(boxes):
        firsts[down.start, np.argmax(labels[down.start] == i + 1)] = True
    regions, found, done = _Sums(firsts), [], np.zeros(n + 1, bool)
    done[0] = True
    for i, box in enumerate(boxes):
        if done[i + 1]:
            continue
        top, left = _places(box, side, swept.shape)
        free = pixels.of(top, left, side) == pixels.of(top + EDGE, left + EDGE, side - 2 * EDGE)
        number = regions.of(top, left, side)
        centre = [(part.start + part.stop - side) / 2 for part in box]
        off_centre = np.hypot(top - centre[0], left - centre[1]) / (2 * side)  # below 1
        allowed = np.flatnonzero(free & (number <= MOST))
        if not len(allowed):
            continue
        best = allowed[np.argmin((number + off_centre)[allowed])]
        window = np.s_[top[best] : top[best] + side, left[best] : left[best] + side]
        inside = white[:, *window]
        counts = count_components(inside)[0]
        if 1 <= number_of_objects(counts) <= MOST:
            new = ~done[labels[window]]
            found.append(Window((int(left[best]), int(top[best])), counts, int(inside[:, new].sum())))
            done[labels[window]] = True
    return found


def _places(box: tuple[slice, ...], side: int, size: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the first rows and columns of all windows around a region; none if it is too large or at the edge."""
    top, left = (
        np.arange(max(0, part.stop - side + EDGE), min(length - side, part.start - EDGE) + 1)
        for part, length in zip(box, size)
    )
    return np.repeat(top, len(left)), np.tile(left, len(top))


class _Sums:
    """Sums over squares of an image, from its summed-area table (Crow, 1984)."""

    def __init__(self, image: NDArray[np.bool_]) -> None:
        self.table = np.pad(image.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def of(self, top: NDArray[np.int64], left: NDArray[np.int64], side: int) -> NDArray[np.int64]:
        bottom, right = top + side, left + side
        return self.table[bottom, right] - self.table[top, right] - self.table[bottom, left] + self.table[top, left]
