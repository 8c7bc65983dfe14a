"""Weights of pyro_pixels under the parameter names of examples/paper_in_pyro.py, and that program with them."""

from examples.paper_in_pyro import PaperInPyro, Settings

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_pixels.guides.heads import LinearHead
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.model.pixel_model import PixelModel

ROOTS = {"root_Sigma_H": "root_H", "root_Sigma_A": "root_A", "root_Sigma": "root_k"}


def paper_program(model: PixelModel, guide: RecurrentGuide) -> PaperInPyro:
    """Returns the paper's program with the sizes and the weights of a model and a guide.

    Its Sigma_A is ours without `DynamicsConfig.position_noise_floor`, which the paper does not have.

    Raises:
        ValueError: if the guide is not the paper's, or its state size differs from the renderer's.
    """
    renderer, D = model.renderer, len(model.renderer.theta_x0)
    if not isinstance(guide.rnn, InferenceRNN) or guide.rnn.state_size != D:
        raise ValueError(f"the guide's states do not fit a renderer with D = {D}; wanted an InferenceRNN of that size")
    program = PaperInPyro(Settings(H=renderer.height, W=renderer.width, D=D), guide.rnn.max_objects)
    program.load_state_dict(in_paper_names(model, guide))
    return program


def in_paper_names(
    model: PixelModel, guide: RecurrentGuide, read: Callable[[Tensor], Tensor] = torch.detach
) -> dict[str, Tensor]:
    """Returns ``read`` of each of our parameters (its value or its gradient), under the paper program's names."""
    if not isinstance(guide.head, LinearHead):
        raise ValueError(f"the guide has a {type(guide.head).__name__}; wanted a LinearHead, the paper's")
    renderer, rnn = model.renderer, guide.rnn
    assert isinstance(rnn, InferenceRNN)
    found = {f"dynamics.{ROOTS.get(name, name)}": read(p) for name, p in model.dynamics.named_parameters()}
    found |= {"renderer.theta_x0": read(renderer.theta_x0), "network.phi_s0": read(rnn.phi_s0)}
    layers = {
        "renderer.alpha": renderer.to_alpha,
        "renderer.x_hat": renderer.to_x,
        "renderer.v": renderer.to_v,
        "network.mu_sigma": guide.head.linear,
    }
    for name, layer in layers.items():
        found |= {f"{name}.weight": read(layer.weight), f"{name}.bias": read(layer.bias)}
    weights = torch.cat([read(rnn.from_states.weight), read(rnn.from_image.weight)], 1).chunk(2)
    for name, weight, bias in zip(("beta", "s_hat"), weights, read(rnn.from_states.bias).chunk(2)):
        found |= {f"network.{name}.weight": weight, f"network.{name}.bias": bias}
    return found
