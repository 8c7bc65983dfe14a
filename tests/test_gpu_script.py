"""`make gpu`, rehearsed on a CPU: it stops when time is up, goes on from there, and fills the pages."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from benchmarks import bench, gpu, gpu_report
from pyro_pixels._options import check_options

ROOT = Path(__file__).parent.parent
MARKERS = "<!-- begin {0} -->\nnothing yet\n<!-- end {0} -->\nkept\n"
SLEEPER = """
import signal, sys, time
from pathlib import Path
at = Path(sys.argv[1])
def save(*_):
    (at / "checkpoint.pt").write_text("half")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
(at / "begun").write_text("")
time.sleep(0 if (at / "checkpoint.pt").exists() else 600)
(at / "metrics.jsonl").write_text('{"step": 7, "seconds": 1.5, "bound_per_frame": -3.0}')
"""


@pytest.fixture
def pages(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for page, part in (("performance", "gpu speed"), ("reproduction", "gpu learning")):
        (docs / f"{page}.md").write_text(MARKERS.format(part))
    return docs


def test_a_job_stops_when_time_is_up_and_goes_on_the_next_time(tmp_path, pages, monkeypatch, capsys):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    job = gpu.Job(
        "paper", lambda args: [str(tmp_path / "sleeper.py"), str(gpu.folder(args, "paper"))], gpu.learned, least=0
    )
    monkeypatch.setattr(gpu, "JOBS", (job, replace(job, name="never", least=1e9)))
    monkeypatch.setattr(gpu, "GRACE", 30.0)
    args = gpu.Arguments(
        minutes=(30 + 8) / 60, runs=tmp_path / "runs", results=tmp_path / "results", docs=pages, device="cpu"
    )
    assert gpu.main(args) == 0
    file = tmp_path / "results/cpu/paper.json"
    first = json.loads(file.read_text())
    assert (first["state"], first["exit_code"]) == ("stopped", 130)
    assert (tmp_path / "runs/paper/checkpoint.pt").exists()
    assert "never: not started" in capsys.readouterr().out
    assert gpu.main(replace(args, minutes=None, only=("paper",))) == 0
    second = json.loads(file.read_text())
    assert second["state"] == "done"
    assert second["seconds"] >= first["seconds"]
    assert second["environment"]["torch"]
    page = (pages / "reproduction.md").read_text()
    assert "| paper | 7 | 2 | -3.0 |" in page
    assert "kept" in page
    assert gpu.main(replace(args, minutes=None, only=("paper",))) == 0
    assert "paper: already done" in capsys.readouterr().out


def test_a_rehearsal_touches_neither_pages_nor_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    job = gpu.Job("steps", lambda args: ["-c", ""], lambda at, args: {}, least=0)
    monkeypatch.setattr(gpu, "JOBS", (job,))
    assert gpu.main(gpu.Arguments(runs=tmp_path / "runs", device="cpu", tiny=True)) == 0
    assert (tmp_path / "runs/results/cpu/steps.json").exists()
    assert list((tmp_path / "docs").iterdir()) == []


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no job 'dance'"):
        gpu.main(gpu.Arguments(only=("dance",), device="cpu"))
    with pytest.raises(ValueError, match="--minutes is 0; wanted a number above 0"):
        gpu.main(gpu.Arguments(minutes=0, device="cpu"))
    job = gpu.Job("lost", lambda args: ["-c", "raise SystemExit('no memory')"], gpu.learned, 0)
    args = gpu.Arguments(runs=tmp_path, results=tmp_path)
    assert gpu.do(job, args, tmp_path, time.monotonic() + 100, {}) == "failed"
    assert json.loads((tmp_path / "lost.json").read_text())["tail"] == ["no memory"]


def test_times_of_steps_are_shown_for_each_n_and_on_average():
    variants = {"as it is": [0.002, 0.003], "without": [0.001, 0.001]}
    found = {"paper, N = 1": variants, "paper, N = 3": {"as it is": [0.004, 0.005], "without": [0.002, 0.002]}}
    about = {"device": "a card", "torch": "2", "python": "3", "pyro": "1", "commit": "0123456789"}
    shown = gpu_report.speed({"kernels": {"found": {"kernels": {"seconds": found}}, "environment": about}})
    assert "| step, ms | as it is | without |" in shown
    assert "| paper, mean over N | 3.50 (3.25 to 3.75) | 1.50 (1.50 to 1.50) |" in shown
    assert "| paper, N = 1 | 2.50 (2.25 to 2.75) | 1.00 (1.00 to 1.00) |" in shown


def test_seeds_at_once_are_shown_beside_one_alone():
    found = {"steps_per_second": [200.0, 200.0, 200.0], "alone": 500.0}
    about = {"device": "a card", "torch": "2", "python": "3", "pyro": "1", "commit": "0123456789"}
    shown = gpu_report.speed({"seeds": {"found": found, "environment": about}})
    assert "| 3 seeds at once | 200 steps a second each | one alone: 500 steps a second, 2.5 times as many |" in shown


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("name", ["steps", "by_hand", "kernels"])
def test_the_options_of_the_benchmarks_are_accepted(tmp_path, name, tiny):
    (job,) = (job for job in gpu.JOBS if job.name == name)
    options = job.command(gpu.Arguments(runs=tmp_path, device="cpu", tiny=tiny))[2:]
    check_options(tyro.cli(bench.Arguments, args=options))


def test_the_pages_hold_what_the_files_say(tmp_path):
    """The tables between the markers are those that the committed results give, and every file is small."""
    for page in ("performance", "reproduction"):
        (tmp_path / f"{page}.md").write_text((ROOT / f"docs/{page}.md").read_text())
    gpu_report.fill(tmp_path, ROOT / "docs/results/gpu")
    for page in ("performance", "reproduction"):
        assert (tmp_path / f"{page}.md").read_text() == (ROOT / f"docs/{page}.md").read_text()
    assert all(file.stat().st_size < 2**20 for file in (ROOT / "docs/results/gpu").rglob("*.json"))


@pytest.mark.slow
def test_everything_is_rehearsed_from_end_to_end(tmp_path, pages):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--runs", str(tmp_path / "runs"),
               "--results", str(tmp_path / "results"), "--docs", str(pages)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results/cpu").iterdir()}
    assert found.keys() == {job.name for job in gpu.JOBS}
    assert {result["state"] for result in found.values()} == {"done"}
    assert all(result["environment"]["commit"] for result in found.values())
    assert found["paper_learned"]["found"]["evaluation"]["by_n_objects"].keys() == {"1", "2", "3"}
    for page in ("performance", "reproduction"):
        text = (pages / f"{page}.md").read_text()
        assert "nothing yet" not in text
        assert "kept" in text
