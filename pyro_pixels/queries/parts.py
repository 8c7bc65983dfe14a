"""Queries for many sequences, in parts: memory, apart from that of the result, does not grow with their number.

A part has at most `PIXELS_AT_ONCE` pixels, over all sequences, frames and samples, or `FEWEST` sequences. A query that
fits in one part runs as a single batch. Otherwise samples are drawn part by part, and the slots of absent objects may
hold 0.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_pixels._arrays import MAX_BYTES
from pyro_pixels._batch import counts
from pyro_pixels._convert import as_batch
from pyro_pixels.queries.masks import as_mask

PIXELS_AT_ONCE = 2**24
FEWEST = 16
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


@runtime_checkable
class OfSequences(Protocol):
    """An argument of a query that has values for each sequence."""

    def check(self, n_sequences: int, most_objects: int) -> None:
        """Raises ValueError unless the values are those of ``n_sequences`` sequences with ``most_objects`` objects."""
        ...

    def of_part(self, part: slice, n_sequences: int, most_objects: int) -> Any:
        """Returns the argument for the sequences ``part``, which have at most ``most_objects`` objects."""
        ...


def rows_of_parts(n_sequences: int, pixels: int) -> list[slice]:
    """Returns slices of the sequences, one per part, as long as the limits allow with ``pixels`` per sequence."""
    at_once = max(FEWEST, PIXELS_AT_ONCE // max(1, pixels))
    starts = range(0, max(1, n_sequences), at_once)
    return [slice(start, min(start + at_once, n_sequences)) for start in starts]


def join(parts: Iterable[Tensor], rows: Sequence[slice], dim: int) -> Tensor:
    """Joins tensors along ``dim``, a negative index, and copies each into the result as it is computed."""
    whole = None
    for part, row in zip(parts, rows):
        if len(rows) == 1:
            return part
        if whole is None:
            whole = part.new_empty((*part.shape[:dim], rows[-1].stop, *part.shape[dim:][1:]))
        whole.narrow(dim, row.start, part.shape[dim]).copy_(part)
    assert whole is not None
    return whole


def in_parts(*, with_images: bool = False) -> Callable[[Callable[Given, Answer]], Callable[Given, Answer]]:
    """Returns a decorator that makes a query process many sequences in parts.

    The query's ``images`` (B, T, H, W), ``n_objects``, a mask ``observed`` with a sequence dimension, and arguments
    that are `OfSequences` are split. Its result must be a named tuple. Fields whose names begin with ``sample`` have
    the sequences in dimension 1, others in dimension 0; fields called ``...images`` have no object dimension.

    Args:
        with_images: whether the result contains images, and images of each sample. If they would take more than
            `MAX_BYTES`, the query raises a ValueError.
    """

    def decorate(query: Callable[Given, Answer]) -> Callable[Given, Answer]:
        signature = inspect.signature(query)

        @functools.wraps(query)
        def ask(*args: Given.args, **options: Given.kwargs) -> Answer:
            given = signature.bind(*args, **options)
            given.apply_defaults()
            parts = _parts_of(given.arguments, with_images)
            if len(parts) < 2:
                return query(*args, **options)
            sizes = [len(part["images"]) for part in parts]
            most = max(int(part["n_objects"].max()) for part in parts)
            return _joined((query(**part) for part in parts), sizes, most)  # type: ignore[call-arg, return-value]

        return ask

    return decorate


def _parts_of(given: dict[str, Any], with_images: bool) -> list[dict[str, Any]]:
    """Returns the arguments of each part; none if they are invalid, so that the query itself raises."""
    images, n_objects = as_batch(given["images"], given["n_objects"])
    frames, samples, observed = given.get("n_frames"), given.get("n_samples", 0), as_mask(given.get("observed"), images)
    if images.dim() != 4 or 0 in images.shape or not isinstance(samples, int) or not isinstance(frames, int | None):
        return []
    B, T, H, W = images.shape
    pixels = (frames or T) * H * W
    n_bytes = 4 * B * pixels * (1 + samples)
    if with_images and n_bytes > MAX_BYTES:
        raise ValueError(
            f"the images of {B:,} sequences with {samples:,} samples each would take {n_bytes:,} bytes, more than "
            f"{MAX_BYTES:,}; pass fewer sequences at a time"
        )
    n_objects = counts(n_objects, B, images)
    mask = observed if isinstance(observed, Tensor) and observed.dim() > 1 else None
    counted = n_objects.shape == (B,) and not (n_objects.is_complex() or n_objects.is_floating_point())
    if not counted or (mask is not None and len(mask) != B):
        return []
    for x in given.values():
        if isinstance(x, OfSequences):
            x.check(B, int(n_objects.max()))
    parts = []
    for part in rows_of_parts(B, pixels * max(1, samples)):
        most = int(n_objects[part].max())
        own = {name: x.of_part(part, B, most) for name, x in given.items() if isinstance(x, OfSequences)}
        if mask is not None:
            own["observed"] = mask[part, :most] if mask.dim() == 3 else mask[part]
        parts.append({**given, **own, "images": images[part], "n_objects": n_objects[part]})
    return parts


def _joined(answers: Iterable[Any], sizes: Sequence[int], most: int) -> Any:
    """Joins the results for parts of ``sizes`` sequences; each is copied into the whole as it is computed."""
    joined: dict[str, Tensor] = {}
    masks: list[Tensor] = []
    done, last = 0, None
    for last, size in zip(answers, sizes):
        for name, x in zip(last._fields, last):
            if name == "observed":
                masks.append(x)
            elif isinstance(x, Tensor):
                dim = int(name.startswith("sample"))
                of_objects = not name.endswith("images") and x.dim() > 1 + dim
                if name not in joined:
                    lengths = (sum(sizes), most) if of_objects else (sum(sizes),)
                    joined[name] = x.new_zeros((*x.shape[:dim], *lengths, *x.shape[dim + len(lengths) :]))
                place = joined[name].narrow(dim, done, size)
                (place.narrow(dim + 1, 0, x.shape[dim + 1]) if of_objects else place).copy_(x)
        done += size
    if masks:
        joined["observed"] = _joined_masks(masks, sizes)
    assert last is not None
    return last._replace(**joined)


def _joined_masks(masks: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Joins the masks of parts, each (T,) or (b, N or 1, T)."""
    if all(mask.dim() == 1 for mask in masks):
        return masks[0]
    N = max(mask.shape[1] for mask in masks if mask.dim() > 1)
    whole = [mask if mask.dim() > 1 else mask.expand(size, 1, -1) for mask, size in zip(masks, sizes)]
    return torch.cat([mask.expand(-1, N, -1) if mask.shape[1] == 1 else pad(mask, (0, 0, 0, N - mask.shape[1]))
                      for mask in whole])  # fmt: skip


def joined_groups(parts: Sequence[Any], rows: Tensor) -> Any:
    """Joins each `Prediction` of a group of sequences; the i-th sequence of all groups becomes sequence ``rows[i]``."""
    N, order = max(part.mean.shape[1] for part in parts), rows.argsort()

    def join(name: str) -> Tensor | None:
        batch = 1 if name.startswith("sample") else 0
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        if not name.endswith("images"):
            tensors = [_with_objects(x, batch + 1, N) for x in tensors]
        return torch.cat(tensors, batch).index_select(batch, order)

    names = ("mean", "cov", "images", "component", "samples", "sample_images")
    return parts[0]._replace(**{name: join(name) for name in names})


def _with_objects(x: Tensor, dim: int, n_objects: int) -> Tensor:
    """Pads dimension ``dim`` of x with zeros up to ``n_objects``."""
    return pad(x, [0, 0] * (x.dim() - dim - 1) + [0, n_objects - x.shape[dim]])
