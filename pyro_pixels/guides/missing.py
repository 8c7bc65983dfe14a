"""The guide where frames are missing: its own q(a | v) in the observed frames, and the dynamics in the others.

A guide that does not contain the dynamics knows nothing of the positions in frames of NaN, in which its network sees a
black image, or a rendered one (`queries.filled`). `q_given_seen` therefore draws them from p(a) given the positions in
the observed frames: q(a_seen | v) p(a_unseen | a_seen). Weights p(v, a) / q(a | v) are then those of the observed
frames alone.

Departures from the paper: missing frames are not in the paper, except those of Sec 3.5.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_pixels._batch import check_batch, counts, require_images, unseen_frames
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.untangled import can_be_untangled
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, select_component


class CompletedTracks(TorchDistribution):
    """The distribution q(a_seen) p(a_unseen | a_seen), with batch shape (B, N) and event shape (T, 2).

    Args:
        q_a: independent normals, with event shape (T, 2), of which those in observed frames are used.
        dynamics: the dynamics of the model.
        seen: (B, 1, T) bool, False where a frame is missing.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(self, q_a: dist.TorchDistribution, dynamics: Dynamics, seen: Tensor) -> None:
        self._q_a, self._dynamics, self._seen = q_a, dynamics, seen
        super().__init__(q_a.batch_shape, q_a.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        lgssm, p_a = self._dynamics.lgssm(), self._dynamics.positions(value.shape[-2])
        a = value.to(lgssm.A.dtype)
        q_seen = self._q_a.base_dist.log_prob(value).sum(-1)  # type: ignore[attr-defined]
        q_seen = torch.where(self._seen, q_seen, 0.0).sum(-1)
        p_seen = kalman.log_likelihood(lgssm, a.unsqueeze(-3), self._seen.unsqueeze(-2))
        p_seen = (p_seen + p_a.mixture_distribution.logits).logsumexp(-1)
        return q_seen + p_a.log_prob(a) - p_seen

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws positions of q in the observed frames, then z, h and positions in the others, jointly over time."""
        lgssm = self._dynamics.lgssm()
        a = self._q_a.rsample(torch.Size(sample_shape)).to(lgssm.A.dtype)
        z = self._dynamics.component_posterior(a, self._seen).sample()
        h = kalman.sample_posterior(select_component(lgssm, z), a, self._seen)
        return torch.where(self._seen.unsqueeze(-1), a, kalman.sample_observations(lgssm, h))


def q_given_seen(
    guide: Guide,
    dynamics: Dynamics,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    filled: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dist.TorchDistribution:
    """Returns q(a | v) in which frames of NaN do not count; ``guide.q(images, n_objects)`` if there are none.

    Guides that contain the dynamics return their own; a q(a | v) other than independent normals is left as it is.

    Args:
        guide: any guide.
        dynamics: the dynamics of the model, ``model.dynamics``.
        images: (B, T, H, W).
        n_objects: (B,), a list, or one number for all sequences.
        filled: (images, n_objects) -> images with something in the place of NaN, for the network to see; by default it
            sees black.

    Raises:
        ValueError: as in `Guide.q`.
    """
    q_a, known = q_where_known(guide, images, n_objects, filled)
    seen = known.squeeze(-1)
    if bool(seen.all()) or not can_be_untangled(q_a):
        return q_a
    return CompletedTracks(q_a, dynamics, seen)


def q_where_known(
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    filled: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dist.TorchDistribution, Tensor]:
    """Returns q(a | v) and the mask (B, 1, T, 1) of the frames in which it knows positions: all, or those not NaN.

    Guides that contain the dynamics know of all frames. The arguments are those of `q_given_seen`.
    """
    require_images(images)
    n_objects = counts(n_objects, len(images), images)
    check_batch(images, n_objects, values=True)
    seen = ~unseen_frames(images).unsqueeze(1)
    shown = guide.see(images)
    white = shown.flatten(2).amax(-1) > 0  # (B, T)
    alike = bool((seen & (white == white[:1]).unsqueeze(1)).all())  # else `encode` would mix sequences that differ
    if not alike:
        knows_dynamics = guide.encode_observed(shown, n_objects, seen)
        if knows_dynamics is not None:
            return knows_dynamics[0], torch.ones_like(seen).unsqueeze(-1)
        if filled is not None and not bool(seen.all()):
            return guide.q_observed(filled(images, n_objects), n_objects, seen), seen.unsqueeze(-1)
    return guide.q(images, n_objects), seen.unsqueeze(-1)
