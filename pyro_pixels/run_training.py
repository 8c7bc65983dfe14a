"""Training of a run in its folder, from a configuration, on the bound or from another run's guide."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.runs import Run, build, load_config
from pyro_pixels.training.distillation import GivenTracks, draw_tracks
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.schedule import Schedule

CANDIDATE_STEPS = 200
CANDIDATE_SEEDS_APART = 1_000


def build_on(config: RunConfig, device: torch.device | str) -> Run:
    """Returns the untrained run of a configuration, on a device."""
    run = build(config)
    return run._replace(model=run.model.to(device), guide=run.guide.to(device))


def train_run(
    config: RunConfig,
    folder: str | Path,
    data: ImageSequences,
    *,
    device: torch.device | str = "cpu",
    validation: ImageSequences | None = None,
    n_starts: int = 1,
    progress: bool = True,
    on_evaluation: Callable[[Run, dict[str, float]], None] | None = None,
) -> tuple[Run, FitResult]:
    """Trains a run in its folder, and resumes from its checkpoint if the folder has one.

    Args:
        data: the training sequences.
        validation: sequences whose bound is reported at each evaluation.
        n_starts: the number of initialisations; the one with the highest bound after 200 steps is trained further.
        on_evaluation: called with the run and each line of metrics.

    Raises:
        ValueError: if the folder holds a run of another configuration, apart from the numbers of steps and parts.
        FloatingPointError: if the loss is no longer finite.
    """
    folder = Path(folder)
    resume = (folder / "checkpoint.pt").exists()
    if resume:
        refuse_another(config, folder)
    run = build_on(config, device)
    others = [build_on(replace(config, seed=seed), device) for seed in _candidate_seeds(config.seed, n_starts)]
    result = fit(
        run.model, run.guide, data, config.schedule, seed=config.seed, run_dir=folder, validation=validation,
        candidates=[(other.model, other.guide) for other in others],
        candidate_steps=min(CANDIDATE_STEPS, config.schedule.steps), resume=resume, progress=progress,
        on_evaluation=None if on_evaluation is None else lambda line: on_evaluation(run, line), config=config,
    )  # fmt: skip
    return run._replace(step=result.step), result


def refuse_another(config: RunConfig, folder: Path) -> None:
    """Raises ValueError if the folder's run differs from ``config`` in more than the numbers of steps and parts."""
    there: RunConfig = load_config(folder)
    if there.n_held_out is None:  # from before the field existed
        there = replace(there, n_held_out=config.n_held_out)
    schedule = replace(there.schedule, steps=config.schedule.steps, parts=config.schedule.parts)
    there = replace(there, schedule=schedule)
    if there != config and config.data_file is not None and there == _fitted_as(there, config):
        raise ValueError(
            f"{config.data_file} is not the file that the run in {folder} was trained on: its sequences differ in size "
            "or number; restore the file, or choose another folder"
        )
    if there != config:
        raise ValueError(f"{folder} holds a run with another configuration; remove it, or choose another folder")


def _fitted_as(there: RunConfig, config: RunConfig) -> RunConfig:
    """Returns ``config`` with all values that depend on the file of sequences taken from ``there``."""
    steps = there.schedule.single_object_steps
    return replace(
        config, data=there.data, max_objects=there.max_objects, n_sequences=there.n_sequences,
        n_held_out=there.n_held_out, schedule=replace(config.schedule, single_object_steps=steps),
    )  # fmt: skip


def _candidate_seeds(seed: int, n_starts: int) -> Sequence[int]:
    return [seed + CANDIDATE_SEEDS_APART * (i + 1) for i in range(n_starts - 1)]


def teaching_schedule(steps: int) -> Schedule:
    """Returns a schedule that trains only the guide, with a learning rate that decays in the second half."""
    return Schedule(
        steps=steps, learning_rate=1e-3, decay_from=steps // 2, learn_from={"model": steps}, anneal_from=steps,
        one_n_per_batch=True, clip_norm=30.0, evaluate_every=max(1, steps // 8),
    )  # fmt: skip


def teach_run(
    teacher: Run,
    config: RunConfig,
    folder: str | Path,
    data: ImageSequences,
    *,
    validation: ImageSequences | None = None,
    progress: bool = True,
) -> tuple[Run, FitResult]:
    """Trains a new guide for the teacher's model on samples of the teacher's guide; resumes from a checkpoint if any.

    Args:
        teacher: the run with the guide to learn from, on the device to train on.
        config: the configuration of the new run, with the new guide and a schedule such as `teaching_schedule`.
        data: the sequences to draw tracks for; no labels are used.
        validation: sequences whose bound is reported at each evaluation.

    Raises:
        ValueError: if the folder holds a run of another configuration.
    """
    folder = Path(folder)
    resume = (folder / "checkpoint.pt").exists()
    if resume:
        refuse_another(config, folder)
    run = build(config)
    run.model.load_state_dict(teacher.model.state_dict())
    device = next(teacher.model.parameters()).device
    run = run._replace(model=run.model.to(device), guide=run.guide.to(device))
    tracks = draw_tracks(teacher.guide, data, seed=config.seed)
    result = fit(
        run.model, run.guide, data, config.schedule, seed=config.seed, run_dir=folder, validation=validation,
        resume=resume, progress=progress, objective=GivenTracks, tracks=tracks, config=config,
    )  # fmt: skip
    return run._replace(step=result.step), result
