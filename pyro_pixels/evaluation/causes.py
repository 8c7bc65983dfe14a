"""Likely causes of failed training, sought in the film itself if `check_health` finds signs of failure.

Four causes show in the images and the numbers of objects: mostly white images, noise, a background, and objects that
come and go. A fifth, walls, shows in the tracks: bouncing objects change their velocity only at the rim of the plane.
"""

import numpy as np
import torch
from torch import Tensor

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.pixel_evidence import PixelEvidence, count_blobs

MOSTLY_WHITE = 0.5  # mean of the images
NOISY = 0.12  # standard deviation, of full scale; weaker noise is handled (docs/your_own_video.md)
CLUTTER = 0.002  # share of the background's pixels that are white
EMPTY, CROWDED = 0.02, 0.2  # shares of the frames with no object, and with more than n_objects
KICKS = 0.05  # share of the accelerations that count as the largest
RIM, AT_RIM = 0.15, 0.75  # width, of the extent of all positions; share of the largest accelerations there, with walls
SUDDEN = 5.0  # mean of the largest accelerations over the median of all, with walls


def film_causes(guide: Guide, data: ImageSequences) -> list[str]:
    """Returns those of "white", "noise", "background" and "come and go" that show in the images."""
    causes: list[str] = []
    if float(data.images[data.seen].double().mean()) > MOSTLY_WHITE:
        return ["white"]  # no other cause can be recognised
    evidence = PixelEvidence()
    found, known = evidence.estimate(data.images, data.n_objects), guide.pixel_evidence.statistics
    noise, handled = found.noise or found.clutter > CLUTTER, known.noise or known.clutter
    if found.noise > NOISY or (noise and not handled):
        causes.append("noise")
    if found.has_background and not known.has_background:
        causes.append("background")
    weights = evidence(data.images.float().nan_to_num())[data.seen].numpy()
    blobs, counts = count_blobs(weights > 0.5), np.repeat(data.n_objects.numpy(), data.seen.sum(1).numpy())
    if float((blobs == 0).mean()) > EMPTY or float((blobs > counts).mean()) > CROWDED:
        causes.append("come and go")
    return causes


def has_walls(tracks: Tensor) -> bool:
    """Returns whether tracks (M, T, 2), latent means, change velocity suddenly and at the rim of all positions.

    Frames of NaN do not count.
    """
    a = tracks.double().cpu()
    kick = a.diff(n=2, dim=1).norm(dim=-1)
    kicks, points = kick[~kick.isnan()], a[~a.isnan().any(-1)]
    if a.shape[1] < 4 or not len(kicks) or bool(a.isinf().any()):
        return False
    largest = kick >= kicks.quantile(1 - KICKS)
    low, high = points.quantile(0.01, 0), points.quantile(0.99, 0)
    where = (a[:, 1:-1] - low) / (high - low).clamp(min=1e-12)
    at_rim = (where.minimum(1 - where) < RIM).any(-1)
    sudden = float(kick[largest].mean()) > SUDDEN * float(kicks.median())
    return sudden and float(at_rim[largest].double().mean()) > AT_RIM


@torch.no_grad()
def likely_causes(guide: Guide, data: ImageSequences, tracks: Tensor) -> tuple[str, ...]:
    """Returns the names of likely causes, keys of `health_words.CAUSES`, the likeliest first.

    Args:
        tracks: (M, T, 2), latent means of all objects, NaN in frames that do not count.
    """
    walls = ["walls"] if has_walls(tracks) else []
    return (*film_causes(guide, data), *walls)
