"""The recursion of Eq (8) over time and objects, along its diagonals, with its gradient by hand.

s_t^n needs only s_{t-1}^n and s_t^{n-1}, so all cells with equal t + n can be computed at once: T + N - 1 steps
instead of T N. States are kept by diagonal, `H[d + 1, n + 1]` being s_t^n with d = t + n (t, n counted from 0), so that
the cells of a step, and what they read, are slices; and the gradient of the weights is one product over all cells
at the end instead of one a step. tests/test_guides.py compares both with the literal double loop.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recur(from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
    """The states of Eq (8).

    Args:
        from_image: (T, B, 2 D), what the image and the biases contribute to the mask's and the contribution's
            arguments at every t; frames in REVERSE order, so that along a diagonal they lie as the objects do.
        s_0: (N, B, D), the states before the first frame.
        W: (2 D, 2 D), the columns of [W^beta; W^s] that act on [s_{t-1}^n, s_t^{n-1}].

    Returns:
        s (N, T, B, D).
    """
    return _Recurrence.apply(from_image, s_0, W)  # type: ignore[no-any-return]


def _diagonals(N: int, T: int) -> list[tuple[int, int, int]]:
    """(d, first n, last n + 1) of every diagonal."""
    return [(d, max(0, d - T + 1), min(N - 1, d) + 1) for d in range(T + N - 1)]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
        (T, B, _), (N, _, D) = from_image.shape, s_0.shape
        H = s_0.new_zeros(T + N, N + 1, B, D)  # H[:, 0] = s_t^0 = 0
        inputs = s_0.new_zeros(T + N - 1, N, B, 2 * D)  # [s_{t-1}^n, s_t^{n-1}] of every cell
        gates = s_0.new_empty(T + N - 1, N, B, 2 * D)  # (beta, s_hat) of every cell
        for n in range(N):
            H[: n + 1, n + 1] = s_0[n]
        W_T = W.mT.contiguous()
        for d, first, last in _diagonals(N, T):
            s_object = H[d, first:last]
            x = torch.cat([H[d, first + 1 : last + 1], s_object], -1, out=inputs[d, first:last])
            gate = gates[d, first:last]
            image = from_image[T - 1 - d + first : T - 1 - d + last].reshape(-1, 2 * D)
            torch.addmm(image, x.view(-1, 2 * D), W_T, out=gate.view(-1, 2 * D))
            beta, s_hat = gate[..., :D].sigmoid_(), gate[..., D:].tanh_()
            torch.lerp(s_object, s_hat, beta, out=H[d + 1, first + 1 : last + 1])
        ctx.save_for_backward(inputs, gates, W)
        n, t = torch.arange(N, device=H.device)[:, None], torch.arange(T, device=H.device)
        return H[t + n + 1, n + 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        inputs, gates, W = ctx.saved_tensors
        N, T, B, D = grad_s.shape
        G = grad_s.new_zeros(T + N, N + 1, B, D)  # gradient of H
        n, t = torch.arange(N, device=G.device)[:, None], torch.arange(T, device=G.device)
        G[t + n + 1, n + 1] = grad_s
        grad_gates = torch.zeros_like(gates)  # of the arguments of sigm and tanh
        for d, first, last in reversed(_diagonals(N, T)):
            g, gate, grad_gate = G[d + 1, first + 1 : last + 1], gates[d, first:last], grad_gates[d, first:last]
            s_object, beta, s_hat = inputs[d, first:last, :, D:], gate[..., :D], gate[..., D:]
            g_hat = g * beta
            kept = g - g_hat
            torch.mul(kept * beta, s_hat - s_object, out=grad_gate[..., :D])
            torch.addcmul(g_hat, g_hat * s_hat, s_hat, value=-1, out=grad_gate[..., D:])
            g_time, g_object = (grad_gate.view(-1, 2 * D) @ W).view_as(gate).chunk(2, -1)
            G[d, first + 1 : last + 1] += g_time
            G[d, first:last] += g_object.add_(kept)
        grad_W = grad_gates.view(-1, 2 * D).mT @ inputs.view(-1, 2 * D)
        grad_image = grad_gates[t + n, n].sum(0).flip(0)
        grad_s_0 = torch.stack([G[: n + 1, n + 1].sum(0) for n in range(N)])
        return grad_image, grad_s_0, grad_W
