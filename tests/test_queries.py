"""Queries against brute force, and against the physics of Sec 3.1 where the true dynamics are put in."""

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.queries import parts
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct, smooth
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig


class Oracle(Guide):
    """Knows the positions of the sequences it was made with, whatever frames it is shown, within ``std``."""

    def __init__(self, positions, std=1e-4):
        super().__init__()
        self.positions, self.std = positions.nan_to_num(), std

    def encode(self, images, n_objects):
        a = self.positions[:, : int(n_objects.max()), : images.shape[1]]
        return dist.Normal(a, self.std).to_event(2)


def true_world(n=8, noise=1e-8):
    """Sequences with next to no noise and a model whose dynamics are the true ones, in pixels."""
    config = CannonballConfig(height=32, width=32, position_noise=noise)
    data = simulate(config, n, seed=5)
    dynamics = Dynamics(DynamicsConfig(delta=config.delta, state_noise=1e-14, position_noise=1e-5)).double()
    true = data.dynamics.lgssm
    with torch.no_grad():
        dynamics.u.copy_(true.u)
        dynamics.mu.copy_(true.mu)
        L = torch.linalg.cholesky(true.Sigma)
        dynamics.root_Sigma.copy_(L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log()))
    return data, PixelModel(dynamics, Renderer(32, 32, 4))


def test_generation_obeys_the_physics():
    data, model = true_world()
    prediction = generate(model, Oracle(data.paths), data.images[:, :5], data.n_objects, n_frames=30)
    present = ~data.paths.isnan()
    assert float((prediction.mean - data.paths.nan_to_num())[present].abs().max()) < 0.02
    launched_right = data.sides == 1
    assert (prediction.component[data.sides >= 0] == launched_right[data.sides >= 0].long()).all()


def test_generation_goes_beyond_the_length_of_training():
    data, model = true_world()
    prediction = generate(model, Oracle(data.paths), data.images[:, :5], data.n_objects, n_frames=50)
    a = prediction.mean[:, 0, 5:]
    acceleration = a[:, 2:] - 2 * a[:, 1:-1] + a[:, :-2]
    wanted = data.dynamics.lgssm.u[3] * 0.015  # delta u_v: pixels per frame squared, downwards
    torch.testing.assert_close(acceleration[..., 1], wanted.expand_as(acceleration[..., 1]), rtol=1e-3, atol=1e-6)
    assert float(acceleration[..., 0].abs().max()) < 1e-6


def test_interpolation_finds_the_hidden_frames():
    data, model = true_world()
    ends = (torch.arange(30) < 5) | (torch.arange(30) >= 25)
    prediction = interpolate(model, Oracle(data.paths), data.images, data.n_objects, ends)
    present = ~data.paths.isnan()
    assert float((prediction.mean - data.paths.nan_to_num())[present].abs().max()) < 0.01
    assert prediction.observed.equal(ends)


def test_what_unobserved_frames_hold_is_ignored(small_data):
    model, guide = make_model(), make_guide()
    ends = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0]).bool()
    other = small_data.images.clone()
    other[:, ~ends] = 1 - other[:, ~ends]
    one, two = (interpolate(model, guide, x, small_data.n_objects, ends) for x in (small_data.images, other))
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=0)
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 255.0, -7.0])
@pytest.mark.parametrize("pixel", [(0, 0), (5, 5)])
def test_unobserved_frames_may_hold_anything(small_data, value, pixel):
    model, guide, ends = make_model(), make_guide(), torch.tensor([1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0]).bool()
    other = small_data.images.float()
    other[:, 3, *pixel] = value
    wanted = interpolate(model, guide, small_data.images, small_data.n_objects, ends)
    for mask in (ends, ends.repeat(12, 1)):
        found = interpolate(model, guide, other, small_data.n_objects, mask)
        torch.testing.assert_close(found.mean, wanted.mean)
    with pytest.raises(ValueError, match=r"only whole frames may be NaN|wanted 0 for black to 1 for white"):
        interpolate(model, guide, other, small_data.n_objects, torch.arange(11) < 5)


def test_interpolation_is_the_papers_procedure(small_data):
    """Sec 3.5 step by step: infer the start, generate the middle, run on from the warmed-in state, smooth."""
    model, guide = make_model(), make_guide()
    images, n_objects = small_data.images[:4], small_data.n_objects[:4]
    T, seen = images.shape[1], torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]).bool()
    future = generate(model, guide, images[:, :3], n_objects, n_frames=8)
    filled = torch.cat([images[:, :3].float(), future.images[:, 3:], images[:, 8:].float()], 1)
    mu = guide.encode(filled, n_objects).mean.double()
    k = model.dynamics.component_posterior(mu, seen).logits.argmax(-1)
    lgssm = model.dynamics.lgssm()
    lgssm = lgssm._replace(mu=lgssm.mu[k], Sigma=lgssm.Sigma[k])
    wanted = kalman.rts_smoother(lgssm, mu, seen).mean[..., :2]
    found = interpolate(model, guide, images, n_objects, seen)
    torch.testing.assert_close(found.mean[:, :, ~seen], wanted[:, :, ~seen], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.mean[:, :, seen], mu[:, :, seen], rtol=1e-6, atol=1e-8)
    assert found.images.shape[1] == T


T_MISSING = 6
patterns = st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=2, max_size=2)


def brute_force(dynamics, k, y, observed, noise=0.0):
    """Mean (T, 2) and covariances (T, 2, 2) of a given a + N(0, noise I) = y (T, 2) at the observed frames, z = k."""
    lgssm = kalman.LGSSM(*(x.detach().numpy() for x in dynamics.lgssm()))
    system = oracles.System(*lgssm[:5], lgssm.mu[k], lgssm.Sigma[k])
    T = len(y)
    mean, cov = (x[-2 * T :] if x.ndim == 1 else x[-2 * T :, -2 * T :] for x in oracles.joint_moments(system, T))
    C = np.block([[cov, cov], [cov, cov + noise * np.eye(2 * T)]])
    seen = [2 * T + 2 * t + i for t in range(T) if observed[t] for i in range(2)]
    mean, cov = oracles.condition(np.tile(mean, 2), C, seen, y.numpy()[observed].flatten())
    frames = [slice(2 * t, 2 * t + 2) for t in range(T)]
    return np.stack([mean[f] for f in frames]), np.stack([cov[f, f] for f in frames])


def missing_world(K=2):
    model = make_model(n_components=K, delta=0.3, state_noise=0.02, position_noise=0.1)
    torch.manual_seed(3)
    a = torch.randn(2, 2, T_MISSING, 2, dtype=torch.float64)
    return model, a, torch.rand(2, T_MISSING, 12, 12), torch.tensor([2, 1])


class SomeFrames(Guide):
    """Knows the positions of the sequences whose first pixels are its own, whatever frames it is shown."""

    def __init__(self, positions, images):
        super().__init__()
        self.positions, self.images = positions, images

    def encode(self, images, n_objects):
        match = (images[:, None, :, None, 0] - self.images[None, :, None, :, 0]).abs().sum(-1) < 1e-6  # (B, B', t, T)
        row = match.any(-1).sum(-1).argmax(-1)
        frame = match[torch.arange(len(images)), row].int().argmax(-1)  # of the shown ones; any of the others
        a = self.positions[row[:, None, None], torch.arange(int(n_objects.max()))[:, None], frame[:, None]]
        return dist.Normal(a, 1e-4).to_event(2)


@settings(max_examples=12, deadline=None)
@given(observed=patterns)
@example(observed=[[False, False, True, False, False, False], [False, True, False, False, True, False]])
def test_any_frames_may_be_missing(observed):
    """Positions and covariances at missing frames are the dense Gaussian's, for a mask of each sequence."""
    model, a, images, n_objects = missing_world()
    observed = torch.tensor(observed)
    p = interpolate(model, SomeFrames(a, images), images, n_objects, observed, n_samples=2)
    assert p.samples.shape == (2, 2, 2, T_MISSING, 2)
    assert p.sample_images.shape == (2, 2, T_MISSING, 12, 12)
    for b, n in ((0, 0), (0, 1), (1, 0)):
        seen = observed[b]
        mean, cov = brute_force(model.dynamics, int(p.component[b, n]), a[b, n], seen)
        np.testing.assert_allclose(p.mean[b, n, ~seen], mean[~seen], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(p.cov[b, n, ~seen], cov[~seen], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(p.mean[b, n, seen], a[b, n, seen])
        torch.testing.assert_close(p.samples[0, b, n, seen], a[b, n, seen], rtol=0, atol=1e-3)


@settings(max_examples=12, deadline=None)
@given(observed=patterns)
@example(observed=[[True, False, False, False, False, True], [True] * 6])
def test_an_object_may_be_hidden(observed):
    """Each of two objects is inferred from its own frames alone."""
    model, a, images, n_objects = missing_world()
    observed = torch.tensor(observed).expand(2, 2, T_MISSING)  # of the two objects
    p = interpolate(model, SomeFrames(a, images), images, n_objects, observed)
    for b, n in ((0, 0), (0, 1), (1, 0)):
        seen = observed[b, n]
        mean, cov = brute_force(model.dynamics, int(p.component[b, n]), a[b, n], seen)
        np.testing.assert_allclose(p.mean[b, n, ~seen], mean[~seen], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(p.cov[b, n, ~seen], cov[~seen], rtol=1e-6, atol=1e-9)


class Given(nn.Module):
    """A head that measures y with variance R."""

    def __init__(self, y, R):
        super().__init__()
        self.y, self.R = y, R

    def forward(self, s, images, n_objects):
        N = int(n_objects.max())
        b = 0 if N == 2 else 1  # sequences with different masks are asked for one at a time
        y = self.y[b : b + len(images), :N, : images.shape[1]]
        return y, torch.full_like(y, self.R**0.5)


@settings(max_examples=12, deadline=None)
@given(observed=patterns)
@example(observed=[[False, False, True, False, False, False], [False, True, False, True, True, False]])
def test_a_structured_guide_takes_any_mask(observed):
    """Its posterior given measurements of some frames, of some objects, is the dense Gaussian's (one component)."""
    model, y, images, n_objects = missing_world(K=1)
    guide = StructuredGuide(model.dynamics, make_guide().rnn, Given(y, 0.3))
    observed = torch.stack([torch.tensor(observed), torch.tensor(observed[::-1])])  # (B, N, T)
    for mask in (observed, observed[0, 0], observed[:1, 0].expand(2, T_MISSING)):
        p = interpolate(model, guide, images, n_objects, mask)
        for b, n in ((0, 0), (0, 1), (1, 0)):
            seen = mask.expand(2, 2, T_MISSING)[b, n] if mask.dim() != 2 else mask[b]
            mean, cov = brute_force(model.dynamics, 0, y[b, n], seen, noise=0.3)
            np.testing.assert_allclose(p.mean[b, n], mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(p.cov[b, n], cov, rtol=1e-5, atol=1e-5)


def test_masks_of_one_sequence_are_those_of_a_batch():
    """Sequences with different masks are answered as one by one; here with a real network and leading gaps."""
    model, guide = make_model(), make_guide()
    images, n_objects = torch.rand(4, 7, 12, 12), torch.tensor([3, 1, 2, 1])
    observed = torch.tensor(
        [[0, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]]
    )
    observed = observed.bool()
    together = interpolate(model, guide, images, n_objects, observed)
    for b in range(4):
        n = int(n_objects[b])
        alone = interpolate(model, guide, images[b : b + 1], n_objects[b : b + 1], observed[b])
        torch.testing.assert_close(together.mean[b, :n], alone.mean[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.images[b], alone.images[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.component[b, :n], alone.component[0])


def test_smoothing_averages_the_components():
    """E[h | a] and Cov[h | a] under the mixture, from draws of z and of h given z; 6 standard errors of 40,000."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(delta=0.3, state_noise=0.05, position_noise=0.5))
    a = torch.randn(6, 2, dtype=torch.float64)
    observed = torch.tensor([1, 0, 0, 1, 0, 1]).bool()
    states = smooth(dynamics, a, observed)
    n = 40_000
    z = dynamics.component_posterior(a, observed).sample((n,))
    both = kalman.sample_posterior(dynamics.lgssm(), a.expand(2, 6, 2), observed, (n,))
    h = both[torch.arange(n), z]
    assert ((h.mean(0) - states.mean).abs() < 6 * h.std(0) / n**0.5).all()
    variance = states.cov.diagonal(dim1=-2, dim2=-1)
    fourth = (h - states.mean).pow(4).mean(0)
    assert ((h.var(0) - variance).abs() < 6 * ((fourth - variance**2) / n).sqrt()).all()


@pytest.mark.parametrize("what", ["generate", "interpolate"])
def test_samples_have_the_moments_of_the_prediction(what):
    """With one component and a sure guide, sampled predictions have the closed-form mean and covariance (6 sigma)."""
    torch.manual_seed(1)
    model = PixelModel(
        Dynamics(DynamicsConfig(delta=0.3, state_noise=0.02, position_noise=0.1, n_components=1)), Renderer(12, 12, 4)
    )
    a = torch.randn(2, 1, 9, 2, dtype=torch.float64)
    images, n_objects, n = torch.zeros(2, 9, 12, 12), torch.ones(2, dtype=torch.long), 20_000
    guide = Oracle(a, std=1e-9)
    if what == "generate":
        p = generate(model, guide, images[:, :4], n_objects, n_frames=9, n_samples=n)
    else:
        p = interpolate(model, guide, images, n_objects, torch.tensor([1, 1, 0, 0, 0, 1, 0, 1, 0]).bool(), n_samples=n)
    hidden = ~p.observed
    draws, mean = p.samples[:, :, :, hidden], p.mean[:, :, hidden]
    variance = p.cov[:, :, hidden].diagonal(dim1=-2, dim2=-1)
    assert ((draws.mean(0) - mean).abs() < 6 * (variance / n).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 6 * (2 / n) ** 0.5).all()
    torch.testing.assert_close(p.samples[:, :, :, p.observed].mean(0), p.mean[:, :, p.observed], atol=1e-6, rtol=0)


def test_shapes(small_data):
    model, guide = make_model(), make_guide()
    images, n_objects = small_data.images[:5], small_data.n_objects[:5]
    found = infer(guide, images, n_objects, n_samples=4)
    assert found.mean.shape == found.std.shape == (5, 3, 11, 2)
    assert found.samples.shape == (4, 5, 3, 11, 2)
    assert reconstruct(model, guide, images, n_objects).shape == images.shape
    p = generate(model, guide, images[:, :2], n_objects, n_frames=20, n_samples=4)
    assert p.mean.shape == (5, 3, 20, 2)
    assert p.cov.shape == (5, 3, 20, 2, 2)
    assert p.images.shape == (5, 20, 12, 12)
    assert p.sample_images.shape == (4, 5, 20, 12, 12)
    assert p.component.shape == (5, 3)


def test_a_distribution_without_moments_is_sampled(small_data):
    class Flow(Guide):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.3))

        def encode(self, images, n_objects):
            base = dist.Normal(self.shift, 0.1).expand([len(images), int(n_objects.max()), images.shape[1], 2])
            return dist.TransformedDistribution(base, [torch.distributions.transforms.TanhTransform()]).to_event(2)

    torch.manual_seed(0)
    found = infer(Flow(), small_data.images, small_data.n_objects)
    assert float((found.mean - 0.29).abs().max()) < 6 * 0.1 / 256**0.5


BAD = {
    "as many seen as there are": lambda m, g, v, n: generate(m, g, v, n, n_frames=11),
    "other image size": lambda m, g, v, n: infer(g, v[..., 1:], n),
    "no object": lambda m, g, v, n: infer(g, v, n * 0),
    "objects for other sequences": lambda m, g, v, n: infer(g, v, n[1:]),
    "nothing seen": lambda m, g, v, n: interpolate(m, g, v, n, torch.zeros(11, dtype=torch.bool)),
    "nothing seen of one sequence": lambda m, g, v, n: interpolate(m, g, v, n, torch.arange(12 * 11).view(12, 11) > 10),
    "mask of other sequences": lambda m, g, v, n: interpolate(m, g, v, n, torch.ones(3, 11, dtype=torch.bool)),
    "mask of other objects": lambda m, g, v, n: interpolate(m, g, v, n, torch.ones(12, 2, 11, dtype=torch.bool)),
    "mask of another length": lambda m, g, v, n: interpolate(m, g, v, n, torch.arange(7) < 2),
    "mask of floats": lambda m, g, v, n: interpolate(m, g, v, n, torch.ones(11)),
}


@pytest.mark.parametrize("query", BAD.values(), ids=BAD.keys())
def test_bad_input(small_data, query):
    with pytest.raises(ValueError):
        query(make_model(), make_guide(), small_data.images, small_data.n_objects)


@pytest.mark.parametrize("axes", [0, 1, 2], ids=["T", "BT", "BNT"])
def test_a_mask_may_be_an_array(small_data, axes, monkeypatch):
    model, guide, (v, n) = make_model(), make_guide(), (small_data.images, small_data.n_objects)
    seen = torch.arange(11) % 3 != 1
    seen = (seen, seen.repeat(12, 1), seen.repeat(12, 3, 1))[axes]
    wanted = interpolate(model, guide, v, n, seen)
    found = interpolate(model, guide, v.numpy(), n.numpy(), seen.numpy())
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.observed, wanted.observed)
    monkeypatch.setattr(parts, "FEWEST", 5)
    monkeypatch.setattr(parts, "PIXELS_AT_ONCE", 1)
    by_parts = interpolate(model, guide, v.numpy(), n.numpy(), seen.numpy())
    there = n[:, None] > torch.arange(3)
    torch.testing.assert_close(by_parts.mean[there], wanted.mean[there], rtol=1e-5, atol=1e-6)


def test_small_world_is_the_models(small_data):
    assert small_data.size == (SMALL.height, SMALL.width)
