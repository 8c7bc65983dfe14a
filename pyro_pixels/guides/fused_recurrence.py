"""The recursion of Eq (8) for CUDA with few kernels: one matrix product and one Triton kernel per diagonal.

`recurrence` does the same in plain torch operations. There a diagonal takes two products, one for the input from the
previous frame and one for the input from the previous object, and three elementwise kernels forward and two backward.
On a GPU the number of kernels determines the time. Here the two inputs of a cell are stored side by side, so that one
product serves both, and the kernel that computes a state writes it wherever it is read.

Tests compare states and gradients with `recurrence.recur_reference`, on a CPU with Triton's interpreter
(tests/test_fused.py). Imported only where it is used, because Triton comes only with torch for CUDA.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_pixels.guides.fused import launch

BLOCK = 1024  # entries of a state per Triton program


@triton.jit(do_not_specialize=["d", "first"])
def _forward(gates, inputs, states, d, first, N, T, B, D, width, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, b, within = first + row // B, row % B, j < D
    not_first, not_last = j < tl.where(n > 0, D, 0), j < tl.where(n + 1 < N, D, 0)
    cell = ((d * N + n) * B + b).to(tl.int64)
    gate, now, after = gates + cell * 2 * D + j, inputs + cell * width + j, inputs + (cell + N * B) * width + j
    beta = tl.sigmoid(tl.load(gate, within))
    s_hat = 2 * tl.sigmoid(2 * tl.load(gate + D, within)) - 1  # tanh
    before = tl.load(now + D, not_first, other=0.0)
    s = before + beta * (s_hat - before)
    tl.store(gate, beta, within)
    tl.store(gate + D, s_hat, within)
    tl.store(states + ((n * T + d - n) * B + b).to(tl.int64) * D + j, s, within)
    tl.store(after, s, within)
    tl.store(after + B * width + D, s, not_last)


@triton.jit(do_not_specialize=["d", "first"])
def _backward(
    grad_s, grad_inputs, gates, inputs, grad_states, grad_gates, d, first, N, T, B, D, width, BLOCK: tl.constexpr
):
    row, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, b, within = first + row // B, row % B, j < D
    not_first, not_last = j < tl.where(n > 0, D, 0), j < tl.where(n + 1 < N, D, 0)
    before_the_end = j < tl.where(d - n + 1 < T, D, 0)
    cell = ((d * N + n) * B + b).to(tl.int64)
    same, beside = cell + N * B, cell + (N + 1) * B  # the same object's next frame; this frame of the next object
    g = tl.load(grad_s + ((n * T + d - n) * B + b).to(tl.int64) * D + j, within, other=0.0)
    g += tl.load(grad_inputs + same * width + j, before_the_end, other=0.0)
    g += tl.load(grad_inputs + beside * width + D + j, not_last, other=0.0)
    kept = 1 - tl.load(gates + beside * 2 * D + j, not_last, other=1.0)
    g += kept * tl.load(grad_states + beside * D + j, not_last, other=0.0)
    gate = cell * 2 * D + j
    beta, s_hat = tl.load(gates + gate, within, other=0.0), tl.load(gates + gate + D, within, other=0.0)
    before = tl.load(inputs + cell * width + D + j, not_first, other=0.0)
    tl.store(grad_states + cell * D + j, g, within)
    tl.store(grad_gates + gate, g * (s_hat - before) * beta * (1 - beta), within)
    tl.store(grad_gates + gate + D, g * beta * (1 - s_hat * s_hat), within)


def _diagonals(N: int, T: int) -> list[tuple[int, int, int]]:
    """Returns (d, first, end) for the diagonals d = t + n: objects first, ..., end - 1 have a cell on each."""
    return [(d, max(0, d - T + 1), min(N - 1, d) + 1) for d in range(T + N - 1)]


class FusedRecurrence(torch.autograd.Function):
    """The function `recurrence._Recurrence`, for float32 on CUDA.

    Cells are stored by diagonal, that of s_t^n at [d, n] with d = t + n, and have a row for each sequence. The inputs
    of a cell are [s_{t-1}^n, s_t^{n-1}], or s_{t-1}^n alone if there is only one object.
    """

    @staticmethod
    def forward(ctx: Any, from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
        (T, B, _), (N, _, D) = from_image.shape, s_0.shape
        W = W if N > 1 else W[:, :D]
        width = W.shape[1]
        inputs, gates = s_0.new_zeros(T + N, N, B, width), s_0.new_empty(T + N - 1, N, B, 2 * D)
        states = s_0.new_empty(N, T, B, D)
        for n in range(N):
            inputs[n, n, :, :D] = s_0[n]
            gates[n : n + T, n] = from_image
        to_gates = W.mT.contiguous()
        for d, first, end in _diagonals(N, T):
            arguments = gates[d, first:end].flatten(0, 1)
            torch.addmm(arguments, inputs[d, first:end].flatten(0, 1), to_gates, out=arguments)
            _launch(_forward, (end - first) * B, gates, inputs, states, d, first, N, T, B, D, width)
        ctx.save_for_backward(inputs, gates, W)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        inputs, gates, W = ctx.saved_tensors
        (N, T, B, D), width = grad_s.shape, W.shape[1]
        grad_s, W = grad_s.contiguous(), W.contiguous()
        grad_inputs, grad_gates = torch.empty_like(inputs), torch.zeros_like(gates)  # corners must be 0 in products
        grad_states = gates.new_empty(T + N - 1, N, B, D)
        for d, first, end in reversed(_diagonals(N, T)):
            _launch(
                _backward, (end - first) * B, grad_s, grad_inputs, gates, inputs, grad_states, grad_gates,
                d, first, N, T, B, D, width,
            )  # fmt: skip
            given, to = (x[d, first:end].flatten(0, 1) for x in (grad_gates, grad_inputs))
            torch.mm(given, W, out=to)
        grad_W = W.new_zeros(2 * D, 2 * D)
        torch.mm(grad_gates.view(-1, 2 * D).mT, inputs[:-1].view(-1, width), out=grad_W[:, :width])
        grad_image = sum((grad_gates[n : n + T, n] for n in range(1, N)), grad_gates[:T, 0])
        grad_s_0 = torch.stack([grad_inputs[n, n, :, :D] for n in range(N)])
        return grad_image, grad_s_0, grad_W


def _launch(kernel: Any, n_rows: int, *args: Any) -> None:
    """Runs a kernel over rows of D entries; D is the second to last of ``args``."""
    D = args[-2]
    block = min(BLOCK, triton.next_power_of_2(D))
    launch(kernel, (n_rows, triton.cdiv(D, block)), *args, BLOCK=block)
