"""Likelihoods of the pixels: they are normalised, the default is Eq (2)'s to the bit, and each can be trained."""

import dataclasses
import math
import re

import pyro.distributions as dist
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from pyro import poutine
from pyro.infer import Predictive
from torch.distributions.transforms import ReshapeTransform, SigmoidTransform

from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.film import forecast_nll_per_frame
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.model.likelihoods import (
    LIKELIHOODS,
    BernoulliPixels,
    ContinuousBernoulliPixels,
    GaussianPixels,
    PixelLikelihood,
)
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.evidence import log_evidence
from pyro_pixels.queries.predict import reconstruct, render
from pyro_pixels.runs import build, load_run, save_config
from pyro_pixels.training.elbo import bound
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.drawing import Look

GREY = dataclasses.replace(SMALL, look=Look(brightness=(0.4, 0.9)))
LOGITS = torch.tensor([-9.0, -2.0, -1e-3, 0.0, 0.7, 3.0, 12.0], dtype=torch.float64)
EACH = {
    "bernoulli": BernoulliPixels,
    "continuous_bernoulli": ContinuousBernoulliPixels,
    "gaussian": GaussianPixels,
    "gaussian 0.02": lambda: GaussianPixels(0.02, learned=False),
}


def with_likelihood(likelihood):
    return PixelModel(make_model().dynamics, make_model().renderer, likelihood)


def test_the_default_is_equation_2(small_data):
    model, images, n_objects = make_model(), small_data.images, small_data.n_objects
    assert isinstance(model.likelihood, BernoulliPixels)
    assert not [name for name in model.state_dict() if "likelihood" in name]
    torch.manual_seed(0)
    trace = poutine.trace(model).get_trace(images, n_objects)
    trace.compute_log_prob()
    logits = model.renderer(trace.nodes["a"]["value"], torch.arange(3) < n_objects[:, None])
    v = dist.Bernoulli(logits=logits, validate_args=False).to_event(3).log_prob(images.to(logits.dtype))
    # torch writes the same log density with other operations: which last bit they round to depends on the processor
    torch.testing.assert_close(trace.nodes["v"]["log_prob"], v.to(torch.float64), rtol=1e-6, atol=0.0)
    a = trace.nodes["a"]["value"]
    assert torch.equal(render(model, a, n_objects), logits.sigmoid())


@pytest.mark.parametrize("logit", LOGITS[:5])
def test_bernoulli_sums_to_1_over_all_images(logit):
    logits = torch.stack([logit, -logit, logit + 1]).reshape(1, 1, 3)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double().reshape(8, 1, 1, 3)
    log_p = BernoulliPixels()(logits).log_prob(images)
    assert log_p.shape == (8,)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)
    mean = (log_p.exp()[:, None, None, None] * images).sum(0)
    torch.testing.assert_close(mean, BernoulliPixels().mean(logits), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in EACH if name != "bernoulli"])
@pytest.mark.parametrize("logit", LOGITS, ids=lambda x: f"{float(x):g}")
def test_densities_integrate_to_1_and_have_the_mean_they_say(name, logit):
    likelihood, logits = EACH[name]().double(), logit.reshape(1, 1, 1)
    low, high = (0.0, 1.0) if name == "continuous_bernoulli" else (-1.0, 2.0)
    v = torch.linspace(low, high, 40_001, dtype=torch.float64)
    p = likelihood(logits).log_prob(v.reshape(-1, 1, 1, 1)).exp()
    # the trapezoidal error is h^2 / 12 (p'(1) - p'(0)), at most 1e-10 12^3; near logit 0 torch has a Taylor series
    torch.testing.assert_close(torch.trapezoid(p, v), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.trapezoid(p * v, v), likelihood.mean(logits).squeeze(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_gradients(name):
    likelihood = EACH[name]().double()
    torch.manual_seed(0)
    logits, v = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 2).double()
    parameters = list(likelihood.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: likelihood(x).log_prob(v), (logits, *parameters))
    likelihood.float()
    extreme = torch.tensor([-80.0, -20.0, 0.0, 20.0, 80.0], requires_grad=True)
    for value in (0.0, 1.0):
        log_p = likelihood(extreme.reshape(1, 1, 5)).log_prob(torch.full((1, 1, 5), value))
        assert log_p.isfinite()
        assert torch.autograd.grad(log_p, extreme)[0].isfinite().all()


@pytest.mark.parametrize("name", EACH)
def test_predictive_draws_have_the_mean_that_queries_show(name):
    model, n_objects = with_likelihood(EACH[name]()), torch.tensor([1, 3])
    torch.manual_seed(0)
    drawn = Predictive(model, num_samples=400, return_sites=("a", "v"))(None, n_objects, 2)
    v, mean = drawn["v"], render(model, drawn["a"], n_objects)
    assert v.shape == mean.shape == (400, 2, 2, 12, 12)
    if "gaussian" not in name:
        assert ((v >= 0) & (v <= 1)).all()
    assert (set(v.unique().tolist()) == {0.0, 1.0}) == (name == "bernoulli")
    difference = (v - mean).double()
    assert abs(difference.mean()) < 6 * difference.std() / difference.numel() ** 0.5  # 6 sigma
    assert ((mean >= 0) & (mean <= 1)).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_runs_on_grey_images_are_trained_saved_and_loaded(tmp_path, name):
    data = simulate(GREY, 12, seed=0)
    schedule = Schedule(steps=3, batch_size=4, evaluate_every=3)
    config = RunConfig(guide="structured", state_size=8, data=GREY, likelihood=name, schedule=schedule)
    run = build(config)
    before = [p.detach().clone() for p in run.model.likelihood.parameters()]
    save_config(tmp_path, config)
    fit(run.model, run.guide, data, schedule, run_dir=tmp_path, progress=False)
    again = load_run(tmp_path)
    assert type(again.model.likelihood) is type(run.model.likelihood)
    wanted, found = (bound(r.model, r.guide, data).bound for r in (run, again))
    assert torch.equal(wanted, found)
    assert all(not torch.equal(p, old) for p, old in zip(again.model.likelihood.parameters(), before))
    images = reconstruct(again.model, again.guide, data.images, data.n_objects)
    assert ((images >= 0) & (images <= 1)).all()


def test_zero_nats_of_a_density_mean_nothing_to_the_health_check(small_data):
    for likelihood in (make() for make in EACH.values()):
        measures = check_health(with_likelihood(likelihood), make_guide(), small_data).measures
        assert ("bound_ratio" in measures) == isinstance(likelihood, BernoulliPixels)
        assert "path_residual" in measures


def test_a_likelihood_of_ones_own():
    class Inverted(PixelLikelihood):
        def forward(self, logits):
            return dist.Bernoulli(logits=-logits).to_event(3)

        def mean(self, logits):
            return (-logits).sigmoid()

    plain, model = with_likelihood(None), with_likelihood(Inverted())
    a, n_objects = torch.zeros(1, 1, 2, 2), torch.tensor([1])
    torch.testing.assert_close(render(model, a, n_objects), 1 - render(plain, a, n_objects))


class LogitNormal(PixelLikelihood):
    """A transformed distribution, transformed after or before pixels become images."""

    def __init__(self, *, after=True):
        super().__init__()
        self.after = after

    def forward(self, logits):
        pixels, sigmoid = dist.Normal(logits, torch.full_like(logits, 0.5)), [SigmoidTransform()]
        if self.after:
            return dist.TransformedDistribution(pixels.to_event(3), sigmoid)
        return dist.TransformedDistribution(pixels, sigmoid).to_event(3)


class Joint(PixelLikelihood):
    """Pixels of a frame that are not independent."""

    def forward(self, logits):
        flat = logits.flatten(-2)
        rows = dist.LowRankMultivariateNormal(flat, torch.ones(*flat.shape, 1), torch.ones_like(flat))
        back = ReshapeTransform(flat.shape[-1:], logits.shape[-2:])
        return dist.TransformedDistribution(rows, [back]).to_event(1)


@pytest.mark.parametrize("missing", [False, True])
def test_pixels_that_are_transformed_are_trained_on_and_evaluated(small_data, missing):
    """Before or after they become images: the same numbers."""
    images = 0.05 + 0.9 * small_data.images.float()
    if missing:
        images[::2, 4:7] = torch.nan
    data, found = ImageSequences(images, small_data.n_objects), []
    model, guide = with_likelihood(LogitNormal()), make_guide()
    result = fit(model, guide, data, Schedule(steps=3, batch_size=6), progress=False)
    assert math.isfinite(result.metrics["bound_per_frame"])
    for after in (True, False):
        model.likelihood.after = after
        torch.manual_seed(0)
        loss = evaluate(model, guide, data)["all"]["forecast_nll_per_frame_nats"]
        found.append([loss, float(bound(model, guide, data).bound.mean())])
    assert all(map(math.isfinite, found[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_pixels_that_are_not_independent_need_whole_films_and_have_no_forecast_loss(small_data):
    model, guide = with_likelihood(Joint()), make_guide()
    data = ImageSequences(0.9 * small_data.images.float(), small_data.n_objects)
    schedule = Schedule(steps=3, batch_size=12)
    fit(model, guide, data, schedule, progress=False)
    with pytest.raises(ValueError, match=r"Independent over images, which cannot be split into pixels.*to_event\(3\)"):
        evaluate(model, guide, data)
    data.images[0, 3] = torch.nan
    with pytest.raises(ValueError, match="cannot be split into pixels"):
        fit(model, guide, data, schedule, progress=False)


class Wrong(PixelLikelihood):
    """Returns what it is made with."""

    def __init__(self, make, mean=torch.sigmoid):
        super().__init__()
        self.make, self.expected = make, mean

    def forward(self, logits):
        return self.make(logits)

    def mean(self, logits):
        return self.expected(logits)


def of_pixels(logits):
    return dist.Normal(logits.sigmoid(), 0.1, validate_args=False)


def one_for_all(logits):
    return dist.Normal(logits.sigmoid().mean((0, 1)), 0.1).to_event(2)


WRONG = {
    "pixels": (of_pixels, r"a distribution of batch shape \(\d+, 11, 12, 12\) and event shape \(\)"),
    "frames": (lambda x: of_pixels(x).to_event(2), r"a .* batch shape \(\d+, 11\) and event shape \(12, 12\)"),
    "sequences": (lambda x: of_pixels(x).to_event(4), r"a .* batch shape \(\) and event shape \(\d+, 11, 12, 12\)"),
    "one for all": (one_for_all, r"a distribution of batch shape \(\) and event shape \(12, 12\)"),
    "torch": (
        lambda x: torch.distributions.Independent(torch.distributions.Normal(x, 1.0), 3),
        r"a torch\.distributions\.independent\.Independent; wanted one of pyro\.distributions",
    ),
    "a tensor": (torch.sigmoid, r"a torch\.Tensor; wanted one of pyro\.distributions"),
    "nothing": (lambda x: None, r"a NoneType; wanted one of pyro\.distributions"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("grey", [False, True])
def test_a_likelihood_with_a_distribution_of_another_shape_is_named_in_one_line(small_data, name, grey):
    make, words = WRONG[name]
    model, guide = with_likelihood(Wrong(make)), make_guide()
    images = 0.5 * small_data.images.float() if grey else small_data.images
    data = ImageSequences(images, small_data.n_objects)
    for use in (
        lambda: fit(model, guide, data, Schedule(steps=1, batch_size=6), progress=False),
        lambda: log_evidence(model, guide, data.images, data.n_objects, n_samples=2),
        lambda: forecast_nll_per_frame(model, torch.zeros(2, len(images), 3, 11, 2), images, data.n_objects),
        lambda: model(None, [1, 2, 3, 1, 2, 3], 11),
    ):
        with pytest.raises(ValueError, match=f"the likelihood Wrong returned {words}") as error:
            use()
        line = str(error.value).splitlines()[0]  # Pyro adds shapes of sites in further lines
        assert line.endswith(("into its event", "wanted one of pyro.distributions"))


@pytest.mark.parametrize("shape", [(), (12, 12)])
def test_a_likelihood_with_a_mean_of_another_shape_is_named_in_one_line(shape):
    model = with_likelihood(Wrong(BernoulliPixels(), lambda logits: torch.zeros(shape)))
    with pytest.raises(ValueError, match=rf"the mean of the likelihood Wrong is .* {re.escape(str(shape))}; wanted"):
        render(model, torch.zeros(1, 1, 11, 2), 1)


def test_shapes_of_likelihoods_are_checked_without_reading_values():
    """On the meta device, where there are no values."""
    logits = torch.empty(2, 3, 4, 5, device="meta")
    assert GaussianPixels().to("meta")(logits).event_shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"wanted \(2,\) and \(T, H, W\) = \(3, 4, 5\)"):
        Wrong(of_pixels)(logits)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"std is 0\.0; wanted a number above 0"):
        GaussianPixels(0.0)
    with pytest.raises(ValueError, match="there is no likelihood 'poisson'; wanted one of"):
        build(RunConfig(likelihood="poisson"))
    assert not list(GaussianPixels(0.2, learned=False).parameters())
    assert "log_std" in GaussianPixels(0.2, learned=False).state_dict()
