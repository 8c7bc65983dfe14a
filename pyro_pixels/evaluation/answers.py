"""Inferences and predictions for sequences, computed once and shared by tables, checks and figures.

`infer_all` and `predict_all` process the sequences in batches; positions are padded with NaN to the largest N of all
and kept on the CPU.
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._batch import check_any
from pyro_pixels._checks import check_number
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.film import forecast_nll_per_frame
from pyro_pixels.guides.base import Guide, sample_positions
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.filled import interpolated, q_of_images
from pyro_pixels.queries.masks import seen_or_none
from pyro_pixels.queries.moments import mean_of
from pyro_pixels.queries.predict import Prediction, generate, interpolate
from pyro_pixels.training.elbo import AnnealedELBO, BoundTerms

N_SEEN = 5  # observed frames at the start, and for interpolation also at the end (Secs 3.4, 3.5)


class Inferences(NamedTuple):
    """Results of inference from all observed frames; positions in frames of NaN are inferred from the others."""

    mean: Tensor  # (n, N, T, 2), of q(a | v), latent
    drawn: Tensor  # (n, N, T, 2), a sample of q(a | v)
    terms: BoundTerms  # of Eq (7), (n,) each, from these samples


class Predictions(NamedTuple):
    """Generation after a few frames, and interpolation between some at either end."""

    n_seen: int
    generated: Tensor  # (n, N, T, 2), after n_seen frames
    interpolated: Tensor | None  # (n, N, T, 2); None if no frame lies between those at either end
    losses: dict[str, Tensor]  # (n,) each, of the frames after the first n_seen


def seen_by_default(n_frames: int) -> int:
    """Returns N_SEEN, or fewer for short sequences, so that a frame is left to interpolate if possible."""
    return max(1, min(N_SEEN, (n_frames - 1) // 2))


def check_n_seen(n_seen: int, n_frames: int, name: str = "n_seen") -> int:
    """Returns the number of observed frames if it leaves a frame between those at either end.

    Raises:
        ValueError: if it does not; ``name`` is the option's name in the message.
    """
    n_seen = check_number(name, n_seen)
    if n_seen < 1 or 2 * n_seen >= n_frames:
        most = (n_frames - 1) // 2
        advice = f"give {name} from 1 to {most}" if most else "give longer sequences"
        raise ValueError(f"{name} is {n_seen} at either end, but sequences have {n_frames} frames; {advice}")
    return n_seen


@torch.no_grad()
def infer_all(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Inferences:
    """Returns means, one draw, and the bound as `infer` and `training.elbo.bound` do, but computes q(a | v) only once.

    In frames of NaN, means are those of ``infer(..., model=model)``, and draws and the bound those of
    `queries.filled.q_of_images`, as in `log_evidence`; `training.elbo.bound` is of ``guide`` as it is trained.

    Args:
        seed: seeds the draws; the caller's random state is not changed.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: if there are no sequences, or they do not fit model and guide.
    """
    device = next(model.parameters()).device
    means, draws, terms, devices = [], [], [], [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for part in _batches(data, batch_size, "inference", progress):
            images, n_objects = part.images.to(device), part.n_objects.to(device)
            with torch.random.fork_rng(devices=devices):  # means may need samples
                known = None if seen_or_none(images) is None else interpolated(model, guide, images, n_objects)
            q_a = q_of_images(model, guide, images, n_objects, found=known)
            found, a = _bound_given(model, q_a, images, n_objects)
            with torch.random.fork_rng(devices=devices):
                means.append(mean_of(q_a) if known is None else known.mean)
            draws.append(a.to(means[-1]))
            terms.append([term.cpu().double() for term in found])
    N = int(data.n_objects.max())
    return Inferences(padded(means, N), padded(draws, N), BoundTerms(*(torch.cat(x) for x in zip(*terms))))


@torch.no_grad()
def predict_all(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    n_seen: int = N_SEEN,
    n_futures: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> Predictions:
    """Returns generated and interpolated positions, and the losses of the unobserved images.

    Args:
        n_seen: observed frames before generation, and at either end for interpolation if any frame lies between.
        n_futures: the number of sampled futures for the losses under their average; 0 leaves these losses out.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: if there are no sequences, or they are too short or do not fit the model.
    """
    device, T = next(model.parameters()).device, data.images.shape[1]
    generated, interpolated = [], []
    losses: dict[str, list[Tensor]] = {}
    for part in _batches(data, batch_size, "predictions", progress):
        images, n_objects = part.images.to(device), part.n_objects.to(device)
        future = forecast(model, guide, part, n_seen, n_samples=n_futures, covariances=False)
        generated.append(future.mean)
        ends = part.ends(n_seen).to(device)
        if 2 * n_seen < T:
            interpolated.append(interpolate(model, guide, images, n_objects, ends, covariances=False).mean)
        unseen, drawn = part.later(n_seen).float(), future.images[:, n_seen:].cpu()
        found = {
            "nll_per_frame_nats": metrics.nll_per_frame(unseen, drawn),
            "paper_style_loss": metrics.paper_style_loss(unseen, drawn),
        }
        if future.samples is not None and future.sample_images is not None:
            averaged = future.sample_images[:, :, n_seen:].mean(0).cpu()
            found["averaged_nll_per_frame_nats"] = metrics.nll_per_frame(unseen, averaged)
            found["forecast_nll_per_frame_nats"] = forecast_nll_per_frame(
                model, future.samples[..., n_seen:, :], unseen.to(device), n_objects
            )
        for name, value in found.items():
            losses.setdefault(name, []).append(value.double())
    N = int(data.n_objects.max())
    between = padded(interpolated, N) if interpolated else None
    return Predictions(n_seen, padded(generated, N), between, {name: torch.cat(x) for name, x in losses.items()})


def forecast(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    n_seen: int,
    *,
    n_frames: int | None = None,
    n_samples: int = 0,
    covariances: bool = True,
) -> Prediction:
    """Returns the `generate` of the frames after ``n_seen``, counted from each sequence's first observed one.

    Args:
        data: the sequences, on any device.
        n_frames: the total number of frames, at least those of ``data`` and by default as many.
        n_samples: as in `generate`, like ``covariances``.
    """
    device, T = next(model.parameters()).device, data.images.shape[1]
    images, n_objects, first = data.images.to(device), data.n_objects.to(device), data.first(n_seen).to(device)
    n_frames = T if n_frames is None else n_frames
    if first.dim() == 1:
        return generate(
            model, guide, images[:, :n_seen], n_objects, n_frames=n_frames, n_samples=n_samples, covariances=covariances
        )
    images = torch.cat([images, images.new_zeros(len(images), max(0, n_frames - T), *images.shape[2:])], 1)[
        :, :n_frames
    ]
    first = torch.nn.functional.pad(first, (0, max(0, n_frames - T)))[:, :n_frames]
    return interpolate(model, guide, images, n_objects, first, n_samples=n_samples, covariances=covariances)


def padded(parts: list[Tensor], n_objects: int) -> Tensor:
    """Joins positions (b, N, T, 2) of several batches, padded with NaN to ``n_objects`` objects, on the CPU."""
    return torch.cat([
        torch.nn.functional.pad(a, (0, 0, 0, 0, 0, n_objects - a.shape[1]), value=torch.nan).cpu() for a in parts
    ])  # fmt: skip


def _batches(data: ImageSequences, batch_size: int, what: str, progress: bool) -> "tqdm[ImageSequences]":
    check_any(len(data), "to evaluate")
    parts = [data[start : start + batch_size] for start in range(0, len(data), batch_size)]
    return tqdm(parts, desc=what, disable=None if progress else True, leave=False)


def _bound_given(
    model: PixelModel, q_a: dist.TorchDistribution, images: Tensor, n_objects: Tensor
) -> tuple[BoundTerms, Tensor]:
    """Returns the terms of Eq (7) (B,) of images (B, T, H, W) from one sample of a given q(a | v), and the sample."""
    drawn: list[Tensor] = []

    def guide(_: Tensor, n_objects: Tensor) -> None:
        drawn.append(sample_positions(q_a, n_objects))

    elbo = AnnealedELBO()
    elbo.differentiable_loss(model, guide, images, n_objects)
    assert elbo.terms is not None
    return elbo.terms, drawn[0]
