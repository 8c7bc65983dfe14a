"""What model and guide have in common in one evaluation of the bound is computed once.

Under a `StructuredGuide` p(a) is part of the model, the guide and its tracking head. Inside `sharing` all of them
get the same tensors, with one graph behind them. It is meant for one evaluation whose gradient is taken once.
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
    """Within it `once` makes things once."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def once(name: str, make: Callable[[], Made], *of: object) -> Made:
    """What ``make`` gives, made once for the same objects ``of`` (numbers by value) inside `sharing`, else each time.

    With and without gradients are two different things.
    """
    shared = _SHARED.get()
    if shared is None:
        return make()
    key = (name, torch.is_grad_enabled(), *(x if isinstance(x, int) else ("id", id(x)) for x in of))
    if key not in shared:
        shared[key] = make(), of  # what they are of stays alive as long, so that no other object gets its id
    return shared[key][0]
