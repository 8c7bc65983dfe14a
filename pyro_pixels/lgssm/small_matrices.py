"""Fast linear algebra for batches of small matrices that can be recorded in a CUDA graph.

On a GPU `torch.cholesky_solve`, `cholesky_inverse` and, above some size, `linalg.inv`, `det` and `solve` use MAGMA for
batches of matrices. MAGMA allocates its own memory, which a recording (`training.step_runners.CapturedSteps`) does not
permit; triangular solves and products are permitted. Where the fastest method depends on the device, it is chosen here.
"""

import torch
from torch import Tensor


def cholesky_solve(b: Tensor, L: Tensor) -> Tensor:
    """Returns (L L')^-1 b by two triangular solves, for b (..., d, n) and lower L (..., d, d)."""
    white = torch.linalg.solve_triangular(L, b, upper=False)
    return torch.linalg.solve_triangular(L.mT, white, upper=True)


def cholesky_inverse(L: Tensor) -> Tensor:
    """Returns (L L')^-1 (..., d, d) for lower L (..., d, d): by LAPACK on a CPU, elsewhere as L^-T L^-1."""
    if L.device.type == "cpu":
        return torch.cholesky_inverse(L)
    whiten = inverse_lower(L)
    return whiten.mT @ whiten


def inverse_lower(L: Tensor) -> Tensor:
    """Returns L^-1 (..., d, d) for lower L (..., d, d)."""
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity, upper=False)


def inverse_2x2(M: Tensor) -> Tensor:
    """Returns the inverses of matrices (..., 2, 2) in closed form."""
    a, b, c, d = M.flatten(-2).unbind(-1)
    return torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)) / det_2x2(M)[..., None, None]


def det_2x2(M: Tensor) -> Tensor:
    """Returns the determinants (...) of matrices (..., 2, 2)."""
    a, b, c, d = M.flatten(-2).unbind(-1)
    return a * d - b * c


def categorical_sample(probs: Tensor) -> Tensor:
    """Draws a component (...) from each of the distributions ``probs`` (..., K), as `torch.multinomial` does.

    This is an exponential race: p_k divided by an exponential variate is largest at k with probability p_k. The random
    numbers are those of `torch.multinomial`, but ``probs`` are not checked, because before torch 2.5 that check waits
    for the device.
    """
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)
