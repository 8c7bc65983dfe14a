"""What can be known of a model on a film without true positions: forecasts beside forecasts that know no motion.

A model that has understood the motion forecasts frames better than the mean image, which is the same at any time, and
than the persistence of the last frame that was seen. Both are given the best parameters for the very frames on which
they are measured, so that they cost as little as they ever could; the model is given none. All three are densities, or
probabilities, of every pixel by itself, in nats a frame.

Innovations say whether the model knows how certain it is: standardised, they have a mean square of 1.
"""

import math

import torch
from torch import Tensor

from pyro_pixels._batch import object_mask, unseen_frames
from pyro_pixels.data import ImageSequences
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.pixel_model import PixelModel

SMALLEST_SD = 1e-3  # grey value
START_FRAMES = 2  # innovations of the first frames depend on the covariance of the start, the others on the noises


def mean_image_nll_per_frame(images: Tensor, n_seen: int, *, is_density: bool) -> Tensor:
    """Minus log p (n,) of the frames behind the first ``n_seen`` under the mean of all frames, in nats a frame.

    Args:
        images: (n, T, H, W), NaN in frames that were not seen.
        is_density: whether pixels are grey: then p is a Gaussian around the mean with one variance for all pixels,
            else a pixel is white with the mean's probability.
    """
    v, seen = _floats(images)
    mean = v[seen].mean(0)
    return _cost(v[:, n_seen:], mean.expand(v[:, n_seen:].shape), seen[:, n_seen:], is_density)


def persistence_nll_per_frame(images: Tensor, n_seen: int, *, is_density: bool) -> Tensor:
    """Minus log p (n,) of the frames behind the first ``n_seen`` where these stay as the last of them, in nats a frame.

    Grey pixels vary around it with one variance for all; of others, those that were white are still white with one
    probability, and those that were black become white with another. A sequence none of whose first frames was seen
    counts as black before.
    """
    v, seen = _floats(images)
    frame = torch.arange(n_seen)
    last = torch.where(seen[:, :n_seen], frame, -1).amax(1)
    before = v[torch.arange(len(v)), last.clamp(min=0)] * (last >= 0)[:, None, None]
    v, seen, p = v[:, n_seen:], seen[:, n_seen:], before.unsqueeze(1).expand(v[:, n_seen:].shape)
    if not is_density:
        white, there = p > 0.5, seen[..., None, None].expand(p.shape)
        chance = [
            v[there & which].mean() if bool((there & which).any()) else v.new_zeros(()) for which in (white, ~white)
        ]
        p = torch.where(white, *chance)
    return _cost(v, p, seen, is_density)


@torch.no_grad()
def forecast_nll_per_frame(model: PixelModel, samples: Tensor, images: Tensor, n_objects: Tensor) -> Tensor:
    """Minus log p (B,) of images, every pixel by itself, averaged over S futures, in nats a frame; on the CPU.

    Args:
        samples: (S, B, N, T, 2), positions in these frames, each drawn given what came before.
        images: (B, T, H, W), NaN in frames that were not seen.
        n_objects: (B,).
    """
    seen, present = ~unseen_frames(images), object_mask(n_objects, samples.shape[2])
    v = images.float().nan_to_num()
    log_p = torch.full_like(v, -torch.inf)
    for a in samples:
        pixels = model.likelihood(model.renderer(a, present))
        pixels = getattr(pixels, "base_dist", pixels)
        log_p = torch.logaddexp(log_p, pixels.log_prob(v))
    each = (log_p - math.log(len(samples))).double().sum((2, 3))
    return -(torch.where(seen, each, 0.0).sum(1) / seen.sum(1)).cpu()


@torch.no_grad()
def innovation_mean_square(dynamics: Dynamics, drawn: Tensor, data: ImageSequences) -> Tensor:
    """The mean square (n,) of the standardised innovations of tracks, from the third frame on; 1 if calibrated.

    Args:
        drawn: (n, N, T, 2), samples of q(a | v).
        data: the sequences, whose ``seen`` frames count.

    Returns:
        NaN where fewer than three frames were seen.
    """
    present = object_mask(data.n_objects, drawn.shape[1])
    tracks = drawn[present].to(dynamics.mu.device)
    k = dynamics.component_posterior(tracks).logits.argmax(-1)
    e = standardised_innovations(dynamics, tracks)[torch.arange(len(k), device=k.device), k].square().mean(-1).cpu()
    seen = data.seen[present.nonzero()[:, 0]].clone()
    seen[:, :START_FRAMES] = False
    squares = torch.full(present.shape, torch.nan, dtype=e.dtype)
    squares[present] = torch.where(seen, e, torch.nan).nanmean(1)
    return squares.nanmean(1)


def standardised_innovations(dynamics: Dynamics, a: Tensor) -> Tensor:
    """L_t^-1 (a_t - E[a_t | a_{1:t-1}, z = k]) (..., K, T, 2) of tracks (..., T, 2) under each component.

    L_t L_t' is the covariance of a_t given a_{1:t-1}. Independent standard normals for draws from p(a | z = k).
    """
    lgssm = dynamics.lgssm()
    filtered = kalman.kalman_filter(lgssm, a.unsqueeze(-3))
    states = kalman.Gaussians(filtered.predicted_mean, filtered.predicted_cov)
    mean, cov = kalman.observation_moments(lgssm, states)  # (..., K, T, 2), (K, T, 2, 2)
    identity = torch.eye(2, dtype=cov.dtype, device=cov.device)
    whiten = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(cov).L, identity, upper=False)
    return (whiten @ (a.unsqueeze(-3) - mean).unsqueeze(-1)).squeeze(-1)


def _floats(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images in double precision, 0 where they were not seen, and the mask (n, T) of the frames that were."""
    return images.double().nan_to_num(), ~unseen_frames(images)


def _cost(v: Tensor, p: Tensor, seen: Tensor, is_density: bool) -> Tensor:
    """-log p (n,) of images (n, T, H, W) around predictions of the same shape, mean over the frames that were seen."""
    if is_density:
        variance = (v - p)[seen].square().mean().clamp(min=SMALLEST_SD**2)
        cost = 0.5 * ((v - p).square() / variance + (2 * math.pi * variance).log())
    else:
        p = p.clamp(1e-6, 1 - 1e-6)
        cost = -(v * p.log() + (1 - v) * (1 - p).log())
    return torch.where(seen, cost.sum((2, 3)), torch.nan).nanmean(1)
