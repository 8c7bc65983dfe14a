"""Inference, generation and interpolation with a trained model (Secs 3.3-3.5).

Queries take a model, any `Guide`, and images, and train nothing. Means follow the paper's procedure. Samples propagate
the uncertainty of q(a | v), of the component z and of the states h. Given positions a, inference of h and z is exact.

Departures from the paper: k* is inferred from all observed frames, also those after a gap; any frames may be missing,
for all or for single objects; and guides that contain the dynamics (`Guide.encode_observed`) return their own
posterior instead of passing means to a smoother.

Shapes: B sequences, N objects (the largest of the batch), T frames, S samples; positions are latent, float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_pixels._batch import counts, object_mask
from pyro_pixels._checks import check_number
from pyro_pixels._convert import as_batch, checked_batch
from pyro_pixels._matching import reorder
from pyro_pixels._pyro import check_precision_of
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.missing import q_where_known
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, select_component
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.masks import checked_mask, frames_seen_in, gaps_of, seen_or_none, sequence_mask
from pyro_pixels.queries.moments import States, moments_of, no_covariance, prior_moments
from pyro_pixels.queries.numbering import order_as_in, reordered
from pyro_pixels.queries.parts import in_parts, join, joined_groups, rows_of_parts


class Inference(NamedTuple):
    """The moments and samples of q(a | v), the positions of the objects."""

    mean: Tensor  # (B, N, T, 2)
    std: Tensor  # (B, N, T, 2)
    samples: Tensor | None  # (S, B, N, T, 2)
    cov: Tensor | None = None  # (B, N, T, 2, 2), of a_t

    def check(self, n_sequences: int, most_objects: int) -> None:
        """Raises ValueError unless this is of ``n_sequences`` sequences with at least ``most_objects`` objects."""
        if len(self.mean) != n_sequences or self.mean.shape[1] < most_objects:
            raise ValueError(
                f"inferred has means {tuple(self.mean.shape)} for {n_sequences} sequences of up to {most_objects} "
                "objects; give the result of infer for these images"
            )

    def of_part(self, part: slice, n_sequences: int, most_objects: int) -> "Inference":
        """Returns the inference for the sequences ``part``, which have at most ``most_objects`` objects."""
        mean, std = self.mean[part, :most_objects], self.std[part, :most_objects]
        samples = None if self.samples is None else self.samples[:, part, :most_objects]
        return Inference(mean, std, samples, None if self.cov is None else self.cov[part, :most_objects])


class Prediction(NamedTuple):
    """Positions and images in all T frames, observed or not."""

    mean: Tensor  # (B, N, T, 2), inferred in observed frames, predicted in the others
    cov: Tensor  # (B, N, T, 2, 2), covariance of a_t, Sigma_A included
    images: Tensor  # (B, T, H, W) pixel probabilities, rendered from the means
    observed: Tensor  # bool, the observed frames: (T,), (B, 1, T), or for each object (B, N, T)
    component: Tensor  # (B, N), k* = argmax_k p(z = k | a)
    samples: Tensor | None  # (S, B, N, T, 2)
    sample_images: Tensor | None  # (S, B, T, H, W) pixel probabilities, rendered from the samples


@in_parts()
@torch.no_grad()
def infer(
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    n_samples: int = 0,
    model: PixelModel | None = None,
) -> Inference:
    """Infers positions from images (Sec 3.3).

    Args:
        guide: the trained guide.
        images: (B, T, H, W) in [0, 1] or uint8; in all queries, frames of NaN count as unobserved.
        n_objects: (B,), a list, or one number for all sequences.
        n_samples: S, 0 for no samples.
        model: the trained model; with it, positions in frames of NaN are those of `interpolate`. Without it they are
            NaN, unless the guide contains the dynamics. A sequence without any other frame has the moments of p(a).

    Raises:
        ValueError: if the images do not fit the guide, or have values outside [0, 1].
    """
    images, n_objects = checked_batch(images, n_objects)
    n_samples = check_number("n_samples", n_samples, 0)
    if model is not None and (seen := seen_or_none(images)) is not None:
        found = interpolate(model, guide, images, n_objects, torch.ones_like(seen[0, 0]), n_samples=n_samples)
        return Inference(found.mean, found.cov.diagonal(dim1=-2, dim2=-1).sqrt(), found.samples, found.cov)
    q_a, known = q_where_known(guide, images, n_objects)
    mean, cov = moments_of(q_a)
    mean, cov = torch.where(known, mean, torch.nan), torch.where(known.unsqueeze(-1), cov, torch.nan)
    samples = torch.where(known, q_a.sample(torch.Size((n_samples,))).to(mean.dtype), torch.nan) if n_samples else None
    return Inference(mean, cov.diagonal(dim1=-2, dim2=-1).sqrt(), samples, cov)


@torch.no_grad()
def reconstruct(model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor | int | Sequence[int]) -> Tensor:
    """Renders the inferred means as pixel probabilities (B, T, H, W); arguments and errors are those of `infer`."""
    images, n_objects = as_batch(images, n_objects)
    return render(model, infer(guide, images, n_objects, model=model).mean, n_objects)


@torch.no_grad()
def render(model: PixelModel, a: Tensor, n_objects: Tensor | int | Sequence[int]) -> Tensor:
    """Renders positions (..., B, N, T, 2) as expected images (..., B, T, H, W), Eqs (1)-(2).

    Raises:
        ValueError: if the positions have another shape, or the model is in half precision or under autocast.
    """
    check_precision_of("model", model)
    if not isinstance(a, Tensor) or a.dim() < 4 or a.shape[-1] != 2:
        raise ValueError(f"positions have shape {tuple(getattr(a, 'shape', ()))}; wanted (..., B, N, T, 2)")
    present = object_mask(counts(n_objects, a.shape[-4], a), a.shape[-3])
    rows = rows_of_parts(a.shape[-4], a[..., :1, :1, :, 0].numel() * model.renderer.height * model.renderer.width)
    logits = (model.renderer(a[..., row, :, :, :], present[row]) for row in rows)
    return join((model.likelihood.checked_mean(x) for x in logits), rows, -4)


@torch.no_grad()
def smooth(dynamics: Dynamics, a: Tensor, observed: Tensor | None = None) -> States:
    """Returns positions and velocities in every frame given positions in the observed ones, by exact smoothing.

    Args:
        dynamics: the model's dynamics.
        a: (..., T, 2).
        observed: bool, False where a frame is missing; by default all are observed whose positions are not NaN. It
            broadcasts to (..., T); for positions (..., B, N, T, 2), a mask (B, T) is one of sequences.
    """
    lgssm, observed = dynamics.lgssm(), sequence_mask(observed, a)
    p_z = dynamics.component_posterior(a, observed).probs
    each = kalman.rts_smoother(lgssm, a.unsqueeze(-3), None if observed is None else observed.unsqueeze(-2))
    over_time = kalman.Gaussians(each.mean.movedim(-3, -2), each.cov.movedim(-4, -3))  # (..., T, K, ...)
    mean, cov = kalman.mixture_moments(p_z.unsqueeze(-2), over_time)
    return States(mean, cov, p_z)


@in_parts(with_images=True)
@torch.no_grad()
def generate(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    n_frames: int,
    n_samples: int = 0,
    covariances: bool = True,
) -> Prediction:
    """Generates the frames that follow (Sec 3.4).

    a_{1:tau} are the guide's means, k* is the likeliest component given them, and E[h_tau | a_{1:tau}, k*] the filtered
    mean, which the learned dynamics extend to frame T; each position is then rendered. For samples, a, z and h are
    drawn instead. A guide that contains the dynamics returns E[a_{1:T} | v_{1:tau}] itself.

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, tau, H, W), the given frames; those of NaN are filled in as by `interpolate`.
        n_objects: (B,), a list, or one number for all sequences.
        n_frames: T, the total number of frames, more than tau.
        n_samples: S, 0 for no samples.
        covariances: False leaves ``cov`` NaN, which takes less time.

    Raises:
        ValueError: if tau >= T, or as in `infer`.
    """
    n_frames, n_samples = check_number("n_frames", n_frames), check_number("n_samples", n_samples, 0)
    images, n_objects = checked_batch(images, n_objects)
    tau = images.shape[1]
    if n_frames <= tau:
        raise ValueError(f"n_frames is {n_frames} and includes the {tau} observed frames; give more than {tau}")
    images = torch.cat([images, images.new_zeros(len(images), n_frames - tau, *images.shape[2:])], 1)
    observed = torch.arange(n_frames, device=images.device) < tau
    return interpolate(model, guide, images, n_objects, observed, n_samples=n_samples, covariances=covariances)


@in_parts(with_images=True)
@torch.no_grad()
def interpolate(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    observed: Tensor,
    *,
    n_samples: int = 0,
    covariances: bool = True,
    inferred: Inference | None = None,
) -> Prediction:
    """Infers missing frames (Sec 3.5): between observed ones, before the first or after the last; or hidden objects.

    Each gap is first filled with images generated from the frames before it, so that the states of the guide's network
    are warmed up when it reaches the frames after the gap. The guide's means in the observed frames then serve as
    observations of a smoother that treats the other frames as missing. In the paper ``observed`` is true in frames 1..5
    and 26..30. The network starts at the first observed frame.

    An object may be hidden in an observed frame: the guide's position for it is then ignored and inferred from the
    object's other frames.

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W); frames in which no object is observed are ignored, whatever they hold.
        n_objects: (B,), a list, or one number for all sequences.
        observed: bool, (T,) for all sequences, (B, T) for each, or (B, N, T) for each object, with at least one true
            frame in every sequence. If these are all NaN, the prediction is p(a).
        n_samples: S, 0 for no samples.
        covariances: False leaves ``cov`` NaN, which takes less time.
        inferred: a result of `infer` for these sequences. Objects are numbered as in it, in ``observed`` and in the
            result, by `numbered_as`; by default they are numbered as by the guide given these frames.

    Raises:
        ValueError: if ``observed`` is not such a mask, or as in `infer` and `numbered_as`.
    """
    n_samples = check_number("n_samples", n_samples, 0)
    images, n_objects = checked_batch(images, n_objects, values=False)
    observed = checked_mask(observed, images, n_objects)
    patterns = frames_seen_in(observed)  # (T,) or (B, T)
    images = images.to(guide.dtype)
    if inferred is not None:
        own = interpolate(model, guide, images, n_objects, patterns, covariances=False)
        order = order_as_in(inferred, own.mean, n_objects, patterns)
        mask = reorder(observed, order.argsort(1)) if observed.dim() == 3 and observed.shape[1] > 1 else patterns
        found = interpolate(model, guide, images, n_objects, mask, n_samples=n_samples, covariances=covariances)
        return reordered(found, order)
    if patterns.dim() == 1:
        return _interpolate(model, guide, images, n_objects, observed, patterns, n_samples, covariances)
    each, group = patterns.unique(dim=0, return_inverse=True)
    rows = [(group == i).nonzero().squeeze(1) for i in range(len(each))]
    parts = [
        _interpolate(
            model, guide, images[r], n_objects[r], observed[r, : int(n_objects[r].max())], seen, n_samples, covariances
        )
        for r, seen in zip(rows, each)
    ]
    return joined_groups(parts, torch.cat(rows))._replace(observed=observed)


def _interpolate(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor,
    observed: Tensor,
    frames_seen: Tensor,
    n_samples: int,
    covariances: bool,
) -> Prediction:
    """Interpolates sequences with the same observed frames (T,)."""
    filled = torch.where(frames_seen[:, None, None], images, 0.0)  # unobserved frames may be NaN
    for start, stop in gaps_of(frames_seen):
        so_far = observed[..., :stop] & (torch.arange(stop, device=observed.device) < start)
        prediction = _predict(model, guide, filled[:, :stop], n_objects, so_far, covariances=False)
        filled[:, start:stop] = prediction.images[:, start:stop].clamp(0, 1)
    return _predict(model, guide, filled, n_objects, observed, n_samples, covariances)


def _predict(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor,
    observed: Tensor,
    n_samples: int = 0,
    covariances: bool = True,
) -> Prediction:
    """Predicts all frames from the observed ones; unobserved ``images`` are generated ones."""
    samples, known = None, observed.unsqueeze(-1)
    if not bool(observed.any()):
        tracks = (len(images), int(n_objects.max()))
        mean, cov = (x.expand(*tracks, *x.shape) for x in prior_moments(model.dynamics, images.shape[1]))
        k = model.dynamics.log_pi.argmax().expand(tracks)
        if n_samples:
            samples = model.dynamics.positions(images.shape[1]).sample((n_samples, *tracks))
    elif (knows_dynamics := guide.encode_observed(guide.see(images), n_objects, observed)) is not None:
        q_a, p_z = knows_dynamics
        mean, k = q_a.mean, p_z.logits.argmax(-1)
        cov = q_a.frame_covariance if covariances else no_covariance(mean)  # type: ignore[attr-defined]
        if n_samples:
            samples = q_a.sample(torch.Size((n_samples,)))
    else:
        T, seen_at = images.shape[1], observed.reshape(-1, images.shape[1]).any(0).nonzero()
        first, last = int(seen_at.min()), int(seen_at.max()) + 1  # the dynamics predict the frames outside
        q_a = guide.q_observed(images[:, first:last], n_objects, observed[..., first:last])
        seen, seen_cov = moments_of(q_a)
        seen, seen_cov = F.pad(seen, (0, 0, first, T - last)), F.pad(seen_cov, (0, 0, 0, 0, first, T - last))
        dynamics = model.dynamics
        k = dynamics.component_posterior(seen, observed).logits.argmax(-1)
        lgssm = select_component(dynamics.lgssm(), k)
        smoothed = kalman.observation_moments(lgssm, kalman.rts_smoother(lgssm, seen, observed))
        mean = torch.where(known, seen, smoothed.mean)
        cov = no_covariance(mean)
        if covariances:
            cov = torch.where(known.unsqueeze(-1), seen_cov, smoothed.cov)
        if n_samples:
            a = F.pad(q_a.sample(torch.Size((n_samples,))).to(mean.dtype), (0, 0, first, T - last))
            lgssm = select_component(dynamics.lgssm(), dynamics.component_posterior(a, observed).sample())
            samples = torch.where(
                known, a, kalman.sample_observations(lgssm, kalman.sample_posterior(lgssm, a, observed))
            )
    sample_images = None if samples is None else render(model, samples, n_objects)
    return Prediction(mean, cov, render(model, mean, n_objects), observed, k, samples, sample_images)
