"""The whole pipeline in minutes: simulates cannonballs, trains the quick preset, evaluates it and draws the results.

All results go to one folder: config.json, metrics.jsonl, checkpoint.pt, metrics.json, figures and a GIF.
"""

from _common import device_of, new_folder, read_config, say_where, start, with_named, write_json

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pyro_pixels import lgssm
from pyro_pixels._options import Count, Seed, refuse_changes
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation.answers import infer_all, predict_all, seen_by_default
from pyro_pixels.evaluation.film import START_FRAMES
from pyro_pixels.evaluation.health import check_health, format_health
from pyro_pixels.evaluation.table import N_FUTURES, format_table, table_of
from pyro_pixels.plots.paper import plot_start, save_figure
from pyro_pixels.presets import PRESETS
from pyro_pixels.result_tables import environment
from pyro_pixels.run_figures import (
    RunView,
    Snapshots,
    draw_error_over_time,
    draw_generation,
    draw_inference,
    draw_interpolation,
    draw_sequences,
    draw_training,
)
from pyro_pixels.run_sequences import TEST_SEED, AskedSequences, run_sequences, sequences_to_ask
from pyro_pixels.run_training import train_run
from pyro_pixels.runs import Run, build

N_TEST, N_DRAWN = 300, 60


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder for all results. A run that exists there is resumed."""
    data: Path | None = None
    """An .npz of your own image sequences. By default cannonballs are simulated."""
    custom: Path | None = None
    """A Python file that adds your own guide (docs/write_a_guide.md), world or likelihood (docs/other_worlds.md)."""
    steps: Count | None = None
    """Number of training steps. By default the preset's; fewer shorten the schedule in proportion."""
    seed: Seed = 0
    """Seed of the data, the initial weights and training."""
    details: bool = False
    """Print all measures of the health check, and a sentence for each sign of failure."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""


def main(args: Arguments) -> int:
    started = time.perf_counter()
    out, device = new_folder(args.run), device_of(args.device)
    torch.set_num_threads(1)  # the preset's matrix products are too small for several threads
    there = (out / "checkpoint.pt").exists()

    print("1. learning from images alone" + (" (continuing the run in the folder)" if there else ""))
    config = read_config(out, args.custom) if there else configure(args)
    training, held_out, config = run_sequences(config)
    if there:
        data_file = None if config.data_file is None else Path(config.data_file)
        args.data = None if args.data is None else args.data.resolve()
        refuse_changes(args, {"data": data_file, "seed": config.seed}, out)
    if there and args.steps is not None:
        config = replace(config, schedule=replace(config.schedule, steps=args.steps))
    snapshots = Snapshots(out / "snapshots.npz", training if held_out is None else held_out, resume=there)
    run, result = train_run(config, out, training, device=device, validation=held_out, on_evaluation=snapshots.take)
    if result.interrupted:
        print(f"stopped and saved at step {result.step:,}; repeat the same command to continue")
        return 130
    print(f"trained {result.step:,} steps in {result.seconds:.0f} s")
    paths = draw_training(out)

    all_of_file = config.data_file if held_out is None else None  # small files have no held-out sequences
    test, source, *_ = sequences_to_ask(config, all_of_file, N_TEST, TEST_SEED)
    print(f"2. evaluating it on {source}")
    torch.manual_seed(TEST_SEED)
    T = test.images.shape[1]
    inferred = infer_all(run.model, run.guide, test, progress=True)
    n_futures = N_FUTURES if test.positions is None else 0
    predicted = predict_all(run.model, run.guide, test, n_seen=seen_by_default(T), n_futures=n_futures, progress=True)
    table = table_of(run.model, test, inferred, predicted)
    table |= {"step": run.step, "train_seed": config.seed, "test_seed": TEST_SEED if config.data_file is None else None}
    table["environment"] = environment(device)
    print(format_table(table))
    if T > START_FRAMES + 1:
        health = check_health(run.model, run.guide, test, inferred=inferred)
        table["health"] = health._asdict()
        print(format_health(health, options=True, details=args.details))
    write_json(out / "metrics.json", table, indent=2)
    paths += draw_error_over_time(test, inferred.mean, predicted, out)

    print("3. drawing its results")
    shown = sequences_to_ask(config, all_of_file, N_DRAWN, TEST_SEED + 1)
    paths += draw(run, shown, config.seed, out, device)
    say_where([out / "metrics.json", *paths])
    print(f"done in {time.perf_counter() - started:.0f} s; look at {out / 'generation.gif'} first")
    return 0


def configure(args: Arguments) -> RunConfig:
    """Returns the quick preset with the changes of the arguments."""
    config = replace(PRESETS["quick"], seed=args.seed)
    if args.steps is not None:
        config = replace(config, schedule=config.schedule.with_steps(args.steps))
    if args.data is not None:
        config = replace(config, data_file=str(args.data.resolve()))
    world = {"world": None} if args.data is None else {}
    return with_named(config, args.custom, guide=None, likelihood=None, **world)


def draw(run: Run, shown: AskedSequences, seed: int, out: Path, device: torch.device) -> list[Path]:
    """Draws the sequences, samples of the initial dynamics (Fig 4), and the run's inferences and predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        h, a = lgssm.sample(build(run.config).model.dynamics.lgssm(), shown.data.images.shape[1], (3,))
    figure = plot_start(h[:, 0, :, :2].detach(), a[:, 0].detach())
    save_figure(figure, out / "start.png", "Three draws before training: states h and positions a")
    view = RunView(run, shown.data, device, first=shown.first)
    generated, interpolated = view.generation(), view.interpolation()
    return [
        draw_sequences(shown.data, out / "sequences.png"),
        out / "start.png",
        *draw_inference(view, out),
        *draw_generation(view, generated, out),
        *draw_interpolation(view, generated, interpolated, out),
    ]


if __name__ == "__main__":
    start(main, Arguments, __doc__)
