import itertools

import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model
from pyro import poutine
from torch import nn

from pyro_pixels.evaluation import evaluate, evaluate_refined
from pyro_pixels.guides import RefinedGuide, StructuredGuide, UntangledGuide, refine
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.refining import exchange_where_closest
from pyro_pixels.guides.untangling import renamed, untangle
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.lgssm.marginal import marginal_moments
from pyro_pixels.model.likelihoods import PixelLikelihood
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import generate, infer, interpolate


class _NearestOfAll(nn.Module):
    """Positions (B, N, T, 2) -> images (B, T, 1, 2 G): along either axis, how near G places are to any object."""

    height, width = 1, 32

    def forward(self, a, present):
        places = torch.linspace(-1.5, 1.5, self.width // 2, dtype=a.dtype)
        near = torch.exp(-0.5 * ((a.unsqueeze(-1) - places) / 0.3) ** 2) * present[..., None, None, None]
        return near.sum(1).flatten(-2).unsqueeze(-2)


class _Positions(nn.Module):
    """One object's positions, as the two pixels of an image."""

    height, width = 1, 2

    def forward(self, a, present):
        return a.squeeze(1).unsqueeze(-2)


class _Gauss(PixelLikelihood):
    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, logits):
        return dist.Normal(logits, self.std).to_event(3)


def _model(renderer, std):
    torch.manual_seed(3)
    config = DynamicsConfig(
        n_components=1, delta=0.2, state_noise=1e-6, position_noise=1e-3, start_spread=0.1, start_variance=0.3
    )
    return PixelModel(Dynamics(config), renderer, _Gauss(std))


def log_joint(model, a, n_objects, images):
    """log p(v, a) (B,), by Pyro."""
    found = []
    for b, n in enumerate(n_objects.tolist()):
        given = poutine.condition(model, {"a": a[b : b + 1, :n]})
        found.append(poutine.trace(given).get_trace(images[b : b + 1], n_objects[b : b + 1]).log_prob_sum())
    return torch.stack(found).detach()


def test_where_all_is_gaussian_the_maximum_is_the_posterior_mean():
    """With v = a + noise, E[a | v] = m + C (C + s^2 I)^-1 (v - m)."""
    T, s = 6, 0.05
    model = _model(_Positions(), s)
    mean, C = (x.detach()[0] for x in marginal_moments(model.dynamics.lgssm(), T))
    torch.manual_seed(0)
    v = mean + torch.linalg.cholesky(C) @ torch.randn(2 * T, 1).double().squeeze(1)
    v = v + s * torch.randn(2 * T).double()
    wanted = mean + C @ torch.linalg.solve(C + s**2 * torch.eye(2 * T), v - mean)
    start = (v + 0.2 * torch.randn(2 * T)).view(1, 1, T, 2)
    images = v.view(1, T, 1, 2)
    found = refine(model, start.float(), torch.tensor([1]), images.float(), n_steps=400)
    assert (found.a.flatten() - wanted).abs().max() < 2e-3
    assert (start.flatten() - wanted).abs().max() > 0.1


def test_the_gain_is_that_of_the_models_density(small_data):
    model, guide = make_model(), make_guide()
    n_objects, images = small_data.n_objects, small_data.images
    a = infer(guide, images, n_objects).mean.float()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    found = refine(model, a, n_objects, images, n_steps=10)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    gain = log_joint(model, found.a, n_objects, images) - log_joint(model, a, n_objects, images)
    torch.testing.assert_close(found.gain, gain, atol=2e-3, rtol=1e-4)
    assert found.gain.min() >= 0
    assert found.gain.mean() > 1
    absent = torch.arange(3) >= n_objects[:, None]
    assert torch.equal(found.a[absent], a[absent])


def test_each_sequence_is_refined_by_itself(small_data):
    model, guide = make_model(), make_guide()
    a = infer(guide, small_data.images, small_data.n_objects).mean.float()
    whole = refine(model, a, small_data.n_objects, small_data.images, n_steps=8)
    one = small_data[4:5]
    n = int(one.n_objects)
    alone = refine(model, a[4:5, :n], one.n_objects, one.images, n_steps=8)
    torch.testing.assert_close(alone.a, whole.a[4:5, :n], atol=1e-4, rtol=1e-4)
    assert torch.equal(alone.labels, whole.labels[4:5, :n])


def _crossing():
    """Two objects side by side whose paths cross: a model that knows no names, true tracks (1, 2, T, 2) and images."""
    T = 16
    model = _model(_NearestOfAll(), 0.1)
    t = torch.linspace(-1, 1, T)
    truth = torch.stack([torch.stack([t, 0.15 * t], -1), torch.stack([t, -0.15 * t], -1)])[None]
    return model, truth, model.renderer(truth, torch.ones(1, 2))


def test_objects_that_bounced_off_each_other_are_told_apart():
    """Tracks that were bent where objects met, so that p(a) alone prefers the false names."""
    model, truth, images = _crossing()
    T, half = truth.shape[2], truth.shape[2] // 2
    bounced = truth.clone()
    bounced[0, :, half:] = truth[0, [1, 0], half:]
    apart = 0.07 * torch.exp(-0.5 * ((torch.arange(T) - half + 0.5) / 3) ** 2)
    bounced[0, 0, :, 1] -= apart
    bounced[0, 1, :, 1] += apart
    n_objects = torch.tensor([2])
    assert untangle(model.dynamics, bounced, n_objects).gain == 0
    found = refine(model, bounced, n_objects, images)
    assert _error(found.a, truth) < 0.02
    assert _error(bounced, truth) > 0.2
    torch.testing.assert_close(found.rename(bounced), renamed(bounced, found.labels))


def _error(a, truth):
    """The largest distance, in the better order of the two objects."""
    return min(float((a[:, order] - truth).abs().max()) for order in ([0, 1], [1, 0]))


def test_unseen_frames_follow_the_dynamics():
    model, truth, images = _crossing()
    hidden = images.clone()
    hidden[:, 6:10] = torch.nan
    start = truth + 0.05
    n_objects = torch.tensor([2])
    found = refine(model, start, n_objects, hidden)
    assert found.a.isfinite().all()
    assert (found.a - truth).abs().max() < 0.1
    start[:, :, 6:10] = start[:, :, 6:10] + 0.2  # what the guide said of them is forgotten
    again = refine(model, start, n_objects, hidden, n_steps=300)
    assert (again.a[:, :, 6:10] - truth[:, :, 6:10]).abs().max() < 0.1


def test_the_pair_that_comes_closest_is_exchanged_from_there_on():
    torch.manual_seed(0)
    a = torch.randn(4, 3, 7, 2)
    labels = exchange_where_closest(a)
    for b in range(4):
        gap = {(i, j, t): float((a[b, i, t] - a[b, j, t]).norm())
               for (i, j), t in itertools.product(itertools.combinations(range(3), 2), range(7))}  # fmt: skip
        i, j, t = min(gap, key=gap.get)
        wanted = torch.arange(3)[:, None].repeat(1, 7)
        wanted[i, t:], wanted[j, t:] = j, i
        assert torch.equal(labels[b], wanted)


def test_a_refined_guide_answers_queries(small_data):
    model, guide = make_model(), make_guide()
    n_objects, images = small_data.n_objects, small_data.images
    refined = RefinedGuide(guide, model, n_steps=6)
    assert {id(p) for p in refined.parameters()} == {id(p) for p in guide.parameters()}
    plain, found = infer(guide, images, n_objects), infer(refined, images, n_objects, n_samples=2)
    wanted = refine(model, plain.mean.float(), n_objects, images, n_steps=6)
    there = torch.arange(3) < n_objects[:, None]
    torch.testing.assert_close(found.mean[there].float(), wanted.a[there], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.std[there], wanted.rename(plain.std)[there])
    observed = torch.tensor([True] * 4 + [False] * 3 + [True] * 4)
    filled = interpolate(model, refined, images, n_objects, observed)
    other = images.clone()
    other[:, 4:7] = 1 - other[:, 4:7]
    torch.testing.assert_close(filled.mean[there], interpolate(model, refined, other, n_objects, observed).mean[there])
    hidden = observed.view(1, 1, -1).repeat(len(images), 3, 1)
    hidden[:, 1:, 8] = False
    assert interpolate(model, refined, images, n_objects, hidden).mean[there].isfinite().all()
    ahead = generate(model, refined, images[:, :5], n_objects, n_frames=11, n_samples=2)
    assert ahead.mean[there].isfinite().all()
    assert ahead.samples[:, there].isfinite().all()
    poutine.trace(refined).get_trace(images, n_objects)


def test_tracks_are_refined_in_inference_mode_too(small_data):
    model, guide = make_model(), make_guide()
    refined = RefinedGuide(guide, model, n_steps=3)
    wanted = infer(refined, small_data.images, small_data.n_objects).mean
    with torch.inference_mode():
        found = infer(refined, small_data.images.clone(), small_data.n_objects.clone()).mean
    assert torch.equal(found, wanted)


def test_the_pixels_that_the_guide_was_told_to_ignore_stay_ignored(small_data):
    """A guide that has found noise sees weights; around it the guide sees the same, and the likelihood raw pixels."""
    model, guide = make_model(), make_guide()
    torch.manual_seed(0)
    noisy = (0.8 * small_data.images.float() + 0.1 + 0.1 * torch.randn(small_data.images.shape)).clamp(0, 1)
    guide.look_at(noisy, small_data.n_objects)
    assert guide.pixel_evidence.active
    plain = infer(guide, noisy, small_data.n_objects).mean
    one = small_data.n_objects == 1
    untangled = infer(UntangledGuide(guide, model.dynamics), noisy, small_data.n_objects).mean
    torch.testing.assert_close(untangled[one], plain[one])
    wanted = refine(model, plain.float(), small_data.n_objects, noisy, n_steps=3).a
    found = infer(RefinedGuide(guide, model, n_steps=3), noisy, small_data.n_objects).mean
    torch.testing.assert_close(found[one].float(), wanted[one], atol=1e-4, rtol=1e-4)


def test_the_measures_are_those_of_the_refined_guide(small_data):
    model, guide = make_model(), make_guide()
    found = evaluate_refined(model, guide, small_data, n_steps=5)
    wanted = evaluate(model, RefinedGuide(guide, model, n_steps=5), small_data)
    assert found["all"].keys() == {f"refined_{name}" for name in (
        "position_error_px", "switch_rate", "generation_error_px", "interpolation_error_px", "bound_per_frame_nats",
    )}  # fmt: skip
    name = "refined_position_error_px"
    assert found["all"][name] == pytest.approx(wanted["all"]["position_error_px"])


def test_what_cannot_be_refined_is_refused(small_data):
    model, guide = make_model(), make_guide()
    images, n_objects = small_data.images, small_data.n_objects
    head = AttentionHead(guide.rnn.height, guide.rnn.width, guide.rnn.state_size)
    structured = StructuredGuide(model.dynamics, guide.rnn, head)
    with pytest.raises(ValueError, match="frames cannot be exchanged; wanted independent normals; use `refine`"):
        infer(RefinedGuide(structured, model), images, n_objects)
    a = torch.zeros(12, 3, 11, 2)
    with pytest.raises(ValueError, match=r"images have shape .*; wanted \(B, T, H, W\) with B, T = 12, 11"):
        refine(model, a, n_objects, images[:, :5])
    with pytest.raises(ValueError, match=r"tracks have shape .*; wanted \(B, N, T, 2\)"):
        refine(model, a[0], n_objects, images)
    with pytest.raises(ValueError, match="n_steps is 0; wanted a whole number"):
        refine(model, a, n_objects, images, n_steps=0)
