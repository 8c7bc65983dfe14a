"""The joint Gaussian over the positions in all frames: Eq (3) with the states integrated out."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels.lgssm.kalman import LGSSM
from pyro_pixels.lgssm.sharing import once


class Response(NamedTuple):
    """The stacked observations as a linear-Gaussian function of the first state, a_{1:T} = F h_1 + drift + N(0, V)."""

    F: Tensor  # (T p, d)
    drift: Tensor  # (T p,)
    V: Tensor  # (T p, T p)


def response(lgssm: LGSSM, n_steps: int) -> Response:
    """Returns a_{1:T} given h_1, Eq (3) with all later states integrated out, without a loop over T.

    With F_j = B A^j: a_t = F_{t-1} h_1 + sum_{j < t-1} F_j (u + eta) + noise. So V is G Sigma_H G' plus Sigma_A on the
    diagonal blocks, where G is the block-Toeplitz matrix of the F_j. The distribution of h_1 in ``lgssm`` is not used.
    """
    A, B, u, Sigma_H, Sigma_A, _, _ = lgssm
    return once("response", lambda: _response(A, B, u, Sigma_H, Sigma_A, n_steps), A, u, Sigma_H, Sigma_A, n_steps)


def _response(A: Tensor, B: Tensor, u: Tensor, Sigma_H: Tensor, Sigma_A: Tensor, n_steps: int) -> Response:
    F = _after(B, A, n_steps)  # (T, p, d)
    T, p, d = F.shape
    falling = torch.cat([F.flip(0), torch.zeros_like(F)])  # F_{T-1}, ..., F_0, 0, ..., 0
    # The entry of G in row (t, i) and column (s, j) is F_{t-1-s}[i, j], or 0 for s >= t; s takes T - 1 values.
    G = falling.unfold(0, T - 1, 1)[1 : T + 1].flip(0).movedim(-1, 2).reshape(T * p, T - 1, d)
    V = (G @ Sigma_H).flatten(1) @ G.flatten(1).mT + on_diagonal(Sigma_A, T)
    return Response(F.flatten(0, 1), G.sum(1) @ u, V)


def on_diagonal(block: Tensor, n: int) -> Tensor:
    """Returns the block-diagonal matrix of ``n`` copies of a block (i, j)."""
    return torch.kron(torch.eye(n, dtype=block.dtype, device=block.device), block)


def marginal_moments(lgssm: LGSSM, n_steps: int) -> tuple[Tensor, Tensor]:
    """Returns mean (..., T p) and covariance (..., T p, T p) of the stacked a_{1:T}, Eq (3) with h integrated out."""
    return start_moments(response(lgssm, n_steps), lgssm.mu, lgssm.Sigma)


def start_moments(response: Response, mu: Tensor, Sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the moments of `marginal_moments` for starts h_1 ~ N(mu (..., d), Sigma (..., d, d))."""
    F, drift, V = response
    return mu @ F.mT + drift, F @ Sigma @ F.mT + V


def _after(B: Tensor, A: Tensor, n: int) -> Tensor:
    """Returns B A^0, ..., B A^{n-1} as (n, p, d), by repeated doubling."""
    after, step = B.unsqueeze(0), A
    while len(after) < n:
        after = torch.cat([after, after @ step])
        step = step @ step if len(after) < n else step
    return after[:n]
