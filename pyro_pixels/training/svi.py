"""Training of a model and its guide by SVI (Secs 2.2.2, 3.2), in Pyro's module form: ``AnnealedELBO()(model, guide)``
is a module whose value is the loss, which a torch optimiser minimises."""

import contextlib
import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from pyro_pixels._batch import check_any, object_mask
from pyro_pixels._checks import MAX_SEED, check_number
from pyro_pixels._lock import check_still_there
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.training import states
from pyro_pixels.training.batches import Batches
from pyro_pixels.training.checkpoints import load_weights, write_lines
from pyro_pixels.training.elbo import AnnealedELBO, bound
from pyro_pixels.training.film import look_at_film, most_weights
from pyro_pixels.training.finite import GOOD_SEQUENCES, saying_what_is_not_finite, what_is_not_finite
from pyro_pixels.training.loop import Loop
from pyro_pixels.training.modes import evaluating
from pyro_pixels.training.own_tracks import OwnTracks
from pyro_pixels.training.processes import is_first_process, n_processes
from pyro_pixels.training.schedule import Schedule, by_longest_prefix, check_learning, check_prefixes
from pyro_pixels.training.start_mixture import LEAST_TRACKS, fit_starts
from pyro_pixels.training.step_runners import Batch, Steps, steps_for

FIT_STARTS_SEQUENCES = 500
BOUND_SEQUENCES = 60  # to compare candidates on if there are no validation sequences
STARTS = {f"model.dynamics.{name}" for name in ("log_pi", "mu", "root_Sigma")}  # set by `fit_starts`


class TrainingOptions(TypedDict, total=False):
    """Keyword arguments that `fit` passes on to `Training`."""

    seed: int
    """Seed of batches and samples, by default 0; the caller's random state is not changed."""
    run_dir: str | Path | None
    """Folder for metrics.jsonl and checkpoint.pt; with None, the default, nothing is written."""
    validation: ImageSequences | None
    """Sequences whose bound is reported at each evaluation."""
    on_evaluation: Callable[[dict[str, float]], None] | None
    """Called with each line of metrics, except those of the first steps of candidates."""
    objective: Callable[[], AnnealedELBO]
    """Factory of an objective other than the bound, such as `distillation.GivenTracks`."""
    tracks: Tensor | None
    """(n, N, T, 2), tracks of each sequence, passed to the objective along with its images."""
    config: Any
    """The run's configuration, written to config.json after the folder is locked and its contents are checked."""


class Training(Loop):
    """The training of one model and its guide, run by `fit` or `fit_together`.

    Args:
        model: the generative model, changed in place.
        guide: the guide, changed in place.
        data: the training sequences; their ``positions`` are never used.
        schedule: the settings of training.
        options: as in `TrainingOptions`.

    Raises:
        ValueError: if the numbers of ``tracks`` and sequences differ; if ``schedule.parts`` is not a multiple of the
            number of processes; if a batch has fewer sequences than there are processes; if a prefix in the schedule
            matches no parameter; if no parameter is trained in the first step; or as in `Batches`.
    """

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
        config: Any = None,
    ) -> None:
        if not isinstance(data, ImageSequences) or not isinstance(schedule, Schedule):
            raise ValueError(
                f"data and schedule are a {type(data).__name__} and a {type(schedule).__name__}; wanted "
                "ImageSequences and a Schedule"
            )
        check_any(len(data), "to train on")
        seed = check_number("seed", seed, 0, MAX_SEED)
        super().__init__(
            schedule.steps, schedule.evaluate_every,
            device=next(model.parameters()).device, run_dir=run_dir, on_evaluation=on_evaluation,
            config=config,
        )  # fmt: skip
        self.model, self.guide, self.schedule, self.seed = model, guide, schedule, seed
        self.validation, self.objective = validation, objective
        self.data, self.images, self.n_objects = data, data.images.to(self.device), data.n_objects.to(self.device)
        self.tracks = None if tracks is None else tracks.to(self.device)
        if tracks is not None and tracks.shape[:1] != data.n_objects.shape:
            raise ValueError(f"there are {len(tracks)} tracks for {len(data)} sequences; wanted one per sequence")
        self.batches = Batches(data, schedule, seed)
        elbo = self._objective()
        loss = elbo(model, guide)  # a module: its parameters are the model's and the guide's
        self.parameters = dict(loss.named_parameters())
        check_prefixes(schedule, self.parameters)
        self._frozen = self._frozen_by_user()
        check_learning(schedule, self.parameters.keys() - self._frozen)
        self._marks: dict[str, str | None] = {}
        self.steps = self._runner(elbo, loss)

    def _objective(self) -> AnnealedELBO:
        own = self.objective is AnnealedELBO and self.schedule.own_tracks_from is not None
        return OwnTracks() if own else self.objective()

    def _runner(self, elbo: AnnealedELBO, loss: nn.Module) -> Steps:
        """Returns the object that takes the steps: in this process, in several, or as CUDA graphs."""
        schedule = self.schedule
        if schedule.parts % n_processes():
            raise ValueError(
                f"a batch has {schedule.parts} parts for {n_processes()} processes; wanted a multiple (Schedule.parts)"
            )
        if self.batches.fewest < n_processes():
            raise ValueError(
                f"a batch has only {self.batches.fewest} sequence(s) for {n_processes()} processes; wanted at least "
                "one for each: use fewer processes, a larger batch_size or more sequences with this N"
            )
        groups: dict[float, list[nn.Parameter]] = {}
        for name, p in self.parameters.items():
            groups.setdefault(by_longest_prefix(schedule.learning_rate_factors, name, 1.0), []).append(p)
        kind = steps_for(self.device, n_processes())
        return kind(elbo, loss, schedule.learning_rate, groups, clip_norm=schedule.clip_norm, parts=schedule.parts)

    def begin(self, resume: bool) -> None:
        torch.manual_seed(self.seed)
        self.steps.seed(self.seed)
        self._rng = torch.get_rng_state()
        if self.run_dir is not None:
            data, validation = states.fingerprint(self.data, self.tracks), states.fingerprint(self.validation)
            self._marks = {"data": data, "validation": validation}
        super().begin(resume)
        if not resume:
            look_at_film(self.model, self.guide, self.data)
        self.batches.most_white = most_weights(self.guide, self.images)

    def advance(self, until: int, stop: threading.Event) -> Iterator[None]:
        self._frozen = self._frozen_by_user()
        for module in self._modules.values():
            module.train()
        try:
            yield from super().advance(until, stop)
        finally:
            for name, p in self.parameters.items():
                p.requires_grad_(name not in self._frozen)
            for module in self._modules.values():
                module.eval()

    def _frozen_by_user(self) -> frozenset[str]:
        return frozenset(name for name, p in self.parameters.items() if not p.requires_grad)

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        return evaluating(*self._modules.values())

    def start_from_best(self, others: "Sequence[Training]", steps: int, stop: threading.Event, progress: bool) -> bool:
        """Trains this start and ``others`` for ``steps`` steps each, and adopts the state with the highest bound.

        A start that diverges is left out, with a warning. Returns False if training was stopped before all of them had
        taken their steps. Nothing is then adopted or saved, as the choice would depend on the time of the stop.
        """
        judges = self.data[:BOUND_SEQUENCES] if self.validation is None else self.validation
        alike = Training(
            self.model, self.guide, self.data, self.schedule, seed=self.seed, validation=self.validation,
            objective=self.objective, tracks=self.tracks,
        )  # fmt: skip
        starts, best, kept = [alike, *others], -math.inf, None
        for i, start in enumerate(starts):
            lines: list[dict[str, float]] = []
            start.on_evaluation = lines.append
            start.begin(resume=False)
            try:
                start.train(stop, steps, progress=progress, title=f"start {i + 1} of {len(starts)}")
            except FloatingPointError as error:
                warnings.warn(f"start {i + 1} of {len(starts)} is left out: {error}", stacklevel=2)
                continue
            if start.step < steps:
                return False
            reached = float(bound(start.model, start.guide, judges).bound.mean())
            if reached > best:
                best, kept = reached, (f"start {i + 1}", copy.deepcopy(start._state()), lines)
        if kept is None:
            raise FloatingPointError(alike._diverged("the bound of every start"))
        name, state, lines = kept
        self._restore({**state, "seconds": sum(start.seconds for start in starts)}, name)
        self.metrics = lines[-1] if lines else {}
        if self.run_dir is not None:
            check_still_there(self.run_dir)
            write_lines(self.run_dir, lines)
        self._save()
        if self.on_evaluation is not None and self.metrics.get("step") == self.step:
            self.on_evaluation(self.metrics)
        return True

    def _take_step(self) -> None:
        torch.set_rng_state(self._rng)
        with saying_what_is_not_finite(self._modules, self._diverged), self.steps.stream():
            schedule, step = self.schedule, self.step
            for name, p in self.parameters.items():
                learns = step >= by_longest_prefix(schedule.learn_from, name, 0)
                p.requires_grad_(learns and name not in self._frozen)
            self.steps.set(schedule.kl_weight(step), schedule.learning_rate_at(step))
            self._set(self.steps.elbo)
            seed = self.seed * 1_000_003 + step
            if schedule.parts > 1:
                torch.manual_seed(seed)  # the same in every process
            if step in schedule.fit_starts_at and not self._frozen & STARTS:
                self._fit_starts(seed)
            index = self.batches.index(step)
            batch = Batch(self.images, self.n_objects, index, self.batches.known(index), seed, self.tracks)
            try:
                self.steps.take(batch)
                full = False
            except torch.cuda.OutOfMemoryError:  # handled below, after the step's tensors are freed
                full = True
            if full:
                raise MemoryError(self._too_large(batch))
        self._rng = torch.get_rng_state()

    def _set(self, elbo: AnnealedELBO) -> None:
        """Sets the options of the objective, other than the KL weight, to their values at this step."""
        order_from, own_from = self.schedule.random_order_from, self.schedule.own_tracks_from
        if order_from is not None:
            elbo.random_order = self.step >= order_from
        if own_from is not None and isinstance(elbo, OwnTracks):
            elbo.weight = self.schedule.own_tracks_weight if self.step >= own_from else 0.0

    def _too_large(self, batch: Batch) -> str:
        """Returns an error message that suggests how to fit a step into memory."""
        self.steps.optimizer.zero_grad()
        torch.cuda.empty_cache()
        parts = len(batch.index)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            free = 0.9 * torch.cuda.mem_get_info(self.device)[0]  # the rest is memory that torch cannot use
            parts = self.steps.parts_that_fit(batch, free)
        parts = -(-max(parts, self.schedule.parts + 1) // n_processes()) * n_processes()
        if parts > len(batch.index):
            return f"{self.device} has too little memory for one sequence; {self._kept()}. Use a smaller model"
        return (
            f"{self.device} has too little memory for {len(batch.index)} sequences in {self.schedule.parts} part(s); "
            f"{self._kept()}. About {parts} would fit: --parts {parts}, or Schedule.parts"
        )

    @torch.no_grad()
    def _fit_starts(self, seed: int) -> None:
        """Fits the mixture over starts to one sample of q(a | v) for each of up to `FIT_STARTS_SEQUENCES` sequences."""
        generator = torch.Generator().manual_seed(seed)
        tracks = []
        for index in torch.randperm(len(self.images), generator=generator)[:FIT_STARTS_SEQUENCES].split(100):
            n_objects = self.n_objects[index.to(self.device)]
            with evaluating(self.guide):
                a = self.guide.q(self.images[index.to(self.device)], n_objects).sample()
            tracks.append(a[object_mask(n_objects, a.shape[1])])
        all_tracks = torch.cat(tracks)
        if len(all_tracks) < LEAST_TRACKS * self.model.dynamics.config.n_components:
            return  # too few tracks: the starts are learned by gradient alone
        fit_starts(self.model.dynamics, all_tracks, seed=self.seed)
        if n_processes() > 1:
            for parameter in self.model.dynamics.parameters():
                distributed.broadcast(parameter.data, 0)

    def _look(self) -> Mapping[str, float]:
        frames = self.images.shape[1] * self.since["steps"]
        log_likelihood, kl = (float(x) / frames for x in self.steps.read_totals())
        if not math.isfinite(log_likelihood + kl):
            said = f"log p(v|a) {log_likelihood:.4g}, KL {kl:.4g} nats per frame"
            raise FloatingPointError(self._diverged("the loss", said))
        return {"log_likelihood": log_likelihood, "kl": kl, "kl_weight": self.schedule.kl_weight(self.step - 1)}

    def _not_finite(self) -> str | None:
        given = [x[:GOOD_SEQUENCES] for x in (self.images, self.n_objects, self.tracks) if x is not None]
        return what_is_not_finite(self._modules, self.steps.optimizer, self._objective()(self.model, self.guide), given)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "guide": self.guide}

    def _diverged(self, what: str, said: str = "") -> str:
        """Returns the error message for ``what`` that is not finite."""
        return (
            f"{what} is not finite at step {self.step}{said and f' ({said})'}; {self._kept()}. Try a smaller learning "
            "rate, clip_norm, or a larger position_noise_floor"
        )

    def _line(self) -> dict[str, float]:
        line = {
            "bound_per_frame": self.seen["log_likelihood"] - self.seen["kl"],
            "log_likelihood_per_frame": self.seen["log_likelihood"],
            "kl_per_frame": self.seen["kl"],
            "kl_weight": self.seen["kl_weight"],
            "learning_rate": self.schedule.learning_rate_at(self.step - 1),
        }
        if self.validation is not None:
            terms = bound(self.model, self.guide, self.validation)
            frames = len(self.validation) * self.validation.images.shape[1]
            line["validation_bound_per_frame"] = float(terms.bound.sum()) / frames
            line["validation_kl_per_frame"] = float(terms.kl.sum()) / frames
        self.steps.totals.zero_()
        return line

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
            **{name: mark for name, mark in self._marks.items() if mark is not None},
        }
        random_state = self.steps.random_state()
        if random_state is not None:
            state["cuda_rng"] = random_state
        return state

    def _check(self, state: dict[str, Any], path: Path) -> None:
        states.check_progress(state, path, {"since": self.since})
        if state["seed"] != self.seed:
            raise ValueError(f"{path} was trained with seed {state['seed']}, not {self.seed}; resume with that seed")
        states.check_same_data(state, self._marks, path)
        for name, module in self._modules.items():
            states.check_weights(module, state.get(name), path)
        states.check_optimizer(self.steps.optimizer, state.get("optimizer"), path)
        states.check_tensor(state, "totals", self.steps.read_totals(), path)
        states.check_tensor(state, "rng", self._rng, path)
        random_state = self.steps.random_state()
        if random_state is not None and "cuda_rng" in state:
            states.check_tensor(state, "cuda_rng", random_state, path)

    def _restore(self, state: dict[str, Any], source: str | Path) -> None:
        load_weights(self.model, state["model"], source)
        load_weights(self.guide, state["guide"], source)
        states.restore_optimizer(self.steps.optimizer, state["optimizer"])
        self.step, self.seconds, self.since = state["step"], state["seconds"], dict(state["since"])
        self.steps.totals.copy_(state["totals"] if is_first_process() else torch.zeros(2))
        self._rng = state["rng"]
        if "cuda_rng" in state:
            self.steps.set_random_state(state["cuda_rng"])
