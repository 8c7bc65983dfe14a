"""What a step does on a CUDA device, told without one: nothing that a recording cannot hold, nothing of the CPU's."""

import pyro
import pytest
import torch
from pretend_device import UNRECORDABLE, OnDevice, PretendDevice

from pyro_pixels._batch import Known, knowing
from pyro_pixels.config import RunConfig
from pyro_pixels.model.likelihoods import LIKELIHOODS
from pyro_pixels.runs import GUIDES, build
from pyro_pixels.training.distillation import GivenTracks
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.own_tracks import OwnTracks
from pyro_pixels.training.step_runners import Batch, Steps
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

KNOWN = Known(most_objects=3, most_white=40)


def small(guide, likelihood="bernoulli", clutter=0.0, n_frames=11):
    """A run of a guide on 6 sequences of 12 x 12 pixels, N = 1, 2, 3."""
    data = CannonballConfig(n_frames=n_frames, height=12, width=12, radius=1.5)
    return RunConfig(guide=guide, likelihood=likelihood, clutter=clutter, state_size=8, data=data)


def walk(config, device, objective=AnnealedELBO, random_order=False):
    """One step on the device: forward, backward, update. Returns what was noted, and the loss's terms."""
    run, data = build(config), simulate(config.data, 6, seed=0)
    device.put(run.model)
    device.put(run.guide)
    images, n_objects = (OnDevice(x, device.device) for x in (data.images, data.n_objects))
    tracks = None
    if objective is GivenTracks:
        tracks = OnDevice(torch.zeros(6, 3, config.data.n_frames, 2), device.device)
    elbo = objective(kl_weight=OnDevice(torch.tensor(2.0), device.device))
    elbo.random_order = random_order
    loss = elbo(run.model, run.guide)
    steps = Steps(elbo, loss, 1e-3, {1.0: list(loss.parameters())})
    index = OnDevice(torch.arange(6), device.device)
    batch = Batch(images, n_objects, index, KNOWN, seed=0, tracks=tracks)
    with pyro.validation_enabled(False), knowing(KNOWN):
        if objective is not AnnealedELBO:  # as before a recording: the orders of objects are made once
            steps.take(batch)
            device.operations.clear()
            device.copies.clear()
        steps.take(batch)
    assert len(device.operations) > 100


CASES = [
    *((guide, likelihood, clutter) for guide in GUIDES for likelihood in LIKELIHOODS
      for clutter in ((0.0, 0.02) if guide == "structured" else (0.0,))),
]  # fmt: skip


@pytest.mark.parametrize("guide, likelihood, clutter", CASES)
def test_a_recording_can_hold_a_step(guide, likelihood, clutter):
    with PretendDevice("cuda:0") as device:
        walk(small(guide, likelihood, clutter), device)
    assert sorted(UNRECORDABLE & set(device.operations)) == []
    assert device.copies == []


@pytest.mark.parametrize("guide", ["recurrent", "structured"])
def test_a_recording_can_hold_a_longer_step(guide):
    """p(a) goes by blocks from 64 frames on."""
    with PretendDevice("cuda:0") as device:
        walk(small(guide, n_frames=70), device)
    assert sorted(UNRECORDABLE & set(device.operations)) == []
    assert device.copies == []


@pytest.mark.parametrize("objective", [AnnealedELBO, OwnTracks])
def test_a_recording_can_hold_a_step_that_draws_in_random_order_and_one_that_learns_from_its_own(objective):
    with PretendDevice("cuda:0") as device:
        walk(small("recurrent"), device, objective, random_order=True)
    assert sorted(UNRECORDABLE & set(device.operations)) == []
    assert device.copies == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_recording_can_hold_a_step_that_learns_from_tracks(guide):
    with PretendDevice("cuda:0") as device:
        walk(small(guide), device, GivenTracks)
    assert sorted(UNRECORDABLE & set(device.operations)) == []
    assert device.copies == []
