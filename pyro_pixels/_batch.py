"""Checks of a batch (images, n_objects), the mask of its objects, and sizes that a CUDA graph may depend on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


def object_mask(n_objects: Tensor, max_objects: int) -> Tensor:
    """Returns the mask (B, max_objects) of the objects that are present, for ``n_objects`` (B,)."""
    return torch.arange(max_objects, device=n_objects.device) < n_objects.unsqueeze(-1)


def check_any(n_sequences: int, what: str) -> None:
    """Raises ValueError if there are no sequences; ``what`` is to be done with them."""
    if not n_sequences:
        raise ValueError(f"there are no sequences {what}; wanted at least one")


def counts(
    n_objects: Tensor | int | Sequence[int], n_sequences: int | None = None, like: Tensor | None = None
) -> Tensor:
    """Returns ``n_objects`` as a tensor (B,); a single number applies to every sequence, and lists are converted.

    Integers of any type become int64, because others cannot index tensors, or do so as a mask.

    Args:
        n_objects: a tensor, a number, a list or an array.
        n_sequences: B, if it is known.
        like: a tensor on the target device.
    """
    try:
        found = n_objects
        if not isinstance(found, Tensor) or found.dim() == 0:
            found = torch.as_tensor(n_objects, device=None if like is None else like.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"n_objects is {n_objects!r}; wanted whole numbers, one per sequence, or one for all"
        ) from None
    if not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        found = found.to(torch.int64)
    return found.expand(n_sequences or 1) if found.dim() == 0 else found


def unseen_frames(images: Tensor) -> Tensor:
    """Returns the mask (..., T) of the frames (..., T, H, W) that are NaN, which means unobserved."""
    if not images.is_floating_point():
        return torch.zeros(images.shape[:-2], dtype=torch.bool, device=images.device)
    return images[..., 0, 0].isnan()


def up_to(images: Tensor, n: int) -> Tensor:
    """Returns the mask (B, T) of the frames up to the n-th, counted from the first observed one of each sequence.

    Where none is observed, frames are counted from the first of all.
    """
    seen, time = ~unseen_frames(images), torch.arange(images.shape[1], device=images.device)
    return time < seen.int().argmax(1, keepdim=True) + n


def check_values(images: Tensor, observed: Tensor | None = None, what: str = "images") -> None:
    """Raises ValueError unless pixels lie within [0, 1]; entire frames may be NaN, which means unobserved.

    Args:
        images: (B, T, H, W).
        observed: broadcastable to (B, T), the frames to check; by default all. Others may hold anything.
    """
    if images.dtype == torch.bool or images.dim() != 4 or not images.numel() or _KNOWN.get() is not None:
        return
    lowest, highest = images.aminmax()
    if bool((lowest >= 0) & (highest <= 1)):  # the usual case, the fastest to tell; false if there is a NaN
        return
    unseen = unseen_frames(images)
    looked_at = torch.ones_like(unseen) if observed is None else observed.expand(unseen.shape)
    pixels = images[looked_at & ~unseen]
    if images.is_floating_point() and not bool(images[looked_at & unseen].isnan().all()):
        raise ValueError(f"{what} have NaN in part of a frame; only whole frames may be NaN (unobserved)")
    lowest, highest = pixels.aminmax() if pixels.numel() else (lowest.new_zeros(()), highest.new_ones(()))
    if not bool((lowest >= 0) & (highest <= 1)):
        low, high = float(lowest), float(highest)
        if low != low:
            raise ValueError(f"{what} have NaN in part of a frame; only whole frames may be NaN (unobserved)")
        advice = "divide them by 255" if low >= 0 else "scale them"
        raise ValueError(f"{what} have values from {low:g} to {high:g}; wanted 0 for black to 1 for white, so {advice}")


def check_objects(n_objects: Tensor) -> None:
    """Raises ValueError unless ``n_objects`` is (B,) with integers >= 1."""
    if (
        n_objects.dim() != 1
        or not len(n_objects)
        or n_objects.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ):
        raise ValueError(
            f"n_objects has shape {tuple(n_objects.shape)} and type {n_objects.dtype}; "
            "wanted integers, one per sequence"
        )
    if _KNOWN.get() is None and int(n_objects.min()) < 1:
        raise ValueError(f"n_objects has the value {int(n_objects.min())}; every sequence needs at least 1 object")


class Known(NamedTuple):
    """Sizes of a batch that are known without reading its tensors."""

    most_objects: int
    """The largest N."""
    most_white: int
    """An upper bound on the number of white pixels in a frame."""


_KNOWN: ContextVar[Known | None] = ContextVar("known", default=None)


@contextmanager
def knowing(known: Known) -> Iterator[None]:
    """Replaces sizes that would be read from the device by known ones, and skips the checks of values.

    A program that is recorded as a CUDA graph must not wait for the device.
    """
    token = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def most_objects(n_objects: Tensor) -> int:
    """Returns the largest N of a batch, from n_objects (B,)."""
    known = _KNOWN.get()
    return int(n_objects.max()) if known is None else known.most_objects


def most_white(v: Tensor) -> int:
    """Returns the largest number of non-black pixels in a frame, at least 1, from frames (..., P)."""
    known = _KNOWN.get()
    return max(1, int(v.sign().sum(-1).max()) if known is None else known.most_white)


def require_images(images: object) -> None:
    """Raises ValueError if a guide is given no images."""
    if not isinstance(images, Tensor):
        what = "None" if images is None else f"of type {type(images).__name__}"
        raise ValueError(
            f"images are {what}; a guide infers positions from images, so pass a tensor (B, T, H, W), or sample from "
            "the model's prior without a guide"
        )


def check_batch(
    images: Tensor, n_objects: Tensor, size: tuple[int, int] | None = None, *, values: bool = False
) -> None:
    """Raises ValueError unless images are (B, T, H, W), n_objects (B,) of integers >= 1, and (H, W) is ``size``.

    With ``values``, pixels are checked too (`check_values`).
    """
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; wanted (B, T, H, W), none of them 0")
    check_objects(n_objects)
    if len(n_objects) != len(images):
        raise ValueError(f"n_objects has length {len(n_objects)} for {len(images)} sequences; wanted one per sequence")
    if size is not None and images.shape[2:] != size:
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]} pixels; this model was made for {size[0]} x {size[1]}"
        )
    if values:
        check_values(images)
