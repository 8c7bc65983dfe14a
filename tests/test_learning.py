"""The bound, the schedule, and a training loop that can be killed."""

import json
import math
import os
import pickle
import signal
import threading
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.presets import PRESETS
from pyro_pixels.run_figures import draw_training
from pyro_pixels.training.checkpoints import load_checkpoint, read_lines, save_checkpoint
from pyro_pixels.training.distillation import GivenTracks
from pyro_pixels.training.elbo import AnnealedELBO, bound
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.svi import Training

QUICK = Schedule(steps=6, batch_size=4, learn_from={}, anneal_from=2, anneal_steps=2, kl_start=10.0, evaluate_every=2)


def batch(data):
    return data.images.float(), data.n_objects


def double():
    """A model and a guide in float64, in which the identities below hold to rounding."""
    return make_model().double(), make_guide().double()


def loss_at(weight, data):
    torch.manual_seed(0)
    with torch.no_grad():
        return float(AnnealedELBO(weight)(*double())(*batch(data)))


def test_loss_is_linear_in_the_kl_weight(small_data):
    one, two, five = (loss_at(w, small_data) for w in (1.0, 2.0, 5.0))
    assert five - one == pytest.approx(4 * (two - one), rel=1e-10)
    elbo = AnnealedELBO(3.0)
    torch.manual_seed(0)
    elbo(*double())(*batch(small_data))
    assert two - one == pytest.approx(float(elbo.terms.kl.sum()), rel=1e-10)
    assert one == pytest.approx(-float(elbo.terms.bound.sum()), rel=1e-12)


def test_loss_is_pyros_own_at_weight_one(small_data):
    torch.manual_seed(0)
    with torch.no_grad():
        wanted = float(Trace_ELBO()(*double())(*batch(small_data)))
    assert loss_at(1.0, small_data) == pytest.approx(wanted, rel=1e-12)


def test_a_tensor_weight_is_the_same(small_data):
    assert loss_at(torch.tensor(7.0), small_data) == pytest.approx(loss_at(7.0, small_data), rel=1e-6)


def test_loss_is_that_of_the_traces(small_data):
    model, guide = double()
    torch.manual_seed(0)
    guide_trace = pyro.poutine.trace(guide).get_trace(*batch(small_data))
    model_trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(*batch(small_data))
    kl = guide_trace.log_prob_sum() - model_trace.log_prob_sum(lambda name, site: name == "a")
    wanted = 4.0 * kl - model_trace.log_prob_sum(lambda name, site: name == "v")
    assert loss_at(4.0, small_data) == pytest.approx(float(wanted.detach()), rel=1e-12)


class TwoSites(Guide):
    """A guide with an auxiliary site of its own, as Pyro's autoguides have."""

    def encode(self, images, n_objects):
        raise AssertionError("not used")

    def forward(self, images, n_objects, n_frames=None):
        with pyro.plate("sequences", len(images), dim=-1):
            shape = (3, images.shape[1], 2)
            zeros = torch.zeros(shape, dtype=torch.float64)
            b = pyro.sample("b", dist.Normal(zeros, 1.0).to_event(3), infer={"is_auxiliary": True})
            return pyro.sample("a", dist.Delta(2 * b, log_density=torch.tensor(-3.0), event_dim=3))


def test_every_latent_site_of_a_guide_is_weighed(small_data):
    losses = []
    for weight in (1.0, 2.0, 5.0):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(AnnealedELBO(weight)(make_model().double(), TwoSites())(*batch(small_data))))
    assert losses[2] - losses[0] == pytest.approx(4 * (losses[1] - losses[0]), rel=1e-10)


def test_a_guide_without_gradients_is_refused(small_data):
    class Counts(Guide):
        def encode(self, images, n_objects):
            return dist.Poisson(torch.ones(len(images), 3, images.shape[1], 2)).to_event(2)

    with pytest.raises(ValueError, match="rsample"):
        AnnealedELBO()(make_model(), Counts())(*batch(small_data))


def test_stock_svi_lowers_the_same_loss(small_data):
    model, guide = make_model(), make_guide()
    before = -float(bound(model, guide, small_data).bound.sum())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), AnnealedELBO())
    torch.manual_seed(0)
    for _ in range(30):
        svi.step(*batch(small_data))
    pyro.clear_param_store()
    assert -float(bound(model, guide, small_data).bound.sum()) < 0.8 * before


def test_fit_raises_the_bound(small_data):
    model, guide = make_model(), make_guide()
    before = bound(model, guide, small_data).bound.mean()
    fit(model, guide, small_data, Schedule(steps=60, learning_rate=0.01, learn_from={}), progress=False)
    assert bound(model, guide, small_data).bound.mean() > 0.8 * before


def test_a_linear_gaussian_toy_reaches_its_evidence():
    """v = a + noise: with the right form of q the bound must climb to log p(v), here known exactly."""
    y, sd = torch.tensor([[0.7, -0.4]]), 0.5
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model():
        with pyro.plate("data", 1):
            a = pyro.sample("a", prior.expand([1]))
            pyro.sample("v", dist.Normal(a, sd).to_event(1), obs=y)

    class Q(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_sd = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.zeros(1, 2))

        def forward(self):
            with pyro.plate("data", 1):
                pyro.sample("a", dist.Normal(self.mean, self.log_sd.exp()).to_event(1))

    guide = Q()
    loss = AnnealedELBO()(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
    torch.manual_seed(0)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.03 if step < 300 else 0.001
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    evidence = float(dist.Normal(0.0, (1 + sd**2) ** 0.5).log_prob(y).sum())
    with torch.no_grad():
        final = torch.stack([-loss() for _ in range(400)])
    assert float(final.mean()) <= evidence + 6 * float(final.std()) / 20
    assert float(final.mean()) == pytest.approx(evidence, abs=0.02)


def test_schedule_of_the_paper():
    paper = Schedule()
    assert (paper.steps, paper.batch_size, paper.learning_rate) == (200_000, 20, 1e-3)
    assert [paper.kl_weight(s) for s in (0, 9_999, 10_000)] == [1.0, 1.0, 100.0]
    assert paper.kl_weight(15_000) == pytest.approx(10.0)
    assert paper.kl_weight(20_000) == paper.kl_weight(150_000) == 1.0
    assert paper.learning_rate_at(199_999) == 1e-3


def test_frozen_parts_stay_and_flags_are_put_back(small_data):
    model, guide = make_model(), make_guide()
    start = {name: p.clone() for name, p in model.dynamics.named_parameters()}
    schedule = Schedule(steps=4, batch_size=4, learn_from={"model.dynamics": 99, "model.dynamics.u": 2})
    fit(model, guide, small_data, schedule, progress=False)
    moved = {name for name, p in model.dynamics.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"u"}
    assert all(p.requires_grad for p in model.parameters())


def test_first_steps_on_single_objects(small_data):
    seen = []
    guide = make_guide()
    encode = guide.encode
    guide.encode = lambda images, n: seen.append(n.tolist()) or encode(images, n)
    fit(make_model(), guide, small_data, Schedule(steps=3, batch_size=4, single_object_steps=2), progress=False)
    assert {n for batch in seen[:2] for n in batch} == {1}
    assert len(seen[2]) == 4
    with pytest.raises(ValueError, match="N = 1"):
        fit(make_model(), guide, small_data[small_data.n_objects > 1], Schedule(single_object_steps=2))


def test_the_same_seed_gives_the_same_run_and_leaves_the_callers_random_state(small_data):
    results = []
    for _ in range(2):
        model, guide = make_model(), make_guide()
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        fit(model, guide, small_data, QUICK, seed=3, progress=False)
        torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def lines_of(folder):
    keep = ("step", "bound_per_frame", "kl_per_frame", "kl_weight", "validation_bound_per_frame")
    return [
        {k: v for k, v in json.loads(x).items() if k in keep}
        for x in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stopped_and_resumed_run_is_an_uninterrupted_one(small_data, tmp_path, stop_at):
    """Weights, optimiser and metrics, bit for bit, also where the stop falls between evaluations."""
    whole = make_model(), make_guide()
    fit(*whole, small_data, QUICK, seed=1, run_dir=tmp_path / "whole", validation=small_data[:3], progress=False)

    class StopAfter(Guide):
        """Sends this process SIGTERM in the middle of a step."""

        def __init__(self, guide):
            super().__init__()
            self.guide, self.steps = guide, 0

        def encode(self, images, n_objects):
            if self.training and torch.is_grad_enabled():
                self.steps += 1
                if self.steps == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
            return self.guide.encode(images, n_objects)

        def state_dict(self, *args, **kwargs):
            return self.guide.state_dict(*args, **kwargs)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = {"seed": 1, "run_dir": tmp_path / "parts", "validation": small_data[:3], "progress": False}
    first = fit(make_model(), StopAfter(make_guide()), small_data, QUICK, **options)
    assert first.interrupted
    assert first.step == stop_at
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    parts = make_model(seed=9), make_guide(seed=9)
    last = fit(*parts, small_data, QUICK, resume=True, **options)
    assert (last.step, last.interrupted) == (6, False)
    for a, b in zip(whole, parts):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    states = [load_checkpoint(tmp_path / x / "checkpoint.pt")["optimizer"]["state"] for x in ("whole", "parts")]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


class NotFiniteForFive(Guide):
    """Says nothing sensible of five sequences at once, as the validation ones are; the weights are finite."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def encode(self, images, n_objects):
        q_a = self.guide.encode(images, n_objects)
        return dist.Normal(q_a.mean * math.nan, 1.0, validate_args=False).to_event(2) if len(images) == 5 else q_a


def test_what_is_not_finite_is_null_in_the_metrics_which_are_resumed_and_drawn(small_data, tmp_path):
    """NaN and Infinity are no JSON. Older versions wrote them: such lines are read, and null when written again."""
    folder, model, guide = tmp_path / "r", make_model(), NotFiniteForFive(make_guide())
    options = {"seed": 1, "run_dir": folder, "validation": small_data[:5], "progress": False}
    fit(model, guide, small_data, replace(QUICK, steps=4), **options)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    old = [{**lines[0], "validation_kl_per_frame": -math.inf}, *lines[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line).replace("null", "NaN") + "\n" for line in old))
    (folder / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="no checksum"):
        result = fit(model, guide, small_data, QUICK, resume=True, **options)
    assert math.isnan(result.metrics["validation_bound_per_frame"])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(x, parse_constant=refuse) for x in text.splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["validation_bound_per_frame"] is None for line in lines)
    assert all(line["validation_kl_per_frame"] is None for line in lines)
    assert all(math.isfinite(line["bound_per_frame"]) for line in lines)
    assert all(math.isnan(line["validation_bound_per_frame"]) for line in read_lines(folder))
    again = fit(model, guide, small_data, QUICK, resume=True, **options)  # nothing is left to do
    assert math.isnan(again.metrics["validation_bound_per_frame"])
    assert (folder / "metrics.jsonl").read_text() == text
    draw_training(folder)
    assert (folder / "training.png").exists()


def hopeless():
    """A model that is certain that everything is white."""
    model = make_model(seed=3)
    with torch.no_grad():
        model.renderer.to_v.bias.fill_(20.0)
    return model


def test_the_best_of_several_starts_goes_on(small_data, tmp_path):
    """A start with a hopeless renderer loses; what goes on is the other one, as if it had been trained alone."""
    options = {"seed": 1, "validation": small_data[:3], "progress": False, "candidate_steps": 2}
    model, guide = hopeless(), make_guide(seed=3)
    result = fit(model, guide, small_data, QUICK, candidates=[(make_model(), make_guide())], **options)
    assert result.step == 6
    alone = make_model(), make_guide()
    fit(*alone, small_data, replace(QUICK, steps=2), seed=2, progress=False)  # candidates have seeds of their own
    chosen = hopeless(), make_guide(seed=3)
    fit(*chosen, small_data, replace(QUICK, steps=2), candidates=[(make_model(), make_guide())], **options)
    for a, b in zip(alone, chosen):
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())

    kept = make_model(), make_guide()
    fit(*kept, small_data, replace(QUICK, steps=2), candidates=[(hopeless(), make_guide(seed=3))], **options)
    first = make_model(), make_guide()
    fit(*first, small_data, replace(QUICK, steps=2), seed=1, progress=False)
    for a, b in zip(kept, first):
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_candidates_are_checked(small_data):
    with pytest.raises(ValueError, match="candidate_steps is 7; wanted between 1 and steps, 6"):
        fit(make_model(), make_guide(), small_data, QUICK, candidates=[(make_model(), make_guide())], candidate_steps=7)
    other = [(make_model(state_size=9), make_guide())]
    model, guide = make_model(), make_guide()
    with torch.no_grad():
        model.renderer.to_v.bias.fill_(20.0)
    with pytest.raises(ValueError, match="start 2 has another configuration"):
        fit(model, guide, small_data, QUICK, candidates=other, candidate_steps=1, progress=False)


@pytest.mark.parametrize("stop_at", [2, 3])
def test_starts_are_fitted_once_where_the_schedule_says(small_data, tmp_path, monkeypatch, stop_at):
    """Also where a run is stopped just before it, and resumed; the numbers are those of an uninterrupted run."""
    steps = []
    monkeypatch.setattr("pyro_pixels.training.svi.fit_starts", lambda dynamics, a, seed: steps.append(tuple(a.shape)))
    schedule = replace(QUICK, fit_starts_at=(3,))
    fit(make_model(), make_guide(), small_data, schedule, run_dir=tmp_path / "whole", progress=False)
    assert steps == [(int(small_data.n_objects.sum()), 11, 2)]
    fit(make_model(), make_guide(), small_data, replace(schedule, steps=stop_at), run_dir=tmp_path / "parts")
    fit(make_model(), make_guide(), small_data, schedule, run_dir=tmp_path / "parts", resume=True, progress=False)
    assert len(steps) == 2
    assert lines_of(tmp_path / "whole")[-1] == lines_of(tmp_path / "parts")[-1]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(small_data, tmp_path):
    model, guide = make_model(), make_guide()

    def poison(line):
        if line["step"] == 2:
            with torch.no_grad():
                model.dynamics.u.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match=r"not finite at step 4.*last good state"):
        fit(model, guide, small_data, QUICK, run_dir=tmp_path, progress=False, on_evaluation=poison)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] == 2
    assert all(bool(x.isfinite().all()) for part in ("model", "guide") for x in kept[part].values())
    with pytest.raises(FloatingPointError, match="no checkpoint"):
        fit(model, guide, small_data, QUICK, progress=False)


def test_training_in_another_thread_leaves_signals_alone(small_data):
    results = []
    work = threading.Thread(
        target=lambda: results.append(fit(make_model(), make_guide(), small_data, QUICK, progress=False))
    )
    work.start()
    work.join()
    assert results[0].step == 6


def test_resume_refusals(small_data, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        fit(make_model(), make_guide(), small_data, QUICK, run_dir=tmp_path, resume=True)
    fit(make_model(), make_guide(), small_data, QUICK, run_dir=tmp_path, progress=False)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a trained run"):
        fit(make_model(), make_guide(), small_data, QUICK, run_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another configuration"):
        fit(make_model(state_size=9), make_guide(), small_data, QUICK, run_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="seed"):
        fit(make_model(), make_guide(), small_data, QUICK, run_dir=tmp_path, resume=True, seed=4)
    with pytest.raises(ValueError, match="run_dir"):
        fit(make_model(), make_guide(), small_data, QUICK, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch should_not_exist",))


def test_checkpoints_run_no_code_and_are_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("good.pt", {"step": 1, "x": torch.arange(5)})
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"format": 1, "x": Malicious()}, "malicious.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"format": 99}, "other.pt")
    torch.save([1, 2], "list.pt")
    for name in ("missing", "cut", "empty", "text", "malicious", "raw", "other", "list"):
        with pytest.raises(ValueError):
            load_checkpoint(f"{name}.pt")
    assert not (tmp_path / "should_not_exist").exists()
    assert torch.equal(load_checkpoint("good.pt")["x"], torch.arange(5))


@pytest.mark.parametrize("one_n_per_batch", [False, True])
def test_an_epoch_uses_every_sequence_once(small_data, one_n_per_batch):
    """12 sequences, 4 of each N, in batches of 2: in 6 steps each once, in 12 twice; of one N each where asked."""
    seen = []
    guide = make_guide()
    encode = guide.encode
    guide.encode = lambda images, n: seen.append((images.sum((1, 2, 3)).tolist(), n.tolist())) or encode(images, n)
    schedule = Schedule(steps=12, batch_size=2, one_n_per_batch=one_n_per_batch)
    fit(make_model(), guide, small_data, schedule, progress=False)
    everything = sorted(small_data.images.sum((1, 2, 3)).tolist())
    assert sorted(x for sums, _ in seen[:6] for x in sums) == everything
    assert sorted(x for sums, _ in seen[6:] for x in sums) == everything
    assert seen[:6] != seen[6:]
    if one_n_per_batch:
        assert all(len(set(n)) == 1 for _, n in seen)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"kl_start": -1.0}, {"clip_norm": 0.0}]
)
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Schedule(**bad)


def test_two_models_stay_apart(small_data):
    a, b = (make_model(), make_guide()), (make_model(), make_guide())
    before = {k: v.clone() for k, v in b[0].state_dict().items()}
    fit(*a, small_data, QUICK, progress=False)
    assert all(torch.equal(before[k], v) for k, v in b[0].state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in a[0].state_dict().items())


def test_a_shortened_schedule_has_everything_at_the_same_share_of_its_steps():
    quick = PRESETS["quick"].schedule
    short = quick.shortened(200)
    assert (short.steps, short.decay_from, short.single_object_steps, short.fit_starts_at) == (200, 100, 40, (70, 140))
    assert set(short.learn_from.values()) == {140}
    assert [short.kl_weight(step) for step in (0, 139, 140)] == [quick.kl_weight(step) for step in (0, 699, 700)]
    assert short.learning_rate_at(150) == quick.learning_rate_at(750)
    assert quick.shortened(quick.steps) == quick
    later = replace(quick, own_tracks_from=500, random_order_from=700).shortened(200)
    assert (later.own_tracks_from, later.random_order_from) == (100, 140)


def test_fewer_steps_shorten_the_schedule_and_more_are_added_at_its_end():
    quick = PRESETS["quick"].schedule
    assert quick.with_steps(200) == quick.shortened(200)
    assert quick.with_steps(quick.steps) == quick
    assert quick.with_steps(15_000) == replace(quick, steps=15_000)


@pytest.mark.parametrize(("steps", "every"), [(6, 2), (4, 2), (4, 3), (5, 9)])
def test_the_start_that_goes_on_has_all_its_lines_and_a_checkpoint(small_data, tmp_path, steps, every):
    """They are those of a training of this start alone, also where the schedule ends with the comparison of starts."""
    schedule = replace(QUICK, steps=steps, evaluate_every=every)
    alone, seen = tmp_path / "alone", []
    options = {"validation": small_data[:3], "progress": False}
    fit(make_model(), make_guide(), small_data, schedule, run_dir=alone, **options)
    result = fit(
        make_model(), make_guide(), small_data, schedule, candidates=[(hopeless(), make_guide(seed=3))],
        candidate_steps=4, run_dir=tmp_path / "best", on_evaluation=lambda line: seen.append(line["step"]), **options,
    )  # fmt: skip
    assert lines_of(tmp_path / "best") == lines_of(alone)
    assert [line["step"] for line in lines_of(alone) if line["step"] >= 4] == seen
    assert result.metrics["step"] == steps
    best, wanted = (load_checkpoint(folder / "checkpoint.pt") for folder in (tmp_path / "best", alone))
    assert best["step"] == steps
    assert all(torch.equal(best["guide"][name], x) for name, x in wanted["guide"].items())


def diverging(seed=3):
    """A guide whose means are NaN from the third step on."""
    guide, calls = make_guide(seed), []
    encode = guide.encode

    def bad(images, n_objects):
        calls.append(1)
        q = encode(images, n_objects)
        return q if len(calls) < 3 else dist.Normal(q.mean * math.nan, q.stddev, validate_args=False).to_event(2)

    guide.encode = bad
    return guide


def test_a_start_that_diverges_is_left_out(small_data, tmp_path):
    alone, chosen = (make_model(), make_guide()), (make_model(), make_guide())
    fit(*alone, small_data, QUICK, run_dir=tmp_path / "alone", progress=False)
    with pytest.warns(UserWarning, match="start 2 of 2 is left out: .* is not finite at step"):
        fit(
            *chosen, small_data, QUICK, candidates=[(make_model(), diverging())], candidate_steps=4,
            run_dir=tmp_path / "chosen", progress=False,
        )  # fmt: skip
    assert lines_of(tmp_path / "chosen") == lines_of(tmp_path / "alone")
    left_out = pytest.warns(UserWarning, match="start . of 2 is left out")
    with pytest.raises(FloatingPointError, match="the bound of every start is not finite"), left_out:
        fit(
            make_model(), diverging(), small_data, QUICK, candidates=[(make_model(), diverging())], candidate_steps=4,
            run_dir=tmp_path / "none", progress=False,
        )  # fmt: skip


def test_of_trainings_at_once_one_that_diverges_stops_alone(small_data, tmp_path):
    def training(name, guide):
        return Training(make_model(), guide, small_data, QUICK, run_dir=tmp_path / name)

    fit_together([training("alone", make_guide())], progress=False)
    with pytest.warns(UserWarning, match="one of 2 trainings stops: .* is not finite at step"):
        bad, good = fit_together([training("bad", diverging()), training("good", make_guide())], progress=False)
    assert "is not finite" in bad.diverged
    assert not good.diverged
    assert bad.step < good.step == QUICK.steps
    assert lines_of(tmp_path / "good") == lines_of(tmp_path / "alone")
    stops = pytest.warns(UserWarning, match="one of 2 trainings stops")
    with pytest.raises(FloatingPointError, match="is not finite"), stops:
        fit_together([training("c", diverging()), training("d", diverging())], progress=False)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_training_stopped_while_starts_are_compared_saves_nothing_and_begins_again(small_data, tmp_path, stop_at):
    """Whichever start the stop falls into, the next training is an uninterrupted one."""

    def train(folder, *, stop):
        runs, calls = [(make_model(seed), make_guide(seed)) for seed in (0, 1)], []
        for _, guide in runs:
            encode = guide.encode

            def count(images, n_objects, encode=encode):
                calls.extend([1] if torch.is_grad_enabled() else [])
                if stop and torch.is_grad_enabled() and len(calls) == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)
                return encode(images, n_objects)

            guide.encode = count
        return runs[0], fit(
            *runs[0], small_data, QUICK, candidates=runs[1:], candidate_steps=4, run_dir=tmp_path / folder,
            progress=False,
        )  # fmt: skip

    _, stopped = train("again", stop=True)
    assert (stopped.step, stopped.interrupted, stopped.metrics) == (0, True, {})
    assert not (tmp_path / "again/checkpoint.pt").exists()
    assert lines_of(tmp_path / "again") == []
    again, result = train("again", stop=False)
    whole, _ = train("whole", stop=False)
    assert (result.step, result.interrupted) == (6, False)
    assert all(torch.equal(x, whole[0].state_dict()[name]) for name, x in again[0].state_dict().items())
    assert lines_of(tmp_path / "again") == lines_of(tmp_path / "whole")


def test_parameters_that_the_user_froze_keep_their_values(small_data, tmp_path):
    """Also where EM or the look at the film would set them, with clipping, and on resuming."""
    grey = ImageSequences(0.7 * small_data.images + 0.2 * torch.rand(small_data.images.shape), small_data.n_objects)

    def frozen():
        model, guide = make_model(), make_guide()
        model = PixelModel(model.dynamics, model.renderer, GaussianPixels(0.3))
        model.dynamics.requires_grad_(False)
        model.renderer.to_v.bias.requires_grad_(False)
        model.likelihood.log_std.requires_grad_(False)
        guide.rnn.requires_grad_(False)
        return model, guide

    schedule = replace(QUICK, fit_starts_at=(1,), clip_norm=10.0)
    model, guide = frozen()
    start = {name: p.clone() for module in (model, guide) for name, p in module.named_parameters()}
    flags = [p.requires_grad for module in (model, guide) for p in module.parameters()]
    fit(model, guide, grey, replace(schedule, steps=4), run_dir=tmp_path, progress=False)
    model, guide = frozen()
    fit(model, guide, grey, schedule, run_dir=tmp_path, resume=True, progress=False)
    assert flags == [p.requires_grad for module in (model, guide) for p in module.parameters()]
    for module in (model, guide):
        for name, p in module.named_parameters():
            assert torch.equal(p, start[name]) == (not p.requires_grad), name


def test_a_film_needs_no_weights_of_ones_own_renderer(small_data):
    class Blobs(nn.Module):
        """A renderer without W^v and b^v: a Gaussian blob at each position."""

        def __init__(self):
            super().__init__()
            self.height = self.width = 12
            self.gain = nn.Parameter(torch.tensor(6.0))
            axis = torch.linspace(-1, 1, 12)
            self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))

        def forward(self, a, present):
            distance = (a[..., None, None, :].to(self.grid.dtype) - self.grid).square().sum(-1)
            return self.gain * ((-10 * distance).exp() * present[..., None, None, None]).sum(-4) - 3.0

    model = PixelModel(make_model().dynamics, Blobs())
    fit(model, make_guide(), small_data, QUICK, progress=False)
    assert float(model.renderer.gain.detach()) != 6.0
    model.renderer.to_v = nn.Conv2d(1, 3, 1)  # a layer that is no W^v
    fit(model, make_guide(), small_data, QUICK, progress=False)


def test_a_training_without_a_parameter_to_train_is_refused(small_data):
    with pytest.raises(ValueError, match="learn_from freezes every parameter until step 2; wanted at least one"):
        fit(make_model(), make_guide(), small_data, replace(QUICK, learn_from={"model": 5, "guide": 2}))
    with pytest.raises(ValueError, match="requires_grad is False for every parameter"):
        fit(make_model().requires_grad_(False), make_guide().requires_grad_(False), small_data, QUICK)
    with pytest.raises(ValueError, match="the loss depends on no parameter that is trained in this step"):
        fit(
            make_model(), make_guide(), small_data, replace(QUICK, learn_from={"guide": 2}), objective=GivenTracks,
            tracks=torch.zeros(12, 3, 11, 2), progress=False,
        )  # fmt: skip


def test_a_schedule_can_be_made_longer_and_what_never_happens_still_does_not():
    schedule = PRESETS["recurrent"].schedule
    longer = schedule.shortened(2 * schedule.steps)
    assert longer.fit_starts_at == tuple(2 * step for step in schedule.fit_starts_at)
    assert min(longer.learn_from.values()) >= longer.steps
