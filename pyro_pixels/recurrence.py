"""The recursion of Eq (8) over time and objects, along its diagonals, with its gradient by hand.

s_t^n needs only s_{t-1}^n and s_t^{n-1}, so all cells with equal t + n can be computed at once: T + N - 1 steps
instead of T N. States are kept by diagonal, `H[d + 1, n + 1]` being s_t^n with d = t + n (t, n counted from 0), so that
the cells of a step, and what they read, are slices; and the gradient of the weights is one product over all cells
at the end instead of one a step. The first object has none before it, and no product is spent on that.
tests/test_guides.py compares both with the literal double loop.
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
        gates = s_0.new_empty(T + N - 1, N, B, 2 * D)  # (beta, s_hat) of every cell
        for n in range(N):
            H[: n + 1, n + 1] = s_0[n]
        W_time, W_object = (columns.mT.contiguous() for columns in W.split(D, 1))
        for d, first, last in _diagonals(N, T):
            s_time, s_object = H[d, first + 1 : last + 1], H[d, first:last]  # s_{t-1}^n, s_t^{n-1}
            gate, later = gates[d, first:last], int(first == 0)  # the first object has none before it
            image = from_image[T - 1 - d + first : T - 1 - d + last].reshape(-1, 2 * D)
            torch.addmm(image, s_time.view(-1, D), W_time, out=gate.view(-1, 2 * D))
            _add_product(gate[later:], s_object[later:], W_object)
            beta, s_hat = gate[..., :D].sigmoid_(), gate[..., D:].tanh_()
            torch.lerp(s_object, s_hat, beta, out=H[d + 1, first + 1 : last + 1])
        ctx.save_for_backward(H, gates, W)
        n, t = torch.arange(N, device=H.device)[:, None], torch.arange(T, device=H.device)
        return H[t + n + 1, n + 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        H, gates, W = ctx.saved_tensors
        N, T, B, D = grad_s.shape
        G = grad_s.new_zeros(T + N, N + 1, B, D)  # gradient of H
        n, t = torch.arange(N, device=G.device)[:, None], torch.arange(T, device=G.device)
        G[t + n + 1, n + 1] = grad_s
        W_time, W_object = (columns.contiguous() for columns in W.split(D, 1))
        grad_gates = torch.zeros_like(gates)  # of the arguments of sigm and tanh
        for d, first, last in reversed(_diagonals(N, T)):
            g, gate, grad_gate = G[d + 1, first + 1 : last + 1], gates[d, first:last], grad_gates[d, first:last]
            s_object, beta, s_hat = H[d, first:last], gate[..., :D], gate[..., D:]
            g_hat = g * beta
            kept = g - g_hat
            torch.mul(kept * beta, s_hat - s_object, out=grad_gate[..., :D])
            torch.addcmul(g_hat, g_hat * s_hat, s_hat, value=-1, out=grad_gate[..., D:])
            later = int(first == 0)
            _add_product(G[d, first + 1 : last + 1], grad_gate, W_time)
            _add_product(G[d, first + later : last].add_(kept[later:]), grad_gate[later:], W_object)
        grad_W_time = grad_gates.view(-1, 2 * D).mT @ H[:-1, 1:].reshape(-1, D)
        grad_W_object = grad_gates[:, 1:].reshape(-1, 2 * D).mT @ H[:-1, 1:-1].reshape(-1, D)
        grad_image = grad_gates[t + n, n].sum(0).flip(0)
        grad_s_0 = torch.stack([G[: n + 1, n + 1].sum(0) for n in range(N)])
        return grad_image, grad_s_0, torch.cat([grad_W_time, grad_W_object], 1)


def _add_product(to: Tensor, x: Tensor, W: Tensor) -> None:
    """to += x W, row by row."""
    rows = to.view(-1, to.shape[-1])
    torch.addmm(rows, x.view(-1, x.shape[-1]), W, out=rows)
