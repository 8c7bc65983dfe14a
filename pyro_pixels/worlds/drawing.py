"""The appearance of objects, the noise of images, and the functions that draw both.

The default `Look` is that of Sec 3.1: white disks on black. Other looks have objects of several shapes, sizes and grey
values, and noisy pixels. An object keeps its shape, size and grey value for the whole sequence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pyro_pixels._checks import Bounds, check_fields

Shape = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]

SHAPES: dict[str, Shape] = {
    "disk": lambda x, y, r: y**2 + x**2 <= r**2,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= math.sqrt(math.pi) / 2 * r,  # with the area of the disk
    "cross": lambda x, y, r: (np.minimum(abs(x), abs(y)) <= r / 3) & (np.maximum(abs(x), abs(y)) <= r),
    "ring": lambda x, y, r: (x**2 + y**2 <= r**2) & (x**2 + y**2 > r**2 / 4),
}
"""Name -> predicate (x, y, r) for the offsets from its centre that an object of radius r covers, all in [-r, r]^2."""


@dataclass(frozen=True)
class Look:
    """The appearance of objects and background; the default is that of Sec 3.1."""

    shapes: tuple[str, ...] = ("disk",)
    """Names in `SHAPES`; the shape of each object is drawn uniformly from them."""
    least_size: Annotated[float, Bounds(0, 1, above=True)] = 1.0
    """Radii are uniform between this fraction of the configuration's radius and the whole of it."""
    brightness: Annotated[tuple[float, float], Bounds(0, 1, above=True, ordered=True)] = (1.0, 1.0)
    """The range of the objects' uniform grey values; the background is 0, and brighter objects are in front."""
    salt_and_pepper: Annotated[float, Bounds(0, 1, words="a probability")] = 0.0
    """The probability that a pixel is replaced by black or white, with equal probability."""
    grey_noise: Annotated[float, Bounds(0, 1e6)] = 0.0
    """The standard deviation of Gaussian noise that is added to every pixel before clipping to [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = sorted(set(self.shapes) - SHAPES.keys())
        if not self.shapes or unknown:
            raise ValueError(f"shapes are {self.shapes}; wanted one or more of {sorted(SHAPES)}")

    @property
    def is_grey(self) -> bool:
        """Whether images are float32 in [0, 1] rather than uint8 with values 0 and 1."""
        return self.brightness != (1.0, 1.0) or self.grey_noise > 0


def draw(
    look: Look, positions: NDArray[np.float64], size: tuple[int, int], radius: float, rng: np.random.Generator
) -> NDArray[Any]:
    """Draws images (n, T, H, W) of objects, in uint8, or in float32 if the look is grey.

    Args:
        look: the appearance of the objects and the noise.
        positions: (n, N, T, 2) in pixels, (column, row); NaN draws nothing.
        size: (H, W) of the images.
        radius: radius of the largest objects, in pixels.
        rng: the source of random numbers.
    """
    shape = positions.shape[:2]
    kinds = rng.integers(len(look.shapes), size=shape)
    radii = radius * rng.uniform(look.least_size, 1.0, size=shape)
    values = rng.uniform(*look.brightness, size=shape) if look.is_grey else np.ones(shape, np.uint8)
    images = paint(positions, size, [SHAPES[name] for name in look.shapes], kinds, radii, values)
    for image in images if look.salt_and_pepper or look.grey_noise else ():  # a sequence at a time saves memory
        if look.grey_noise:
            noisy = image + look.grey_noise * rng.standard_normal(image.shape, np.float32)
            image[:] = noisy.clip(0.0, 1.0)
        replaced = rng.random(image.shape, np.float32) < look.salt_and_pepper
        image[replaced] = rng.integers(2, size=int(replaced.sum()))
    return images


def render_disks(positions: NDArray[np.float64], height: int, width: int, radius: float) -> NDArray[np.uint8]:
    """Draws images (n, T, H, W) whose pixels are 1 within ``radius`` of a position; NaN draws nothing.

    Args:
        positions: (n, N, T, 2) in pixels, (column, row).
    """
    of_each = np.ones(positions.shape[:2])
    kinds, values = of_each.astype(np.int64) - 1, of_each.astype(np.uint8)
    return paint(positions, (height, width), [SHAPES["disk"]], kinds, radius * of_each, values)


def paint(
    positions: NDArray[np.float64],
    size: tuple[int, int],
    shapes: list[Shape],
    kinds: NDArray[np.int64],
    radii: NDArray[np.float64],
    values: NDArray[Any],
) -> NDArray[Any]:
    """Draws images (n, T, H, W), in uint8 if ``values`` is and else in float32; the largest value wins in overlaps.

    Args:
        positions: (n, N, T, 2) in pixels, (column, row).
        size: (H, W) of the images.
        shapes: predicates as in `SHAPES`.
        kinds: (n, N), indices into ``shapes``.
        radii: (n, N), in pixels.
        values: (n, N), grey values.
    """
    (n, N, T, _), (height, width) = positions.shape, size
    images = np.zeros((n, T, height, width), np.uint8 if values.dtype == np.uint8 else np.float32)
    most = math.ceil(radii.max())
    reach = np.arange(-most, most + 2)
    d_row, d_column = (d.ravel() for d in np.meshgrid(reach, reach, indexing="ij"))
    frame = np.arange(T)[:, None]
    for i in range(n):  # only the pixels around an object are visited, whatever the size of the image
        p = np.where(np.isnan(positions[i]), -1e6, positions[i])
        corner = np.floor(p).astype(np.int64)
        row, column = corner[..., 1, None] + d_row, corner[..., 0, None] + d_column  # (N, T, k)
        y, x, r = row - p[..., 1, None], column - p[..., 0, None], radii[i, :, None, None]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        for j in range(N):
            near = inside[j] & shapes[kinds[i, j]](x[j], y[j], r[j])
            pixels = i, np.broadcast_to(frame, near.shape)[near], row[j][near], column[j][near]
            images[pixels] = np.maximum(images[pixels], values[i, j])
    return images
