"""Two worlds beyond Sec 3.1: one that the linear-Gaussian model can represent, and one that it cannot.

Neither is in the paper. In `DriftConfig` there is no gravity and objects cross the image with constant velocity, so the
learned u should be 0. In `BouncingConfig` walls reflect objects, which no constant A and u can express. In both worlds
objects do not interact and always stay in view.
"""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_pixels._checks import Bounds
from pyro_pixels.data import TrueDynamics
from pyro_pixels.lgssm.kalman import LGSSM
from pyro_pixels.worlds.base import NOISE_MARGIN, Motion, Variance, WorldConfig
from pyro_pixels.worlds.cannonballs import CannonballConfig

Share = Annotated[tuple[float, float], Bounds(0, 1, ordered=True)]


@dataclass(frozen=True)
class _InView(WorldConfig):
    """A world, measured in pixels and frames, whose objects always stay in view."""

    position_noise: Variance = 0.04
    """The variance of positions around their paths, in square pixels, along each axis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.room()[1] > 0).all():
            raise ValueError(
                f"{self.height} x {self.width} pixels have no room for objects of radius {self.radius} and noise of "
                f"variance {self.position_noise}; wanted a larger image, a smaller radius or less noise"
            )

    def room(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the corner (2,) and the size (2,) of the rectangle that contains all paths, as (column, row)."""
        margin = self.radius + NOISE_MARGIN * np.sqrt(self.position_noise)
        return np.full(2, margin), np.array([self.width, self.height]) - 1 - 2 * margin

    def noisy(self, rng: np.random.Generator, paths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Adds the position noise to paths."""
        return paths + np.sqrt(self.position_noise) * rng.standard_normal(paths.shape)


@dataclass(frozen=True)
class DriftConfig(_InView):
    """Free drift: objects enter from the left or the right and keep their velocity.

    The positions in the first and in the last frame are drawn uniformly, each from a strip of the image.
    """

    world: str = field(default="drift", init=False)
    entry: Share = (0.0, 0.25)
    """The range of positions in the first frame, as fractions of the way across from the side of entry."""
    exit: Share = (0.6, 1.0)
    """The range of positions in the last frame, likewise."""

    def move(self, rng: np.random.Generator, shape: tuple[int, int]) -> Motion:
        corner, room = self.room()
        side = rng.integers(2, size=shape)
        first, last = (
            np.stack([np.where(side, 1 - across, across), rng.uniform(size=shape)], -1)
            for across in (rng.uniform(*self.entry, size=shape), rng.uniform(*self.exit, size=shape))
        )
        t = np.linspace(0, 1, self.n_frames)[:, None]
        paths = corner + room * (first[..., None, :] * (1 - t) + last[..., None, :] * t)
        return Motion(self.noisy(rng, paths), paths, side)

    def true_dynamics(self) -> TrueDynamics:
        """Returns the exact parameters, except that the uniform starts are replaced by Gaussians of equal moments."""
        corner, room = self.room()
        last = self.n_frames - 1
        I, O = np.eye(2), np.zeros((2, 2))
        to_start = np.block([[I, O], [-I / last, I / last]]) * np.tile(room, 2)  # (first, last) -> h_1
        low, high = np.array([self.entry[0], 0, self.exit[0], 0]), np.array([self.entry[1], 1, self.exit[1], 1])
        mean = (low + high) / 2
        mirrored = np.where([True, False, True, False], 1 - mean, mean)
        Sigma = to_start @ np.diag((high - low) ** 2 / 12) @ to_start.T
        mu = np.stack([mean, mirrored]) @ to_start.T + np.concatenate([corner, np.zeros(2)])
        return TrueDynamics(
            LGSSM(
                A=torch.eye(4, dtype=torch.float64) + torch.diag(torch.ones(2, dtype=torch.float64), 2),
                B=torch.eye(2, 4, dtype=torch.float64),
                u=torch.zeros(4, dtype=torch.float64),
                Sigma_H=torch.zeros(4, 4, dtype=torch.float64),
                Sigma_A=self.position_noise * torch.eye(2, dtype=torch.float64),
                mu=torch.from_numpy(mu),
                Sigma=torch.from_numpy(np.stack([Sigma, Sigma])),
            ),
            pi=torch.full((2,), 0.5, dtype=torch.float64),
        )


@dataclass(frozen=True)
class BouncingConfig(_InView):
    """Bouncing: objects start anywhere, move in any direction, and are reflected by walls without loss of speed."""

    world: str = field(default="bouncing", init=False)
    speed: Annotated[tuple[float, float], Bounds(0, 1e6, ordered=True)] = (1.0, 2.0)
    """The range of speeds, in pixels per frame."""

    def move(self, rng: np.random.Generator, shape: tuple[int, int]) -> Motion:
        corner, room = self.room()
        start = room * rng.uniform(size=(*shape, 2))
        angle, speed = rng.uniform(0, 2 * np.pi, size=shape), rng.uniform(*self.speed, size=shape)
        v = speed[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        without_walls = start[..., None, :] + np.arange(self.n_frames)[:, None] * v[..., None, :]
        paths = corner + room - abs(without_walls % (2 * room) - room)  # a wall is a mirror
        return Motion(self.noisy(rng, paths), paths, None)


WORLDS: dict[str, type[WorldConfig]] = {
    "cannonballs": CannonballConfig,
    "drift": DriftConfig,
    "bouncing": BouncingConfig,
}
"""Name -> class of the worlds that a configuration can refer to; add your own to train on it and load it by name."""
