"""A guide whose objects are renamed by the dynamics.

`UntangledGuide` wraps another guide, whose q(a | v) must be independent from frame to frame, and renames its objects
in every frame as `untangle` renames its means. It is itself a guide like any other.

Departures from the paper: renaming is not in the paper (`untangling`).
"""

import pyro.distributions as dist
from torch import Tensor

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.untangling import renamed, untangle
from pyro_pixels.lgssm.dynamics import Dynamics


class UntangledGuide(Guide):
    """The q(a | v) of a guide like the paper's, with objects renamed in each frame as `untangle` renames its means.

    Its parameters are those of ``guide``; the dynamics belong to the model. The labels are a function of the images, so
    this is an ordinary distribution over a, which defines a bound.

    Args:
        guide: a guide whose `encode` returns independent normals, such as a `RecurrentGuide`.
        dynamics: the dynamics of the model.
        options: keyword arguments of `untangle`.
    """

    def __init__(self, guide: Guide, dynamics: Dynamics, **options: float | bool) -> None:
        super().__init__()
        self.guide, self.options, self.pixel_evidence = guide, options, guide.pixel_evidence
        self._dynamics = [dynamics]  # in a list, so that its parameters are not registered as the guide's
        self.before: dist.TorchDistribution | None = None
        """The last q(a | v) of ``guide``, before objects were renamed."""

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        q_a = self.before = self.guide.encode(images, n_objects)
        mu, sigma = means_and_scales(q_a, self.guide, "`untangle` on its means or `resample_labels` on its draws")
        labels = untangle(self._dynamics[0], mu.detach(), n_objects, **self.options).labels  # type: ignore[arg-type]
        return dist.Normal(renamed(mu, labels), renamed(sigma, labels), validate_args=False).to_event(2)


def can_be_untangled(q_a: dist.TorchDistribution) -> bool:
    """Returns whether q(a | v) consists of independent normals, whose frames `UntangledGuide` can exchange."""
    return isinstance(q_a, dist.Independent) and isinstance(q_a.base_dist, dist.Normal)


def means_and_scales(q_a: dist.TorchDistribution, guide: Guide, instead: str) -> tuple[Tensor, Tensor]:
    """Returns those of q(a | v) if its frames can be exchanged, else raises a ValueError that suggests ``instead``."""
    if not can_be_untangled(q_a):
        raise ValueError(
            f"{type(guide).__name__}.encode returned {type(q_a).__name__}, whose frames cannot be exchanged; "
            f"wanted independent normals; use {instead}"
        )
    return q_a.base_dist.loc, q_a.base_dist.scale  # type: ignore[attr-defined]
