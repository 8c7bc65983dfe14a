"""Means and covariances: of a guide's distribution q(a | v) of any family, of p(a), and of states."""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics

MOMENT_SAMPLES = 256  # for guides whose distribution has no closed-form mean or variance


class Moments(NamedTuple):
    """The first two moments of q(a | v)."""

    mean: Tensor  # (B, N, T, 2)
    cov: Tensor  # (B, N, T, 2, 2), of a_t; diagonal if the distribution has no ``frame_covariance``


class States(NamedTuple):
    """The exact p(h | a) and p(z | a): positions and velocities given positions.

    Positions determine (vx, vy) only up to the drift in u; `latent_states.moves` returns the motion per frame.
    """

    mean: Tensor  # (..., T, 4), E[h_t | a], averaged over components
    cov: Tensor  # (..., T, 4, 4)
    p_z: Tensor  # (..., K), or (..., T, K) for filtered states
    samples: Tensor | None = None  # (S, ..., T, 4), paths


def prior_moments(dynamics: Dynamics, n_frames: int) -> kalman.Gaussians:
    """Returns the mean (T, 2) and the covariance (T, 2, 2) of the positions of an object under p(a), Eq (10)."""
    lgssm = dynamics.lgssm()
    start = kalman.mixture_moments(dynamics.pi.to(lgssm.mu), kalman.Gaussians(lgssm.mu, lgssm.Sigma))
    states = kalman.rollout(lgssm, start.mean, start.cov, n_frames - 1)
    first = (x.unsqueeze(0) for x in start)
    return kalman.observation_moments(lgssm, kalman.Gaussians(*(torch.cat(x) for x in zip(first, states))))


def mean_of(q_a: dist.TorchDistribution) -> Tensor:
    """Returns the mean (B, N, T, 2) of q(a | v), from samples if it has no closed form."""
    try:
        mean = q_a.mean
    except NotImplementedError:
        mean = q_a.sample(torch.Size((MOMENT_SAMPLES,))).mean(0)
    return mean.to(kalman.exact_dtype(mean.device))


def moments_of(q_a: dist.TorchDistribution) -> Moments:
    """Returns the mean and covariance of q(a | v), from samples if they have no closed form."""
    cov = getattr(q_a, "frame_covariance", None)
    try:
        mean, cov = q_a.mean, torch.diag_embed(q_a.variance) if cov is None else cov
    except NotImplementedError:
        samples = q_a.sample(torch.Size((MOMENT_SAMPLES,)))
        mean, cov = samples.mean(0), torch.diag_embed(samples.var(0)) if cov is None else cov
    dtype = kalman.exact_dtype(mean.device)
    return Moments(mean.to(dtype), cov.to(dtype))


def no_covariance(mean: Tensor) -> Tensor:
    """Returns covariances of NaN for means (..., 2), without memory of their own."""
    return mean.new_full((), torch.nan).expand(*mean.shape, 2)
