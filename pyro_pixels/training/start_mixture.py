"""EM for the mixture over h_1 of Eq (4), pi, mu_k and Sigma_k, given tracks.

The mixture is learned by gradient like all other parameters, but components that start at the same place stay there,
because the distance between launches is large for steps of 1e-3. Maximum likelihood given tracks does not have this
problem and costs less than one training step, so `fit` can set the mixture this way (`Schedule.fit_starts_at`). The
paper has no such step.
"""

import copy
import math

import torch
from torch import Tensor

from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.lgssm.marginal import response

LEAST_TRACKS = 10  # per component
VARIANCE_FLOOR = 1e-5  # latent units, the least variance of Sigma_k in any direction


@torch.no_grad()
def fit_starts(dynamics: Dynamics, a: Tensor, *, n_restarts: int = 10, n_iterations: int = 100, seed: int = 0) -> float:
    """Fits pi, mu_k and Sigma_k to tracks by maximum likelihood; all other parameters stay fixed.

    Given h_1, a track has mean F h_1 + drift and covariance V. Its likelihood as a function of h_1 is proportional to
    N(m; h_1, P) with P = (F' V^-1 F)^-1, the same for every track, and m = P F' V^-1 (a - drift). So this is EM for a
    mixture observed with noise P (Bovy, Hogg and Roweis, 2011).

    Args:
        dynamics: the dynamics, changed in place.
        a: (n, T, 2), tracks of single objects, such as samples from q(a | v): at least 2 frames, and 10 tracks per
            component.
        n_restarts: the number of initialisations from different tracks; the most likely result is kept.
        n_iterations: the number of EM iterations.
        seed: seeds the choice of tracks.

    Returns:
        The mean over tracks of log p(m), in nats.

    Raises:
        ValueError: if there are too few tracks or frames, or ``dynamics`` is of a subclass whose `lgssm` has other
            starts than those that `set_starts` sets.
    """
    K = dynamics.config.n_components
    if a.dim() != 3 or a.shape[1] < 2 or len(a) < LEAST_TRACKS * K:
        raise ValueError(
            f"tracks have shape {tuple(a.shape)}; wanted (n >= {LEAST_TRACKS * K}, T >= 2, 2) to fit {K} starts"
        )
    m, P = _seen_starts(dynamics, a)
    floor = VARIANCE_FLOOR * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(len(m), generator=generator)[:K] for _ in range(n_restarts)])
    mu = m[first]  # (R, K, d)
    Sigma = (m.mT.cov() / K + floor).expand(n_restarts, K, -1, -1)
    log_pi = torch.full((n_restarts, K), -math.log(K), dtype=m.dtype, device=m.device)
    for _ in range(n_iterations):
        log_joint = log_pi + _log_normal(m[:, None, None] - mu, Sigma + P)  # (n, R, K)
        r = log_joint.softmax(-1)
        G = torch.linalg.solve(Sigma + P, Sigma).mT  # Sigma (Sigma + P)^-1
        h = mu + ((m[:, None, None] - mu).unsqueeze(-2) @ G.mT).squeeze(-2)  # E[h_1 | m, z = k], (n, R, K, d)
        share = r.sum(0)
        mu = torch.einsum("nrk,nrki->rki", r, h) / share[..., None]
        spread = h - mu
        within = torch.einsum("nrk,nrki,nrkj->rkij", r, spread, spread) / share[..., None, None]
        Sigma = within + Sigma - G @ Sigma + floor
        log_pi = (share / len(m)).log()
    fit = (log_pi + _log_normal(m[:, None, None] - mu, Sigma + P)).logsumexp(-1).mean(0)  # (R,)
    best = fit.nan_to_num(-torch.inf).argmax()
    _set_starts(dynamics, log_pi[best], mu[best], Sigma[best])
    return float(fit[best])


def _set_starts(dynamics: Dynamics, log_pi: Tensor, mu: Tensor, Sigma: Tensor) -> None:
    """Sets the starts and checks that they are then those of `lgssm`; otherwise nothing changes."""
    before = copy.deepcopy(dynamics.state_dict())
    try:
        dynamics.set_starts(log_pi, mu, Sigma)
        found = dynamics.lgssm()[-2:]
        done = all(
            torch.allclose(x, y, rtol=1e-3, atol=1e-5 * float(y.abs().max())) for x, y in zip(found, (mu, Sigma))
        )
    except RuntimeError:  # of states with another number of dimensions
        done = False
    if not done:
        dynamics.load_state_dict(before)
        raise ValueError(
            f"{type(dynamics).__name__}.lgssm has other starts than those that set_starts sets, so they cannot be "
            "fitted to tracks; override set_starts as well, or train with Schedule(fit_starts_at=())"
        )


def _seen_starts(dynamics: Dynamics, a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns m (n, d) and P (d, d) of tracks a (n, T, 2)."""
    F, drift, V = response(dynamics.lgssm(), a.shape[1])
    V_inv_F = torch.linalg.solve(V, F)
    P = torch.linalg.inv(F.mT @ V_inv_F)
    return (a.to(V.dtype).flatten(1) - drift) @ V_inv_F @ P, P


def _log_normal(e: Tensor, cov: Tensor) -> Tensor:
    """Returns log N(e; 0, cov) for e (n, ..., d) and cov (..., d, d)."""
    L = torch.linalg.cholesky_ex(cov).L
    white = torch.linalg.solve_triangular(L, e.movedim(0, -1), upper=False)  # (..., d, n)
    log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (-0.5 * white.square().sum(-2)).movedim(-1, 0) - log_det - 0.5 * e.shape[-1] * math.log(2 * math.pi)
