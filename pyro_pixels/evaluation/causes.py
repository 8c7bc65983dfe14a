"""Likely causes of a training that has failed, looked for in the film itself where `check_health` finds signs.

Images and numbers of objects tell four: images that are mostly white, noise, a background, and objects that come and
go. A fifth, walls, shows in the tracks: what bounces changes its velocity at the rim of the plane and nowhere else.
"""

import numpy as np
import torch
from torch import Tensor

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.pixel_evidence import PixelEvidence, count_blobs

MOSTLY_WHITE = 0.5  # mean of the images
NOISY = 0.12  # of full scale; less is taken care of (docs/your_own_video.md)
CLUTTER = 0.002  # share of the background's pixels that are white
EMPTY, CROWDED = 0.02, 0.2  # shares of the frames with no object, and with more than there are said to be
KICKS = 0.05  # share of the accelerations that are the largest
RIM, AT_RIM = 0.15, 0.75  # of the extent of all positions; share of the largest accelerations that are there with walls
SUDDEN = 5.0  # how much larger the largest accelerations are than usual ones, with walls


def film_causes(guide: Guide, data: ImageSequences) -> list[str]:
    """Those of "white", "noise", "background" and "come and go" that the images show."""
    causes: list[str] = []
    if float(data.images[data.seen].double().mean()) > MOSTLY_WHITE:
        return ["white"]  # nothing else can be told
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
    """Whether tracks (M, T, 2), latent means, change their velocity suddenly, and at the rim of where they go."""
    a = tracks.double().cpu()
    if a.shape[1] < 4 or not bool(a.isfinite().all()):
        return False
    kick = a.diff(n=2, dim=1).norm(dim=-1)
    largest = kick >= kick.quantile(1 - KICKS)
    low, high = a.flatten(0, 1).quantile(0.01, 0), a.flatten(0, 1).quantile(0.99, 0)
    where = (a[:, 1:-1] - low) / (high - low).clamp(min=1e-12)
    at_rim = (where.minimum(1 - where) < RIM).any(-1)
    sudden = float(kick[largest].mean()) > SUDDEN * float(kick.median())
    return sudden and float(at_rim[largest].double().mean()) > AT_RIM


@torch.no_grad()
def likely_causes(guide: Guide, data: ImageSequences, tracks: Tensor) -> tuple[str, ...]:
    """Names of causes, the likeliest first; keys of `health_words.CAUSES`.

    Args:
        tracks: (M, T, 2), latent means of all objects.
    """
    walls = ["walls"] if has_walls(tracks) else []
    return (*film_causes(guide, data), *walls)
