"""Learning: the bound of Eq (7) with a scaled KL, the schedule of Sec 3.2, and a training loop that can be stopped.

The bound is Pyro's: ``AnnealedELBO()(model, guide)`` is a module whose value is the loss, and `AnnealedELBO` is a
`Trace_ELBO`, so ``pyro.infer.SVI(model, guide, optim, loss=AnnealedELBO())`` is the same objective. The KL weight is
applied in one place, to every latent site of model and guide alike, whatever sites a guide has.

Departures from the paper: <log q> is estimated with the same sample as the rest of the bound instead of in closed
form, which has the same gradient for Eq (9)'s guide and holds for every other guide.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from tqdm import tqdm

from pyro_pixels.checkpoints import load_checkpoint, load_weights, save_checkpoint
from pyro_pixels.data import ImageSequences, atomic_write
from pyro_pixels.guides import Guide
from pyro_pixels.model import PixelModel


class ScaleLatents(Messenger):
    """`poutine.scale` for latent sites alone: around model and guide it multiplies the KL and leaves the data term."""

    def __init__(self, weight: Tensor | float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class BoundTerms(NamedTuple):
    """The parts of Eq (7) for each sequence of a batch, in nats; the KL without its weight."""

    log_likelihood: Tensor  # (B,), <log p(v | a)>
    kl: Tensor  # (B,), KL(q(a | v) || p(a))

    @property
    def bound(self) -> Tensor:
        return self.log_likelihood - self.kl


class AnnealedELBO(Trace_ELBO):
    """Eq (7) with the KL multiplied by ``kl_weight`` (Sec 3.2's beta), a positive number or 0-dimensional tensor.

    After each evaluation `terms` holds the parts of the unweighted bound (of the last particle).
    """

    def __init__(self, kl_weight: float | Tensor = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.kl_weight = kl_weight
        self.terms: BoundTerms | None = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with ScaleLatents(self.kl_weight):
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name in guide_trace.stochastic_nodes:
            site: Any = guide_trace.nodes[name]
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"the guide's site '{name}' cannot be sampled with gradients; give it a distribution with rsample"
                )
        self.terms = _bound_terms(model_trace, guide_trace)
        return model_trace, guide_trace


def _bound_terms(model_trace: Trace, guide_trace: Trace) -> BoundTerms:
    def total(trace: Trace, names: list[str]) -> Tensor:
        sites: list[Any] = [trace.nodes[name] for name in names]
        return sum((site["unscaled_log_prob"].detach() for site in sites), torch.zeros(()))

    kl = total(guide_trace, guide_trace.stochastic_nodes) - total(model_trace, model_trace.stochastic_nodes)
    return BoundTerms(total(model_trace, model_trace.observation_nodes), kl)


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
        resume: continue from the checkpoint in ``run_dir``; on a CPU the numbers are those of an uninterrupted run.
        on_evaluation: called with each line of metrics.

    Raises:
        ValueError: if ``resume`` finds no checkpoint or one of another configuration, if the folder holds a run and
            ``resume`` is not given, or if there is no sequence with N = 1 where the schedule asks for one.
        FloatingPointError: if the loss is no longer finite; the last checkpoint before it is kept.
    """
    return _Fit(model, guide, data, schedule, seed, run_dir, validation, on_evaluation).run(resume, progress)


class _Fit:
    """One training run; `fit` is its face."""

    def __init__(
        self,
        model: PixelModel,
        guide: Guide,
        data: ImageSequences,
        schedule: Schedule,
        seed: int,
        run_dir: str | Path | None,
        validation: ImageSequences | None,
        on_evaluation: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.schedule, self.seed, self.validation, self.on_evaluation = schedule, seed, validation, on_evaluation
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.device = next(model.parameters()).device
        self.model, self.guide, self.elbo = model, guide, AnnealedELBO()
        self.loss = self.elbo(model, guide)  # a module: its parameters are the model's and the guide's
        self.images, self.n_objects = data.images.to(self.device), data.n_objects
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

    def run(self, resume: bool, progress: bool) -> FitResult:
        learned = {name: p.requires_grad for name, p in self.parameters.items()}
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False), _stop_signals() as stop:
                torch.manual_seed(self.seed)
                if resume:
                    self._load()
                elif self.run_dir is not None:
                    self._refuse_to_overwrite()
                    self._write_lines([])
                bar = tqdm(
                    total=self.schedule.steps, initial=self.step, disable=not progress, unit="step", mininterval=0.5
                )
                with bar:
                    self._loop(stop, bar)
                return FitResult(self.step, self.seconds, self.metrics, stop.is_set())
        finally:
            for name, p in self.parameters.items():
                p.requires_grad_(learned[name])

    def _loop(self, stop: threading.Event, bar: tqdm) -> None:
        schedule, n_frames = self.schedule, self.images.shape[1]
        started = time.perf_counter() - self.seconds
        while self.step < schedule.steps and not stop.is_set():
            for name, p in self.parameters.items():
                p.requires_grad_(self.step >= _by_longest_prefix(schedule.learn_from, name, 0))
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(self.step) * group["factor"]
            self.elbo.kl_weight = schedule.kl_weight(self.step)
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
        if stop.is_set():
            self._save()

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
            self._write_lines([*_read_lines(self.run_dir), self.metrics])
        if self.on_evaluation is not None:
            self.on_evaluation(self.metrics)

    def _save(self) -> None:
        if self.run_dir is None:
            return
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
        save_checkpoint(self.run_dir / "checkpoint.pt", state)

    def _load(self) -> None:
        if self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run to go on with")
        path = self.run_dir / "checkpoint.pt"
        state = load_checkpoint(path)
        if state["seed"] != self.seed:
            raise ValueError(f"{path} was trained with seed {state['seed']}, not {self.seed}; resume with that seed")
        load_weights(self.model, state["model"], path)
        load_weights(self.guide, state["guide"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.sums = state["step"], state["seconds"], state["sums"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        lines = [line for line in _read_lines(self.run_dir) if line["step"] <= self.step]
        self.metrics = lines[-1] if lines else {}
        self._write_lines(lines)

    def _refuse_to_overwrite(self) -> None:
        assert self.run_dir is not None
        if (self.run_dir / "checkpoint.pt").exists():
            raise ValueError(
                f"{self.run_dir} holds a trained run; give resume=True to go on with it, or another folder"
            )

    def _write_lines(self, lines: list[dict[str, float]]) -> None:
        assert self.run_dir is not None
        with atomic_write(self.run_dir / "metrics.jsonl") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)

    def _diverged(self, log_likelihood: float, kl: float) -> str:
        kept = "no checkpoint had been written"
        if self.run_dir is not None and (self.run_dir / "checkpoint.pt").exists():
            kept = f"{self.run_dir / 'checkpoint.pt'} holds the last good state"
        return (
            f"the loss is not finite at step {self.step} "
            f"(log p(v|a) {log_likelihood:.4g}, KL {kl:.4g} nats per frame); "
            f"{kept}. Try a smaller learning rate, clip_norm, or a larger position_noise_floor"
        )


def bound(model: PixelModel, guide: Guide, data: ImageSequences, *, batch_size: int = 100, seed: int = 0) -> BoundTerms:
    """The terms of Eq (7) for each sequence of ``data`` (n,), one sample each, in float64 nats; no gradient."""
    device = next(model.parameters()).device
    elbo = AnnealedELBO()
    loss = elbo(model, guide)
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            loss(part.images.to(device), part.n_objects.to(device))
            assert elbo.terms is not None
            parts.append([term.cpu().double() for term in elbo.terms])
    return BoundTerms(*(torch.cat(terms) for terms in zip(*parts)))


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set instead of killing; a second Ctrl-C kills. Handlers are put back."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may have handlers
        return

    def request_stop(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _by_longest_prefix(table: Mapping[str, Any], name: str, default: Any) -> Any:
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(fitting, key=len)] if fitting else default


def _read_lines(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
