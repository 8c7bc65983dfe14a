"""Computes quantities that model and guide have in common only once per evaluation of the bound.

With a `StructuredGuide`, p(a) is part of the model, the guide and its tracking head. Inside `sharing` all of them use
the same tensors, with a single autograd graph. It is meant for one evaluation whose gradient is taken once.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")

_SHARED: ContextVar[dict[Hashable, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Within this context, `once` computes each quantity only once."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def once(name: str, make: Callable[[], Made], *of: object) -> Made:
    """Returns the result of ``make``: computed once for each ``name`` and ``of`` inside `sharing`, else at each call.

    The objects ``of`` are compared by identity, integers by value. Results with and without gradients are separate.
    """
    shared = _SHARED.get()
    if shared is None:
        return make()
    key = (name, torch.is_grad_enabled(), *(x if isinstance(x, int) else ("id", id(x)) for x in of))
    if key not in shared:
        shared[key] = make(), of  # keeps the objects alive, so that no other object gets the same id
    return shared[key][0]
