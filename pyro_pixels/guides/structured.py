"""The structured guide, which contains the dynamics (called for in Sec 2.3): q(a | v) is p(a) times potentials.

The recurrent network emits a Gaussian potential for each object and frame, N(y_t^n; a_t^n, R_t^n) with diagonal R, as
if from a noisy measurement, and

    q(a^n | v) = p(a^n) prod_t N(y_t^n; a_t^n, R_t^n) / Z^n,   Z^n = sum_k pi_k N(y^n; m_k, C_k + R^n)

is computed exactly: a mixture over the component z, weighted by the evidence, of Gaussians over all frames that are
correlated in time. In the ELBO, log q(a) - log p(a) = sum_t log N(y_t; a_t, R_t) - log Z. If the images were linear in
a with Gaussian noise, the true potentials would make the bound tight.

The gradient of a sample flows through the Gaussian of the drawn component, not through the component probabilities. It
is exact for K = 1 and where z is certain, as it is after the quick preset, and biased where components overlap.
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_pixels._derivatives import gradients
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import StateNetwork
from pyro_pixels.guides.long_tracks import FilteredTracks
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.lgssm.kalman import Gaussians, mixture_moments
from pyro_pixels.lgssm.marginal import response
from pyro_pixels.lgssm.small_matrices import categorical_sample, cholesky_inverse, cholesky_solve

DENSE_FRAMES = 128  # up to this many frames p(a | y) is one dense Gaussian per component; beyond, a filter
UNSEEN = 1e14  # variance of the potentials of unobserved frames: uninformative however far objects have gone


class ConditionedTracks(TorchDistribution):
    """The posterior p(a_{1:T} | y) given measurements y = a + N(0, R), with event shape (T, 2), exact in float64.

    Given h_1 the positions are F h_1 + drift + N(0, V) for every component (`marginal.Response`). Everything of size
    2 T is therefore computed once for all components, with S = V + diag R. For each component there remains a Gaussian
    over the four coordinates of h_1 = mu_k + U_k eps: a posteriori eps has precision Q_k = I + U_k' F' S^-1 F U_k.

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
        lgssm = dynamics.lgssm()
        self._prior = dynamics.positions(y.shape[-2])
        self._F, self._drift, self._V = response(lgssm, y.shape[-2])  # (2T, d), (2T,), (2T, 2T)
        self._y, self._R = (x.to(self._V.dtype).flatten(-2) for x in (y, R))  # (..., 2T)
        self._L = factor_sum(self._V, self._R)
        e, d = self._y - self._drift, self._F.shape[-1]
        columns = torch.cat([self._F.expand(*e.shape, d), e.unsqueeze(-1)], -1)
        self._solved, log_det = solve_sum(self._V, self._R, columns, self._L)  # S^-1 [F, e], log det S
        M, g = (self._F.mT @ self._solved).split((d, 1), -1)  # F' S^-1 F, F' S^-1 e
        self._mu, self._U = lgssm.mu, dynamics.start_roots()  # (K, d), (K, d, d)
        left = g.mT - self._mu @ M  # (..., K, d), F' S^-1 (e - F mu_k)
        identity = torch.eye(d, dtype=M.dtype, device=M.device)
        self._root_Q = torch.linalg.cholesky_ex(identity + self._U.mT @ (M.unsqueeze(-3) @ self._U)).L  # (..., K, d, d)
        self._white = torch.linalg.solve_triangular(self._root_Q, self._U.mT @ left.unsqueeze(-1), upper=False)
        of_starts = (self._mu * (g.mT + left)).sum(-1) + self._white.square().sum((-2, -1))
        log_det_Q = 2 * self._root_Q.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        of_all = (e * self._solved[..., d]).sum(-1) + log_det + e.shape[-1] * math.log(2 * math.pi)
        log_joint = 0.5 * (of_starts - log_det_Q - of_all.unsqueeze(-1)) + self._prior.mixture_distribution.logits
        self.component = dist.Categorical(logits=log_joint, validate_args=False)  # p(z | y), (..., K)
        self.log_evidence = log_joint.logsumexp(-1)  # log Z, (...)

    def log_prob(self, value: Tensor) -> Tensor:
        a = value.to(self._V.dtype)
        potentials = dist.Normal(a.flatten(-2), self._R.sqrt(), validate_args=False).log_prob(self._y).sum(-1)
        return self._prior.log_prob(a) + potentials - self.log_evidence

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws z, h_1, and a path from h_1 with measurements of it; corrects the path by the actual measurements."""
        n, K = torch.Size(sample_shape).numel(), len(self._mu)
        z = categorical_sample(self.component.probs.unsqueeze(-2).expand(*self.batch_shape, n, K))  # (..., n)
        eps = self._white + self._normal(*self._white.shape[:-1], n)
        h = self._start(eps).take_along_dim(z[..., None, None, :], -3).squeeze(-3)  # (..., d, n)
        noise = torch.linalg.cholesky_ex(self._V).L @ self._normal(*self._y.shape, n)  # (..., 2T, n), of N(0, V)
        measured = noise + self._R.sqrt().unsqueeze(-1) * self._normal(*self._y.shape, n)
        moved, _ = solve_sum(self._V, self._R, measured, self._L)
        a = self._given(h) + noise - self._V @ moved
        return a.movedim(-1, 0).reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def _normal(self, *shape: int) -> Tensor:
        return self._V.new_empty(shape).normal_()

    def _start(self, eps: Tensor) -> Tensor:
        """Returns the first states h_1 (..., K, d, n) of draws root(Q_k)' eps (..., K, d, n)."""
        eps = torch.linalg.solve_triangular(self._root_Q.mT, eps, upper=True)
        return self._mu.unsqueeze(-1) + self._U @ eps

    def _given(self, h: Tensor) -> Tensor:
        """Returns E[a | h_1, y] (..., 2T, n) for first states h (..., d, n)."""
        S_inv_rest = self._solved @ torch.cat([-h, torch.ones_like(h[..., :1, :])], -2)  # S^-1 (e - F h)
        return self._drift.unsqueeze(-1) + self._F @ h + self._V @ S_inv_rest

    @property
    def mean(self) -> Tensor:
        h = (self.component.probs[..., None, None] * self._start(self._white)).sum(-3)  # (..., d, 1)
        return self._given(h).squeeze(-1).unflatten(-1, self.event_shape)

    @property
    def frame_covariance(self) -> Tensor:
        """The covariance of a_t in each frame, (..., T, 2, 2)."""
        root = torch.linalg.solve_triangular(self._root_Q, self._U.mT.expand_as(self._root_Q), upper=False)
        starts = Gaussians(self._start(self._white).squeeze(-1), root.mT @ root)  # of h_1 given y and z
        start = mixture_moments(self.component.probs, starts).cov  # (..., d, d)
        by_start = self._F - self._V @ self._solved[..., :-1]  # da / dh_1
        by_start = by_start.unflatten(-2, self.event_shape)  # (..., T, 2, d)
        explained = self._V @ solve_sum(self._V, self._R, self._V.expand_as(self._L), self._L)[0]
        return by_start @ start.unsqueeze(-3) @ by_start.mT + _frame_blocks(self._V - explained)

    @property
    def variance(self) -> Tensor:
        return self.frame_covariance.diagonal(dim1=-2, dim2=-1)


class StructuredGuide(Guide):
    """The guide q(a | v) = p(a) x potentials / Z, which shares the dynamics of the model.

    Args:
        dynamics: the dynamics of the model, ``model.dynamics``.
        rnn: the network that computes s_t^n, Eq (8).
        head: maps s_t^n to y_t^n and the square root of R_t^n; by default a `TrackingHead`.
    """

    def __init__(self, dynamics: Dynamics, rnn: StateNetwork, head: nn.Module | None = None) -> None:
        super().__init__()
        self.dynamics, self.rnn = dynamics, rnn
        self.head = TrackingHead(dynamics, rnn.height, rnn.width, rnn.state_size) if head is None else head

    def encode(self, images: Tensor, n_objects: Tensor) -> ConditionedTracks | FilteredTracks:
        y, sigma = self._measure(self.rnn(images, n_objects), images, n_objects)
        return _tracks_given(self.dynamics, y, sigma.square())

    def encode_observed(
        self, images: Tensor, n_objects: Tensor, observed: Tensor
    ) -> tuple[ConditionedTracks | FilteredTracks, dist.Categorical]:
        (B, T), N = images.shape[:2], int(n_objects.max())
        observed = observed.expand(B, N, T)
        frames_seen = observed.any(1)  # (B, T)
        seen = torch.where(frames_seen[..., None, None], images, 0.0)
        groups, measured = sequences_alike(frames_seen, seen), []
        for rows, frames in groups:  # the network sees these frames alone: names do not depend on generated images
            n, stop = n_objects[rows], int(frames[-1]) + 1  # the head's work grows with T^3
            states = self.rnn(seen[rows][:, frames], n)
            s = states.new_zeros(*states.shape[:2], stop, states.shape[-1]).index_copy(2, frames, states)
            y_sigma = torch.stack(self._measure(s, seen[rows, :stop], n))  # (2, b, n, stop, 2)
            measured.append(F.pad(y_sigma, (0, 0, 0, T - stop, 0, N - s.shape[1]), value=1.0))  # finite
        y, sigma = torch.cat(measured, 1)[:, torch.cat([rows for rows, _ in groups]).argsort()]
        q_a = _tracks_given(self.dynamics, y, torch.where(observed.unsqueeze(-1), sigma.square(), UNSEEN))
        return q_a, q_a.component

    def _measure(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and sqrt(R); a tracking head also receives the share of pixels that show other things."""
        others = self.pixel_evidence.statistics.others
        tracks = any(isinstance(part, TrackingHead) for part in self.head.modules())
        told = {"others": others} if others and tracks else {}
        return self.head(s, images, n_objects, **told)  # type: ignore[no-any-return]


def sequences_alike(frames_seen: Tensor, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns groups of sequences of which the same frames are seen, and among them the same ones are black.

    Where tracks start depends on both, and must not depend on the other sequences of a batch.

    Args:
        frames_seen: (B, T) bool.
        seen: (B, T, H, W), black in the other frames.

    Returns:
        The indices of the sequences of each group, and of the frames seen; the first frame if none is.
    """
    T = frames_seen.shape[1]
    each, group = torch.cat([frames_seen, seen.flatten(2).amax(-1) > 0], 1).unique(dim=0, return_inverse=True)
    each[:, 0] |= ~each[:, :T].any(1)
    return [((group == i).nonzero().squeeze(1), mask[:T].nonzero().squeeze(1)) for i, mask in enumerate(each)]


def _tracks_given(dynamics: Dynamics, y: Tensor, R: Tensor) -> ConditionedTracks | FilteredTracks:
    """Returns p(a | y) in the form that suits the number of frames."""
    return (ConditionedTracks if y.shape[-2] <= DENSE_FRAMES else FilteredTracks)(dynamics, y, R)


@torch.no_grad()
def factor_sum(C: Tensor, R: Tensor) -> Tensor:
    """Returns the Cholesky factors (..., d, d) of C + diag R for one C (d, d) and every R (..., d)."""
    S = C.expand(*R.shape, -1).clone()
    S.diagonal(dim1=-2, dim2=-1).add_(R)
    return torch.linalg.cholesky_ex(S).L


def solve_sum(C: Tensor, R: Tensor, b: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (C + diag R)^-1 b and log det (C + diag R), differentiable in C, R and b.

    The gradient is computed from the solution, not through the Cholesky factors, and summed over sequences at once:
    several times faster than autograd for many small matrices.

    Args:
        C: (d, d), symmetric positive definite.
        R: (..., d), above 0.
        b: (..., d, m).
        L: the Cholesky factors (..., d, d) from `factor_sum`.

    Returns:
        (..., d, m) and (...).
    """
    return _SolveSum.apply(C, R, b, L)  # type: ignore[no-any-return]


def solve_sum_reference(C: Tensor, R: Tensor, b: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the same as `solve_sum`, by its own Cholesky factors, with gradients by autograd."""
    L = torch.linalg.cholesky_ex(C + torch.diag_embed(R)).L
    return cholesky_solve(b, L), 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class _SolveSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, R: Tensor, b: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
        x = cholesky_solve(b, L)
        ctx.save_for_backward(x, C, R, b, L)
        ctx.set_materialize_grads(False)
        return x, 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients(solve_sum_reference, inputs, [grad_x, grad_log_det])
        L = inputs[-1]
        d = L.shape[-1]
        grad_b = torch.zeros_like(x) if grad_x is None else cholesky_solve(grad_x, L)
        grad_R = -(grad_b * x).sum(-1)
        grad_C = -torch.einsum("rim,rjm->ij", *(columns.reshape(-1, *x.shape[-2:]) for columns in (grad_b, x)))
        if grad_log_det is not None:
            W = cholesky_inverse(L)
            W = W if W.is_contiguous() else W.mT  # the same, as W is symmetric
            grad_R = grad_R + grad_log_det.unsqueeze(-1) * W.diagonal(dim1=-2, dim2=-1)
            grad_C = grad_C + (grad_log_det.reshape(1, -1) @ W.reshape(-1, d * d)).view(d, d)
        return grad_C, grad_R, grad_b, None


def _frame_blocks(cov: Tensor) -> Tensor:
    """Returns the diagonal blocks (..., T, 2, 2) of covariances (..., 2T, 2T)."""
    T = cov.shape[-1] // 2
    t = torch.arange(T, device=cov.device)
    return cov.unflatten(-1, (T, 2)).unflatten(-3, (T, 2))[..., t, :, t, :].movedim(0, -3)
