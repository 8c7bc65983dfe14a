"""Exact inference in linear-Gaussian state-space models (Sec 2.1.2, Eq 3), in plain torch.

    h_1 ~ N(mu, Sigma),   h_t = A h_{t-1} + u + N(0, Sigma_H),   a_t = B h_t + N(0, Sigma_A)

Everything is a pure function of an `LGSSM`, batched over the leading shape of ``mu`` and of the data,
differentiable, and exact when time steps are missing, when T = 1, and when ``Sigma_H`` or ``Sigma`` is singular.
Shapes: T time steps, d state dimensions (4: x, y, vx, vy), p observed dimensions (2), ``...`` any batch.

Departure from the paper: the Rauch-Tung-Striebel smoother is computed in its inverse-free (Bryson-Frazier) form. It
has the same result and needs no inverse of the predicted covariance, which is singular or nearly so for the
deterministic motion of Sec 3.1 (Sigma_H = 0).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np  # for broadcast_shapes; torch's imports sympy, which takes longer than the filter
import torch
from torch import Tensor

from pyro_pixels.lgssm.small_matrices import cholesky_solve


class LGSSM(NamedTuple):
    """The parameters of Eq (3) with a Gaussian prior of h_1; for a mixture, mu and Sigma have a batch of K."""

    A: Tensor  # (d, d)
    B: Tensor  # (p, d)
    u: Tensor  # (d,)
    Sigma_H: Tensor  # (d, d), may be singular
    Sigma_A: Tensor  # (p, p), positive definite
    mu: Tensor  # (..., d), mean of h_1
    Sigma: Tensor  # (..., d, d), covariance of h_1, may be singular


class ConstantVelocity(LGSSM):
    """An `LGSSM` whose transition A = I + N has N N = 0, such as that of positions and velocities, so A^j = I + j N.

    The results are those of an `LGSSM`, but the moments of whole paths take fewer operations. N N = 0 is not checked;
    `_replace` of A returns a plain `LGSSM`.
    """

    __slots__ = ()

    def _replace(self, **changes: Any) -> LGSSM:  # type: ignore[override]
        replaced = super()._replace(**changes)
        return LGSSM(*replaced) if "A" in changes else replaced


class Gaussians(NamedTuple):
    """Gaussian marginals of one time step (...) or of a sequence (..., T)."""

    mean: Tensor  # (..., d)
    cov: Tensor  # (..., d, d); may have fewer batch dimensions than the mean, as covariances do not depend on the data


class Filtered(NamedTuple):
    """The moments of h_t given a_{1:t} and given a_{1:t-1}, from the Kalman filter."""

    mean: Tensor  # (..., T, d), E[h_t | a_{1:t}]
    cov: Tensor  # (..., T, d, d)
    predicted_mean: Tensor  # (..., T, d), E[h_t | a_{1:t-1}]
    predicted_cov: Tensor  # (..., T, d, d)
    log_likelihood: Tensor  # (...), log p(a_{1:T}), missing steps integrated out


def kalman_filter(lgssm: LGSSM, a: Tensor, observed: Tensor | None = None) -> Filtered:
    """Returns the filtered and predicted moments of h, and log p(a).

    Args:
        lgssm: the model; the shape of ``mu`` (..., d) broadcasts against the batch of ``a``.
        a: observations (..., T, p); values at missing steps are ignored and may be NaN.
        observed: (..., T) bool, False where a step is missing; by default all are observed.

    Raises:
        ValueError: if ``a`` or ``observed`` has the wrong shape.
    """
    a, observed = check_observations(lgssm, a, observed)
    state = Gaussians(lgssm.mu, lgssm.Sigma)
    log_likelihood = torch.zeros((), dtype=lgssm.A.dtype, device=lgssm.A.device)
    steps = []
    for t in range(a.shape[-2]):
        predicted = predict(lgssm, state) if t > 0 else state
        state, log_density = update(lgssm, predicted, a[..., t, :], observed[..., t])
        log_likelihood = log_likelihood + log_density
        steps.append((*state, *predicted))
    batch = np.broadcast_shapes(state.mean.shape[:-1], a.shape[:-2], observed.shape[:-1])
    moments = [_stack(x, time_dim) for x, time_dim in zip(zip(*steps), (-2, -3, -2, -3))]
    return Filtered(*moments, log_likelihood=log_likelihood.expand(batch))


def predict(lgssm: LGSSM, state: Gaussians) -> Gaussians:
    """Returns the moments of h_{t+1} given those of h_t, mean (..., d) and cov (..., d, d): one prediction step."""
    return Gaussians(state.mean @ lgssm.A.mT + lgssm.u, lgssm.A @ state.cov @ lgssm.A.mT + lgssm.Sigma_H)


def update(lgssm: LGSSM, predicted: Gaussians, a_t: Tensor, observed: Tensor | None = None) -> tuple[Gaussians, Tensor]:
    """Returns the moments of h_t given a_t (..., p), and log p(a_t | a_{1:t-1}) (...): one update step.

    Where ``observed`` (...) is False these are the predicted moments and 0. ``lgssm.Sigma_A`` may have a batch
    (..., p, p).
    """
    m, P = predicted
    e, L, K = _innovation(lgssm, a_t, m, P)
    log_density = _log_normal(e, L)
    if observed is not None:
        w = observed.to(P.dtype)
        K, log_density = w[..., None, None] * K, w * log_density
    I_KB = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - K @ lgssm.B
    cov = I_KB @ P @ I_KB.mT + K @ lgssm.Sigma_A @ K.mT  # Joseph's form stays symmetric and positive semidefinite
    return Gaussians(m + _apply(K, e), cov), log_density


def log_likelihood(lgssm: LGSSM, a: Tensor, observed: Tensor | None = None) -> Tensor:
    """Returns log p(a_{1:T}) (...) in nats, missing steps integrated out; the arguments are `kalman_filter`'s."""
    return kalman_filter(lgssm, a, observed).log_likelihood


def rts_smoother(lgssm: LGSSM, a: Tensor, observed: Tensor | None = None) -> Gaussians:
    """Returns the moments of p(h_t | a_{1:T}) for every t, missing or not; the arguments are `kalman_filter`'s.

    Let e_t and S_t be the innovation and its covariance, and K_t the filter's gain. Backwards in time, from r_T = 0 and
    N_T = 0: r_{t-1} = B' S_t^-1 e_t + (I - K_t B)' A' r_t (likewise N), mean = m_{t|t-1} + P_{t|t-1} r_{t-1},
    cov = P_{t|t-1} - P_{t|t-1} N_{t-1} P_{t|t-1}.
    """
    A, B = lgssm.A, lgssm.B
    a, observed = check_observations(lgssm, a, observed)
    filtered = kalman_filter(lgssm, a, observed)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    r = torch.zeros(A.shape[-1], dtype=A.dtype, device=A.device)
    N = torch.zeros_like(A)
    means, covs = [], []
    for t in reversed(range(a.shape[-2])):
        m, P = filtered.predicted_mean[..., t, :], filtered.predicted_cov[..., t, :, :]
        w = observed[..., t].to(A.dtype)[..., None, None]
        e, L, K = _innovation(lgssm, a[..., t, :], m, P)
        S_inv_B = w * cholesky_solve(B, L)
        J = A @ (identity - w * K @ B)
        r = _apply(S_inv_B.mT, e) + _apply(J.mT, r)
        N = B.mT @ S_inv_B + J.mT @ N @ J
        means.append(m + _apply(P, r))
        covs.append(P - P @ N @ P)
    return Gaussians(_stack(means[::-1], -2), _stack(covs[::-1], -3))


def sample(lgssm: LGSSM, n_steps: int, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Draws h (*sample_shape, ..., T, d) and a (*sample_shape, ..., T, p) from the model, by ancestral sampling."""
    shape = (*sample_shape, *lgssm.mu.shape)
    h_1 = lgssm.mu + _apply(semidefinite_cholesky(lgssm.Sigma), _standard_normal(lgssm, shape))
    h = torch.cat([h_1.unsqueeze(-2), sample_rollout(lgssm, h_1, n_steps - 1)], -2)
    return h, sample_observations(lgssm, h)


def sample_posterior(
    lgssm: LGSSM, a: Tensor, observed: Tensor | None = None, sample_shape: tuple[int, ...] = ()
) -> Tensor:
    """Draws h_{1:T} (*sample_shape, ..., T, d) from p(h_{1:T} | a_{1:T}), jointly over time.

    Simulation smoothing (Durbin and Koopman, 2002): a prior draw plus the smoothed mean of the difference of the data
    and that draw's data. It inverts no state covariance and so is exact for deterministic motion. Arguments as in
    `kalman_filter`.
    """
    a, observed = check_observations(lgssm, a, observed)
    batch = np.broadcast_shapes(a.shape[:-2], observed.shape[:-1], lgssm.mu.shape[:-1])
    model = lgssm._replace(mu=lgssm.mu.expand(*batch, -1))
    h, a_drawn = sample(model, a.shape[-2], sample_shape)
    centred = lgssm._replace(mu=torch.zeros_like(lgssm.mu), u=torch.zeros_like(lgssm.u))
    return h + rts_smoother(centred, a - a_drawn, observed).mean


def rollout(lgssm: LGSSM, mean: Tensor, cov: Tensor, n_steps: int) -> Gaussians:
    """Returns the moments of the ``n_steps`` (>= 0) states after one with ``mean`` (..., d) and ``cov`` (..., d, d)."""
    state, states = Gaussians(mean, cov), []
    for _ in range(n_steps):
        state = predict(lgssm, state)
        states.append(state)
    if not states:
        return Gaussians(mean.unsqueeze(-2)[..., :0, :], cov.unsqueeze(-3)[..., :0, :, :])
    means, covs = zip(*states)
    return Gaussians(_stack(means, -2), _stack(covs, -3))


def sample_rollout(lgssm: LGSSM, h: Tensor, n_steps: int) -> Tensor:
    """Draws the ``n_steps`` (>= 0) states (..., n_steps, d) that follow the states ``h`` (..., d)."""
    noise = _apply(semidefinite_cholesky(lgssm.Sigma_H), _standard_normal(lgssm, (n_steps, *h.shape)))
    states = []
    for t in range(n_steps):
        h = h @ lgssm.A.mT + lgssm.u + noise[t]
        states.append(h)
    return torch.stack(states, -2) if states else h.unsqueeze(-2)[..., :0, :]


def sample_observations(lgssm: LGSSM, h: Tensor) -> Tensor:
    """Draws a (..., p) given the states h (..., d): a = B h + N(0, Sigma_A)."""
    shape = (*h.shape[:-1], lgssm.B.shape[-2])
    return h @ lgssm.B.mT + _apply(semidefinite_cholesky(lgssm.Sigma_A), _standard_normal(lgssm, shape))


def observation_moments(lgssm: LGSSM, states: Gaussians, noise: bool = True) -> Gaussians:
    """Returns the moments of a_t, mean (..., T, p), from those of h_t; without ``noise`` those of B h_t."""
    cov = lgssm.B @ states.cov @ lgssm.B.mT
    return Gaussians(states.mean @ lgssm.B.mT, cov + lgssm.Sigma_A if noise else cov)


def mixture_moments(weights: Tensor, each: Gaussians) -> Gaussians:
    """Returns the mean (..., d) and covariance (..., d, d) of a mixture of K Gaussians.

    Args:
        weights: (..., K).
        each: the components, mean (..., K, d) and cov (..., K, d, d); batches broadcast.
    """
    mean = torch.einsum("...k,...kd->...d", weights, each.mean)
    spread = each.mean - mean.unsqueeze(-2)
    within = torch.einsum("...k,...kde->...de", weights, each.cov)
    return Gaussians(mean, within + torch.einsum("...k,...kd,...ke->...de", weights, spread, spread))


def reverse(lgssm: LGSSM) -> LGSSM:
    """Returns the dynamics backwards in time, h_{t-1} = A^-1 (h_t - u - eta), so that `rollout` goes into the past.

    This is p(h_{t-1} | h_t) under a flat prior of h_{t-1}.
    """
    A = torch.linalg.inv(lgssm.A)
    return lgssm._replace(A=A, u=-(A @ lgssm.u), Sigma_H=A @ lgssm.Sigma_H @ A.mT)


def semidefinite_cholesky(Sigma: Tensor) -> Tensor:
    """Returns lower triangular L (..., d, d) with L L' = Sigma, for Sigma that may be singular or zero.

    Columns with a pivot below 1e-14 of the largest variance are set to zero. L is differentiable where the rank of
    Sigma does not change.
    """
    d = Sigma.shape[-1]
    tiny = 1e-14 * Sigma.diagonal(dim1=-2, dim2=-1).amax(-1)
    columns, rest = [], Sigma
    for j in range(d):
        pivot = rest[..., j, j]
        positive = pivot > tiny
        root = torch.where(positive, pivot, 1.0).sqrt()
        column = torch.where(positive[..., None], rest[..., :, j] / root[..., None], 0.0)
        columns.append(column)
        rest = rest - column[..., :, None] * column[..., None, :]
    return torch.stack(columns, -1).tril()


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the type for exact inference: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact_dtype_of(what: str, x: Tensor) -> torch.dtype:
    """Returns `exact_dtype` on the device of parameters x, after `check_precision`."""
    check_precision(what, x)
    return exact_dtype(x.device)


def check_precision(what: str, x: Tensor) -> None:
    """Raises ValueError unless x is float32 or float64 and autocast is off."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{what} are {x.dtype}; wanted float32 or float64, as exact inference needs more than half precision"
        )
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("torch.autocast is on, but exact inference needs more than half precision; turn it off")


def check_observations(lgssm: LGSSM, a: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns positions in the type of the model, 0 where missing, and a mask.

    Raises:
        ValueError: if ``a`` or ``observed`` has the wrong shape or type.
    """
    p = lgssm.B.shape[-2]
    if a.dim() < 2 or a.shape[-1] != p or a.shape[-2] < 1:
        raise ValueError(f"positions have shape {tuple(a.shape)}; wanted (..., T >= 1, {p})")
    a = a.to(lgssm.A.dtype)
    if observed is None:
        return a, torch.ones(a.shape[-2], dtype=torch.bool, device=a.device)
    if observed.dtype != torch.bool or observed.dim() < 1 or observed.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"observed has shape {tuple(observed.shape)} and type {observed.dtype}; "
            f"wanted bool (..., T = {a.shape[-2]}), False where a time step is missing"
        )
    return torch.where(observed[..., None], a, 0.0), observed


def _innovation(lgssm: LGSSM, a_t: Tensor, m: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the innovation e, the Cholesky factor of its covariance S = B P B' + Sigma_A, and the gain P B' S^-1."""
    B = lgssm.B
    L = torch.linalg.cholesky_ex(B @ P @ B.mT + lgssm.Sigma_A).L
    return a_t - m @ B.mT, L, cholesky_solve(B @ P, L).mT


def _log_normal(e: Tensor, L: Tensor) -> Tensor:
    """Returns log N(e; 0, L L') (...) for e (..., p)."""
    white = torch.linalg.solve_triangular(L, e.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * white.square().sum(-1) - log_det - 0.5 * e.shape[-1] * math.log(2 * math.pi)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the products of matrices (..., i, j) and vectors (..., j); batches broadcast."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*tensors), dim)


def _standard_normal(lgssm: LGSSM, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=lgssm.A.dtype, device=lgssm.A.device)
