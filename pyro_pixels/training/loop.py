"""The training loop: steps, evaluations, checkpoints, and resuming at any step.

A `Loop` is independent of what is trained. `svi.Training` trains a model and its guide by SVI; `evaluation.ed_lstm`
trains the paper's baseline with the same loop.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

from pyro_pixels._lock import check_still_there, locked
from pyro_pixels.training.checkpoints import (
    load_checkpoint,
    read_lines,
    save_checkpoint,
    stop_signals,
    write_config,
    write_lines,
)
from pyro_pixels.training.processes import is_first_process, n_processes

LOOK_EVERY = 20  # steps between reads of the loss, which synchronise with the device


class FitResult(NamedTuple):
    """The outcome of a training."""

    step: int
    """The total number of steps done."""
    seconds: float
    """The time spent training, resumed parts included."""
    metrics: dict[str, float]
    """The last line of metrics.jsonl."""
    interrupted: bool
    """Whether Ctrl-C or SIGTERM stopped the training; a checkpoint was then saved, unless `fit` still compared
    candidates."""
    diverged: str = ""
    """What was no longer finite, and when, if a training of `fit_together` stopped for that reason; else empty."""


class Loop(ABC):
    """A training run that can stop and resume at any step; subclasses define a step, its metrics and its state.

    Args:
        n_steps: the total number of steps.
        evaluate_every: the number of steps between evaluations, each with a line in metrics.jsonl and a checkpoint.
        device: the device of the training.
        run_dir: the folder for metrics.jsonl and checkpoint.pt; with None nothing is written.
        on_evaluation: called with each line of metrics, after it and the checkpoint have been written.
        config: a dataclass, written to config.json after the contents of ``run_dir`` have been checked.
    """

    def __init__(
        self,
        n_steps: int,
        evaluate_every: int,
        *,
        device: torch.device,
        run_dir: str | Path | None = None,
        on_evaluation: Callable[[dict[str, float]], None] | None = None,
        config: Any = None,
    ) -> None:
        self.config = config
        self.n_steps, self.evaluate_every, self.device = n_steps, evaluate_every, device
        self.run_dir, self.on_evaluation = None if run_dir is None else Path(run_dir), on_evaluation
        self.step, self.seconds = 0, 0.0
        self.since = {"steps": 0.0, "seconds": 0.0}  # since the last evaluation
        self.seen: Mapping[str, float] = {}
        self.metrics: dict[str, float] = {}

    @abstractmethod
    def _take_step(self) -> None:
        """Takes step number `step`, counted from 0."""

    @abstractmethod
    def _look(self) -> Mapping[str, float]:
        """Returns means over the steps since the last evaluation; FloatingPointError if the loss is not finite."""

    @abstractmethod
    def _line(self) -> dict[str, float]:
        """Returns the metrics of a line besides step and time, from `seen`, and resets the running means."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Returns everything that the next step depends on."""

    @abstractmethod
    def _restore(self, state: dict[str, Any], source: str | Path) -> None:
        """Restores the state that `_state` returned."""

    @abstractmethod
    def _check(self, state: dict[str, Any], path: Path) -> None:
        """Raises ValueError if a checkpoint is of another training, or lacks something that `_restore` needs."""

    @abstractmethod
    def _not_finite(self) -> str | None:
        """Returns the name of a value in the state that is not finite, or "the loss"; None if all are finite."""

    def _evaluating(self) -> AbstractContextManager[None]:
        """Returns the context of an evaluation, during training."""
        return nullcontext()

    def begin(self, resume: bool) -> None:
        """Prepares the first step, or with ``resume`` restores the checkpoint."""
        lines: list[dict[str, float]] = []
        if resume:
            lines = self._load()
        elif self.run_dir is not None and (self.run_dir / "checkpoint.pt").exists():
            raise ValueError(f"{self.run_dir} holds a trained run; give resume=True to continue it, or another folder")
        if self.run_dir is not None and is_first_process():  # everything read has been checked, so writing is safe
            if self.config is not None:
                write_config(self.run_dir, self.config)
            write_lines(self.run_dir, lines)

    def result(self, stop: threading.Event) -> FitResult:
        """Returns the outcome; if training was stopped before its last step, its state is saved first."""
        interrupted = stop.is_set() and self.step < self.n_steps
        if interrupted:
            self._save()
        return FitResult(self.step, self.seconds, self.metrics, interrupted)

    def train(
        self, stop: threading.Event, until: int | None = None, *, progress: bool = True, title: str | None = None
    ) -> None:
        """Trains up to step ``until``, by default the last one."""
        until = self.n_steps if until is None else until
        with tqdm(
            total=until, initial=self.step, disable=not progress, unit="step", mininterval=0.5, desc=title
        ) as bar:
            for _ in self.advance(until, stop):
                bar.update()
                if self.step % LOOK_EVERY == 0:
                    bar.set_postfix({name: f"{x:.3g}" for name, x in self.seen.items()}, refresh=False)

    def advance(self, until: int, stop: threading.Event) -> Iterator[None]:
        """Trains up to step ``until`` and yields after each step; random draws of the caller do not affect training."""
        started = time.perf_counter() - self.seconds
        while self.step < until and not self._must_stop(stop):
            self._take_step()
            self.step += 1
            self.since["steps"] += 1
            evaluate = self.step % self.evaluate_every == 0 or self.step == self.n_steps
            if evaluate or self.step % LOOK_EVERY == 0:
                self.seen = self._look()
            now = time.perf_counter() - started
            self.since["seconds"] += now - self.seconds
            self.seconds = now
            if evaluate:
                with self._evaluating():
                    self._evaluate()
                    self._save()
                    if self.on_evaluation is not None and is_first_process():
                        self.on_evaluation(self.metrics)
                started = time.perf_counter() - self.seconds
            yield

    def _must_stop(self, stop: threading.Event) -> bool:
        """Tells whether to stop now; several processes agree on this every `LOOK_EVERY` steps."""
        if n_processes() == 1:
            return stop.is_set()
        if self.step % LOOK_EVERY:
            return False
        any_of_them = torch.tensor(float(stop.is_set()), device=self.device)
        torch.distributed.all_reduce(any_of_them)
        if bool(any_of_them):
            stop.set()
        return stop.is_set()

    def _evaluate(self) -> None:
        self.metrics = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(self.since["steps"] / self.since["seconds"], 3),
            **self._line(),
        }
        self.since = dict.fromkeys(self.since, 0.0)
        if self.run_dir is not None and is_first_process():
            check_still_there(self.run_dir)
            write_lines(self.run_dir, [*read_lines(self.run_dir), self.metrics])

    def _save(self) -> None:
        if self.run_dir is None:
            return
        state, bad = self._state(), self._not_finite()  # needs all processes
        if bad is not None:
            raise FloatingPointError(f"{bad} is not finite at step {self.step}; {self._kept()}")
        if is_first_process():
            check_still_there(self.run_dir)
            save_checkpoint(self.run_dir / "checkpoint.pt", state)

    def _load(self) -> list[dict[str, float]]:
        """Restores the checkpoint, after checking all of it, and returns the lines of metrics up to its step."""
        if self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run to continue")
        path = self.run_dir / "checkpoint.pt"
        state = load_checkpoint(path)
        self._check(state, path)
        lines = [line for line in read_lines(self.run_dir) if line["step"] <= state["step"]]
        self._restore(state, path)
        self.metrics = lines[-1] if lines else {}
        return lines

    def _kept(self) -> str:
        """Returns the part of an error message that tells what is left of a training that diverged."""
        if self.run_dir is not None and (self.run_dir / "checkpoint.pt").exists():
            return f"{self.run_dir / 'checkpoint.pt'} holds the last good state"
        return "no checkpoint had been written"


@contextmanager
def prepared(loops: Sequence[Loop], resume: bool) -> Iterator[threading.Event]:
    """Locks the folders, sets the global state that training needs and begins every loop; yields an event that stops
    them."""
    cuda = [loop.device for loop in loops if loop.device.type == "cuda"][:1]
    with (
        locked(*(loop.run_dir for loop in loops if is_first_process())),
        torch.random.fork_rng(devices=cuda),
        pyro.validation_enabled(False),
        stop_signals() as stop,
    ):
        for loop in loops:
            loop.begin(resume)
        yield stop
