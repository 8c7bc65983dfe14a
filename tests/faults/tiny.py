"""A tiny run that trains in a tenth of a second, trainings in forked processes, and what is compared of a run."""

import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyro_pixels.config import RunConfig
from pyro_pixels.runs import build
from pyro_pixels.training.checkpoints import load_checkpoint, read_lines
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

WORLD = CannonballConfig(n_frames=6, height=8, width=8, radius=1.0, n_objects=(1, 2))
TINY = RunConfig(
    guide="recurrent",
    state_size=8,
    data=WORLD,
    n_sequences=8,
    schedule=Schedule(steps=6, batch_size=4, evaluate_every=2, learn_from={}),
)
DATA = simulate(WORLD, 8, seed=0)
TIMES = ("seconds", "steps_per_second")
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import torch


def train(folder: Path, *, resume: bool = False, config: RunConfig = TINY) -> None:
    """Trains the tiny run, or goes on with it, in this process."""
    run = build(config)
    fit(
        run.model, run.guide, DATA, config.schedule, run_dir=folder, resume=resume, config=config, progress=False,
        validation=DATA[:2],
    )  # fmt: skip


def train_or_resume(folder: Path) -> None:
    train(folder, resume=(folder / "checkpoint.pt").exists())


def outcome_of(folder: Path) -> dict[str, Any]:
    """All of a run that a kill, a flip or a rival must not change."""
    state = load_checkpoint(folder / "checkpoint.pt")
    tensors = {f"{part}.{k}": x for part in ("model", "guide") for k, x in state[part].items()}
    tensors |= {f"{i}.{k}": x for i, kept in state["optimizer"]["state"].items() for k, x in kept.items()}
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder)]
    config = json.loads((folder / "config.json").read_bytes())
    return {"step": state["step"], "tensors": {**tensors, "rng": state["rng"]}, "lines": lines, "config": config}


def assert_same_outcome(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["step"] == b["step"]
    assert a["lines"] == b["lines"]
    assert a["config"] == b["config"]
    assert a["tensors"].keys() == b["tensors"].keys()
    assert all(torch.equal(x, b["tensors"][name]) for name, x in a["tensors"].items())


def in_a_fork(work: Callable[[], None], *, prepare: Callable[[], None] = lambda: None) -> int:
    """The exit code of a forked process that does some work; minus the signal, if one killed it."""

    def body() -> None:
        torch.set_num_threads(1)
        prepare()
        work()

    process = FORK.Process(target=body)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "a training hangs"
    return process.exitcode


WRITES = ("open", "fsync", "replace", "unlink")


def kill_at_write(n: int, after: bool = False) -> Callable[[], None]:
    """Kills the process before, or after, the n-th of the calls that writing files is made of."""

    def prepare() -> None:
        count = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == n and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                here = count == n
                try:
                    return call(*args, **options)
                finally:
                    if here:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        for name in WRITES:
            setattr(os, name, counted(getattr(os, name)))

    return prepare


def kill_in(seconds: float) -> Callable[[], None]:
    """Kills the process some time after it has begun, wherever it is."""

    def prepare() -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    return prepare


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A content with one bit flipped, or cut, and what was done to it."""
    if rng.random() < 0.15 and content:
        n = rng.randrange(len(content))
        return content[:n], f"cut to {n} bytes"
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed), f"bit {bit} of byte {place} flipped"


def with_schedule(**changes: Any) -> RunConfig:
    return replace(TINY, schedule=replace(TINY.schedule, **changes))
