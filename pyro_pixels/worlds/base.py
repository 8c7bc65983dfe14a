"""The base class of simulated worlds, and `simulate`, which draws image sequences from them (Sec 3.1).

A world is a frozen dataclass, a `WorldConfig`, that defines how its objects move and what they look like. The world of
Sec 3.1 is `pyro_pixels.worlds.cannonballs.CannonballConfig`; `pyro_pixels.worlds.others` has more.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_pixels.data import ImageSequences, TrueDynamics
from pyro_pixels.worlds.drawing import Look, draw

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
    n_frames: int = 30
    """T, at least 2."""
    height: int = 48
    """H in pixels."""
    width: int = 48
    """W in pixels."""
    radius: float = 2.0
    """R in pixels, the radius of the largest objects: a pixel is white if its centre is within R of a ball's centre."""
    n_objects: tuple[int, ...] = (1, 2, 3)
    """The values that N takes, each in the same number of sequences."""
    look: Look = field(default_factory=Look)
    """The appearance of the objects, and the noise of the images."""

    def __post_init__(self) -> None:
        if not is_whole(self.n_frames) or self.n_frames < 2:
            raise ValueError(
                f"n_frames is {self.n_frames}; wanted a whole number of at least 2: one frame shows no motion"
            )
        if not self.n_objects or not all(is_whole(n) and n >= 1 for n in self.n_objects):
            raise ValueError(f"n_objects is {self.n_objects}; wanted one or more whole numbers, each at least 1")
        if not self.radius > 0 or not min(self.height, self.width) >= 2 * self.radius + 2:
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


def simulate(config: WorldConfig, n_sequences: int, *, seed: int) -> ImageSequences:
    """Draws image sequences from a world; the same configuration, number and seed give the same bytes.

    Args:
        config: the world.
        n_sequences: the number of sequences, at least 1.
        seed: seeds the random numbers.

    Raises:
        ValueError: if ``n_sequences`` is below 1.
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences is {n_sequences}; wanted at least 1")
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


def is_whole(n: object) -> bool:
    """Tells whether ``n`` is an integer and not a bool."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)
