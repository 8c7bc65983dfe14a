"""Where the paper's inference network starts learning: departures from Sec 3.2 in starting values alone.

What is learned stays Eqs (8)-(9). With the paper's starting weights the first map from an object's place in the image
to the latent plane is as random as white noise: neighbouring pixels lead to unrelated states. docs/learning.md measures
what that does to learning, and what the starts below are worth.
"""

import torch
from torch import Tensor, nn

from pyro_pixels.guides.inference_rnn import InferenceRNN

RAMP, WHITE = 3.0, 0.3  # weights of the ramps, and of the white noise beside them
MASK_BIAS = 1.0  # of b^beta; sigm(1) = 0.73


@torch.no_grad()
def start_as_ramps(rnn: InferenceRNN, *, ramp: float = RAMP, white: float = WHITE) -> None:
    """Draws the image's columns of W^beta and W^s anew, each unit's weights a linear ramp across the image.

    The weight of pixel (x, y), column and row in [-1, 1], is std (ramp (p x + q y) + white e) with p, q ~ N(0, 1) drawn
    for each unit, e ~ N(0, 1) for each weight, and std the paper's. What a unit is told of an image is then nearly a
    linear function of the places of its white pixels.

    Args:
        rnn: changed in place; it must read pixels, not a front end.
        ramp: weight of the ramp.
        white: weight of the noise; with ramp 0 and white 1 the paper's start.

    Raises:
        ValueError: if the network reads something else than pixels.
    """
    W: Tensor = rnn.from_image.weight  # (2 D, H W)
    if not isinstance(rnn.front_end, nn.Flatten):
        raise ValueError("ramps are for a network that reads pixels; this one has a front_end")
    std = (rnn.state_size * (2 * rnn.state_size + W.shape[1])) ** -0.25  # as in `InferenceRNN`
    rows, columns = torch.linspace(-1, 1, rnn.height), torch.linspace(-1, 1, rnn.width)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).flatten(1)  # (2, H W): column, row
    p_q, e = torch.randn(len(W), 2), torch.randn(W.shape)
    W.copy_(std * (ramp * p_q @ grid + white * e))


@torch.no_grad()
def start_alike(rnn: InferenceRNN, *, own: float = 0.1) -> None:
    """Draws s_0^n of all objects and all N together: that of N = 1 plus ``own`` times what each had.

    All objects then begin in one and the same space, and N = 1 teaches the others where it is.

    Args:
        rnn: changed in place.
        own: share of their own.
    """
    phi_s0 = rnn.phi_s0
    phi_s0.copy_(phi_s0[0, 0] + own * phi_s0)


@torch.no_grad()
def start_with_memory(rnn: InferenceRNN, *, gain: float = 1.0, mask_bias: float = MASK_BIAS) -> None:
    """Adds ``gain`` times the identity to the columns of W^s that act on s_{t-1}^n, and sets b^beta to ``mask_bias``.

    With the paper's start a state is forgotten within a few frames, and two objects are first told apart by where they
    are: the left one and the right one. If that is what separates them, they bounce off each other wherever balls
    cross, and learning stalls. With memory they can be told apart by where they came from from the start.
    (The identity as a start of recurrent weights: Le, Jaitly and Hinton, 2015.)

    Args:
        rnn: changed in place.
        gain: of the identity.
        mask_bias: start of b^beta: how much of the new contribution is taken, against s_t^{n-1}.
    """
    D = rnn.state_size
    W = rnn.from_states.weight  # rows: mask, contribution; columns: s_{t-1}^n, s_t^{n-1}
    W[D:, :D] += gain * torch.eye(D, dtype=W.dtype, device=W.device)
    rnn.from_states.bias[:D] = mask_bias
