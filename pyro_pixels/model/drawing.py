"""The choice between torch operations and Triton kernels for the canvas of Eq (1) (`_fused`)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_pixels._fused import choose, normal


def fastest(draw: Any, a: Tensor) -> Any:
    """Returns `renderer.draw` or what computes the same faster, for positions such as ``a``."""
    return choose(a, draw, partial(_fused, draw), largest_difference)


def _fused(draw: Any) -> Any:
    from pyro_pixels.model import fused_canvas  # imports Triton

    return partial(fused_canvas.FusedCanvas.apply, draw)


def largest_difference(draw: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of canvases and gradients, of order 1, between a function and `renderer.draw`."""
    generator, differences = torch.Generator().manual_seed(0), []  # leaves the global random state alone
    for B, N, T, D in ((1, 1, 1, 3), (2, 3, 5, 70), (3, 2, 30, 200)):
        shapes = (B, N, T, 2), (D,), (D, 2), (D,), (D, 2), (D,)
        drawn = [normal(generator, *shape) for shape in shapes]
        present = torch.tensor([[n < N - B + b + 1 for n in range(N)] for b in range(B)], device=device)
        results = []
        for each in (draw, function):
            a, *weights = (x.to(device).requires_grad_() for x in drawn)
            with torch.enable_grad():
                x = each(a, present, *weights)
                results.append((x, *torch.autograd.grad(x.square().mean(), (a, *weights))))
        differences += [(found - wanted).detach().abs().max() for found, wanted in zip(*results)]
    return float(torch.stack(differences).max())  # NaN if any is
