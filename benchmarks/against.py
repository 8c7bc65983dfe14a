"""Compares the quick preset's training step with the same step at an earlier commit, alternating (A B A B ...).

Each version runs in its own process, from its own files, and takes one step per request, so that other load on the
machine affects both alike.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Stopwatch

ROOT = Path(__file__).parent.parent
COMMIT = "478dc58"  # before the step was made faster
WORKER = """
import json, sys, time
tree, n_threads = sys.argv[1], int(sys.argv[2])
import torch
torch.set_num_threads(n_threads)
import pyro_pixels
assert pyro_pixels.__file__.startswith(tree), pyro_pixels.__file__
try:
    from benchmarks.steps import PRESETS, OurStep, make_step, with_objects
except ImportError:  # a flat folder, as it was
    from steps import PRESETS, OurStep, make_step, with_objects
config, device = PRESETS["quick"], torch.device("cpu")
steps = {N: make_step(OurStep, with_objects(config, N), device) for N in config.data.n_objects}
for step in steps.values():
    for _ in range(3):
        step()
print("ready", flush=True)
for line in sys.stdin:
    step, wall, busy = steps[int(line)], time.perf_counter(), time.process_time()
    step()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - busy]), flush=True)
"""


class Version:
    """A process that takes training steps with the package in a folder."""

    def __init__(self, tree: Path, n_threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(n_threads),
            "PYTHONPATH": f"{tree}:{tree}/benchmarks:{tree}/examples",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tree), str(n_threads)],
            cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise ValueError(
                f"the package in {tree} cannot run training steps; is it a commit with benchmarks/steps.py?"
            )

    def step(self, N: int) -> tuple[float, float]:
        """Takes a step on sequences with N objects; returns its wall-clock and processor seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(N, file=self._process.stdin, flush=True)
        wall, busy = json.loads(self._process.stdout.readline())
        return wall, busy

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def checkout(commit: str, folder: Path) -> Path:
    """Extracts a commit into a folder, which it returns. Raises ValueError if this is no clone with that commit."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"there is no commit {commit} here; run this in a clone with the full history")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def compare(commit: str = COMMIT, rounds: int = 15, n_threads: int = 1) -> dict[str, Any]:
    """Returns step times of each round for N = 1, 2, 3, at the commit ("before") and here ("now"), and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        versions = {"before": Version(checkout(commit, Path(folder)), n_threads), "now": Version(ROOT, n_threads)}
        seconds = {name: {"wall": [], "busy": []} for name in versions}
        for _ in range(rounds):
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
            for N in (1, 2, 3):
                for name, version in versions.items():
                    taken[name].append(version.step(N))
            for name, each in taken.items():
                for kind, times in zip(("wall", "busy"), zip(*each)):
                    seconds[name][kind].append(list(times))
        for version in versions.values():
            version.close()
    return {"commit": commit, "threads": n_threads, "seconds": seconds, "ratio": ratios(seconds)}


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Runs `compare` for `bench.py`; returns why it was skipped if the commit is missing or the device is not a CPU."""
    if watch.device.type != "cpu":
        return {"skipped": f"{watch.device.type}: both versions run on a CPU"}
    try:
        return compare(rounds=watch.rounds, n_threads=torch.get_num_threads())
    except ValueError as error:
        return {"skipped": str(error)}


def ratios(seconds: dict[str, dict[str, list[list[float]]]]) -> dict[str, float]:
    """Returns how many times as fast the step is now: medians over rounds, for the mean over N and for each N."""
    before, now = seconds["before"], seconds["now"]
    found = {}
    for kind in before:
        pairs = list(zip(before[kind], now[kind]))
        found[f"mean over N, {kind}"] = statistics.median(sum(b) / sum(n) for b, n in pairs)
        for i in range(3):
            found[f"N = {i + 1}, {kind}"] = statistics.median(b[i] / n[i] for b, n in pairs)
    return found
