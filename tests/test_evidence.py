"""log p(v) against quadrature, and counts where the images leave no doubt."""

import math

import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model

from pyro_pixels.guides.base import Guide
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.queries.evidence import count_objects, log_evidence
from pyro_pixels.runs import load_pretrained
from pyro_pixels.training.elbo import bound
from pyro_pixels.worlds.base import simulate


class Broad(Guide):
    """q(a | v) = N(0, 1.3^2), whatever the images."""

    def encode(self, images, n_objects):
        return dist.Normal(torch.zeros(len(images), int(n_objects.max()), images.shape[1], 2), 1.3).to_event(2)


@pytest.mark.parametrize("n", [1, 2])
def test_evidence_is_the_integral(n):
    """One frame of 3 x 3 pixels, n objects: log p(v) by a sum over a grid of a, within 6 standard errors of 20,000."""
    torch.manual_seed(0)
    model = PixelModel(Dynamics(DynamicsConfig(position_noise=0.3, start_variance=0.2)), Renderer(3, 3, 6)).double()
    v = (torch.rand(1, 1, 3, 3) > 0.5).float()
    x = torch.linspace(-6, 6, 41 if n == 2 else 161, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 1, 2)  # (G, T = 1, 2)
    log_p = model.dynamics.positions(1).log_prob(plane)
    if n == 2:
        i, j = torch.meshgrid(*(torch.arange(len(plane)),) * 2, indexing="ij")
        keep = (log_p[i] + log_p[j] > log_p.max() * 2 - 14).flatten()
        i, j = i.flatten()[keep], j.flatten()[keep]
        a, log_p = torch.stack([plane[i], plane[j]], 1), log_p[i] + log_p[j]
    else:
        a = plane.unsqueeze(1)
    logits = model.renderer(a, torch.ones(n, dtype=torch.bool))
    log_v = dist.Bernoulli(logits=logits).log_prob(v.double()).sum((1, 2, 3))
    wanted = (log_v + log_p).logsumexp(0) + 2 * n * math.log(float(x[1] - x[0]))
    copies = 400  # of the sequence, 50 samples each
    each = log_evidence(model, Broad(), v.expand(copies, 1, 3, 3), torch.full((copies,), n), n_samples=50)
    p = (each.log_evidence - wanted).exp()
    assert abs(float(p.mean()) - 1) < 6 * float(p.std()) / copies**0.5 + 1e-3  # the grid is cut off


def test_one_sample_is_the_bound_and_more_are_better(small_data):
    """The mean of S = 1 is Eq (7)'s bound (6 standard errors of 200); more samples never lower it on average."""
    model, guide, data = make_model(), make_guide(), small_data[:3]
    torch.manual_seed(0)
    ones = torch.stack([log_evidence(model, guide, data.images, data.n_objects, n_samples=1)[0] for _ in range(200)])
    bounds = torch.stack([bound(model, guide, data, seed=i).bound for i in range(200)])
    standard_error = ((ones.var(0) + bounds.var(0)) / 200).sqrt()
    assert ((ones.mean(0) - bounds.mean(0)).abs() < 6 * standard_error).all()
    many = log_evidence(model, guide, data.images, data.n_objects, n_samples=200)
    assert (many.log_evidence > ones.mean(0) + 6 * ones.std(0) / 200**0.5).all()
    assert ((many.effective_samples >= 1) & (many.effective_samples <= 200)).all()


def test_chunks_have_each_sequences_own_weights(small_data):
    """q = p(a) makes the weights p(v | a); chunks of 5 agree with one of 12 within 6 standard errors of 400."""
    model = make_model(position_noise=0.01, start_variance=0.01)

    class Prior(Guide):
        def encode(self, images, n_objects):
            return model.dynamics.positions(11).expand([len(images), int(n_objects.max())])

    args = model, Prior(), small_data.images, small_data.n_objects
    torch.manual_seed(0)
    one, two = log_evidence(*args, n_samples=400), log_evidence(*args, n_samples=400, chunk_size=5)
    standard_error = (1 / one.effective_samples + 1 / two.effective_samples).sqrt()
    assert ((one.log_evidence - two.log_evidence).abs() < 6 * standard_error).all()


def test_a_trained_model_counts():
    """The pretrained weights on 12 fresh sequences; at most one wrong, in which balls hide each other."""
    run = load_pretrained()
    data = simulate(run.config.data, 12, seed=777)
    torch.manual_seed(0)
    count = count_objects(run.model, run.guide, data.images, 3, n_samples=3, chunk_size=6)
    assert int((count.n_objects != data.n_objects).sum()) <= 1
    assert count.probs.shape == count.log_evidence.shape == count.effective_samples.shape == (12, 4)
    torch.testing.assert_close(count.probs.sum(-1), torch.ones(12, dtype=torch.float64))


def test_an_empty_canvas_has_no_object():
    run = load_pretrained()
    size = run.config.data
    count = count_objects(run.model, run.guide, torch.zeros(2, 30, size.height, size.width), 2, n_samples=2)
    assert count.n_objects.tolist() == [0, 0]


def test_a_prior_counts(small_data):
    never_two = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    model, guide = make_model(), make_guide()
    torch.manual_seed(0)
    count = count_objects(model, guide, small_data.images, 3, log_prior=never_two, n_samples=2)
    assert (count.probs[:, 2] == 0).all()
    assert torch.isfinite(count.log_evidence).all()


BAD = {
    "no samples": lambda m, g, d: log_evidence(m, g, d.images, d.n_objects, n_samples=0),
    "no chunk": lambda m, g, d: log_evidence(m, g, d.images, d.n_objects, chunk_size=0),
    "no objects": lambda m, g, d: count_objects(m, g, d.images, 0),
    "prior without 0": lambda m, g, d: count_objects(m, g, d.images, 3, log_prior=torch.zeros(3)),
    "other size": lambda m, g, d: log_evidence(m, g, d.images[..., 1:], d.n_objects),
    "0 and 255": lambda m, g, d: log_evidence(m, g, 255 * d.images, d.n_objects),
    "0 and 255 to count": lambda m, g, d: count_objects(m, g, 255 * d.images, 2),
}


@pytest.mark.parametrize("query", BAD.values(), ids=BAD.keys())
def test_bad_input(query, small_data):
    with pytest.raises(ValueError):
        query(make_model(), make_guide(), small_data)
