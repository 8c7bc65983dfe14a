"""The order in which the renderer draws the objects: fixed, or random for each sequence.

The renderer of Eqs (1)-(2) draws one object after the other, so p(v | a) depends on their order while p(a) does not. A
renderer trained with a fixed order learns identities: the object drawn first is the upper one, say. It then draws
objects badly when their identities are exchanged, which keeps a guide from correcting identity switches.

Departures from the paper: none by default; the paper's order is fixed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_random: ContextVar[bool] = ContextVar("random_order", default=False)


@contextmanager
def drawing_in_random_order(random: bool = True) -> Iterator[None]:
    """Within this context, every `PixelModel` renders the objects of each sequence in random order, if ``random``.

    Objects are exchangeable under p(a), so E_q[log p(v | pi a)] - KL(q || p) is a lower bound of log p(v) for every
    order pi, and so is its mean over orders. A renderer trained in this way learns to draw the same image in any order.
    """
    token = _random.set(random)
    try:
        yield
    finally:
        _random.reset(token)


def in_order(a: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Returns positions a (..., B, N, T, 2) and the mask of present objects (B, N), in the order of drawing."""
    if not _random.get() or a.shape[-3] == 1:
        return a, present
    order = torch.rand(present.shape, device=present.device).argsort(-1)
    return a.gather(-3, order[..., None, None].expand_as(a)), present.gather(-1, order)
