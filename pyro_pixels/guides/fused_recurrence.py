"""The recursion of Eq (8) for CUDA with two Triton kernels per diagonal: a matrix product and everything else.

`recurrence` does the same in plain torch operations. There a diagonal takes two products, one for the input from the
previous frame and one for the input from the previous object, each followed by a sum over the parts it was split into,
and three elementwise kernels forward and two backward. On a GPU the number of kernels determines the time. Here the two
inputs of a cell are stored side by side, so that one product serves both. It is split along the inputs, to occupy the
whole device, and the kernel that computes a state adds up its parts and writes the state wherever it is read.

If torch may use TF32 for float32 matrices (`torch.set_float32_matmul_precision`), products have operands in half
precision and sums in float32. Half precision has the 10 bits of TF32 in half the memory, which limits the speed. It has
fewer exponents: states lie within [-1, 1], weights must be below 65,504, and gradients are scaled by a power of two for
every cell and sequence.
Otherwise products are torch's, in float32.

Tests compare states and gradients with `recurrence.recur_reference`, on a CPU with Triton's interpreter
(tests/test_fused.py). Imported only where it is used, because Triton comes only with torch for CUDA.
"""

# Kernels are written in Triton's language, whose types are not those of Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from pyro_pixels._derivatives import gradients
from pyro_pixels._fused import launch, tf32_allowed
from pyro_pixels.guides.literal_recurrence import recur_reference

ROWS, COLUMNS, INPUTS = 64, 64, 64  # the tile of a product in one Triton program
PARTS = 4  # of a product, along its inputs


@triton.jit(do_not_specialize=["n_rows"])
def _product(
    x, W, parts, n_rows, width, stride_out, stride_in, x_stride, part_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """parts[p] = x[:, those of part p] W[those of part p], for one tile of rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part, there = tl.program_id(2), row[:, None] < n_rows
    i = part * width + tl.arange(0, INPUTS)
    inputs, weights = (
        x + row[:, None] * x_stride + i[None, :],
        W + i[:, None] * stride_in + column[None, :] * stride_out,
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, width, INPUTS):
        total = tl.dot(tl.load(inputs, there, other=0.0), tl.load(weights), total)
        inputs += INPUTS
        weights += INPUTS * stride_in
    tl.store(parts + part * part_stride + row[:, None] * row_stride + column[None, :], total, there)


@triton.jit
def _sum_of_parts(parts, PARTS: tl.constexpr, part_stride, at, there):
    total = tl.load(parts + at, there, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + p * part_stride + at, there, other=0.0)
    return total


@triton.jit(do_not_specialize=["d", "first"])
def _forward(
    parts, from_image, gates, inputs, states, d, first, N, T, B, D, width, gate_width,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, j = first * B + tl.program_id(0), tl.arange(0, BLOCK)
    n, b = row // B, row % B
    t, within = d - n, j < D
    cell = ((d * N + n) * B + b).to(tl.int64)
    part_stride, at = N * B * gate_width, row * gate_width + j
    image = from_image + (t * B + b).to(tl.int64) * 2 * D + j
    beta = tl.load(image, within, other=0.0) + _sum_of_parts(parts, PARTS, part_stride, at, within)
    s_hat = tl.load(image + D, within, other=0.0) + _sum_of_parts(parts, PARTS, part_stride, at + D, within)
    beta, s_hat = tl.sigmoid(beta), 2 * tl.sigmoid(2 * s_hat) - 1  # tanh
    state = states + ((n * T + t) * B + b).to(tl.int64) * D + j
    before = tl.load(state - tl.cast(T, tl.int64) * B * D, j < tl.where(n > 0, D, 0), other=0.0)
    s = before + beta * (s_hat - before)
    tl.store(gates + cell * 2 * D + j, beta, within)
    tl.store(gates + cell * 2 * D + D + j, s_hat, within)
    tl.store(state, s, within)
    after = inputs + (cell + N * B) * width + j
    tl.store(after, s.to(inputs.dtype.element_ty), within)
    tl.store(after + B * width + D, s.to(inputs.dtype.element_ty), j < tl.where(n + 1 < N, D, 0))


@triton.jit(do_not_specialize=["d", "first"])
def _backward(
    parts, scales, grad_s, gates, states, grad_states, grad_gates, given, d, first, N, T, B, D, width, gate_width,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row, j = first * B + tl.program_id(0), tl.arange(0, BLOCK)
    n, b = row // B, row % B
    t, within = d - n, j < D
    not_last, before_the_end = n + 1 < N, t + 1 < T
    later, beside = j < tl.where(before_the_end, D, 0), j < tl.where(not_last, D, 0)
    cell = ((d * N + n) * B + b).to(tl.int64)
    next_object = cell + (N + 1) * B  # the cell of this frame and the next object
    part_stride, at = N * B * width, row * width + j
    state = ((n * T + t) * B + b).to(tl.int64) * D + j
    gate = cell * 2 * D + j
    g = tl.load(grad_s + state, within, other=0.0)
    beta, s_hat = tl.load(gates + gate, within, other=0.0), tl.load(gates + gate + D, within, other=0.0)
    before = tl.load(states + state - tl.cast(T, tl.int64) * B * D, j < tl.where(n > 0, D, 0), other=0.0)
    beta_beside = tl.load(gates + next_object * 2 * D + j, beside, other=0.0)
    g_beside = tl.load(grad_states + next_object * D + j, beside, other=0.0)
    from_later = _sum_of_parts(parts, PARTS, part_stride, at, later)
    from_beside = _sum_of_parts(parts, PARTS, part_stride, at + B * width + D, beside)
    if SCALED:
        from_later *= tl.load(scales + row, before_the_end, other=0.0)
        from_beside *= tl.load(scales + row + B, not_last, other=0.0)
    g += from_later + from_beside + (1 - beta_beside) * g_beside
    grad_beta, grad_s_hat = g * (s_hat - before) * beta * (1 - beta), g * beta * (1 - s_hat * s_hat)
    tl.store(grad_states + cell * D + j, g, within)
    tl.store(grad_gates + gate, grad_beta, within)
    tl.store(grad_gates + gate + D, grad_s_hat, within)
    if SCALED:  # to at most 1, without rounding
        largest = tl.maximum(tl.max(tl.abs(grad_beta), 0), tl.max(tl.abs(grad_s_hat), 0))
        scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1e-30))))
        tl.store(scales + row, scale)
        to = given + row * gate_width + j
        tl.store(to, (grad_beta / scale).to(given.dtype.element_ty), within)
        tl.store(to + D, (grad_s_hat / scale).to(given.dtype.element_ty), within)


def _diagonals(N: int, T: int) -> list[tuple[int, int, int]]:
    """Returns (d, first, end) for the diagonals d = t + n: objects first, ..., end - 1 have a cell on each."""
    return [(d, max(0, d - T + 1), min(N - 1, d) + 1) for d in range(T + N - 1)]


def _block(D: int) -> dict[str, int]:
    """Returns launch options for programs that treat one row of D entries each."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 64))}


class _Products:
    """Products of rows with W or its transpose, as `PARTS` sums or as a single one.

    Args:
        W: (2 D, width), the recurrent weights.
        rows: N B, the largest number of rows of a product.
        half: whether operands are in half precision.
    """

    def __init__(self, W: Tensor, rows: int, *, half: bool) -> None:
        self.half, self._W, self._rows = half, W, rows
        self.out, self.width = ((_padded(n) if half else n) for n in W.shape)
        self.dtype = torch.float16 if half else W.dtype
        if half:
            to_pad = (0, self.width - W.shape[1], 0, self.out - W.shape[0])
            self._W = F.pad(W.half(), to_pad) if any(to_pad) else W.half()

    def parts(self, *, transposed: bool) -> Tensor:
        """Returns memory (parts, rows, columns) for products with W' or, ``transposed``, with W."""
        columns, inputs = (self.width, self.out) if transposed else (self.out, self.width)
        return self._W.new_empty(_parts(inputs) if self.half else 1, self._rows, columns, dtype=torch.float32)

    def multiply(self, x: Tensor, parts: Tensor, first: int, *, transposed: bool) -> None:
        """Writes x W', or x W if ``transposed``, to the rows of ``parts`` from ``first`` on."""
        W = self._W if transposed else self._W.mT
        if not self.half:
            torch.mm(x, W, out=parts[0, first : first + len(x)])
            return
        inputs, columns = W.shape
        grid = triton.cdiv(len(x), ROWS), columns // COLUMNS, len(parts)
        launch(
            _product, grid, x, W, parts[:, first:], len(x), inputs // len(parts), W.stride(1), W.stride(0),
            x.stride(0), parts.stride(0), parts.stride(1), ROWS=ROWS, COLUMNS=COLUMNS, INPUTS=INPUTS, num_stages=4,
        )  # fmt: skip


def _parts(inputs: int) -> int:
    """Returns the number of parts of a product with padded inputs; a power of two that divides them evenly."""
    parts = PARTS
    while inputs % (parts * INPUTS):
        parts //= 2
    return parts


def _padded(n: int) -> int:
    return -(-n // INPUTS) * INPUTS


class FusedRecurrence(torch.autograd.Function):
    """The function `recurrence._Recurrence`, for float32 on CUDA.

    Cells are stored by diagonal, that of s_t^n at [d, n] with d = t + n, and have a row for each sequence. The inputs
    of a cell are [s_{t-1}^n, s_t^{n-1}], or s_{t-1}^n alone if there is only one object.
    """

    @staticmethod
    def forward(ctx: Any, from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
        (T, B, _), (N, _, D) = from_image.shape, s_0.shape
        arguments = from_image, s_0, W
        from_image = from_image.contiguous()
        products = _Products(W if N > 1 else W[:, :D], N * B, half=tf32_allowed())
        inputs = s_0.new_zeros(T + N, N, B, products.width, dtype=products.dtype)
        gates, states = s_0.new_empty(T + N - 1, N, B, 2 * D), s_0.new_empty(N, T, B, D)
        for n in range(N):
            inputs[n, n, :, :D] = s_0[n]
        parts = products.parts(transposed=False)
        for d, first, end in _diagonals(N, T):
            products.multiply(inputs[d, first:end].flatten(0, 1), parts, first * B, transposed=False)
            launch(
                _forward, ((end - first) * B,), parts, from_image, gates, inputs, states, d, first, N, T, B, D,
                products.width, products.out, PARTS=len(parts), **_block(D),
            )  # fmt: skip
        ctx.products = products
        ctx.save_for_backward(inputs, gates, states, *arguments)
        return states

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, gates, states, *arguments = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients(recur_reference, arguments, [grad_s])
        products, (N, T, B, D) = ctx.products, grad_s.shape
        width = 2 * D if N > 1 else D
        grad_s = grad_s.contiguous()
        grad_gates = torch.zeros_like(gates)  # corners must be 0 in products
        grad_states, grad_s_0 = gates.new_empty(T + N - 1, N, B, D), gates.new_empty(N, B, D)
        scales, parts = gates.new_ones(N * B), products.parts(transposed=True)
        given = gates.new_zeros(N * B, products.out, dtype=products.dtype)
        for d, first, end in reversed(_diagonals(N, T)):
            launch(
                _backward, ((end - first) * B,), parts, scales, grad_s, gates, states, grad_states, grad_gates, given,
                d, first, N, T, B, D, products.width, products.out,
                PARTS=len(parts), SCALED=products.half, **_block(D),
            )  # fmt: skip
            rows = slice(first * B, end * B)
            x = given[rows] if products.half else grad_gates[d, first:end].flatten(0, 1)
            products.multiply(x, parts, first * B, transposed=True)
            if d < N:  # the first frame of object d
                own = slice(d * B, (d + 1) * B)
                torch.mul(parts[:, own, :D].sum(0), scales[own, None], out=grad_s_0[d])
        grad_W = gates.new_zeros(2 * D, 2 * D)
        by_cell = inputs[:-1].view(-1, products.width)[:, :width].to(gates.dtype)
        torch.mm(grad_gates.view(-1, 2 * D).mT, by_cell, out=grad_W[:, :width])
        grad_image = sum((grad_gates[n : n + T, n] for n in range(1, N)), grad_gates[:T, 0])
        return grad_image, grad_s_0, grad_W
