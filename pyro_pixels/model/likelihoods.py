"""Pixel likelihoods p(v | a) given the renderer's logits: the last line of Eq (2), and others for grey images.

A `PixelLikelihood` is passed to `PixelModel`. It maps logits to a distribution over images and to the expected image,
which the queries return.

Departures from the paper: none with the default, `BernoulliPixels`. The others are for values in [0, 1]; their
log-likelihoods are log densities and may be above 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn


class PixelLikelihood(nn.Module, ABC):
    """The base class of likelihoods p(v | logits) of independent pixels; parameters are trained with the model's."""

    is_density: ClassVar[bool] = True
    """Whether log-likelihoods are log densities, for which zero nats have no special meaning."""

    def __call__(self, logits: Tensor) -> dist.TorchDistribution:
        """Returns `forward` of logits (..., T, H, W) after a check of the shapes, which reads no values.

        Raises:
            ValueError: if `forward` returns something else than a distribution of Pyro's with batch shape (...) and
                event shape (T, H, W).
        """
        p_v, name = super().__call__(logits), type(self).__name__
        if not isinstance(p_v, TorchDistributionMixin):
            kind = f"{type(p_v).__module__}.{type(p_v).__qualname__}".removeprefix("builtins.")
            raise ValueError(f"the likelihood {name} returned a {kind}; wanted one of pyro.distributions")
        batch, event = logits.shape[:-3], logits.shape[-3:]
        if p_v.batch_shape != batch or p_v.event_shape != event:
            raise ValueError(
                f"the likelihood {name} returned a distribution of batch shape {tuple(p_v.batch_shape)} and event "
                f"shape {tuple(p_v.event_shape)}; wanted {tuple(batch)} and (T, H, W) = {tuple(event)}; "
                "`.to_event(3)` moves the last three dimensions of a distribution of pixels into its event"
            )
        return p_v

    @abstractmethod
    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        """Returns the distribution given logits (..., T, H, W): batch shape (...), event shape (T, H, W).

        It has to be a distribution of single pixels, made one of images by ``.to_event(3)``, so that frames can be left
        out and pixels be averaged one by one. Transforms of single pixels may come before or after that.
        """

    def mean(self, logits: Tensor) -> Tensor:
        """Returns the expected image, of the shape of the logits and within [0, 1]."""
        return logits.sigmoid()

    def checked_mean(self, logits: Tensor) -> Tensor:
        """Returns `mean` after a check of its shape, for queries; raises ValueError if it is not that of the logits."""
        mean = self.mean(logits)
        if getattr(mean, "shape", None) != logits.shape:
            shape = tuple(getattr(mean, "shape", ()))
            raise ValueError(
                f"the mean of the likelihood {type(self).__name__} is a {type(mean).__name__} of shape {shape}; "
                f"wanted a tensor of the shape of the logits, {tuple(logits.shape)}"
            )
        return mean


class FastBernoulli(dist.Bernoulli):
    """A Bernoulli with a faster log density, v logit - log(1 + exp(logit)); it takes two thirds of torch's time."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - F.softplus(self.logits)


class BernoulliPixels(PixelLikelihood):
    """The Bernoulli of Eq (2): a pixel is white with probability sigm(logit); values may lie anywhere in [0, 1]."""

    is_density = False

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return FastBernoulli(logits=logits, validate_args=False).to_event(3)


class ContinuousBernoulliPixels(PixelLikelihood):
    """The density on [0, 1] proportional to p^v (1 - p)^(1 - v), p = sigm(logit) (Loaiza-Ganem & Cunningham, 2019)."""

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return dist.ContinuousBernoulli(logits=logits, validate_args=False).to_event(3)

    def mean(self, logits: Tensor) -> Tensor:
        return dist.ContinuousBernoulli(logits=logits, validate_args=False).mean


class GaussianPixels(PixelLikelihood):
    """The Gaussian N(v; sigm(logit), std^2) with one standard deviation for all pixels, learned by default.

    Args:
        std: starting value of the standard deviation, or its value if it is not learned.
        learned: whether the standard deviation is a parameter; False keeps it fixed.

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
"""Name -> factory of the likelihoods that a configuration can refer to; add your own to train and load it by name."""
