"""Pyro distributions over the path of one object (Sec 2.1.2).

`DenseTracks` and `BlockTracks` are the same density, p(a_{1:T} | z) of Eq (3) with h integrated out, computed as one
Gaussian over all 2 T coordinates, O(T^3), and by a Kalman filter that advances many frames at a time, O(T). `StatePath`
is p(h_{1:T} | z). Their batch shape is that of the LGSSM's starts.

Departures from the paper: none.
"""

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.kalman import LGSSM
from pyro_pixels.lgssm.marginal import on_diagonal, response
from pyro_pixels.lgssm.small_matrices import inverse_lower

BLOCK_FRAMES = 32  # frames per step of `BlockTracks`: fewer frames need more steps, more need larger matrices


class DenseTracks(TorchDistribution):
    """The dense joint Gaussian of positions (T, 2), Eq (3) with h integrated out.

    One Cholesky factor per component serves all sequences and objects, since the covariance does not depend on the
    data.

    Args:
        mean: (K, 2 T), mean of the stacked positions, from `marginal_moments`.
        cov: (K, 2 T, 2 T), their covariance.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(self, mean: Tensor, cov: Tensor, *, batch_shape: torch.Size | None = None) -> None:
        self._mean, self._cov, self._L = mean, cov, torch.linalg.cholesky_ex(cov).L
        self._set_shapes(mean.shape[:-1] if batch_shape is None else batch_shape)

    def _set_shapes(self, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, torch.Size((self._mean.shape[-1] // 2, 2)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "DenseTracks":
        new = object.__new__(type(self))
        new._mean, new._cov, new._L = self._mean, self._cov, self._L  # not expanded, as they broadcast
        new._set_shapes(torch.Size(batch_shape))
        return new

    @property
    def stacked_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean (K, 2 T), covariance and Cholesky factor (K, 2 T, 2 T) of the stacked positions."""
        return self._mean, self._cov, self._L

    @property
    def mean(self) -> Tensor:
        return self._mean.unflatten(-1, self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        variance = self._L.square().sum(-1)
        return variance.unflatten(-1, self.event_shape).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        e = value.flatten(-2) - self._mean  # (..., K, 2T)
        columns = e.reshape(-1, *self._mean.shape).permute(1, 2, 0)  # (K, 2T, n), of all sequences and objects
        white = torch.linalg.solve_triangular(self._L, columns, upper=False)
        log_det = self._L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob = -0.5 * white.square().sum(-2).mT - (log_det + 0.5 * e.shape[-1] * math.log(2 * math.pi))
        return log_prob.view(e.shape[:-1])

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self._mean.shape[-1:]
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        return (self._mean + torch.einsum("...kj,kij->...ki", noise, self._L)).unflatten(-1, self.event_shape)


class BlockTracks(TorchDistribution):
    """The distribution of positions (T, 2), computed by a Kalman filter whose observations are whole blocks of frames.

    Given the state in its first frame, the positions of a block and the first state of the next one are jointly
    Gaussian, with the same covariance for every block. Time and memory are O(T), and gains and covariances are computed
    once for all sequences and objects. Like the filter frame by frame it is exact for singular Sigma_H and Sigma.

    Args:
        lgssm: the parameters, with a batch (K,) of starts.
        n_frames: T.
        block: frames per block.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(
        self, lgssm: LGSSM, n_frames: int, *, block: int = BLOCK_FRAMES, batch_shape: torch.Size | None = None
    ) -> None:
        self._lgssm, self._block = lgssm, min(block, n_frames)
        super().__init__(
            lgssm.mu.shape[:-1] if batch_shape is None else batch_shape, torch.Size((n_frames, 2)), validate_args=False
        )

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "BlockTracks":
        T = self.event_shape[0]
        return type(self)(self._lgssm, T, block=self._block, batch_shape=torch.Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        return self._marginals.mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self._marginals.cov.diagonal(dim1=-2, dim2=-1).expand(self.batch_shape + self.event_shape)

    @property
    def _marginals(self) -> kalman.Gaussians:
        mu, Sigma = self._lgssm.mu, self._lgssm.Sigma
        later = kalman.rollout(self._lgssm, mu, Sigma, self.event_shape[0] - 1)
        states = (torch.cat([now.unsqueeze(1), then], 1) for now, then in zip((mu, Sigma), later))
        return kalman.observation_moments(self._lgssm, kalman.Gaussians(*states))

    def log_prob(self, value: Tensor) -> Tensor:
        (A, B, _, _, Sigma_A, m, P), b = self._lgssm, self._block
        d = len(A)
        F, drift, V = response(_states_observed(self._lgssm), b + 1)  # states of a block and the next one
        to_a = on_diagonal(B, b)  # (2b, db)
        F_a, drift_a = to_a @ F[:-d], drift[:-d] @ to_a.mT
        V_a = to_a @ V[:-d, :-d] @ to_a.mT + on_diagonal(Sigma_A, b)
        F_h, drift_h, V_h, V_ha = F[-d:], drift[-d:], V[-d:, -d:], V[-d:, :-d] @ to_a.mT
        log_prob = value.new_zeros(())
        for a in value.flatten(-2).split(2 * b, -1):
            n = a.shape[-1]  # the last block may be shorter
            L = torch.linalg.cholesky_ex(F_a[:n] @ P @ F_a[:n].mT + V_a[:n, :n]).L  # (K, 2b, 2b)
            whiten = inverse_lower(L)
            e = torch.einsum("...ki,kji->...kj", a - m @ F_a[:n].mT - drift_a[:n], whiten)
            log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_prob = log_prob - 0.5 * e.square().sum(-1) - log_det - 0.5 * n * math.log(2 * math.pi)
            gain = (F_h @ P @ F_a[:n].mT + V_ha[:, :n]) @ whiten.mT  # (K, d, 2b)
            m = m @ F_h.mT + drift_h + torch.einsum("...ki,kji->...kj", e, gain)
            P = F_h @ P @ F_h.mT + V_h - gain @ gain.mT
        return log_prob

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        starts = self._lgssm._replace(mu=self._lgssm.mu.expand(*shape, -1))
        return kalman.sample(starts, self.event_shape[0])[1]


def _states_observed(lgssm: LGSSM) -> LGSSM:
    """Returns the LGSSM whose observations are the states themselves."""
    identity = torch.eye(lgssm.A.shape[-1], dtype=lgssm.A.dtype, device=lgssm.A.device)
    return lgssm._replace(B=identity, Sigma_A=torch.zeros_like(identity))


class StatePath(TorchDistribution):
    """The distribution p(h_{1:T} | z) of the states in Eq (5): event shape (T, d), batch shape that of the starts.

    `log_prob` needs positive definite Sigma_H and Sigma; sampling does not.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(self, lgssm: LGSSM, n_frames: int) -> None:
        self._lgssm = lgssm
        super().__init__(lgssm.mu.shape[:-1], torch.Size((n_frames, lgssm.mu.shape[-1])), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        A, _, u, Sigma_H, _, mu, Sigma = self._lgssm
        h = value.to(A.dtype)
        start = dist.MultivariateNormal(mu, Sigma, validate_args=False).log_prob(h[..., 0, :])
        step = dist.MultivariateNormal(h[..., :-1, :] @ A.mT + u, Sigma_H, validate_args=False)
        return start + step.log_prob(h[..., 1:, :]).sum(-1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return kalman.sample(self._lgssm, self.event_shape[0], tuple(sample_shape))[0]
