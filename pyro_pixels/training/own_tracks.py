"""Self-training: a guide learns identities from its own samples after `untangle` has undone their identity switches.

Trained on the bound, the paper's guide locates objects long before it keeps them apart. Identity switches have a low
p(a) under its own model, so `untangle` can undo them without pixels, labels or another guide. `OwnTracks` is the bound
with one more term: with a ~ q(a | v) and a* the same sample with its objects renamed frame by frame,

    minimise  -bound + weight * (-log q(a* | v)),

where the second term takes the most likely order of whole tracks and has a gradient with respect to q only. If nothing
is renamed, this gradient is minus the score of q, zero on average, so the guide does not change. If objects were
swapped, the guide learns to keep them apart. This is the wake phase of reweighted wake-sleep (Bornschein and Bengio,
2015) with samples that moves accepted by p(a) have brought closer to the posterior, instead of weighted ones (cf.
Naesseth et al., Markovian score climbing, 2020).

With an `UntangledGuide` the bound is that of the renamed q, and the second term teaches the renaming to the wrapped
guide. Positions are then learned whatever the identities, and the identities along with them.

Departures from the paper: the second term. The bound alone is `AnnealedELBO`.
"""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_pixels.guides.untangled import UntangledGuide
from pyro_pixels.guides.untangling import untangle
from pyro_pixels.lgssm.sharing import sharing
from pyro_pixels.training.distillation import log_prob_in_best_order
from pyro_pixels.training.elbo import AnnealedELBO


class OwnTracks(AnnealedELBO):
    """The objective of `fit(..., objective=OwnTracks)`; `terms` are those of the bound alone.

    Args:
        weight: the weight of -log q(a* | v).
        most: the largest number of exchanges in a sequence in one step.
        options: options of `AnnealedELBO`.

    Raises:
        ValueError: if the weight is negative.
    """

    settings = (*AnnealedELBO.settings, "weight")

    def __init__(self, weight: float = 1.0, *, most: int = 6, **options: Any) -> None:
        super().__init__(**options)
        if not weight >= 0:
            raise ValueError(f"weight is {weight}; wanted a number of at least 0")
        self.weight, self.most = weight, most
        self._drawn: Any = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        self._drawn = guide_trace.nodes["a"]
        return model_trace, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns minus the weighted bound plus the second term, summed over sequences.

        ``args`` are images (B, T, H, W) and n_objects (B,).
        """
        with sharing():
            return self._loss(super().differentiable_loss(model, guide, *args, **kwargs), model, guide, args[1])

    def _loss(self, loss: Tensor, model: Any, guide: Any, n_objects: Tensor) -> Tensor:
        q_a, a = self._drawn["fn"].base_dist.base_dist, self._drawn["value"].detach()  # without mask and plate
        self._drawn = None
        if a.shape[1] == 1 or not self.weight:
            return loss
        if isinstance(guide, UntangledGuide) and guide.before is not None:
            q_a, target = guide.before, a
        else:
            target = untangle(model.dynamics, a, n_objects, most=self.most).a
        return loss - self.weight * log_prob_in_best_order(q_a, target, n_objects).sum()


@torch.no_grad()
def share_of_renamed(dynamics: Any, a: Tensor, n_objects: Tensor) -> float:
    """Returns the share of positions that `untangle` renames, among sequences with several objects; needs no labels."""
    found = untangle(dynamics, a, n_objects)
    names = torch.arange(a.shape[1], device=a.device).view(1, -1, 1)
    present = names < n_objects[:, None, None]
    several = (present & (n_objects[:, None, None] > 1)).expand_as(found.labels)
    return float((found.labels != names)[several].double().mean()) if bool(several.any()) else 0.0
