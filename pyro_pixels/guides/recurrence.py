"""The recursion of Eq (8) over time and objects, computed along diagonals, with a hand-written gradient.

s_t^n depends only on s_{t-1}^n and s_t^{n-1}, so all cells with equal t + n are computed at once, in T + N - 1 steps
instead of T N. States are stored by diagonal, s_t^n at `H[d + 1, n + 1]` with d = t + n (t, n counted from 0), so that
the cells of a step and their inputs are contiguous rows. The gradient of the weights is one product over all cells at
the end instead of one per step. The first object has no object before it, which saves a product.
tests/test_guides.py compares states and gradients with the literal double loop.

On CUDA a diagonal is two Triton kernels (`_fused`, `fused_recurrence`).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_pixels._derivatives import gradients
from pyro_pixels._fused import choose, matmul_precision, normal
from pyro_pixels.guides.literal_recurrence import recur_reference


def recur(from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
    """Computes the states of Eq (8).

    Args:
        from_image: (T, B, 2 D), the contributions of images and biases to the arguments of sigm and tanh.
        s_0: (N, B, D), the states before the first frame.
        W: (2 D, 2 D), the columns of [W^beta; W^s] that act on [s_{t-1}^n, s_t^{n-1}].

    Returns:
        The states s (N, T, B, D).
    """
    return choose(from_image, _Recurrence, _fused, largest_difference).apply(from_image, s_0, W)  # type: ignore[no-any-return]


def _cells(x: Tensor, T: int, after: int = 0) -> list[Tensor]:
    """Selects the rows of x (T + N - 1, N, B, ...) that belong to the cells with n >= ``after`` of each diagonal.

    Returns:
        For each diagonal d, (cells B, ...), those with n = max(after, d - T + 1), ..., min(N - 1, d); mostly all n.
    """
    _, N, B, *_ = x.shape
    found = []
    for d, rows in enumerate(x[:, after:].flatten(1, 2).unbind()):
        first, last = max(0, d - T + 1 - after), min(N, d + 1) - after
        found.append(rows if last - first == N - after else rows[first * B : max(first, last) * B])
    return found


def _fused() -> Any:
    from pyro_pixels.guides import fused_recurrence  # imports Triton

    return fused_recurrence.FusedRecurrence


def largest_difference(plain: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of states and gradients, of order 1, between a function and the plain one.

    It is that in float32, or a hundredth of that with products in TF32, if this is larger.
    """
    differences = []
    precisions: tuple[Literal["highest", "high"], ...] = ("highest", "high")
    for precision in precisions:
        weight = 1.0 if precision == "highest" else 0.01
        for N, T, B, D in ((1, 4, 2, 70), (3, 4, 2, 70), (2, 3, 1, 1040), (4, 2, 16, 64), (2, 3, 40, 300)):
            with torch.enable_grad(), matmul_precision(precision):
                generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
                shapes = (T, B, 2 * D), (N, B, D), (2 * D, 2 * D)
                drawn = [normal(generator, *shape) / shape[-1] ** 0.5 for shape in shapes]
                results = []
                for each in (plain, function):
                    inputs = [x.to(device).requires_grad_() for x in drawn]
                    s = each.apply(*inputs)
                    results.append((s, *torch.autograd.grad(s.square().sum(), inputs)))
            differences += [weight * (found - wanted).detach().abs().max() for wanted, found in zip(*results)]
    return float(torch.stack(differences).max())  # NaN if any is


def _add_product(to: Tensor, x: Tensor, W: Tensor) -> None:
    """Computes to += x W in place; torch's FLOP counter does not know ``to.addmm_``."""
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
        beside = H[:-1, :-1]
        every = (_cells(x, T) for x in (gates, H[:-1, 1:], beside, H[1:, 1:]))
        later = (_cells(x, T, 1) for x in (gates, beside))
        for now, state, before, to, now_later, before_later in zip(*every, *later):
            if len(now_later):
                _add_product(now_later, before_later, W_object)
            _add_product(now, state, W_time)
            beta, s_hat = now.chunk(2, 1)
            torch.lerp(before, s_hat.tanh_(), beta.sigmoid_(), out=to)
        ctx.save_for_backward(H, gates, from_image, s_0, W)
        return torch.stack([H[n + 1 : n + 1 + T, n + 1] for n in range(N)])

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        H, gates, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients(recur_reference, inputs, [grad_s])
        W = inputs[-1]
        N, T, _, D = grad_s.shape
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
        flat = grad_gates.flatten(-2)
        every = (_cells(x, T) for x in (G[1:, 1:], slopes, grad_gates, flat, G[:-1, 1:]))
        later = (_cells(x, T, 1) for x in (G[1:, 1:], kept, G[:-1, :-1], flat))
        for g, slope, grad_gate, now, to, g_later, keep, to_later, now_later in reversed(list(zip(*every, *later))):
            torch.mul(g.unsqueeze(1), slope, out=grad_gate)
            _add_product(to, now, W_time)
            if len(now_later):
                to_later.addcmul_(g_later, keep)
                _add_product(to_later, now_later, W_object)
        grad_W_time = flat.view(-1, 2 * D).mT @ H[:-1, 1:].reshape(-1, D)
        grad_W_object = flat[:, 1:].reshape(-1, 2 * D).mT @ H[:-1, 1:-1].reshape(-1, D)
        grad_image = sum((flat[n : n + T, n] for n in range(1, N)), flat[:T, 0])
        grad_s_0 = torch.stack([G[: n + 1, n + 1].sum(0) for n in range(N)])
        return grad_image, grad_s_0, torch.cat([grad_W_time, grad_W_object], 1)
