"""Runs that are not what they were: other data, rivals, checkpoints that do not fit, folders that are gone."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import DATA, FORK, TINY, assert_same_outcome, outcome_of, train, with_schedule

from pyro_pixels._checksums import checked_write, read_checked
from pyro_pixels.data import ImageSequences, save_sequences
from pyro_pixels.run_sequences import run_sequences
from pyro_pixels.run_training import train_run
from pyro_pixels.runs import build, load_run, save_config
from pyro_pixels.training.checkpoints import load_checkpoint, read_lines, save_checkpoint
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.svi import Training


@pytest.fixture
def folder(tmp_path):
    """The folder of a finished run."""
    train(tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resume(folder, data=DATA, config=None, **options):
    config = with_schedule(steps=8) if config is None else config
    run = build(config)
    return fit(
        run.model, run.guide, data, config.schedule, run_dir=folder, resume=True, config=config, progress=False,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("other", [DATA[:5], ImageSequences(1 - DATA.images, DATA.n_objects)], ids=["fewer", "others"])
def test_other_data_are_refused_and_nothing_is_written(folder, other):
    before = files_of(folder)
    with pytest.raises(ValueError, match="trained on sequences other than"):
        resume(folder, other)
    assert files_of(folder) == before
    assert resume(folder).step == 8


def test_another_size_is_refused_and_the_run_can_still_be_asked(folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match="has another configuration"):
        resume(folder, config=replace(with_schedule(steps=8), state_size=9))
    assert files_of(folder) == before
    assert load_run(folder).step == 6


def rivals(folder, n):
    """Starts n trainings in one folder at once; how each ended, "trained" or what it said."""
    barrier, said = FORK.Barrier(n), FORK.Queue()

    def work(seed):
        torch.set_num_threads(1)
        config = replace(with_schedule(steps=40, evaluate_every=20), seed=seed)
        run = build(config)
        barrier.wait()
        try:
            fit(run.model, run.guide, DATA, config.schedule, seed=seed, run_dir=folder, config=config, progress=False)
            said.put("trained")
        except ValueError as error:
            said.put(str(error))

    processes = [FORK.Process(target=work, args=(seed,)) for seed in range(n)]
    for process in processes:
        process.start()
    ends = [said.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return ends


@pytest.mark.parametrize("n", [2, 8])
def test_one_of_several_processes_trains_in_a_folder(tmp_path, n):
    check_rivals(tmp_path / "run", n)


def check_rivals(folder, n):
    """One of ``n`` trainings in a folder ends well, and what is there is all its own."""
    ends = rivals(folder, n)
    assert ends.count("trained") == 1
    refused = [end for end in ends if end != "trained"]
    assert all(("is being trained" in end or "holds a trained run" in end) and "\n" not in end for end in refused)
    seed = json.loads((folder / "config.json").read_text())["seed"]
    assert load_checkpoint(folder / "checkpoint.pt")["seed"] == seed
    assert [line["step"] for line in read_lines(folder)] == [20, 40]


def test_processes_that_write_different_files_of_a_folder_note_them_all(tmp_path):
    """As a training does that is evaluated meanwhile."""

    def write(name):
        for i in range(15):
            with checked_write(tmp_path / name) as file:
                file.write(f"{name} {i}".encode())

    names = [f"file{i}" for i in range(4)]
    processes = [FORK.Process(target=write, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [read_checked(tmp_path / name) for name in names] == [f"{name} 14".encode() for name in names]


def test_a_file_of_sequences_that_has_changed_is_named_and_the_run_is_not_to_be_removed(tmp_path):
    save_sequences(tmp_path / "data.npz", DATA)
    config = run_sequences(replace(TINY, data_file=str(tmp_path / "data.npz"))).config
    train(tmp_path / "run", config=config)
    save_sequences(tmp_path / "data.npz", DATA[:5])
    before, other = files_of(tmp_path / "run"), run_sequences(config).config
    assert other != config
    with pytest.raises(
        ValueError, match=r"data\.npz is not the file that the run in .* was trained on.*restore the file"
    ):
        train_run(other, tmp_path / "run", DATA[:5], progress=False)
    assert files_of(tmp_path / "run") == before


def test_two_trainings_of_one_process_need_two_folders(tmp_path):
    from pyro_pixels.training.fitting import fit_together

    both = [
        Training((run := build(TINY)).model, run.guide, DATA, TINY.schedule, run_dir=tmp_path / "run") for _ in range(2)
    ]
    with pytest.raises(ValueError, match="folder of two trainings"):
        fit_together(both, progress=False)


def test_a_configuration_is_not_written_over_that_of_a_training(tmp_path):
    def work():
        with pytest.raises(ValueError, match="is being trained by process"):
            save_config(tmp_path / "run", TINY)

    def on_evaluation(line):
        process = FORK.Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0

    run = build(TINY)
    fit(
        run.model, run.guide, DATA, TINY.schedule, run_dir=tmp_path / "run", on_evaluation=on_evaluation, progress=False
    )


def test_a_folder_that_is_removed_is_said(tmp_path):
    def on_evaluation(line):
        shutil.rmtree(tmp_path / "run")

    run = build(TINY)
    with pytest.raises(ValueError, match="was removed during training"):
        fit(
            run.model, run.guide, DATA, TINY.schedule, run_dir=tmp_path / "run", on_evaluation=on_evaluation,
            progress=False,
        )  # fmt: skip


def at(state, *keys):
    for key in keys[:-1]:
        state = state[key]
    return state, keys[-1]


WRONG = {
    "optimiser of the wrong shape": (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
    "optimiser's step": (("optimizer", "state", 0, "step"), torch.tensor([1.0, 2.0])),
    "optimiser's step, a number": (("optimizer", "state", 0, "step"), 3),
    "optimiser of NaN": (("optimizer", "state", 1, "exp_avg_sq"), lambda x: x * torch.nan),
    "optimiser of negative squares": (("optimizer", "state", 1, "exp_avg_sq"), lambda x: x - 1),
    "optimiser of integers": (("optimizer", "state", 1, "exp_avg"), lambda x: x.long()),
    "optimiser of a stranger": (("optimizer", "state", 999), {}),
    "optimiser's groups": (("optimizer", "param_groups"), []),
    "optimiser's group": (("optimizer", "param_groups", 0, "params"), [0]),
    "optimiser none": (("optimizer",), None),
    "step missing": (("step",), None),
    "step negative": (("step",), -1),
    "step a text": (("step",), "6"),
    "step a half": (("step",), 1.5),
    "step a bool": (("step",), True),
    "seed missing": (("seed",), None),
    "seconds NaN": (("seconds",), float("nan")),
    "since": (("since",), {"steps": 1.0}),
    "since a text": (("since", "seconds"), "1"),
    "rng missing": (("rng",), None),
    "rng of another size": (("rng",), torch.zeros(3, dtype=torch.uint8)),
    "rng of floats": (("rng",), lambda x: x.float()),
    "totals": (("totals",), torch.zeros(3, dtype=torch.float64)),
    "totals NaN": (("totals",), lambda x: x * torch.nan),
    "model missing": (("model",), None),
    "model a list": (("model",), []),
    "model's weight NaN": (("model", "dynamics.u"), lambda x: x * torch.nan),
    "model's weight an integer": (("model", "dynamics.u"), lambda x: x.long()),
    "model's weight complex": (("model", "dynamics.u"), lambda x: x.cfloat()),
    "model's weight sparse": (("model", "dynamics.u"), lambda x: x.to_sparse()),
    "model's weight a number": (("model", "dynamics.u"), 1.0),
    "guide's weight infinite": (("guide", "rnn.phi_s0"), lambda x: x + torch.inf),
    "guide missing": (("guide",), None),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(folder, wrong):
    keys, value = wrong
    state = load_checkpoint(folder / "checkpoint.pt")
    del state["format"]
    entry, key = at(state, *keys)
    entry[key] = value(entry[key]) if callable(value) else value
    save_checkpoint(folder / "checkpoint.pt", state)
    before = files_of(folder)
    with pytest.raises(ValueError) as error:
        resume(folder)
    assert "\n" not in str(error.value)
    assert "checkpoint.pt" in str(error.value)
    assert files_of(folder) == before


@pytest.mark.parametrize("guide", ["recurrent", "structured"])
@pytest.mark.parametrize("rate", [1e3, 1e10, 1e38])
def test_a_learning_rate_that_is_too_large_is_a_floating_point_error(tmp_path, guide, rate):
    config = replace(with_schedule(learning_rate=rate), guide=guide)
    run = build(config)
    with pytest.raises(FloatingPointError, match="is not finite at step") as error:
        fit(run.model, run.guide, DATA, config.schedule, run_dir=tmp_path, config=config, progress=False)
    assert "\n" not in str(error.value)
    if "holds the last good state" in str(error.value):
        state = load_checkpoint(tmp_path / "checkpoint.pt")
        assert all(bool(x.isfinite().all()) for part in ("model", "guide") for x in state[part].values())


def test_a_checkpoint_is_kept_only_where_its_own_loss_was_finite(tmp_path):
    """One step of 1e38 is finite in its loss, and leaves weights that are not."""
    config = with_schedule(steps=1, learning_rate=1e38, evaluate_every=1)
    run = build(config)
    with pytest.raises(FloatingPointError, match="no checkpoint had been written"):
        fit(run.model, run.guide, DATA, config.schedule, run_dir=tmp_path, config=config, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_looking_at_a_checkpoint_changes_no_number(tmp_path):
    train(tmp_path / "kept")
    run = build(TINY)
    fit(run.model, run.guide, DATA, TINY.schedule, validation=DATA[:2], progress=False)
    kept = load_run(tmp_path / "kept")
    assert all(torch.equal(x, kept.model.state_dict()[k]) for k, x in run.model.state_dict().items())


def test_prefixes_of_no_parameter_are_refused():
    run = build(TINY)
    schedule = replace(TINY.schedule, learn_from={"model.dynamisc": 3})
    with pytest.raises(ValueError, match=r"learn_from has 'model.dynamisc'.*did you mean 'model.dynamics'"):
        fit(run.model, run.guide, DATA, schedule, progress=False)


def test_a_broken_last_line_of_metrics_is_dropped_with_a_word(folder):
    before = outcome_of(folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "secon')
    with pytest.warns(UserWarning, match="last line of .*metrics.jsonl is incomplete"):
        assert resume(folder).step == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = read_lines(folder)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["bound_per_frame"] for line in lines[:3]] == [line["bound_per_frame"] for line in before["lines"]]


def test_a_broken_line_of_metrics_is_named(folder):
    (folder / "checksums.json").unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(lines[0] + b"nonsense\n" + lines[2])
    with (
        pytest.warns(match="no checksum"),
        pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not a line of metrics"),
    ):
        resume(folder)


def test_a_run_of_version_0_1_is_resumed(folder):
    """Without checksums, fingerprints and a lock, as runs were written before there were any."""
    state = load_checkpoint(folder / "checkpoint.pt")
    torch.save({k: v for k, v in state.items() if k not in ("data", "validation")}, folder / "checkpoint.pt")
    (folder / "checksums.json").unlink()
    (folder / ".lock").unlink()
    with pytest.warns(UserWarning, match="has no checksum"):
        assert resume(folder).step == 8


def test_a_file_written_by_another_way_is_refused_and_says_how_to_use_it(folder):
    wanted = outcome_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seed": 3}))
    with pytest.raises(ValueError, match=r"does not match its checksum.*delete .*checksums.json to use it unchecked"):
        load_run(folder)
    with checked_write(folder / "config.json") as file:
        file.write(json.dumps(config).encode())
    load_run(folder)
    assert_same_outcome(outcome_of(folder), wanted)
