"""The distribution p(a_{1:T} | y) of long sequences in O(T) time and memory, by Kalman filter and smoother.

`structured.ConditionedTracks` factorises a (2 T, 2 T) matrix for every sequence and object. That is the
fastest way for short sequences, but infeasible for long ones, as it takes O(T^3). Here the same distribution is that of
a linear-Gaussian state-space model whose observation noise is Sigma_A + R_t:

    y_t = B h_t + N(0, Sigma_A + R_t),   a_t | h_t, y_t ~ N(B h_t + G_t (y_t - B h_t), (I - G_t) Sigma_A),
    G_t = Sigma_A (Sigma_A + R_t)^-1,

with h smoothed given y. Gains and covariances depend on R alone, and are computed once for all samples.
"""

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.lgssm.small_matrices import categorical_sample


class FilteredTracks(TorchDistribution):
    """The posterior p(a_{1:T} | y) given measurements y = a + N(0, R), the same as `ConditionedTracks`, in O(T).

    Args:
        dynamics: the dynamics, whose p(a) of Eq (10) is the prior.
        y: (..., T, 2), measurements.
        R: (..., T, 2), their variances, above 0.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(self, dynamics: Dynamics, y: Tensor, R: Tensor) -> None:
        super().__init__(y.shape[:-2], y.shape[-2:], validate_args=False)
        self._dynamics, self._lgssm = dynamics, dynamics.lgssm()
        dtype = self._lgssm.mu.dtype
        self._y, self._R = y.to(dtype).unsqueeze(-3), R.to(dtype).unsqueeze(-3)  # (..., 1, T, 2)
        log_evidence = self._factorise()  # (..., K)
        log_joint = log_evidence + dynamics.log_pi.to(dtype).log_softmax(-1)
        self.component = dist.Categorical(logits=log_joint, validate_args=False)  # p(z | y), (..., K)
        self.log_evidence = log_joint.logsumexp(-1)  # log Z, (...)

    def _factorise(self) -> Tensor:
        """Stores the gains and covariances of filter and smoother for every frame; returns log p(y | z) (..., K)."""
        lgssm, (A, B) = self._lgssm, (self._lgssm.A, self._lgssm.B)
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        noise = lgssm.Sigma_A + torch.diag_embed(self._R)  # (..., 1, T, 2, 2)
        state, log_evidence = Gaussians(lgssm.mu, lgssm.Sigma), lgssm.mu.new_zeros(())
        gains, whitened, predicted_cov = [], [], []
        for t in range(self.event_shape[0]):
            predicted = kalman.predict(lgssm, state) if t else state
            state, log_density = kalman.update(
                lgssm._replace(Sigma_A=noise[..., t, :, :]), predicted, self._y[..., t, :]
            )
            log_evidence = log_evidence + log_density
            S_inv_B = torch.linalg.solve(B @ predicted.cov @ B.mT + noise[..., t, :, :], B)
            whitened.append(S_inv_B)
            gains.append(predicted.cov @ S_inv_B.mT)
            predicted_cov.append(predicted.cov)
        N, smoothed_cov = torch.zeros_like(A), []
        for S_inv_B, gain, P in zip(whitened[::-1], gains[::-1], predicted_cov[::-1]):
            J = A @ (identity - gain @ B)
            N = B.mT @ S_inv_B + J.mT @ N @ J
            smoothed_cov.append(P - P @ N @ P)
        self._gains, self._whitened, self._predicted_cov = gains, whitened, predicted_cov
        self._smoothed_cov = torch.stack(smoothed_cov[::-1], -3)  # (..., K, T, 4, 4)
        self._G = torch.linalg.solve(noise, lgssm.Sigma_A.expand_as(noise)).mT  # (..., 1, T, 2, 2)
        return log_evidence

    def _mean_given(self, y: Tensor, mu: Tensor, u: Tensor) -> Tensor:
        """Returns E[a | y] (..., K, T, 2) for any y (..., K or 1, T, 2), in the model with start mu and drift u."""
        A, B = self._lgssm.A, self._lgssm.B
        m, predicted, innovations = mu, [], []
        for t, gain in enumerate(self._gains):
            m = m @ A.mT + u if t else m
            e = y[..., t, :] - m @ B.mT
            predicted.append(m)
            innovations.append(e)
            m = m + _apply(gain, e)
        r, means = torch.zeros_like(mu), []
        for t in reversed(range(len(predicted))):
            r = r @ A  # A' r
            r = r - _apply((self._gains[t] @ B).mT, r) + _apply(self._whitened[t].mT, innovations[t])
            means.append(predicted[t] + _apply(self._predicted_cov[t], r))
        Bh = torch.stack(torch.broadcast_tensors(*means[::-1]), -2) @ B.mT
        return Bh + _apply(self._G, y - Bh)

    @property
    def _component_means(self) -> Tensor:
        return self._mean_given(self._y, self._lgssm.mu, self._lgssm.u)

    @property
    def mean(self) -> Tensor:
        return torch.einsum("...k,...ktd->...td", self.component.probs, self._component_means)

    @property
    def frame_covariance(self) -> Tensor:
        """The covariance of a_t in each frame, (..., T, 2, 2)."""
        B, means, w = self._lgssm.B, self._component_means, self.component.probs
        rest = torch.eye(2, dtype=B.dtype, device=B.device) - self._G
        within = rest @ (B @ self._smoothed_cov @ B.mT) @ rest.mT + rest @ self._lgssm.Sigma_A
        moments = kalman.mixture_moments(w.unsqueeze(-2), Gaussians(means.transpose(-3, -2), within.transpose(-4, -3)))
        return moments.cov

    @property
    def variance(self) -> Tensor:
        return self.frame_covariance.diagonal(dim1=-2, dim2=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        a = value.to(self._y.dtype)
        y, R = self._y.squeeze(-3), self._R.squeeze(-3)
        potentials = dist.Normal(a, R.sqrt(), validate_args=False).log_prob(y).sum((-2, -1))
        return self._dynamics.positions(self.event_shape[0]).log_prob(a) + potentials - self.log_evidence

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws a prior path and measurements of it, corrects the path by the actual measurements, and draws z."""
        lgssm, T = self._lgssm, self.event_shape[0]
        batch = torch.Size(sample_shape) + self.component.probs.shape  # (S, ..., K)
        _, a = kalman.sample(lgssm._replace(mu=lgssm.mu.expand(*batch, lgssm.mu.shape[-1])), T)
        y = a + self._R.sqrt() * torch.randn_like(a)
        a = a + self._mean_given(self._y - y, torch.zeros_like(lgssm.mu), torch.zeros_like(lgssm.u))
        z = categorical_sample(self.component.probs.expand(batch))[..., None, None, None]
        return a.take_along_dim(z.expand(*z.shape[:-2], T, 2), -3).squeeze(-3)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the products of matrices (..., i, j) and vectors (..., j); batches broadcast."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
