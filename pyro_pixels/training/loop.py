"""One training run, from step to step: the batches of Sec 3.2, evaluations, checkpoints, and resuming at any step."""

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as processes
from torch import Tensor, nn
from tqdm import tqdm

from pyro_pixels._batch import Known, object_mask
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.training.checkpoints import load_checkpoint, load_weights, read_lines, save_checkpoint, write_lines
from pyro_pixels.training.elbo import AnnealedELBO, bound
from pyro_pixels.training.schedule import Schedule, by_longest_prefix
from pyro_pixels.training.start_mixture import fit_starts
from pyro_pixels.training.step_runners import Batch, CapturedSteps, DistributedSteps, Steps

FIT_STARTS_SEQUENCES = 500
BOUND_SEQUENCES = 60  # on which candidates are compared where there are no validation sequences
LOOK_EVERY = 20  # steps between looks at the loss, for each of which the device is waited for


class FitResult(NamedTuple):
    """How training ended."""

    step: int
    """Steps done in all."""
    seconds: float
    """Time spent training, over all resumed parts."""
    metrics: dict[str, float]
    """The last line of metrics.jsonl."""
    interrupted: bool
    """True where Ctrl-C or SIGTERM stopped it; the checkpoint was saved."""


class Training:
    """One training run, which `fit` or `fit_together` takes from step to step. Arguments as in `fit`."""

    def __init__(
        self,
        model: PixelModel,
        guide: Guide,
        data: ImageSequences,
        schedule: Schedule,
        *,
        seed: int = 0,
        run_dir: str | Path | None = None,
        validation: ImageSequences | None = None,
        on_evaluation: Callable[[dict[str, float]], None] | None = None,
        objective: Callable[[], AnnealedELBO] = AnnealedELBO,
        tracks: Tensor | None = None,
    ) -> None:
        self.schedule, self.seed, self.validation, self.on_evaluation = schedule, seed, validation, on_evaluation
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.device = next(model.parameters()).device
        self.model, self.guide, self.objective, elbo = model, guide, objective, objective()
        loss = elbo(model, guide)  # a module: its parameters are the model's and the guide's
        self.data, self.images, self.n_objects = data, data.images.to(self.device), data.n_objects.to(self.device)
        self.tracks = None if tracks is None else tracks.to(self.device)
        if tracks is not None and tracks.shape[:1] != data.n_objects.shape:
            raise ValueError(f"there are {len(tracks)} tracks for {len(data)} sequences; wanted as many of both")
        by_n = [(data.n_objects == n).nonzero().squeeze(1) for n in data.n_objects.unique()]
        single = (data.n_objects == 1).nonzero().squeeze(1)
        self.pools = {True: [single], False: by_n if schedule.one_n_per_batch else [torch.arange(len(data))]}
        if schedule.single_object_steps and not len(single):
            raise ValueError("single_object_steps is set but no sequence has N = 1; set it to 0 or add such sequences")
        self._most_white = max(int((x > 0).flatten(2).sum(-1).max()) for x in data.images.split(500))
        self.parameters = dict(loss.named_parameters())
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self.parameters.items():
            groups.setdefault(by_longest_prefix(schedule.learning_rate_factors, name, 1.0), []).append(p)
        if schedule.parts % n_processes():
            raise ValueError(
                f"a batch has {schedule.parts} parts for {n_processes()} processes; wanted a multiple (Schedule.parts)"
            )
        kind = DistributedSteps if n_processes() > 1 else CapturedSteps if self.device.type == "cuda" else Steps
        self.steps = kind(
            elbo, loss, schedule.learning_rate, groups, clip_norm=schedule.clip_norm, parts=schedule.parts
        )
        self.step, self.seconds = 0, 0.0
        self.since = {"steps": 0.0, "seconds": 0.0}  # the last evaluation
        self.seen: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._epoch: tuple[bool, int] | None = None
        self._batches: list[Tensor] = []

    def begin(self, resume: bool) -> None:
        """From the first step, or from the checkpoint."""
        torch.manual_seed(self.seed)
        self._rng = torch.get_rng_state()
        if resume:
            self._load()
        elif self.run_dir is not None:
            self._refuse_to_overwrite()
            if _is_first_process():
                write_lines(self.run_dir, [])

    def result(self, stop: threading.Event) -> FitResult:
        """How it ended; where it was stopped before the last step it is saved first."""
        interrupted = stop.is_set() and self.step < self.schedule.steps
        if interrupted:
            self._save()
        return FitResult(self.step, self.seconds, self.metrics, interrupted)

    def start_from_best(self, others: "Sequence[Training]", steps: int, stop: threading.Event, progress: bool) -> None:
        """Trains itself and others for so many steps, and takes over the state of the one with the highest bound."""
        judges = self.data[:BOUND_SEQUENCES] if self.validation is None else self.validation
        alike = Training(
            self.model, self.guide, self.data, self.schedule, seed=self.seed,
            objective=self.objective, tracks=self.tracks,
        )  # fmt: skip
        starts, best, kept = [alike, *others], -torch.inf, 0
        for i, start in enumerate(starts):
            start.begin(resume=False)
            start.train(stop, steps, progress=progress, title=f"start {i + 1} of {len(starts)}")
            reached = float(bound(start.model, start.guide, judges).bound.mean())
            if reached > best:
                best, kept, state = reached, i, copy.deepcopy(start._state())
        self._restore({**state, "seconds": sum(start.seconds for start in starts)}, f"start {kept + 1}")

    def train(
        self, stop: threading.Event, until: int | None = None, *, progress: bool = True, title: str | None = None
    ) -> None:
        """Trains up to a step, by default the last."""
        until = self.schedule.steps if until is None else until
        with tqdm(
            total=until, initial=self.step, disable=not progress, unit="step", mininterval=0.5, desc=title
        ) as bar:
            for _ in self.advance(until, stop):
                bar.update()
                if self.step % LOOK_EVERY == 0:
                    bar.set_postfix({name: f"{x:.3g}" for name, x in self.seen.items()}, refresh=False)

    def advance(self, until: int, stop: threading.Event) -> Iterator[None]:
        """Trains up to a step, and pauses after each. What draws random numbers in the pauses does not change them."""
        learned = {name: p.requires_grad for name, p in self.parameters.items()}
        started = time.perf_counter() - self.seconds
        try:
            while self.step < until and not self._must_stop(stop):
                torch.set_rng_state(self._rng)
                with self.steps.stream():
                    self._take_step()
                self._rng = torch.get_rng_state()
                evaluate = self.step % self.schedule.evaluate_every == 0 or self.step == self.schedule.steps
                if evaluate or self.step % LOOK_EVERY == 0:
                    self._look()
                now = time.perf_counter() - started
                self.since["seconds"] += now - self.seconds
                self.seconds = now
                if evaluate:
                    self._evaluate()
                    self._save()
                    started = time.perf_counter() - self.seconds
                yield
        finally:
            for name, p in self.parameters.items():
                p.requires_grad_(learned[name])

    def _take_step(self) -> None:
        schedule = self.schedule
        for name, p in self.parameters.items():
            p.requires_grad_(self.step >= by_longest_prefix(schedule.learn_from, name, 0))
        self.steps.set(schedule.kl_weight(self.step), schedule.learning_rate_at(self.step))
        seed = self.seed * 1_000_003 + self.step
        if schedule.parts > 1:
            torch.manual_seed(seed)  # each step's own, whichever process takes it
        if self.step in schedule.fit_starts_at:
            self._fit_starts(seed)
        index = self._batch(self.step)
        n_objects = self.data.n_objects[index] if schedule.one_n_per_batch else self.data.n_objects
        known = Known(int(n_objects.max()), self._most_white)
        self.steps.take(Batch(self.images, self.n_objects, index, known, seed, self.tracks))
        self.step += 1
        self.since["steps"] += 1

    def _must_stop(self, stop: threading.Event) -> bool:
        """Whether to stop here. Several processes stop at the same step, which they agree on now and then."""
        if n_processes() == 1:
            return stop.is_set()
        if self.step % LOOK_EVERY:
            return False
        any_of_them = torch.tensor(float(stop.is_set()), device=self.device)
        processes.all_reduce(any_of_them)
        if bool(any_of_them):
            stop.set()
        return stop.is_set()

    def _look(self) -> None:
        """Reads what the steps since the last evaluation gave, and stops where it is no number."""
        frames = self.images.shape[1] * self.since["steps"]
        log_likelihood, kl = (float(x) / frames for x in self.steps.read_totals())
        if not math.isfinite(log_likelihood + kl):
            raise FloatingPointError(self._diverged(log_likelihood, kl))
        weight = self.schedule.kl_weight(self.step - 1)
        self.seen = {"log_likelihood": log_likelihood, "kl": kl, "kl_weight": weight}

    def _batch(self, step: int) -> Tensor:
        """The sequences of a step: a function of seed and step alone. An epoch uses every sequence once, but for those
        that do not fill a batch."""
        alone = step < self.schedule.single_object_steps
        pools, size = self.pools[alone], self.schedule.batch_size
        per_epoch = sum(max(1, len(pool) // size) for pool in pools)
        epoch, place = divmod(step - (0 if alone else self.schedule.single_object_steps), per_epoch)
        if self._epoch != (alone, epoch):
            generator = torch.Generator().manual_seed((self.seed * 2 + alone) * 1_000_003 + epoch)
            shuffled = [pool[torch.randperm(len(pool), generator=generator)] for pool in pools]
            batches = [b for pool in shuffled for b in pool.split(size) if len(b) == min(size, len(pool))]
            order = torch.randperm(len(batches), generator=generator).tolist()
            self._epoch, self._batches = (alone, epoch), [batches[i] for i in order]
        return self._batches[place]

    @torch.no_grad()
    def _fit_starts(self, seed: int) -> None:
        """Mixture over starts from one draw of q(a | v) for some sequences."""
        generator = torch.Generator().manual_seed(seed)
        tracks = []
        for index in torch.randperm(len(self.images), generator=generator)[:FIT_STARTS_SEQUENCES].split(100):
            n_objects = self.n_objects[index.to(self.device)]
            a = self.guide.q(self.images[index.to(self.device)], n_objects).sample()
            tracks.append(a[object_mask(n_objects, a.shape[1])])
        fit_starts(self.model.dynamics, torch.cat(tracks), seed=self.seed)
        if n_processes() > 1:
            for parameter in self.model.dynamics.parameters():
                processes.broadcast(parameter.data, 0)

    def _evaluate(self) -> None:
        self.metrics = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(self.since["steps"] / self.since["seconds"], 3),
            "bound_per_frame": self.seen["log_likelihood"] - self.seen["kl"],
            "log_likelihood_per_frame": self.seen["log_likelihood"],
            "kl_per_frame": self.seen["kl"],
            "kl_weight": self.seen["kl_weight"],
            "learning_rate": self.schedule.learning_rate_at(self.step - 1),
        }
        if self.validation is not None:
            terms = bound(self.model, self.guide, self.validation)
            frames = len(self.validation) * self.validation.images.shape[1]
            self.metrics["validation_bound_per_frame"] = float(terms.bound.sum()) / frames
            self.metrics["validation_kl_per_frame"] = float(terms.kl.sum()) / frames
        self.since = dict.fromkeys(self.since, 0.0)
        self.steps.totals.zero_()
        if self.run_dir is not None and _is_first_process():
            write_lines(self.run_dir, [*read_lines(self.run_dir), self.metrics])
        if self.on_evaluation is not None and _is_first_process():
            self.on_evaluation(self.metrics)

    def _state(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "since": self.since,
            "totals": self.steps.read_totals(),
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizer": self.steps.optimizer.state_dict(),
            "rng": self._rng,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore(self, state: dict[str, Any], source: str | Path) -> None:
        load_weights(self.model, state["model"], source)
        load_weights(self.guide, state["guide"], source)
        self.steps.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.since = state["step"], state["seconds"], dict(state["since"])
        self.steps.totals.copy_(state["totals"] if _is_first_process() else torch.zeros(2))
        self._rng = state["rng"]
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _save(self) -> None:
        state = self._state()  # of all processes
        if self.run_dir is not None and _is_first_process():
            save_checkpoint(self.run_dir / "checkpoint.pt", state)

    def _load(self) -> None:
        if self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run to go on with")
        path = self.run_dir / "checkpoint.pt"
        state = load_checkpoint(path)
        if state["seed"] != self.seed:
            raise ValueError(f"{path} was trained with seed {state['seed']}, not {self.seed}; resume with that seed")
        self._restore(state, path)
        lines = [line for line in read_lines(self.run_dir) if line["step"] <= self.step]
        self.metrics = lines[-1] if lines else {}
        if _is_first_process():
            write_lines(self.run_dir, lines)

    def _refuse_to_overwrite(self) -> None:
        assert self.run_dir is not None
        if (self.run_dir / "checkpoint.pt").exists():
            raise ValueError(
                f"{self.run_dir} holds a trained run; give resume=True to go on with it, or another folder"
            )

    def _diverged(self, log_likelihood: float, kl: float) -> str:
        kept = "no checkpoint had been written"
        if self.run_dir is not None and (self.run_dir / "checkpoint.pt").exists():
            kept = f"{self.run_dir / 'checkpoint.pt'} holds the last good state"
        return (
            f"the loss is not finite by step {self.step} "
            f"(log p(v|a) {log_likelihood:.4g}, KL {kl:.4g} nats per frame); "
            f"{kept}. Try a smaller learning rate, clip_norm, or a larger position_noise_floor"
        )


def n_processes() -> int:
    """How many processes share the training."""
    return processes.get_world_size() if processes.is_available() and processes.is_initialized() else 1


def _is_first_process() -> bool:
    return n_processes() == 1 or processes.get_rank() == 0
