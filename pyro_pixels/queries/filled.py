"""The q(a | v) of images with missing frames, in which the guide's network is shown what `interpolate` renders.

A network that knows of no missing frames sees a black image in a frame of NaN, loses the objects, and finds them again
only some frames later. `q_of_images` therefore shows it the images of `interpolate`, as Sec 3.5 does. They are a
function of the observed frames, so this is still a q(a | v), and bounds and importance weights hold for it.
"""

from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_pixels._batch import unseen_frames
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.missing import q_given_seen
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import Prediction, interpolate


def interpolated(model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor) -> Prediction:
    """Returns the `interpolate` of frames of NaN; the arguments are those of `q_of_images`."""
    everywhere = torch.ones(images.shape[1], dtype=torch.bool, device=images.device)
    return interpolate(model, guide, images, n_objects, everywhere, covariances=False)


def filled(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, found: Prediction | None = None
) -> Tensor:
    """Returns the images (B, T, H, W) with those of ``found``, by default `interpolated`, in frames of NaN."""
    found = interpolated(model, guide, images, n_objects) if found is None else found
    return torch.where(unseen_frames(images)[..., None, None], found.images.clamp(0, 1).to(images.dtype), images)


def q_of_images(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, *, found: Prediction | None = None
) -> dist.TorchDistribution:
    """Returns `q_given_seen` with a network that is shown interpolated images in frames of NaN.

    Args:
        model: the trained model.
        guide: any guide; one that contains the dynamics needs no such images, and its own q(a | v) is returned.
        images: (B, T, H, W).
        n_objects: (B,).
        found: the result of `interpolated`, if it has been computed already.

    Raises:
        ValueError: as in `Guide.q`.
    """
    return q_given_seen(guide, model.dynamics, images, n_objects, partial(filled, model, guide, found=found))
