"""Training from start to end (Secs 2.2.2, 3.2) of one model, or of several at once."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Unpack

from tqdm import tqdm

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.training.loop import FitResult, prepared
from pyro_pixels.training.processes import n_processes
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.svi import Training, TrainingOptions


def fit(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    schedule: Schedule,
    *,
    candidates: Sequence[tuple[PixelModel, Guide]] = (),
    candidate_steps: int = 200,
    resume: bool = False,
    progress: bool = True,
    **options: Unpack[TrainingOptions],
) -> FitResult:
    """Maximises the ELBO of Eq (7) over the parameters of model and guide, in place, on their device.

    Steps are taken in training mode, of all but the parameters whose ``requires_grad`` is False. Model and guide are
    left in evaluation mode, ready for queries.

    On a CUDA device, steps are replayed as CUDA graphs (`step_runners.CapturedSteps`). Under `torchrun`, the processes
    that make the same call share every batch (`step_runners.DistributedSteps`), and the first one writes the files.

    Args:
        model: the generative model.
        guide: the guide.
        data: the training sequences; ``positions`` are never used.
        schedule: the settings of training.
        candidates: pairs of a model and a guide with other starting weights. These and the given pair are trained for
            ``candidate_steps``; the one with the highest bound (on the validation sequences, if there are any) is
            trained further, in ``model`` and ``guide``. No labels are used. If training is stopped before they are
            compared, nothing is saved: the result has step 0, and the same call with new models begins again.
        candidate_steps: the number of steps before candidates are compared.
        resume: continue from the checkpoint in ``run_dir``; on a CPU the results are those of an uninterrupted run.
        progress: show a progress bar.
        options: ``seed``, ``run_dir``, ``validation``, ``on_evaluation``, ``objective``, ``tracks`` and ``config`` of
            `TrainingOptions`.

    Raises:
        ValueError: if another process trains in ``run_dir``; if ``resume`` finds no checkpoint, one of another
            configuration or one trained on other sequences; if the folder holds a run and ``resume`` is not set; if a
            candidate is of another kind than ``model`` and ``guide``; if the schedule starts with single objects and
            no sequence has N = 1; if the numbers of ``tracks`` and sequences differ; or, with several processes, if
            there are candidates or ``schedule.parts`` is not a multiple of the number of processes.
        FloatingPointError: if the loss is no longer finite; the last checkpoint is kept.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}; wanted a Schedule")
    if candidates and not 1 <= candidate_steps <= schedule.steps:
        raise ValueError(f"candidate_steps is {candidate_steps}; wanted between 1 and steps, {schedule.steps}")
    if candidates and n_processes() > 1:
        raise ValueError("candidates are compared in one process; leave them out under torchrun")
    training = Training(model, guide, data, schedule, **options)
    shared: TrainingOptions = {**options, "run_dir": None, "on_evaluation": None, "config": None}
    others = [
        Training(*start, data, schedule, **{**shared, "seed": training.seed + i + 1})
        for i, start in enumerate(candidates)
    ]
    with prepared([training], resume) as stop:
        if others and not resume and not training.start_from_best(others, candidate_steps, stop, progress):
            return FitResult(0, 0.0, {}, interrupted=True)
        training.train(stop, progress=progress)
        return training.result(stop)


def fit_together(trainings: Sequence[Training], *, resume: bool = False, progress: bool = True) -> list[FitResult]:
    """Trains several models at once, one step of each after the other.

    On a CUDA device each has its own stream, and small models share the GPU: several seeds take little longer than one.
    Each has its own random numbers; on a CPU the results are bitwise those of separate calls of `fit`. Arguments and
    errors are as in `fit`; all trainings must have the same number of steps. One that diverges stops with a warning,
    and its `FitResult.diverged` says why; only if all of them diverge, the last error is raised.
    """
    if len({t.n_steps for t in trainings}) != 1:
        raise ValueError("trainings differ in their numbers of steps; wanted at least one, all with the same number")
    diverged: dict[Training, str] = {}

    def advance(training: Training, stop: threading.Event) -> Iterator[None]:
        try:
            yield from training.advance(training.n_steps, stop)
        except FloatingPointError as error:
            if len(diverged) == len(trainings) - 1:
                raise
            diverged[training] = str(error)
            warnings.warn(f"one of {len(trainings)} trainings stops: {error}", stacklevel=2)

    with prepared(trainings, resume) as stop:
        total, first = trainings[0].n_steps, min(t.step for t in trainings)
        with tqdm(total=total, initial=first, disable=not progress, unit="step", mininterval=0.5) as bar:
            for _ in zip_longest(*(advance(t, stop) for t in trainings)):
                bar.update()
        return [
            FitResult(t.step, t.seconds, t.metrics, False, diverged[t]) if t in diverged else t.result(stop)
            for t in trainings
        ]
