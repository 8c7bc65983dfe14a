"""The paper's guide (Sec 2.2.1, Eqs 8-9)."""

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import LinearHead
from pyro_pixels.guides.inference_rnn import StateNetwork


class RecurrentGuide(Guide):
    """The paper's guide, Eqs (8)-(9): q(a | v) = prod_{n,t} N(a_t^n; mu(s_t^n), sigma^2(s_t^n)).

    Args:
        rnn: the network that computes the states s_t^n.
        head: maps s_t^n to mean and standard deviation; by default the paper's `LinearHead`.
    """

    def __init__(self, rnn: StateNetwork, head: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = LinearHead(rnn.state_size) if head is None else head

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """Returns independent Normals with the head's means and standard deviations."""
        s = self.rnn(images, n_objects)
        mu, sigma = self.head(s, images, n_objects)
        return dist.Normal(mu, sigma, validate_args=False).to_event(2)
