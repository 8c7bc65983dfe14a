"""Runs all jobs that need a GPU, most useful first: `make gpu`, or `make gpu ARGS="--minutes 9"` on a borrowed one.

Jobs are the tests, steps beside the literal program, the quickstart, steps with other kernels, several seeds at once,
and trainings at the paper's size. Each writes a small JSON file to --results with its measurements, device, driver,
versions and commit. Finished jobs are not repeated. When time is up, the running training receives SIGTERM, saves, and
resumes the next time. At the end the tables are inserted into the pages, between their markers <!-- begin gpu ... -->.
"""

from examples._common import device_of, start, write_json

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report
from pyro_pixels._options import Positive
from pyro_pixels.result_tables import environment

ROOT = Path(__file__).resolve().parents[1]

GRACE = 45.0  # seconds for a training to save and exit


@dataclass
class Arguments:
    minutes: Positive | None = None
    """Stop cleanly after this many minutes; default: when everything is done."""
    only: tuple[str, ...] = ()
    """Jobs to run; default: all."""
    runs: Path = Path("runs/gpu")
    """Folder for the trainings."""
    results: Path | None = None
    """Folder for the JSON files, in a subfolder named after the device; default: docs/results/gpu, in a rehearsal a
    folder in --runs."""
    docs: Path | None = None
    """Folder of the pages to fill; default: docs, in a rehearsal none."""
    device: str = "cuda"
    tiny: bool = False
    """A rehearsal: a few tests, steps and sequences."""
    again: bool = False
    """Repeat finished jobs."""


@dataclass(frozen=True)
class Job:
    """A job for a GPU."""

    name: str
    command: Callable[[Arguments], Sequence[str]]
    measured: Callable[[Path, Arguments], dict[str, Any]]
    """Returns the results to keep, from the job's folder."""
    least: float
    """Seconds that must be left, besides `GRACE`, for the job to start."""
    then: Callable[[Arguments], Sequence[str]] | None = None
    """Command to run once the first has succeeded, such as an evaluation."""


def folder(args: Arguments, name: str) -> Path:
    return args.runs / name


def tests(args: Arguments) -> list[str]:
    chosen = ["tests/test_gpu.py", "-k", "validation", "-m", "not gpu"] if args.tiny else ["-m", "gpu"]
    report = folder(args, "tests") / "junit.xml"
    return ["-m", "pytest", "-q", "-n", "4", *chosen, f"--junitxml={report.resolve()}"]


def count_tests(at: Path, args: Arguments) -> dict[str, Any]:
    text = (at / "junit.xml").read_text()
    found = {key: int(re.search(rf'{key}="(\d+)"', text)[1]) for key in ("tests", "failures", "errors", "skipped")}  # type: ignore[index]
    failed = re.findall(r'<testcase [^>]*name="([^"]+)"[^>]*><(?:failure|error)', text)
    return {**found, "failed": failed}


def bench(name: str, part: str, *, paper: bool = False) -> Callable[[Arguments], list[str]]:
    """One part of ``make bench``, in its own process, since a failed recording may break whatever runs after it."""

    def command(args: Arguments) -> list[str]:
        few = ["--rounds", "1", "--seconds", "0.1"] if args.tiny else ["--paper"] if paper else []
        options = ["--only", part, "--device", args.device, "--name", name, "--out", str(folder(args, name))]
        return ["-m", "benchmarks.bench", *options, *few]

    return command


def training(name: str, *options: str) -> Callable[[Arguments], list[str]]:
    """`train.py` with these options, resumed from the run's checkpoint if there is one."""

    def command(args: Arguments) -> list[str]:
        run = folder(args, name)
        short = ["--steps", "4", "--n-sequences", "60"] if args.tiny else []
        again = ["--resume"] if (run / "checkpoint.pt").exists() else []
        return ["examples/train.py", "--run", str(run), "--device", args.device, "--no-progress", *options, *short,
                *again]  # fmt: skip

    return command


def evaluation(name: str) -> Callable[[Arguments], list[str]]:
    def command(args: Arguments) -> list[str]:
        few = ["--n-sequences", "12"] if args.tiny else []
        return ["examples/evaluate.py", "--run", str(folder(args, name)), "--device", args.device, *few]

    return command


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def learned(at: Path, args: Arguments) -> dict[str, Any]:
    """Returns at most 60 lines of metrics.jsonl, evenly spaced, and the evaluation if there is one."""
    file = at / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    thin = max(1, len(lines) // 30)
    return {"metrics": [*lines[:-1:thin], *lines[-1:]], "evaluation": read(at / "metrics.json")}


def seeds(n: int | None) -> Callable[[Arguments], list[str]]:
    """Short trainings of the paper's preset with n seeds at once, or of one alone."""

    def command(args: Arguments) -> list[str]:
        run = folder(args, "seeds") / ("alone" if n is None else "")
        many = [] if n is None else ["--seeds", str(2 if args.tiny else n)]
        short = ["--steps", "4", "--n-sequences", "60"] if args.tiny else ["--steps", "1000"]
        return ["examples/train.py", "--run", str(run), "--preset", "paper", "--no-progress", "--device", args.device,
                *many, *short]  # fmt: skip

    return command


def rates(at: Path, args: Arguments) -> dict[str, Any]:
    def last(file: Path) -> float:
        return json.loads(file.read_text().splitlines()[-1])["steps_per_second"]

    alone = at / "alone/metrics.jsonl"
    return {
        "steps_per_second": [last(file) for file in sorted(at.glob("seed*/metrics.jsonl"))],
        "alone": last(alone) if alone.exists() else None,
    }


def quickstart(args: Arguments) -> list[str]:
    return ["examples/quickstart.py", "--run", str(folder(args, "quickstart")), "--device", args.device,
            *(["--steps", "4"] if args.tiny else [])]  # fmt: skip


def edlstm(args: Arguments) -> list[str]:
    run = folder(args, "edlstm")
    small = ["--steps", "2", "--state-size", "8", "--n-sequences", "30", "--n-test", "6"]
    options = small if args.tiny else ["--preset", "paper"]
    again = ["--resume"] if (run / "checkpoint.pt").exists() else []
    script = ["-m", "examples.experiments.train_edlstm", "--run", str(run), "--device", args.device, "--no-progress"]
    return [*script, *options, *again]


def trained(name: str, *options: str) -> Job:
    return Job(name, training(name, *options), learned, 60, evaluation(name))


JOBS = (
    Job("tests", tests, count_tests, 60),
    Job("steps", bench("steps", "step", paper=True), lambda at, args: read(at / "steps.json"), 60),
    Job("kernels", bench("kernels", "kernels"), lambda at, args: read(at / "kernels.json"), 60),
    Job("quickstart", quickstart, learned, 40),
    Job("by_hand", bench("by_hand", "by_hand"), lambda at, args: read(at / "by_hand.json"), 60),
    trained("paper_learned", "--preset", "paper_learned"),
    Job("seeds", seeds(8), rates, 60, seeds(None)),
    trained("paper", "--preset", "paper"),
    trained("paper_structured", "--preset", "paper", "--guide", "structured"),
    Job("edlstm", edlstm, learned, 60),
)


def measured_with(device: torch.device) -> dict[str, Any]:
    """Returns device, driver, versions, commit and date."""
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        **environment(device),
        "driver": driver,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


def run(command: Sequence[str], left: float, log: Path) -> tuple[int, bool]:
    """Runs a script until it ends or time is up; returns its exit code, and whether it was stopped."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages may be elsewhere
    environment = {**os.environ, "PYTHONPATH": path}
    with (
        log.open("a") as out,
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            return process.wait(timeout=max(1.0, left - GRACE)), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(timeout=GRACE), True
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), True


def do(job: Job, args: Arguments, results: Path, until: float, about: dict[str, Any]) -> str:
    """Runs a job for as long as time allows, and writes its JSON file; returns done, stopped, or failed."""
    at, file = folder(args, job.name), results / f"{job.name}.json"
    at.mkdir(parents=True, exist_ok=True)
    before = 0.0 if args.again else (read(file) or {}).get("seconds", 0.0)
    begun = time.monotonic()
    code, stopped = run(job.command(args), until - begun, at / "log.txt")
    if code == 0 and not stopped and job.then is not None:
        code, stopped = run(job.then(args), until - time.monotonic(), at / "log.txt")
    state = "stopped" if stopped or code == 130 else "done" if code == 0 else "failed"
    try:
        found = job.measured(at, args)
    except (OSError, ValueError, TypeError, IndexError) as error:
        found, state = {"error": str(error)}, "failed" if state == "done" else state
    seconds = round(before + time.monotonic() - begun, 1)
    tail = (at / "log.txt").read_text().splitlines()[-5:]
    write_json(file, {"job": job.name, "state": state, "seconds": seconds, "exit_code": code, "tail": tail,
                      "environment": about, "found": found})  # fmt: skip
    return state


def main(args: Arguments) -> int:
    device = device_of(args.device)
    unknown = set(args.only) - {job.name for job in JOBS}
    if unknown:
        raise ValueError(f"there is no job '{min(unknown)}'; wanted some of {[job.name for job in JOBS]}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes}; wanted a number above 0")
    until = time.monotonic() + (float("inf") if args.minutes is None else 60 * args.minutes)
    until = min(until, time.monotonic() + 7 * 86_400)
    about = measured_with(device)
    home = args.results or (args.runs / "results" if args.tiny else Path("docs/results/gpu"))
    docs = args.docs or (None if args.tiny else Path("docs"))
    results = home / re.sub(r"[^a-z0-9]+", "_", str(about["device"]).lower()).strip("_")
    results.mkdir(parents=True, exist_ok=True)
    failed = False
    for job in (job for job in JOBS if not args.only or job.name in args.only):
        there = read(results / f"{job.name}.json")
        if there is not None and there["state"] == "done" and not args.again:
            print(f"{job.name}: already done, {there['environment']['commit']}")
            continue
        left = until - time.monotonic()
        if left < (0 if args.tiny else job.least + GRACE):
            print(f"{job.name}: not started, {left:.0f} s left; repeat the command to continue")
            continue
        print(f"{job.name} ...", end=" ", flush=True)
        state = do(job, args, results, until, about)
        failed = failed or state == "failed"
        print(state, flush=True)
    if docs is not None:
        gpu_report.fill(docs, home)
    return int(failed)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
