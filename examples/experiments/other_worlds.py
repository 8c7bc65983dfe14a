"""Trains the quick preset in other worlds: noisy drift, grey drift, and walls, which a linear model cannot represent.

Each case is trained, evaluated on fresh sequences and checked for health; docs/other_worlds.md shows the results.
Repeat the same command to continue: finished cases are kept, interrupted ones resume.
"""

from examples._common import device_of, new_folder, read_json, say_where, start, write_json

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyro_pixels._options import Count, Seed, Sequences, result_file
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.health import EXPECTED, check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.plots import paper as plots
from pyro_pixels.presets import PRESETS
from pyro_pixels.result_tables import environment, markdown, per_n
from pyro_pixels.run_figures import RunView
from pyro_pixels.run_sequences import TEST_SEED, VALIDATION_SEED
from pyro_pixels.run_training import train_run
from pyro_pixels.runs import load_run
from pyro_pixels.training.checkpoints import read_lines
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig

QUICK = PRESETS["quick"]
HEIGHT, WIDTH = QUICK.data.height, QUICK.data.width
MIXED = Look(shapes=("disk", "square", "cross", "ring"), least_size=0.7)
SALT_AND_PEPPER = 0.02
NOISY_LOOK = replace(MIXED, salt_and_pepper=SALT_AND_PEPPER)
NOISY = replace(QUICK, data=DriftConfig(height=HEIGHT, width=WIDTH, radius=2.5, look=NOISY_LOOK))
FACTORS = {**QUICK.schedule.learning_rate_factors, "model.likelihood": 5.0}
CASES: dict[str, RunConfig] = {
    # half of the replaced pixels become white
    "drift_noisy_clutter": replace(NOISY, clutter=SALT_AND_PEPPER / 2),
    "drift_noisy": NOISY,
    "drift_grey": replace(
        QUICK,
        likelihood="gaussian",
        n_sequences=3_000,
        schedule=replace(QUICK.schedule, learning_rate_factors=FACTORS),
        data=DriftConfig(height=HEIGHT, width=WIDTH, radius=2.5, look=replace(MIXED, brightness=(0.5, 1.0))),
    ),
    "bouncing": replace(QUICK, data=BouncingConfig(height=HEIGHT, width=WIDTH)),
}
JUDGES = 60  # sequences for the health check, as in train.py


@dataclass
class Arguments:
    cases: tuple[str, ...] = tuple(CASES)
    """The cases to run."""
    out: Path = Path("runs/worlds")
    """Folder for the runs, with a subfolder for each case."""
    json: Path = Path("docs/results/worlds.json")
    """File for the numbers; those of other cases are kept."""
    figures: Path = Path("docs/figures/worlds")
    """Folder for the figures, one for each case."""
    steps: Count | None = None
    """Number of training steps. By default the quick preset's; fewer shorten the schedule in proportion."""
    n_sequences: Sequences | None = None
    """Number of training sequences. By default the preset's."""
    n_test: Sequences = 300
    """Number of fresh sequences for the evaluation of each run."""
    seed: Seed = 0
    """Seed of the data, the initial weights and training."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""


def main(args: Arguments) -> int:
    unknown = sorted(set(args.cases) - CASES.keys())
    if unknown:
        raise ValueError(f"there is no case '{unknown[0]}'; wanted some of {sorted(CASES)}")
    device = device_of(args.device)
    torch.set_num_threads(1)  # states this small do not benefit from more threads
    new_folder(result_file(args.json, ".json").parent)
    new_folder(args.out)
    new_folder(args.figures)
    results: dict[str, Any] = read_json(args.json) if args.json.exists() else {}
    for name in args.cases:
        config = replace(CASES[name], seed=args.seed)
        if args.steps is not None:
            config = replace(config, schedule=config.schedule.with_steps(args.steps))
        if args.n_sequences is not None:
            config = replace(config, n_sequences=args.n_sequences)
        _, result = train_run(
            config, new_folder(args.out / name), simulate(config.data, config.n_sequences, seed=config.seed),
            device=device, validation=simulate(config.data, JUDGES, seed=VALIDATION_SEED),
        )  # fmt: skip
        if result.interrupted:
            print("stopped and saved; repeat the same command to continue")
            return 130
        data = simulate(config.data, args.n_test, seed=TEST_SEED)
        results[name] = measure(args.out / name, data, device) | {"environment": environment(device)}
        write_json(args.json, results)
        draw(args.out / name, data, device, args.figures / f"{name}.png")
    print(table({name: results[name] for name in args.cases}))
    say_where([args.json, *(args.figures / f"{name}.png" for name in args.cases)])
    return 0


def measure(folder: Path, data: ImageSequences, device: torch.device) -> dict[str, Any]:
    """Returns the results of `evaluate` and of the health check, and the last metrics of training."""
    run = load_run(folder, device)
    judges = simulate(run.config.data, JUDGES, seed=VALIDATION_SEED)
    health = check_health(run.model, run.guide, judges)
    lines = read_lines(folder)
    likelihood = {name: p.tolist() for name, p in run.model.likelihood.named_parameters()}
    return {
        "evaluation": evaluate(run.model, run.guide, data),
        "health": {"measures": health.measures, "problems": health.problems, "causes": health.causes},
        "likelihood": likelihood,
        "training": lines[-1],
    }


def draw(folder: Path, data: ImageSequences, device: torch.device, out: Path) -> None:
    """Draws two sequences of each N: tracks, forecasts from the first frames, and images below them."""
    view = RunView(load_run(folder, device), data, device)
    rows, prediction = view.pick(2), view.generation()
    generated = view.tracks(prediction.mean)[rows]
    generated[:, :, : view.n_seen - 1] = torch.nan
    figure = plots.plot_trajectories(
        *view.truth_and_inferred(rows), generated,
        n_objects=data.n_objects[rows], size=view.size, columns=6,
        images={"truth": data.images[rows], "generated": prediction.images.cpu()[rows]},
    )  # fmt: skip
    plots.save_figure(figure, out)


def table(results: dict[str, Any]) -> str:
    """Returns a table of errors in pixels for each N and of the health check's signs of failure."""
    header = ["case", "position error", "switch rate", "generation error (floor)", "signs of failure"]
    rows = []
    for name, result in results.items():
        row, failed = result["evaluation"], result["health"]["measures"]
        signs = [f"{k} {x:.2f}" for k, x in failed.items() if k in EXPECTED and not _within(x, *EXPECTED[k])]
        floors = per_n(row, lambda r: r.get("generation_floor_px"), 2)
        rows.append([
            name, per_n(row, lambda r: r["position_error_px"], 2), per_n(row, lambda r: r["switch_rate"], 2),
            f"{per_n(row, lambda r: r['generation_error_px'], 2)} ({floors})", ", ".join(signs) or "none",
        ])  # fmt: skip
    return markdown(header, rows)


def _within(x: float, low: float, high: float) -> bool:
    return low <= x <= high


if __name__ == "__main__":
    start(main, Arguments, __doc__)
