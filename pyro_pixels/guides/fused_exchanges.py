"""The exchanges of `untangle` as a single Triton kernel: one program renames the objects of one sequence.

In torch operations each exchange takes some eighty kernels, and as many exchanges are looked for in every sequence as
the one with the most may need. Here a program stops when no exchange gains. Everything is in float64, as there.

Tests compare labels and gains with `untangling.exchange`, on a CPU with Triton's interpreter (tests/test_fused.py).
Imported only where it is used, because Triton comes only with torch for CUDA.
"""

# Kernels are written in Triton's language, whose types are not those of Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from pyro_pixels._fused import launch


@triton.jit
def _coordinate(tracks, n, c, t, T):
    return tl.load(tracks + (n * T + t) * 2 + c, t < T, other=0.0)


@triton.jit
def _block(P, k, i, j, t, T):
    """The part P_k[t, i, u, j] of a precision matrix, for all frames t and u."""
    at = (k * 2 * T + 2 * t[:, None] + i) * 2 * T + 2 * t[None, :] + j
    return tl.load(P + at, (t[:, None] < T) & (t[None, :] < T), other=0.0)


@triton.jit
def _log_add(highest, total, x):
    """Adds exp(x) to a sum in the form (highest, total), whose logarithm is highest + log(total)."""
    higher = tl.maximum(highest, x)
    return higher, total * tl.exp(highest - higher) + tl.exp(x - higher)


@triton.jit
def _exchange(
    tracks, labels, gains, P, mean, log_weight, n_objects, N, T, K, most, cost, least,
    WINDOWS: tl.constexpr, T_: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    tracks += sequence * N * T * 2
    labels += sequence * N * T
    n_present, t = tl.load(n_objects + sequence).to(tl.int32), tl.arange(0, T_)
    first, last = t[:, None], t[None, :]
    move = first * T_ + last
    allowed = (first <= last) & (last < T) & ((first > 0) | (last < T - 1))
    if not WINDOWS:
        allowed = allowed & (last == T - 1)
    lowest = tl.full((T_, T_), float("-inf"), tl.float64)
    total = tl.zeros((), tl.float64)
    found, done = n_present > 1, 0
    while found & (done < most):
        best, best_gain = tl.full((), float("-inf"), tl.float64), tl.zeros((), tl.float64)
        best_i, best_j, best_move = 0, 0, 0
        for i in range(n_present - 1):
            for j in range(i + 1, n_present):
                high_i, sum_i, high_j, sum_j = lowest, tl.zeros_like(lowest), lowest, tl.zeros_like(lowest)
                now_i, now_sum_i = tl.full((), float("-inf"), tl.float64), tl.zeros((), tl.float64)
                now_j, now_sum_j = now_i, now_sum_i
                i_x, i_y = _coordinate(tracks, i, 0, t, T), _coordinate(tracks, i, 1, t, T)
                d_x, d_y = _coordinate(tracks, j, 0, t, T) - i_x, _coordinate(tracks, j, 1, t, T) - i_y
                for k in range(K):
                    weight = tl.load(log_weight + k)
                    e_x = i_x - tl.load(mean + (k * T + t) * 2, t < T, other=0.0)
                    e_y = i_y - tl.load(mean + (k * T + t) * 2 + 1, t < T, other=0.0)
                    xx, xy = _block(P, k, 0, 0, t, T), _block(P, k, 0, 1, t, T)
                    yx, yy = _block(P, k, 1, 0, t, T), _block(P, k, 1, 1, t, T)
                    Pe_x = tl.sum(xx * e_x[None, :] + xy * e_y[None, :], 1)
                    Pe_y = tl.sum(yx * e_x[None, :] + yy * e_y[None, :], 1)
                    Pd_x = tl.sum(xx * d_x[None, :] + xy * d_y[None, :], 1)
                    Pd_y = tl.sum(yx * d_x[None, :] + yy * d_y[None, :], 1)
                    distance_i = tl.sum(e_x * Pe_x + e_y * Pe_y, 0)
                    distance_j = distance_i + tl.sum(2 * (d_x * Pe_x + d_y * Pe_y) + d_x * Pd_x + d_y * Pd_y, 0)
                    both = d_x[:, None] * (xx * d_x[None, :] + xy * d_y[None, :])
                    both += d_y[:, None] * (yx * d_x[None, :] + yy * d_y[None, :])
                    along = tl.cumsum(both, 1)
                    sums = tl.cumsum(along, 0)  # [t, u] over all frames up to t and up to u; symmetric
                    corner = tl.sum(tl.where(first == last, sums, 0.0), 0)
                    corner_before = tl.sum(tl.where(last == first - 1, corner[None, :], 0.0), 1)
                    window = corner[None, :] + corner_before[:, None] - 2 * (sums - along)
                    of_i = d_x * Pe_x + d_y * Pe_y
                    up_to_i, of_d = tl.cumsum(of_i, 0), d_x * Pd_x + d_y * Pd_y
                    up_to_d = tl.cumsum(of_d, 0)
                    along_i = up_to_i[None, :] - (up_to_i - of_i)[:, None]
                    along_j = along_i + up_to_d[None, :] - (up_to_d - of_d)[:, None]  # P e_j = P e_i + P d
                    high_i, sum_i = _log_add(high_i, sum_i, weight - 0.5 * (distance_i + 2 * along_i + window))
                    high_j, sum_j = _log_add(high_j, sum_j, weight - 0.5 * (distance_j - 2 * along_j + window))
                    now_i, now_sum_i = _log_add(now_i, now_sum_i, weight - 0.5 * distance_i)
                    now_j, now_sum_j = _log_add(now_j, now_sum_j, weight - 0.5 * distance_j)
                now = now_i + tl.log(now_sum_i) + now_j + tl.log(now_sum_j)
                gain = high_i + tl.log(sum_i) + high_j + tl.log(sum_j) - now
                score = tl.where(allowed, gain - cost * (last - first + 1).to(tl.float64), float("-inf"))
                highest = tl.max(tl.max(score, 1), 0)
                at = tl.min(tl.min(tl.where(score == highest, move, T_ * T_), 1), 0)
                here = tl.sum(tl.sum(tl.where(move == at, gain, 0.0), 1), 0)
                better = highest > best
                best, best_gain = tl.where(better, highest, best), tl.where(better, here, best_gain)
                best_i, best_j = tl.where(better, i, best_i), tl.where(better, j, best_j)
                best_move = tl.where(better, at, best_move)
        found = best_gain > least
        if found:
            total += best_gain
            inside = (t >= best_move // T_) & (t <= best_move % T_)
            at_i, at_j = best_i * T + t, best_j * T + t
            label_i, label_j = tl.load(labels + at_i, inside, other=0), tl.load(labels + at_j, inside, other=0)
            tl.store(labels + at_i, label_j, inside)
            tl.store(labels + at_j, label_i, inside)
            for c in range(2):
                x_i = tl.load(tracks + 2 * at_i + c, inside, other=0.0)
                x_j = tl.load(tracks + 2 * at_j + c, inside, other=0.0)
                tl.store(tracks + 2 * at_i + c, x_j, inside)
                tl.store(tracks + 2 * at_j + c, x_i, inside)
            tl.debug_barrier()  # the next round reads what other threads have written
        done += 1
    tl.store(gains + sequence, total)


def exchange(moves: Any, a: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Computes `untangling.exchange` for float32 on CUDA."""
    B, N, T = labels.shape
    tracks, labels = a.to(moves.P.dtype, memory_format=torch.contiguous_format, copy=True), labels.contiguous()
    gains, T_ = moves.P.new_zeros(B), triton.next_power_of_2(T)
    if B:
        launch(
            _exchange, (B,), tracks, labels, gains, moves.P.contiguous(), moves.mean.contiguous(), moves.log_weight,
            moves.n_objects.contiguous(), N, T, len(moves.mean), most, moves.cost, moves.least,
            WINDOWS=moves.windows, T_=T_, num_warps=8 if T_ <= 32 else 16,
        )  # fmt: skip
    return labels, gains
