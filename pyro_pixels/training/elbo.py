"""The ELBO of Eq (7), and the ELBO with a weighted KL that training maximises (KL annealing, Sec 3.2).

``AnnealedELBO()(model, guide)`` is a module whose value is the loss, and `AnnealedELBO` is a `Trace_ELBO`, so
``pyro.infer.SVI(model, guide, optim, loss=AnnealedELBO())`` optimises the same objective. The KL weight is applied in
one place, to every latent site of the model and of any guide.

Departures from the paper: <log q> is estimated with the same sample as the rest of the bound instead of in closed
form. The gradient for the guide of Eq (9) is the same, and the estimate applies to every other guide.
"""

from typing import Any, NamedTuple

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_pixels._batch import check_any
from pyro_pixels._pyro import parameters_known
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.lgssm.sharing import sharing
from pyro_pixels.model.order import drawing_in_random_order
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.training.modes import evaluating


class ScaleLatents(ScaleMessenger):
    """A `poutine.scale` for latent sites only: around model and guide it weights the KL and not the data term."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            super()._process_message(msg)


class BoundTerms(NamedTuple):
    """The terms of Eq (7) for each sequence of a batch, in nats; the KL is unweighted."""

    log_likelihood: Tensor  # (B,), <log p(v | a)>
    kl: Tensor  # (B,), KL(q(a | v) || p(a))

    @property
    def bound(self) -> Tensor:
        """The ELBO (B,)."""
        return self.log_likelihood - self.kl


class AnnealedELBO(Trace_ELBO):
    """The ELBO of Eq (7) with its KL multiplied by ``kl_weight`` (beta in Sec 3.2), a number or 0-dimensional tensor.

    With ``random_order`` the renderer draws the objects of each sequence in random order (`drawing_in_random_order`).
    After each evaluation, `terms` holds the terms of the unweighted ELBO (of the last particle).
    """

    settings: tuple[str, ...] = ("random_order",)  # a change of any of these needs another recorded step

    def __init__(self, kl_weight: float | Tensor = 1.0, *, random_order: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight, self.random_order = kl_weight, random_order
        self.terms: BoundTerms | None = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with ScaleLatents(self.kl_weight), sharing(), drawing_in_random_order(self.random_order):
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name in guide_trace.stochastic_nodes:
            site: Any = guide_trace.nodes[name]
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"the guide's site '{name}' cannot be sampled with gradients; give it a distribution with rsample"
                )
        self.terms = _bound_terms(model_trace, guide_trace)
        return model_trace, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns minus the weighted ELBO, summed over sequences.

        Every latent site is reparametrised, so the loss is its own surrogate. Unlike `Trace_ELBO`, this does not wait
        for the device.
        """
        loss = torch.zeros(())
        with parameters_known():  # the trainer gets them from `ELBOModule`; SVI does not call this
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                loss = loss + _log_prob_sum(guide_trace) - _log_prob_sum(model_trace)
        return loss / self.num_particles


def _log_prob_sum(trace: Trace) -> Tensor:
    sites: list[Any] = [trace.nodes[name] for name in (*trace.stochastic_nodes, *trace.observation_nodes)]
    return sum((site["log_prob_sum"] for site in sites), torch.zeros(()))


def _bound_terms(model_trace: Trace, guide_trace: Trace) -> BoundTerms:
    def total(trace: Trace, names: list[str]) -> Tensor:
        sites: list[Any] = [trace.nodes[name] for name in names]
        return sum((site["unscaled_log_prob"].detach() for site in sites), torch.zeros(()))

    kl = total(guide_trace, guide_trace.stochastic_nodes) - total(model_trace, model_trace.stochastic_nodes)
    return BoundTerms(total(model_trace, model_trace.observation_nodes), kl)


def bound(model: PixelModel, guide: Guide, data: ImageSequences, *, batch_size: int = 100, seed: int = 0) -> BoundTerms:
    """Returns the terms of Eq (7) for each sequence of ``data`` (n,), from one sample each, in float64 nats.

    They are computed in evaluation mode, whatever the mode of model and guide. This is what training maximises: a guide
    without the dynamics is shown frames of NaN as black, and its positions there cost KL. `evaluate` and `log_evidence`
    show it forecasts and draw these positions from the dynamics, so that their bound is higher.
    """
    check_any(len(data), "to evaluate the bound on")
    device = next(model.parameters()).device
    elbo = AnnealedELBO()
    loss = elbo(model, guide)
    parts = []
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), evaluating(model, guide):
        torch.manual_seed(seed)
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            loss(part.images.to(device), part.n_objects.to(device))
            assert elbo.terms is not None
            parts.append([term.cpu().double() for term in elbo.terms])
    return BoundTerms(*(torch.cat(terms) for terms in zip(*parts)))
