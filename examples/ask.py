"""Answers one of several questions with a trained run, and draws the answer with its uncertainty (docs/queries.md).

filter: velocities, from past frames and from all. hidden: one object is not observed for a while. retrodict: where did
objects come from? what-if: no gravity, half of it, a push. evidence: how likely are the images? count: how many objects
are there? stream: inference frame by frame. calibration: are the stated uncertainties right?
"""

from _common import QueryArguments, new_folder, open_sequences, progress, say_where, start, write_json

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from pyro_pixels._options import Draws, Sequences
from pyro_pixels.data import ImageSequences
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.question_figures import QUESTIONS, Scene, draw_calibration
from pyro_pixels.result_tables import environment
from pyro_pixels.run_sequences import training_sequences
from pyro_pixels.runs import Run
from pyro_pixels.worlds.base import simulate

Question = Literal["filter", "hidden", "retrodict", "what-if", "evidence", "count", "stream", "calibration"]
assert set(QUESTIONS) == set(get_args(Question))


@dataclass
class Arguments(QueryArguments):
    question: Question = "hidden"
    """The question to answer."""
    n_samples: Draws = 20
    """Number of samples of q(a | v) to average over."""
    n_validation: Sequences = 60
    """Number of further sequences for fitting a correction of the uncertainties, with --question calibration."""


def further(run: Run, args: Arguments) -> ImageSequences:
    """Returns sequences that are not queried: simulated ones, or the last training sequences of the run's file."""
    if run.config.data_file is not None and not args.simulated:
        return training_sequences(run.config)[-args.n_validation :]
    return simulate(run.config.data, args.n_validation, seed=args.seed + 1)


@torch.no_grad()
def main(args: Arguments) -> None:
    out = new_folder(args.out or args.home / "ask")
    (run, data, device), asked = open_sequences(args)
    print(f"answering '{args.question}' for {len(data)} sequences", flush=True)
    scene = Scene(run, data, device, n_samples=args.n_samples, first=asked.first)
    scene.progress, scene.shows_progress = progress, True
    if args.question == "calibration":
        answer = draw_calibration(scene, further(run, args))
    else:
        answer = QUESTIONS[args.question](scene)
    if answer.text:
        print(answer.text)
    paths = [out / f"{args.question}.png"]
    save_figure(answer.figure, paths[0], answer.title)
    if answer.numbers:
        paths.append(out / f"{args.question}.json")
        about = {"seed": args.seed, "n_sequences": len(data), "environment": environment(device)}
        write_json(paths[1], {**answer.numbers, **about})
    say_where(paths)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
