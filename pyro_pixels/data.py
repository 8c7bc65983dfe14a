"""Image sequences, the training data, and their files.

`load_sequences` reads and checks an .npz, and `pyro_pixels.simulate` draws new sequences; both return `ImageSequences`.
Positions are in pixels, (column, row), with pixel centres at whole numbers and rows counted downwards.
"""

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_pixels._arrays import MAX_BYTES, read_arrays
from pyro_pixels._batch import check_any, unseen_frames, up_to
from pyro_pixels._convert import PREPARE, as_counts, as_images, as_positions
from pyro_pixels._files import atomic_write
from pyro_pixels.lgssm.kalman import LGSSM

MAX_OBJECTS = 1_000
"""The largest N in a file; computation and memory grow with N times T for every sequence."""


@dataclass(frozen=True)
class TrueDynamics:
    """The parameters that the data were drawn with, in pixels, as an exact filter needs them (the Bayes floors)."""

    lgssm: LGSSM  # a batch of K = 2 starts (left, right), the launch distribution's exact first two moments
    pi: Tensor  # (K,)


@dataclass(frozen=True)
class ImageSequences:
    """A set of image sequences of the same size; training uses only the images and the numbers of objects."""

    images: Tensor
    """(n, T, H, W) uint8, 0 or 1; or float32 within [0, 1] for grey pixels, with NaN in unobserved frames."""
    n_objects: Tensor
    """(n,) int64, at least 1."""
    positions: Tensor | None = None
    """(n, N_max, T, 2) float64: the noisy positions that were drawn into the images; NaN where there is no object, and
    in unobserved frames where they are unknown, which then do not count in evaluations."""
    paths: Tensor | None = None
    """(n, N_max, T, 2) float64: the same without the noise, B h_t."""
    sides: Tensor | None = None
    """(n, N_max) int64: 0 if launched from the left, 1 from the right, -1 where there is no object."""
    dynamics: TrueDynamics | None = None

    def __post_init__(self) -> None:
        """Checks and converts the fields: arrays, lists of sequences of unequal length, and one number for all N.

        Raises:
            ValueError: if values, shapes or types are wrong or ambiguous.
        """
        images = as_images(self.images)
        n_objects = as_counts(self.n_objects, len(images))
        values: dict[str, object] = {"images": images, "n_objects": n_objects}
        for name in ("positions", "paths"):
            if getattr(self, name) is not None:
                values[name] = as_positions(name, getattr(self, name), images, n_objects)
        if isinstance(self.sides, np.ndarray):
            values["sides"] = torch.from_numpy(self.sides.astype(np.int64))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator["ImageSequences"]:
        """Iterates over the sequences, each as a set of one."""
        return (self[i] for i in range(len(self)))

    @property
    def size(self) -> tuple[int, int]:
        """The height and width (H, W) of the images."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def seen(self) -> Tensor:
        """The mask (n, T) of observed frames; the others are NaN."""
        return ~unseen_frames(self.images)

    @property
    def n_observed(self) -> Tensor:
        """The number of observed frames of each sequence (n,), float64; NaN instead of 0, as means over none are."""
        n = self.seen.sum(1).double()
        return n.masked_fill(n == 0, torch.nan)

    @property
    def lengths(self) -> Tensor:
        """The number of frames of each sequence (n,), up to the last observed one; shorter sequences are padded."""
        return (self.seen * torch.arange(1, self.images.shape[1] + 1)).amax(1)

    def first(self, n: int) -> Tensor:
        """Returns a mask of the frames up to the n-th of sequences, (T,) if all start at the first frame, else (n, T).

        Frames are counted from the first observed one of each sequence.
        """
        first = up_to(self.images, n)
        return first[0] if bool((first == first[0]).all()) else first

    def later(self, n: int) -> Tensor:
        """Returns the images (m, T - n, H, W) after the first ``n`` frames, NaN in those that are among the `first`."""
        first = self.first(n)
        rest = self.images[:, n:]
        return rest if first.dim() == 1 else rest.masked_fill(first[:, n:, None, None], torch.nan)

    def ends(self, n: int) -> Tensor:
        """Returns a mask of the `first` and last ``n`` frames of sequences, (T,) if all have T frames, else (n, T)."""
        time, lengths = torch.arange(self.images.shape[1]), self.lengths[:, None]
        ends = up_to(self.images, n) | ((time >= lengths - n) & (time < lengths))
        return ends[0] if bool((ends == ends[0]).all()) else ends

    def __getitem__(self, index: "Tensor | slice | int | Sequence[int]") -> "ImageSequences":
        """Returns the sequences selected by a slice, a number (a set of one), a list or an index tensor.

        Raises:
            IndexError: if there is no such sequence.
        """
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} sequences")
            index = slice(int(index), int(index) + 1 or None)
        elif not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index.reshape(1) if index.dim() == 0 and index.dtype != torch.bool else index
        n_objects = self.n_objects[index]
        most = int(n_objects.max()) if len(n_objects) else 0

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index][:, :most]

        return _checked(
            self.images[index], n_objects, pick(self.positions), pick(self.paths), pick(self.sides), self.dynamics
        )


def _checked(*fields: object) -> ImageSequences:
    """Returns `ImageSequences` without checks, from fields that have been checked."""
    new = object.__new__(ImageSequences)
    for field, value in zip(dataclasses.fields(ImageSequences), fields):
        object.__setattr__(new, field.name, value)
    return new


def join_sequences(parts: Sequence[ImageSequences]) -> ImageSequences:
    """Joins sets of sequences, for example in ``DataLoader(data, batch_size=20, collate_fn=join_sequences)``.

    Shorter sequences are padded with unobserved frames. Fields that some sets lack, such as positions, are left out.

    Raises:
        ValueError: if there are none, or they differ in their size.
    """
    parts = [part for part in parts if len(part)]
    check_any(len(parts), "to join")
    most, T = max(int(p.n_objects.max()) for p in parts), max(p.images.shape[1] for p in parts)

    def join(name: str, fill: float) -> Tensor | None:
        tensors = [getattr(p, name) for p in parts]
        if any(x is None for x in tensors):
            return None
        padded = []
        for x in tensors:
            frames = T - x.shape[2] if x.dim() == 4 else 0
            x = torch.nn.functional.pad(x, (0, 0, 0, frames), value=fill) if frames else x
            rest = x.new_full((len(x), most - x.shape[1], *x.shape[2:]), fill)
            padded.append(torch.cat([x, rest], 1))
        return torch.cat(padded)

    images = as_images([x for p in parts for x in p.images])
    dynamics = parts[0].dynamics if all(p.dynamics is parts[0].dynamics for p in parts) else None
    return _checked(
        images, torch.cat([p.n_objects for p in parts]), join("positions", torch.nan), join("paths", torch.nan),
        join("sides", -1), dynamics,
    )  # fmt: skip


def save_sequences(path: str | Path, data: ImageSequences) -> None:
    """Writes an .npz that `load_sequences` reads; an existing file is replaced only once the new one is complete."""
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


def load_sequences(path: str | Path, *, max_bytes: int = MAX_BYTES) -> ImageSequences:
    """Reads an .npz of image sequences and checks it.

    The file has ``images`` (n, T, H, W), uint8 0/1 or float32 within [0, 1], ``n_objects`` int (n,), and optionally
    ``positions`` float (n, N_max, T, 2) in pixels (column, row), NaN where there is no object. Whole frames of NaN are
    unobserved, such as those that pad shorter sequences. `simulate.py` also
    writes the noise-free ``paths``, the launch ``sides`` and the ``true_*`` parameters of the dynamics.

    Args:
        max_bytes: the largest total size of these arrays, unpacked; it is checked before anything is unpacked.

    Raises:
        ValueError: if there is no such file, or its contents are not as above.
    """
    path = Path(path)
    if path.suffix != ".npz" and path.exists() and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not an .npz of image sequences; if it is a film, convert it with examples/prepare.py, and give "
            "the file that it writes"
        )
    true = [f"true_{field}" for field in LGSSM._fields] + ["true_pi"]
    names = ("images", "n_objects", "positions", "paths", "sides", *true)
    try:
        arrays = read_arrays(path, max_bytes=max_bytes, names=names)
    except FileNotFoundError:
        raise ValueError(
            f"there is no file {path}; make one with examples/simulate.py, or see its docs for the format"
        ) from None

    for name in ("images", "n_objects"):
        if name not in arrays:
            raise ValueError(
                f"{path} has no array '{name}', only {sorted(arrays)}; wanted images and n_objects"
                + (f": give --n-objects to {PREPARE}" if name == "n_objects" else "")
            )
    images, n_objects = arrays["images"], arrays["n_objects"]
    if images.ndim == 4 and images.shape[1] < 2 and images.size:
        raise ValueError(f"{path}: sequences have {images.shape[1]} frame; wanted at least 2, as one shows no motion")
    if n_objects.dtype.kind in "iu" and n_objects.size and n_objects.max() > MAX_OBJECTS:
        raise ValueError(f"{path}: n_objects has the value {n_objects.max()}; wanted at most {MAX_OBJECTS:,}")
    try:
        given: dict[str, Any] = {name: arrays.get(name) for name in ("images", "n_objects", "positions", "paths")}
        found = ImageSequences(**given)
    except (ValueError, TypeError, RuntimeError) as error:  # torch lacks some operations for some types
        raise ValueError(f"{path}: {(str(error).splitlines() or [''])[0]}") from None
    sides = arrays.get("sides")
    if sides is not None:
        if sides.shape != (len(images), int(n_objects.max())) or not np.issubdtype(sides.dtype, np.integer):
            raise ValueError(
                f"{path}: sides have shape {sides.shape} and type {sides.dtype}; wanted integers (n, N_max)"
            )
        sides = torch.from_numpy(sides.astype(np.int64))
    dynamics = _checked_dynamics(path, [arrays[name] for name in true]) if arrays.keys() >= set(true) else None
    return _checked(found.images, found.n_objects, found.positions, found.paths, sides, dynamics)


def _checked_dynamics(path: Path, arrays: list[NDArray[Any]]) -> TrueDynamics:
    """Returns the ``true_*`` parameters after checking shapes, finiteness, probabilities and covariances."""
    K = arrays[-1].shape[0] if arrays[-1].ndim == 1 else 0
    shapes = [(4, 4), (2, 4), (4,), (4, 4), (2, 2), (K, 4), (K, 4, 4), (K,)]
    for name, x, shape in zip((*LGSSM._fields, "pi"), arrays, shapes):
        if x.shape != shape or x.dtype.kind not in "fiu" or 0 in shape:
            raise ValueError(
                f"{path}: true_{name} has shape {x.shape} and type {x.dtype}; wanted floats {shape}. Leave all true_* "
                "out, or write them as simulate.py does"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: true_{name} has values that are not finite; wanted finite ones, or no true_*")
    values = [torch.from_numpy(x.astype(np.float64)) for x in arrays]
    lgssm, pi = LGSSM(*values[:-1]), values[-1]
    if bool((pi < 0).any()) or abs(float(pi.sum()) - 1) > 1e-6:
        raise ValueError(f"{path}: true_pi is {pi.tolist()}; wanted probabilities that add up to 1")
    for name in ("Sigma_H", "Sigma_A", "Sigma"):
        Sigma = getattr(lgssm, name)
        scale = 1e-9 * float(Sigma.abs().max()) + 1e-300
        least = float(torch.linalg.eigvalsh(Sigma).min())
        if not torch.allclose(Sigma, Sigma.mT, rtol=0, atol=scale) or least < -scale:
            raise ValueError(
                f"{path}: true_{name} is not a covariance matrix; wanted a symmetric, positive semi-definite one"
            )
    return TrueDynamics(lgssm, pi)
