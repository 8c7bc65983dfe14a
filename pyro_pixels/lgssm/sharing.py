"""Computes quantities that model and guide have in common only once per evaluation of the bound.

With a `StructuredGuide`, p(a) is part of the model, the guide and its tracking head. Inside `sharing` all of them use
the same tensors, with a single autograd graph. It is meant for one evaluation whose gradient is taken once.

On a GPU these quantities can be computed beside everything else (`computing_beside`): p(a) consists of a hundred small
operations on small matrices, one after the other, which leave most of the device idle.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class _Shared:
    """What has been computed, and the stream to compute on, if it is another one."""

    def __init__(self, beside: torch.cuda.Stream | None) -> None:
        self.made: dict[Hashable, Any] = {}
        self._beside = beside
        self._begun = None if beside is None else torch.cuda.current_stream(beside.device).record_event()

    def get(self, key: Hashable, make: Callable[[], Any], of: tuple[object, ...]) -> Any:
        """Returns what is stored at ``key``, computed now if it is not there; the current stream waits for it."""
        there = self._beside is None or self._beside == torch.cuda.current_stream(self._beside.device)
        if key not in self.made:  # of: keeps the objects alive, so that no other object gets the same id
            self.made[key] = (make() if there else self._make_beside(make, of)), of
        if not there:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
        return self.made[key][0]

    def _make_beside(self, make: Callable[[], Made], of: tuple[object, ...]) -> Made:
        assert self._beside is not None and self._begun is not None
        current, given = torch.cuda.current_stream(self._beside.device), list(_tensors(of))
        if given:
            self._beside.wait_stream(current)
        else:  # it depends on parameters alone
            self._beside.wait_event(self._begun)
        with torch.cuda.stream(self._beside):
            made = make()
        for tensors, stream in ((given, self._beside), (_tensors(made), current)):
            for x in tensors:  # its memory must not be used for anything else before this stream has read it
                x.record_stream(stream)
        return made


_SHARED: ContextVar[_Shared | None] = ContextVar("shared", default=None)
_BESIDE: ContextVar[torch.cuda.Stream | None] = ContextVar("beside", default=None)


@contextmanager
def computing_beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within this context, what is shared is computed on this stream, along with its gradient."""
    token = _BESIDE.set(stream)
    try:
        yield
    finally:
        _BESIDE.reset(token)


@contextmanager
def sharing() -> Iterator[None]:
    """Within this context, `once` computes each quantity only once."""
    token = _SHARED.set(_Shared(_BESIDE.get()))
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
    return shared.get(key, make, of)


def _tensors(x: object) -> Iterator[Tensor]:
    """Returns the tensors in tuples, lists and distributions, but not the parameters in modules."""
    if isinstance(x, Tensor):
        if not isinstance(x, nn.Parameter):
            yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)
    elif isinstance(x, torch.distributions.Distribution):
        for part in vars(x).values():
            yield from _tensors(part)
