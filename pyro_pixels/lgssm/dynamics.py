"""Learnable latent dynamics (Sec 2.1.2): the parameters of Eqs (3)-(4) and the exact marginal p(a_{1:T}) of Eq (10).

`Dynamics` holds delta, u, Sigma_H, Sigma_A, pi, mu_k and Sigma_k as ordinary parameters. Its `positions(T)` is the
distribution of one object's positions with the states h and the component z integrated out:

    p(a_{1:T}) = sum_k pi_k p(a_{1:T} | z = k),

a `MixtureSameFamily(Categorical(pi), components)`. The components can be Pyro's `GaussianHMM` (`hmm_components`, the
literal statement of the model), or the same density computed many times faster: as a dense Gaussian over all 2 T
coordinates (`dense_components`), by a filter that advances many frames at a time (`block_components`), or by whichever
of these two suits T (`exact_components`). All work in float64: in float32 Pyro's GaussianHMM is silently wrong by nats
when Sigma_H is small. docs/performance.md compares their speed.

Departures from the paper: none in the density. Sigma_A is kept above a floor (`DynamicsConfig.position_noise_floor`) so
that its Cholesky factor exists. Sigma_H, Sigma_A and Sigma_k are full covariances, which the paper leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_pixels._checks import Bounds, check_fields
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.distributions import BlockTracks, DenseTracks
from pyro_pixels.lgssm.kalman import LGSSM, ConstantVelocity
from pyro_pixels.lgssm.marginal import marginal_moments
from pyro_pixels.lgssm.sharing import of_parameters_alone, once

Positive = Annotated[float, Bounds(0, 1e12, above=True)]
DENSE_FRAMES = 64  # up to this many frames `exact_components` are dense


@dataclass(frozen=True)
class DynamicsConfig:
    """Starting values of the dynamics, by default those of Sec 3.2; noises are variances, in latent units."""

    n_components: Annotated[int, Bounds(1, 1_000)] = 2
    """K, the number of components of the mixture over h_1."""
    delta: Positive = 0.1
    """The sampling period."""
    state_noise: Positive = 1e-3
    """The variance in Sigma_H = state_noise I."""
    position_noise: Positive = 1.0
    """The variance in Sigma_A = position_noise I."""
    start_spread: Positive = 1.0
    """The standard deviation from which the positions in mu_k are drawn."""
    start_velocity_spread: Annotated[float, Bounds(0, 1e12)] = 0.0
    """The standard deviation from which the velocities in mu_k are drawn; 0 in the paper."""
    start_variance: Positive = 1.0
    """The variance in Sigma_k = start_variance I."""
    position_noise_floor: Positive = 1e-6
    """The lower bound of Sigma_A, as a multiple of I."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.position_noise_floor < self.position_noise:
            raise ValueError(
                f"position_noise is {self.position_noise}; wanted more than its floor, {self.position_noise_floor}"
            )


class TrackMixture(dist.MixtureSameFamily):
    """The mixture p(a_{1:T}) of Eq (10), with event shape (T, 2).

    Densities are computed and returned in float64 whatever the type of the value. The components may be any of the
    `*_components` below.
    """

    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]  # torch's own has no bijection

    _origin: "TrackMixture | None" = None  # the mixture that this one expands, with the same densities

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "TrackMixture":
        new = super().expand(batch_shape, self._get_checked_instance(TrackMixture, _instance))
        new._origin = self._origin or self
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(a_{1:T}) (...) in float64 for positions (..., T, 2)."""
        return once("log_prob", lambda: self._log_joint(value).logsumexp(-1), self._origin or self, value)

    def component_posterior(self, value: Tensor) -> dist.Categorical:
        """Returns p(z | a_{1:T}), a Categorical over K, for positions (..., T, 2)."""
        return dist.Categorical(logits=self._log_joint(value), validate_args=False)

    def _log_joint(self, value: Tensor) -> Tensor:
        """Returns log p(a_{1:T}, z) (..., K)."""
        value = value.to(kalman.exact_dtype(value.device)).unsqueeze(-3)
        return self.component_distribution.log_prob(value) + self.mixture_distribution.logits


Components = Callable[[LGSSM, int], dist.TorchDistribution]
"""A function (LGSSM with a batch of K, T) -> p(a_{1:T} | z = k), with batch shape (K,) and event shape (T, 2)."""


def exact_components(lgssm: LGSSM, n_frames: int) -> DenseTracks | BlockTracks:
    """Returns the fastest exact components: dense ones for short sequences, blockwise filters for longer ones."""
    return (dense_components if n_frames <= DENSE_FRAMES else block_components)(lgssm, n_frames)


def dense_components(lgssm: LGSSM, n_frames: int) -> DenseTracks:
    """Returns the components as dense Gaussians over all 2 T coordinates, O(T^3), the fastest for short sequences."""
    return DenseTracks(*marginal_moments(lgssm, n_frames))


def block_components(lgssm: LGSSM, n_frames: int) -> BlockTracks:
    """Returns the components as filters that advance many frames at a time, O(T)."""
    return BlockTracks(lgssm, n_frames)


def hmm_components(lgssm: LGSSM, n_frames: int) -> dist.GaussianHMM:
    """Returns the components as Pyro's `GaussianHMM`, O(T).

    Pyro's chain starts at h_0 and makes a transition before the first observation, and its matrices act from the right.
    A dummy h_0 ~ N(0, I), followed by a first transition with matrix 0 and noise N(mu_k, Sigma_k), gives h_1 exactly
    the distribution of Eq (4).
    """
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = lgssm
    K, d = mu.shape
    dtype, device = A.dtype, A.device

    def normal(loc: Tensor, cov: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(loc, scale_tril=kalman.semidefinite_cholesky(cov), validate_args=False)

    rest = (K, n_frames - 1)
    matrix = torch.cat([torch.zeros(K, 1, d, d, dtype=dtype, device=device), A.mT.expand(*rest, d, d)], 1)
    noise_mean = torch.cat([mu.unsqueeze(1), u.expand(*rest, d)], 1)
    noise_cov = torch.cat([Sigma.unsqueeze(1), Sigma_H.expand(*rest, d, d)], 1)
    return dist.GaussianHMM(
        initial_dist=normal(torch.zeros(K, d, dtype=dtype, device=device), torch.eye(d, dtype=dtype, device=device)),
        transition_matrix=matrix,
        transition_dist=normal(noise_mean, noise_cov),
        observation_matrix=B.mT,
        observation_dist=normal(torch.zeros(2, dtype=dtype, device=device), Sigma_A),
        duration=n_frames,
        validate_args=False,
    )


@of_parameters_alone
class Dynamics(nn.Module):
    """The learnable dynamics with parameters delta, u, Sigma_H, Sigma_A, pi_k, mu_k and Sigma_k (Sec 3.2).

    Args:
        config: starting values; mu_k is drawn by the constructor, u starts at 0 and pi is uniform.
        components: computes p(a_{1:T} | z = k): one of the `*_components` above, or your own function.
    """

    def __init__(self, config: DynamicsConfig = DynamicsConfig(), *, components: Components = exact_components) -> None:
        super().__init__()
        K = config.n_components
        self.config, self.components = config, components
        self.log_delta = nn.Parameter(torch.tensor(config.delta).log())
        self.u = nn.Parameter(torch.zeros(4))
        self.log_pi = nn.Parameter(torch.zeros(K))
        self.mu = nn.Parameter(
            torch.cat([config.start_spread * torch.randn(K, 2), config.start_velocity_spread * torch.randn(K, 2)], -1)
        )
        self.root_Sigma_H = nn.Parameter(_log_root(config.state_noise, 4))
        self.root_Sigma_A = nn.Parameter(_log_root(config.position_noise - config.position_noise_floor, 2))
        self.root_Sigma = nn.Parameter(_log_root(config.start_variance, 4).repeat(K, 1, 1))

    @property
    def delta(self) -> Tensor:
        """The sampling period, a positive scalar."""
        return self.log_delta.exp()

    @property
    def pi(self) -> Tensor:
        """The component probabilities (K,)."""
        return self.log_pi.softmax(-1)

    @torch.no_grad()
    def set_starts(self, log_pi: Tensor, mu: Tensor, Sigma: Tensor) -> None:
        """Sets log pi_k (K,), mu_k (K, 4) and Sigma_k (K, 4, 4), which must be positive definite, in place."""
        self.log_pi.copy_(log_pi)
        self.mu.copy_(mu)
        L = torch.linalg.cholesky(Sigma)
        self.root_Sigma.copy_(L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log()))

    def lgssm(self) -> LGSSM:
        """Returns the parameters of Eq (3) in float64, computed once where model and guide share them (`sharing`)."""
        return once("lgssm", self._lgssm, self)

    def _lgssm(self) -> LGSSM:
        """Returns the parameters of Eq (3) in float64: A = [I, delta I; 0, I], B = [I, 0], and a batch of K starts."""
        dtype, device = kalman.exact_dtype_of("the dynamics' parameters", self.mu), self.mu.device
        I = torch.eye(4, dtype=dtype, device=device)
        delta = self.log_delta.to(dtype).exp()
        roots = once("roots", self._roots, self)
        covariances = roots @ roots.mT
        return ConstantVelocity(
            A=I + delta * torch.ones(2, dtype=dtype, device=device).diag(2),
            B=I[:2],
            u=self.u.to(dtype),
            Sigma_H=covariances[1],
            Sigma_A=covariances[0, :2, :2] + self.config.position_noise_floor * I[:2, :2],
            mu=self.mu.to(dtype),
            Sigma=covariances[2:],
        )

    def start_roots(self) -> Tensor:
        """Returns U_k (K, 4, 4) with U_k U_k' = Sigma_k, lower triangular."""
        if (type(self).lgssm, type(self)._lgssm) != (Dynamics.lgssm, Dynamics._lgssm):  # perhaps another Sigma_k
            return kalman.semidefinite_cholesky(self.lgssm().Sigma)
        return once("roots", self._roots, self)[2:]

    def _roots(self) -> Tensor:
        """Returns lower triangular roots (2 + K, 4, 4) of Sigma_A less its floor, padded, Sigma_H, and Sigma_k."""
        root_Sigma_A = F.pad(self.root_Sigma_A, (0, 2, 0, 2))
        roots = torch.cat([root_Sigma_A.unsqueeze(0), self.root_Sigma_H.unsqueeze(0), self.root_Sigma])
        roots = roots.to(kalman.exact_dtype(roots.device))
        return roots.tril(-1) + torch.diag_embed(roots.diagonal(dim1=-2, dim2=-1).exp())

    def positions(self, n_frames: int) -> TrackMixture:
        """Returns p(a_{1:T}) of one object, Eq (10), with batch shape () and event shape (T, 2)."""
        return once("positions", lambda: self._positions(n_frames), self, n_frames)

    def _positions(self, n_frames: int) -> TrackMixture:
        lgssm = self.lgssm()
        z = dist.Categorical(logits=self.log_pi.to(lgssm.mu.dtype), validate_args=False)
        return TrackMixture(z, self.components(lgssm, n_frames), validate_args=False)

    def component_posterior(self, a: Tensor, observed: Tensor | None = None) -> dist.Categorical:
        """Returns p(z | a), with batch shape (...), by one Kalman filter per component (Sec 3.4).

        Args:
            a: positions (..., T, 2).
            observed: (..., T) bool, False where a frame is missing; by default all are observed.
        """
        seen = None if observed is None else observed.unsqueeze(-2)
        log_likelihood = kalman.log_likelihood(self.lgssm(), a.unsqueeze(-3), seen)
        log_pi = self.log_pi.to(log_likelihood.dtype).log_softmax(-1)
        return dist.Categorical(logits=log_likelihood + log_pi, validate_args=False)


def collapse_components(lgssm: LGSSM, pi: Tensor) -> LGSSM:
    """Returns the LGSSM with the mixture over h_1 replaced by one Gaussian of equal mean and covariance."""
    pi = pi.to(lgssm.mu.dtype)
    mean = pi @ lgssm.mu
    spread = lgssm.mu - mean
    cov = torch.einsum("k,kij->ij", pi, lgssm.Sigma + spread.unsqueeze(-1) * spread.unsqueeze(-2))
    return lgssm._replace(mu=mean, Sigma=cov)


def select_component(lgssm: LGSSM, k: Tensor) -> LGSSM:
    """Returns the LGSSM with the starts of components ``k`` (...), so that its mu is (..., 4)."""
    return lgssm._replace(mu=lgssm.mu[k], Sigma=lgssm.Sigma[k])


def _log_root(variance: float, d: int) -> Tensor:
    """Returns the unconstrained (d, d) matrix that `Dynamics` maps to ``variance`` I."""
    return 0.5 * torch.tensor(variance).log() * torch.eye(d)
