"""The guide of the joint model, q(a, h, z | v) = q(a | v) prod_n p(h^n, z^n | a^n) (Sec 2.2, Eqs 6-7).

Given positions, the posterior of components and states is exact: p(z | a) is a Categorical and p(h | a, z) is Gaussian.
`JointGuide` adds both to any guide q(a | v), so that Pyro's inference runs on `PixelModel.joint`:

    Predictive(model.joint, guide=JointGuide(guide, model.dynamics), num_samples=100)(images, n_objects)

The ELBO is the same, because log p(z, h, a) - log q(z, h | a) = log p(a) for every z and h. Train with ``model`` and
``guide`` nevertheless: there z is summed out, whereas here its gradient would be estimated from samples.

Departures from the paper: none.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_pixels._batch import counts, object_mask
from pyro_pixels._pyro import announce_parameters, fill_absent, of_objects
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.missing import q_given_seen
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.distributions import StatePath
from pyro_pixels.lgssm.dynamics import Dynamics, select_component
from pyro_pixels.lgssm.kalman import LGSSM


class StatePosterior(TorchDistribution):
    """The posterior p(h_{1:T} | a_{1:T}, z), with event shape (T, d).

    The batch shapes of the LGSSM's starts and of ``a`` are broadcast. `log_prob` needs positive definite Sigma_H and
    Sigma; sampling does not.

    Args:
        lgssm: the parameters with the starts of components z, as returned by `select_component`.
        a: positions (..., T, 2).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 2)  # type: ignore[assignment]
    has_rsample = True

    def __init__(self, lgssm: LGSSM, a: Tensor) -> None:
        self._lgssm, self._a = lgssm, a.to(lgssm.A.dtype)
        batch_shape = torch.Size(np.broadcast_shapes(lgssm.mu.shape[:-1], a.shape[:-2]))
        event_shape = torch.Size((a.shape[-2], lgssm.mu.shape[-1]))
        super().__init__(batch_shape, event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(h | z) + log p(a | h) - log p(a | z)."""
        h = value.to(self._a.dtype)
        p_a = dist.MultivariateNormal(h @ self._lgssm.B.mT, self._lgssm.Sigma_A, validate_args=False)
        log_joint = StatePath(self._lgssm, h.shape[-2]).log_prob(h) + p_a.log_prob(self._a).sum(-1)
        return log_joint - kalman.log_likelihood(self._lgssm, self._a)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws whole paths, jointly over time."""
        return kalman.sample_posterior(self._lgssm, self._a, sample_shape=tuple(sample_shape))


class JointGuide(nn.Module):
    """The Pyro guide of `PixelModel.joint`: sites ``a`` (B, N, T, 2), ``z`` (B, N) and ``h`` (B, N, T, 4).

    Absent objects are masked, as in the model; the values in their slots have no meaning. In frames of NaN, positions
    are drawn from the dynamics given those in the other frames.

    Args:
        guide: any q(a | v).
        dynamics: the dynamics of the model, ``model.dynamics``.
        filled: what the guide's network is shown in frames of NaN, as in `q_given_seen`; by default black.
    """

    def __init__(
        self, guide: Guide, dynamics: Dynamics, *, filled: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.guide, self.dynamics, self.filled = guide, dynamics, filled

    def forward(
        self, images: Tensor, n_objects: Tensor | int | Sequence[int], n_frames: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the Pyro guide and returns a, z and h; the arguments are those of the model.

        Raises:
            ValueError: if the images do not fit the guide.
        """
        announce_parameters("guide", self.guide)
        q_a = q_given_seen(self.guide, self.dynamics, images, n_objects, self.filled)
        present = object_mask(counts(n_objects, len(images), images), q_a.batch_shape[1])
        with pyro.plate("sequences", len(images), dim=-1):
            a = fill_absent(pyro.sample("a", of_objects(q_a, present)), present)
            q_z = self.dynamics.component_posterior(a)
            z = pyro.sample("z", q_z.mask(present).to_event(1))  # type: ignore[attr-defined]
            q_h = StatePosterior(select_component(self.dynamics.lgssm(), z), a)
            h = pyro.sample("h", of_objects(q_h, present))
        return a, z, h
