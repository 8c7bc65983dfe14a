import itertools
import math

import oracles
import pytest
import torch
from pyro import poutine

from pyro_pixels._batch import object_mask
from pyro_pixels._init import init_as_paper
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.order import drawing_in_random_order
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.training.elbo import AnnealedELBO

H, W, D = 5, 6, 7


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def make_renderer(seed=0):
    torch.manual_seed(seed)
    renderer = Renderer(H, W, D).double()
    for p in renderer.parameters():
        torch.nn.init.normal_(p)
    return renderer


def make_model(seed=0):
    torch.manual_seed(seed)
    return PixelModel(Dynamics(), Renderer(H, W, D))


def make_images(n_sequences, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n_sequences, T, H, W, generator=generator) < 0.3).to(torch.uint8)


def literal_logits(renderer, a):
    r = renderer
    layers = (r.to_alpha, r.to_x, r.to_v)
    return oracles.render(a, r.theta_x0, *(p for layer in layers for p in (layer.weight, layer.bias)))


@pytest.mark.parametrize("N", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 4])
def test_renderer_equals_the_literal_loop(N, T):
    renderer = make_renderer()
    a = torch.randn(2, N, T, 2).double()
    logits = renderer(a, torch.ones(2, N, dtype=torch.bool))
    assert logits.shape == (2, T, H, W)
    for i in range(2):
        assert oracles.relative_error(logits[i].flatten(1), literal_logits(renderer, a[i]).detach()) < 1e-12


def test_renderer_of_a_mixed_batch_equals_the_literal_loop_over_the_objects_that_are_there():
    renderer = make_renderer()
    a = torch.randn(2, 3, 3, 4, 2).double()  # samples in front of the batch, as under a parallel Predictive
    n_objects = [1, 3, 2]
    logits = renderer(a, object_mask(torch.tensor(n_objects), 3))
    assert logits.shape == (2, 3, 4, H, W)
    for s in range(2):
        for i, n in enumerate(n_objects):
            wanted = literal_logits(renderer, a[s, i, :n]).detach()
            assert oracles.relative_error(logits[s, i].flatten(1), wanted) < 1e-12


def test_renderer_gradients_equal_those_of_the_literal_loop():
    renderer = make_renderer()
    a = torch.randn(1, 2, 3, 2).double().requires_grad_()
    weights = torch.randn(3, H * W).double()
    inputs = [a, *renderer.parameters()]
    gradients = torch.autograd.grad((renderer(a, torch.ones(1, 2).bool())[0].flatten(1) * weights).sum(), inputs)
    wanted = torch.autograd.grad((literal_logits(renderer, a[0]) * weights).sum(), inputs)
    for gradient, wanted_gradient in zip(gradients, wanted):
        assert oracles.relative_error(gradient, wanted_gradient) < 1e-10


@pytest.mark.parametrize("present", [[False, False], [True, False], [False, True]])
def test_absent_objects_leave_the_canvas_as_it_was(present):
    renderer = make_renderer()
    a = torch.randn(2, 4, 2).double().requires_grad_()
    present = torch.tensor(present)
    logits = renderer(a, present)
    with torch.no_grad():
        for anything in (1e6, torch.nan):
            elsewhere = torch.where(present[:, None, None], a, anything)
            assert torch.equal(renderer(elsewhere, present), logits)
        if not present.any():
            canvas = renderer.to_v(renderer.theta_x0.tanh()).view(H, W)
            torch.testing.assert_close(logits, canvas.expand(4, H, W), rtol=1e-13, atol=1e-13)
        else:
            torch.testing.assert_close(logits, renderer(a[present], torch.tensor([True])), rtol=1e-13, atol=1e-13)
    (gradient,) = torch.autograd.grad(logits.sum(), a)
    assert not gradient[~present].any()
    assert gradient[present].all()


def test_permuting_objects_leaves_p_a_alone_but_not_p_v_given_a():
    # Objects share their dynamics, so p(a) is a product of equal factors. They are drawn one after the other, each over
    # what the canvas holds, so p(v | a) depends on their order (Eq 1).
    model, images, n_objects = make_model(), make_images(2, 4), torch.tensor([3, 3])
    a = poutine.trace(model).get_trace(None, n_objects, 4).nodes["a"]["value"].detach()

    def log_probs(a):
        trace = poutine.trace(poutine.condition(model, {"a": a})).get_trace(images, n_objects)
        trace.compute_log_prob()
        return trace.nodes["a"]["log_prob"], trace.nodes["v"]["log_prob"]

    p_a, p_v = log_probs(a)
    for order in ([1, 0, 2], [2, 0, 1]):
        permuted_p_a, permuted_p_v = log_probs(a[:, order])
        torch.testing.assert_close(permuted_p_a, p_a, rtol=1e-12, atol=0)
        assert ((permuted_p_v - p_v).abs() > 1e-3).all()


def test_objects_are_drawn_in_random_order_where_asked_and_nothing_else_is_random():
    model, n_objects = make_model(), torch.tensor([3, 1, 2, 3])
    for p in model.renderer.parameters():
        torch.nn.init.normal_(p)
    a, images = torch.randn(4, 3, 6, 2), make_images(4, 6)
    conditioned = poutine.condition(model, data={"a": a})

    def log_p_v():
        trace = poutine.trace(conditioned).get_trace(images, n_objects)
        trace.compute_log_prob()
        return trace.nodes["a"]["log_prob"], trace.nodes["v"]["log_prob"]

    log_p_a, in_order = log_p_v()
    orders = []
    for order in itertools.permutations(range(3)):
        logits = model.renderer(a[:, list(order)], object_mask(n_objects, 3)[:, list(order)])
        orders.append(model.likelihood(logits).log_prob(images.float()))
    orders = torch.stack(orders)
    with drawing_in_random_order():
        drawn = [log_p_v() for _ in range(60)]
    torch.testing.assert_close(torch.stack([x for x, _ in drawn]), log_p_a.expand(60, 4))
    found = torch.stack([x for _, x in drawn])
    distance = (found.unsqueeze(1) - orders).abs() / orders.abs()
    assert distance.amin(1).max() < 1e-6  # each is one of the orders
    assert (distance[:, :, 0] < 1e-6).any(0).all()  # and of three objects each order comes
    torch.testing.assert_close(found[:, 1], in_order[1].expand(60))  # of one object there is one
    torch.testing.assert_close(log_p_v()[1], in_order)


def test_log_p_v_is_the_sum_of_the_pixels_bernoulli_log_probabilities():
    model, images, n_objects = make_model().double(), make_images(2, 3), torch.tensor([2, 1])
    a = torch.randn(2, 2, 3, 2).double()
    trace = poutine.trace(poutine.condition(model, {"a": a})).get_trace(images, n_objects)
    trace.compute_log_prob()
    for i, n in enumerate([2, 1]):
        p = torch.sigmoid(literal_logits(model.renderer, a[i, :n]))
        v = images[i].flatten(1).double()
        wanted = (v * p.log() + (1 - v) * (1 - p).log()).sum()
        assert trace.nodes["v"]["log_prob"][i].item() == pytest.approx(wanted.item(), rel=1e-10)


@pytest.mark.parametrize("head", [None, AttentionHead], ids=["linear", "attention"])
def test_mixed_batch_gives_the_numbers_and_gradients_of_separate_batches(float64, head):
    T, n_objects = 4, torch.tensor([1, 3, 2, 1])
    images, model = make_images(4, T), make_model()
    guide = RecurrentGuide(InferenceRNN(H, W, D), head and head(H, W, D))
    a = poutine.trace(guide).get_trace(images, n_objects).nodes["a"]["value"].detach()
    parameters = [*model.parameters(), *guide.parameters()]

    def evaluate(images, n_objects, a):
        trace = poutine.trace(guide).get_trace(images, n_objects)
        trace.nodes["a"]["value"] = a
        replayed = poutine.replay(guide, trace=trace)
        guide_trace = poutine.trace(replayed).get_trace(images, n_objects)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(images, n_objects)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        elbo = AnnealedELBO()
        loss = elbo.differentiable_loss(model, replayed, images, n_objects)
        sites = [model_trace.nodes["a"], model_trace.nodes["v"], guide_trace.nodes["a"]]
        terms = [elbo.terms.log_likelihood.sum().item(), elbo.terms.kl.sum().item()]
        return [site["log_prob"] for site in sites], terms, torch.autograd.grad(loss, parameters)

    log_probs, terms, gradients = evaluate(images, n_objects, a)
    parts = [evaluate(images[i : i + 1], n_objects[i : i + 1], a[i : i + 1, :n]) for i, n in enumerate(n_objects)]
    for i, (wanted, _, _) in enumerate(parts):
        for log_prob, wanted_log_prob in zip(log_probs, wanted):
            assert log_prob[i].item() == pytest.approx(wanted_log_prob.item(), rel=1e-6)
    for term, *wanted in zip(terms, *(part_terms for _, part_terms, _ in parts)):
        assert term == pytest.approx(sum(wanted), rel=1e-6)
    for gradient, *wanted in zip(gradients, *(part_gradients for _, _, part_gradients in parts)):
        assert oracles.relative_error(gradient, sum(wanted)) < 1e-6


@pytest.mark.parametrize("program", ["forward", "joint"])
@pytest.mark.parametrize("given_images", [False, True])
def test_sites_and_shapes(program, given_images):
    model, n_objects, T = make_model(), torch.tensor([2, 1, 3]), 4
    images = make_images(3, T) if given_images else None
    run = getattr(model, program)
    trace = poutine.trace(run).get_trace(images, n_objects, None if given_images else T)
    wanted = {"a": (3, 3, T, 2), "v": (3, T, H, W)}
    if program == "joint":
        wanted |= {"z": (3, 3), "h": (3, 3, T, 4)}
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n != "sequences"}
    assert {name: tuple(site["value"].shape) for name, site in sites.items()} == wanted
    assert [name for name, site in sites.items() if site["is_observed"]] == (["v"] if given_images else [])
    trace.compute_log_prob()
    assert all(site["log_prob"].shape == (3,) for site in sites.values())
    assert trace.nodes["_RETURN"]["value"] is trace.nodes["v"]["value"]
    assert set(trace.nodes["v"]["value"].unique().tolist()) == {0.0, 1.0}
    if given_images:
        assert torch.equal(trace.nodes["v"]["value"], images.float())


@pytest.mark.parametrize("T", [1, 3])
def test_joint_draws_have_the_joint_log_density_of_the_objects_that_are_there(T):
    model, n_objects = make_model(), torch.tensor([2, 1])
    trace = poutine.trace(model.joint).get_trace(None, n_objects, T)
    trace.compute_log_prob()
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (x.detach().numpy() for x in model.dynamics.lgssm())
    for i, n in enumerate([2, 1]):
        wanted = 0.0
        for j in range(n):
            z, h, a = (trace.nodes[name]["value"][i, j].detach().numpy() for name in "zha")
            mean, cov = oracles.joint_moments((A, B, u, Sigma_H, Sigma_A, mu[z], Sigma[z]), T)
            wanted += math.log(0.5) + oracles.log_normal([*h.ravel(), *a.ravel()], mean, cov)
        total = sum(trace.nodes[name]["log_prob"][i].item() for name in "zha")
        assert total == pytest.approx(wanted, rel=1e-8)


GOOD = make_images(2, 3)


@pytest.mark.parametrize("program", ["forward", "joint"])
@pytest.mark.parametrize(
    "images, n_objects, n_frames, message",
    [
        (GOOD[0], [1, 1], None, r"wanted \(B, T, H, W\)"),
        (GOOD[:, :0], [1, 1], None, r"wanted \(B, T, H, W\)"),
        (GOOD, [1], None, "n_objects has length 1 for 2 sequences"),
        (GOOD, [[1], [1]], None, "wanted integers, one per sequence"),
        (GOOD, [1.0, 2.0], None, "type torch.float32; wanted integers"),
        (GOOD, [1, 0], None, "has the value 0; every sequence needs at least 1 object"),
        (GOOD.mT, [1, 1], None, f"images are {W} x {H} pixels; this model was made for {H} x {W}"),
        (GOOD, [1, 1], 4, "n_frames is 4 but the images have 3"),
        (None, [1, 1], None, "n_frames is None; without images give the number of frames"),
        (None, [1, 1], 0, "n_frames is 0; without images give the number of frames"),
    ],
)
def test_wrong_inputs_raise(program, images, n_objects, n_frames, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_model(), program)(images, torch.tensor(n_objects), n_frames)


@pytest.mark.parametrize("n_objects", [[0, 0], [0, 1], [1.5, 2.0], [[1], [2]]], ids=str)
def test_wrong_numbers_of_objects_raise_without_images_too(n_objects):
    with pytest.raises(ValueError, match="n_objects has"):
        make_model()(None, torch.tensor(n_objects), 3)


def test_weights_start_with_variance_one_over_the_root_of_their_number():
    torch.manual_seed(0)
    renderer = Renderer(16, 16, 128)
    for weight in (renderer.theta_x0, renderer.to_alpha.weight, renderer.to_x.weight, renderer.to_v.weight):
        d = weight.numel()
        variance = 1 / math.sqrt(d)
        assert abs(weight.mean().item()) < 6 * math.sqrt(variance / d)  # sigma
        assert abs(weight.var().item() - variance) < 6 * variance * math.sqrt(2 / d)  # sigma
    for layer in (renderer.to_alpha, renderer.to_x, renderer.to_v):
        assert not layer.bias.any()


def test_background_logit_is_the_starting_value_of_the_pixels_bias():
    assert (Renderer(4, 4, 8, background_logit=-4.0).to_v.bias == -4).all()


def test_init_as_paper_of_a_layer_without_bias():
    torch.manual_seed(0)
    layer = torch.nn.Linear(100, 100, bias=False)
    init_as_paper(layer)
    assert abs(layer.weight.var().item() - 0.01) < 6 * 0.01 * math.sqrt(2 / 10_000)  # sigma
