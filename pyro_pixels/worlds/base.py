"""The base class of simulated worlds, and `simulate`, which draws image sequences from them (Sec 3.1).

A world is a frozen dataclass, a `WorldConfig`, that defines how its objects move and what they look like. The world of
Sec 3.1 is `pyro_pixels.worlds.cannonballs.CannonballConfig`; `pyro_pixels.worlds.others` has more.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_pixels._arrays import MAX_BYTES
from pyro_pixels._checks import MAX_SEED, Bounds, check_fields, check_number
from pyro_pixels.data import ImageSequences, TrueDynamics
from pyro_pixels.worlds.drawing import Look, draw

Pixels = Annotated[int, Bounds(1, 4_096)]
Variance = Annotated[float, Bounds(0, 1e6)]
NOISE_MARGIN = 4.0  # the margin of the image around the noise-free paths, in standard deviations of the noise


class Motion(NamedTuple):
    """The motion of objects, in pixels (column, row)."""

    positions: NDArray[np.float64]  # (n, N, T, 2), the noisy positions at which objects are drawn
    paths: NDArray[np.float64]  # (n, N, T, 2), the positions without noise
    sides: NDArray[np.int64] | None  # (n, N), 0 for a launch from the left, 1 from the right


@dataclass(frozen=True)
class WorldConfig(ABC):
    """The image size and the objects of a data set; subclasses define the motion."""

    world: str = field(default="", init=False)
    """The world's name in `pyro_pixels.worlds.WORLDS`; each subclass sets its own."""
    n_frames: Annotated[int, Bounds(2, 100_000)] = 30
    """T, at least 2."""
    height: Pixels = 48
    """H in pixels."""
    width: Pixels = 48
    """W in pixels."""
    radius: Annotated[float, Bounds(0, 2_048, above=True)] = 2.0
    """R in pixels, the radius of the largest objects: a pixel is white if its centre is within R of a ball's centre."""
    n_objects: tuple[Annotated[int, Bounds(1, 1_000)], ...] = (1, 2, 3)
    """The values that N takes, each in the same number of sequences."""
    look: Look = field(default_factory=Look)
    """The appearance of the objects, and the noise of the images."""

    def __post_init__(self) -> None:
        too_small = isinstance(self.radius, int | float) and not self.radius > 0
        if not too_small:
            check_fields(self)
        if not self.n_objects:
            raise ValueError(f"n_objects is {self.n_objects}; wanted one or more whole numbers, each at least 1")
        if too_small or not min(self.height, self.width) >= 2 * self.radius + 2:
            raise ValueError(
                f"balls of radius {self.radius} do not fit an image of {self.height} x {self.width} pixels; "
                "wanted radius > 0 and height and width of at least 2 radius + 2"
            )

    @abstractmethod
    def move(self, rng: np.random.Generator, shape: tuple[int, int]) -> Motion:
        """Draws the motion of (n, N) objects independently of each other."""

    def true_dynamics(self) -> TrueDynamics | None:
        """Returns the parameters of the motion in pixels if it is linear and Gaussian, else None."""
        return None


def simulate(config: WorldConfig, n_sequences: int, *, seed: int, max_bytes: int = MAX_BYTES) -> ImageSequences:
    """Draws image sequences from a world; the same configuration, number and seed give the same bytes.

    Args:
        config: the world.
        n_sequences: the number of sequences, at least 1.
        seed: seeds the random numbers, at least 0.
        max_bytes: the limit on the size of the images, checked before anything is drawn.

    Raises:
        ValueError: if ``n_sequences`` is below 1, ``seed`` below 0, or the images would exceed ``max_bytes``.
    """
    if not isinstance(config, WorldConfig):
        raise ValueError(f"config is a {type(config).__name__}; wanted a world's, such as CannonballConfig()")
    n_sequences = check_number("n_sequences", n_sequences)
    if n_sequences < 1:
        raise ValueError(f"n_sequences is {n_sequences}; wanted at least 1")
    seed = check_number("seed", seed, 0, MAX_SEED)
    size = n_sequences * config.n_frames * config.height * config.width * (4 if config.look.is_grey else 1)
    if size > max_bytes:
        raise ValueError(
            f"{n_sequences:,} sequences of {config.n_frames:,} x {config.height} x {config.width} pixels have "
            f"{size:,} bytes of images, more than max_bytes, {max_bytes:,}; wanted fewer or smaller ones, or a larger "
            "limit"
        )
    rng = np.random.default_rng(seed)
    choices = np.asarray(config.n_objects)
    n_objects = choices[np.arange(n_sequences) % len(choices)]
    shape = (n_sequences, int(n_objects.max()))
    motion = config.move(rng, shape)

    present = np.arange(shape[1]) < n_objects[:, None]
    positions, paths = (np.where(present[:, :, None, None], x, np.nan) for x in (motion.positions, motion.paths))
    sides = None if motion.sides is None else torch.from_numpy(np.where(present, motion.sides, -1))
    return ImageSequences(
        images=torch.from_numpy(draw(config.look, positions, (config.height, config.width), config.radius, rng)),
        n_objects=torch.from_numpy(n_objects.astype(np.int64)),
        positions=torch.from_numpy(positions),
        paths=torch.from_numpy(paths),
        sides=sides,
        dynamics=config.true_dynamics(),
    )
