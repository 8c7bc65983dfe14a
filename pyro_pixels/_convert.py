"""Conversion of images and numbers of objects in common formats to tensors; ambiguous ones raise a clear error."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_pixels._batch import check_batch, check_values, counts, unseen_frames

PREPARE = "examples/prepare.py, or pyro_pixels.load_video, reads such films"


def as_images(images: Any) -> Tensor:
    """Returns images (n, T, H, W), uint8 0 or 1, or float32 within [0, 1] with NaN in unobserved frames.

    Accepted are: NumPy arrays; bool; any type whose values are 0 and 1, or 0 and 255; float64 within [0, 1]; a last
    axis of length 1; and a list of sequences (T, H, W), where shorter ones are padded with unobserved frames.

    Raises:
        ValueError: for anything else, as the meaning of the values or axes would be ambiguous.
    """
    if isinstance(images, np.ndarray) and images.dtype == object:
        images = list(images)
    if isinstance(images, list | tuple):
        return _padded([_as_tensor(x) for x in images])
    found = _as_tensor(images)
    if found.dim() == 5 and found.shape[-1] == 1:
        found = found.squeeze(-1)
    if found.dim() == 5 and found.shape[-1] in (3, 4):
        raise ValueError(
            f"images have shape {tuple(found.shape)}, with colour in the last axis; wanted grey images: {PREPARE}"
        )
    if found.dim() != 4 or 0 in found.shape:
        raise ValueError(f"images have shape {tuple(found.shape)}; wanted (n, T, H, W), none of them 0")
    return as_values(found)


def as_values(found: Tensor) -> Tensor:
    """Returns pixels of any type as uint8 0 or 1, or float32 within [0, 1]; errors as in `as_images`."""
    if found.dtype == torch.bool:
        return found.to(torch.uint8)
    if found.is_complex():
        raise ValueError(f"images have type {found.dtype}; wanted uint8 or float32")
    if not found.is_floating_point():
        low, high = int(found.min()), int(found.max())
        if low >= 0 and high <= 1:
            return found.to(torch.uint8)
        if low == 0 and high == 255 and bool(((found == 0) | (found == 255)).all()):
            return (found != 0).to(torch.uint8)
        raise ValueError(
            f"images have the values {low} to {high}; wanted 0 and 1 only (divide grey values by the largest possible "
            f"one, in float32, or threshold them); {PREPARE}"
        )
    found = found.float()
    seen = found[~unseen_frames(found)]
    if seen.numel() and float(seen.max()) == 255 and bool(((seen == 0) | (seen == 255)).all()):
        found = found / 255
    check_values(found)
    return found


def as_counts(n_objects: Any, n_sequences: int) -> Tensor:
    """Returns ``n_objects`` (n,) int64, from a tensor, an array, a list, or one number for all.

    Raises:
        ValueError: unless they are whole numbers of at least 1, one per sequence.
    """
    try:
        found = torch.as_tensor(np.asarray(n_objects) if isinstance(n_objects, list | tuple) else n_objects)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"n_objects is {n_objects!r}; wanted integers ({n_sequences},), one per sequence") from None
    if found.dim() == 0 and not isinstance(n_objects, Tensor | np.ndarray):
        found = found.expand(n_sequences).clone()
    if found.shape != (n_sequences,) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(
            f"n_objects has shape {tuple(found.shape)} and type {str(found.dtype).removeprefix('torch.')}; "
            f"wanted integers ({n_sequences},)"
        )
    if int(found.min()) < 1:
        raise ValueError(f"n_objects has the value {int(found.min())}; every sequence needs at least 1 object")
    return found.to(torch.int64)


def as_positions(name: str, positions: Any, images: Tensor, n_objects: Tensor) -> Tensor:
    """Returns true positions (n, N_max, T, 2) float64, NaN for absent objects, and in unobserved frames where unknown.

    Raises:
        ValueError: if the shape or type is wrong, or a position of an object in an observed frame is not finite.
    """
    wanted = (len(images), int(n_objects.max()), images.shape[1], 2)
    if isinstance(positions, list | tuple):
        parts = [_as_tensor(x).double() for x in positions]
        found = torch.full((len(parts), *wanted[1:]), torch.nan, dtype=torch.float64)
        for i, x in enumerate(parts):
            if x.dim() != 3 or x.shape[0] > wanted[1] or x.shape[1] > wanted[2] or x.shape[2] != 2:
                raise ValueError(f"{name} of sequence {i} have shape {tuple(x.shape)}; wanted (N, T, 2)")
            found[i, : x.shape[0], : x.shape[1]] = x
        positions = found
    found = _as_tensor(positions)
    if found.shape != wanted or not found.is_floating_point():
        raise ValueError(
            f"{name} have shape {tuple(found.shape)} and type {str(found.dtype).removeprefix('torch.')}; "
            f"wanted floats (n, N_max, T, 2) = {wanted}, in pixels (column, row)"
        )
    present = torch.arange(wanted[1]) < n_objects.cpu()[:, None]
    seen = ~unseen_frames(images).cpu()
    needed = present[:, :, None] & seen[:, None]
    if not bool(found.cpu()[needed].isfinite().all()):
        raise ValueError(
            f"{name} of existing objects are not finite; NaN may only fill slots beyond n_objects and unobserved frames"
        )
    return torch.where(present[:, :, None, None].to(found.device), found.double(), torch.nan)


def _as_tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    try:
        array = np.asarray(x)
        if array.dtype == np.uint16 or array.dtype == np.uint32:
            array = array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise ValueError(f"images are a {type(x).__name__} ({error}); wanted an array (n, T, H, W)") from None


def _padded(sequences: Sequence[Tensor]) -> Tensor:
    """Returns sequences (T_i, H, W) as one tensor, the shorter ones padded with NaN."""
    if not sequences:
        raise ValueError("there are no images; wanted at least one sequence (T, H, W)")
    sequences = [x.squeeze(-1) if x.dim() == 4 and x.shape[-1] == 1 else x for x in sequences]
    for i, x in enumerate(sequences):
        if x.dim() != 3 or 0 in x.shape or x.shape[1:] != sequences[0].shape[1:]:
            raise ValueError(
                f"sequence {i} has shape {tuple(x.shape)}; wanted (T, H, W) with the H and W of the first, "
                f"{tuple(sequences[0].shape[1:])}; {PREPARE} of any size"
            )
    values = [as_values(x) for x in sequences]
    if len({x.shape[0] for x in values}) == 1 and len({x.dtype for x in values}) == 1:
        return torch.stack(values)
    T = max(len(x) for x in values)
    found = torch.full((len(values), T, *values[0].shape[1:]), torch.nan)
    for row, x in zip(found, values):
        row[: len(x)] = x
    return found


def as_batch(images: Any, n_objects: Any) -> tuple[Tensor, Any]:
    """Returns the batch of a query, with NumPy arrays converted to tensors.

    Shapes, values, and other types of ``n_objects`` are left to `_batch`.

    Raises:
        ValueError: if the images are neither a tensor nor an array, or are complex.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "biuf":
        images = _as_tensor(images)
    if not isinstance(images, Tensor) or images.is_complex():
        kind = images.dtype if isinstance(images, Tensor | np.ndarray) else type(images).__name__
        raise ValueError(f"images are of type {kind}; wanted a tensor or an array of real numbers (B, T, H, W)")
    if isinstance(n_objects, np.ndarray):
        n_objects = as_counts(n_objects, len(images)).to(images.device)
    return images, n_objects


def checked_batch(
    images: Any, n_objects: Any, size: tuple[int, int] | None = None, *, values: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns images (B, T, H, W) and n_objects (B,) int64 of a query, from tensors, arrays, lists or one number.

    Raises:
        ValueError: if they do not fit each other or ``size`` (H, W), or, with ``values``, pixels are outside [0, 1].
            Entire frames may be NaN, which means unobserved.
    """
    images, n_objects = as_batch(images, n_objects)
    n_objects = counts(n_objects, len(images) if images.dim() else None, images)
    check_batch(images, n_objects, size, values=values)
    return images, n_objects
