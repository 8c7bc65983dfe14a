"""Repeated products with one matrix, to += x W, as a recursion needs them.

Matrices that do not fit into a core's cache are packed once into the order in which MKL reads them, instead of at every
product. With 20 to 60 rows a product of 1024 x 2048 then takes half the time (docs/performance.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

PACK_FROM = 2**19
"""Elements of the smallest matrix that is packed; smaller ones gain nothing."""

PACKED = torch.ops.mkl._mkl_linear if hasattr(torch.ops.mkl, "_mkl_linear") else None
"""torch's product with a packed matrix; None where torch was built without MKL."""


def accumulator(W: Tensor, n_rows: int) -> Callable[[Tensor, Tensor], None]:
    """Returns a function that computes ``to += x W`` in place, for ``to`` (n, j), ``x`` (n, i), without gradients.

    Args:
        W: (i, j); it must not change while the function is in use.
        n_rows: the n of most products, 0 if there will be none; other n are correct but slower.
    """
    if PACKED is not None and n_rows > 0 and packs(W):  # MKL's packing crashes for products of no rows
        product, columns = PACKED, _in_order(W.mT)
        packed = torch.ops.mkl._mkl_reorder_linear_weight(columns, n_rows)

        def add(to: Tensor, x: Tensor) -> None:
            to += product(x, packed, columns, None, n_rows)

    else:
        rows = _in_order(W) if n_rows > 0 else W

        def add(to: Tensor, x: Tensor) -> None:
            torch.addmm(to, x, rows, out=to)

    return add


def accumulator_reference(W: Tensor, n_rows: int) -> Callable[[Tensor, Tensor], None]:
    """What `accumulator` makes, by torch's own product."""

    def add(to: Tensor, x: Tensor) -> None:
        to.add_(x @ W)

    return add


def packs(W: Tensor) -> bool:
    """Tells whether `accumulator` packs a matrix: it must be large, float32 and on a CPU, and torch built with MKL."""
    return PACKED is not None and W.device.type == "cpu" and W.dtype == torch.float32 and W.numel() >= PACK_FROM


def _in_order(W: Tensor) -> Tensor:
    """Returns ``W.contiguous()``; transposed matrices on a CPU are copied in strips, in a quarter of the time."""
    in_strips = W.device.type == "cpu" and W.stride(-1) != 1
    return torch.cat(W.split(64, 1), 1) if in_strips else W.contiguous()
