"""The recursion of Eq (8) over time and objects, computed along diagonals, with a hand-written gradient.

s_t^n depends only on s_{t-1}^n and s_t^{n-1}, so all cells with equal t + n are computed at once, in T + N - 1 steps
instead of T N. States are stored by diagonal, s_t^n at `H[d + 1, n + 1]` with d = t + n (t, n counted from 0), so that
the cells of a step and their inputs are contiguous rows. The gradient of the weights is one product over all cells at
the end instead of one per step. The first object has none before it, and no product is spent on it.
tests/test_guides.py compares states and gradients with the literal double loop.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recur(from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
    """Computes the states of Eq (8).

    Args:
        from_image: (T, B, 2 D), the contributions of images and biases to the arguments of sigm and tanh.
        s_0: (N, B, D), the states before the first frame.
        W: (2 D, 2 D), the columns of [W^beta; W^s] that act on [s_{t-1}^n, s_t^{n-1}].

    Returns:
        The states s (N, T, B, D).
    """
    return _Recurrence.apply(from_image, s_0, W)  # type: ignore[no-any-return]


def recur_reference(from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
    """What `recur` computes, cell by cell as Eq (8) has it, its gradient torch's."""
    (T, _, _), (N, _, D) = from_image.shape, s_0.shape
    states, nobody = [], torch.zeros_like(s_0[0])
    for n in range(N):
        s, row = s_0[n], []
        for t in range(T):
            before = states[n - 1][t] if n > 0 else nobody
            beta, s_hat = (from_image[t] + torch.cat([s, before], -1) @ W.mT).split(D, -1)
            s = torch.lerp(before, s_hat.tanh(), beta.sigmoid())
            row.append(s)
        states.append(row)
    return torch.stack([torch.stack(row) for row in states])


def _diagonals(N: int, T: int, B: int) -> Iterator[tuple[int, slice, slice | None]]:
    """Yields d, the rows of its cells, and the rows of its cells with n > 0, if there are any, for every diagonal."""
    for d in range(T + N - 1):
        first, last = max(0, d - T + 1), min(N - 1, d) + 1
        yield d, slice(first * B, last * B), slice(max(1, first) * B, last * B) if last > 1 else None


def _add_product(to: Tensor, x: Tensor, W: Tensor) -> None:
    """Computes to += x W in place; torch's counter of operations does not know ``to.addmm_``."""
    torch.addmm(to, x, W, out=to)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
        (T, B, _), (N, _, D) = from_image.shape, s_0.shape
        H = s_0.new_zeros(T + N, N + 1, B, D)  # H[:, 0] = s_t^0 = 0
        gates = s_0.new_empty(T + N - 1, N, B, 2 * D)  # (beta, s_hat) of every cell; the corners are not used
        for n in range(N):
            H[: n + 1, n + 1] = s_0[n]
            gates[n : n + T, n] = from_image
        W_time, W_object = (part.mT.contiguous() for part in W.split(D, 1))
        states, before = (part.flatten(1, 2).unbind() for part in (H[:, 1:], H[:, :-1]))
        for (d, cells, later), gate in zip(_diagonals(N, T, B), gates.flatten(1, 2).unbind()):
            if later is not None:
                _add_product(gate[later], before[d][later], W_object)
            now, beside = gate[cells], before[d][cells]
            _add_product(now, states[d][cells], W_time)
            beta, s_hat = now.split(D, 1)
            torch.lerp(beside, s_hat.tanh_(), beta.sigmoid_(), out=states[d + 1][cells])
        ctx.save_for_backward(H, gates, W)
        return torch.stack([H[n + 1 : n + 1 + T, n + 1] for n in range(N)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        H, gates, W = ctx.saved_tensors
        N, T, B, D = grad_s.shape
        G = torch.zeros_like(H)  # gradient of H
        for n in range(N):
            G[n + 1 : n + 1 + T, n + 1] = grad_s[n]
        W_time, W_object = (part.contiguous() for part in W.split(D, 1))
        # ds / d(arguments of sigm and tanh), and 1 - beta = ds_t^n / ds_t^{n-1} directly, of every cell.
        beta, s_hat = gates.chunk(2, -1)
        kept, slopes = 1 - beta, gates.new_empty(*beta.shape[:-1], 2, D)
        torch.mul((s_hat - H[:-1, :-1]).mul_(beta), kept, out=slopes[..., 0, :])
        torch.mul(1 - s_hat.square(), beta, out=slopes[..., 1, :])
        grad_gates = torch.empty_like(slopes)
        for n in range(N):
            grad_gates[:n, n], grad_gates[n + T :, n] = 0.0, 0.0
        states, before = (part.flatten(1, 2).unbind() for part in (G[:, 1:], G[:, :-1]))
        by_diagonal = zip(*(x.flatten(1, 2).unbind() for x in (slopes, kept, grad_gates)))
        for (d, cells, later), (slope, keep, grad_gate) in reversed(list(zip(_diagonals(N, T, B), by_diagonal))):
            g, now = states[d + 1], grad_gate[cells]
            torch.mul(g[cells].unsqueeze(1), slope[cells], out=now)
            _add_product(states[d][cells], now.flatten(1), W_time)
            if later is not None:
                beside = before[d][later].addcmul_(g[later], keep[later])
                _add_product(beside, grad_gate[later].flatten(1), W_object)
        grad_gates = grad_gates.flatten(-2)
        grad_W_time = grad_gates.view(-1, 2 * D).mT @ H[:-1, 1:].reshape(-1, D)
        grad_W_object = grad_gates[:, 1:].reshape(-1, 2 * D).mT @ H[:-1, 1:-1].reshape(-1, D)
        grad_image = sum((grad_gates[n : n + T, n] for n in range(1, N)), grad_gates[:T, 0])
        grad_s_0 = torch.stack([G[: n + 1, n + 1].sum(0) for n in range(N)])
        return grad_image, grad_s_0, torch.cat([grad_W_time, grad_W_object], 1)
