"""Every question is asked on a pretended device: what is made on the CPU and meets what is on the device is found."""

import pytest
import torch
from pretend_device import OnDevice, PretendDevice
from test_census import small

from pyro_pixels.evaluation.calibration import corrected, fit_correction, mahalanobis_distances
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.mean_field import fit_mean_field
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.guides import RefinedGuide, resample_labels
from pyro_pixels.queries.counterfactual import Change, scale_force, what_if
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.latent_states import averaged, filter_states, posterior_states, retrodict, states
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct, smooth
from pyro_pixels.queries.streaming import start_images, step_image
from pyro_pixels.runs import build
from pyro_pixels.training.distillation import draw_tracks
from pyro_pixels.training.start_mixture import fit_starts
from pyro_pixels.worlds.base import simulate


def on_device(x):
    return isinstance(x, OnDevice)


@pytest.fixture(params=["structured", "recurrent"])
def world(request):
    """A run on the device, 6 sequences, their images and N there, and the device."""
    config = small(request.param)
    run, data = build(config), simulate(config.data, 6, seed=0)
    with PretendDevice("xpu:0") as device:
        device.put(run.model)
        device.put(run.guide)
        yield run, data, data.images.to(device.device), data.n_objects.to(device.device)


def test_a_path_is_inferred_and_drawn(world):
    run, _, images, n_objects = world
    found = infer(run.guide, images, n_objects, n_samples=3)
    assert on_device(found.mean)
    assert on_device(found.samples)
    assert on_device(reconstruct(run.model, run.guide, images, n_objects))


def test_futures_and_gaps_are_filled(world):
    run, _, images, n_objects = world
    future = generate(run.model, run.guide, images[:, :5], n_objects, n_frames=11, n_samples=3)
    assert on_device(averaged(run.model, future, n_objects).mean)
    observed = torch.arange(11, device=images.device) % 3 != 1
    assert on_device(interpolate(run.model, run.guide, images, n_objects, observed, n_samples=3).mean)


def test_names_are_put_right_and_tracks_refined(world):
    run, _, images, n_objects = world
    if run.config.guide == "structured":
        pytest.skip("its frames cannot be exchanged")
    images, n_objects = images[1:3], n_objects[1:3]
    a = infer(run.guide, images, n_objects).mean
    assert on_device(resample_labels(run.model, a, n_objects, images, n_moves=2).a)
    guide, observed = RefinedGuide(run.guide, run.model, n_steps=1), torch.arange(11, device=images.device) % 3 != 1
    assert on_device(guide.q_observed(images, n_objects, observed).mean)


def test_states(world):
    run, _, images, n_objects = world
    a = infer(run.guide, images, n_objects, n_samples=3)
    smooth(run.model.dynamics, a.mean)
    filter_states(run.model.dynamics, a.mean)
    posterior_states(run.model.dynamics, a.samples)
    found = states(run.model, run.guide, images, n_objects, n_samples=3)
    assert on_device(retrodict(run.model.dynamics, found, 4).mean)


def test_what_if(world):
    run, _, images, n_objects = world
    change = Change(dynamics=lambda lgssm: scale_force(lgssm, 0.5))
    assert on_device(what_if(run.model, run.guide, images, n_objects, change, frame=4, n_frames=11, n_samples=3).mean)


def test_evidence(world):
    run, _, images, n_objects = world
    log_evidence(run.model, run.guide, images, n_objects, n_samples=2)
    assert on_device(count_objects(run.model, run.guide, images, 3, n_samples=2).n_objects)


def test_streams(world):
    run, _, images, n_objects = world
    if run.config.guide == "structured":
        pytest.skip("it is not streamed images")
    stream = start_images(run.model, run.guide, n_objects)
    for image in images.unbind(1):
        stream = step_image(run.model, run.guide, stream, image)


def test_evaluations(world):
    run, data, _, _ = world
    assert "all" in evaluate(run.model, run.guide, data)
    check_health(run.model, run.guide, data)


def test_calibration(world):
    run, data, _, _ = world
    mahalanobis_distances(run.model, run.guide, data, n_samples=2)
    if run.config.guide == "structured":
        factors = fit_correction(run.model, run.guide, data, n_samples=0)
        mahalanobis_distances(*corrected(run.model, run.guide, factors), data, n_samples=0)


def test_arviz(world):
    run, _, images, n_objects = world
    to_inference_data(run.model, run.guide, images[:3], n_objects[:3], n_samples=4)


def test_learning_from_draws(world):
    run, data, images, n_objects = world
    assert not on_device(draw_tracks(run.guide, data))
    a = infer(run.guide, images, n_objects, n_samples=3).samples
    fit_starts(run.model.dynamics, a.flatten(0, 2))
    fit_mean_field(run.model, data[:2], run.guide, steps=2)
