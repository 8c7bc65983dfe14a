"""Posterior states h, positions and velocities: filtered, averaged over q(a | v), or before the first frame.

`smooth` and its filtering counterpart `filter_states` take positions. For images, `states` averages p(h, z | a) over
q(a | v), and `posterior_states` over the samples of any prediction. Given positions, everything is exact; averages over
q use S samples, with the Gaussian part given a sample in closed form (Rao-Blackwellised). `retrodict` extends states to
times before the first frame.

Velocities alone are not identified: with a drift d in the position part of u and all velocities smaller by d / delta,
tracks are the same (`counterfactual.canonical`). `moves` returns the motion from frame to frame, which is identified.

The paper's procedures (Secs 3.4-3.5) plug in the means of q and the likeliest component. `averaged` replaces the mean
and covariance of such a prediction by those of the whole mixture.

Shapes are those of `pyro_pixels.queries.predict`.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pyro_pixels._checks import check_number
from pyro_pixels._convert import checked_batch
from pyro_pixels.guides.base import Guide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, select_component
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.masks import seen_or_none, sequence_mask
from pyro_pixels.queries.parts import in_parts
from pyro_pixels.queries.predict import Prediction, States, infer, render, smooth
from pyro_pixels.queries.streaming import filtered, start, step


@torch.no_grad()
def filter_states(dynamics: Dynamics, a: Tensor, observed: Tensor | None = None) -> States:
    """Returns E[h_t | a_{1:t}] and covariances by exact filtering of positions.

    Components are averaged out in each frame with weights p(z | a_{1:t}), so ``p_z`` is (..., T, K). In the last frame
    the result equals that of `smooth`.

    Args:
        dynamics: the model's dynamics.
        a: (..., T, 2).
        observed: as in `smooth`; by default all frames are observed whose positions are not NaN.

    Raises:
        ValueError: if ``a`` or ``observed`` has the wrong shape.
    """
    lgssm = dynamics.lgssm()
    a, observed = kalman.check_observations(lgssm, a, sequence_mask(observed, a))
    state, steps = start(dynamics, a.shape[:-2]), []
    for t in range(a.shape[-2]):
        state = step(lgssm, state, a[..., t, :], observed[..., t])
        steps.append((*filtered(state), state.log_w.exp()))
    means, covs, p_z = zip(*steps)
    return States(torch.stack(means, -2), torch.stack(covs, -3), torch.stack(p_z, -2))


@in_parts()
@torch.no_grad()
def states(
    model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor | int | Sequence[int], *, n_samples: int = 100
) -> States:
    """Returns positions and velocities given images: p(h, z | a) averaged over q(a | v).

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W).
        n_objects: (B,), a list, or one number for all sequences.
        n_samples: S, at least 1.

    Returns:
        mean (B, N, T, 4), cov, p_z (B, N, K), and samples (S, B, N, T, 4), each a path drawn jointly over time.

    Raises:
        ValueError: if ``n_samples`` is below 1, or as in `infer`.
    """
    n_samples = check_number("n_samples", n_samples, 1)
    images, n_objects = checked_batch(images, n_objects)
    found = infer(guide, images, n_objects, n_samples=n_samples, model=model)
    return posterior_states(model.dynamics, found.samples, seen_or_none(images))


@torch.no_grad()
def posterior_states(dynamics: Dynamics, samples: Tensor | None, observed: Tensor | None = None) -> States:
    """Averages p(h, z | a) over samples of a, such as those of an `Inference` or a `Prediction`.

    The covariance is that of the mixture: the mean of the samples' covariances plus the covariance of their means.

    Args:
        dynamics: the model's dynamics.
        samples: (S, ..., T, 2).
        observed: as in `smooth`, such as the mask of a `Prediction`; other positions are integrated out.

    Raises:
        ValueError: if there are no samples, or ``observed`` has the wrong shape.
    """
    if samples is None:
        raise ValueError("there are no samples to average over; request them with n_samples=100")
    observed = sequence_mask(observed, samples[0])
    if observed is not None and 1 < observed.dim() < samples.dim() - 1:
        observed = observed.unsqueeze(0)
    each = smooth(dynamics, samples, observed)
    z = torch.distributions.Categorical(probs=each.p_z, validate_args=False).sample()
    h = kalman.sample_posterior(select_component(dynamics.lgssm(), z), samples, observed)
    return States(*_average(Gaussians(each.mean, each.cov)), each.p_z.mean(0), h)


@torch.no_grad()
def averaged(model: PixelModel, prediction: Prediction, n_objects: Tensor | int | Sequence[int]) -> Prediction:
    """Returns the prediction with mean and covariance averaged over q(a | v) and z instead of plug-in estimates.

    In unobserved frames these are the moments of a_t, Sigma_A included; in observed frames the moments of q, unchanged.
    The predictions of guides that contain the dynamics are averages already; for them the result differs only by Monte
    Carlo error.

    Args:
        model: the trained model.
        prediction: the result of `generate` or `interpolate`, with samples.
        n_objects: (B,), a list, or one number for all sequences.

    Raises:
        ValueError: if the prediction has no samples.
    """
    if prediction.samples is None:
        raise ValueError("the prediction has no samples to average over; request them with n_samples=100")
    a, observed = prediction.samples, prediction.observed
    lgssm, h = model.dynamics.lgssm(), posterior_states(model.dynamics, a, observed)
    unseen = kalman.observation_moments(lgssm, Gaussians(h.mean, h.cov))
    known = observed.unsqueeze(-1)
    mean = torch.where(known, prediction.mean, unseen.mean)
    cov = torch.where(known.unsqueeze(-1), prediction.cov, unseen.cov)
    return prediction._replace(mean=mean, cov=cov, images=render(model, mean, n_objects))


@torch.no_grad()
def retrodict(dynamics: Dynamics, states: States, n_frames: int) -> States:
    """Returns positions and velocities in the ``n_frames`` frames before the first.

    The dynamics run backwards from the posterior of h_1, h_{t-1} = A^-1 (h_t - u - eta), with a flat prior on earlier
    states: the model specifies where objects are in the first frame, not where they come from.

    Args:
        dynamics: the model's dynamics.
        states: smoothed states, of which the first frame is used; the result has samples if they do.
        n_frames: the number of frames, at least 1.

    Returns:
        States in the frames before the first, in temporal order: mean (..., n_frames, 4) and so on.

    Raises:
        ValueError: if ``n_frames`` is below 1.
    """
    n_frames = check_number("n_frames", n_frames, 1)
    backwards = kalman.reverse(dynamics.lgssm())
    h = kalman.rollout(backwards, states.mean[..., 0, :], states.cov[..., 0, :, :], n_frames)
    samples = states.samples
    if samples is not None:
        samples = kalman.sample_rollout(backwards, samples[..., 0, :], n_frames).flip(-2)
    return States(h.mean.flip(-2), h.cov.flip(-3), states.p_z, samples)


def positions(dynamics: Dynamics, states: States, *, noise: bool = True) -> Gaussians:
    """Returns the mean (..., T, 2) and covariance (..., T, 2, 2) of a_t, or without ``noise`` of B h_t."""
    return kalman.observation_moments(dynamics.lgssm(), Gaussians(states.mean, states.cov), noise)


@overload
def moves(dynamics: Dynamics, h: States | Gaussians) -> Gaussians: ...
@overload
def moves(dynamics: Dynamics, h: Tensor) -> Tensor: ...
@torch.no_grad()
def moves(dynamics: Dynamics, h: States | Gaussians | Tensor) -> Gaussians | Tensor:
    """Returns how far objects are expected to move until the next frame, B (A h_t + u) - B h_t, in latent units.

    Unlike (vx, vy), this does not depend on how u and the velocities share a drift. For pixels per frame, apply the
    matrix of an `Affine` map to pixels: ``mean @ matrix.mT`` and ``matrix @ cov @ matrix.mT``.

    Args:
        dynamics: the model's dynamics.
        h: states, such as those of `smooth`, or draws of h (..., 4), such as those of `PixelModel.joint`.

    Returns:
        The mean (..., T, 2) and the covariance (..., T, 2, 2) given states, without the noise of the step; the moves
        (..., 2) given draws.
    """
    A, B, u = dynamics.lgssm()[:3]
    step_matrix = B @ A - B
    mean = (h if isinstance(h, Tensor) else h.mean).to(u.dtype) @ step_matrix.mT + B @ u
    return mean if isinstance(h, Tensor) else Gaussians(mean, step_matrix @ h.cov @ step_matrix.mT)


def _average(each: Gaussians) -> Gaussians:
    """Returns the moments of the equally weighted mixture of S Gaussians (S, ..., d)."""
    S = each.mean.shape[0]
    weights = each.mean.new_full((S,), 1 / S)
    return kalman.mixture_moments(weights, Gaussians(each.mean.movedim(0, -2), each.cov.movedim(0, -3)))
