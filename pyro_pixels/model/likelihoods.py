"""What pixels are, given the renderer's logits: p(v | a), the last line of Eq (2), and others for grey images.

A `PixelLikelihood` is passed to `PixelModel`. It maps logits to a distribution over images, and to the image that is
expected, which queries show.

Departures from the paper: none by default, `BernoulliPixels`. The others are for values in [0, 1]; the log-likelihoods
of theirs are log densities, which may be above 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelLikelihood(nn.Module, ABC):
    """p(v | logits), pixels independent. Parameters are learned with the model's."""

    is_density: ClassVar[bool] = True
    """Whether log-likelihoods are those of a density, so that zero nats mean nothing."""

    @abstractmethod
    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        """For logits (..., T, H, W): batch shape (...), event shape (T, H, W)."""

    def mean(self, logits: Tensor) -> Tensor:
        """The expected image, of the shape of the logits and within [0, 1]."""
        return logits.sigmoid()


class FastBernoulli(dist.Bernoulli):
    """Bernoulli whose log density, v l - log(1 + exp(l)) of logits l, takes two thirds of the time of torch's."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - F.softplus(self.logits)


class BernoulliPixels(PixelLikelihood):
    """Eq (2): a pixel is white with probability sigm(logit). Values in [0, 1] count as shares of white."""

    is_density = False

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return FastBernoulli(logits=logits, validate_args=False).to_event(3)


class ContinuousBernoulliPixels(PixelLikelihood):
    """A density on [0, 1] proportional to p^v (1 - p)^(1 - v), p = sigm(logit) (Loaiza-Ganem and Cunningham, 2019)."""

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return dist.ContinuousBernoulli(logits=logits, validate_args=False).to_event(3)

    def mean(self, logits: Tensor) -> Tensor:
        return dist.ContinuousBernoulli(logits=logits, validate_args=False).mean


class GaussianPixels(PixelLikelihood):
    """N(v; sigm(logit), std^2), one standard deviation for all pixels, learned by default.

    Args:
        std: where it starts, or what it stays at.
        learned: False holds it.

    Raises:
        ValueError: if ``std`` is not above 0.
    """

    log_std: Tensor  # ()

    def __init__(self, std: float = 0.1, *, learned: bool = True) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise ValueError(f"std is {std}; wanted a number above 0, such as 0.1")
        log_std = torch.tensor(math.log(std))
        if learned:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return dist.Normal(logits.sigmoid(), self.log_std.exp().expand_as(logits), validate_args=False).to_event(3)


LIKELIHOODS: dict[str, Callable[[], PixelLikelihood]] = {
    "bernoulli": BernoulliPixels,  # the paper's
    "continuous_bernoulli": ContinuousBernoulliPixels,
    "gaussian": GaussianPixels,
}
"""Likelihoods that a configuration can name; add your own to train and load it by name."""
