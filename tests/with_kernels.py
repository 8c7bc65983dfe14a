"""A program for tests/test_fused.py: whole training steps in which Triton's interpreter runs all kernels on a CPU.

Prints, for each objective and guide, by how much the mean log p(v | a) and KL of three steps differ from those of plain
steps, relative to their size, and at last the number of kernels that were used.
"""

import warnings
from unittest import mock

import torch
from conftest import SMALL, make_guide, make_model

from pyro_pixels import _fused
from pyro_pixels._batch import Known
from pyro_pixels.guides import following, recurrence, untangling
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.model import drawing
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.own_tracks import OwnTracks
from pyro_pixels.training.step_runners import Batch, Steps
from pyro_pixels.worlds.base import simulate

CHOSEN = {}


def choose(x, plain, fused, difference):
    """`_fused.choose` where a CPU counts as a card."""
    if plain not in CHOSEN:
        CHOSEN[plain] = _fused.checked(x.device, plain, fused, difference)
    return CHOSEN[plain]


def totals(kind):
    torch.manual_seed(0)
    model, rnn = make_model(), make_guide().rnn
    guide = StructuredGuide(model.dynamics, rnn) if kind == "structured" else RecurrentGuide(rnn)
    elbo = OwnTracks(random_order=True) if kind == "own tracks" else AnnealedELBO()
    loss = elbo(model, guide)
    steps = Steps(elbo, loss, 1e-2, {1.0: list(loss.parameters())})
    steps.set(2.0, 1e-2)
    data = simulate(SMALL, 5, seed=3)
    for seed in range(3):
        torch.manual_seed(seed)
        steps.take(Batch(data.images, data.n_objects, torch.arange(5), Known(3, 40), seed))
    return steps.read_totals()


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)  # such as that kernels are disabled
    for kind in ("recurrent", "own tracks", "structured"):
        wanted = totals(kind)
        patches = [mock.patch.object(m, "choose", choose) for m in (recurrence, following, untangling, drawing)]
        for patch in patches:
            patch.start()
        found = totals(kind)
        for patch in patches:
            patch.stop()
        print(float(((found - wanted) / wanted).abs().max()))
    print(sum(function is not plain for plain, function in CHOSEN.items()))
