"""Linear algebra of many small matrices that a CUDA graph can hold, and that is fast.

On a GPU `torch.cholesky_solve`, `cholesky_inverse`, and from some size on `linalg.inv`, `det` and `solve`, go to MAGMA
for batches of matrices. MAGMA allocates memory of its own, which a recording does not permit
(`training.step_runners.CapturedSteps`); triangular solves and products are permitted. Where the fastest way depends on
the device, it is chosen here.
"""

import torch
from torch import Tensor


def cholesky_solve(b: Tensor, L: Tensor) -> Tensor:
    """(L L')^-1 b by two triangular solves, for b (..., d, n) and lower L (..., d, d)."""
    white = torch.linalg.solve_triangular(L, b, upper=False)
    return torch.linalg.solve_triangular(L.mT, white, upper=True)


def cholesky_inverse(L: Tensor) -> Tensor:
    """(L L')^-1 (..., d, d) from lower L (..., d, d): LAPACK's on a CPU, elsewhere L^-T L^-1."""
    if L.device.type == "cpu":
        return torch.cholesky_inverse(L)
    whiten = inverse_lower(L)
    return whiten.mT @ whiten


def inverse_lower(L: Tensor) -> Tensor:
    """L^-1 (..., d, d) of lower L (..., d, d)."""
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity, upper=False)


def inverse_2x2(M: Tensor) -> Tensor:
    """M^-1 of matrices (..., 2, 2), in closed form."""
    a, b, c, d = M.flatten(-2).unbind(-1)
    return torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)) / det_2x2(M)[..., None, None]


def det_2x2(M: Tensor) -> Tensor:
    """Determinants (...) of matrices (..., 2, 2)."""
    a, b, c, d = M.flatten(-2).unbind(-1)
    return a * d - b * c


def categorical_sample(probs: Tensor) -> Tensor:
    """One draw (...) from each of the distributions ``probs`` (..., K), with the random numbers of `torch.multinomial`.

    An exponential race: p_k over an exponential variate is largest at k with probability p_k. Nothing is checked, for
    which `multinomial` would wait for the device in versions of torch before 2.5.
    """
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)
