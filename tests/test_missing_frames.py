"""Frames of NaN are unobserved in every query: positions in them come from the dynamics, not from a black image."""

import pytest
import torch
from conftest import make_guide, make_model
from matplotlib import pyplot as plt
from pyro.infer import Predictive

from pyro_pixels import load_pretrained, question_figures, simulate
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.mean_field import fit_mean_field
from pyro_pixels.guides.joint import JointGuide
from pyro_pixels.guides.missing import CompletedTracks, q_given_seen
from pyro_pixels.lgssm.dynamics import select_component
from pyro_pixels.lgssm.kalman import rts_smoother
from pyro_pixels.queries.counterfactual import Change, what_if
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.latent_states import states
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct, smooth
from pyro_pixels.queries.streaming import start_images, step_image
from pyro_pixels.run_figures import RunView

SEEN = torch.ones(30, dtype=torch.bool)
SEEN[10:14] = False


@pytest.fixture(scope="module")
def recurrent():
    """A trained guide without dynamics, and twenty sequences of one ball."""
    run = load_pretrained("recurrent")
    data = simulate(run.config.data, 60, seed=5)
    return run, data[data.n_objects == 1]


def with_gap(data, seen=SEEN):
    return torch.where(seen[:, None, None], data.images.float(), torch.nan)


def test_inference_with_the_model_is_interpolation(recurrent):
    run, data = recurrent
    images = with_gap(data)
    images[::2] = data.images[::2].float()
    found = infer(run.guide, images, 1, n_samples=2, model=run.model)
    mask = SEEN.repeat(len(data), 1)
    mask[::2] = True
    wanted = interpolate(run.model, run.guide, data.images, 1, mask)
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.cov.diagonal(dim1=-2, dim2=-1).sqrt())
    assert found.samples.isfinite().all()
    assert torch.equal(reconstruct(run.model, run.guide, images, 1), wanted.images)
    alone = infer(run.guide, images, 1, n_samples=2)
    known = (alone.mean, alone.std, alone.samples, alone.cov.flatten(-2))
    assert all(torch.equal(x.isfinite().all(-1), mask[:, None].expand(x.shape[:-1])) for x in known)


def test_a_guide_with_dynamics_needs_no_model_for_missing_frames():
    run = load_pretrained()
    data = simulate(run.config.data, 12, seed=5)
    ends = torch.arange(30) < 22
    found = infer(run.guide, with_gap(data, ends), data.n_objects)
    wanted = interpolate(run.model, run.guide, data.images, data.n_objects, ends)
    alone = data.n_objects == 1
    torch.testing.assert_close(found.mean[alone, 0], wanted.mean[alone, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        found.std[alone, 0], wanted.cov.diagonal(dim1=-2, dim2=-1).sqrt()[alone, 0], atol=1e-3, rtol=1e-3
    )


def test_states_in_a_gap_are_those_of_the_dynamics(recurrent):
    run, data = recurrent
    torch.manual_seed(0)
    whole = states(run.model, run.guide, data.images, 1, n_samples=20)
    found = states(run.model, run.guide, with_gap(data), 1, n_samples=20)
    off = (found.mean - whole.mean).abs() / found.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert off[:, :, ~SEEN].mean() < 0.5  # sigma


def test_what_if_nothing_changes_goes_on_from_the_last_frames_seen(recurrent):
    run, data = recurrent
    torch.manual_seed(0)
    found = what_if(run.model, run.guide, with_gap(data)[:, :14], 1, Change(), frame=14, n_frames=20, n_samples=20)
    wanted = generate(run.model, run.guide, data.images[:, :10], 1, n_frames=20)
    pixels = 16 * (found.mean - wanted.mean)[:, :, 14:].norm(dim=-1)
    assert pixels.mean() < 1


def test_generation_fills_gaps_as_interpolation_does(recurrent):
    run, data = recurrent
    found = generate(run.model, run.guide, with_gap(data)[:, :20], 1, n_frames=30)
    wanted = interpolate(run.model, run.guide, data.images, 1, SEEN & (torch.arange(30) < 20))
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.observed, wanted.observed.expand(found.observed.shape))


def test_a_nan_image_is_missing_for_its_sequence_alone(small_data):
    model, guide, n_objects = make_model(), make_guide(), small_data.n_objects
    images = small_data.images.float()
    some, no, every = (start_images(model, guide, n_objects) for _ in range(3))
    for t in range(3):
        some, no, every = (step_image(model, guide, x, images[:, t]) for x in (some, no, every))
    odd = torch.arange(len(images)) % 2 == 1
    some = step_image(model, guide, some, torch.where(odd[:, None, None], torch.nan, images[:, 3]))
    no, every = step_image(model, guide, no, None), step_image(model, guide, every, images[:, 3])
    for name in ("s", "mean", "std"):
        found = getattr(some, name)
        torch.testing.assert_close(found[odd], getattr(no, name)[odd].to(found), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[~odd], getattr(every, name)[~odd].to(found), rtol=0, atol=1e-6)
    torch.testing.assert_close(some.tracks.log_likelihood[odd], no.tracks.log_likelihood[odd])
    torch.testing.assert_close(some.tracks.log_likelihood[~odd], every.tracks.log_likelihood[~odd])


def test_completed_tracks_weigh_the_observed_frames_alone(small_data):
    """With the last frames missing, p(a) / q(a | v) is that of the frames before."""
    model, guide = make_model(), make_guide()
    images, n_objects = small_data.images.float(), small_data.n_objects
    images[:, 7:] = torch.nan
    q_a, first = q_given_seen(guide, model.dynamics, images, n_objects), guide.q(images[:, :7], n_objects)
    assert isinstance(q_a, CompletedTracks)
    a = torch.randn(12, 3, 11, 2, dtype=torch.float64)
    found = model.dynamics.positions(11).log_prob(a) - q_a.log_prob(a)
    wanted = model.dynamics.positions(7).log_prob(a[:, :, :7]) - first.log_prob(a[:, :, :7])
    torch.testing.assert_close(found, wanted.to(found), rtol=1e-4, atol=1e-4)


def test_completed_tracks_have_the_moments_of_the_smoother():
    """One component; within 5.5 standard errors of 4,000 draws."""
    model, seen = make_model(n_components=1, delta=0.3, state_noise=0.02, position_noise=0.1), SEEN[8:16]
    torch.manual_seed(0)
    y = torch.randn(2, 2, 8, 2, dtype=torch.float64)
    q_a = torch.distributions.Independent(torch.distributions.Normal(y, 1e-6), 2)
    drawn = CompletedTracks(q_a, model.dynamics, seen.expand(2, 1, 8)).sample(torch.Size((4_000,)))
    lgssm = model.dynamics.lgssm()
    wanted = rts_smoother(select_component(lgssm, torch.zeros(2, 2, dtype=torch.long)), y, seen)
    var = (lgssm.B @ wanted.cov @ lgssm.B.mT + lgssm.Sigma_A).diagonal(dim1=-2, dim2=-1)
    error = ((drawn.mean(0) - wanted.mean[..., :2]) / var.sqrt())[..., ~seen, :]
    assert error.abs().max() < 5.5 / 4_000**0.5
    assert ((drawn.var(0) / var)[..., ~seen, :] - 1).abs().max() < 5.5 * (2 / 4_000) ** 0.5
    torch.testing.assert_close(drawn[..., seen, :], y[..., seen, :].expand(4_000, 2, 2, -1, 2), rtol=0, atol=1e-4)


def test_the_joint_guide_draws_positions_of_missing_frames_from_the_dynamics(recurrent):
    run, data = recurrent
    joint = Predictive(run.model.joint, guide=JointGuide(run.guide, run.model.dynamics), num_samples=5, parallel=True)
    torch.manual_seed(0)
    whole, found = joint(data.images, 1)["h"], joint(with_gap(data), 1)["h"]
    pixels = 16 * (found - whole)[..., :2].mean(0).norm(dim=-1)
    assert pixels[..., ~SEEN].mean() < 1


def test_evidence_is_that_of_the_observed_frames(recurrent):
    run, data = recurrent
    torch.manual_seed(0)
    first = log_evidence(run.model, run.guide, data.images[:, :24], 1, n_samples=20).log_evidence
    found = log_evidence(run.model, run.guide, with_gap(data, torch.arange(30) < 24), 1, n_samples=20)
    assert (found.log_evidence - first).mean().abs() < 5  # nats; each frame has about 20
    assert found.effective_samples.isfinite().all()


@pytest.mark.parametrize("weights", ["quick", "recurrent"])
def test_objects_are_counted_in_the_observed_frames(weights):
    run = load_pretrained(weights)
    data = simulate(run.config.data, 6, seed=777)
    torch.manual_seed(0)
    found = count_objects(run.model, run.guide, with_gap(data, torch.arange(30) < 25), 3, n_samples=2)
    assert found.probs.isfinite().all()
    assert int((found.n_objects != data.n_objects).sum()) <= 1


def test_inference_data_of_missing_frames(recurrent):
    run, data = recurrent
    images = with_gap(data)[:4]
    found = to_inference_data(run.model, run.guide, images, 1, n_samples=20)
    v = torch.from_numpy(found.observed_data.v.values)
    torch.testing.assert_close(v, images, equal_nan=True)
    assert (found.log_likelihood.v.values[..., ~SEEN] == 0).all()
    drawn = torch.from_numpy(found.posterior_predictive.v.values[0])
    assert (drawn.double().mean(0) - data.images[:4].double()).abs().mean() < 0.05  # in missing frames, too
    assert set(drawn.flatten().tolist()) == {0, 1}
    h = torch.from_numpy(found.posterior.h.values[0]).mean(0)
    wanted = infer(run.guide, data.images[:4], 1).mean
    assert 16 * (h[..., :2] - wanted)[:, :, ~SEEN].norm(dim=-1).mean() < 1


def test_figures_of_questions_leave_missing_frames_out(recurrent, monkeypatch):
    run, data = recurrent
    masks = []

    def record(function):
        def asked(dynamics, a, observed=None):
            masks.append(observed)
            return function(dynamics, a, observed)

        return asked

    for name in ("filter_states", "smooth"):
        monkeypatch.setattr(question_figures, name, record(getattr(question_figures, name)))
    scene = question_figures.Scene(run, ImageSequences(with_gap(data[:3]), 1), torch.device("cpu"), n_samples=2)
    plt.close(question_figures.draw_filter(scene).figure)
    assert all(torch.equal(mask, SEEN.expand(mask.shape)) for mask in masks)
    assert len(masks) == 2
    view = RunView(run, scene.data, torch.device("cpu"))
    as_if_seen = smooth(run.model.dynamics, view.inference.mean).cov
    assert (view.states.cov / as_if_seen)[:, :, ~SEEN, 0, 0].min() > 1.1


def test_mean_field_starts_between_the_frames_seen(recurrent):
    run, data = recurrent
    start = ImageSequences(with_gap(data[:2]), 1)
    guide = fit_mean_field(run.model, start, run.guide, steps=0)
    wanted = infer(run.guide, start.images, 1, model=run.model).mean
    torch.testing.assert_close(guide.auto.locs.a.detach(), wanted.float())


@pytest.mark.parametrize("name", ["quick", "recurrent"])
def test_a_sequence_without_a_frame_has_the_moments_of_the_prior(name, recurrent):
    """Alone and in a batch, whatever the guide; the other sequences are as they are without it."""
    run, (data, n_objects) = load_pretrained(name), (recurrent[1].images[:4].float(), torch.tensor([1, 2, 3, 2]))
    model, guide = run.model, run.guide
    data[2], data[3, :6] = torch.nan, torch.nan
    prior = smooth(model.dynamics, torch.zeros(30, 2), torch.zeros(30, dtype=torch.bool))
    mean, std = prior.mean[:, :2], (prior.cov[:, :2, :2] + model.dynamics.lgssm().Sigma_A).diagonal(0, 1, 2).sqrt()
    asked = [lambda v, n: infer(guide, v, n, model=model)[:2]]
    if name == "quick":
        asked.append(lambda v, n: infer(guide, v, n)[:2])
    for ask in asked:
        both, alone, rest = ask(data, n_objects), ask(data[2:3], n_objects[2:3]), ask(data[:2], n_objects[:2])
        for found, one, other, wanted in zip(both, alone, rest, (mean, std)):
            torch.testing.assert_close(found[2], wanted.expand(3, 30, 2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(one[0], found[2], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found[:2, :2], other, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    drawn = infer(guide, data[2:3], 1, model=model, n_samples=2_000).samples[:, 0, 0]
    assert ((drawn.mean(0) - mean) / std).abs().max() < 5.5 / 2_000**0.5  # standard errors
    told = generate(model, guide, data[:, :5], n_objects, n_frames=30, n_samples=2)
    torch.testing.assert_close(told.mean[2:, :2], mean.expand(2, 2, 30, 2), rtol=1e-6, atol=1e-6)
    assert torch.equal(told.component[2, :3], model.dynamics.pi.argmax().expand(3))
    assert told.sample_images.isfinite().all()
    assert states(model, guide, data, n_objects, n_samples=2).mean.isfinite().all()
    none = log_evidence(model, guide, data[2:3], 3, n_samples=3).log_evidence
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-3)  # no frame, no information


def test_without_the_model_a_sequence_without_a_frame_is_unknown(small_data):
    images = small_data.images.float()
    images[2] = torch.nan
    found = infer(make_guide(), images, small_data.n_objects).mean
    assert torch.equal(found.isnan().all(-1).all(-1).all(-1), torch.arange(len(images)) == 2)
    with pytest.raises(ValueError, match=r"observed is False in every frame of sequence 2"):
        interpolate(make_model(), make_guide(), images, small_data.n_objects, images[..., 0, 0] == 0)
