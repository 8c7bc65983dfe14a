"""Trains a run (Secs 2.2.2, 3.2): a folder with config.json, metrics.jsonl, checkpoint.pt and figures.

Ctrl-C and SIGTERM save first; --resume then goes on as if nothing had happened.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common import TEST_SEED, device_of, new_folder, save, start
from pyro_pixels import plotting
from pyro_pixels.data import ImageSequences, atomic_write, load_sequences
from pyro_pixels.health import START_FRAMES, check_health, format_health
from pyro_pixels.learning import fit
from pyro_pixels.queries import infer
from pyro_pixels.runs import PRESETS, Run, RunConfig, build, load_config, save_config
from pyro_pixels.simulation import simulate
from pyro_pixels.worlds import WORLDS

SEEDS_APART = 1_000  # between the starting weights of --starts
JUDGES = 60  # sequences for the health check


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of the run."""
    preset: Literal["quick", "paper"] = "quick"
    guide: str | None = None
    """Name of a guide, if not the preset's."""
    likelihood: str | None = None
    """Name of a likelihood of the pixels, if not the preset's: bernoulli, continuous_bernoulli or gaussian."""
    clutter: float | None = None
    """Probability that a pixel of the background is white, for structured guides, if not the preset's 0."""
    world: Literal["cannonballs", "drift", "bouncing"] | None = None
    """What to simulate, at the preset's size, if not the preset's; examples/simulate.py can change more of it."""
    data: Path | None = None
    """An .npz of image sequences to learn from, a tenth of them (at most 60) held out; default: simulated."""
    n_sequences: int | None = None
    """How many sequences to simulate, if not the preset's number."""
    steps: int | None = None
    """Training steps, if not the preset's."""
    seed: int = 0
    starts: int = 1
    """Train so many starting weights for 200 steps, and go on with the one of the highest bound."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    threads: int | None = None
    """CPU threads; default: one for states up to 256, whose products are too small to share, else one a core."""
    resume: bool = False
    """Go on with the run in the folder, on its own data and with its own configuration; only --steps may change it."""
    progress: bool = True


def configure(args: Arguments) -> RunConfig:
    """The preset with what the arguments change."""
    config = replace(PRESETS[args.preset], seed=args.seed)
    for name in ("guide", "likelihood", "clutter", "n_sequences"):
        if getattr(args, name) is not None:
            config = replace(config, **{name: getattr(args, name)})
    if args.world is not None:
        world = WORLDS[args.world](n_frames=config.data.n_frames, height=config.data.height, width=config.data.width)
        config = replace(config, data=world)
    if args.steps is not None:
        config = replace(config, schedule=replace(config.schedule, steps=args.steps))
    if args.data is not None:
        config = replace(config, data_file=str(args.data.resolve()))
    return config


def training_data(config: RunConfig) -> tuple[ImageSequences, ImageSequences | None, RunConfig]:
    """Sequences to learn from, others whose bound is reported, and the configuration fitted to them."""
    if config.data_file is None:
        return (
            simulate(config.data, config.n_sequences, seed=config.seed),
            simulate(config.data, 60, seed=TEST_SEED - 1),
            config,
        )
    data = load_sequences(config.data_file)
    (height, width), most = data.size, int(data.n_objects.max())
    shape = replace(
        config.data,
        height=height,
        width=width,
        n_frames=data.images.shape[1],
        radius=min(config.data.radius, (min(height, width) - 2) / 2),
    )
    config = replace(config, data=shape, max_objects=max(most, config.max_objects), n_sequences=len(data))
    if not bool((data.n_objects == 1).any()):
        config = replace(config, schedule=replace(config.schedule, single_object_steps=0))
    held_out = min(60, len(data) // 10)
    return data[: len(data) - held_out], data[len(data) - held_out :] if held_out else None, config


class Snapshots:
    """Inferred means of a few sequences at every evaluation, kept in a file, for a figure like Fig 5(a)."""

    def __init__(self, path: Path, run: Run, data: ImageSequences, device: torch.device, resume: bool) -> None:
        most = data.n_objects == min(2, int(data.n_objects.max()))
        chosen = data[most if bool(most.any()) else slice(None)][:20]
        self.path, self.guide = path, run.guide
        self.images, self.n_objects = chosen.images.to(device), chosen.n_objects.to(device)
        self.means: dict[str, np.ndarray] = {}
        if resume and path.exists():
            with np.load(path) as file:
                self.means = dict(file)

    def take(self, metrics: dict[str, float]) -> None:
        self.means[str(int(metrics["step"]))] = infer(self.guide, self.images, self.n_objects).mean.cpu().numpy()
        with atomic_write(self.path) as file:
            np.savez(file, **self.means)  # type: ignore[arg-type]

    def stages(self) -> dict[str, np.ndarray]:
        """The first, the middle and the last."""
        steps = sorted(self.means, key=int)
        return {f"step {int(s):,}": self.means[s] for s in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))}


def main(args: Arguments) -> int:
    device = device_of(args.device)
    config = load_config(args.run) if args.resume else configure(args)
    data, validation, config = training_data(config)
    if args.resume:
        if args.steps is not None:
            config = replace(config, schedule=replace(config.schedule, steps=args.steps))
    elif (args.run / "checkpoint.pt").exists():
        raise ValueError(
            f"{args.run} holds a trained run; give --resume to go on with it, or another folder with --run"
        )
    for name in ("threads", "starts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    torch.set_num_threads(args.threads or (1 if config.state_size <= 256 else os.cpu_count() or 1))
    folder = new_folder(args.run)
    run = build(config)
    save_config(folder, config)
    n_parameters = sum(p.numel() for module in (run.model, run.guide) for p in module.parameters())
    print(
        f"training {folder}: guide '{config.guide}', {n_parameters:,} parameters, {len(data)} sequences "
        f"{tuple(data.images.shape[1:])}, {config.schedule.steps:,} steps on {device}"
    )
    snapshots = Snapshots(
        folder / "snapshots.npz", run, data if validation is None else validation, device, args.resume
    )
    others = [build(replace(config, seed=config.seed + SEEDS_APART * (i + 1))) for i in range(args.starts - 1)]
    result = fit(
        run.model.to(device), run.guide.to(device), data, config.schedule, seed=config.seed, run_dir=folder,
        validation=validation, candidates=[(other.model.to(device), other.guide.to(device)) for other in others],
        candidate_steps=min(200, config.schedule.steps), resume=args.resume, progress=args.progress,
        on_evaluation=snapshots.take,
    )  # fmt: skip
    if result.interrupted:
        print(
            f"stopped and saved at step {result.step:,}; go on with: python examples/train.py --run {folder} --resume"
        )
        return 130
    print(
        f"trained {result.step:,} steps in {result.seconds:.0f} s: "
        + ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if "per_frame" in k)
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    save(plotting.plot_training(lines), folder / "training.png")
    if snapshots.means:
        save(plotting.plot_inference_means(snapshots.stages()), folder / "inference_means.png")
    judges = data[:JUDGES] if validation is None or len(validation) < JUDGES else validation
    if judges.images.shape[1] > START_FRAMES + 1:
        print(format_health(check_health(run.model, run.guide, judges)))
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
