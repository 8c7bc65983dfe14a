"""Queries about many sequences, in parts: memory beyond that of the answer does not grow with their number.

A part has at most `PIXELS_AT_ONCE` pixels, over all sequences, frames and samples, or `FEWEST` sequences. Whoever asks
about fewer gets what a single batch gives; beyond, samples are drawn part by part, and the slots of absent objects may
hold 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from pyro_pixels._arrays import MAX_BYTES
from pyro_pixels._batch import counts

PIXELS_AT_ONCE = 2**24
FEWEST = 16
Answer = TypeVar("Answer", bound=NamedTuple)


def rows_of_parts(n_sequences: int, pixels: int) -> list[slice]:
    """Slices of the sequences, as many to a part as there may be with ``pixels`` of each."""
    at_once = max(FEWEST, PIXELS_AT_ONCE // max(1, pixels))
    return [slice(start, start + at_once) for start in range(0, n_sequences, at_once)]


def in_parts(
    ask: Callable[[slice], Answer],
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    n_frames: int | None = None,
    n_samples: int = 0,
    n_images: int = 0,
) -> Answer | None:
    """The answers about some sequences at a time, joined; None where all of them make one part.

    Args:
        ask: the query about a slice of the sequences. Of its answer, fields whose names begin with ``sample`` have
            the sequences in dimension 1, others in dimension 0; those that are called ``...images`` have no objects.
            ``observed`` is left as it is in the first answer.
        images: (B, T, H, W).
        n_objects: (B,), or one number.
        n_frames: of the answer, if it is not T.
        n_samples: S.
        n_images: how many images (B, T, H, W) the answer has, those of samples counted, to know what it takes.

    Raises:
        ValueError: if the images of the answer would take more than `MAX_BYTES`.
    """
    if images.dim() != 4 or 0 in images.shape:
        return None  # refused later
    B, T, H, W = images.shape
    pixels = (n_frames or T) * H * W
    if 4 * B * pixels * n_images > MAX_BYTES:
        raise ValueError(
            f"the images of {B:,} sequences with {n_samples:,} samples each would take {4 * B * pixels * n_images:,} "
            f"bytes, more than {MAX_BYTES:,}; ask about fewer at a time"
        )
    rows = rows_of_parts(B, pixels * max(1, n_samples))
    n = counts(n_objects, B, images)
    if len(rows) < 2 or n.shape != (B,):
        return None
    N, joined, first = int(n.max()), {}, None
    for part in rows:
        answer = ask(part)
        first = answer if first is None else first
        for name, x in zip(answer._fields, answer):
            if not isinstance(x, Tensor) or name == "observed":
                continue
            of_samples = name.startswith("sample")
            if name not in joined:
                joined[name] = _room(x, B, N, int(of_samples), with_objects=not name.endswith("images"))
            place = joined[name][:, part] if of_samples else joined[name][part]
            if not name.endswith("images") and x.dim() > 1 + of_samples:
                place = place[:, :, : x.shape[2]] if of_samples else place[:, : x.shape[1]]
            place.copy_(x)
    assert first is not None
    return first._replace(**joined)


def _room(x: Tensor, B: int, N: int, batch: int, *, with_objects: bool) -> Tensor:
    shape = list(x.shape)
    shape[batch] = B
    if with_objects and x.dim() > batch + 1:
        shape[batch + 1] = N
    return x.new_zeros(shape)
