"""Online filtering of positions or images, frame by frame at constant cost.

`step` updates the filtering distribution of an object after frame t - 1 with its position in frame t. `step_image`
updates it with an image, for guides whose network runs forward in time (Sec 2.2.1: s_t^n depends only on the past).
Both are pure functions of immutable states, which can be kept, compared and saved.

As in Sec 3.4, the guide's means are taken as the observed positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_pixels._batch import check_objects, counts, unseen_frames
from pyro_pixels._convert import checked_batch
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.lgssm.kalman import LGSSM, Gaussians
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import render


class FilterState(NamedTuple):
    """The filtering distribution of objects (...) after some frames, for each component."""

    mean: Tensor  # (..., K, 4), E[h_t | a_{1:t}, z = k]
    cov: Tensor  # (..., K, 4, 4)
    log_w: Tensor  # (..., K), log p(z = k | a_{1:t})
    log_likelihood: Tensor  # (...), log p(a_{1:t})
    n_frames: int  # t


def start(dynamics: Dynamics, batch_shape: torch.Size | tuple[int, ...] = ()) -> FilterState:
    """Returns the filter state before the first frame, the prior of h_1, for objects (*batch_shape)."""
    lgssm = dynamics.lgssm()
    log_w = dynamics.log_pi.to(lgssm.mu.dtype).log_softmax(-1)
    return FilterState(
        lgssm.mu.expand(*batch_shape, -1, -1),
        lgssm.Sigma.expand(*batch_shape, -1, -1, -1),
        log_w.expand(*batch_shape, -1),
        log_w.new_zeros(batch_shape),
        0,
    )


def step(lgssm: LGSSM, state: FilterState, a_t: Tensor, observed_t: Tensor | None = None) -> FilterState:
    """Updates the filter with one more frame.

    Args:
        lgssm: ``dynamics.lgssm()``.
        state: the state before the frame.
        a_t: (..., 2), the positions; unobserved ones may have any value, NaN included.
        observed_t: (...) bool, False where an object is not observed, or (B,) for objects (B, N); by default all are.
    """
    if observed_t is not None and observed_t.dim() == 1 and a_t.dim() > 2:  # one value per sequence
        observed_t = observed_t.unsqueeze(-1)
    a_t = a_t.to(state.mean.dtype).unsqueeze(-2)
    if observed_t is not None:
        observed_t = observed_t.unsqueeze(-1)
        a_t = torch.where(observed_t.unsqueeze(-1), a_t, 0.0)
    (mean, cov), log_density = kalman.update(lgssm, _predicted(lgssm, state), a_t, observed_t)
    log_joint = state.log_w + log_density
    log_p = log_joint.logsumexp(-1)
    log_w = log_joint - log_p.unsqueeze(-1)
    return FilterState(mean, cov, log_w, state.log_likelihood + log_p, state.n_frames + 1)


def filtered(state: FilterState) -> Gaussians:
    """Returns E[h_t | a_{1:t}] (..., 4) and its covariance (..., 4, 4), averaged over components."""
    return kalman.mixture_moments(state.log_w.exp(), Gaussians(state.mean, state.cov))


def forecast(lgssm: LGSSM, state: FilterState) -> Gaussians:
    """Returns E[a_{t+1} | a_{1:t}] (..., 2) and its covariance (..., 2, 2), averaged over components."""
    h = kalman.mixture_moments(state.log_w.exp(), _predicted(lgssm, state))
    return kalman.observation_moments(lgssm, h)


def _predicted(lgssm: LGSSM, state: FilterState) -> Gaussians:
    """Returns the predictive distribution of h in the next frame, for each component."""
    current = Gaussians(state.mean, state.cov)
    return kalman.predict(lgssm, current) if state.n_frames else current


class ImageStream(NamedTuple):
    """The state of online inference after some images."""

    s: Tensor  # (B, N, D), the states s_t^n of the inference network
    mean: Tensor  # (B, N, 2), mean of q(a_t | v_{1:t}), or the forecast if the image is missing; NaN before the first
    std: Tensor  # (B, N, 2), its standard deviation
    tracks: FilterState  # filter state of the objects, batch (B, N)
    n_objects: Tensor  # (B,)


@torch.no_grad()
def start_images(model: PixelModel, guide: Guide, n_objects: Tensor | int | Sequence[int]) -> ImageStream:
    """Returns the state before the first image.

    Args:
        model: the trained model.
        guide: a `RecurrentGuide` with an `InferenceRNN` and a head that works frame by frame.
        n_objects: (B,), a list, or one number for a single sequence.

    Raises:
        ValueError: if the guide cannot stream. A `StructuredGuide` and a `TrackingHead` cannot, because their posterior
            of a frame depends on later frames, and neither can guides without an `InferenceRNN`.
    """
    n_objects = counts(n_objects, like=next(model.parameters()))
    check_objects(n_objects)
    s = _network(guide)[0].start(n_objects)
    unknown = s.new_full((*s.shape[:2], 2), torch.nan)
    return ImageStream(s, unknown, unknown, start(model.dynamics, s.shape[:2]), n_objects)


@torch.no_grad()
def step_image(model: PixelModel, guide: Guide, stream: ImageStream, image: Tensor | None) -> ImageStream:
    """Updates the state with one more image.

    Where the image is missing, positions are forecast, and the network receives the rendered forecast (Sec 3.5).

    Args:
        model: the trained model.
        guide: as in `start_images`.
        stream: the state before the image.
        image: (B, H, W), in [0, 1] or uint8, NaN for the sequences in which it is missing, or None for all.

    Raises:
        ValueError: if the image does not fit the guide, has values outside [0, 1], or the guide cannot stream.
    """
    (rnn, head), lgssm, n_objects = _network(guide), model.dynamics.lgssm(), stream.n_objects
    if image is None:
        image = torch.full((len(n_objects), rnn.height, rnn.width), torch.nan, device=stream.s.device)
    frame, _ = checked_batch(image[:, None], n_objects, (rnn.height, rnn.width))  # (B, 1, H, W)
    seen = ~unseen_frames(frame)  # (B, 1)
    ahead = forecast(lgssm, stream.tracks)
    if not bool(seen.all()):
        drawn = render(model, ahead.mean.unsqueeze(2), n_objects)
        frame = torch.where(seen[..., None, None], frame, drawn.to(frame.dtype))
    frame = guide.see(frame)
    s = rnn.advance(stream.s, frame)
    mean, std = (x.squeeze(2) for x in head(s, frame, n_objects))
    if not bool(seen.all()):
        mean = torch.where(seen.unsqueeze(-1), mean, ahead.mean)
        std = torch.where(seen.unsqueeze(-1), std, ahead.cov.diagonal(dim1=-2, dim2=-1).sqrt())
    tracks = step(lgssm, stream.tracks, mean, seen.expand(mean.shape[:2]))
    return ImageStream(s.squeeze(2), mean, std, tracks, n_objects)


def _network(guide: Guide) -> tuple[InferenceRNN, nn.Module]:
    """Returns the network and the head of a guide that works frame by frame."""
    rnn, head = getattr(guide, "rnn", None), getattr(guide, "head", None)
    tracks = head is not None and any(isinstance(part, TrackingHead) for part in head.modules())  # it may be wrapped
    if isinstance(guide, RecurrentGuide) and isinstance(rnn, InferenceRNN) and not tracks:
        return rnn, guide.head
    parts = " and a ".join(type(part).__name__ for part in (rnn, head) if part is not None)
    raise ValueError(
        f"a {type(guide).__name__}{parts and f' with a {parts}'} looks at all frames before it infers positions in "
        "the first; wanted a RecurrentGuide with an InferenceRNN and a LinearHead or an AttentionHead, or use infer "
        "for all frames at once"
    )
