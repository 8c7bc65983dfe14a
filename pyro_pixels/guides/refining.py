"""Positions improved at query time by gradient ascent on log p(v, a), starting from the means of a guide.

An amortised guide answers at once, but errs a little in every frame. If it switches two identities when they meet,
`untangle` cannot always correct this: the tracks bend there, and with bent tracks the wrong identities can be likelier
under p(a) alone. The model knows more: its renderer determines where in the image an object is drawn. `refine` climbs

    log p(a) + w log p(v | a)

from the guide's means, with Adam. The weight w grows from nearly 0 to 1 over the first half of the steps: tracks first
move towards paths of the dynamics, on which identities can be recognised, and then towards the pixels. `untangle`
corrects identities on the way. At the end the two objects that came closest are exchanged from that frame on, the
ascent is repeated from there, and the result with the higher log p(v, a) is kept. No labels or other guides are used.

A track moves in two kinds of coordinates at once: a^n = a_0^n + L_k e^n + Sigma_A^(1/2) x^n, where L_k L_k' is the
covariance of p(a^n | z = k). Changes of e, whose first entries are the object's start, move a whole path; changes of x
move each frame separately.

`RefinedGuide` is a guide with refined means and the standard deviations of the guide inside, renamed: amortised
inference improved for each sequence (Kim et al., Semi-amortized variational autoencoders, 2018; Marino et al.,
Iterative amortized inference, 2018). It supports all queries and the bound.

Departures from the paper: refinement is not in the paper; its positions are those of the network (Sec 3.3).
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_pixels._batch import object_mask
from pyro_pixels._checks import check_number
from pyro_pixels._pyro import without_unseen
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.untangled import means_and_scales
from pyro_pixels.guides.untangling import (
    ImageModel,
    checked_tracks,
    exchanged,
    images_of_tracks,
    own_names,
    pairs_of,
    renamed,
    untangle,
)
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.marginal import marginal_moments

N_STEPS = 100
LOWEST, LOWEST_AFTER = 0.002, 0.02  # w at the first step, and at the first one after an exchange
SHARE_AFTER = 0.6  # steps after an exchange, as a share of n_steps
PATH_RATE, FRAME_RATE, LAST = 0.05, 0.2, 0.05  # learning rates, in standard deviations, and their final fraction
RENAMINGS = 10
PIXELS_AT_ONCE = 2**23  # pixels times objects that are processed at once


class Refined(NamedTuple):
    """Tracks with a higher log p(v, a)."""

    a: Tensor  # (B, N, T, 2)
    labels: Tensor  # (B, N, T) int64: object n of frame t started from the given object labels[b, n, t]
    gain: Tensor  # (B,), increase of log p(v, a) in nats, at least 0

    def rename(self, x: Tensor) -> Tensor:
        """Returns other values of each object and frame (B, N, T, ...), such as standard deviations, renamed alike."""
        return renamed(x, self.labels)


class _Joint:
    """log p(v, a) of sequences that all have n objects, and steps towards its maximum."""

    def __init__(self, model: ImageModel, images: Tensor, n: int) -> None:
        B, T = images.shape[:2]
        self.model, self.images, self.n_objects = model, images, torch.full((B,), n, device=images.device)
        self.present = object_mask(self.n_objects, n)
        lgssm = model.dynamics.lgssm()
        self.p_a = model.dynamics.positions(T)
        self.path = torch.linalg.cholesky_ex(marginal_moments(lgssm, T)[1]).L  # (K, 2 T, 2 T)
        self.frame = torch.linalg.cholesky_ex(lgssm.Sigma_A).L

    def terms(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p(a) and log p(v | a), both (B,), in float64, for tracks (B, n, T, 2)."""
        log_p_a = self.p_a.log_prob(a).sum(1)
        logits = self.model.renderer(a, self.present)
        p_v, seen = without_unseen(self.model.likelihood(logits), self.images)
        return log_p_a, p_v.log_prob(seen.to(logits.dtype)).to(log_p_a.dtype)

    def __call__(self, a: Tensor) -> Tensor:
        log_p_a, log_p_v = self.terms(a)
        return log_p_a + log_p_v

    def climb(self, a: Tensor, labels: Tensor, n_steps: int, lowest: float) -> tuple[Tensor, Tensor]:
        """Returns the tracks and their labels after ``n_steps`` steps, in which w grows from ``lowest``."""
        rename_every = max(1, n_steps // (2 * RENAMINGS))
        moving = _Moving(self, a)
        for step in range(n_steps):
            done = step / n_steps
            if step and step % rename_every == 0 and done < 0.5 and a.shape[1] > 1:
                found = untangle(self.model.dynamics, moving.tracks(), self.n_objects)
                labels, moving = renamed(labels, found.labels), _Moving(self, found.a)
            moving.step(weight=min(1.0, lowest ** (1 - 2 * done)), pace=1 - (1 - LAST) * done)
        return moving.tracks().to(a.dtype), labels


class _Moving:
    """Tracks (B, n, T, 2) that move along paths of the dynamics and frame by frame."""

    def __init__(self, joint: _Joint, a: Tensor) -> None:
        self.joint, self.start = joint, a
        k = joint.p_a.component_posterior(a).logits.argmax(-1)
        self.chosen = one_hot(k, len(joint.path)).to(joint.path.dtype)  # (B, n, K)
        along_path = torch.zeros_like(a, dtype=joint.path.dtype).flatten(2).requires_grad_()
        by_frame = torch.zeros_like(a, dtype=joint.path.dtype).requires_grad_()
        self.coordinates, self.rates = [along_path, by_frame], [PATH_RATE, FRAME_RATE]
        self.adam = torch.optim.Adam([{"params": [x]} for x in self.coordinates], lr=0.0, betas=(0.9, 0.99))

    def tracks(self) -> Tensor:
        along_path, by_frame = self.coordinates
        moved = torch.einsum("bnk,kij,bnj->bni", self.chosen, self.joint.path, along_path).view_as(by_frame)
        return self.start + (moved + by_frame @ self.joint.frame.mT).to(self.start.dtype)

    def step(self, weight: float, pace: float) -> None:
        with torch.enable_grad():
            log_p_a, log_p_v = self.joint.terms(self.tracks())
            gradients = torch.autograd.grad(-(log_p_a + weight * log_p_v).sum(), self.coordinates)
        for x, gradient, group, rate in zip(self.coordinates, gradients, self.adam.param_groups, self.rates):
            x.grad, group["lr"] = gradient, rate * pace
        self.adam.step()


@torch.inference_mode(False)  # gradients are needed
@torch.no_grad()
def refine(
    model: ImageModel,
    a: Tensor,
    n_objects: Tensor | int | Sequence[int],
    images: Tensor,
    *,
    n_steps: int = N_STEPS,
) -> Refined:
    """Returns tracks with a higher log p(v, a) than those given, found by gradient ascent and exchanges of objects.

    After 100 steps the result is close to a local maximum. No sequence ends with a lower value than at the start. The
    weights of the model and the random state do not change.

    Args:
        model: a trained `PixelModel`.
        a: (B, N, T, 2), in latent units, such as `infer(...).mean`; absent objects are last.
        n_objects: (B,), a list, or one number for all sequences.
        images: (B, T, H, W) in [0, 1] or uint8; in frames of NaN, which are unobserved, tracks follow the dynamics.
        n_steps: steps of the ascent; 60 % as many follow after the exchange. Time is proportional to it.

    Raises:
        ValueError: if the shapes do not fit each other, pixels are outside [0, 1], or ``n_steps`` is not a whole number
            above 0.
    """
    n_objects, B, _, T = checked_tracks(a, n_objects)
    images = images_of_tracks(model, images, n_objects, T)
    n_steps = check_number("n_steps", n_steps, 1)
    a, n_objects, images = a.clone(), n_objects.clone(), images.clone()  # tensors of inference mode have no gradients
    result = Refined(
        a,
        own_names(a),
        torch.zeros(B, dtype=kalman.exact_dtype(a.device), device=a.device),
    )
    for n in n_objects.unique().tolist():
        at_once = max(1, PIXELS_AT_ONCE // (n * images[0].numel()))
        for rows in (n_objects == n).nonzero().squeeze(1).split(at_once):
            found = _refine(_Joint(model, images[rows], n), a[rows, :n], n_steps)
            for whole, part in zip(result, found):
                whole[rows] = part if part.dim() == 1 else torch.cat([part, whole[rows, n:]], 1).to(whole.dtype)
    return result


def _refine(joint: _Joint, a: Tensor, n_steps: int) -> Refined:
    at_first = joint(a)
    best, best_labels, value = a, own_names(a), at_first

    def try_from(start: Tensor, labels: Tensor, n_steps: int, lowest: float) -> None:
        nonlocal best, best_labels, value
        found, labels = joint.climb(start, labels, n_steps, lowest)
        now = joint(found)
        better = now > value  # False for NaN
        best = torch.where(better[:, None, None, None], found, best)
        best_labels = torch.where(better[:, None, None], labels, best_labels)
        value = torch.where(better, now, value)

    start = untangle(joint.model.dynamics, a, joint.n_objects)
    try_from(start.a, start.labels, n_steps, LOWEST)
    if a.shape[1] > 1 and a.shape[2] > 1:
        other = exchange_where_closest(best)
        try_from(renamed(best, other), renamed(best_labels, other), ceil(SHARE_AFTER * n_steps), LOWEST_AFTER)
    return Refined(best, best_labels, value - at_first)


def exchange_where_closest(a: Tensor) -> Tensor:
    """Returns labels (B, N, T) that exchange the two of N > 1 objects that come closest, from that frame on."""
    N, T = a.shape[1:3]
    i, j = pairs_of(N, a.device)
    closest = (a[:, i] - a[:, j]).norm(dim=-1).flatten(1).argmin(1)  # over pairs and frames
    pair, frame = closest // T, closest % T
    after = torch.arange(T, device=a.device) >= frame[:, None]
    return exchanged(own_names(a), i[pair], j[pair], after)


class RefinedGuide(Guide):
    """A guide with the means of another guide, refined by the model, and with that guide's standard deviations.

    It is for queries, not for training, as no gradient flows from its means to its parameters. A query needs up to
    1.6 ``n_steps`` more forward and backward passes through the renderer.

    Args:
        guide: a guide whose `encode` returns independent normals, such as a `RecurrentGuide`.
        model: the trained model.
        n_steps: as in `refine`.
    """

    def __init__(self, guide: Guide, model: ImageModel, *, n_steps: int = N_STEPS) -> None:
        super().__init__()
        self.guide, self.n_steps, self.pixel_evidence = guide, n_steps, guide.pixel_evidence
        self._model = [model]  # in a list, so that its parameters are not registered as the guide's

    def see(self, images: Tensor) -> Tensor:
        """Returns the images, unchanged for the likelihood, in the guide's type; unobserved frames stay NaN."""
        return images.to(self.dtype)

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        return self._refined(images, images, n_objects)

    def q_observed(self, images: Tensor, n_objects: Tensor, observed: Tensor) -> dist.TorchDistribution:
        """Returns q(a | v) given only those frames in which all objects are ``observed``."""
        if observed.dim() > 1:
            absent = ~object_mask(n_objects, observed.shape[1]).unsqueeze(-1)
            observed = (observed | absent).all(1)
        return self._refined(images, torch.where(observed[..., None, None], self.see(images), torch.nan), n_objects)

    def _refined(self, images: Tensor, seen: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        mu, sigma = means_and_scales(self.guide.q(images, n_objects), self.guide, "`refine` on its means")
        found = refine(self._model[0], mu.detach(), n_objects, seen, n_steps=self.n_steps)
        return dist.Normal(found.a, found.rename(sigma), validate_args=False).to_event(2)
