"""The order in which the renderer draws the objects: as they are, or drawn at random for each sequence.

The renderer of Eqs (1)-(2) draws one object after the other, so p(v | a) depends on their order while p(a) does not. A
renderer that is trained with the same order throughout learns names of its own: what is drawn first is the upper one,
say. Objects whose names are exchanged are then drawn badly, and a guide is kept from putting names right.

Departures from the paper: it always draws in the same order, which is the default here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_random: ContextVar[bool] = ContextVar("random_order", default=False)


@contextmanager
def drawing_in_random_order(random: bool = True) -> Iterator[None]:
    """Within it the renderer of every `PixelModel` draws the objects of each sequence in an order drawn at random.

    Objects have no names in p(a), so E_q[log p(v | pi a)] - KL(q || p) is a lower bound of log p(v) for every order pi,
    and so is its mean over orders. A renderer that is trained with it comes to draw the same image whatever the order.
    """
    token = _random.set(random)
    try:
        yield
    finally:
        _random.reset(token)


def in_order(a: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Positions a (..., B, N, T, 2) and which objects there are (B, N), in the order in which they are to be drawn."""
    if not _random.get() or a.shape[-3] == 1:
        return a, present
    order = torch.rand(present.shape, device=present.device).argsort(-1)
    return a.gather(-3, order[..., None, None].expand_as(a)), present.gather(-1, order)
