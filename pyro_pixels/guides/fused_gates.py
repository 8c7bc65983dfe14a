"""The elementwise work of a diagonal of Eq (8) as one kernel forward and one backward, in Triton, for CUDA.

`recurrence` has the same in plain torch operations, three kernels forward and two backward, besides copies. Tests hold
these to them, on a CPU by Triton's interpreter (tests/test_fused_gates.py). Imported only where it is used, as Triton
comes with torch for CUDA and with no other.
"""

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from pyro_pixels.guides.recurrence import Later

BLOCK = 1024  # entries of a row that a program works on


@triton.jit
def _forward(gate, beside, to, D, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = j < D
    at_beta, at_s_hat, at = gate + row * 2 * D + j, gate + row * 2 * D + D + j, row * D + j
    beta = tl.sigmoid(tl.load(at_beta, within))
    s_hat = 2 * tl.sigmoid(2 * tl.load(at_s_hat, within)) - 1  # tanh
    before = tl.load(beside + at, within)
    tl.store(at_beta, beta, within)
    tl.store(at_s_hat, s_hat, within)
    tl.store(to + at, before + beta * (s_hat - before), within)


@triton.jit
def _backward(g, slope, grad_gate, keep, before, first_later, D, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = j < D
    at, at_beta, at_s_hat = row * D + j, row * 2 * D + j, row * 2 * D + D + j
    gradient = tl.load(g + at, within)
    tl.store(grad_gate + at_beta, gradient * tl.load(slope + at_beta, within), within)
    tl.store(grad_gate + at_s_hat, gradient * tl.load(slope + at_s_hat, within), within)
    later, at_later = j < tl.where(row >= first_later, D, 0), at - first_later * D
    kept = tl.load(before + at_later, later) + gradient * tl.load(keep + at_later, later)
    tl.store(before + at_later, kept, later)


def gate(arguments: Tensor, beside: Tensor, to: Tensor) -> None:
    """As `recurrence.gate`."""
    n, D = to.shape
    block = min(BLOCK, triton.next_power_of_2(D))
    _forward[(n, triton.cdiv(D, block))](arguments, beside, to, D, BLOCK=block)  # type: ignore[index]


def gate_backward(g: Tensor, slope: Tensor, grad_gate: Tensor, later: Later) -> None:
    """As `recurrence.gate_backward`."""
    n, D = g.shape
    block = min(BLOCK, triton.next_power_of_2(D))
    first_later = n - len(later.g)
    _backward[(n, triton.cdiv(D, block))](  # type: ignore[index]
        g, slope, grad_gate, later.keep, later.before, first_later, D, BLOCK=block
    )
