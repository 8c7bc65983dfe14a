import math

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead, LinearHead
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

H, W, D = 4, 5, 6


class FlatGuide(Guide):
    def __init__(self, size):
        super().__init__()
        self.linear = torch.nn.Linear(size * size, 6)  # up to 3 objects

    def encode(self, images, n_objects):
        mu = self.linear(images.flatten(2)).unflatten(-1, (3, 2)).transpose(1, 2)[:, : n_objects.max()]
        return dist.Normal(mu, 0.1).to_event(2)


class ShapedGuide(Guide):
    """Gives whatever distribution it was made with."""

    def __init__(self, distribution):
        super().__init__()
        self.distribution = distribution

    def encode(self, images, n_objects):
        return self.distribution


def make_rnn(max_objects=4, seed=0):
    torch.manual_seed(seed)
    rnn = InferenceRNN(H, W, D, max_objects).double()
    for p in rnn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return rnn


def make_images(n_sequences, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n_sequences, T, H, W, generator=generator) < 0.4).double()


def make_model(size):
    torch.manual_seed(3)
    return PixelModel(Dynamics(), Renderer(size, size, 8))


def literal_states(rnn, images, n):
    """(n, T, D) of one sequence (T, H, W)."""
    W_beta, W_s = torch.cat([rnn.from_states.weight, rnn.from_image.weight], 1).chunk(2)
    b_beta, b_s = rnn.from_states.bias.chunk(2)
    return oracles.inference_states(images.flatten(1), rnn.phi_s0[n - 1, :n], W_beta, b_beta, W_s, b_s)


@pytest.mark.parametrize("N", [1, 2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_states_and_gradients_equal_the_literal_double_loop(N, T):
    rnn, images = make_rnn(), make_images(2, T).requires_grad_()
    s = rnn(images, torch.tensor([N, N]))
    wanted = torch.stack([literal_states(rnn, v, N) for v in images])
    assert s.shape == (2, N, T, D)
    assert oracles.relative_error(s, wanted.detach()) < 1e-10
    weights = torch.randn_like(s)
    inputs = [images, *rnn.parameters()]
    gradients = torch.autograd.grad((s * weights).sum(), inputs)
    for gradient, wanted_gradient in zip(gradients, torch.autograd.grad((wanted * weights).sum(), inputs)):
        assert oracles.relative_error(gradient, wanted_gradient) < 1e-10


@pytest.mark.parametrize("T", [1, 2, 7])
def test_states_of_a_mixed_batch_equal_those_of_separate_ones(T):
    rnn, images, n_objects = make_rnn(), make_images(5, T), [2, 4, 1, 3, 1]
    s = rnn(images, torch.tensor(n_objects))
    assert s.shape == (5, 4, T, D)
    for i, n in enumerate(n_objects):
        alone = rnn(images[i : i + 1], torch.tensor([n]))[0]
        assert oracles.relative_error(s[i, :n], alone.detach()) < 1e-10
        assert oracles.relative_error(s[i, :n], literal_states(rnn, images[i], n).detach()) < 1e-10


@pytest.mark.parametrize("t", [0, 2, 4])
def test_states_do_not_depend_on_later_images(t):
    rnn, images = make_rnn(), make_images(1, 5).requires_grad_()
    s = rnn(images, torch.tensor([3]))
    (gradient,) = torch.autograd.grad(s[:, :, t].square().sum(), images)
    assert not gradient[:, t + 1 :].any()
    assert gradient[:, : t + 1].flatten(2).any(-1).all()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_states_do_not_depend_on_later_objects(n):
    rnn = make_rnn()
    s = rnn(make_images(1, 3), torch.tensor([3]))
    (gradient,) = torch.autograd.grad(s[:, n].square().sum(), rnn.phi_s0)
    assert gradient[2, : n + 1].any(-1).all()
    gradient[2, : n + 1] = 0
    assert not gradient.any()


def test_more_objects_than_were_learned_begin_as_the_last():
    rnn = make_rnn(max_objects=3)
    images = make_images(2, 3)
    s = rnn(images, torch.tensor([5, 1]))
    assert s.shape[:2] == (2, 5)
    with torch.no_grad():
        larger = make_rnn(max_objects=5)
        larger.load_state_dict({**rnn.state_dict(), "phi_s0": larger.phi_s0})
        larger.phi_s0[:3, :3] = rnn.phi_s0
        larger.phi_s0[4] = rnn.phi_s0[2, [0, 1, 2, 2, 2]]
    expected = larger(images, torch.tensor([5, 1]))
    torch.testing.assert_close(s[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(s[1, 0], expected[1, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape, n_objects, message",
    [
        ((2, 3, W, H), [1, 1], f"images are {W} x {H} pixels; this model was made for {H} x {W}"),
        ((2, 3, H * W), [1, 1], r"wanted \(B, T, H, W\)"),
        ((2, 3, H, W), [1, 1, 1], "n_objects has length 3 for 2 sequences"),
        ((2, 3, H, W), [1, 0], "needs at least 1 object"),
    ],
)
def test_images_and_numbers_of_objects_that_do_not_fit_raise(shape, n_objects, message):
    guide = RecurrentGuide(InferenceRNN(H, W, D))
    with pytest.raises(ValueError, match=message):
        guide(torch.zeros(shape), torch.tensor(n_objects))


def test_rnn_weights_start_with_variance_one_over_the_root_of_their_number():
    torch.manual_seed(0)
    state_size, P = 64, 16 * 16
    rnn = InferenceRNN(16, 16, state_size)
    W_beta, W_s = torch.cat([rnn.from_states.weight, rnn.from_image.weight], 1).chunk(2)
    for weight, d in [(W_beta, W_beta.numel()), (W_s, W_s.numel()), (rnn.phi_s0, state_size)]:
        variance, n = 1 / math.sqrt(d), weight.numel()
        assert abs(weight.mean().item()) < 6 * math.sqrt(variance / n)  # sigma
        assert abs(weight.var().item() - variance) < 6 * variance * math.sqrt(2 / n)  # sigma
    assert W_beta.shape == (state_size, 2 * state_size + P)
    assert not rnn.from_states.bias.any()


def test_recurrent_guide_is_equations_8_and_9():
    guide = RecurrentGuide(make_rnn()).double()
    for p in guide.head.parameters():
        torch.nn.init.normal_(p)
    images, n_objects = make_images(2, 3), [2, 3]
    q_a = guide.encode(images, torch.tensor(n_objects))
    assert q_a.batch_shape == (2, 3)
    assert q_a.event_shape == (3, 2)
    W_mu, W_sigma = guide.head.linear.weight.chunk(2)
    b_mu, b_sigma = guide.head.linear.bias.chunk(2)
    for i, n in enumerate(n_objects):
        mu, sigma = oracles.linear_head(literal_states(guide.rnn, images[i], n), W_mu, b_mu, W_sigma, b_sigma)
        assert oracles.relative_error(q_a.base_dist.loc[i, :n], mu.detach()) < 1e-10
        assert oracles.relative_error(q_a.base_dist.scale[i, :n], sigma.detach()) < 1e-10


@pytest.mark.parametrize("head", [LinearHead(D), AttentionHead(H, W, D)], ids=["linear", "attention"])
def test_head_shapes(head):
    mu, sigma = head(torch.randn(2, 3, 4, D), make_images(2, 4).float(), torch.tensor([3, 1]))
    assert mu.shape == sigma.shape == (2, 3, 4, 2)
    assert torch.isfinite(mu).all()
    assert (sigma > 0).all()


def make_attention_head(**options):
    """Attends evenly to the white pixels: the learned parts are zero."""
    head = AttentionHead(H, W, D, **options)
    for p in (*head.to_claim.parameters(), head.to_log_sigma.weight):
        torch.nn.init.zeros_(p)
    return head


def image_with(**values):
    """(1, 1, H, W), black but for the pixels r<row>c<column>."""
    image = torch.zeros(1, 1, H, W)
    for place, value in values.items():
        image[0, 0, int(place[1]), int(place[3])] = value
    return image


@pytest.mark.parametrize("row, column", [(0, 0), (0, W - 1), (H - 1, 0), (1, 3)])
def test_attention_heads_mean_is_the_place_of_the_one_white_pixel(row, column):
    mu, sigma = make_attention_head(sigma=0.3)(
        torch.randn(1, 2, 1, D), image_with(**{f"r{row}c{column}": 1.0}), torch.tensor([2])
    )
    x, y = 2 * column / (W - 1) - 1, 2 * row / (H - 1) - 1
    torch.testing.assert_close(mu, torch.tensor([x, y]).expand(1, 2, 1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(sigma, torch.full((1, 2, 1, 2), 0.3))


def test_what_one_object_claims_is_left_to_no_other():
    """Object 1 claims the left pixel and not the right one; object 2, which would take either, gets the right one."""
    head = AttentionHead(H, W, D)
    with torch.no_grad():
        head.to_claim.weight.zero_()
        head.to_claim.bias.zero_()
        head.to_claim.weight[1, 0] = 30.0  # the wave that falls from 1 at the left edge to -1 at the right
    s = torch.zeros(1, 2, 1, D)
    s[0, 0, 0, 0] = 1.0
    mu, _ = head(s, image_with(**{"r1c0": 1.0, f"r1c{W - 1}": 1.0}), torch.tensor([2]))
    torch.testing.assert_close(mu[0, :, 0, 0], torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "values, centroid",
    [
        ({}, [0, 0]),
        ({"r0c0": 1, "r3c4": 1}, [0, 0]),
        ({"r0c0": 1, "r0c4": 1, "r3c4": 1}, [1 / 3, -1 / 3]),
        ({"r0c0": 0.25, "r0c4": 0.75}, [0.5, -1]),
    ],
    ids=str,
)
def test_attention_head_starts_from_the_centroid_of_the_white_pixels(values, centroid):
    frames = torch.cat([image_with(**values), torch.ones(1, 1, H, W)], 1)
    mu, _ = make_attention_head()(torch.randn(1, 1, 2, D), frames, torch.tensor([1]))
    torch.testing.assert_close(mu[0, 0], torch.tensor([centroid, [0, 0]]).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, event_dims",
    [((2, 2, 3, 2), 0), ((2, 2, 3, 2), 1), ((2, 2, 3, 2), 3), ((2, 3, 2, 2), 2), ((2, 1, 3, 2), 2), ((2, 2, 3, 4), 2)],
)
def test_an_encode_of_a_wrong_shape_raises_and_names_the_wanted_shapes(shape, event_dims):
    guide = ShapedGuide(dist.Normal(torch.zeros(shape), 1.0).to_event(event_dims))
    with pytest.raises(ValueError, match=r"ShapedGuide.*wanted \(B, N\) = \(2, 2\) and \(T, 2\) = \(3, 2\)"):
        guide(make_images(2, 3), torch.tensor([2, 1]))


@pytest.mark.parametrize("wrong, kind", [(None, "NoneType"), (torch.zeros(2, 2, 3, 2), "Tensor"), ((1, 2), "tuple")])
def test_what_is_no_distribution_is_refused_in_one_line(wrong, kind):
    with pytest.raises(ValueError, match=f"ShapedGuide.encode returned a {kind}; wanted a distribution") as error:
        ShapedGuide(wrong).q(make_images(2, 3), 2)
    assert "\n" not in str(error.value)


def test_guide_site_masks_objects_that_are_not_there():
    q_a = dist.Normal(torch.randn(2, 3, 4, 2), 1.0).to_event(2)
    trace = poutine.trace(ShapedGuide(q_a)).get_trace(make_images(2, 4), torch.tensor([3, 1]))
    trace.compute_log_prob()
    assert [name for name in trace.stochastic_nodes if name != "sequences"] == ["a"]
    a, log_prob = trace.nodes["a"]["value"], trace.nodes["a"]["log_prob"]
    assert a.shape == (2, 3, 4, 2)
    wanted = q_a.log_prob(a)
    torch.testing.assert_close(log_prob, torch.stack([wanted[0].sum(), wanted[1, 0]]).to(log_prob))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("kind", ["flat", "linear", "attention"])
def test_guides_work_in_predictive(kind, parallel):
    size, T, S = 8, 3, 4
    torch.manual_seed(0)
    data = simulate(CannonballConfig(n_frames=T, height=size, width=size, radius=1.0), 3, seed=0)
    head = AttentionHead(size, size, D) if kind == "attention" else None
    guide = FlatGuide(size) if kind == "flat" else RecurrentGuide(InferenceRNN(size, size, D), head)
    model = poutine.uncondition(make_model(size))
    samples = Predictive(model, guide=guide, num_samples=S, parallel=parallel)(data.images, data.n_objects)
    assert samples["v"].shape == (S, 3, T, size, size)
    draws = Predictive(guide, num_samples=S, parallel=parallel)(data.images, data.n_objects)
    assert draws["a"].shape == (S, 3, 3, T, 2)
    assert len(draws["a"].unique()) == draws["a"].numel()


def trained_by_fit(model, guide, data):
    fit(model, guide, data, Schedule(steps=2, batch_size=4, learn_from={}), progress=False)


def trained_by_svi(model, guide, data):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    for _ in range(2):
        assert math.isfinite(svi.step(data.images, data.n_objects))


def trained_by_svi_and_pyro_module(model, guide, data):
    def registered(name, module):
        return lambda *args: pyro.module(name, module)(*args)

    trained_by_svi(registered("model", model), registered("guide", guide), data)


def trained_by_elbo_module(model, guide, data):
    loss = Trace_ELBO()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss(data.images, data.n_objects).backward()
        optimizer.step()


TRAINERS = [trained_by_fit, trained_by_svi, trained_by_svi_and_pyro_module, trained_by_elbo_module]


@pytest.mark.parametrize("train", TRAINERS, ids=lambda train: train.__name__)
def test_a_custom_guide_trains_two_steps(train):
    data = simulate(CannonballConfig(n_frames=3, height=8, width=8, radius=1.0), 6, seed=0)
    model, guide = make_model(8), FlatGuide(8)
    before = {name: p.detach().clone() for m in (model, guide) for name, p in m.named_parameters()}
    pyro.clear_param_store()
    try:
        train(model, guide, data)
    finally:
        pyro.clear_param_store()
    unchanged = [name for m in (model, guide) for name, p in m.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
