"""The canvas of Eq (1) for CUDA: one Triton kernel draws all objects, and one computes all gradients.

In torch operations each object takes eight kernels forward and twenty backward, nearly all of which do nothing but move
canvases through memory. Here a canvas stays in registers. The gradient draws the objects once more instead of reading
the canvases in between; these are N (N + 1) / 2 simple operations per unit and position.

Tests compare canvases and gradients with `drawing.draw`, on a CPU with Triton's interpreter (tests/test_fused.py).
Imported only where it is used, because Triton comes only with torch for CUDA.
"""

# Kernels are written in Triton's language, whose types are not those of Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from pyro_pixels._derivatives import gradients
from pyro_pixels._fused import launch

ROWS, UNITS = 16, 32  # positions and units of the canvas in one Triton program


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _read(a, present, row, n, N, T, rows):
    """The positions of object n in some frames, and 1 or 0 for whether it is present."""
    sequence = row // T
    at = ((sequence * N + n) * T + row % T).to(tl.int64) * 2
    there = tl.load(present + sequence * N + n, row < rows, other=0.0)
    return tl.load(a + at, row < rows, other=0.0), tl.load(a + at + 1, row < rows, other=0.0), there


@triton.jit
def _weights(W, b, j, within):
    return (
        tl.load(W + 2 * j, within, other=0.0),
        tl.load(W + 2 * j + 1, within, other=0.0),
        tl.load(b + j, within, other=0.0),
    )


@triton.jit
def _linear(a_0, a_1, w_0, w_1, b):
    return a_0[:, None] * w_0[None, :] + a_1[:, None] * w_1[None, :] + b[None, :]


@triton.jit
def _forward(
    a, present, theta, W_alpha, b_alpha, W_x, b_x, canvas, N, T, D, rows, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    within = j < D
    alpha_0, alpha_1, alpha_b = _weights(W_alpha, b_alpha, j, within)
    x_0, x_1, x_b = _weights(W_x, b_x, j, within)
    x = tl.zeros((ROWS, UNITS), tl.float32) + _tanh(tl.load(theta + j, within, other=0.0))[None, :]
    for n in range(N):
        a_0, a_1, there = _read(a, present, row, n, N, T, rows)
        alpha = tl.sigmoid(_linear(a_0, a_1, alpha_0, alpha_1, alpha_b)) * there[:, None]
        x += alpha * (_tanh(_linear(a_0, a_1, x_0, x_1, x_b)) - x)
    tl.store(canvas + row[:, None].to(tl.int64) * D + j[None, :], x, (row[:, None] < rows) & within[None, :])


@triton.jit
def _backward(
    grad_canvas, a, present, theta, W_alpha, b_alpha, W_x, b_x, grad_a, grad_weights, N, T, D, rows,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Writes for each block of units its part of the gradient of a, for each block of rows that of the weights."""
    row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    within = j < D
    alpha_0, alpha_1, alpha_b = _weights(W_alpha, b_alpha, j, within)
    x_0, x_1, x_b = _weights(W_x, b_x, j, within)
    first = _tanh(tl.load(theta + j, within, other=0.0))
    at = row[:, None].to(tl.int64) * D + j[None, :]
    g = tl.load(grad_canvas + at, (row[:, None] < rows) & within[None, :], other=0.0)
    nothing = tl.zeros((ROWS, UNITS), tl.float32)
    of_alpha_0, of_alpha_1, of_alpha_b = nothing, nothing, nothing
    of_x_0, of_x_1, of_x_b = nothing, nothing, nothing
    for done in range(N):
        n = N - 1 - done
        x = nothing + first[None, :]  # the canvas before object n
        for m in range(n):
            a_0, a_1, there = _read(a, present, row, m, N, T, rows)
            alpha = tl.sigmoid(_linear(a_0, a_1, alpha_0, alpha_1, alpha_b)) * there[:, None]
            x += alpha * (_tanh(_linear(a_0, a_1, x_0, x_1, x_b)) - x)
        a_0, a_1, there = _read(a, present, row, n, N, T, rows)
        open_ = tl.sigmoid(_linear(a_0, a_1, alpha_0, alpha_1, alpha_b))
        alpha, x_hat = open_ * there[:, None], _tanh(_linear(a_0, a_1, x_0, x_1, x_b))
        to_alpha = g * (x_hat - x) * alpha * (1 - open_)
        to_x = g * alpha * (1 - x_hat * x_hat)
        g -= g * alpha
        to = grad_a + ((tl.program_id(1).to(tl.int64) * rows + row) * N + n) * 2
        tl.store(to, tl.sum(to_alpha * alpha_0[None, :] + to_x * x_0[None, :], 1), row < rows)
        tl.store(to + 1, tl.sum(to_alpha * alpha_1[None, :] + to_x * x_1[None, :], 1), row < rows)
        of_alpha_0 += to_alpha * a_0[:, None]
        of_alpha_1 += to_alpha * a_1[:, None]
        of_alpha_b += to_alpha
        of_x_0 += to_x * a_0[:, None]
        of_x_1 += to_x * a_1[:, None]
        of_x_b += to_x
    to = grad_weights + (tl.program_id(0).to(tl.int64) * D + j) * 7
    tl.store(to, tl.sum(of_alpha_0, 0), within)
    tl.store(to + 1, tl.sum(of_alpha_1, 0), within)
    tl.store(to + 2, tl.sum(of_alpha_b, 0), within)
    tl.store(to + 3, tl.sum(of_x_0, 0), within)
    tl.store(to + 4, tl.sum(of_x_1, 0), within)
    tl.store(to + 5, tl.sum(of_x_b, 0), within)
    tl.store(to + 6, tl.sum(g, 0) * (1 - first * first), within)


class FusedCanvas(torch.autograd.Function):
    """The function `drawing.draw`, for float32 on CUDA; ``draw`` is the plain one, for second derivatives."""

    @staticmethod
    def forward(ctx: Any, draw: Any, a: Tensor, present: Tensor, *weights: Tensor) -> Tensor:
        ctx.draw = draw
        ctx.save_for_backward(a, present, *weights)
        *batch, N, T, _ = a.shape
        D = len(weights[0])
        a, weights = a.contiguous(), tuple(w.contiguous() for w in weights)
        present = present.expand(*batch, N).to(a.dtype).contiguous()
        canvas = a.new_empty(*batch, T, D)
        rows = canvas.numel() // D
        ctx.sizes = N, T, D, rows
        if rows:
            launch(_forward, _grid(rows, D), a, present, *weights, canvas, *ctx.sizes, ROWS=ROWS, UNITS=UNITS)
        return canvas

    @staticmethod
    def backward(ctx: Any, grad_canvas: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return None, *gradients(ctx.draw, ctx.saved_tensors, [grad_canvas])
        a, present, *weights = (x.contiguous() for x in ctx.saved_tensors)
        N, _, D, rows = ctx.sizes
        present = present.expand(*a.shape[:-2]).to(a.dtype).contiguous()
        by_rows, by_units = grid = _grid(rows, D)
        grad_a, grad_weights = a.new_empty(by_units, rows, N, 2), a.new_empty(by_rows, D, 7)
        if rows:
            arguments = grad_canvas.contiguous(), a, present, *weights, grad_a, grad_weights
            launch(_backward, grid, *arguments, *ctx.sizes, ROWS=ROWS, UNITS=UNITS)
        of_a = grad_a.sum(0).view(*a.shape[:-3], a.shape[-2], N, 2).transpose(-2, -3)
        W_alpha, b_alpha, W_x, b_x, theta = grad_weights.sum(0).split((2, 1, 2, 1, 1), 1)
        return None, of_a, None, theta.flatten(), W_alpha, b_alpha.flatten(), W_x, b_x.flatten()


def _grid(rows: int, D: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(D, UNITS)
