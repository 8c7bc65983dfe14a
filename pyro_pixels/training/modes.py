"""Training and evaluation mode of modules, which layers such as Dropout and BatchNorm depend on.

`fit` takes steps in training mode and does everything else in evaluation mode, in which it leaves model and guide.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules into evaluation mode, so that running averages stay unchanged, and restores their modes on exit."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
