"""Trains the paper's baseline, an encoder-decoder LSTM (Sec 3.4, Fig 7), and evaluates it on fresh sequences.

Writes config.json, metrics.jsonl, checkpoint.pt, metrics.json and generated_images.png to a folder. Ctrl-C and SIGTERM
save first; --resume then continues as if training had not been interrupted.
"""

from examples._common import device_of, new_folder, say_where, start, write_json

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from pyro_pixels._options import Count, Seed, Sequences, Size, Threads, Workers, refuse_changes
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.evaluation.ed_lstm import EDLSTM, EDLSTMConfig, evaluate_edlstm, fit_edlstm
from pyro_pixels.evaluation.table import N_SEEN
from pyro_pixels.plots import paper as plots
from pyro_pixels.presets import PRESETS
from pyro_pixels.result_tables import environment
from pyro_pixels.run_sequences import TEST_SEED
from pyro_pixels.runs import load_config
from pyro_pixels.worlds.base import WorldConfig, simulate


@dataclass
class Arguments:
    run: Path = Path("runs/edlstm")
    """Folder of the run."""
    preset: Literal["quick", "paper"] = "quick"
    """Preset that provides the data, the number of sequences and the number of steps."""
    state_size: Size = 2048
    """Length of the LSTM's state and of the hidden layers."""
    layers: Workers = 1
    """Number of fully connected layers in the encoder, and in the decoder."""
    own_predictions: bool = False
    """Train the network on its own predictions after 5 frames, as in testing. By default it is trained on the true
    frames, as in the paper."""
    data: Path | None = None
    """An .npz of image sequences; the last tenth (at most 60) is held out for the evaluation. By default sequences are
    simulated."""
    n_sequences: Sequences | None = None
    """Number of training sequences to simulate. By default the preset's."""
    n_test: Sequences = 300
    """Number of fresh sequences to simulate for the evaluation."""
    steps: Count | None = None
    """Number of training steps. By default the preset's."""
    seed: Seed = 0
    """Seed of the data, the initial weights and training."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    threads: Threads | None = None
    """Number of CPU threads. By default one per core."""
    resume: bool = False
    """Resume the run in the folder with its own data and configuration; only --steps may change the configuration."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class Config:
    """The configuration of a run, as stored in config.json."""

    net: EDLSTMConfig
    own_predictions: bool
    data: WorldConfig
    """The world to simulate if there is no file."""
    data_file: str | None
    n_sequences: int
    steps: int
    seed: int


def configure(args: Arguments) -> Config:
    """Returns the preset's configuration with the changes of the arguments, and with a file's image size, if given."""
    preset = PRESETS[args.preset]
    size = (preset.data.height, preset.data.width) if args.data is None else load_sequences(args.data).size
    return Config(
        net=EDLSTMConfig(height=size[0], width=size[1], state_size=args.state_size, n_layers=args.layers),
        own_predictions=args.own_predictions,
        data=preset.data,
        data_file=None if args.data is None else str(args.data.resolve()),
        n_sequences=preset.n_sequences if args.n_sequences is None else args.n_sequences,
        steps=preset.schedule.steps,
        seed=args.seed,
    )


def sequences(config: Config, n_test: int) -> tuple[ImageSequences, ImageSequences]:
    """Returns sequences for training and others for the evaluation."""
    if config.data_file is None:
        return (
            simulate(config.data, config.n_sequences, seed=config.seed),
            simulate(config.data, n_test, seed=TEST_SEED),
        )
    data = load_sequences(config.data_file)
    if len(data) < 2:
        raise ValueError(
            f"{config.data_file} has 1 sequence; wanted at least 2, one to train on and one to evaluate on"
        )
    held_out = min(60, -(-len(data) // 10))
    return data[: len(data) - held_out], data[len(data) - held_out :]


def draw(net: EDLSTM, data: ImageSequences, path: Path) -> None:
    """Draws generated_images.png, like the bottom row of Fig 6: two sequences of each N, the largest N first."""
    values = sorted(set(data.n_objects.tolist()), reverse=True)
    rows = torch.cat([(data.n_objects == n).nonzero().squeeze(1)[:2] for n in values])
    truth = data.images[rows]
    drawn = net.generate(truth[:, :N_SEEN].to(next(net.parameters())), truth.shape[1]).cpu()
    plots.save_figure(plots.plot_generated_images(drawn[:, N_SEEN:], truth[:, N_SEEN:], rows=2), path)


def main(args: Arguments) -> int:
    device = device_of(args.device)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    if not args.resume and (args.run / "checkpoint.pt").exists():
        raise ValueError(f"{args.run} holds a trained run; give --resume to continue it, or another folder with --run")
    folder = new_folder(args.run)
    config = load_config(folder, Config) if args.resume else configure(args)
    if args.resume:
        there = {"state_size": config.net.state_size, "layers": config.net.n_layers, "seed": config.seed}
        there |= {"own_predictions": config.own_predictions, "n_sequences": config.n_sequences}
        there["data"] = None if config.data_file is None else Path(config.data_file)
        refuse_changes(replace(args, data=args.data and args.data.resolve()), there, folder)
    if args.steps is not None:
        config = replace(config, steps=args.steps)
    data, test = sequences(config, args.n_test)
    if data.images.shape[1] <= N_SEEN:
        raise ValueError(f"sequences have {data.images.shape[1]} frames; wanted more than the {N_SEEN} observed ones")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = EDLSTM(config.net).to(device)
    print(
        f"training {folder}: ED-LSTM, {sum(p.numel() for p in net.parameters()):,} parameters, {len(data)} sequences "
        f"{tuple(data.images.shape[1:])}, {config.steps:,} steps on {device}, after {N_SEEN} frames on "
        + ("its own predictions" if config.own_predictions else "the true frames")
    )
    result = fit_edlstm(
        net, data, steps=config.steps, own_predictions=config.own_predictions, seed=config.seed, run_dir=folder,
        resume=args.resume, progress=args.progress, config=config,
    )  # fmt: skip
    if result.interrupted:
        print(
            f"stopped and saved at step {result.step:,}; "
            f"continue with: python -m examples.experiments.train_edlstm --run {folder} --resume"
        )
        return 130
    loss = result.metrics.get("nll_per_frame", float("nan"))
    print(f"trained {result.step:,} steps in {result.seconds:.0f} s: nll_per_frame {loss:.4g}")

    table = evaluate_edlstm(net, test, radius=config.data.radius)
    table |= {"step": result.step, "train_seed": config.seed, "own_predictions": config.own_predictions}
    table |= {"test_seed": TEST_SEED if config.data_file is None else None, "environment": environment(device)}
    write_json(folder / "metrics.json", table, indent=2)
    for name, row in {**{f"N = {n}": row for n, row in table["by_n_objects"].items()}, "all": table["all"]}.items():
        print(f"{name:<6} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))
    draw(net, test, folder / "generated_images.png")
    say_where([folder / "metrics.json", folder / "generated_images.png"])
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
