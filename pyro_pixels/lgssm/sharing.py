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
Kind = TypeVar("Kind", bound=type)
_OF_PARAMETERS_ALONE: set[type] = set()


def of_parameters_alone(kind: Kind) -> Kind:
    """Declares that what is computed from a module of this class depends on its parameters and on nothing else that a
    step computes. This does not hold for subclasses, which may depend on anything."""
    _OF_PARAMETERS_ALONE.add(kind)
    return kind


class _Shared:
    """What has been computed so far, on the current stream."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any], of: tuple[object, ...]) -> Any:
        """Returns what is stored at ``key``, computed now if it is not there."""
        if key not in self.made:
            self.made[key] = make(), of  # keeps the objects alive, so that no other object gets the same id
        return self.made[key][0]


class _SharedBeside(_Shared):
    """The same on another stream, for which the current one waits."""

    def __init__(self, beside: torch.cuda.Stream) -> None:
        super().__init__()
        self._beside = beside
        self._begun = self._current().record_event()

    def get(self, key: Hashable, make: Callable[[], Any], of: tuple[object, ...]) -> Any:
        if self._current() == self._beside:
            return super().get(key, make, of)
        made = super().get(key, lambda: self._make(make, of), of)
        self._current().wait_stream(self._beside)
        _keep(made, self._current())
        return made

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._beside.device)

    def _make(self, make: Callable[[], Made], of: tuple[object, ...]) -> Made:
        if all(isinstance(x, int) or _depends_on_parameters_alone(x) for x in of):
            self._beside.wait_event(self._begun)
        else:
            self._beside.wait_stream(self._current())
        with torch.cuda.stream(self._beside):
            made = make()
        _keep(of, self._beside)
        return made


def _depends_on_parameters_alone(x: object) -> bool:
    """Whether nothing that is computed from a module depends on the step; not with parameters or parts from outside."""
    if type(x) not in _OF_PARAMETERS_ALONE or not isinstance(x, nn.Module):
        return False
    own = getattr(getattr(x, "components", None), "__module__", "").startswith("pyro_pixels.")
    return own and all(isinstance(p, nn.Parameter) for p in x.parameters())


def _keep(x: object, stream: torch.cuda.Stream) -> None:
    """Keeps the memory of all tensors in x from being used for anything else before the stream has read it."""
    for tensor in _tensors(x):
        if tensor.is_cuda:
            tensor.record_stream(stream)


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
def not_sharing() -> Iterator[None]:
    """Within this context, `once` computes everything anew, on the current stream."""
    tokens = _SHARED.set(None), _BESIDE.set(None)
    try:
        yield
    finally:
        _SHARED.reset(tokens[0])
        _BESIDE.reset(tokens[1])


@contextmanager
def sharing() -> Iterator[None]:
    """Within this context, `once` computes each quantity only once. Within another such context it changes nothing."""
    if _SHARED.get() is not None:
        yield
        return
    beside = _BESIDE.get()
    token = _SHARED.set(_Shared() if beside is None else _SharedBeside(beside))
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


def _tensors(x: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Returns the tensors in tuples, lists and objects such as distributions, but not those in modules."""
    seen = set() if seen is None else seen
    if id(x) in seen or isinstance(x, (nn.Module, nn.Parameter, type)) or hasattr(x, "__code__"):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    else:
        for part in x if isinstance(x, (tuple, list)) else getattr(x, "__dict__", {}).values():
            yield from _tensors(part, seen)
