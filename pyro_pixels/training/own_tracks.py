"""A guide that learns identities from its own draws, untangled: its own teacher.

The paper's guide finds objects by the bound long before it keeps them apart. Where it swaps two of them, p(a) of its
own model says so, and `untangle` puts the names right without pixels, labels or another guide. `OwnTracks` is the bound
with one more term: with a ~ q(a | v) and a* the same draw with its objects renamed frame by frame,

    minimise  -bound + weight * (-log q(a* | v)),

the second term in whichever order of whole tracks is likeliest, its gradient with respect to q alone. Where nothing is
renamed the term is the score of q, whose gradient is zero on average: the guide stays what it is. Where objects were
swapped it learns to keep them apart. This is the wake-phase of reweighted wake-sleep (Bornschein and Bengio, 2015)
with draws that were moved towards the posterior, by moves that p(a) accepts, in the place of weighed ones
(cf. Naesseth et al., Markovian score climbing, 2020).

With an `UntangledGuide` the bound is that of the renamed q, which the lesson teaches the guide inside: positions are
then learned whatever the names, and the names with them.

Departures from the paper: the second term. The bound alone is `AnnealedELBO`.
"""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_pixels.guides.untangling import UntangledGuide, untangle
from pyro_pixels.training.distillation import log_prob_in_best_order
from pyro_pixels.training.elbo import AnnealedELBO


class OwnTracks(AnnealedELBO):
    """What `fit(..., objective=OwnTracks)` minimises. `terms` are those of the bound alone.

    Args:
        weight: of -log q(a* | v).
        most: exchanges of one sequence in one step.
        options: of `AnnealedELBO`.

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
        """Minus the weighed bound, plus the lesson; summed over sequences, for images (B, T, H, W), n_objects (B,)."""
        loss, n_objects = super().differentiable_loss(model, guide, *args, **kwargs), args[1]
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
    """Share of the frames of objects in sequences with several of them that `untangle` renames: no truth is needed."""
    found = untangle(dynamics, a, n_objects)
    names = torch.arange(a.shape[1], device=a.device).view(1, -1, 1)
    present = names < n_objects[:, None, None]
    several = (present & (n_objects[:, None, None] > 1)).expand_as(found.labels)
    return float((found.labels != names)[several].double().mean()) if bool(several.any()) else 0.0
