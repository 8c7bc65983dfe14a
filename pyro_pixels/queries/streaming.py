"""Filtering frame by frame, at constant cost: for positions as they come in, and for images.

`step` takes what is known of an object after frame t - 1 and the position in frame t, and gives what is known after
frame t; `step_image` does the same with an image, for guides whose network runs forward in time (Sec 2.2.1: s_t^n needs
nothing but the past). Both are pure functions of immutable states, which can be kept, compared, and saved.

As in Sec 3.4 the means that a guide infers are taken for the positions that are seen.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_pixels import lgssm as exact
from pyro_pixels._batch import check_batch, check_objects
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.lgssm.kalman import LGSSM, Gaussians
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import render


class FilterState(NamedTuple):
    """What is known of objects (...) after some frames, component by component."""

    mean: Tensor  # (..., K, 4), E[h_t | a_{1:t}, z = k]
    cov: Tensor  # (..., K, 4, 4)
    log_w: Tensor  # (..., K), log p(z = k | a_{1:t})
    log_likelihood: Tensor  # (...), log p(a_{1:t})
    n_frames: int  # t


def start(dynamics: Dynamics, batch_shape: torch.Size | tuple[int, ...] = ()) -> FilterState:
    """What is known of objects (*batch_shape) before the first frame: where they may start."""
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
    """What is known after one more frame.

    Args:
        lgssm: ``dynamics.lgssm()``.
        a_t: (..., 2), where the objects are seen; anything, NaN included, where they are not.
        observed_t: (...) bool, False where an object is not seen; default: all are.
    """
    a_t = a_t.to(state.mean.dtype).unsqueeze(-2)
    if observed_t is not None:
        observed_t = observed_t.unsqueeze(-1)
        a_t = torch.where(observed_t.unsqueeze(-1), a_t, 0.0)
    (mean, cov), log_density = exact.update(lgssm, _predicted(lgssm, state), a_t, observed_t)
    log_joint = state.log_w + log_density
    log_p = log_joint.logsumexp(-1)
    log_w = log_joint - log_p.unsqueeze(-1)
    return FilterState(mean, cov, log_w, state.log_likelihood + log_p, state.n_frames + 1)


def filtered(state: FilterState) -> Gaussians:
    """E[h_t | a_{1:t}] (..., 4) and its covariance (..., 4, 4), components averaged out."""
    return exact.mixture_moments(state.log_w.exp(), Gaussians(state.mean, state.cov))


def forecast(lgssm: LGSSM, state: FilterState) -> Gaussians:
    """E[a_{t+1} | a_{1:t}] (..., 2) and its covariance (..., 2, 2), Sigma_A included, components averaged out."""
    h = exact.mixture_moments(state.log_w.exp(), _predicted(lgssm, state))
    return exact.observation_moments(lgssm, h)


def _predicted(lgssm: LGSSM, state: FilterState) -> Gaussians:
    now = Gaussians(state.mean, state.cov)
    return exact.predict(lgssm, now) if state.n_frames else now


class ImageStream(NamedTuple):
    """What is known after some images."""

    s: Tensor  # (B, N, D), the states s_t^n of the inference network
    mean: Tensor  # (B, N, 2), of q(a_t | v_{1:t}); the forecast where the image was missing; NaN before the first
    std: Tensor  # (B, N, 2), of q(a_t | v_{1:t})
    tracks: FilterState  # of the objects, batch (B, N)
    n_objects: Tensor  # (B,)


@torch.no_grad()
def start_images(model: PixelModel, guide: Guide, n_objects: Tensor) -> ImageStream:
    """What is known before the first image.

    Raises:
        ValueError: if the guide cannot stream: `StructuredGuide`, whose posterior of a frame and `TrackingHead`, whose
            association of pixels both look at all frames, also later ones; guides without an `InferenceRNN`.
    """
    check_objects(n_objects)
    s = _network(guide)[0].start(n_objects)
    nothing = s.new_full((*s.shape[:2], 2), torch.nan)
    return ImageStream(s, nothing, nothing, start(model.dynamics, s.shape[:2]), n_objects)


@torch.no_grad()
def step_image(model: PixelModel, guide: Guide, stream: ImageStream, image: Tensor | None) -> ImageStream:
    """What is known after one more image (B, H, W), in [0, 1] or uint8.

    Where the image is missing, None, positions are forecast, and the network is shown the forecast (Sec 3.5).

    Raises:
        ValueError: if the image does not fit the guide, or the guide cannot stream.
    """
    (rnn, head), lgssm = _network(guide), model.dynamics.lgssm()
    n_objects, seen = stream.n_objects, image is not None
    ahead = forecast(lgssm, stream.tracks)
    frame = render(model, ahead.mean.unsqueeze(2), n_objects) if image is None else image.unsqueeze(1)
    frame = frame.to(guide.dtype)  # (B, 1, H, W)
    check_batch(frame, n_objects, (rnn.height, rnn.width))
    s = rnn.advance(stream.s, frame)
    if seen:
        mean, std = (x.squeeze(2) for x in head(s, frame, n_objects))
    else:
        mean, std = ahead.mean, ahead.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    observed = torch.full(mean.shape[:2], seen, device=mean.device)
    return ImageStream(s.squeeze(2), mean, std, step(lgssm, stream.tracks, mean, observed), n_objects)


def _network(guide: Guide) -> tuple[InferenceRNN, nn.Module]:
    """What gives states frame by frame, and what reads positions from them."""
    rnn, head = getattr(guide, "rnn", None), getattr(guide, "head", None)
    if isinstance(guide, RecurrentGuide) and isinstance(rnn, InferenceRNN) and not isinstance(head, TrackingHead):
        return rnn, guide.head
    parts = " and a ".join(type(part).__name__ for part in (rnn, head) if part is not None)
    raise ValueError(
        f"a {type(guide).__name__}{parts and f' with a {parts}'} looks at all frames before it says where objects are "
        "in the first; wanted a RecurrentGuide with an InferenceRNN and a LinearHead or an AttentionHead, or infer for "
        "all frames at once"
    )
