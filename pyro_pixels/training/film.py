"""What a film tells before the first step: its noise, its background, its clutter."""

import math

import torch
from torch import Tensor

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.pixel_evidence import FilmStatistics
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.model.pixel_model import PixelModel

STD_LEAST = 0.02  # a starting value of the likelihood's standard deviation
AT_ONCE = 500  # sequences


@torch.no_grad()
def look_at_film(model: PixelModel, guide: Guide, data: ImageSequences) -> FilmStatistics:
    """Has the guide look at the film, and starts an untrained renderer from its background and noise.

    A renderer starts from one grey value everywhere, b^v of Eq (2). Where the film has a background this starts at the
    background image, and the standard deviation of `GaussianPixels` at that of the noise. A clean film changes nothing.
    """
    found = guide.look_at(data.images, data.n_objects)
    b_v = model.renderer.to_v.bias
    if bool((b_v != b_v[0]).any()):  # has learned
        return found
    darkest = float(b_v[0].sigmoid())
    if found.has_background:
        background = guide.pixel_evidence.background.flatten().to(b_v)
        b_v.copy_(background.clamp(min(darkest, 0.98), 0.98).logit())
    likelihood = model.likelihood
    if found.noise and isinstance(likelihood, GaussianPixels):
        likelihood.log_std.fill_(math.log(max(found.noise, STD_LEAST)))
    return found


@torch.no_grad()
def most_weights(guide: Guide, images: Tensor) -> int:
    """The largest number of pixels in a frame that the guide sees as not black."""
    return max(int((guide.see(x) > 0).flatten(2).sum(-1).max()) for x in images.split(AT_ONCE))
