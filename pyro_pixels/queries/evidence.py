"""The evidence of images and the number of objects: importance-weighted bounds on log p(v).

With S samples a^s of q(a | v),

    log p(v) >= < log 1/S sum_s w_s >,   w_s = p(v | a^s) p(a^s) / q(a^s | v),

which is the ELBO of Eq (7) for S = 1 and rises to log p(v) as S grows (Burda et al., 2016). The effective sample size,
(sum w)^2 / sum w^2, shows how reliable the bound is: near 1, a single sample carries all the weight.

Weights are unbiased for any proposal distribution, so samples from several proposals can be averaged. The evidence for
N objects uses samples of q for N objects, and samples of q for N + 1 objects with one left out: when the guide fails
with N, it often succeeds with one more.

Samples are drawn one after another and only their weights are kept, so memory does not grow with S.

Shapes are those of `pyro_pixels.queries.predict`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._batch import check_any, object_mask
from pyro_pixels._checks import check_number
from pyro_pixels._convert import checked_batch
from pyro_pixels._pyro import without_unseen
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.filled import q_of_images


class Evidence(NamedTuple):
    """A lower bound on log p(v) of each sequence, in nats."""

    log_evidence: Tensor  # (B,), float64
    effective_samples: Tensor  # (B,), effective sample size, from 1 to S


class Count(NamedTuple):
    """The posterior of the number of objects."""

    n_objects: Tensor  # (B,), the most probable number
    probs: Tensor  # (B, max_objects + 1), p(N | v) for N = 0, 1, ...
    log_evidence: Tensor  # (B, max_objects + 1), the bounds on log p(v | N)
    effective_samples: Tensor  # (B, max_objects + 1)


@torch.no_grad()
def log_evidence(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    n_samples: int = 50,
    chunk_size: int = 100,
) -> Evidence:
    """Returns the importance-weighted bound on log p(v | N) of each sequence.

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W) within [0, 1]; frames of NaN are unobserved.
        n_objects: (B,), a list, or one number for all sequences.
        n_samples: S, at least 1.
        chunk_size: the number of sequences processed at once.

    Raises:
        ValueError: if ``n_samples`` or ``chunk_size`` is below 1, or the input does not fit together.
    """
    images, n_objects = checked_batch(images, n_objects, (model.renderer.height, model.renderer.width))
    log_w = []
    for chunk in _chunks(len(images), chunk_size, n_samples):
        q_a = q_of_images(model, guide, images[chunk], n_objects[chunk])
        present = object_mask(n_objects[chunk], q_a.batch_shape[1])
        log_w.append(_log_weights(model, q_a, images[chunk], [present], n_samples)[0])
    return _summary(torch.cat(log_w, 1))


@torch.no_grad()
def count_objects(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    max_objects: int = 3,
    *,
    log_prior: Tensor | None = None,
    n_samples: int = 10,
    chunk_size: int = 100,
    progress: bool = False,
) -> Count:
    """Returns p(N | v) for N = 0, ..., ``max_objects`` from the evidence for each N; that of N = 0 is exact.

    A superfluous object can hide behind another and explain the images just as well, but its KL lowers the evidence in
    every frame. So it is the evidence that rejects too large N, not the reconstruction.

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W) within [0, 1]; frames of NaN are unobserved.
        max_objects: the largest N, at least 1.
        log_prior: (max_objects + 1,), log p(N) up to a constant; by default uniform.
        n_samples: S, drawn from q for each number of objects up to ``max_objects + 1``.
        chunk_size: the number of sequences processed at once.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: if there are no images, ``max_objects`` is below 1, ``log_prior`` has another length, or as in
            `log_evidence`.
    """
    max_objects = check_number("max_objects", max_objects, 1)
    if log_prior is not None and log_prior.shape != (max_objects + 1,):
        raise ValueError(f"log_prior has shape {tuple(log_prior.shape)}; wanted ({max_objects + 1},), N = 0 included")
    check_any(len(images), "to count objects in")
    images, _ = checked_batch(images, 1, (model.renderer.height, model.renderer.width))
    chunks = _chunks(len(images), chunk_size, n_samples)
    steps = len(chunks) * (max_objects + 1) * n_samples
    with tqdm(total=steps, desc="samples", disable=None if progress else True, leave=False) as bar:
        parts = [_evidence_by_count(model, guide, images[c], max_objects, n_samples, bar.update) for c in chunks]
    log_p, effective = (torch.cat(x) for x in zip(*parts))
    posterior = log_p if log_prior is None else log_p + log_prior.to(log_p)
    return Count(posterior.argmax(-1), posterior.softmax(-1), log_p, effective)


def _evidence_by_count(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    max_objects: int,
    n_samples: int,
    on_sample: Callable[[], object],
) -> tuple[Tensor, Tensor]:
    """Returns the bounds and the effective sample sizes, each (B, max_objects + 1), for every N."""
    one = torch.ones(len(images), dtype=torch.long, device=images.device)
    log_w: list[list[Tensor]] = [[] for _ in range(max_objects + 2)]
    log_w[0].append(_log_empty(model, images).expand(n_samples, -1))
    for n in range(1, max_objects + 2):
        everyone = torch.ones(n, dtype=torch.bool, device=images.device)
        all_but_one = ~torch.eye(n, dtype=torch.bool, device=images.device)
        kept = [everyone, *(all_but_one if n > 1 else [])]
        q_a = q_of_images(model, guide, images, n * one)
        weights = _log_weights(model, q_a, images, kept, n_samples, on_sample)
        log_w[n].append(weights[0])
        log_w[n - 1] += weights[1:]
    each = [_summary(torch.cat(samples)) for samples in log_w[:-1]]
    return torch.stack([x.log_evidence for x in each], -1), torch.stack([x.effective_samples for x in each], -1)


def _chunks(n: int, chunk_size: int, n_samples: int) -> list[slice]:
    """Checks the options and returns slices of at most ``chunk_size`` sequences."""
    chunk_size, _ = check_number("chunk_size", chunk_size, 1), check_number("n_samples", n_samples, 1)
    return [slice(i, i + chunk_size) for i in range(0, n, chunk_size)]


def _summary(log_w: Tensor) -> Evidence:
    """Summarises log-weights (S, B)."""
    return Evidence(log_w.logsumexp(0) - math.log(len(log_w)), 1 / log_w.softmax(0).square().sum(0))


def _log_weights(
    model: PixelModel,
    q_a: dist.TorchDistribution,
    images: Tensor,
    kept: Sequence[Tensor],
    n_samples: int,
    on_sample: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """Returns log w (S, B), float64, for each of the ``kept`` masks of objects, (N,) or (B, N)."""
    p_a = model.dynamics.positions(images.shape[1])
    log_w: list[list[Tensor]] = [[] for _ in kept]
    for _ in range(n_samples):
        a = q_a.sample()
        log_ratio = p_a.log_prob(a) - q_a.log_prob(a).double()  # (B, N)
        for weights, mask in zip(log_w, kept):
            weights.append(_log_pixels(model, a, mask, images) + torch.where(mask, log_ratio, 0.0).sum(-1))
        on_sample()
    return [torch.stack(weights) for weights in log_w]


def _log_pixels(model: PixelModel, a: Tensor, present: Tensor, images: Tensor) -> Tensor:
    """Returns log p(v | a) (B,), float64, of the observed frames."""
    logits = model.renderer(a, present).double()
    p_v, v = without_unseen(model.likelihood(logits), images)
    return p_v.log_prob(v.to(logits.dtype))  # type: ignore[no-any-return]


def _log_empty(model: PixelModel, images: Tensor) -> Tensor:
    """Returns log p(v) (B,) with no object."""
    nowhere = torch.zeros(len(images), 1, images.shape[1], 2, device=images.device)
    return _log_pixels(model, nowhere, torch.zeros(1, dtype=torch.bool, device=images.device), images)
