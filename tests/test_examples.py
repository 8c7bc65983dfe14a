"""Every script runs on a small problem, in a process of its own, and says what is wrong in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import train
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import build, save_config
from pyro_pixels.training.elbo import bound
from pyro_pixels.worlds.cannonballs import CannonballConfig

ROOT = Path(__file__).parent.parent
EXPERIMENTS = {
    "compare_guides", "export_pretrained", "latent_space", "learning_curves", "other_worlds", "reproduce_paper",
    "sweep", "sweep_recurrent", "switches", "train_edlstm",
}  # fmt: skip
SCRIPTS = EXPERIMENTS | {
    "simulate", "train", "evaluate", "infer", "generate", "interpolate", "quickstart", "custom_guide", "to_arviz",
    "ask", "gallery", "teach", "prepare",
}  # fmt: skip
ELSEWHERE = {"paper_in_pyro"}  # scripts with tests of their own


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command_of(name):
    if name in EXPERIMENTS:
        return [sys.executable, "-m", f"examples.experiments.{name}"]
    return [sys.executable, str(ROOT / "examples" / f"{name}.py")]


def script(name, *arguments, cwd):
    command = [*command_of(name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def names_in(folder):
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def test_every_script_is_listed():
    assert names_in(ROOT / "examples") - ELSEWHERE == SCRIPTS - EXPERIMENTS
    assert names_in(ROOT / "examples/experiments") == EXPERIMENTS


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A user's own sequences, made by code that knows nothing of this package: squares that drift, no positions."""
    rng = np.random.default_rng(0)
    images = np.zeros((30, 12, 20, 24), np.uint8)
    n_objects = np.arange(30) % 2 + 1
    for b, t in np.ndindex(30, 12):
        for n in range(n_objects[b]):
            start = np.random.default_rng(100 * b + n)
            x, y = start.uniform(2, 10, 2) + t * start.uniform(0.2, 0.8, 2)
            images[b, t, int(y) : int(y) + 3, int(x) : int(x) + 3] = 1
    assert images.any(axis=(2, 3)).all()
    path = tmp_path_factory.mktemp("own") / "mine.npz"
    np.savez(path, images=images, n_objects=n_objects.astype(np.int32), note=rng.uniform(size=3))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a quick run was trained for 6 steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = script("train", "--steps", 6, "--n-sequences", 60, "--no-progress", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help(name, tmp_path):
    done = script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in {
        "simulate": ["--seed"],
        "prepare": ["--out", "--n-objects"],
        "sweep": ["--seeds", "--device"],
        "sweep_recurrent": ["--suite", "--seeds", "--device"],
        "export_pretrained": ["--run"],
        "custom_guide": ["--steps", "--seed"],
        "learning_curves": ["--summary", "--out"],
        "compare_guides": ["--guides", "--custom", "--seeds", "--device"],
        "other_worlds": ["--seed", "--device"],
        "reproduce_paper": ["--run", "--seed", "--device"],
    }.get(name, ["--seed", "--device", "--data"]):
        assert option in done.stdout


def test_simulate_then_evaluate_and_query(trained):
    done = script("simulate", "--out", "test.npz", "--n-sequences", 30, "--seed", 4, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert (trained / "test.png").stat().st_size > 1000
    done = script("evaluate", "--data", "test.npz", "--out", "m/metrics.json", cwd=trained)
    assert done.returncode == 0, done.stderr
    result = json.loads((trained / "m/metrics.json").read_text())
    wanted = {"position_error_px", "switch_rate", "generation_error_px", "interpolation_error_px", "nll_per_frame_nats",
              "paper_style_loss", "generation_floor_px", "interpolation_floor_px"}  # fmt: skip
    assert set(result["by_n_objects"]) == {"1", "2", "3"}
    for row in (*result["by_n_objects"].values(), result["all"]):
        assert wanted <= set(row)
    assert (
        0
        < result["all"]["interpolation_floor_px"]
        < result["all"]["generation_floor_px"]
        < result["all"]["generation_error_px"]
    )
    for name, made in {
        "infer": ("positions.npz", "positions.png"),
        "generate": ("generation.npz", "generated_images.png", "generated_trajectories.png", "generation.gif"),
        "interpolate": ("interpolation.npz", "interpolation.png"),
    }.items():
        done = script(name, "--data", "test.npz", "--out", name, "--n-samples", 2, cwd=trained)
        assert done.returncode == 0, done.stderr
        assert all((trained / name / file).stat().st_size > 1000 for file in made)
    with np.load(trained / "generate/generation.npz") as file:
        assert file["mean"].shape == (30, 3, 30, 2)
        assert file["sample_images"].shape == (2, 30, 30, 32, 32)


def test_a_users_own_file_goes_all_the_way(own_file, tmp_path):
    for name, arguments in {
        "train": ("--run", "run", "--steps", 4, "--no-progress"),
        "infer": ("--run", "run", "--out", "infer"),
        "generate": ("--run", "run", "--out", "generate"),
        "interpolate": ("--run", "run", "--out", "interpolate"),
        "evaluate": ("--run", "run", "--out", "metrics.json"),
    }.items():
        done = script(name, "--data", own_file, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    row = json.loads((tmp_path / "metrics.json").read_text())["all"]
    assert row["nll_per_frame_nats"] > 0
    assert "position_error_px" not in row


def test_quickstart_makes_everything(tmp_path, own_file):
    done = script("quickstart", "--steps", 3, "--data", own_file, "--run", "q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {p.name for p in (tmp_path / "q").iterdir()}
    figures = {"training", "inference_means", "sequences", "start", "positions", "generated_images", "interpolation"}
    files = {"config.json", "metrics.jsonl", "checkpoint.pt", "metrics.json", "generation.gif"}
    assert made >= files | {f"{name}.png" for name in figures}


def test_ctrl_c_while_starts_are_compared_saves_nothing_and_the_same_command_begins_again(
    tmp_path, monkeypatch, capsys
):
    arguments = train.Arguments(run=tmp_path / "r", steps=4, starts=2, n_sequences=60, threads=1, progress=False)

    def stop(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return bound(*given)

    with monkeypatch.context() as patch:
        patch.setattr("pyro_pixels.training.svi.bound", stop)  # after the steps of the first start
        assert train.main(arguments) == 130
    assert "nothing was saved: repeat the same command to begin again" in capsys.readouterr().out
    assert not (tmp_path / "r/checkpoint.pt").exists()
    assert train.main(arguments) == 0
    assert "trained 4 steps" in capsys.readouterr().out
    assert (tmp_path / "r/checkpoint.pt").exists()
    assert (tmp_path / "r/training.png").exists()


def test_sigterm_saves_and_resume_finishes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(ROOT / "examples/train.py"),
        "--run",
        "r",
        "--steps",
        "100000",
        "--n-sequences",
        "60",
    ]
    training = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "r/metrics.jsonl").exists():  # written when training starts
        assert training.poll() is None, training.stderr.read()
        time.sleep(0.1)
    time.sleep(1.0)
    training.send_signal(signal.SIGTERM)
    output = training.communicate(timeout=120)[0].decode()
    assert training.returncode == 130
    assert "--resume" in output
    assert (tmp_path / "r/checkpoint.pt").exists()
    step = int(output.split("saved at step ")[1].split(";")[0].replace(",", ""))
    done = script("train", "--run", "r", "--resume", "--steps", step + 2, "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"trained {step + 2:,} steps" in done.stdout


BAD = {
    "missing file": ("train", "--data", "nowhere.npz"),
    "no run": ("infer", "--run", "nowhere"),
    "no such device": ("train", "--device", "abacus"),
    "no such size": ("infer", "--data", "other.npz"),
    "seen all": ("generate", "--n-seen", "30"),
    "seen all, for arviz": ("to_arviz", "--n-seen", "30"),
    "seen none": ("generate", "--n-seen", "0"),
    "trained already": ("train",),
    "nothing to resume": ("train", "--run", "new", "--resume"),
    "folder that is a file": ("infer", "--out", "file"),
    "no such guide": ("teach", "--guide", "nobody"),
    "no steps": ("train", "--run", "new", "--steps", "0"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(trained, arguments):
    (trained / "file").write_text("not a folder")
    np.savez(trained / "other.npz", images=np.zeros((2, 12, 9, 9), np.uint8), n_objects=np.ones(2, int))
    before = (trained / "runs/quick/checkpoint.pt").read_bytes()
    done = script(*arguments, cwd=trained)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert (trained / "runs/quick/checkpoint.pt").read_bytes() == before


def test_a_run_teaches_another_guide(trained):
    done = script("teach", "--steps", 4, "--state-size", 8, "--guide", "recurrent", "--no-progress", cwd=trained)
    assert done.returncode == 0, done.stderr
    config = json.loads((trained / "runs/taught/config.json").read_text())
    assert (config["guide"], config["guide_state_size"]) == ("recurrent", 8)
    done = script("infer", "--run", "runs/taught", "--n-sequences", 6, cwd=trained)
    assert done.returncode == 0, done.stderr
    again = script("teach", "--no-progress", cwd=trained)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    done = script("teach", "--resume", "--no-progress", cwd=trained)
    assert "taught 4 steps" in done.stdout


def test_cuda_is_asked_for_where_there_is_none(trained):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = script("train", "--run", "new", "--device", "cuda", cwd=trained)
    assert done.returncode == 2
    assert "no cuda device" in done.stderr


def test_a_run_becomes_pretrained_weights_and_a_page(trained, tmp_path):
    """Evaluated, exported, and shown: the paper's figures and the tables between the markers of a page."""
    for name, arguments in {
        "evaluate": ("--n-sequences", 12),
        "export_pretrained": ("--folder", tmp_path / "weights"),
        "reproduce_paper": ("--run", "runs/quick", "--docs", tmp_path / "docs", "--n-test", 12),
    }.items():
        if name == "reproduce_paper":
            (tmp_path / "docs").mkdir()
            parts = ("model", "baselines", "network", "longer", "generalisation", "sweeps")
            page = "\n".join(f"<!-- begin {part} -->\nnothing yet\n<!-- end {part} -->\nkept" for part in parts)
            (tmp_path / "docs" / "reproduction.md").write_text(page)
        done = script(name, *arguments, cwd=trained)
        assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "weights/quick/about.json").read_text())
    assert about["step"] == 6
    assert "metrics" in about
    page = (tmp_path / "docs/reproduction.md").read_text()
    assert page.count("kept") == 6
    assert page.count("nothing yet") == 1  # there are no sweeps
    assert "| 3 |" in page
    figures = {path.stem for path in (tmp_path / "docs/figures/paper").glob("*.png")}
    assert figures >= {"fig3", "fig5a", "fig5b", "fig6", "fig8", "fig9", "fig10_last", "fig12", "fig13", "longer"}
    assert (tmp_path / "docs/figures/paper_network/fig13.png").exists()
    done = script("reproduce_paper", "--docs", tmp_path / "nowhere", cwd=trained)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_pretrained_weights_answer_without_training(tmp_path):
    for name, made in {"infer": "infer/positions.png", "generate": "generate/generation.gif"}.items():
        done = script(name, "--pretrained", "--n-sequences", 9, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs/pretrained" / made).stat().st_size > 1000
    done = script("infer", "--pretrained", "--weights", "long", "--n-sequences", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/pretrained_long/infer/positions.png").exists()
    for which in (("--pretrained", "--weights", "best"), ("--weights", "long")):
        done = script("infer", *which, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "add --pretrained" in done.stderr


def test_objects_are_renamed_where_asked_and_can_be(tmp_path):
    options = ("--pretrained", "--n-sequences", 9)
    for which in ((), ("--untangle",)):
        done = script("infer", *options, "--weights", "recurrent", *which, "--out", f"r{len(which)}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plain, renamed = (np.load(tmp_path / f"r{i}/positions.npz") for i in (0, 1))
    assert not np.array_equal(plain["mean"], renamed["mean"], equal_nan=True)  # sequence 8 has three objects
    for name in ("mean", "std"):  # the same in each frame, under other names
        np.testing.assert_allclose(np.sort(plain[name], 1), np.sort(renamed[name], 1), atol=1e-5)
    for option in ("--untangle", "--refine"):
        done = script("infer", *options, option, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{option} is for guides without dynamics" in done.stderr


@pytest.mark.slow
def test_what_is_refined_is_better(tmp_path):
    options = ("--pretrained", "--weights", "recurrent", "--n-sequences", 6, "--refine", "--out", "metrics.json")
    done = script("evaluate", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "refined: position error" in done.stdout
    found = json.loads((tmp_path / "metrics.json").read_text())["by_n_objects"]["3"]
    assert found["refined_position_error_px"] < 0.8 * found["position_error_px"]
    assert found["refined_bound_per_frame_nats"] > found["bound_per_frame_nats"] + 1


def test_beliefs_are_written_for_arviz(tmp_path):
    options = ("--n-sequences", 3, "--n-samples", 40, "--out", "out")
    done = script("to_arviz", "--pretrained", *options, "--n-seen", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = {"launches", "first_steps", "futures", "white_pixels", "pareto_k", "calibration"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == pictures
    inference = xr.open_dataset(tmp_path / "out/posterior.nc", group="predictions", engine="h5netcdf")
    assert inference.a.shape == (1, 40, 3, 3, 20, 2)


def test_beliefs_of_a_users_own_file_are_written_too(own_file, tmp_path):
    """Where nobody knows the positions: in latent units, and without what compares with the truth."""
    done = script("train", "--run", "run", "--data", own_file, "--steps", 2, "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = ("--n-sequences", 4, "--n-samples", 20, "--n-seen", 6, "--out", "out")
    done = script("to_arviz", "--run", "run", "--data", own_file, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/calibration.png").exists()
    assert (tmp_path / "out/futures.png").exists()


ALSO_IN_THE_GALLERY = ["filter", "hidden", "retrodict", "what-if", "evidence", "stream"]


@pytest.mark.parametrize(
    "question", [*(pytest.param(q, marks=pytest.mark.slow) for q in ALSO_IN_THE_GALLERY), "count", "calibration"]
)
def test_questions_are_answered_and_drawn(question, tmp_path):
    options = ("--pretrained", "--n-sequences", 6, "--n-samples", 2, "--n-validation", 6)
    done = script("ask", "--question", question, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"runs/pretrained/ask/{question}.png").stat().st_size > 5000
    assert (tmp_path / f"runs/pretrained/ask/{question}.json").exists() == (question in ("count", "calibration"))


def test_the_gallery_is_drawn(tmp_path):
    """The pictures that are the gallery's own; the others are those of `ask`."""
    pictures = ("positions", "velocities", "starts", "fan", "missing", "calibration", "what-if")
    done = script("gallery", "--n-sequences", 6, "--n-samples", 3, "--pictures", *pictures, "forecast", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {path.name: path.stat().st_size for path in (tmp_path / "runs/pretrained/gallery").iterdir()}
    assert made.keys() == {"forecast.gif", *(f"{name}.png" for name in pictures)}
    assert min(made.values()) > 5000


def test_questions_without_a_truth(own_file, tmp_path):
    """A user's own sequences, with the paper's guide, which is streamed images and knows no dynamics."""
    config = replace(PRESETS["quick"], guide="recurrent", state_size=8, data=CannonballConfig(height=20, width=24))
    run = build(config)
    save_config(tmp_path / "r", config)
    state = {"format": 1, "model": run.model.state_dict(), "guide": run.guide.state_dict(), "step": 0}
    torch.save(state, tmp_path / "r/checkpoint.pt")
    options = ("--run", "r", "--data", own_file, "--n-sequences", 4, "--n-samples", 2)
    for question in ("filter", "hidden", "retrodict", "what-if", "stream", "count"):
        done = script("ask", "--question", question, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "r/ask/count.json").read_text())["sequences"]
    assert [(row["sequence"], row["n_objects"]) for row in counted] == [(0, 1), (1, 2), (2, 1), (3, 2)]
    for row in counted:
        assert sum(row["probs"]) == pytest.approx(1, abs=1e-5)
        assert row["likeliest"] == int(np.argmax(row["probs"]))
    agree = sum(row["likeliest"] == row["n_objects"] for row in counted)
    assert f"; as in the file in {agree} of 4 sequences" in done.stdout
    pictures = ("positions", "velocities", "starts", "fan", "missing")
    done = script("gallery", *options, "--out", "g", "--pictures", *pictures, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = script("ask", "--question", "calibration", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)


def test_a_sweep_goes_on_where_it_was(tmp_path):
    command = ("sweep", "--seeds", 2, "--steps", 2, "--n-test", 12, "--out", "s")
    done = script(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s/seeds.json").read_text())
    assert [run["train_seed"] for run in result["variants"]["quick"]["runs"]] == [0, 1]
    (tmp_path / "s/quick/seed1/result.json").unlink()
    again = script(*command, cwd=tmp_path)
    assert "seed 1: done" in again.stdout
    assert "seed 0" not in again.stdout
    first, second = json.loads((tmp_path / "s/seeds.json").read_text())["variants"]["quick"]["runs"]
    done = script("sweep", "--suite", "taught", "--seeds", 1, "--steps", 2, "--n-test", 12, "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    taught = json.loads((tmp_path / "s/taught.json").read_text())["variants"]
    assert list(taught) == ["taught recurrent", "taught attentive"]
    assert first == result["variants"]["quick"]["runs"][0]
    assert second == json.loads((tmp_path / "s/quick/seed1/result.json").read_text())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_the_papers_network_is_swept_on_its_own(tmp_path):
    options = ("--seeds", 1, "--steps", 2, "--n-test", 12, "--out", "r")
    for suite in ("seeds", "one", "ceiling"):
        done = script("sweep_recurrent", "--suite", suite, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "r/one.json").read_text())["variants"]["N = 1 alone"][0]
    assert (len(one["test"]["error_px"]), one["test"]["switch_rate"]) == (1, [])
    run = json.loads((tmp_path / "r/seeds.json").read_text())["variants"]["recurrent"][0]
    assert run["by_n_objects"]["2"]["untangled_switch_rate"] is not None
    assert run["by_n_objects"]["1"]["untangled_position_error_px"] == run["by_n_objects"]["1"]["position_error_px"]
    assert [point["step"] for point in run["curve"]] == [1, 2]  # the chosen start, and the end
    ceiling = json.loads((tmp_path / "r/ceiling.json").read_text())["variants"]["ceiling"][0]
    assert len(ceiling["test"]["error_px"]) == 3
    done = script("sweep_recurrent", "--suite", "ablation", "--only", "no such row", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "no variant 'no such row'" in done.stderr
    assert script("learning_curves", "--summary", "r/seeds.json", cwd=tmp_path).returncode == 0
    assert (tmp_path / "r/seeds.png").stat().st_size > 0
    summary = json.loads((tmp_path / "r/seeds.json").read_text())
    run = summary["variants"]["recurrent"][0]
    run["curve"] = run["curve"][:1]
    (tmp_path / "points.json").write_text(json.dumps(summary))
    done = script("learning_curves", "--summary", "points.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "points.json has no learning curves" in done.stderr
    done = script("latent_space", "--run", "r/seeds/recurrent/seed10", "--n-sequences", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "R^2 of the best affine map" in done.stdout
    assert (tmp_path / "r/seeds/recurrent/seed10/latent_space.png").stat().st_size > 0


def test_a_run_of_a_sweep_that_is_killed_is_begun_again(tmp_path):
    command = [*command_of("sweep"), "--seeds", "1", "--steps", "60", "--n-test", "12", "--out", "s"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as sweep:
        workers = []
        while not workers and sweep.poll() is None:
            time.sleep(0.1)
            workers = [
                int(x) for t in Path(f"/proc/{sweep.pid}/task").iterdir() for x in (t / "children").read_text().split()
            ]
        os.kill(workers[0], signal.SIGKILL)
        out, _ = sweep.communicate()
    assert sweep.returncode == 0
    assert "seed 0: killed, restarted" in out
    assert "seed 0: done" in out
    assert json.loads((tmp_path / "s/quick/seed0/result.json").read_text())["steps"] == 60


def test_several_seeds_are_trained_at_once_and_are_those_trained_alone(tmp_path):
    options = ("--n-sequences", 60, "--steps", 2, "--no-progress")
    done = script("train", "--run", "r", "--seed", 3, "--seeds", 2, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert script("train", "--run", "alone", "--seed", 4, *options, cwd=tmp_path).returncode == 0
    together, alone = (
        [json.loads(line)["bound_per_frame"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("r/seed4", "alone")
    )
    assert together == alone
    assert (tmp_path / "r/seed3/training.png").exists()
    done = script("train", "--run", "r", "--seeds", 2, "--starts", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_processes_share_a_training(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--run", "r", "--n-sequences", "60", "--steps", "2", "--no-progress", "--device", "cpu"]
    command = [*launch, "--", ROOT / "examples/train.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("trained 2 steps") == 1
    assert json.loads((tmp_path / "r/config.json").read_text())["schedule"]["parts"] == 2
    assert script("infer", "--run", "r", "--n-sequences", 6, cwd=tmp_path).returncode == 0


def test_the_custom_guide_is_trained_and_measured(tmp_path):
    done = script("custom_guide", "--steps", 3, "--n-sequences", 30, "--n-test", 9, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "N = 3" in done.stdout
    assert "in frame 30" in done.stdout


OWN_GUIDE = """
import pyro.distributions as dist
import torch
from torch import nn
from pyro_pixels.guides.base import Guide
from pyro_pixels.runs import GUIDES

class Nowhere(Guide):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(2))

    def encode(self, images, n_objects):
        shape = (len(images), int(n_objects.max()), images.shape[1], 2)
        return dist.Normal(self.mu.expand(shape), 0.1).to_event(2)

GUIDES["nowhere"] = lambda config, model: Nowhere()
"""


def test_guides_are_compared_and_a_comparison_goes_on_where_it_was(tmp_path):
    (tmp_path / "own.py").write_text(OWN_GUIDE)
    small = ("--n-sequences", 30, "--n-test", 9, "--n-fitted", 3, "--fit-steps", 2, "--out", "g")
    command = ("compare_guides", "--guides", "attentive", "nowhere", "--custom", "own.py", *small)
    done = script(*command, "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "g/guides.json").read_text())["guides"]
    assert list(result) == ["attentive", "nowhere"]
    assert result["nowhere"][0]["parameters"] == 2
    for (run,) in result.values():
        fitted = run["fitted"]
        assert fitted["gap"] == fitted["guide_bound"] - fitted["auto_normal_bound"]
        assert set(run["by_n_objects"]) == {"1", "2", "3"}
    assert done.stdout.count("| nowhere |") == done.stdout.count("| attentive |") == 1
    (tmp_path / "g/nowhere/seed0/result.json").unlink()
    again = script(*command, "--steps", 2, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nowhere, seed 0" in again.stdout
    assert "attentive, seed 0" not in again.stdout
    for wrong in (("--steps", 3), ("--steps", 2, "--guides", "elsewhere"), ("--steps", 2, "--custom", "none.py")):
        done = script(*command, *wrong, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_other_worlds_are_trained_measured_and_drawn(tmp_path):
    options = ("--steps", 2, "--n-sequences", 60, "--n-test", 12, "--out", "w", "--json", "w.json", "--figures", "f")
    done = script("other_worlds", "--cases", "bouncing", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "w.json").read_text())["bouncing"]
    assert "generation_floor_px" not in first["evaluation"]["all"]
    assert (tmp_path / "f/bouncing.png").stat().st_size > 1000
    again = script("other_worlds", "--cases", "bouncing", "drift_grey", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    results = json.loads((tmp_path / "w.json").read_text())
    assert results["bouncing"] == first
    assert results["drift_grey"]["likelihood"]["log_std"] < 0
    assert "generation_floor_px" in results["drift_grey"]["evaluation"]["all"]
    other = script("other_worlds", "--cases", "bouncing", "--steps", 3, *options[2:], cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "another configuration" in other.stderr


def test_a_run_may_be_trained_in_another_world(tmp_path):
    world = ("config:drift-config", "--config.height", 32, "--config.width", 32, "--config.look.salt-and-pepper", 0.02)
    assert script("simulate", "--out", "d.npz", "--n-sequences", 9, *world, cwd=tmp_path).returncode == 0
    options = ("--world", "drift", "--likelihood", "gaussian", "--clutter", 0.01, "--n-sequences", 60, "--steps", 2)
    done = script("train", "--run", "r", *options, "--no-progress", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert (config["data"]["world"], config["likelihood"], config["clutter"]) == ("drift", "gaussian", 0.01)
    done = script("evaluate", "--run", "r", "--data", "d.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_edlstm_is_trained_and_measured(tmp_path):
    options = ("--run", "e", "--state-size", 8, "--n-sequences", 30, "--n-test", 6, "--no-progress")
    done = script("train_edlstm", *options, "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "e/metrics.json").read_text())["all"]
    assert row["nll_per_frame_nats"] > 0
    assert script("train_edlstm", *options, "--steps", 2, cwd=tmp_path).returncode == 2
