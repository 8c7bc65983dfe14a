"""Image sequences: simulated cannonballs (Sec 3.1), and files that users bring.

`simulate` draws cannonballs; `load_sequences` reads and checks an .npz; both give `ImageSequences`. Positions are in
pixels, (column, row), with pixel centres at whole numbers and rows counted downwards.

Readings of Sec 3.1 (docs/decisions.md): Sigma_A = 0.001 I is a covariance (`CannonballConfig.position_noise`; 1e-6
gives the other reading); max_x is the largest displacement between the first and the last frame; the re-scaling into
the image is one affine map for the whole configuration, a separate scale for x and y, so that the motion stays linear
in pixels and any two data sets of one configuration share it.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_pixels.lgssm import LGSSM

NOISE_MARGIN = 4.0  # standard deviations of noise for which the image has room around the noise-free paths


@dataclass(frozen=True)
class CannonballConfig:
    """Sec 3.1's data set; lengths in its unit, times in its seconds, angles in degrees."""

    n_frames: int = 30
    """T, at least 2; the paper also used 50."""
    height: int = 48
    """H in pixels; the paper also used 32."""
    width: int = 48
    """W in pixels."""
    radius: float = 2.0
    """R in pixels: a pixel is white when its centre lies within R of a ball's position."""
    n_objects: tuple[int, ...] = (1, 2, 3)
    """The values of N, in equal numbers."""
    delta: float = 0.015
    """Sampling period."""
    gravity: float = 9.81
    position_noise: float = 1e-3
    """Sigma_A = position_noise I, a variance; 1e-6 reads the paper's 0.001 as a standard deviation."""
    state_noise: float = 0.0
    """Sigma_H = state_noise I, a variance."""
    angle: tuple[float, float] = (40.0, 60.0)
    """Shooting angles above the horizontal."""
    speed: tuple[float, float] = (2.0, 3.0)
    start_x: tuple[float, float] = (-0.5, -0.1)
    """Where balls start on the left; those on the right start 0.9 max_x further."""
    start_y: tuple[float, float] = (-0.5, 0.5)
    n_frames_in_view: int | None = None
    """Frames for which the image has room, if not all; the world is that of so many frames, and balls may leave it."""

    def __post_init__(self) -> None:
        if not _is_whole(self.n_frames) or self.n_frames < 2:
            raise ValueError(
                f"n_frames is {self.n_frames}; wanted a whole number of at least 2: one frame shows no motion"
            )
        if self.n_frames_in_view is not None and not (_is_whole(self.n_frames_in_view) and self.n_frames_in_view >= 2):
            raise ValueError(
                f"n_frames_in_view is {self.n_frames_in_view}; wanted a whole number of at least 2, or None"
            )
        if not self.n_objects or not all(_is_whole(n) and n >= 1 for n in self.n_objects):
            raise ValueError(f"n_objects is {self.n_objects}; wanted one or more whole numbers, each at least 1")
        if not self.radius > 0 or not min(self.height, self.width) >= 2 * self.radius + 2:
            raise ValueError(
                f"balls of radius {self.radius} do not fit an image of {self.height} x {self.width} pixels; "
                "wanted radius > 0 and height and width of at least 2 radius + 2"
            )
        for name in ("position_noise", "state_noise", "delta"):
            value = getattr(self, name)
            if not (0 <= value < np.inf) or (name == "delta" and value == 0):
                raise ValueError(f"{name} is {value}; wanted a finite number, at least 0, and delta above 0")
        for name in ("angle", "speed", "start_x", "start_y"):
            low, high = getattr(self, name)
            if not (-np.inf < low <= high < np.inf):
                raise ValueError(f"{name} is {(low, high)}; wanted two finite numbers, the smaller first")
        if self.angle[0] < 0 or self.angle[1] > 90 or self.speed[0] < 0:
            raise ValueError(
                f"wanted angles within [0, 90] and speeds of at least 0, not {self.angle} and {self.speed}"
            )


@dataclass(frozen=True)
class TrueDynamics:
    """The parameters that the data were drawn with, in pixels: what an exact filter needs (the Bayes floors)."""

    lgssm: LGSSM  # a batch of K = 2 starts (left, right), the launch distribution's exact first two moments
    pi: Tensor  # (K,)


@dataclass(frozen=True)
class ImageSequences:
    """A set of image sequences, all of one size. Only the images and the numbers of objects are needed for learning."""

    images: Tensor
    """(n, T, H, W) uint8, 0 or 1."""
    n_objects: Tensor
    """(n,) int64, at least 1."""
    positions: Tensor | None = None
    """(n, N_max, T, 2) float64: the noisy positions that were drawn into the images, NaN where there is no object."""
    paths: Tensor | None = None
    """(n, N_max, T, 2) float64: the same without the noise, B h_t."""
    sides: Tensor | None = None
    """(n, N_max) int64: 0 launched from the left, 1 from the right, -1 where there is no object."""
    dynamics: TrueDynamics | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[2], self.images.shape[3]

    def __getitem__(self, index: Tensor | slice) -> "ImageSequences":
        """The sequences picked by a slice or an index tensor."""

        n_objects = self.n_objects[index]
        most = int(n_objects.max()) if len(n_objects) else 0

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index][:, :most]

        return ImageSequences(
            self.images[index], n_objects, pick(self.positions), pick(self.paths), pick(self.sides), self.dynamics
        )


def object_mask(n_objects: Tensor, max_objects: int) -> Tensor:
    """(B, max_objects) bool: which objects are there, for ``n_objects`` (B,)."""
    return torch.arange(max_objects, device=n_objects.device) < n_objects.unsqueeze(-1)


def check_objects(n_objects: Tensor) -> None:
    """Raises ValueError unless ``n_objects`` is (B,) with integers >= 1."""
    if (
        n_objects.dim() != 1
        or not len(n_objects)
        or n_objects.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ):
        raise ValueError(
            f"n_objects has shape {tuple(n_objects.shape)} and type {n_objects.dtype}; wanted integers, one a sequence"
        )
    if int(n_objects.min()) < 1:
        raise ValueError(f"n_objects has the value {int(n_objects.min())}; every sequence needs at least 1 object")


def check_batch(images: Tensor, n_objects: Tensor, size: tuple[int, int] | None = None) -> None:
    """Raises ValueError unless images are (B, T, H, W), n_objects (B,) of integers >= 1, and (H, W) is ``size``."""
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; wanted (B, T, H, W), none of them 0")
    check_objects(n_objects)
    if len(n_objects) != len(images):
        raise ValueError(f"there are {len(n_objects)} n_objects for {len(images)} sequences; wanted one each")
    if size is not None and images.shape[2:] != size:
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]} pixels; this model was made for {size[0]} x {size[1]}"
        )


def simulate(config: CannonballConfig, n_sequences: int, *, seed: int) -> ImageSequences:
    """Draws image sequences as in Sec 3.1. The same configuration, number and seed give the same bytes.

    Raises:
        ValueError: if ``n_sequences`` is below 1.
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences is {n_sequences}; wanted at least 1")
    rng = np.random.default_rng(seed)
    choices = np.asarray(config.n_objects)
    n_objects = choices[np.arange(n_sequences) % len(choices)]
    shape = (n_sequences, int(n_objects.max()))
    T = config.n_frames

    side = rng.integers(2, size=shape)
    angle = np.radians(rng.uniform(*config.angle, size=shape))
    speed = rng.uniform(*config.speed, size=shape)
    x = rng.uniform(*config.start_x, size=shape) + side * 0.9 * _max_x(config)
    y = rng.uniform(*config.start_y, size=shape)
    h = np.stack([x, y, speed * np.cos(angle) * (1 - 2 * side), speed * np.sin(angle)], -1)

    A, u = _motion(config)
    states = np.empty((*shape, T, 4))
    for t in range(T):
        if t > 0:
            h = h @ A.T + u + np.sqrt(config.state_noise) * rng.standard_normal(h.shape)
        states[..., t, :] = h
    scale, offset = _to_pixels(config)
    paths = states[..., :2] * scale + offset
    positions = paths + np.sqrt(config.position_noise) * rng.standard_normal(paths.shape) * scale

    present = np.arange(shape[1]) < n_objects[:, None]
    absent = ~present[:, :, None, None]
    positions, paths = np.where(absent, np.nan, positions), np.where(absent, np.nan, paths)
    return ImageSequences(
        images=torch.from_numpy(render_disks(positions, config.height, config.width, config.radius)),
        n_objects=torch.from_numpy(n_objects.astype(np.int64)),
        positions=torch.from_numpy(positions),
        paths=torch.from_numpy(paths),
        sides=torch.from_numpy(np.where(present, side, -1)),
        dynamics=true_dynamics(config),
    )


def render_disks(positions: NDArray[np.float64], height: int, width: int, radius: float) -> NDArray[np.uint8]:
    """Images (n, T, H, W): a pixel is 1 when its centre lies within ``radius`` of a position; NaN draws nothing.

    Args:
        positions: (n, N, T, 2) in pixels, (column, row).
    """
    n, _, T, _ = positions.shape
    images = np.zeros((n, T, height, width), np.uint8)
    reach = np.arange(-int(np.ceil(radius)), int(np.ceil(radius)) + 2)
    d_row, d_column = (d.ravel() for d in np.meshgrid(reach, reach, indexing="ij"))
    frame = np.arange(T)[:, None]
    for i in range(n):  # one sequence at a time: the work of a frame does not depend on its size
        p = np.where(np.isnan(positions[i]), -1e6, positions[i])
        corner = np.floor(p).astype(np.int64)
        row, column = corner[..., 1, None] + d_row, corner[..., 0, None] + d_column
        near = (row - p[..., 1, None]) ** 2 + (column - p[..., 0, None]) ** 2 <= radius**2
        near &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
        images[i, np.broadcast_to(frame, near.shape)[near], row[near], column[near]] = 1
    return images


def true_dynamics(config: CannonballConfig) -> TrueDynamics:
    """Eq (3)'s parameters of a configuration, in pixels, and its two starts by exact moment matching."""
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


def save_sequences(path: str | Path, data: ImageSequences) -> None:
    """Writes an .npz that `load_sequences` reads; an existing file is replaced only by a whole new one."""
    arrays = {"images": data.images.numpy(), "n_objects": data.n_objects.numpy()}
    for name in ("positions", "paths", "sides"):
        value = getattr(data, name)
        if value is not None:
            arrays[name] = value.numpy()
    if data.dynamics is not None:
        arrays |= {f"true_{k}": x.numpy() for k, x in data.dynamics.lgssm._asdict().items()}
        arrays["true_pi"] = data.dynamics.pi.numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_sequences(path: str | Path) -> ImageSequences:
    """Reads an .npz of image sequences and checks it.

    The file has ``images`` uint8 0/1 (n, T, H, W), ``n_objects`` int (n,), and optionally ``positions`` float
    (n, N_max, T, 2) in pixels (column, row), NaN where there is no object. `simulate.py` also writes the noise-free
    ``paths``, the launch ``sides`` and the ``true_*`` parameters of the dynamics.

    Raises:
        ValueError: if there is no such file, or its contents are not as above; says what to change.
    """
    path = Path(path)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is an .npy")
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(
            f"there is no file {path}; make one with examples/simulate.py, or see its docs for the format"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as an .npz of arrays ({error}); write it with numpy.savez_compressed"
        ) from None

    for name in ("images", "n_objects"):
        if name not in arrays:
            raise ValueError(f"{path} has no array '{name}', only {sorted(arrays)}; wanted images and n_objects")
    images, n_objects = arrays["images"], arrays["n_objects"]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images have type {images.dtype}; wanted uint8 with 0 for black and 1 for white")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{path}: images have shape {images.shape}; wanted (n, T, H, W), none of them 0")
    if images.shape[1] < 2:
        raise ValueError(f"{path}: sequences have {images.shape[1]} frame; wanted at least 2, as one shows no motion")
    if images.max() > 1:
        raise ValueError(
            f"{path}: images have the value {images.max()}; wanted 0 and 1 only (threshold grey values first)"
        )
    if n_objects.shape != images.shape[:1] or not np.issubdtype(n_objects.dtype, np.integer):
        raise ValueError(
            f"{path}: n_objects has shape {n_objects.shape} and type {n_objects.dtype}; "
            f"wanted integers ({len(images)},)"
        )
    if n_objects.min() < 1:
        raise ValueError(f"{path}: n_objects has the value {n_objects.min()}; every sequence needs at least 1 object")

    optional: dict[str, Tensor] = {}
    for name in ("positions", "paths"):
        if name in arrays:
            optional[name] = _checked_positions(path, name, arrays[name], images, n_objects)
    if "sides" in arrays:
        sides = arrays["sides"]
        if sides.shape != (len(images), int(n_objects.max())) or not np.issubdtype(sides.dtype, np.integer):
            raise ValueError(
                f"{path}: sides have shape {sides.shape} and type {sides.dtype}; wanted integers (n, N_max)"
            )
        optional["sides"] = torch.from_numpy(sides.astype(np.int64))
    names = [f"true_{field}" for field in LGSSM._fields] + ["true_pi"]
    dynamics = None
    if all(name in arrays for name in names):
        values = [torch.from_numpy(arrays[name].astype(np.float64)) for name in names]
        dynamics = TrueDynamics(LGSSM(*values[:-1]), values[-1])
    return ImageSequences(
        torch.from_numpy(images), torch.from_numpy(n_objects.astype(np.int64)), dynamics=dynamics, **optional
    )


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name ``path`` only once it is whole; until then an older file there stays.

    Raises:
        ValueError: if the folder cannot be made or written to.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "wb")  # noqa: SIM115  # closed by the with below; only opening it is tried here
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a folder that can be written to") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(part, path)
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror}); choose another name") from None
    finally:
        part.unlink(missing_ok=True)


def _checked_positions(
    path: Path, name: str, positions: NDArray[np.generic], images: NDArray[np.uint8], n_objects: NDArray[np.integer]
) -> Tensor:
    wanted = (len(images), int(n_objects.max()), images.shape[1], 2)
    if positions.shape != wanted or not np.issubdtype(positions.dtype, np.floating):
        raise ValueError(
            f"{path}: {name} have shape {positions.shape} and type {positions.dtype}; "
            f"wanted floats (n, N_max, T, 2) = {wanted}, in pixels (column, row)"
        )
    present = np.arange(wanted[1]) < n_objects[:, None]
    if not np.isfinite(positions[present]).all():
        raise ValueError(
            f"{path}: {name} of objects that are there are not finite; NaN only fills slots beyond n_objects"
        )
    return torch.from_numpy(np.where(present[:, :, None, None], positions, np.nan).astype(np.float64))


def _is_whole(n: object) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def _max_x(config: CannonballConfig) -> float:
    """The largest displacement in x between the first and the last frame in view."""
    n_frames = config.n_frames_in_view or config.n_frames
    return config.speed[1] * float(np.cos(np.radians(config.angle[0]))) * config.delta * (n_frames - 1)


def _motion(config: CannonballConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A and u of Eq (3), as Sec 3.1 gives them."""
    delta, g = config.delta, config.gravity
    A = np.eye(4) + delta * np.eye(4, k=2)
    return A, -g * np.array([0.0, 0.5 * delta**2, 0.0, delta])


def _to_pixels(config: CannonballConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale (2,), offset (2,): pixels (column, row) = scale * (x, y) + offset, all paths inside [R, size - 1 - R]."""
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
