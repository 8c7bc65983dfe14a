"""Distillation: a guide learns from the samples of another guide.

With the ELBO alone, the paper's network needs a great many steps (docs/reproduction.md), because information on the
positions reaches it only through the renderer. A `StructuredGuide` finds objects within minutes. Its samples
(`draw_tracks`) can serve as targets for the other guide, which then learns q(a | v) by maximum likelihood
(`GivenTracks`), a regression:

    minimise  E_{a ~ q_teacher(a | v)} [-log q(a | v)] = KL(q_teacher || q) + const.

Only images are used, no labels. Objects have no order, so the loss uses the order of the teacher's tracks that is
most likely under q itself. The result is an ordinary guide of the same model: all queries work, and it can be trained
further with the ELBO.

Departure from the paper: the objective is not a bound on log p(v). It is the wake-phase objective of Bornschein and
Bengio (Reweighted wake-sleep, 2015) with a teacher's samples instead of importance samples.
"""

from functools import lru_cache
from itertools import permutations
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_pixels._batch import object_mask
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.training.elbo import AnnealedELBO, BoundTerms
from pyro_pixels.training.modes import evaluating

MOST_OBJECTS = 6
"""The largest N, because all N! orders are evaluated: 720 for six objects."""


class GivenTracks(AnnealedELBO):
    """The objective -log q(a | v) of given tracks, for `fit(..., objective=GivenTracks, tracks=...)`; needs no model.

    `terms` are 0 and -log q, so that the "KL" of metrics.jsonl is -log q per frame.
    """

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns -log q(a | v), summed over sequences, for images, n_objects and tracks a (B, N, T, 2).

        Raises:
            ValueError: if no tracks are given.
        """
        if len(args) != 3:
            raise ValueError("GivenTracks needs tracks; pass them to fit, such as tracks=draw_tracks(teacher, data)")
        images, n_objects, tracks = args
        q_a = guide.q(images, n_objects)
        log_q = log_prob_in_best_order(q_a, tracks[:, : q_a.batch_shape[1]], n_objects)
        self.terms = BoundTerms(torch.zeros_like(log_q), -log_q.detach())
        return -log_q.sum()


@torch.no_grad()
def draw_tracks(guide: Guide, data: ImageSequences, *, batch_size: int = 100, seed: int = 0) -> Tensor:
    """Draws one sample of q(a | v) for each sequence, (n, N, T, 2) on the CPU; absent objects are last."""
    device, most = next(guide.parameters()).device, int(data.n_objects.max())
    drawn = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(guide):
        torch.manual_seed(seed)
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            a = guide.q(part.images.to(device), part.n_objects.to(device)).sample().float().cpu()
            drawn.append(pad(a, (0, 0, 0, 0, 0, most - a.shape[1])))
    return torch.cat(drawn)


def log_prob_in_best_order(q_a: dist.TorchDistribution, a: Tensor, n_objects: Tensor) -> Tensor:
    """Returns log q of each sequence's tracks in their most likely order; differentiable, and without device syncs.

    Args:
        q_a: batch (B, N), event (T, 2).
        a: (B, N, T, 2), in any order; absent objects are last and are ignored.
        n_objects: (B,).

    Returns:
        (B,), in nats.

    Raises:
        ValueError: if there are more than `MOST_OBJECTS` objects.
    """
    N = a.shape[1]
    if N > MOST_OBJECTS:
        raise ValueError(f"there are {N} objects; all their orders can be compared for at most {MOST_OBJECTS}")
    n = torch.arange(N, device=a.device)
    rolled = [q_a.log_prob(a.roll(-shift, 1)) for shift in range(N)]  # of track n + shift as the guide's object n
    shift = (n - n.unsqueeze(-1)) % N
    pairs = torch.stack(rolled, -1).gather(-1, shift.expand(len(a), N, N))  # [b, i, j]: track j as the guide's object i
    present = object_mask(n_objects, N)
    alone = torch.where(torch.eye(N, dtype=torch.bool, device=a.device), 0.0, -torch.inf)  # absent ones stay in place
    pairs = torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), pairs, alone)
    return pairs[:, n, _orders(N, a.device)].sum(-1).amax(-1)


@lru_cache
def _orders(N: int, device: torch.device) -> Tensor:
    """Returns all orders (N!, N); cached, so that a recorded step copies nothing to the device."""
    return torch.tensor(list(permutations(range(N))), device=device)
