"""Asking a trained model (Secs 3.3-3.5): where are the objects, where will they be, what happened in between.

Every query needs a model, any guide that keeps the contract, and images; none trains anything. Means follow the paper's
procedure; samples propagate all the uncertainty there is, of q(a | v), of the component z and of the states h. Given
positions a, everything about h and z is exact.

Departures from the paper: k* is taken from all seen frames, also those behind a gap; and guides that know the dynamics
(`Guide.encode_observed`) answer with their own posterior instead of handing means to a smoother.

Shapes: B sequences, N objects (the largest of the batch), T frames, S samples; positions are latent, float64.
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_pixels import lgssm as exact
from pyro_pixels.data import check_batch, object_mask
from pyro_pixels.dynamics import Dynamics, select_component
from pyro_pixels.guides import Guide
from pyro_pixels.model import PixelModel

MOMENT_SAMPLES = 256  # for guides whose distribution has no closed-form mean or variance


class Inference(NamedTuple):
    """q(a | v): where the objects are."""

    mean: Tensor  # (B, N, T, 2)
    std: Tensor  # (B, N, T, 2)
    samples: Tensor | None  # (S, B, N, T, 2)


class States(NamedTuple):
    """p(h | a) and p(z | a): positions and velocities given positions, exact."""

    mean: Tensor  # (..., T, 4), E[h_t | a], components averaged out
    cov: Tensor  # (..., T, 4, 4)
    p_z: Tensor  # (..., K)


class Prediction(NamedTuple):
    """Positions and images at all T frames, seen or not."""

    mean: Tensor  # (B, N, T, 2): inferred where the frame was seen, predicted where not
    cov: Tensor  # (B, N, T, 2, 2): of a_t, Sigma_A included
    images: Tensor  # (B, T, H, W) pixel probabilities, rendered from the means
    observed: Tensor  # (T,) bool, which frames were seen
    component: Tensor  # (B, N), k* = argmax_k p(z = k | a)
    samples: Tensor | None  # (S, B, N, T, 2)
    sample_images: Tensor | None  # (S, B, T, H, W) pixel probabilities, rendered from the samples


@torch.no_grad()
def infer(guide: Guide, images: Tensor, n_objects: Tensor, *, n_samples: int = 0) -> Inference:
    """Positions from images (Sec 3.3).

    Args:
        images: (B, T, H, W) in [0, 1] or uint8; n_objects: (B,); n_samples: S, 0 for none.

    Raises:
        ValueError: if the images do not fit the guide.
    """
    q_a = guide.q(images, n_objects)
    mean, variance = _moments(q_a)
    return Inference(mean, variance.sqrt(), q_a.sample(torch.Size((n_samples,))).to(mean.dtype) if n_samples else None)


@torch.no_grad()
def reconstruct(model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor) -> Tensor:
    """Pixel probabilities (B, T, H, W) rendered from the inferred means. Arguments and errors as in `infer`."""
    return render(model, infer(guide, images, n_objects).mean, n_objects)


@torch.no_grad()
def render(model: PixelModel, a: Tensor, n_objects: Tensor) -> Tensor:
    """Pixel probabilities (..., B, T, H, W) of positions (..., B, N, T, 2), Eqs (1)-(2); means for grey pixels."""
    return model.likelihood.mean(model.renderer(a, object_mask(n_objects, a.shape[-3])))


@torch.no_grad()
def smooth(dynamics: Dynamics, a: Tensor, observed: Tensor | None = None) -> States:
    """Positions and velocities at every frame given positions at the observed ones, by exact smoothing.

    Args:
        a: (..., T, 2); observed: (..., T) bool, False where a frame is missing; default all observed.
    """
    lgssm = dynamics.lgssm()
    p_z = dynamics.component_posterior(a, observed).probs
    each = exact.rts_smoother(lgssm, a.unsqueeze(-3), None if observed is None else observed.unsqueeze(-2))
    w = p_z[..., None, None]
    mean = (w * each.mean).sum(-3)
    spread = each.mean - mean.unsqueeze(-3)
    cov = (w.unsqueeze(-1) * (each.cov + spread.unsqueeze(-1) * spread.unsqueeze(-2))).sum(-4)
    return States(mean, cov, p_z)


@torch.no_grad()
def generate(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, *, n_frames: int, n_samples: int = 0
) -> Prediction:
    """The frames that follow (Sec 3.4).

    a_{1:tau} are the guide's means, k* the most likely component given them, E[h_tau | a_{1:tau}, k*] the filtered
    mean; the learned dynamics take it on to frame T, and each position is rendered. Samples draw each of these instead.
    A guide that knows the dynamics answers by itself: E[a_{1:T} | v_{1:tau}].

    Args:
        images: (B, tau, H, W), the seen frames; n_objects: (B,).
        n_frames: T, the number of frames in all, more than tau.
        n_samples: S, 0 for none.

    Raises:
        ValueError: if tau >= T, or as in `infer`.
    """
    check_batch(images, n_objects)
    tau = images.shape[1]
    if n_frames <= tau:
        raise ValueError(f"{tau} frames are seen of {n_frames}; n_frames counts the seen ones, so give more than {tau}")
    unseen = images.new_zeros(len(images), n_frames - tau, *images.shape[2:])
    observed = torch.arange(n_frames, device=images.device) < tau
    return _predict(model, guide, torch.cat([images, unseen], 1), n_objects, observed, n_samples)


@torch.no_grad()
def interpolate(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, observed: Tensor, *, n_samples: int = 0
) -> Prediction:
    """Missing frames between seen ones (Sec 3.5).

    Each gap is first filled with images generated from the frames before it, so that the guide arrives at the frames
    behind it warmed in; the means it gives at the seen frames are then the observations of a smoother that takes the
    others as missing. The paper's case is ``observed`` true at frames 1..5 and 26..30.

    Args:
        images: (B, T, H, W); what they hold at unobserved frames is ignored.
        n_objects: (B,).
        observed: (T,) bool; the first frame must be observed, and at least one must not.
        n_samples: S, 0 for none.

    Raises:
        ValueError: if ``observed`` is not such a mask, or as in `infer`.
    """
    check_batch(images, n_objects)
    if observed.dtype != torch.bool or observed.shape != images.shape[1:2]:
        raise ValueError(
            f"observed is {observed.dtype} {tuple(observed.shape)}; wanted bool (T,) = ({images.shape[1]},)"
        )
    if not bool(observed[0]) or bool(observed.all()):
        raise ValueError(
            f"observed is {observed.int().tolist()}; wanted the first frame seen (1) and at least one not (0)"
        )
    filled = images.to(guide.dtype).clone()
    for start, stop in _gaps(observed):
        so_far = observed & (torch.arange(len(observed), device=observed.device) < start)
        prediction = _predict(model, guide, filled[:, :stop], n_objects, so_far[:stop])
        filled[:, start:stop] = prediction.images[:, start:stop]
    return _predict(model, guide, filled, n_objects, observed, n_samples)


def _predict(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, observed: Tensor, n_samples: int = 0
) -> Prediction:
    """All frames from the observed ones; ``images`` are filled where they are not observed."""
    samples = None
    knows_dynamics = guide.encode_observed(images.to(guide.dtype), n_objects, observed)
    if knows_dynamics is not None:
        q_a, p_z = knows_dynamics
        mean, cov, k = q_a.mean, q_a.frame_covariance, p_z.logits.argmax(-1)  # type: ignore[attr-defined]
        if n_samples:
            samples = q_a.sample(torch.Size((n_samples,)))
    else:
        last = int(observed.nonzero().max()) + 1  # what follows the last seen frame is the dynamics' affair
        q_a = guide.q(images[:, :last], n_objects)
        seen, variance = (_to_length(x, len(observed)) for x in _moments(q_a))
        dynamics = model.dynamics
        k = dynamics.component_posterior(seen, observed).logits.argmax(-1)
        lgssm = select_component(dynamics.lgssm(), k)
        smoothed = exact.observation_moments(lgssm, exact.rts_smoother(lgssm, seen, observed))
        mean = torch.where(observed[:, None], seen, smoothed.mean)
        cov = torch.where(observed[:, None, None], torch.diag_embed(variance), smoothed.cov)
        if n_samples:
            a = _to_length(q_a.sample(torch.Size((n_samples,))).to(mean.dtype), len(observed))
            lgssm = select_component(dynamics.lgssm(), dynamics.component_posterior(a, observed).sample())
            h = exact.sample_posterior(lgssm, a, observed)
            samples = torch.where(observed[:, None], a, exact.sample_observations(lgssm, h))
    sample_images = None if samples is None else render(model, samples, n_objects)
    return Prediction(mean, cov, render(model, mean, n_objects), observed, k, samples, sample_images)


class _Moments(NamedTuple):
    mean: Tensor  # (B, N, T, 2)
    variance: Tensor  # (B, N, T, 2)


def _moments(q_a: dist.TorchDistribution) -> _Moments:
    try:
        mean, variance = q_a.mean, q_a.variance
    except NotImplementedError:
        samples = q_a.sample(torch.Size((MOMENT_SAMPLES,)))
        mean, variance = samples.mean(0), samples.var(0)
    dtype = exact.exact_dtype(mean.device)
    return _Moments(mean.to(dtype), variance.to(dtype))


def _to_length(a: Tensor, n_frames: int) -> Tensor:
    """Positions (..., t, 2) padded with zeros to (..., n_frames, 2)."""
    return F.pad(a, (0, 0, 0, n_frames - a.shape[-2]))


def _gaps(observed: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every run of missing frames that has a seen frame behind it."""
    gaps, start = [], None
    for t, seen in enumerate(observed.tolist()):
        if not seen and start is None:
            start = t
        if seen and start is not None:
            gaps.append((start, t))
            start = None
    return gaps
