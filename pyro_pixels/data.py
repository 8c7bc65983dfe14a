"""Image sequences: what is learned from, and the files that hold them.

`load_sequences` reads and checks an .npz, `pyro_pixels.simulate` draws new ones; both give `ImageSequences`.
Positions are in pixels, (column, row), with pixel centres at whole numbers and rows counted downwards.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_pixels._files import atomic_write
from pyro_pixels.lgssm.kalman import LGSSM


@dataclass(frozen=True)
class TrueDynamics:
    """The parameters that the data were drawn with, in pixels: what an exact filter needs (the Bayes floors)."""

    lgssm: LGSSM  # a batch of K = 2 starts (left, right), the launch distribution's exact first two moments
    pi: Tensor  # (K,)


@dataclass(frozen=True)
class ImageSequences:
    """A set of image sequences, all of one size. Only the images and the numbers of objects are needed for learning."""

    images: Tensor
    """(n, T, H, W) uint8, 0 or 1; or float32 within [0, 1] where pixels are grey."""
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

    The file has ``images`` (n, T, H, W), uint8 0/1 or float32 within [0, 1], ``n_objects`` int (n,), and optionally
    ``positions`` float (n, N_max, T, 2) in pixels (column, row), NaN where there is no object. `simulate.py` also
    writes the noise-free ``paths``, the launch ``sides`` and the ``true_*`` parameters of the dynamics.

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
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"{path}: images have type {images.dtype}; wanted uint8 with 0 for black and 1 for white, "
            "or float32 within [0, 1] for grey values"
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{path}: images have shape {images.shape}; wanted (n, T, H, W), none of them 0")
    if images.shape[1] < 2:
        raise ValueError(f"{path}: sequences have {images.shape[1]} frame; wanted at least 2, as one shows no motion")
    if images.dtype == np.uint8 and images.max() > 1:
        raise ValueError(
            f"{path}: images have the value {images.max()}; wanted 0 and 1 only (divide grey values by the largest "
            "possible one, in float32, or threshold them)"
        )
    if not (images.min() >= 0 and images.max() <= 1):  # false for NaN too
        raise ValueError(f"{path}: images have values from {images.min()} to {images.max()}; wanted [0, 1]")
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


def _checked_positions(
    path: Path, name: str, positions: NDArray[np.generic], images: NDArray[np.generic], n_objects: NDArray[np.integer]
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
