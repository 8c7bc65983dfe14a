"""What a user of Pyro may ask of a Pyro program: named parameters, other objectives, inspection, conditioning."""

import copy
import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroSample

from pyro_pixels import (
    AnnealedELBO,
    Dynamics,
    PixelModel,
    Renderer,
    generate,
    infer,
    load_pretrained,
    simulate,
    smooth,
)
from pyro_pixels.evaluation.pixel_map import drawn_centroids
from pyro_pixels.guides import Guide, JointGuide, refine
from pyro_pixels.guides.untangling import resample_labels
from pyro_pixels.model.likelihoods import PixelLikelihood
from pyro_pixels.queries import log_evidence, reconstruct, render


@pytest.fixture(scope="module")
def run():
    return load_pretrained()


@pytest.fixture(scope="module")
def data(run):
    return simulate(run.config.data, 3, seed=0)


def svi(run, optim):
    model, guide = copy.deepcopy((run.model, run.guide))
    return SVI(model, guide, optim, loss=AnnealedELBO())


def test_pyros_optimisers_know_every_parameter_by_its_name(run, data):
    first = pyro.optim.Adam({"lr": 1e-4})
    kept = svi(run, first)
    kept.step(data.images, data.n_objects)
    state = first.get_state()
    assert len(state) == len(first.optim_objs) == 22
    names = {name for name, _ in AnnealedELBO()(run.model, run.guide).named_parameters()}
    assert set(state) == names  # those of `Schedule` and of its learning rates

    again = pyro.optim.Adam({"lr": 1e-4})
    again.set_state(state)
    svi(run, again).step(data.images, data.n_objects)
    assert not again._state_waiting_to_be_consumed
    steps = [x["state"][0]["step"] for x in again.get_state().values()]
    assert all(float(step) == 2 for step in steps)


def test_learning_rates_by_name(run, data):
    rates = {}

    def options(name):
        rates[name] = 1e-3 if "dynamics" in name else 1e-4
        return {"lr": rates[name]}

    trained = svi(run, pyro.optim.Adam(options))
    before = copy.deepcopy(dict(trained.model.named_parameters()))
    trained.step(data.images, data.n_objects)
    assert {name.split(".")[1] for name, rate in rates.items() if rate == 1e-3} == {"dynamics"}
    moved = {name: float((p - before[name]).abs().max()) for name, p in trained.model.named_parameters()}
    assert moved["dynamics.mu"] == pytest.approx(1e-3, rel=0.01)  # Adam's first step
    assert moved["renderer.to_v.bias"] == pytest.approx(1e-4, rel=0.01)


def test_names_keep_no_parameter_alive(run, data):
    pyro.clear_param_store()
    trained = svi(run, pyro.optim.Adam({"lr": 1e-4}))
    trained.step(data.images, data.n_objects)
    known = pyro.get_param_store()._param_to_name
    assert len(known) == 22
    assert not list(pyro.get_param_store().keys())  # no value is shared
    del trained
    gc.collect()
    assert not known


def test_the_objective_with_enumeration_is_the_same_bound(run, data):
    values = []
    for elbo in (Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is nothing to enumerate
            values.append(float(elbo(run.model, run.guide)(data.images, data.n_objects).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_pyro_sees_the_structure_of_the_model(run, data):
    found = get_model_relations(run.model, (data.images, data.n_objects))
    assert found["sample_sample"] == {"a": [], "v": ["a"]}
    assert found["observed"] == ["v"]
    assert found["plate_sample"] == {"sequences": ["a", "v"]}
    assert set(found["param_constraint"].values()) == {"Real()"}
    pytest.importorskip("graphviz")
    assert "sequences" in pyro.render_model(run.model, model_args=(data.images, data.n_objects)).source


def test_what_is_not_supported_is_said_in_one_line(run, data):
    def first_line(error):
        return str(error.value).splitlines()[0]

    with pytest.raises(ValueError) as error:
        JitTrace_ELBO(ignore_jit_warnings=True)(run.model, run.guide)(data.images, data.n_objects)
    assert first_line(error) == "torch.jit is not supported; use Trace_ELBO instead of JitTrace_ELBO"
    with pytest.raises(ValueError) as error, torch.autocast("cpu", dtype=torch.bfloat16):
        infer(run.guide, data.images, data.n_objects)
    assert first_line(error).startswith("torch.autocast is on, but exact inference")
    with pytest.raises(ValueError, match=r"weights are torch\.bfloat16; wanted float32 or float64"):
        infer(copy.deepcopy(run.guide).bfloat16(), data.images, data.n_objects)
    with pytest.raises(ValueError, match=r"model's weights are torch\.float16; wanted float32"):
        copy.deepcopy(run.model).half()(data.images, data.n_objects)


@pytest.mark.parametrize("question", ["forecast", "evidence", "states", "reconstruct", "render", "pixel map"])
def test_queries_refuse_half_precision(run, data, question):
    model, guide = copy.deepcopy((run.model, run.guide))  # with the same dynamics
    model.bfloat16()
    ask = {
        "forecast": lambda: generate(model, guide, data.images[:, :5], data.n_objects, n_frames=9),
        "evidence": lambda: log_evidence(model, guide, data.images, data.n_objects, n_samples=2),
        "states": lambda: smooth(model.dynamics, torch.zeros(3, 3, 30, 2)),
        "reconstruct": lambda: reconstruct(model, run.guide, data.images, data.n_objects),
        "render": lambda: render(model, torch.zeros(3, 3, 30, 2), data.n_objects),
        "pixel map": lambda: drawn_centroids(model, torch.zeros(4, 2)),
    }
    with pytest.raises(ValueError, match=r"are torch\.bfloat16; wanted float32 or float64"):
        ask[question]()
    if question in ("reconstruct", "render", "pixel map"):
        model.float()
        with pytest.raises(ValueError, match=r"torch\.autocast is on"), torch.autocast("cpu", dtype=torch.bfloat16):
            ask[question]()


def test_half_precision_images_are_converted_by_every_query(run, data):
    """They are exact for binary images, unlike half precision weights."""
    half = data.images.half()
    for ask in (
        lambda v: infer(run.guide, v, data.n_objects).mean,
        lambda v: reconstruct(run.model, run.guide, v, data.n_objects),
        lambda v: generate(run.model, run.guide, v[:, :5], data.n_objects, n_frames=9).images,
    ):
        found = ask(half)
        assert found.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(found, ask(data.images))


def test_distributions_of_torch_are_named_in_training(data):
    class OfTorch(Guide):
        def encode(self, images, n_objects):
            shape = (len(images), int(n_objects.max()), images.shape[1], 2)
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(shape), 1.0), 2)

    with pytest.raises(ValueError, match=r"Independent is a distribution of torch; wanted one of pyro\.distributions"):
        OfTorch()(data.images, data.n_objects)


@pytest.mark.parametrize("handler", ["substitute", "lift"])
def test_handlers_that_would_replace_parameters_without_effect_are_refused(run, data, handler):
    name = "model.dynamics.u"
    prior = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    changed = {
        "substitute": lambda: poutine.substitute(run.model, data={name: torch.ones(4)}),
        "lift": lambda: poutine.lift(run.model, prior={name: prior}),
    }[handler]()
    with pytest.raises(ValueError, match=f"replaces '{name}', which would have no effect; copy the model"):
        changed(data.images, data.n_objects)


def test_positions_of_absent_objects_may_be_nan_where_they_are_given(run, data):
    """As those of `simulate` are: values and gradients are the same as with any number in their place."""
    a = (data.positions - 15.5) / 15.5
    assert a.isnan().any()
    z, h = torch.zeros(3, 3, dtype=torch.long), torch.randn(3, 3, 30, 4, dtype=torch.float64)
    absent = torch.arange(3) >= data.n_objects[:, None]
    gradients = {}
    for fill in (torch.nan, 0.5):
        given = {"a": a.nan_to_num(nan=fill), "h": h.masked_fill(absent[..., None, None], fill), "z": z}
        gradients[fill] = []
        for program, sites in (
            (run.model, "a"), (run.model.joint, "a"), (run.model.joint, "ahz"), (run.guide, "a"),
            (JointGuide(run.guide, run.model.dynamics), "ahz"),
        ):  # fmt: skip
            parameters = [*run.model.parameters(), *run.guide.parameters()]
            trace = poutine.trace(poutine.condition(program, {site: given[site] for site in sites}))
            torch.manual_seed(0)
            log_p = trace.get_trace(data.images, data.n_objects).log_prob_sum()
            gradients[fill].append([log_p, *torch.autograd.grad(log_p, parameters, allow_unused=True)])
    for with_nan, without in zip(*gradients.values()):
        for x, y in zip(with_nan, without):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)
            assert x is None or x.isfinite().all()


def test_dynamics_with_priors_are_drawn_once_for_all_sequences(data):
    dynamics = PyroModule[Dynamics]()
    dynamics.u = PyroSample(dist.Normal(torch.zeros(4), 0.1).to_event(1))
    model = PyroModule[PixelModel](dynamics, Renderer(32, 32, state_size=8))
    trace = poutine.trace(model).get_trace(data.images, data.n_objects)
    plain = PixelModel(Dynamics(), model.renderer)
    with torch.no_grad():
        for name, p in plain.dynamics.named_parameters():
            p.copy_(trace.nodes["dynamics.u"]["value"] if name == "u" else getattr(dynamics, name))
    a = trace.nodes["a"]
    wanted = poutine.trace(poutine.condition(plain, {"a": a["value"]})).get_trace(data.images, data.n_objects)
    wanted.compute_log_prob()
    trace.compute_log_prob()
    pyro.clear_param_store()  # to which a PyroModule adds its parameters
    torch.testing.assert_close(a["log_prob_sum"], wanted.nodes["a"]["log_prob_sum"])


@pytest.mark.parametrize("handler", [poutine.condition, poutine.do])
@pytest.mark.parametrize("site, shape", [("a", s) for s in ((3, 1, 30, 2), (1, 3, 30, 2), (3, 3, 30, 1), (30, 2))])
def test_values_that_would_broadcast_over_objects_are_refused(run, data, handler, site, shape):
    with pytest.raises(ValueError, match=r"site 'a' was given a value of shape .*; wanted \(3, 3, 30, 2\)"):
        handler(run.model, {site: torch.zeros(shape)})(data.images, data.n_objects)
    handler(run.model, {"a": torch.zeros(3, 3, 30, 2)})(data.images, data.n_objects)


@pytest.mark.parametrize(
    "site, shape", [("z", (3, 1)), ("h", (3, 1, 30, 4)), ("a", (3, 1, 30, 2)), ("v", (1, 30, 32, 32))]
)
def test_the_joint_model_refuses_them_too(run, data, site, shape):
    value = torch.zeros(shape, dtype=torch.long if site == "z" else torch.float64)
    with pytest.raises(ValueError, match=f"site '{site}' was given a value of shape"):
        poutine.condition(run.model.joint, {site: value})(None, data.n_objects, 30)


def _tracks(n_objects):
    return torch.zeros(len(n_objects), 3, 30, 2)


@pytest.mark.parametrize("scale, advice", [(255, "divide them by 255"), (-1.0, "scale them")])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, g, v, n: SVI(m, g, pyro.optim.Adam({}), Trace_ELBO()).step(v, n),
        lambda m, g, v, n: AnnealedELBO()(m, g)(v, n),
        lambda m, g, v, n: poutine.trace(m).get_trace(v, n),
        lambda m, g, v, n: poutine.trace(m.joint).get_trace(v, n),
        lambda m, g, v, n: g.q(v, n),
        lambda m, g, v, n: g.look_at(v, n),
        lambda m, g, v, n: JointGuide(g, m.dynamics)(
            torch.where(torch.arange(30)[:, None, None] == 3, torch.nan, v), n
        ),
        lambda m, g, v, n: refine(m, _tracks(n), n, v, n_steps=1),
        lambda m, g, v, n: resample_labels(m, _tracks(n), n, v),
    ],
    ids=["SVI", "bound", "model", "joint", "q", "look_at", "joint guide", "refine", "resample_labels"],
)
def test_pixels_outside_the_unit_interval_are_refused(run, data, use, scale, advice):
    with pytest.raises(
        ValueError, match=rf"images have values from .*; wanted 0 for black to 1 for white, so {advice}"
    ):
        use(*copy.deepcopy((run.model, run.guide)), scale * data.images, data.n_objects)


class _AnyNumbers(PixelLikelihood):
    def forward(self, logits):
        return dist.Normal(logits, 1.0).to_event(3)


def test_a_likelihood_of_other_images_takes_them(run, data):
    model = PixelModel(run.model.dynamics, run.model.renderer, _AnyNumbers())
    v = 3.0 * data.images - 1.0
    site = poutine.trace(model).get_trace(v, data.n_objects).nodes["v"]
    torch.testing.assert_close(site["value"], v)


@pytest.mark.parametrize("part", [(slice(1), slice(None)), (slice(None), slice(1))], ids=["B", "T"])
def test_images_of_other_tracks_are_refused(run, data, part):
    with pytest.raises(ValueError, match=r"images have shape .*; wanted \(B, T, H, W\) with B, T = 3, 30"):
        resample_labels(run.model, _tracks(data.n_objects), data.n_objects, data.images[part])
