"""The choice between torch operations and Triton kernels for the canvas of Eq (1) (`_fused`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_pixels._fused import choose, normal


def fastest(renderer: Any, a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns `Renderer.draw`, or what computes the same faster, for positions such as ``a``."""
    layers = renderer.to_alpha, renderer.to_x
    function = choose(a, draw, _fused, largest_difference) if all(map(_is_plain, layers)) else draw
    if function is draw:
        return renderer.draw  # type: ignore[no-any-return]
    weights = renderer.theta_x0, *(w for layer in layers for w in (layer.weight, layer.bias))
    return lambda a, present: function(a, present, *weights)


def draw(
    a: Tensor, present: Tensor, theta_x0: Tensor, W_alpha: Tensor, b_alpha: Tensor, W_x: Tensor, b_x: Tensor
) -> Tensor:
    """Computes `Renderer.draw` from its weights."""
    x = theta_x0.tanh()
    for n in range(a.shape[-3]):
        alpha = torch.sigmoid(F.linear(a[..., n, :, :], W_alpha, b_alpha)) * present[..., n, None, None]
        x = torch.lerp(x, torch.tanh(F.linear(a[..., n, :, :], W_x, b_x)), alpha)
    return x


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does nothing but apply its weight and bias: no other module, parametrisation, or hook."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and layer.bias is not None and not any(hooks)


def _fused() -> Any:
    from pyro_pixels.model import fused_canvas  # imports Triton

    return partial(fused_canvas.FusedCanvas.apply, draw)


def largest_difference(plain: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of canvases and gradients, of order 1, between a function and the plain one."""
    generator, differences = torch.Generator().manual_seed(0), []  # leaves the global random state alone
    for B, N, T, D in ((1, 1, 1, 3), (2, 3, 5, 70), (3, 2, 30, 200)):
        shapes = (B, N, T, 2), (D,), (D, 2), (D,), (D, 2), (D,)
        drawn = [normal(generator, *shape) for shape in shapes]
        present = torch.tensor([[n < N - B + b + 1 for n in range(N)] for b in range(B)], device=device)
        results = []
        for each in (plain, function):
            a, *weights = (x.to(device).requires_grad_() for x in drawn)
            with torch.enable_grad():
                x = each(a, present, *weights)
                results.append((x, *torch.autograd.grad(x.square().mean(), (a, *weights))))
        differences += [(found - wanted).detach().abs().max() for found, wanted in zip(*results)]
    return float(torch.stack(differences).max())  # NaN if any is
