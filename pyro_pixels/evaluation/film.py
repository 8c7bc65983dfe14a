"""Measures of a model on films without true positions: forecasts compared with forecasts that assume no motion.

A model that has understood the motion forecasts frames better than the mean image, which is the same at all times, and
than persistence of the last observed frame. Both baselines use the best parameters for the very frames on which they
are measured, so they cost as little as they possibly can; the model has no such advantage. All three are -log densities
or probabilities with independent pixels, in nats per frame.

Innovations show whether the model's uncertainty is right: standardised, they have a mean square of 1.
"""

import math

import torch
from torch import Tensor

from pyro_pixels._batch import object_mask, unseen_frames, up_to
from pyro_pixels._pyro import of_pixels
from pyro_pixels.data import ImageSequences
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.pixel_model import PixelModel

SMALLEST_SD = 1e-3  # grey value
START_FRAMES = 2  # innovations in these first frames depend on the covariance of h_1, later ones on the noises


def mean_image_nll_per_frame(images: Tensor, n_seen: int, *, is_density: bool) -> Tensor:
    """Returns -log p (n,) of the frames after the first ``n_seen`` under the mean of all frames, in nats per frame.

    Args:
        images: (n, T, H, W), NaN in unobserved frames.
        n_seen: counted from the first observed frame of each sequence.
        is_density: whether pixels are grey. Then p is a Gaussian around the mean with one variance for all pixels;
            otherwise the mean is the probability that a pixel is white.
    """
    v, seen = _floats(images)
    mean, later = v[seen].mean(0), seen & ~up_to(images, n_seen)
    return _cost(v[:, n_seen:], mean.expand(v[:, n_seen:].shape), later[:, n_seen:], is_density)


def persistence_nll_per_frame(images: Tensor, n_seen: int, *, is_density: bool) -> Tensor:
    """Returns -log p (n,) of the frames after the first ``n_seen`` if the last of those persists, in nats per frame.

    Grey pixels vary around that frame with one variance for all. Binary pixels that were white stay white with one
    probability, and those that were black become white with another. Frames are counted from the first observed one of
    each sequence.
    """
    v, seen = _floats(images)
    first = up_to(images, n_seen)
    last = torch.where(seen & first, torch.arange(v.shape[1]), 0).amax(1)
    before = v[torch.arange(len(v)), last]
    v, seen, p = v[:, n_seen:], (seen & ~first)[:, n_seen:], before.unsqueeze(1).expand(v[:, n_seen:].shape)
    if not is_density:
        white, there = p > 0.5, seen[..., None, None].expand(p.shape)
        chance = [
            v[there & which].mean() if bool((there & which).any()) else v.new_zeros(()) for which in (white, ~white)
        ]
        p = torch.where(white, *chance)
    return _cost(v, p, seen, is_density)


@torch.no_grad()
def forecast_nll_per_frame(model: PixelModel, samples: Tensor, images: Tensor, n_objects: Tensor) -> Tensor:
    """Returns -log p (B,) of images, with p of each pixel averaged over S futures, in nats per frame, on the CPU.

    Args:
        samples: (S, B, N, T, 2), positions in these frames, sampled given the frames before them.
        images: (B, T, H, W), NaN in unobserved frames.
        n_objects: (B,).

    Raises:
        ValueError: if the likelihood's pixels are not independent.
    """
    seen, present = ~unseen_frames(images), object_mask(n_objects, samples.shape[2])
    v = images.float().nan_to_num()
    log_p = torch.full_like(v, -torch.inf)
    for a in samples:
        pixels = of_pixels(model.likelihood(model.renderer(a, present)))
        log_p = torch.logaddexp(log_p, pixels.log_prob(v))
    each = (log_p - math.log(len(samples))).double().sum((2, 3))
    return -(torch.where(seen, each, 0.0).sum(1) / seen.sum(1)).cpu()


@torch.no_grad()
def innovation_mean_square(dynamics: Dynamics, drawn: Tensor, data: ImageSequences) -> Tensor:
    """Returns the mean square (n,) of the standardised innovations of tracks from the third frame on; 1 if calibrated.

    It is NaN for sequences with no observed frame from the third observed one on.

    Args:
        drawn: (n, N, T, 2), samples of q(a | v).
        data: the sequences; only their ``seen`` frames count.
    """
    present = object_mask(data.n_objects, drawn.shape[1])
    e = innovations(dynamics, drawn[present].to(dynamics.mu.device), seen_of_tracks(data, present)).cpu()
    squares = torch.full(present.shape, torch.nan, dtype=e.dtype)
    squares[present] = e.square().mean(-1).nanmean(1)
    return squares.nanmean(1)


def seen_of_tracks(data: ImageSequences, present: Tensor) -> Tensor | None:
    """Returns the mask (M, T) of the observed frames of the M ``present`` objects (n, N); None if all are observed."""
    seen = data.seen
    return None if bool(seen.all()) else seen[present.nonzero()[:, 0]]


def innovations(dynamics: Dynamics, tracks: Tensor, seen: Tensor | None) -> Tensor:
    """Returns the standardised innovations (M, T, 2) of tracks (M, T, 2) under the likeliest component of each.

    They are NaN in the first `START_FRAMES` observed frames and in unobserved ones, ``seen`` (M, T) being False.
    """
    seen = None if seen is None else seen.to(tracks.device)
    k = dynamics.component_posterior(tracks, seen).logits.argmax(-1)
    e = standardised_innovations(dynamics, tracks, seen)[torch.arange(len(k), device=k.device), k]
    seen = tracks.new_ones(tracks.shape[:2], dtype=torch.bool) if seen is None else seen
    return torch.where((seen & (seen.cumsum(1) > START_FRAMES)).unsqueeze(-1), e, torch.nan)


def standardised_innovations(dynamics: Dynamics, a: Tensor, seen: Tensor | None = None) -> Tensor:
    """Returns L_t^-1 (a_t - E[a_t | a_{1:t-1}, z = k]) (..., K, T, 2) of tracks (..., T, 2) under each component.

    L_t L_t' is the covariance of a_t given a_{1:t-1}. For draws from p(a | z = k) these are iid standard normals. Where
    ``seen`` (..., T) is False, a_t is not used, and what is returned for it has no meaning.
    """
    lgssm = dynamics.lgssm()
    filtered = kalman.kalman_filter(lgssm, a.unsqueeze(-3), None if seen is None else seen.unsqueeze(-2))
    states = kalman.Gaussians(filtered.predicted_mean, filtered.predicted_cov)
    mean, cov = kalman.observation_moments(lgssm, states)  # (..., K, T, 2), (K, T, 2, 2)
    identity = torch.eye(2, dtype=cov.dtype, device=cov.device)
    whiten = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(cov).L, identity, upper=False)
    return (whiten @ (a.unsqueeze(-3) - mean).unsqueeze(-1)).squeeze(-1)


def _floats(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the images in double precision, with 0 in unobserved frames, and the mask (n, T) of observed frames."""
    return images.double().nan_to_num(), ~unseen_frames(images)


def _cost(v: Tensor, p: Tensor, seen: Tensor, is_density: bool) -> Tensor:
    """Returns -log p (n,) of images (n, T, H, W) given predictions of the same shape, averaged over observed frames."""
    if is_density:
        variance = (v - p)[seen].square().mean().clamp(min=SMALLEST_SD**2)
        cost = 0.5 * ((v - p).square() / variance + (2 * math.pi * variance).log())
    else:
        p = p.clamp(1e-6, 1 - 1e-6)
        cost = -(v * p.log() + (1 - v) * (1 - p).log())
    return torch.where(seen, cost.sum((2, 3)), torch.nan).nanmean(1)
