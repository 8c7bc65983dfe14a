"""Trains a run (Secs 2.2.2, 3.2): a folder with config.json, metrics.jsonl, checkpoint.pt and figures.

Ctrl-C and SIGTERM save first; --resume then goes on as if nothing had happened. --seeds trains several runs at once, in
the folders seed0, seed1, ... of --run. Under PyTorch's launcher the processes share the work of each batch:
`torchrun --nproc-per-node 4 -- examples/train.py ...`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as distributed

from common import TEST_SEED, device_of, new_folder, save, start
from pyro_pixels._files import atomic_write
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.evaluation.health import START_FRAMES, check_health, format_health
from pyro_pixels.plots import paper as plotting
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.predict import infer
from pyro_pixels.runs import Run, build, load_config
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.svi import Training
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.others import WORLDS

SEEDS_APART = 1_000  # between the starting weights of --starts
JUDGES = 60  # sequences for the health check


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of the run."""
    preset: Literal["quick", "recurrent", "paper", "paper_learned"] = "quick"
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
    seeds: int = 1
    """Train so many runs at once, from --seed on: on a GPU that one run does not fill, little slower than one."""
    starts: int = 1
    """Train so many starting weights for 200 steps, and go on with the one of the highest bound."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products on CUDA: float32, TF32, or bfloat16. Exact inference stays in float64."""
    parts: int | None = None
    """Go through each batch in so many parts, to save memory; default: one for each process."""
    threads: int | None = None
    """CPU threads; default: one for states up to 256, whose products are too small to share, else one a core."""
    resume: bool = False
    """Go on with the run in the folder, on its own data and with its own configuration; only --steps may change it."""
    progress: bool = True


def configure(args: Arguments) -> RunConfig:
    """The preset with what the arguments change."""
    config = replace(PRESETS[args.preset], seed=args.seed)
    parts = args.parts or int(os.environ.get("WORLD_SIZE", 1))
    config = replace(config, schedule=replace(config.schedule, parts=parts))
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


class Job:
    """One run: what it learns from, and what is shown of it."""

    def __init__(self, args: Arguments, folder: Path, config: RunConfig, device: torch.device) -> None:
        self.data, self.validation, self.config = training_data(config)
        self.folder, self.device, self.resume = new_folder(folder), device, args.resume
        run = build(self.config)
        self.run = run._replace(model=run.model.to(device), guide=run.guide.to(device))
        shown = self.data if self.validation is None else self.validation
        self.snapshots = Snapshots(folder / "snapshots.npz", self.run, shown, device, args.resume)

    def training(self) -> Training:
        return Training(
            self.run.model, self.run.guide, self.data, self.config.schedule, seed=self.config.seed,
            run_dir=self.folder, validation=self.validation, on_evaluation=self.snapshots.take,
            config=self.config,
        )  # fmt: skip

    def fit(self, n_starts: int, progress: bool) -> FitResult:
        seeds = [self.config.seed + SEEDS_APART * (i + 1) for i in range(n_starts - 1)]
        others = [build(replace(self.config, seed=seed)) for seed in seeds]
        return fit(
            self.run.model, self.run.guide, self.data, self.config.schedule, seed=self.config.seed,
            run_dir=self.folder, validation=self.validation,
            candidates=[(other.model.to(self.device), other.guide.to(self.device)) for other in others],
            candidate_steps=min(200, self.config.schedule.steps), resume=self.resume, progress=progress,
            on_evaluation=self.snapshots.take, config=self.config,
        )  # fmt: skip

    def introduce(self) -> None:
        n_parameters = sum(p.numel() for module in (self.run.model, self.run.guide) for p in module.parameters())
        print(
            f"training {self.folder}: guide '{self.config.guide}', {n_parameters:,} parameters, {len(self.data)} "
            f"sequences {tuple(self.data.images.shape[1:])}, {self.config.schedule.steps:,} steps on {self.device}"
        )

    def show(self, result: FitResult) -> None:
        """Numbers, figures, and whether it has worked."""
        print(
            f"trained {result.step:,} steps in {result.seconds:.0f} s: "
            + ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if "per_frame" in k)
        )
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        save(plotting.plot_training(lines), self.folder / "training.png")
        if self.snapshots.means:
            save(plotting.plot_inference_means(self.snapshots.stages()), self.folder / "inference_means.png")
        held_out = self.validation is not None and len(self.validation) >= JUDGES
        judges = self.validation if held_out else self.data[:JUDGES]
        if judges.images.shape[1] > START_FRAMES + 1:
            print(format_health(check_health(self.run.model, self.run.guide, judges)))


def main(args: Arguments) -> int:
    for name in ("threads", "starts", "seeds", "parts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    if args.seeds > 1 and args.starts > 1:
        raise ValueError(f"seeds is {args.seeds} and starts {args.starts}; wanted only one of them above 1")
    torch.set_float32_matmul_precision(args.precision)
    with processes(device_of(args.device)) as (device, first):
        jobs = [make_job(args, seed, device) for seed in range(args.seed, args.seed + args.seeds)]
        small = jobs[0].config.state_size <= 256
        torch.set_num_threads(args.threads or (1 if small else os.cpu_count() or 1))
        progress = args.progress and first
        for job in jobs if first else []:
            job.introduce()
        if len(jobs) == 1:
            results = [jobs[0].fit(args.starts, progress)]
        else:
            results = fit_together([job.training() for job in jobs], resume=args.resume, progress=progress)
        if results[0].interrupted:
            if first:
                print(f"stopped and saved at step {results[0].step:,}; give the same command with --resume to go on")
            return 130
        for job, result in zip(jobs, results) if first else ():
            job.show(result)
        return 0


def make_job(args: Arguments, seed: int, device: torch.device) -> Job:
    """The run of one seed, in a folder of its own where there are several."""
    folder = args.run if args.seeds == 1 else args.run / f"seed{seed}"
    if not args.resume:
        if (folder / "checkpoint.pt").exists():
            raise ValueError(
                f"{folder} holds a trained run; give --resume to go on with it, or another folder with --run"
            )
        return Job(args, folder, configure(replace(args, seed=seed)), device)
    config = load_config(folder)
    if args.steps is not None:
        config = replace(config, schedule=replace(config.schedule, steps=args.steps))
    return Job(args, folder, config, device)


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[torch.device, bool]]:
    """This process' device, and whether it is the first; under `torchrun` the processes find each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device, True
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    start(main, Arguments, __doc__)
