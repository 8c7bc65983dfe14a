"""Estimates from the training images before the first step: their noise, background and clutter."""

import math

import torch
from torch import Tensor

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.pixel_evidence import FilmStatistics
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.model.pixel_model import PixelModel

STD_LEAST = 0.02  # the smallest starting value of the likelihood's standard deviation
AT_ONCE = 500  # sequences per pass


@torch.no_grad()
def look_at_film(model: PixelModel, guide: Guide, data: ImageSequences) -> FilmStatistics:
    """Returns the guide's estimates for a film, and initialises an untrained renderer with its background and noise.

    By default b^v of Eq (2) starts at one value for all pixels. If the film has a background, b^v is set to the
    background image; if it has noise, the standard deviation of `GaussianPixels` is set to that of the noise. Values
    whose ``requires_grad`` is False are kept, as is a model whose renderer has no b^v (``to_v.bias``, (H W,)).
    """
    found = guide.look_at(data.images, data.n_objects)
    b_v = getattr(getattr(model.renderer, "to_v", None), "bias", None)
    if b_v is None or b_v.shape != (data.size[0] * data.size[1],) or bool((b_v != b_v[0]).any()):  # already trained
        return found
    darkest = float(b_v[0].sigmoid())
    if found.has_background and b_v.requires_grad:
        background = guide.pixel_evidence.background.flatten().to(b_v)
        b_v.copy_(background.clamp(min(darkest, 0.98), 0.98).logit())
    likelihood = model.likelihood
    if found.noise and isinstance(likelihood, GaussianPixels) and likelihood.log_std.requires_grad:
        likelihood.log_std.fill_(math.log(max(found.noise, STD_LEAST)))
    return found


@torch.no_grad()
def most_weights(guide: Guide, images: Tensor) -> int:
    """Returns the largest number of pixels in a frame that are not black in the guide's input (`Guide.see`)."""
    return max(int((guide.see(x) > 0).flatten(2).sum(-1).max()) for x in images.split(AT_ONCE))
