"""`following.follow` as a single Triton kernel: one program follows the objects of one sequence along one order.

In torch operations a frame takes some ten kernels, one after the other, and a sequence of 30 frames hundreds. Here the
innovations of all frames before stay in registers. Nothing is differentiated, as associations have no gradient.

Tests compare measurements with `following.follow_reference`, on a CPU with Triton's interpreter
(tests/test_fused.py). Imported only where it is used, because Triton comes only with torch for CUDA.
"""

# Kernels are written in Triton's language, whose types are not those of Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import math

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from pyro_pixels._fused import launch
from pyro_pixels.guides.association import LEAST_MASS, Pixels, Tracks
from pyro_pixels.guides.forecasts import DETECTION_ROUNDS, DETECTION_WIDTH, Forecasts

LOG_2_PI = tl.constexpr(math.log(2 * math.pi))


@triton.jit
def _forecast(mean, gain, e, row, column, T, j):
    """A column of `Forecasts` given the innovations e."""
    of_column = tl.load(gain + (row * 2 * T + j) * 4 + column, j < 2 * T, other=0.0)
    return tl.load(mean + row * 4 + column) + tl.sum(e * of_column[None, :], 1)


@triton.jit
def _log_clutter(clutter, P_xx, P_xy, P_yy, x, y):
    """`Tracks.log_clutter`; -inf without clutter."""
    left_out = 0.5 * (P_xx * x * x + 2 * P_xy * x * y + P_yy * y * y)
    return tl.log(clutter) + left_out - 0.5 * tl.log(P_xx * P_yy - P_xy * P_xy) + LOG_2_PI


@triton.jit
def _share(log_r, background, v, x, y):
    """`share`: the sums over the pixels assigned to each object of their columns, rows and masses."""
    highest = tl.maximum(tl.max(log_r, 0), background)
    r = tl.exp(log_r - highest[None, :])
    r = r * (v / (tl.sum(r, 0) + tl.exp(background - highest)))[None, :]
    return tl.sum(r * x[None, :], 1), tl.sum(r * y[None, :], 1), tl.sum(r, 1)


@triton.jit
def _log_density(c_x, c_y, slope_x, slope_y, penalty, x, y):
    """`log_density` of pixels around blobs."""
    constant = penalty - 0.5 * (c_x * slope_x + c_y * slope_y)
    return constant[:, None] + slope_x[:, None] * x[None, :] + slope_y[:, None] * y[None, :]


@triton.jit(do_not_specialize=["clutter", "widest", "least"])
def _follow(
    mean, gain, precision, blob_precision, v, homogeneous, claim, penalty, orders, measured, clutter, widest, least,
    T, B, S, N, k, ROUNDS: tl.constexpr, N_: tl.constexpr, T_: tl.constexpr, K_: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0) // B, tl.program_id(0) % B
    n, j, p = tl.arange(0, N_), tl.arange(0, T_), tl.arange(0, K_)
    # Detect the objects in the first frame.
    start = b * T + tl.load(orders + s * T)
    x = tl.load(homogeneous + start * 3 * k + p, p < k, other=0.0)
    y = tl.load(homogeneous + (start * 3 + 1) * k + p, p < k, other=0.0)
    weight = tl.load(v + start * k + p, p < k, other=0.0)
    absent = tl.load(penalty + b * N + n, n < N, other=float("-inf"))
    claims = claim + ((b * S + s) * N + n[:, None]) * k + p[None, :]
    log_r = tl.load(claims, (n[:, None] < N) & (p[None, :] < k), other=0.0)
    log_r = tl.where(n[:, None] < N, log_r, float("-inf"))
    background = tl.full((K_,), float("-inf"), tl.float32)
    P_xx, P_xy, P_yy = tl.load(blob_precision), tl.load(blob_precision + 1), tl.load(blob_precision + 3)
    for i in range(ROUNDS):
        narrow = i / (ROUNDS - 1)
        width = tl.exp((narrow - 1) * tl.log(widest))
        sum_x, sum_y, mass = _share(log_r, background, weight, x, y)
        mass = tl.maximum(mass, least)
        c_x, c_y = sum_x / mass, sum_y / mass
        slope_x, slope_y = width * (P_xx * c_x + P_xy * c_y), width * (P_xy * c_x + P_yy * c_y)
        log_r = _log_density(c_x, c_y, slope_x, slope_y, absent, x, y)
        given = _log_clutter(clutter, width * P_xx, width * P_xy, width * P_yy, x, y)
        background = tl.where(narrow >= 0.5, given, background)
    # Follow them along the order.
    e = tl.zeros((N_, T_), tl.float32)  # innovations
    for i in range(T):
        row = i * S + s
        c_x, c_y = _forecast(mean, gain, e, row, 0, T, j), _forecast(mean, gain, e, row, 1, T, j)
        slope_x, slope_y = _forecast(mean, gain, e, row, 2, T, j), _forecast(mean, gain, e, row, 3, T, j)
        frame = b * T + tl.load(orders + s * T + i)
        x = tl.load(homogeneous + frame * 3 * k + p, p < k, other=0.0)
        y = tl.load(homogeneous + (frame * 3 + 1) * k + p, p < k, other=0.0)
        weight = tl.load(v + frame * k + p, p < k, other=0.0)
        P_xx, P_xy = tl.load(precision + row * 4), tl.load(precision + row * 4 + 1)
        P_yy = tl.load(precision + row * 4 + 3)
        around = _log_density(c_x, c_y, slope_x, slope_y, absent, x, y)
        log_r = tl.where(i > 0, around, log_r)
        background = tl.where(i > 0, _log_clutter(clutter, P_xx, P_xy, P_yy, x, y), background)
        sum_x, sum_y, mass = _share(log_r, background, weight, x, y)
        e_x, e_y = (sum_x - mass * c_x) / (1 + mass), (sum_y - mass * c_y) / (1 + mass)
        e = tl.where(j[None, :] == 2 * i, e_x[:, None], e)
        e = tl.where(j[None, :] == 2 * i + 1, e_y[:, None], e)
        to = measured + (frame * 2 * N + n) * S + s
        tl.store(to, c_x + e_x, n < N)
        tl.store(to + N * S, c_y + e_y, n < N)


def follow(
    forecasts: Forecasts, tracks: Tracks, pixels: Pixels, claim: Tensor, penalty: Tensor, orders: Tensor
) -> Tensor:
    """Computes `follow_reference` for float32 on CUDA."""
    (B, S, N, k), T = claim.shape, orders.shape[1]
    measured = claim.new_empty(B, T, 2, N * S)
    tensors = (*forecasts, tracks.blob_precision, pixels.v, pixels.homogeneous, claim, penalty, orders)
    N_, T_, K_ = (triton.next_power_of_2(size) for size in (N, 2 * T, k))
    launch(
        _follow, (S * B,), *(x.contiguous() for x in tensors), measured, float(tracks.clutter),
        DETECTION_WIDTH if tracks.clutter else 1.0, LEAST_MASS, T, B, S, N, k, ROUNDS=DETECTION_ROUNDS,
        N_=N_, T_=T_, K_=K_, num_warps=max(1, min(4, N_ * max(T_, K_) // 1024)),
    )  # fmt: skip
    return measured
