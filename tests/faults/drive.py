"""Runs the long fault tests, counts what happened, and writes it.

    PYTHONPATH=.:examples python tests/faults/drive.py KIND [--n N]

KIND is one of `KINDS`: kills are those at random times, writes those at every write. Kills go on where they were
stopped: the counts lie beside the folders of the runs. One process at a time; `nice -n 15` leaves the machine to
others. Results go to docs/results/reliability.json, one entry for each kind.
"""

import argparse
import contextlib
import json
import platform
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad
import numpy as np
import pytest
import test_damage
import test_falsified
import test_files
import test_kills
import torch
from tiny import kill_in, outcome_of, train

from pyro_pixels._files import atomic_write

RESULTS = bad.ROOT / "docs/results/reliability.json"
MOST_KILLS, LATEST = 4, 0.5  # of a run, and seconds from its start


def kills(work: Path, n: int, seed: int) -> dict[str, Any]:
    """SIGKILL at random times; every run is resumed until it has ended, and compared with one that was not killed."""
    file = work / "kills.json"
    found = json.loads(file.read_text()) if file.exists() else {"kills": 0, "runs": 0, "lost": 0, "seconds": 0.0}
    shutil.rmtree(work / "whole", ignore_errors=True)
    train(work / "whole")
    whole = outcome_of(work / "whole")
    while found["kills"] < n:
        began, folder = time.monotonic(), work / f"run{found['runs']}"
        shutil.rmtree(folder, ignore_errors=True)
        rng = random.Random(1_000 * seed + found["runs"])
        times = [rng.uniform(0.0, LATEST) for _ in range(MOST_KILLS)]
        found["kills"] += test_kills.finish(folder, whole, [kill_in(t) for t in times])  # asserts the outcome
        found["runs"] += 1
        found["seconds"] = round(found["seconds"] + time.monotonic() - began, 1)
        with atomic_write(file) as out:
            out.write(json.dumps(found).encode())
        shutil.rmtree(folder)
    return {**found, "seed": seed}


def writes(work: Path, n: int, seed: int) -> dict[str, Any]:
    """SIGKILL before and after each write of a run."""
    train(work / "whole")
    whole, killed, write = outcome_of(work / "whole"), 0, 0
    while here := test_kills.kill_at((write + 1,), work, whole):
        write, killed = write + 1, killed + here
    return {"kills": killed, "writes": write, "lost": 0}


def damage(work: Path, n: int, seed: int) -> dict[str, Any]:
    """Flipped bits and cuts of every file of a run."""
    folder = work / "run"
    test_damage.make(folder)
    return {"n": n, **test_damage.damaged_and_used(folder, work, n, seed), "wrong": 0, "seed": seed}


def packaged(work: Path, n: int, seed: int) -> dict[str, Any]:
    """The same of packaged weights."""

    with pytest.MonkeyPatch.context() as patch:
        counts = test_damage.packaged_and_damaged(work, patch, n, seed)
    return {"n": n, **counts, "wrong": 0, "seed": seed}


def fuzz(work: Path, n: int, seed: int) -> dict[str, Any]:
    """Changed files of sequences and checkpoints for ``n`` seconds."""
    seeds, rng, files, refused = test_files.make_seeds(work), np.random.default_rng(seed), 0, 0
    started = time.monotonic()
    while time.monotonic() - started < n:
        refused += test_files.fuzz_once(seeds, work, rng)
        files += len(seeds)
    return {"seconds": n, "files": files, "refused": refused, "crashes": 0, "seed": seed}


def rivals(work: Path, n: int, seed: int) -> dict[str, Any]:
    """Two, and eight, processes that train in one folder at once, ``n`` times each."""
    found = {}
    for processes in (2, 8):
        for i in range(n):
            test_falsified.check_rivals(work / f"{processes}_{i}", processes)
        found[f"{processes} processes"] = {"times": n, "trained": n, "refused": n * (processes - 1)}
    return found


def full_disk(work: Path, n: int, seed: int) -> dict[str, Any]:
    """A disk that is full from the first, second, ... call of its kind on; the run is resumed once there is room."""
    train(work / "whole")
    whole, found = outcome_of(work / "whole"), {}
    for call in ("open", "fsync", "replace"):
        after = 0
        while test_files.train_on_a_full_disk(work / f"{call}{after}", whole, call, after):
            after += 1
        found[call] = after
    return {"times": sum(found.values()), "by call": found, "lost": 0}


def lines(work: Path, n: int, seed: int) -> dict[str, Any]:
    """Every command line that is made from the fields of the scripts' arguments."""
    import test_command_lines

    with contextlib.chdir(work):
        wrong = [x for name, line in test_command_lines.LINES
                 if (x := test_command_lines.refused(test_command_lines.SCRIPTS[name], line))]  # fmt: skip
    assert not wrong, wrong[:5]
    return {"lines": len(test_command_lines.LINES), "scripts": len(test_command_lines.SCRIPTS), "wrong": 0}


KINDS: dict[str, tuple[Callable[[Path, int, int], dict[str, Any]], int]] = {
    "kills": (kills, 200), "writes": (writes, 0), "damage": (damage, 3_000), "packaged": (packaged, 1_000),
    "fuzz": (fuzz, 600), "rivals": (rivals, 10), "full_disk": (full_disk, 0), "lines": (lines, 0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--n", type=int, help="kills, changes, or seconds of fuzzing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    drive, usual = KINDS[args.kind]
    n, work = usual if args.n is None else args.n, (args.work / args.kind).resolve()
    if args.kind != "kills":
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = drive(work, n, args.seed)
    found.setdefault("seconds", round(time.monotonic() - began, 1))
    found["command"] = f"PYTHONPATH=.:examples python tests/faults/drive.py {args.kind} --n {n} --seed {args.seed}"
    found["versions"] = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    results[args.kind] = found
    with atomic_write(args.json) as out:
        out.write(json.dumps(results, indent=1).encode() + b"\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
