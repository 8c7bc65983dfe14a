"""Learning: the schedule of Sec 3.2, and a training loop that can be stopped and resumed at any step."""

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_pixels.checkpoints import (
    load_checkpoint,
    load_weights,
    read_lines,
    save_checkpoint,
    stop_signals,
    write_lines,
)
from pyro_pixels.data import ImageSequences, object_mask
from pyro_pixels.elbo import AnnealedELBO, bound
from pyro_pixels.guides import Guide
from pyro_pixels.model import PixelModel
from pyro_pixels.starts import fit_starts

FIT_STARTS_SEQUENCES = 500
BOUND_SEQUENCES = 60  # on which candidates are compared where there are no validation sequences


@dataclass(frozen=True)
class Schedule:
    """How to train; the defaults are Sec 3.2's to the letter where it has one."""

    steps: int = 200_000
    batch_size: int = 20
    learning_rate: float = 1e-3
    """Adam's, with beta_1 = 0.9, beta_2 = 0.999, epsilon = 1e-8."""
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Prefix of parameter names -> factor on their learning rate, such as {"model.dynamics": 3.0}."""
    decay_from: int | None = None
    """Step from which the learning rate falls linearly to a twentieth of itself at the end; None: constant."""
    learn_from: Mapping[str, int] = field(default_factory=lambda: {"model.dynamics": 10_000})
    """Prefix of parameter names -> step before which they are frozen. The longest prefix that fits decides."""
    kl_start: float = 100.0
    """beta when annealing begins."""
    anneal_from: int = 10_000
    anneal_steps: int = 10_000
    """beta falls geometrically from kl_start to 1 in so many steps from anneal_from on; it is kl_before until then."""
    kl_before: float = 1.0
    one_n_per_batch: bool = False
    """Batches whose sequences all have the same N, so that no work is done for absent objects; else N is mixed."""
    single_object_steps: int = 0
    """So many steps at first on sequences with N = 1 alone."""
    fit_starts_at: tuple[int, ...] = ()
    """Steps before which pi, mu_k and Sigma_k are put where tracks inferred from 500 sequences are likeliest."""
    clip_norm: float | None = None
    """Gradients of a larger norm are scaled down to it; in nats per sequence."""
    evaluate_every: int = 500
    """Steps between evaluations, each with a line in metrics.jsonl and a checkpoint."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("learning_rate", "kl_start", "kl_before"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a number above 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; wanted a number above 0, or None")

    def kl_weight(self, step: int) -> float:
        """beta at a step."""
        if step < self.anneal_from:
            return self.kl_before
        done = min(1.0, (step - self.anneal_from) / self.anneal_steps) if self.anneal_steps else 1.0
        return self.kl_start ** (1.0 - done)

    def learning_rate_at(self, step: int) -> float:
        if self.decay_from is None or step <= self.decay_from:
            return self.learning_rate
        left = max(0.0, 1.0 - (step - self.decay_from) / max(1, self.steps - self.decay_from))
        return self.learning_rate * (0.05 + 0.95 * left)


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


def fit(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    schedule: Schedule,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    validation: ImageSequences | None = None,
    candidates: Sequence[tuple[PixelModel, Guide]] = (),
    candidate_steps: int = 200,
    resume: bool = False,
    progress: bool = True,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
) -> FitResult:
    """Maximises Eq (7) over the parameters of model and guide, in place, on the device they are on.

    Args:
        data: what to learn from; ``positions`` are never looked at.
        seed: of batches and samples; the caller's random state is left as it was.
        run_dir: folder for metrics.jsonl and checkpoint.pt; None: nothing is written.
        validation: sequences whose bound is reported at each evaluation.
        candidates: models and guides that start elsewhere. Each, and the given one, is trained for ``candidate_steps``;
            the one with the highest bound (of the validation sequences, if there are any) goes on, in ``model`` and
            ``guide``. No labels are used.
        resume: continue from the checkpoint in ``run_dir``; on a CPU the numbers are those of an uninterrupted run.
        on_evaluation: called with each line of metrics.

    Raises:
        ValueError: if a candidate is of another kind than ``model`` and ``guide``; if ``resume`` finds no checkpoint or
            one of another configuration; if the folder holds a run and ``resume`` is not given; or if there is no
            sequence with N = 1 where the schedule asks for one.
        FloatingPointError: if the loss is no longer finite; the last checkpoint before it is kept.
    """

    if candidates and not 1 <= candidate_steps <= schedule.steps:
        raise ValueError(f"candidate_steps is {candidate_steps}; wanted between 1 and steps, {schedule.steps}")
    trainer = _Fit(model, guide, data, schedule, seed, run_dir, validation, on_evaluation)
    starts = [_Fit(*start, data, schedule, seed + i) for i, start in enumerate([(model, guide), *candidates])]
    return trainer.run(starts if candidates else [], candidate_steps, resume, progress)


class _Fit:
    """One training run; `fit` is its face."""

    def __init__(
        self,
        model: PixelModel,
        guide: Guide,
        data: ImageSequences,
        schedule: Schedule,
        seed: int,
        run_dir: str | Path | None = None,
        validation: ImageSequences | None = None,
        on_evaluation: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.schedule, self.seed, self.validation, self.on_evaluation = schedule, seed, validation, on_evaluation
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.device = next(model.parameters()).device
        self.model, self.guide, self.elbo = model, guide, AnnealedELBO()
        self.loss = self.elbo(model, guide)  # a module: its parameters are the model's and the guide's
        self.data, self.images, self.n_objects = data, data.images.to(self.device), data.n_objects
        by_n = [(data.n_objects == n).nonzero().squeeze(1) for n in data.n_objects.unique()]
        single = (data.n_objects == 1).nonzero().squeeze(1)
        self.pools = {True: [single], False: by_n if schedule.one_n_per_batch else [torch.arange(len(data))]}
        if schedule.single_object_steps and not len(single):
            raise ValueError("single_object_steps is set but no sequence has N = 1; set it to 0 or add such sequences")
        self.parameters = dict(self.loss.named_parameters())
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self.parameters.items():
            groups.setdefault(_by_longest_prefix(schedule.learning_rate_factors, name, 1.0), []).append(p)
        self.optimizer = torch.optim.Adam(
            [{"params": ps, "factor": factor} for factor, ps in groups.items()], lr=schedule.learning_rate, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, float] = {"log_likelihood": 0.0, "kl": 0.0, "steps": 0.0, "seconds": 0.0}
        self.metrics: dict[str, float] = {}
        self._epoch: tuple[bool, int] | None = None
        self._batches: list[Tensor] = []

    def run(self, starts: "Sequence[_Fit]", start_steps: int, resume: bool, progress: bool) -> FitResult:
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False), stop_signals() as stop:
            torch.manual_seed(self.seed)
            if resume:
                self._load()
            elif self.run_dir is not None:
                self._refuse_to_overwrite()
                write_lines(self.run_dir, [])
            if starts and not resume:
                self._go_on_from_best(starts, start_steps, stop, progress)
            self._train(self.schedule.steps, stop, progress)
            if stop.is_set():
                self._save()
            return FitResult(self.step, self.seconds, self.metrics, stop.is_set())

    def _go_on_from_best(self, starts: "Sequence[_Fit]", steps: int, stop: threading.Event, progress: bool) -> None:
        """Trains each for so many steps, and takes over the state of the one whose bound is the highest then."""
        judges = self.data[:BOUND_SEQUENCES] if self.validation is None else self.validation
        best, kept = -torch.inf, starts[0]
        for i, start in enumerate(starts):
            torch.manual_seed(start.seed)
            start._train(steps, stop, progress, title=f"start {i + 1} of {len(starts)}")
            reached = float(bound(start.model, start.guide, judges).bound.mean())
            if reached > best:
                best, kept, state = reached, start, copy.deepcopy(start._state())
        self._restore({**state, "seconds": sum(start.seconds for start in starts)}, f"start {starts.index(kept) + 1}")

    def _train(self, steps: int, stop: threading.Event, progress: bool, title: str | None = None) -> None:
        learned = {name: p.requires_grad for name, p in self.parameters.items()}
        bar = tqdm(total=steps, initial=self.step, disable=not progress, unit="step", mininterval=0.5, desc=title)
        try:
            with bar:
                self._loop(steps, stop, bar)
        finally:
            for name, p in self.parameters.items():
                p.requires_grad_(learned[name])

    def _loop(self, steps: int, stop: threading.Event, bar: tqdm) -> None:
        schedule, n_frames = self.schedule, self.images.shape[1]
        started = time.perf_counter() - self.seconds
        while self.step < steps and not stop.is_set():
            for name, p in self.parameters.items():
                p.requires_grad_(self.step >= _by_longest_prefix(schedule.learn_from, name, 0))
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(self.step) * group["factor"]
            self.elbo.kl_weight = schedule.kl_weight(self.step)
            if self.step in schedule.fit_starts_at:
                self._fit_starts()
            index = self._batch(self.step)
            loss = self.loss(self.images[index.to(self.device)], self.n_objects[index].to(self.device)) / len(index)
            self.optimizer.zero_grad()
            loss.backward()
            if schedule.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters.values(), schedule.clip_norm)
            self.optimizer.step()
            self.step += 1

            terms = self.elbo.terms
            assert terms is not None
            frames = len(index) * n_frames
            log_likelihood, kl = float(terms.log_likelihood.sum()) / frames, float(terms.kl.sum()) / frames
            if not torch.isfinite(torch.tensor(log_likelihood + kl)):
                raise FloatingPointError(self._diverged(log_likelihood, kl))
            now = time.perf_counter() - started
            self.sums["log_likelihood"] += log_likelihood
            self.sums["kl"] += kl
            self.sums["steps"] += 1
            self.sums["seconds"] += now - self.seconds
            self.seconds = now
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(
                    bound=f"{log_likelihood - kl:.1f}",
                    kl=f"{kl:.2f}",
                    kl_weight=f"{self.elbo.kl_weight:.3g}",
                    refresh=False,
                )
            if self.step % schedule.evaluate_every == 0 or self.step == schedule.steps:
                self._evaluate()
                self._save()
                started = time.perf_counter() - self.seconds

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
    def _fit_starts(self) -> None:
        """Mixture over starts from one draw of q(a | v) for some sequences."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        tracks = []
        for index in torch.randperm(len(self.images), generator=generator)[:FIT_STARTS_SEQUENCES].split(100):
            n_objects = self.n_objects[index].to(self.device)
            a = self.guide.q(self.images[index.to(self.device)], n_objects).sample()
            tracks.append(a[object_mask(n_objects, a.shape[1])])
        fit_starts(self.model.dynamics, torch.cat(tracks), seed=self.seed)

    def _evaluate(self) -> None:
        steps = self.sums["steps"]
        self.metrics = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(steps / self.sums["seconds"], 3),
            "bound_per_frame": (self.sums["log_likelihood"] - self.sums["kl"]) / steps,
            "log_likelihood_per_frame": self.sums["log_likelihood"] / steps,
            "kl_per_frame": self.sums["kl"] / steps,
            "kl_weight": float(self.elbo.kl_weight),
            "learning_rate": self.schedule.learning_rate_at(self.step - 1),
        }
        if self.validation is not None:
            terms = bound(self.model, self.guide, self.validation)
            frames = len(self.validation) * self.validation.images.shape[1]
            self.metrics["validation_bound_per_frame"] = float(terms.bound.sum()) / frames
            self.metrics["validation_kl_per_frame"] = float(terms.kl.sum()) / frames
        self.sums = dict.fromkeys(self.sums, 0.0)
        if self.run_dir is not None:
            write_lines(self.run_dir, [*read_lines(self.run_dir), self.metrics])
        if self.on_evaluation is not None:
            self.on_evaluation(self.metrics)

    def _state(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore(self, state: dict[str, Any], source: str | Path) -> None:
        load_weights(self.model, state["model"], source)
        load_weights(self.guide, state["guide"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.sums = state["step"], state["seconds"], state["sums"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _save(self) -> None:
        if self.run_dir is not None:
            save_checkpoint(self.run_dir / "checkpoint.pt", self._state())

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
            f"the loss is not finite at step {self.step} "
            f"(log p(v|a) {log_likelihood:.4g}, KL {kl:.4g} nats per frame); "
            f"{kept}. Try a smaller learning rate, clip_norm, or a larger position_noise_floor"
        )


def _by_longest_prefix(table: Mapping[str, Any], name: str, default: Any) -> Any:
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(fitting, key=len)] if fitting else default
