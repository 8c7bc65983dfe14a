"""The cannonballs of Sec 3.1.

Readings of Sec 3.1 where it is ambiguous (docs/decisions.md): Sigma_A = 0.001 I is taken as a covariance; setting
`CannonballConfig.position_noise` to 1e-6 takes it as a standard deviation. max_x is the largest displacement between
the first and the last frame. Positions are mapped into the image by one affine map for the whole configuration, with
separate scales for x and y, so that the motion stays linear in pixels and all data sets of a configuration share it.
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

Place = Annotated[tuple[float, float], Bounds(-1e6, 1e6, ordered=True)]


@dataclass(frozen=True)
class CannonballConfig(WorldConfig):
    """The data set of Sec 3.1, in the units of the paper (lengths, seconds) with angles in degrees.

    The paper also used 50 frames, and images of 32 x 32 pixels.
    """

    world: str = field(default="cannonballs", init=False)
    delta: Annotated[float, Bounds(0, 1e6, above=True, words="a finite delta")] = 0.015
    """Sampling period."""
    gravity: Annotated[float, Bounds(-1e6, 1e6)] = 9.81
    position_noise: Variance = 1e-3
    """The variance in Sigma_A = position_noise I; 1e-6 takes the paper's 0.001 as a standard deviation."""
    state_noise: Variance = 0.0
    """The variance in Sigma_H = state_noise I."""
    angle: Annotated[tuple[float, float], Bounds(0, 90, ordered=True)] = (40.0, 60.0)
    """The range of launch angles above the horizontal."""
    speed: Annotated[tuple[float, float], Bounds(0, 1e6, ordered=True)] = (2.0, 3.0)
    start_x: Place = (-0.5, -0.1)
    """The range of starting positions on the left; balls on the right start 0.9 max_x further right."""
    start_y: Place = (-0.5, 0.5)
    n_frames_in_view: Annotated[int, Bounds(2, 100_000)] | None = None
    """The number of frames in which balls are sure to be inside the image, by default all; later they may leave it."""

    def move(self, rng: np.random.Generator, shape: tuple[int, int]) -> Motion:
        T = self.n_frames
        side = rng.integers(2, size=shape)
        angle = np.radians(rng.uniform(*self.angle, size=shape))
        speed = rng.uniform(*self.speed, size=shape)
        x = rng.uniform(*self.start_x, size=shape) + side * 0.9 * _max_x(self)
        y = rng.uniform(*self.start_y, size=shape)
        h = np.stack([x, y, speed * np.cos(angle) * (1 - 2 * side), speed * np.sin(angle)], -1)

        A, u = _motion(self)
        states = np.empty((*shape, T, 4))
        for t in range(T):
            if t > 0:
                h = h @ A.T + u + np.sqrt(self.state_noise) * rng.standard_normal(h.shape)
            states[..., t, :] = h
        scale, offset = _to_pixels(self)
        paths = states[..., :2] * scale + offset
        positions = paths + np.sqrt(self.position_noise) * rng.standard_normal(paths.shape) * scale
        return Motion(positions, paths, side)

    def true_dynamics(self) -> TrueDynamics:
        return true_dynamics(self)


def true_dynamics(config: CannonballConfig) -> TrueDynamics:
    """Returns the parameters of Eq (3) in pixels; the two initial Gaussians match the launches' exact moments."""
    A, u = _motion(config)
    scale, offset = _to_pixels(config)
    S = np.concatenate([scale, scale])
    low, high = np.radians(config.angle)
    v = np.asarray(config.speed)
    v1, v2 = v.mean(), (v[0] ** 2 + v.prod() + v[1] ** 2) / 3  # E[speed], E[speed^2]
    width = max(high - low, 1e-12)
    cos, sin = (np.sin(high) - np.sin(low)) / width, (np.cos(low) - np.cos(high)) / width
    cos2 = 0.5 + (np.sin(2 * high) - np.sin(2 * low)) / (4 * width)
    sincos = (np.sin(high) ** 2 - np.sin(low) ** 2) / (2 * width)
    mu, Sigma = [], []
    for side, sign in ((0, 1.0), (1, -1.0)):
        x = np.mean(config.start_x) + side * 0.9 * _max_x(config)
        mu.append([x, np.mean(config.start_y), sign * v1 * cos, v1 * sin])
        cov = np.diag([np.ptp(config.start_x) ** 2 / 12, np.ptp(config.start_y) ** 2 / 12, 0.0, 0.0])
        cov[2, 2] = v2 * cos2 - (v1 * cos) ** 2
        cov[3, 3] = v2 * (1 - cos2) - (v1 * sin) ** 2
        cov[2, 3] = cov[3, 2] = sign * (v2 * sincos - v1**2 * cos * sin)
        Sigma.append(cov)
    to_tensor = torch.from_numpy
    return TrueDynamics(
        LGSSM(
            A=to_tensor(A),
            B=torch.eye(2, 4, dtype=torch.float64),
            u=to_tensor(u * S),
            Sigma_H=to_tensor(config.state_noise * np.diag(S**2)),
            Sigma_A=to_tensor(config.position_noise * np.diag(scale**2)),
            mu=to_tensor(np.asarray(mu) * S + np.concatenate([offset, [0.0, 0.0]])),
            Sigma=to_tensor(np.asarray(Sigma) * S[:, None] * S),
        ),
        pi=torch.full((2,), 0.5, dtype=torch.float64),
    )


def _max_x(config: CannonballConfig) -> float:
    """Returns the largest displacement in x between the first and the last frame in view."""
    n_frames = config.n_frames_in_view or config.n_frames
    return config.speed[1] * float(np.cos(np.radians(config.angle[0]))) * config.delta * (n_frames - 1)


def _motion(config: CannonballConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns A and u of Eq (3) with the values of Sec 3.1."""
    delta, g = config.delta, config.gravity
    A = np.eye(4) + delta * np.eye(4, k=2)
    return A, -g * np.array([0.0, 0.5 * delta**2, 0.0, delta])


def _to_pixels(config: CannonballConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the scale (2,) and offset (2,) of the map into the image, pixels (column, row) = scale * (x, y) + offset.

    All paths in view lie within [R, size - 1 - R].
    """
    n_frames = config.n_frames_in_view or config.n_frames
    t = config.delta * np.arange(n_frames)
    x = np.asarray(config.start_x)
    low_x = [x[0], x[0] + 0.9 * _max_x(config) - _max_x(config)]
    high_x = [x[1] + _max_x(config), x[1] + 0.9 * _max_x(config)]
    rise = [v * np.sin(np.radians(a)) * t - 0.5 * config.gravity * t**2 for v, a in zip(config.speed, config.angle)]
    steps = np.arange(n_frames - 1)
    noise = config.position_noise + config.state_noise * np.sum(1 + (config.delta * steps) ** 2)
    margin = NOISE_MARGIN * np.sqrt(noise)
    low = np.array([min(low_x), config.start_y[0] + rise[0].min()]) - margin
    high = np.array([max(high_x), config.start_y[1] + rise[1].max()]) + margin
    room = np.array([config.width, config.height]) - 1 - 2 * config.radius
    scale = room / (high - low) * np.array([1.0, -1.0])  # y points up, rows count down
    return scale, config.radius - scale * np.array([low[0], high[1]])
