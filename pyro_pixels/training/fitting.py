"""Learning (Secs 2.2.2, 3.2): one training from start to end, or several at once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.training.checkpoints import stop_signals
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.loop import FitResult, Training, n_processes
from pyro_pixels.training.schedule import Schedule


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
    objective: Callable[[], AnnealedELBO] = AnnealedELBO,
    tracks: Tensor | None = None,
) -> FitResult:
    """Maximises Eq (7) over the parameters of model and guide, in place, on the device they are on.

    On a CUDA device steps are replayed as CUDA graphs (`steps.CapturedSteps`). In each process of a `torchrun` the same
    call shares every batch with the others (`steps.DistributedSteps`); the first process writes the files.

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
        objective: what is minimised in place of the bound, such as `teaching.GivenTracks`; called to make it.
        tracks: (n, N, T, 2), what such an objective is given of each sequence besides its images.

    Raises:
        ValueError: if a candidate is of another kind than ``model`` and ``guide``; if ``resume`` finds no checkpoint or
            one of another configuration; if the folder holds a run and ``resume`` is not given; if there is no
            sequence with N = 1 where the schedule asks for one; if there are not as many ``tracks`` as sequences; or
            if there are candidates, or ``schedule.parts`` is no multiple of the number of processes, where there are
            several.
        FloatingPointError: if the loss is no longer finite; the last checkpoint before it is kept.
    """

    if candidates and not 1 <= candidate_steps <= schedule.steps:
        raise ValueError(f"candidate_steps is {candidate_steps}; wanted between 1 and steps, {schedule.steps}")
    if candidates and n_processes() > 1:
        raise ValueError("candidates are compared in one process; leave them out of a torchrun")
    training = Training(
        model, guide, data, schedule, seed=seed, run_dir=run_dir, validation=validation, on_evaluation=on_evaluation,
        objective=objective, tracks=tracks,
    )  # fmt: skip
    others = [
        Training(*start, data, schedule, seed=seed + i + 1, objective=objective, tracks=tracks)
        for i, start in enumerate(candidates)
    ]
    with _prepared([training], resume) as stop:
        if others and not resume:
            training.start_from_best(others, candidate_steps, stop, progress)
        training.train(stop, progress=progress)
        return training.result(stop)


def fit_together(trainings: "Sequence[Training]", *, resume: bool = False, progress: bool = True) -> list[FitResult]:
    """Trains several models at once, one step of each after the other.

    On a CUDA device each has a stream of its own, and small models share the card: several seeds take little longer
    than one. Each has its own random numbers; on a CPU the results are those of one `fit` after the other, to the bit.
    Arguments and errors as in `fit`; all must have equally many steps.
    """
    if len({t.schedule.steps for t in trainings}) != 1:
        raise ValueError("trainings differ in their numbers of steps; wanted at least one, and the same for all")
    with _prepared(trainings, resume) as stop:
        total, first = trainings[0].schedule.steps, min(t.step for t in trainings)
        with tqdm(total=total, initial=first, disable=not progress, unit="step", mininterval=0.5) as bar:
            for _ in zip_longest(*(t.advance(total, stop) for t in trainings)):
                bar.update()
        return [t.result(stop) for t in trainings]


@contextmanager
def _prepared(trainings: "Sequence[Training]", resume: bool) -> Iterator[threading.Event]:
    """Global state as training needs it, trainings loaded or begun; gives an event that stops them."""
    cuda = [t.device for t in trainings if t.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False), stop_signals() as stop:
        for t in trainings:
            t.begin(resume)
        yield stop
