"""The joint Gaussian over the positions in all frames: Eq (3) with the states integrated out."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels.lgssm.kalman import LGSSM, ConstantVelocity
from pyro_pixels.lgssm.sharing import once

KEPT_FRAMES = 128  # constants of sequences up to this length are kept: at most 0.7 MB each


class Response(NamedTuple):
    """The stacked observations as a linear-Gaussian function of the first state, a_{1:T} = F h_1 + drift + N(0, V)."""

    F: Tensor  # (T p, d)
    drift: Tensor  # (T p,)
    V: Tensor  # (T p, T p)


def response(lgssm: LGSSM, n_steps: int) -> Response:
    """Returns a_{1:T} given h_1, Eq (3) with all later states integrated out, without a loop over T.

    With F_j = B A^j: a_t = F_{t-1} h_1 + sum_{j < t-1} F_j (u + eta) + noise. The distribution of h_1 in ``lgssm`` is
    not used.
    """
    A, B, u, Sigma_H, Sigma_A, _, _ = lgssm
    make = _uniform_response if isinstance(lgssm, ConstantVelocity) else _response
    return once("response", lambda: make(A, B, u, Sigma_H, Sigma_A, n_steps), A, u, Sigma_H, Sigma_A, n_steps)


def _response(A: Tensor, B: Tensor, u: Tensor, Sigma_H: Tensor, Sigma_A: Tensor, n_steps: int) -> Response:
    """V is G Sigma_H G' plus Sigma_A on the diagonal blocks, where G is the block-Toeplitz matrix of the F_j."""
    F = _after(B, A, n_steps)  # (T, p, d)
    T, p, d = F.shape
    falling = torch.cat([F.flip(0), torch.zeros_like(F)])  # F_{T-1}, ..., F_0, 0, ..., 0
    # The entry of G in row (t, i) and column (s, j) is F_{t-1-s}[i, j], or 0 for s >= t; s takes T - 1 values.
    G = falling.unfold(0, T - 1, 1)[1 : T + 1].flip(0).movedim(-1, 2).reshape(T * p, T - 1, d)
    V = (G @ Sigma_H).flatten(1) @ G.flatten(1).mT + on_diagonal(Sigma_A, T)
    return Response(F.flatten(0, 1), G.sum(1) @ u, V)


def _uniform_response(A: Tensor, B: Tensor, u: Tensor, Sigma_H: Tensor, Sigma_A: Tensor, n_steps: int) -> Response:
    """The same for A^j = I + j N: F_j = B + j B N is linear in j, so the sums over j depend on T alone.

    With R = [B; B N], the block of V for frames t and t' is sum_{xy} (sum_j j^x j'^y) (R Sigma_H R')_{xy}, where the
    inner sum is over the noises that act on both frames, j and j' steps before them, and x, y are 0 or 1.
    """
    T, (p, d) = n_steps, B.shape
    one_and_j, sums, products = _sums_over_steps(T, A.dtype, A.device)
    R = torch.cat([B, B @ A - B])  # (2 p, d)
    F = (one_and_j @ R.view(2, p * d)).view(T * p, d)
    drift = (sums @ (R @ u).view(2, p)).flatten()
    blocks = (R @ Sigma_H @ R.mT).view(2, p, 2, p).transpose(1, 2).reshape(4, p * p)
    V = products @ torch.cat([blocks, Sigma_A.reshape(1, p * p)])  # (T^2, p^2)
    return Response(F, drift, V.view(T, T, p, p).transpose(1, 2).reshape(T * p, T * p))


_KEPT: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def _sums_over_steps(T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `_sums`, computed once for short sequences and never freed, because recorded steps read them."""
    key = T, dtype, device
    if key in _KEPT:
        return _KEPT[key]
    made = _sums(*key)
    plain = all(type(x) is Tensor for x in made)  # a fake tensor is not, and what a recording makes is its own
    if T <= KEPT_FRAMES and plain and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _KEPT[key] = made
    return made


@torch.inference_mode(False)
def _sums(T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [1, j] (T, 2), its sums over j < t (T, 2), and the factors of V in `_uniform_response` (T^2, 5).

    For each pair of frames, the factors are the sums of j^x j'^y over the noises that act on both, for the four pairs
    of x and y, and 1 or 0 for whether the two frames are the same.
    """
    j = torch.arange(T, dtype=dtype, device=device)
    one_and_j = torch.stack([torch.ones_like(j), j], 1)
    since = j.unsqueeze(1) - j[1:]  # (T, T - 1), steps since each noise
    acted = torch.stack([(since >= 0).to(dtype), since.clamp(min=0)], -1)  # (T, T - 1, 2)
    products = torch.einsum("tsx,usy->tuxy", acted, acted).flatten(2)
    same = torch.eye(T, dtype=dtype, device=device).unsqueeze(-1)
    return one_and_j, acted.sum(1), torch.cat([products, same], -1).flatten(0, 1)


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
