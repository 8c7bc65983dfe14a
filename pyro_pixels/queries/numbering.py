"""Which object is called object k: results of several queries are numbered alike.

A guide numbers the objects by what it sees, so the same sequence may get other numbers from 5 frames than from 30. Its
objects are then matched by where they are. Results are named tuples in which fields called ``sample...`` have the
sequences in dimension 1, others in dimension 0, and those called ``...images`` have no object dimension.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyro_pixels._batch import counts
from pyro_pixels._matching import assign, reorder
from pyro_pixels.queries.masks import frames_seen_in


class WithMean(Protocol):
    """A result with positions, such as an `Inference` or a `Prediction`."""

    @property
    def mean(self) -> Tensor:
        """The positions (B, N, T, 2)."""
        ...


Answer = TypeVar("Answer", bound=WithMean)


def numbered_as(inferred: WithMean, found: Answer, n_objects: Tensor | int | Sequence[int]) -> Answer:
    """Returns ``found`` with its objects numbered as in ``inferred``, another result for the same sequences.

    Objects are matched, one to one, so that the mean distances over the frames that both have are smallest in sum; in
    a prediction, only observed frames count. Both must begin at the same frame.

    Args:
        inferred: the result whose numbers count, such as that of `infer` for all frames.
        found: a result of `infer`, `generate`, `interpolate` or `what_if`; no object may be removed before the match.
        n_objects: (B,), a list, or one number for all sequences.

    Raises:
        ValueError: if the two are not of the same sequences, or have no positions in a common frame.
    """
    n_objects = counts(n_objects, len(found.mean), found.mean)
    observed = getattr(found, "observed", None)
    seen = None if observed is None else frames_seen_in(observed)
    return reordered(found, order_as_in(inferred, found.mean, n_objects, seen))


def order_as_in(inferred: WithMean, mean: Tensor, n_objects: Tensor, seen: Tensor | None = None) -> Tensor:
    """Returns the order (B, N) such that object ``order[b, n]`` of the positions ``mean`` is object n of ``inferred``.

    Args:
        inferred: the result whose numbers count.
        mean: (B, N, T, 2).
        n_objects: (B,).
        seen: (T,) or (B, T) bool, the frames to compare; by default all.
    """
    B, N, T = mean.shape[:3]
    if len(inferred.mean) != B or inferred.mean.shape[1] < N:
        raise ValueError(
            f"inferred has means {tuple(inferred.mean.shape)} for positions {tuple(mean.shape)}; give the result of "
            "infer for these sequences"
        )
    T = min(T, inferred.mean.shape[2])
    a, wanted = mean[:, :, :T].cpu(), inferred.mean[:, :N, :T].cpu()
    if seen is not None:
        hidden = ~seen[..., :T].cpu().expand(B, T)[:, None, :, None]
        a = a.masked_fill(hidden & ~hidden.all(2, keepdim=True), torch.nan)
    for b, n in enumerate(n_objects.tolist()):
        if not bool((a[b, :n] + wanted[b, :n]).isfinite().all(-1).any(-1).all()):
            raise ValueError(f"an object of sequence {b} has no position in any frame that both have; wanted one")
    return assign(a, wanted, n_objects).to(mean.device)


def reordered(found: Any, order: Tensor) -> Any:
    """Returns a result with its objects in the order (B, N) of `order_as_in`."""

    def put(name: str, x: Tensor) -> Tensor:
        if name.startswith("sample"):
            return reorder(x.transpose(0, 1).transpose(1, 2), order).transpose(1, 2).transpose(0, 1)
        return reorder(x, order) if x.dim() > 1 and x.shape[1] > 1 else x

    fields = {name: x for name, x in zip(found._fields, found) if isinstance(x, Tensor) and not name.endswith("images")}
    return found._replace(**{name: put(name, x) for name, x in fields.items()})
