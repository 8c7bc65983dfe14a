"""What a CUDA device is to do: the same bodies are rehearsed on a CPU, where recordings are played (`rehearsal`).

On a card: `make test-gpu`.
"""

from examples.experiments import train_edlstm

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyro
import pytest
import torch
from rehearsal import RehearsedSteps, rehearse
from test_census import CASES, small

import ask as asking
import gallery
import teach
import to_arviz
from pyro_pixels._batch import Known
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.runs import GUIDES, build, load_run, save_config
from pyro_pixels.training import step_runners as steps_module
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.own_tracks import OwnTracks
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.step_runners import WARM_UP, Batch
from pyro_pixels.training.svi import Training
from pyro_pixels.worlds.base import simulate

ROOT = Path(__file__).parent.parent
BRIEF = Schedule(
    steps=14, batch_size=4, learn_from={"model.dynamics": 5}, anneal_from=5, anneal_steps=5, evaluate_every=7,
    single_object_steps=2, one_n_per_batch=True, fit_starts_at=(6,),
)  # fmt: skip


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Where a body runs; on the CPU with the stand-ins of a rehearsal."""
    if request.param == "cpu":
        rehearse(monkeypatch)
    return torch.device(request.param)


on_a_card = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA], indirect=True)
"""For bodies whose scripts test_examples.py runs on a CPU already: rehearsed with the slow tests."""


def made(config, device):
    run = build(config)
    return run.model.to(device), run.guide.to(device)


def steps_of(model, guide, device, elbo=None):
    elbo = AnnealedELBO() if elbo is None else elbo
    loss = elbo(model, guide)
    return steps_module.CapturedSteps(elbo, loss, 1e-3, {1.0: list(loss.parameters())}, clip_norm=100.0)


def take(steps, config, device, n):
    """``n`` steps on 9 sequences; returns the sums of the terms of the bound."""
    data = simulate(config.data, 9, seed=0)
    images, n_objects = data.images.to(device), data.n_objects.to(device)
    known = Known(3, int(data.images.flatten(2).sum(-1).max()))
    for i in range(n):
        steps.set(1.0, 1e-3)
        with steps.stream():
            steps.take(Batch(images, n_objects, torch.randperm(9)[:7], known, seed=i))
    return steps.read_totals()


LONGER = [
    *((guide, "bernoulli", 0.0, T) for guide in GUIDES for T in (30, 100)),
    ("structured", "gaussian", 0.02, 30),
    ("structured", "gaussian", 0.02, 100),
]


@pytest.mark.parametrize("guide, likelihood, clutter, n_frames", [*((*case, 11) for case in CASES), *LONGER])
def test_steps_are_recorded_and_replayed(guide, likelihood, clutter, n_frames, device):
    if device.type == "cpu" and n_frames > 11:
        pytest.skip("takes long on a CPU; test_census.py walks such a step")
    config = small(guide, likelihood, clutter, n_frames)
    steps = steps_of(*made(config, device), device)
    before = [p.detach().clone() for p in steps.parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        totals = take(steps, config, device, WARM_UP + 3)
    assert steps.refused is None
    assert len(steps._recorded) == 1
    assert bool(totals.isfinite().all())
    assert any(not torch.equal(p, old) for p, old in zip(steps.parameters, before, strict=True))


def test_lessons_and_a_random_order_are_recorded_apart_from_the_bound_alone(device):
    config = small("recurrent")
    elbo = OwnTracks(0.0)
    steps = steps_of(*made(config, device), device, elbo)
    for weight, random_order in ((0.0, False), (0.0, True), (2.0, True)):
        elbo.weight, elbo.random_order = weight, random_order
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert bool(take(steps, config, device, WARM_UP + 2).isfinite().all())
    assert steps.refused is None
    assert len(steps._recorded) == 3


class LooksAtTheLoss(AnnealedELBO):
    """Reads a value from the device, as a user's own objective may."""

    looks = False

    def differentiable_loss(self, *args, **kwargs):
        loss = super().differentiable_loss(*args, **kwargs)
        if self.looks:
            self.look(loss)
        return loss

    def look(self, loss):
        if steps_module.CapturedSteps is RehearsedSteps:
            from rehearsal import Graph

            if Graph.recording is not None:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
        float(loss.detach())


def looking(config, device):
    model, guide = made(config, device)
    elbo = LooksAtTheLoss()
    elbo.looks = True
    loss = elbo(model, guide)
    return steps_module.CapturedSteps(elbo, loss, 1e-3, {1.0: list(loss.parameters())})


def test_other_sequences_are_recorded_apart(device):
    """A recording reads the memory of the sequences it was made with, whatever is there by then."""
    config = small("recurrent")
    steps = steps_of(*made(config, device), device)
    for _ in range(2):  # each time with tensors of its own
        assert bool(take(steps, config, device, WARM_UP + 2).isfinite().all())
    assert len({id(batch.images) for _, batch in steps._recorded.values()}) == 2


def test_where_a_recording_fails_steps_go_on_and_other_trainings_do_not_notice(device):
    config = small("structured")
    before, fails, after = (
        steps_of(*made(config, device), device), looking(config, device), steps_of(*made(config, device), device)
    )  # fmt: skip
    take(before, config, device, WARM_UP + 2)
    with pytest.warns(UserWarning, match="run one by one, which is slower") as told:
        take(fails, config, device, WARM_UP + 1)
    assert len([w for w in told if "one by one" in str(w.message)]) == 1
    assert fails.refused is not None
    assert "\n" not in fails.refused
    old = [p.detach().clone() for p in fails.parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for steps in (before, after, fails):
            assert bool(take(steps, config, device, WARM_UP + 2).isfinite().all())
    assert before.refused is None
    assert after.refused is None
    assert any(not torch.equal(p, x) for p, x in zip(fails.parameters, old, strict=True))
    torch.randn(3, device=device)  # whatever else draws random numbers may go on, too


def test_a_recording_that_fails_leaves_what_was_recorded_before_unused(device):
    """The first kind of step is recorded, the second is refused: then neither is replayed, and both are taken."""
    config = small("recurrent")
    steps = looking(config, device)
    steps.elbo.looks = False
    take(steps, config, device, WARM_UP + 1)
    assert len(steps._recorded) == 1
    steps.elbo.looks = True
    steps.parameters[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="one by one"):
        take(steps, config, device, WARM_UP + 1)
    steps.parameters[0].requires_grad_(True)
    assert steps._recorded == {}
    assert bool(take(steps, config, device, 2).isfinite().all())


def test_validation_is_on_again_after_steps(device):
    config = small("recurrent")
    with pyro.validation_enabled(True):
        take(steps_of(*made(config, device), device), config, device, WARM_UP + 1)
        assert torch.distributions.Distribution._validate_args


@pytest.fixture
def trained(device, tmp_path):
    """A structured run of a few steps, with fitted starts and validation, in a folder."""
    config = replace(small("structured"), schedule=BRIEF, n_sequences=60)
    model, guide = made(config, device)
    data = simulate(config.data, 60, seed=0)
    save_config(tmp_path / "run", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = fit(
            model, guide, data, BRIEF, run_dir=tmp_path / "run", validation=data[:9], progress=False,
        )  # fmt: skip
    assert result.step == BRIEF.steps
    return config, tmp_path / "run"


def test_a_run_is_resumed(trained, device):
    config, folder = trained
    model, guide = made(config, device)
    longer = replace(BRIEF, steps=18)
    result = fit(model, guide, simulate(config.data, 60, seed=0), longer, run_dir=folder, resume=True, progress=False)
    assert result.step == 18
    run = load_run(folder, device)
    assert run.step == 18
    assert next(run.model.parameters()).device.type == device.type


def test_several_seeds_and_several_starts_are_trained(device):
    config = replace(small("recurrent"), schedule=replace(BRIEF, fit_starts_at=()))
    data = simulate(config.data, 60, seed=0)
    trainings = [Training(*made(config, device), data, config.schedule, seed=seed) for seed in (0, 1)]
    assert [r.step for r in fit_together(trainings, progress=False)] == [14, 14]
    pair, other = made(config, device), made(replace(config, seed=1), device)
    result = fit(*pair, data, config.schedule, candidates=[other], candidate_steps=5, progress=False)
    assert result.step == 14


def test_a_run_is_evaluated_and_its_health_checked(trained, device):
    config, folder = trained
    run, data = load_run(folder, device), simulate(config.data, 30, seed=1)
    result = evaluate(run.model, run.guide, data)
    assert set(result["by_n_objects"]) == {"1", "2", "3"}
    check_health(run.model, run.guide, data)


@on_a_card
@pytest.mark.parametrize("question", get_args(asking.Question))
def test_every_question_is_answered(question, trained, device, tmp_path):
    _, folder = trained
    asking.main(
        asking.Arguments(
            run=folder, out=tmp_path, device=device.type, question=question, n_sequences=6, n_samples=3, n_validation=6
        )
    )
    assert (tmp_path / f"{question}.png").stat().st_size > 5000


@on_a_card
def test_the_gallery_is_drawn(trained, device, tmp_path):
    _, folder = trained
    options = {"run": folder, "pretrained": False, "n_sequences": 6, "n_samples": 3}
    gallery.main(gallery.Arguments(out=tmp_path / "g", device=device.type, **options))
    assert len(list((tmp_path / "g").iterdir())) > 10


@on_a_card
def test_beliefs_are_written_for_arviz(trained, device, tmp_path):
    _, folder = trained
    to_arviz.main(
        to_arviz.Arguments(run=folder, out=tmp_path / "a", device=device.type, n_sequences=3, n_samples=20, n_seen=5)
    )
    assert (tmp_path / "a/posterior.nc").exists()


def test_a_run_teaches_another_guide(trained, device, tmp_path):
    _, folder = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        teach.main(
            teach.Arguments(teacher=folder, out=tmp_path / "t", guide="recurrent", steps=6, state_size=8,
                            device=device.type, progress=False)
        )  # fmt: skip
    assert (tmp_path / "t/checkpoint.pt").exists()


@on_a_card
def test_an_edlstm_is_trained(device, tmp_path):
    train_edlstm.main(
        train_edlstm.Arguments(run=tmp_path / "e", steps=2, state_size=8, n_sequences=30, n_test=6, progress=False,
                               threads=1, device=device.type)
    )  # fmt: skip
    assert (tmp_path / "e/metrics.json").exists()


def train_command(device, *options):
    return [str(ROOT / "examples/train.py"), "--n-sequences", "60", "--device", device.type, "--no-progress", *options]


PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages may be elsewhere
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


@on_a_card
def test_sigterm_saves_and_a_launcher_with_one_process_resumes(device, tmp_path):
    command = [sys.executable, *train_command(device, "--run", "r", "--steps", "100000")]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        while not (tmp_path / "r/metrics.jsonl").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        time.sleep(2.0)
        run.send_signal(signal.SIGTERM)
        output = run.communicate(timeout=120)[0].decode()
    assert run.returncode == 130
    step = int(output.split("saved at step ")[1].split(";")[0].replace(",", ""))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--"]
    again = train_command(device, "--run", "r", "--resume", "--steps", str(step + 8))
    done = subprocess.run([*launcher, *again], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one by one" not in done.stderr
    last = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step + 8


def test_too_little_memory_is_one_line_that_says_what_would_fit(trained, device, monkeypatch):
    """A card that holds 2 of 4 sequences at a time: two parts, and the checkpoint is kept."""
    config, folder = trained
    training = Training(*made(config, device), simulate(config.data, 60, seed=0), replace(BRIEF, steps=18))
    training.run_dir = folder
    needs = iter([110.0, 210.0])  # 10 and 100 a sequence
    monkeypatch.setattr(training.steps, "_memory_in_use", lambda peak=False: next(needs) if peak else 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (220.0 / 0.9 + 1, 1e9))

    def full(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training.steps, "take", full)
    training.begin(resume=True)
    saved = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(
        MemoryError, match=r"4 sequences in 1 part\(s\); .*last good state. About 2 would fit: --parts 2"
    ):
        training._take_step()
    assert (folder / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize("guide", ["recurrent", "structured"])
def test_the_bound_in_tf32_is_that_in_float64(guide, device):
    """log p(v | a) - log q(a | v) + log p(a) of given positions, within 1e-3 of the log-likelihood's size."""
    config, found = replace(small(guide), state_size=64), []
    data = simulate(config.data, 9, seed=0)
    before = torch.get_float32_matmul_precision()
    a = torch.randn(9, 3, 11, 2, generator=torch.Generator().manual_seed(0)).to(device) / 4
    try:
        for dtype, precision in (
            (torch.float32, "high" if device.type == "cuda" else "highest"),
            (torch.float64, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            model, guide_ = (x.to(dtype) for x in made(config, device))
            present = torch.ones(9, 3, dtype=torch.bool, device=device)
            with torch.no_grad():
                images, n_objects = data.images.to(device).to(dtype), torch.full((9,), 3, device=device)
                log_p = model.likelihood(model.renderer(a.to(dtype), present)).log_prob(images)
                kl = guide_.q(images, n_objects).log_prob(a.to(dtype)) - model.dynamics.positions(11).log_prob(a)
            found.append((log_p.double(), (log_p - kl.sum(1)).double()))
    finally:
        torch.set_float32_matmul_precision(before)
    (_, actual), (log_p, wanted) = found
    assert float(((actual - wanted).abs() / (log_p.abs() + wanted.abs())).max()) < 1e-3
