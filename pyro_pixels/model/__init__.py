"""The generative model (Sec 2.1): linear-Gaussian dynamics, a neural renderer, and a pixel likelihood."""

from pyro_pixels.model.likelihoods import (
    LIKELIHOODS,
    BernoulliPixels,
    ContinuousBernoulliPixels,
    GaussianPixels,
    PixelLikelihood,
)
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer

__all__ = [
    "LIKELIHOODS",
    "BernoulliPixels",
    "ContinuousBernoulliPixels",
    "GaussianPixels",
    "PixelLikelihood",
    "PixelModel",
    "Renderer",
]
