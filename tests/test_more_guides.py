"""Every guide with a name keeps the contract; other networks under the heads; inference without a network."""

import importlib
import math
from dataclasses import replace

import oracles
import pyro
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_pixels import lgssm
from pyro_pixels._batch import object_mask
from pyro_pixels.evaluation.mean_field import MeanFieldGuide, fit_mean_field
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.other_networks import BidirectionalRNN, ConvolutionalFrontEnd
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.predict import generate, infer, interpolate
from pyro_pixels.runs import GUIDES, build
from pyro_pixels.training.elbo import bound
from pyro_pixels.worlds.base import simulate

NAMES = [*GUIDES, "centroid"]  # the last is that of examples/custom_guide.py


@pytest.fixture(autouse=True, scope="module")
def _custom_guide():
    importlib.reload(importlib.import_module("custom_guide"))  # adds its guide, in whichever order tests run
    yield
    GUIDES.pop("centroid")


@pytest.fixture(params=NAMES)
def run(request):
    config = replace(PRESETS["quick"], guide=request.param, state_size=8, guide_state_size=6, data=SMALL)
    return build(config)


def test_a_sequence_has_one_answer_whatever_is_in_its_batch(run, small_data):
    guide = run.guide.double()
    together = infer(guide, small_data.images, small_data.n_objects)
    for i, n in enumerate(small_data.n_objects.tolist()):
        alone = infer(guide, small_data.images[i : i + 1], small_data.n_objects[i : i + 1])
        assert alone.mean.shape == (1, n, SMALL.n_frames, 2)
        assert oracles.relative_error(together.mean[i, :n], alone.mean[0]) < 1e-8
        assert oracles.relative_error(together.std[i, :n], alone.std[0]) < 1e-8


def test_positions_have_the_types_that_the_notation_says(run, small_data):
    batch = small_data.images, small_data.n_objects
    kind = torch.float64 if run.config.guide == "structured" else torch.float32
    assert poutine.trace(run.guide).get_trace(*batch).nodes["a"]["value"].dtype == kind
    assert poutine.trace(poutine.uncondition(run.model)).get_trace(*batch).nodes["a"]["value"].dtype == torch.float64
    assert infer(run.guide, *batch).mean.dtype == torch.float64


def test_only_objects_that_are_there_count(run, small_data):
    trace = poutine.trace(run.guide).get_trace(small_data.images, small_data.n_objects)
    trace.compute_log_prob()
    a, log_prob = trace.nodes["a"]["value"], trace.nodes["a"]["log_prob"]
    of_each = run.guide.q(small_data.images, small_data.n_objects).log_prob(a)
    wanted = (of_each * object_mask(small_data.n_objects, 3)).sum(1)
    assert torch.isfinite(of_each).all()
    torch.testing.assert_close(log_prob, wanted.to(log_prob), rtol=1e-5, atol=1e-3)


def test_queries_of_every_kind(run, small_data):
    images, n_objects, T = small_data.images, small_data.n_objects, SMALL.n_frames
    assert infer(run.guide, images[:, :1], n_objects).mean.shape == (12, 3, 1, 2)
    future = generate(run.model, run.guide, images[:, :4], n_objects, n_frames=T, n_samples=2)
    time = torch.arange(T)
    between = interpolate(run.model, run.guide, images, n_objects, (time < 4) | (time >= T - 4), n_samples=2)
    for prediction in (future, between):
        assert prediction.samples.shape == (2, 12, 3, T, 2)
        assert torch.isfinite(prediction.samples).all()
        assert torch.isfinite(prediction.images).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(run, small_data, parallel):
    model = poutine.uncondition(run.model)
    draws = Predictive(model, guide=run.guide, num_samples=3, parallel=parallel)(
        small_data.images, small_data.n_objects
    )
    assert draws["v"].shape == (3, *small_data.images.shape)


def test_stock_svi_trains_every_parameter_and_leaves_none_in_the_store(run, small_data):
    before = {name: p.detach().clone() for name, p in run.guide.named_parameters()}
    svi = SVI(run.model, run.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    for _ in range(2):
        assert math.isfinite(svi.step(small_data.images, small_data.n_objects))
    assert [name for name, p in run.guide.named_parameters() if torch.equal(p, before[name])] == []
    assert len(pyro.get_param_store()) == 0


def frames_that_matter(name, of_frame, small_data):
    """(T,) whether the mean of a_t, t = of_frame, of the first sequence with two objects depends on each frame."""
    guide = build(replace(PRESETS["quick"], guide=name, state_size=8, guide_state_size=6, data=SMALL)).guide.double()
    nn.init.normal_(guide.head.to_claim.weight)
    one = small_data[small_data.n_objects == 2][:1]
    white = one.images.double().requires_grad_()  # where it is white: black pixels have no weight
    guide.q(white, one.n_objects).mean[0, :, of_frame].sum().backward()
    return white.grad[0].flatten(1).ne(0).any(1)


def test_a_bidirectional_guide_sees_the_future_and_the_others_do_not(small_data):
    for t in (0, 4):
        past = torch.arange(SMALL.n_frames) <= t
        for name in ("attentive", "convolutional"):
            assert torch.equal(frames_that_matter(name, t, small_data), past)
        assert frames_that_matter("bidirectional", t, small_data).all()


def make_rnn(seed, front_end=None):
    torch.manual_seed(seed)
    return InferenceRNN(SMALL.height, SMALL.width, 6, front_end=front_end).double()


def test_bidirectional_states_of_the_reversed_film_are_the_reversed_states_with_their_halves_swapped(small_data):
    images, n_objects = small_data.images.double(), small_data.n_objects
    first, second = make_rnn(0), make_rnn(1)
    s = BidirectionalRNN(first, second)(images, n_objects)
    assert s.shape == (12, 3, SMALL.n_frames, 12)
    torch.testing.assert_close(s[..., :6], first(images, n_objects), rtol=0, atol=0)
    swapped = BidirectionalRNN(second, first)(images.flip(1), n_objects)
    torch.testing.assert_close(swapped, s.flip(2).roll(6, -1), rtol=0, atol=0)


def test_networks_for_images_of_different_sizes_do_not_go_together():
    with pytest.raises(ValueError, match="12 x 12 and 9 x 12 pixels"):
        BidirectionalRNN(InferenceRNN(12, 12, 4), InferenceRNN(9, 12, 4))


class Pixels(nn.Module):
    """A convolution that changes nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, kernel_size=1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images):
        return self.layer(images.flatten(0, 1).unsqueeze(1)).flatten(1).unflatten(0, images.shape[:2])


def test_behind_a_convolution_that_changes_nothing_the_states_are_those_of_the_pixels(small_data):
    rnn, plain = make_rnn(0, Pixels()), make_rnn(0)
    plain.load_state_dict({k: x for k, x in rnn.state_dict().items() if not k.startswith("front_end")})
    images = small_data.images.double()
    torch.testing.assert_close(
        rnn(images, small_data.n_objects), plain(images, small_data.n_objects), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("height, width", [(16, 16), (17, 14)])
def test_features_move_with_the_image_and_keep_frames_apart(height, width):
    front_end = ConvolutionalFrontEnd((3, 5))
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)
    frames = torch.zeros(1, 2, height, width)
    frames[0, 0, 4:7, 4:7], frames[0, 1, 8:11, 4:7] = 1.0, 1.0  # the second is the first, 4 pixels down
    features = front_end(frames)
    assert features.shape == (1, 2, 5 * rows * columns)
    first, second = features.detach().view(2, 5, rows, columns)
    torch.testing.assert_close(second[:, 2:-1], first[:, 1:-2])  # away from the edges, where there is padding
    torch.testing.assert_close(front_end(frames[:, 1:])[0, 0], features[0, 1])


def one_component_model():
    """Its images say nothing of the positions, so that the posterior is the prior, one Gaussian."""
    model = make_model(n_components=1, state_noise=0.3, position_noise=0.5)
    nn.init.zeros_(model.renderer.to_v.weight)
    return model


def test_mean_field_finds_the_known_best_normals():
    """Of a prior N(m, C): mean m and variances 1 / (C^-1)_ii. What is left of the KL is (log det C C^-1_ii) / 2."""
    data = simulate(replace(SMALL, n_frames=3), 20, seed=0)
    model = one_component_model()
    fitted = fit_mean_field(model, data, make_guide(), steps=400, learning_rate=0.05)
    q_a, present = fitted.q(data.images, data.n_objects), object_mask(data.n_objects, 3)
    mu, variance = (x[present].flatten(1).detach() for x in (q_a.mean, q_a.variance))
    m, C = (x[0].detach() for x in lgssm.marginal_moments(model.dynamics.lgssm(), 3))
    precision = torch.linalg.inv(C)
    best = 0.5 * (torch.linalg.slogdet(C).logabsdet + precision.diagonal().log().sum())
    kl = best + 0.5 * (variance * precision.diagonal() - 1 - (variance * precision.diagonal()).log()).sum(-1)
    kl += 0.5 * torch.einsum("ni,ij,nj->n", mu - m, precision, mu - m)
    assert best > 0.5  # correlations matter
    assert (kl - best).mean() < 0.05
    assert abs((variance * precision.diagonal()).log().mean()) < 0.03


def test_mean_field_leaves_the_model_and_all_global_state_alone(small_data):
    model, start = make_model(), make_guide()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    fitted = fit_mean_field(model, small_data, start, steps=3)
    again = fit_mean_field(model, small_data, start, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before))
    assert torch.equal(fitted.auto.locs.a, again.auto.locs.a)
    assert not set(fitted.parameters()) & set(model.parameters())
    assert len(pyro.get_param_store()) == 0


def test_mean_field_begins_where_the_guide_is_and_climbs(small_data):
    model, start = make_model(), make_guide()
    data = small_data[:6]
    begun = MeanFieldGuide(model, data.images, data.n_objects, start)
    wanted = infer(start, data.images, data.n_objects).mean
    torch.testing.assert_close(infer(begun, data.images, data.n_objects).mean, wanted)
    climbed = fit_mean_field(model, data, start, steps=100, learning_rate=0.02)
    gains = torch.stack(
        [bound(model, climbed, data, seed=i).bound.mean() - bound(model, begun, data, seed=i).bound.mean()
         for i in range(10)]
    )  # fmt: skip
    assert gains.mean() > 5 * gains.std() / math.sqrt(10)


def loss_of(model, guide, data):
    with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
        torch.manual_seed(0)
        return Trace_ELBO().loss(model, guide, data.images, data.n_objects)


def test_mean_field_is_pyros_autonormal_but_for_absent_objects(small_data):
    """With AutoNormal alone, a wider q of objects that are not there is a better bound, without end."""
    model = make_model()
    for data in (small_data[small_data.n_objects == 2], small_data):
        guide = MeanFieldGuide(model, data.images, data.n_objects, make_guide())
        absent = ~object_mask(data.n_objects, int(data.n_objects.max()))
        before, alone = loss_of(model, guide, data), loss_of(model, guide.auto, data)
        if not absent.any():
            assert alone == pytest.approx(before, rel=1e-6)
        sigma = guide.auto.scales.a.detach().clone()
        sigma[absent] *= 2
        with torch.no_grad():
            guide.auto.scales.a_unconstrained.copy_(sigma.expm1().log())  # AutoNormal's is softplus
        assert loss_of(model, guide, data) == pytest.approx(before, rel=1e-6)
        n = int(absent.sum()) * SMALL.n_frames * 2
        assert loss_of(model, guide.auto, data) == pytest.approx(alone - n * math.log(2), rel=1e-6)


def test_mean_field_answers_for_its_own_sequences_only(small_data):
    guide = MeanFieldGuide(make_model(), small_data.images, small_data.n_objects, make_guide())
    assert infer(guide, small_data.images, small_data.n_objects).mean.shape == (12, 3, 11, 2)
    for other in (small_data[:6], replace(small_data, images=small_data.images.flip(0))):
        with pytest.raises(ValueError, match="holds the positions in 12 sequences of 11 frames"):
            infer(guide, other.images, other.n_objects)


def test_mean_field_takes_frames_that_were_not_seen(small_data):
    images = small_data.images.float()
    images[1, 3:5] = torch.nan
    data = replace(small_data, images=images)
    fitted = fit_mean_field(make_model(), data, make_guide(), steps=3)
    known = infer(fitted, data.images, data.n_objects).mean.isfinite().all((1, 3))
    assert torch.equal(known, data.seen)
    assert bound(make_model(), fitted, data).bound.isfinite().all()
    with pytest.raises(ValueError, match="holds the positions in 12 sequences"):
        infer(fitted, images.flip(0), small_data.n_objects)
