"""Starting values for the paper's inference network that depart from Sec 3.2.

The network remains that of Eqs (8)-(9). With the paper's starting weights, the initial map from an object's place in
the image to the latent plane is as random as white noise: neighbouring pixels lead to unrelated states.
docs/learning.md measures how this affects learning, and how much the starts below help.
"""

import torch
from torch import Tensor, nn

from pyro_pixels.guides.inference_rnn import InferenceRNN

RAMP, WHITE = 3.0, 0.3  # weights of the ramps, and of the white noise added to them
MASK_BIAS = 1.0  # starting value of b^beta; sigm(1) = 0.73


@torch.no_grad()
def start_as_ramps(rnn: InferenceRNN, *, ramp: float = RAMP, white: float = WHITE) -> None:
    """Redraws the image's columns of W^beta and W^s so that each unit's weights are a linear ramp across the image.

    The weight of pixel (x, y), column and row in [-1, 1], is std (ramp (p x + q y) + white e) with p, q ~ N(0, 1) drawn
    for each unit, e ~ N(0, 1) for each weight, and std that of the paper. A unit's input from an image is then nearly a
    linear function of the places of the image's white pixels.

    Args:
        rnn: changed in place; it must read pixels, not a front end.
        ramp: weight of the ramp.
        white: weight of the noise; ramp 0 and white 1 give the paper's start.

    Raises:
        ValueError: if the network reads something other than pixels.
    """
    W: Tensor = rnn.from_image.weight  # (2 D, H W)
    if not isinstance(rnn.front_end, nn.Flatten):
        raise ValueError("start_as_ramps needs a network that reads pixels; this one has a front_end")
    std = (rnn.state_size * (2 * rnn.state_size + W.shape[1])) ** -0.25  # as in `InferenceRNN`
    rows, columns = torch.linspace(-1, 1, rnn.height), torch.linspace(-1, 1, rnn.width)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).flatten(1)  # (2, H W): column, row
    p_q, e = torch.randn(len(W), 2), torch.randn(W.shape)
    W.copy_(std * (ramp * p_q @ grid + white * e))


@torch.no_grad()
def start_alike(rnn: InferenceRNN, *, own: float = 0.1) -> None:
    """Moves s_0^n of all objects and all N close together: to that of N = 1 plus ``own`` times each one's old value.

    All objects then start in the same region of the state space, which the network also learns from N = 1.

    Args:
        rnn: changed in place.
        own: factor of the old values.
    """
    phi_s0 = rnn.phi_s0
    phi_s0.copy_(phi_s0[0, 0] + own * phi_s0)


@torch.no_grad()
def start_with_memory(rnn: InferenceRNN, *, gain: float = 1.0, mask_bias: float = MASK_BIAS) -> None:
    """Adds ``gain`` times the identity to the columns of W^s that act on s_{t-1}^n, and sets b^beta to ``mask_bias``.

    With the paper's start a state is forgotten within a few frames, so the network first tells two objects apart by
    where they are, such as the left one and the right one. Then they bounce off each other wherever balls cross, and
    learning stalls. With memory, the network can tell them apart by where they came from, right from the start.
    (The identity as a start of recurrent weights: Le, Jaitly and Hinton, 2015.)

    Args:
        rnn: changed in place.
        gain: factor of the identity.
        mask_bias: starting value of b^beta, which weighs the new contribution against s_t^{n-1}.
    """
    D = rnn.state_size
    W = rnn.from_states.weight  # rows: mask, contribution; columns: s_{t-1}^n, s_t^{n-1}
    W[D:, :D] += gain * torch.eye(D, dtype=W.dtype, device=W.device)
    rnn.from_states.bias[:D] = mask_bias
