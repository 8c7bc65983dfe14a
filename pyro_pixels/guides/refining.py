"""Positions improved at query time, by ascent on log p(v, a): what a guide proposes is where it starts.

An amortised guide answers at once and errs a little in every frame; what it exchanged in a meeting, `untangle` cannot
always put right, because its tracks bend there, and bent tracks can make a false name the likelier one under p(a)
alone. The model knows more: its renderer says where in the image an object is drawn. `refine` climbs on

    log p(a) + w log p(v | a)

from the guide's means, with Adam. The weight w grows from nearly 0 to 1 over the first half of the steps: tracks are
first drawn towards paths of the dynamics, on which names can be told, and then to the pixels. Names are put right by
`untangle` on the way. At the end the two objects that came closest are exchanged from that frame on, the ascent is
repeated from there, and the end with the higher log p(v, a) is kept. No labels and no other guide are used.

A track moves in two kinds of coordinates at once: a^n = a_0^n + L_k e^n + Sigma_A^(1/2) x^n, where L_k L_k' is the
covariance of p(a^n | z = k). Along e, whose first entries are the object's start, a whole path moves; along x every
frame by itself.

`RefinedGuide` is a guide whose means are refined and whose standard deviations are those of the guide inside, renamed:
amortised inference improved for each sequence (Kim et al., Semi-amortized variational autoencoders, 2018; Marino et
al., Iterative amortized inference, 2018). All queries and the bound can be asked with it.

Departures from the paper: it has nothing of the kind; its positions are those of the network (Sec 3.3).
"""

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
from pyro_pixels.guides.untangling import (
    ImageModel,
    check_tracks,
    exchanged,
    means_and_scales,
    own_names,
    pairs_of,
    renamed,
    untangle,
)
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.marginal import marginal_moments

N_STEPS = 100
LOWEST, LOWEST_AFTER = 0.002, 0.02  # w at the first step, and at the first one after an exchange
SHARE_AFTER = 0.6  # of the steps, after an exchange
PATH_RATE, FRAME_RATE, LAST = 0.05, 0.2, 0.05  # rates of Adam, in standard deviations, and their fraction at the end
RENAMINGS = 10
PIXELS_AT_ONCE = 2**23  # of all objects' images in one part


class Refined(NamedTuple):
    """Tracks with a higher log p(v, a)."""

    a: Tensor  # (B, N, T, 2)
    labels: Tensor  # (B, N, T) int64: object n of frame t began as what was given as object labels[b, n, t]
    gain: Tensor  # (B,), growth of log p(v, a) in nats, at least 0

    def rename(self, x: Tensor) -> Tensor:
        """Anything else of each object and frame, (B, N, T, ...), renamed alike, such as standard deviations."""
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
        """log p(a) and log p(v | a), both (B,), in float64, for tracks (B, n, T, 2)."""
        log_p_a = self.p_a.log_prob(a).sum(1)
        logits = self.model.renderer(a, self.present)
        p_v, seen = without_unseen(self.model.likelihood(logits), self.images)
        return log_p_a, p_v.log_prob(seen.to(logits.dtype)).to(log_p_a.dtype)

    def __call__(self, a: Tensor) -> Tensor:
        log_p_a, log_p_v = self.terms(a)
        return log_p_a + log_p_v

    def climb(self, a: Tensor, labels: Tensor, n_steps: int, lowest: float) -> tuple[Tensor, Tensor]:
        """The tracks and their labels after so many steps, w growing from ``lowest``."""
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


@torch.no_grad()
def refine(model: ImageModel, a: Tensor, n_objects: Tensor, images: Tensor, *, n_steps: int = N_STEPS) -> Refined:
    """Tracks with a higher log p(v, a) than those given, found by gradient ascent and exchanges of names.

    A local maximum, close to it after 100 steps. No sequence ends lower than it began. The weights of the model and the
    random state stay as they are.

    Args:
        model: a trained `PixelModel`.
        a: (B, N, T, 2), in latent units, such as `infer(...).mean`; absent objects are last.
        n_objects: (B,).
        images: (B, T, H, W) in [0, 1] or uint8; where frames are NaN, not seen, tracks follow the dynamics.
        n_steps: of the ascent, and 60 % of them again after names are exchanged. Time is proportional to it.

    Raises:
        ValueError: if the shapes do not fit each other, or ``n_steps`` is not a whole number above 0.
    """
    B, _, T = check_tracks(a, n_objects)
    if images.dim() != 4 or images.shape[:2] != (B, T):
        raise ValueError(f"images have shape {tuple(images.shape)}; wanted (B, T, H, W) with B, T = {B}, {T}")
    n_steps = check_number("n_steps", n_steps, 1)
    result = Refined(
        a.clone(),
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
    """Labels (B, N, T) that exchange the two objects of (B, N, T, 2), N > 1, that come closest, from that frame on."""
    N, T = a.shape[1:3]
    i, j = pairs_of(N, a.device)
    closest = (a[:, i] - a[:, j]).norm(dim=-1).flatten(1).argmin(1)  # over pairs and frames
    pair, frame = closest // T, closest % T
    after = torch.arange(T, device=a.device) >= frame[:, None]
    return exchanged(own_names(a), i[pair], j[pair], after)


class RefinedGuide(Guide):
    """A guide whose means are those of another one, refined by the model, with its standard deviations.

    For queries; it is not for training, as its means do not depend on its parameters by any gradient. The time of a
    query grows by a hundred passes through the renderer and back.

    Args:
        guide: whose `encode` gives independent normals, such as a `RecurrentGuide`.
        model: the trained model.
        n_steps: of `refine`.
    """

    def __init__(self, guide: Guide, model: ImageModel, *, n_steps: int = N_STEPS) -> None:
        super().__init__()
        self.guide, self.n_steps, self.pixel_evidence = guide, n_steps, guide.pixel_evidence
        self._model = [model]  # in a list, so that its parameters are not taken for the guide's

    def see(self, images: Tensor) -> Tensor:
        """Images as they are, in the guide's type: the likelihood is theirs, and unseen frames stay NaN."""
        return images.to(self.dtype)

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        return self._refined(images, images, n_objects)

    def q_observed(self, images: Tensor, n_objects: Tensor, observed: Tensor) -> dist.TorchDistribution:
        """Returns q(a | v), for which no frame counts in which an object is not ``observed``."""
        if observed.dim() > 1:
            absent = ~object_mask(n_objects, observed.shape[1]).unsqueeze(-1)
            observed = (observed | absent).all(1)
        return self._refined(images, torch.where(observed[..., None, None], self.see(images), torch.nan), n_objects)

    def _refined(self, images: Tensor, seen: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        mu, sigma = means_and_scales(self.guide.q(images, n_objects), self.guide, "`refine` on its means")
        found = refine(self._model[0], mu.detach(), n_objects, seen, n_steps=self.n_steps)
        return dist.Normal(found.a, found.rename(sigma), validate_args=False).to_event(2)
