"""What stands out in films: the side of objects, dark or bright, their background, brightness and threshold.

In a film larger than a window, objects may cover so small a share of the pixels that statistics of all pixels say
nothing of them. These functions then look only at tiles with objects.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from pyro_pixels.video.check import STILL, count_components, still_share
from pyro_pixels.video.formats import optional
from pyro_pixels.video.read import Film

Background = Literal["keep", "median", "local"]


def are_darker(films: list[Film], excess: list[Film], window: int | None) -> bool:
    """Tells whether objects are darker than the background: by what changes over time if that is clear, else by all.

    Args:
        excess: the films without their median grey.
    """
    moving = [f - np.median(f, 0) for f in films]
    low, high = (brightness([sign * f for f in moving], window) for sign in (-1, 1))
    if max(low, high) > 1.5 * min(low, high):
        return low > high
    low, high = (brightness([sign * f for f in excess], window) for sign in (-1, 1))
    return low > 1.2 * high


def without_background(
    excess: list[Film], background: Background | None, n_objects: int | Sequence[int] | None, window: int | None
) -> tuple[list[Film], str]:
    """Returns the films without their background, as `prepare_video` defines it, and a note."""
    if background == "local":
        what = "image" if window is None else "window"
        return [x - _local(x, window) for x in excess], f"what is larger than a quarter of the {what} was subtracted"
    without = [x - np.median(x, 0) for x in excess]
    if background is None:
        scores = []
        for films in (excess, without):
            top = brightness(films, window)
            counts = [count_components(x > 0.5 * top)[0] for x in films]
            wanted = per_film(n_objects, len(films)) or [float(np.median(c)) for c in counts]
            off = np.concatenate([np.abs(c - n) for c, n in zip(counts, wanted)])
            empty = np.concatenate([c == 0 for c in counts])
            scores.append(float(off.mean() + 3 * empty.mean()))
            if n_objects is None:  # a still background agrees with its own number of components
                shares = [still_share(x[None] > 0.5 * top, np.ones((1, len(x)), bool)) for x in films]
                scores[-1] += float(np.mean(shares) > STILL)
        structure = max(float(np.ptp(np.median(x, 0))) for x in excess) > 0.02
        background = "median" if structure and scores[1] <= scores[0] + 0.02 else "keep"
    if background == "median":
        return without, "the median over time was subtracted"
    return excess, "no background was subtracted"


def _local(film: Film, window: int | None) -> Film:
    """Returns a background per frame: its grey opening by a square larger than objects, smoothed before and after."""
    width = (window or max(film.shape[1:])) // 4 | 1  # odd
    smooth = scipy.ndimage.gaussian_filter(film, (0, 0.7, 0.7))
    opened = scipy.ndimage.grey_opening(smooth, (1, width, width))
    return np.asarray(scipy.ndimage.gaussian_filter(opened, (0, width / 4, width / 4)), np.float32)


def choose_threshold(pixels: NDArray[np.float32]) -> float:
    """Returns Otsu's threshold, or a higher one above noise, within limits."""
    noise = 1.4826 * float(np.median(np.abs(pixels[pixels > 0]))) if (pixels > 0).mean() > 0.3 else 0.0
    otsu = float(optional("skimage.filters").threshold_otsu(pixels))
    return float(np.clip(max(otsu, 4 * noise), 0.1, 0.6))


def brightness(films: list[Film], window: int | None) -> float:
    """Returns the brightness of objects: a high quantile of the pixels."""
    return float(np.quantile(pixels_of(films, window), 0.998))


def pixels_of(films: list[Film], window: int | None) -> NDArray[np.float32]:
    """Returns all pixels, or in films larger than a window those around objects."""
    return np.concatenate([f.ravel() if window is None else _near_objects(f, window) for f in films])


def _near_objects(film: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Returns the pixels of those tiles of a film (T, H, W) that show an object: far brighter ones than the others'.

    In a large film objects cover too small a share of the pixels for statistics of all of them.
    """
    T, rows, columns = len(film), film.shape[1] // side, film.shape[2] // side
    tiles = film[:, : rows * side, : columns * side].reshape(T, rows, side, columns, side)
    tiles = tiles.swapaxes(2, 3).reshape(-1, side * side)
    bright = np.partition(tiles, -3, axis=1)[:, -3]  # two outliers in a tile do not count
    return tiles[bright >= optional("skimage.filters").threshold_otsu(bright)].ravel()


def per_film(n_objects: int | Sequence[int] | None, n_films: int) -> list[float] | None:
    """Returns N of each film, None if it is not known or given by sequence."""
    if n_objects is None:
        return None
    if isinstance(n_objects, int):
        return [float(n_objects)] * n_films
    return [float(x) for x in n_objects] if len(n_objects) == n_films else None
