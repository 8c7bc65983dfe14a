"""Masks of observed frames: checks, the frames in which any object is observed, and the gaps between them."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_pixels._batch import check_values, object_mask, unseen_frames


def as_mask(observed: Any, images: Tensor) -> Any:
    """Returns a mask that is an array as a tensor on the images' device; anything else is left for `checked_mask`."""
    is_array = isinstance(observed, np.ndarray) and observed.dtype.kind in "biuf"
    return torch.from_numpy(observed.copy()).to(images.device) if is_array else observed


def checked_mask(observed: Tensor, images: Tensor, n_objects: Tensor) -> Tensor:
    """Checks ``observed``, and the images in these frames, and returns it as (T,) or (B, N or 1, T)."""
    observed = as_mask(observed, images)
    if not isinstance(observed, Tensor):
        raise ValueError(f"observed is a {type(observed).__name__}; wanted a tensor of bool, (T,), (B, T) or (B, N, T)")
    (B, T), N = images.shape[:2], int(n_objects.max())
    if observed.dtype != torch.bool or observed.shape not in ((T,), (B, T), (B, N, T)):
        raise ValueError(
            f"observed is {observed.dtype} {tuple(observed.shape)}; "
            f"wanted bool, (T,) = ({T},), (B, T) = {(B, T)} or (B, N, T) = {(B, N, T)}"
        )
    observed = observed.unsqueeze(1) if observed.dim() == 2 else observed
    check_values(images, frames_seen_in(observed))
    if observed.dim() == 3 and observed.shape[1] > 1:  # absent objects are never observed
        observed = observed & object_mask(n_objects, N).unsqueeze(-1)
    unseen = ~frames_seen_in(observed).any(-1)
    if unseen.any():
        where = "" if observed.dim() == 1 else f" of sequence {int(unseen.nonzero()[0])}"
        raise ValueError(f"observed is False in every frame{where}; wanted at least one True in every sequence")
    unknown = unseen_frames(images)  # NaN frames are unobserved, whatever the mask
    if bool((unknown & frames_seen_in(observed)).any()):
        observed = observed & ~unknown.unsqueeze(1)
    return observed


def seen_or_none(images: Tensor) -> Tensor | None:
    """Returns the mask (B, 1, T) of frames that are not NaN, or None if none is, which saves time where it is used."""
    seen = ~unseen_frames(images).unsqueeze(1)
    return None if bool(seen.all()) else seen


def sequence_mask(observed: Tensor | None, a: Tensor) -> Tensor | None:
    """Returns ``observed`` so that a mask (B, T) of sequences broadcasts to positions (..., B, N, T, 2).

    It is false where positions are NaN, and stays None if none is.

    Raises:
        ValueError: if it has the shape of such a mask, but another number of sequences.
    """
    if observed is not None and observed.dim() == 2 and a.dim() > 3:
        if observed.shape[0] not in (1, a.shape[-4]):
            raise ValueError(
                f"observed has shape {tuple(observed.shape)} for positions {tuple(a.shape)}; wanted (T,), (B, T) = "
                f"{(a.shape[-4], a.shape[-2])}, or (B, N, T)"
            )
        observed = observed.unsqueeze(1)
    known = ~a.isnan().any(-1)
    if bool(known.all()):
        return observed
    fits = observed is not None and observed.dtype == torch.bool and observed.shape[-1:] == known.shape[-1:]
    return known if observed is None else observed & known if fits else observed  # what does not fit is refused later


def frames_seen_in(observed: Tensor) -> Tensor:
    """Returns a mask (T,) or (B, T) of the frames in which any object is observed."""
    return observed if observed.dim() == 1 else observed.any(1)


def gaps_of(seen: Tensor) -> list[tuple[int, int]]:
    """Returns (start, stop) of every run of missing frames between two observed ones of a mask (T,)."""
    frames = seen.nonzero().squeeze(1).tolist()
    return [(before + 1, after) for before, after in itertools.pairwise(frames) if after > before + 1]
