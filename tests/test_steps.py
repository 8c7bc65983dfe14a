"""One step: nothing waits for the device, parts add up, several processes and trainings give the same numbers."""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from conftest import make_guide, make_model
from rehearsal import RehearsedSteps, record, rehearse
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_pixels import _fused as fused_kernels
from pyro_pixels._batch import Known, knowing
from pyro_pixels.guides import following, recurrence
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.training.checkpoints import load_checkpoint
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.step_runners import WARM_UP, Batch, CapturedSteps, DistributedSteps, Steps
from pyro_pixels.training.svi import Training

QUICK = Schedule(
    steps=6, batch_size=4, learn_from={"model.dynamics": 2}, anneal_from=2, anneal_steps=2, evaluate_every=3
)
KNOWN = Known(most_objects=3, most_white=40)
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount",
         "repeat_interleave", "_linalg_check_errors"}  # fmt: skip


class Reads(TorchDispatchMode):
    """Notes the operations that read values from the device, for which a program waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def pair(kind, seed=0):
    model, guide = make_model(seed), make_guide(seed)
    if kind == "structured":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide = StructuredGuide(model.dynamics, guide.rnn)
    return model, guide


def same(first, second):
    for a, b in zip(first, second, strict=True):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["recurrent", "structured"])
def test_a_step_does_not_wait_for_the_device_once_sizes_are_known(kind, small_data):
    loss = AnnealedELBO(torch.tensor(2.0))(*pair(kind))
    with pyro.validation_enabled(False), Reads() as reads:
        loss(small_data.images, small_data.n_objects).backward()
        assert reads.seen, "the sizes of a batch are read"
        reads.seen.clear()
        with knowing(KNOWN):
            loss(small_data.images, small_data.n_objects).backward()
    assert reads.seen == []


@pytest.mark.parametrize("kind", ["recurrent", "structured"])
def test_known_sizes_give_the_same_loss(kind, small_data):
    loss, values = AnnealedELBO()(*pair(kind)), []
    for known in (nullcontext(), knowing(KNOWN)):
        torch.manual_seed(0)
        with known, torch.no_grad():
            values.append(float(loss(small_data.images, small_data.n_objects)))
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def one_step(steps_of, data, parts, index=torch.arange(7)):
    """The gradient that a step has put together."""
    model, guide = pair("recurrent")
    elbo = AnnealedELBO()
    loss = elbo(model, guide)
    steps = steps_of(elbo, loss, 1e-3, {1.0: list(loss.parameters())}, parts=parts)
    steps.set(kl_weight=2.0, learning_rate=1e-3)
    steps.take(Batch(data.images, data.n_objects, index, KNOWN, seed=5))
    return steps, [p.grad for p in loss.parameters()]


def test_parts_add_up_to_the_gradient_of_the_batch(small_data):
    """Each part is drawn from a seed of its own, so the expectation is put together by hand."""
    model, guide = pair("recurrent")
    loss = AnnealedELBO(2.0)(model, guide)
    for part, index in enumerate(torch.arange(7).tensor_split(3)):
        torch.manual_seed(5 * 1_009 + part)
        (loss(small_data.images[index], small_data.n_objects[index]) / 7).backward()
    steps, gradients = one_step(Steps, small_data, parts=3)
    for gradient, p in zip(gradients, loss.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-6)
    assert bool(steps.read_totals().isfinite().all())


@pytest.mark.parametrize(("n", "parts", "world"), [(4, 3, 3), (7, 6, 3), (5, 6, 3), (6, 3, 3)])
def test_every_process_has_a_part_and_their_gradients_are_those_of_one_process(
    monkeypatch, n, parts, world, small_data
):
    """Also where a batch cannot be split evenly. A process without a backward pass would keep the others waiting."""
    module = DistributedSteps.take.__globals__["processes"]
    monkeypatch.setattr(module, "get_world_size", lambda: world)
    monkeypatch.setattr(DistributedSteps, "_shared_loss", lambda self: Alone(self.loss))
    shares = []
    for rank in range(world):
        monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
        shares.append(one_step(DistributedSteps, small_data, parts, torch.arange(n)))
    wanted, gradients = one_step(Steps, small_data, parts, torch.arange(n))
    for gradient, *of_ranks in zip(gradients, *(share[1] for share in shares), strict=True):
        torch.testing.assert_close(sum(of_ranks) / world, gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(steps.totals for steps, _ in shares), wanted.totals)


class Alone(torch.nn.Module):
    """A `DistributedDataParallel` of a single process."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, *args):
        return self.loss(*args)

    def no_sync(self):
        return nullcontext()


def test_fewer_sequences_in_a_batch_than_processes_are_refused(small_data, monkeypatch):
    """Sequences with one object may be fewer than a batch."""
    monkeypatch.setattr("pyro_pixels.training.svi.n_processes", lambda: 4)
    schedule = replace(QUICK, parts=4, single_object_steps=2)
    few = small_data[[*(small_data.n_objects == 1).nonzero()[:3, 0], *(small_data.n_objects > 1).nonzero()[:, 0]]]
    with pytest.raises(ValueError, match=r"a batch has only 3 sequence\(s\) for 4 processes; wanted at least one"):
        Training(*pair("recurrent"), few, schedule)


def test_trainings_together_are_those_one_after_the_other_to_the_bit(small_data, tmp_path):
    alone, together = [pair("recurrent", seed) for seed in (0, 1)], [pair("recurrent", seed) for seed in (0, 1)]
    for seed, run in enumerate(alone):
        fit(*run, small_data, QUICK, seed=seed, progress=False)
    trainings = [
        Training(*run, small_data, QUICK, seed=seed, run_dir=tmp_path / str(seed)) for seed, run in enumerate(together)
    ]
    results = fit_together(trainings, progress=False)
    assert [r.step for r in results] == [6, 6]
    assert not any(r.interrupted for r in results)
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    assert load_checkpoint(tmp_path / "1" / "checkpoint.pt")["seed"] == 1


def test_trainings_together_resume_where_each_was(small_data, tmp_path):
    def trainings(schedule):
        runs = [pair("recurrent", seed) for seed in (0, 1)]
        return runs, [
            Training(*run, small_data, schedule, seed=seed, run_dir=tmp_path / str(seed))
            for seed, run in enumerate(runs)
        ]

    whole = pair("recurrent", 1)
    fit(*whole, small_data, QUICK, seed=1, progress=False)
    fit_together(trainings(replace(QUICK, steps=3))[1], progress=False)
    runs, second = trainings(QUICK)
    fit(*runs[0], small_data, QUICK, seed=0, run_dir=tmp_path / "0", resume=True, progress=False)  # one is ahead
    fit_together(second, resume=True, progress=False)
    same(runs[1], whole)


def test_trainings_together_need_equal_numbers_of_steps(small_data):
    trainings = [Training(*pair("recurrent"), small_data, replace(QUICK, steps=n)) for n in (2, 3)]
    with pytest.raises(ValueError, match="differ in their numbers of steps"):
        fit_together(trainings)


PROGRAM = """
import sys, torch
import torch.distributed as processes
torch.set_num_threads(1)
from test_steps import SHARED, pair
from conftest import SMALL
from pyro_pixels.training.fitting import fit
from pyro_pixels.worlds.base import simulate
processes.init_process_group("gloo")
run = pair(sys.argv[1])
result = fit(*run, simulate(SMALL, 12, seed=0), SHARED, run_dir=sys.argv[2], progress=False)
assert result.step == SHARED.steps
processes.destroy_process_group()
"""
SHARED = replace(QUICK, parts=2, fit_starts_at=(4,), single_object_steps=1)


@pytest.mark.parametrize("kind", ["recurrent", "structured"])
def test_two_processes_give_the_numbers_of_one(kind, small_data, tmp_path):
    """PyTorch's own launcher and engine; parameters are frozen, freed and fitted on the way."""
    (tmp_path / "program.py").write_text(PROGRAM)
    tests = Path(__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py"), kind, str(tmp_path / "run")],
        cwd=tests.parent, env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    model, guide = pair(kind)
    one = fit(model, guide, small_data, SHARED, progress=False)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    for part, module in (("model", model), ("guide", guide)):
        for name, x in module.state_dict().items():
            torch.testing.assert_close(state[part][name], x, rtol=1e-5, atol=1e-6)
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert f'"bound_per_frame": {one.metrics["bound_per_frame"]:.4f}'[:25] in line


def test_parts_are_checked():
    for parts, wanted in ((0, "of at least 1"), (21, "between 1 and batch_size, 20")):
        with pytest.raises(ValueError, match=rf"parts is {parts}; wanted .*{wanted}"):
            Schedule(parts=parts)


def test_where_a_step_cannot_be_recorded_steps_go_on_and_say_why(small_data, monkeypatch):
    @contextmanager
    def refuse(graph, pool, stream):
        with record(graph, pool, stream):
            yield
            raise RuntimeError("no graphs here\nand more")

    rehearse(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    steps, _ = one_step(RehearsedSteps, small_data, parts=1)
    batch = Batch(small_data.images, small_data.n_objects, torch.arange(7), KNOWN, seed=5)
    for _ in range(WARM_UP - 1):
        steps.take(batch)
    with steps.stream(), pytest.warns(UserWarning, match="run one by one, which is slower: no graphs here$"):
        steps.take(batch)
    before = [p.detach().clone() for p in steps.parameters]
    with warnings.catch_warnings(), steps.stream():
        warnings.simplefilter("error")
        steps.take(batch)
    assert any(not torch.equal(p, old) for p, old in zip(steps.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("precision", "device", "tolerance"),
    [
        ("highest", "cpu", 1e-5),
        pytest.param("highest", "cuda", 1e-5, marks=pytest.mark.gpu),
        pytest.param("high", "cuda", 1e-3, marks=pytest.mark.gpu),
        pytest.param("medium", "cuda", 1e-2, marks=pytest.mark.gpu),
    ],
)
def test_log_likelihoods_are_near_those_in_float64(precision, device, tolerance, small_data):
    """log p(v | a) for given positions, in each precision of matrix products that a training may use."""
    model, present = make_model(state_size=64), torch.ones(12, 3, dtype=torch.bool)
    a = torch.randn(12, 3, 11, 2, generator=torch.Generator().manual_seed(0))

    def log_likelihood(model, a, images):
        with torch.no_grad():
            return model.likelihood(model.renderer(a, present.to(a.device))).log_prob(images).cpu().double()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        actual = log_likelihood(model.to(device), a.to(device), small_data.images.float().to(device))
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = log_likelihood(model.cpu().double(), a.double(), small_data.images.double())
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["recurrent", "structured"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_replayed_steps_learn_as_plain_ones_do(kind, fused, small_data, monkeypatch):
    """A deterministic loss would be needed for equal numbers; the same seed draws others in a graph. So: the bound."""
    bounds = []
    for steps_of in (Steps, CapturedSteps):
        monkeypatch.setattr(fused_kernels, "ENABLED", fused and steps_of is CapturedSteps)
        model, guide = (module.cuda() for module in pair(kind))
        elbo = AnnealedELBO()
        loss = elbo(model, guide)
        steps = steps_of(elbo, loss, 1e-2, {1.0: list(loss.parameters())})
        data = Batch(small_data.images.cuda(), small_data.n_objects.cuda(), torch.arange(12), KNOWN, seed=5)
        for _ in range(200):
            steps.set(1.0, 1e-2)
            with steps.stream():
                steps.take(data)
        assert getattr(steps, "refused", None) is None
        steps.read_totals()
        steps.totals.zero_()
        for _ in range(50):
            with steps.stream():
                steps.take(data)
        log_likelihood, kl = steps.read_totals()
        bounds.append(float(log_likelihood - kl) / 50)
    assert bounds[1] == pytest.approx(bounds[0], rel=0.1)
    if fused:
        chosen = {plain: function for (plain, _), function in fused_kernels._CHOSEN.items()}
        assert recurrence._Recurrence in chosen
        assert kind == "recurrent" or following.follow_reference in chosen
        assert all(function is not plain for plain, function in chosen.items())
