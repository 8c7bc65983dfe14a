"""Checks of a batch (images, n_objects), the mask of its objects, and what a recording may know of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


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
    if _KNOWN.get() is None and int(n_objects.min()) < 1:
        raise ValueError(f"n_objects has the value {int(n_objects.min())}; every sequence needs at least 1 object")


class Known(NamedTuple):
    """What is known of a batch without looking at it."""

    most_objects: int
    """The largest N."""
    most_white: int
    """At least as many pixels as are white in any frame."""


_KNOWN: ContextVar[Known | None] = ContextVar("known", default=None)


@contextmanager
def knowing(known: Known) -> Iterator[None]:
    """Within it nothing of a batch is read from the device: sizes are those that are known, values are not checked.

    A program that is captured as a CUDA graph must not wait for the device.
    """
    token = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def most_objects(n_objects: Tensor) -> int:
    """The largest N of a batch, from n_objects (B,)."""
    known = _KNOWN.get()
    return int(n_objects.max()) if known is None else known.most_objects


def most_white(v: Tensor) -> int:
    """The largest number of pixels that are not black in a frame, at least 1, from frames (..., P)."""
    known = _KNOWN.get()
    return max(1, int((v > 0).sum(-1).max()) if known is None else known.most_white)


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
