"""The choice between torch operations and Triton kernels for the canvas of Eq (1) (`_fused`)."""

from typing import Any

import torch
from torch import Tensor

from pyro_pixels._fused import choose


def fastest(draw: Any, a: Tensor) -> Any:
    """Returns `renderer.draw` or what computes the same faster, for positions such as ``a``."""
    return choose(a, draw, _fused, largest_difference)


def _fused() -> Any:
    from pyro_pixels.model import fused_canvas  # imports Triton

    return fused_canvas.FusedCanvas.apply


def largest_difference(draw: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of canvases and gradients, of order 1, between a function and `renderer.draw`."""
    generator, differences = torch.Generator().manual_seed(0), []  # leaves the global random state alone
    for B, N, T, D in ((1, 1, 1, 3), (2, 3, 5, 70), (3, 2, 30, 200)):
        shapes = (B, N, T, 2), (D,), (D, 2), (D,), (D, 2), (D,)
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        present = torch.arange(N) < torch.arange(N - B + 1, N + 1)[:, None]
        results = []
        for each in (draw, function):
            a, *weights = (x.to(device).requires_grad_() for x in drawn)
            with torch.enable_grad():
                x = each(a, present.to(device), *weights)
                results.append((x, *torch.autograd.grad(x.square().mean(), (a, *weights))))
        differences += [(found - wanted).detach().abs().max() for found, wanted in zip(*results)]
    return float(torch.stack(differences).max())  # NaN if any is
