"""Trains a run (Secs 2.2.2, 3.2): a folder with config.json, metrics.jsonl, checkpoint.pt and figures.

Ctrl-C and SIGTERM save first; --resume then continues as if training had not been interrupted. --seeds trains several
runs at once, in the folders seed0, seed1, ... of --run. Under PyTorch's launcher the processes share each batch:
`torchrun --nproc-per-node 4 -- examples/train.py ...`.
"""

from _common import device_of, new_folder, read_config, say_where, start, with_named

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as distributed

from pyro_pixels._options import Count, Seed, Seeds, Sequences, Share, Threads, refuse_changes
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation.film import START_FRAMES
from pyro_pixels.evaluation.health import check_health, format_health
from pyro_pixels.presets import PRESETS
from pyro_pixels.run_figures import Snapshots, draw_training
from pyro_pixels.run_sequences import run_sequences
from pyro_pixels.run_training import build_on, train_run
from pyro_pixels.runs import build, check_config
from pyro_pixels.training.fitting import fit_together
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.svi import Training
from pyro_pixels.video.check import check_film

JUDGES = 60  # sequences for the health check


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of the run."""
    preset: Literal["quick", "recurrent", "recurrent_long", "paper", "paper_learned"] = "quick"
    """The configuration to start from: quick learns in minutes, recurrent is the paper's network with initial values
    that make it learn, paper is Secs 3.1-3.2 to the letter, paper_learned is recurrent at the paper's size."""
    guide: str | None = None
    """Name of a guide in `GUIDES`, such as recurrent, attentive or structured. By default the preset's."""
    custom: Path | None = None
    """A Python file that adds your own guide to `GUIDES` (docs/write_a_guide.md), world to `WORLDS` or likelihood to
    `LIKELIHOODS` (docs/other_worlds.md). If it adds only one of a kind, that is used unless an option names another.
    The run keeps the file's path and checksum, and can be read without this option while the file does not change."""
    likelihood: str | None = None
    """Name of a likelihood of the pixels in `LIKELIHOODS`: bernoulli, continuous_bernoulli or gaussian. By default the
    preset's."""
    clutter: Share | None = None
    """Probability that a pixel shows none of the objects, which structured guides allow for in addition to what is
    estimated from the film. By default the preset's, which is 0."""
    world: str | None = None
    """Name of a world in `WORLDS` to simulate, at the preset's size: cannonballs, drift or bouncing. By default the
    preset's; examples/simulate.py has more options."""
    data: Path | None = None
    """An .npz of image sequences; the last tenth of them (at most 60) is held out. By default sequences are
    simulated."""
    n_sequences: Sequences | None = None
    """Number of sequences to simulate. By default the preset's."""
    steps: Count | None = None
    """Number of training steps. By default the preset's. Fewer shorten the whole schedule in proportion; more are
    added at the end."""
    seed: Seed = 0
    """Seed of the data, the initial weights and training."""
    seeds: Seeds = 1
    """Number of runs to train at once, with consecutive seeds from --seed. On a GPU that one run does not fill, this
    takes little longer than one run."""
    starts: Count = 1
    """Number of initial weights to train for 200 steps; training then continues from those with the highest bound. If
    stopped before, it begins again."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """Precision of float32 matrix products on CUDA: highest is float32, high TF32, medium bfloat16; auto is TF32. Exact
    inference stays in float64."""
    parts: Count | None = None
    """Number of parts into which each batch is split, to save memory. By default one per process."""
    threads: Threads | None = None
    """Number of CPU threads. By default one for states up to 256, whose products are too small for several, else one
    per core."""
    resume: bool = False
    """Resume the run in the folder with its own data and configuration; only --steps and --parts may change the
    configuration."""
    details: bool = False
    """Print all measures of the health check, and a sentence for each sign of failure."""
    progress: bool = True
    """Show a progress bar."""


def configure(args: Arguments) -> RunConfig:
    """Returns the preset with the changes of the arguments."""
    config = replace(PRESETS[args.preset], seed=args.seed)
    parts = args.parts or int(os.environ.get("WORLD_SIZE", 1))
    config = replace(config, schedule=replace(config.schedule, parts=parts))
    for name in ("clutter", "n_sequences"):
        if getattr(args, name) is not None:
            config = replace(config, **{name: getattr(args, name)})
    if args.steps is not None:
        config = replace(config, schedule=config.schedule.with_steps(args.steps))
    if args.data is not None:
        config = replace(config, data_file=str(args.data.resolve()))
    world = {"world": args.world} if args.data is None else {}
    config = with_named(config, args.custom, guide=args.guide, likelihood=args.likelihood, **world)
    if args.clutter and not any(hasattr(part, "clutter") for part in build(config).guide.modules()):
        raise ValueError(
            f"--clutter {args.clutter} is given, but the guide '{config.guide}' has no clutter parameter; leave it out"
        )
    return config


class Job:
    """One run, with its data and its snapshots."""

    def __init__(self, folder: Path, config: RunConfig, device: torch.device, *, resume: bool) -> None:
        self.folder, self.device = new_folder(folder), device
        self.data, self.held_out, self.config = run_sequences(config)
        shown = self.data if self.held_out is None else self.held_out
        self.snapshots = Snapshots(folder / "snapshots.npz", shown, resume=resume)

    def introduce(self) -> None:
        run = build(self.config)
        n_parameters = sum(p.numel() for module in (run.model, run.guide) for p in module.parameters())
        print(
            f"training {self.folder}: guide '{self.config.guide}', {n_parameters:,} parameters, {len(self.data)} "
            f"sequences {tuple(self.data.images.shape[1:])}, {self.config.schedule.steps:,} steps on {self.device}"
        )
        if self.config.data_file is not None and not self.config.n_held_out:
            print(
                f"the {self.config.n_sequences} sequences in {self.config.data_file} are too few to hold any out; "
                "give the other scripts sequences with --data"
            )
        elif self.config.data_file is not None:
            print(
                f"the last {self.config.n_held_out} of the {self.config.n_sequences} sequences in "
                f"{self.config.data_file} are held out; the other scripts use these by default"
            )
        if self.config.data_file is not None:
            for warning in [*self.likelihood_warnings(), *check_film(self.data)]:
                print(f"  ! {warning}")

    def likelihood_warnings(self) -> list[str]:
        """Returns a warning if the images are grey but the likelihood is meant for black and white; else nothing."""
        images = self.data.images
        if self.config.likelihood != "bernoulli" or not bool(((images > 0) & (images < 1)).any()):
            return []
        return [
            "images are grey, but the likelihood is bernoulli, which takes their values for fractions of white; "
            "for a distribution over grey images, give --likelihood gaussian"
        ]

    def train(self, n_starts: int, progress: bool) -> FitResult:
        self.run, result = train_run(
            self.config, self.folder, self.data, device=self.device, validation=self.held_out, n_starts=n_starts,
            progress=progress, on_evaluation=self.snapshots.take,
        )  # fmt: skip
        return result

    def beside_others(self) -> Training:
        """Returns the training of a run that takes turns with others."""
        self.run = build_on(self.config, self.device)
        return Training(
            self.run.model, self.run.guide, self.data, self.config.schedule, seed=self.config.seed,
            run_dir=self.folder, validation=self.held_out, config=self.config,
            on_evaluation=lambda line: self.snapshots.take(self.run, line),
        )  # fmt: skip

    def show(self, result: FitResult, *, details: bool, progress: bool) -> None:
        """Prints the last metrics and the health check, and draws figures."""
        print(
            f"trained {result.step:,} steps in {result.seconds:.0f} s: "
            + ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if "per_frame" in k)
        )
        judges = self.held_out
        if judges is None or len(judges) < JUDGES:
            judges = self.data[:JUDGES]
        if judges.images.shape[1] > START_FRAMES + 1:
            print("checking health ...", flush=True)
            health = check_health(self.run.model, self.run.guide, judges, progress=progress)
            print(format_health(health, options=True, details=details))
        say_where([self.folder, *draw_training(self.folder)])


def main(args: Arguments) -> int:
    for name in ("world", "n_sequences") if args.data is not None else ():
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(f"{option} is for simulated sequences, but --data {args.data} is a file; leave one out")
    if args.seeds > 1 and args.starts > 1:
        raise ValueError(f"seeds is {args.seeds} and starts is {args.starts}; wanted at most one of them above 1")
    with processes(device_of(args.device)) as (device, first):
        usual = "high" if device.type == "cuda" else "highest"
        torch.set_float32_matmul_precision(usual if args.precision == "auto" else args.precision)
        jobs = [make_job(args, seed, device) for seed in range(args.seed, args.seed + args.seeds)]
        small = jobs[0].config.state_size <= 256
        torch.set_num_threads(args.threads or (1 if small else os.cpu_count() or 1))
        progress = args.progress and first
        if first:
            for job in jobs:
                job.introduce()
            print(end=steps_note(args))
        if len(jobs) == 1:
            results = [jobs[0].train(args.starts, progress)]
        else:
            results = fit_together([job.beside_others() for job in jobs], resume=args.resume, progress=progress)
        stopped = [result for result in results if result.interrupted]  # all but those that had diverged
        if not first:
            return 130 if stopped else 0
        if len(jobs) == 1 and stopped and not (jobs[0].folder / "checkpoint.pt").exists():
            print("stopped while comparing starts; nothing was saved: repeat the same command to begin again")
            return 130
        if stopped:
            print(f"stopped and saved at step {stopped[0].step:,}; repeat the same command with --resume to continue")
            return 130
        for job, result in zip(jobs, results):
            if not result.diverged:
                job.show(result, details=args.details, progress=args.progress)
        diverged = [result.diverged for result in results if result.diverged]
        if diverged:
            raise FloatingPointError(f"{len(diverged)} of {len(jobs)} seeds diverged: {diverged[0]}")
        return 0


def make_job(args: Arguments, seed: int, device: torch.device) -> Job:
    """Returns the job of one seed, in a separate folder if there are several."""
    folder = args.run if args.seeds == 1 else args.run / f"seed{seed}"
    if args.resume:
        config = read_config(folder, args.custom)
        refuse_changes(replace(args, data=args.data and args.data.resolve()), options_of(config, seed, args), folder)
        changes = {"steps": args.steps, "parts": args.parts}
        changes = {name: value for name, value in changes.items() if value is not None}
        config = replace(config, schedule=replace(config.schedule, **changes))
    elif (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} holds a trained run; give --resume to continue it, or another folder with --run")
    else:
        config = configure(replace(args, seed=seed))
    check_config(config)
    return Job(folder, config, device, resume=args.resume)


def options_of(config: RunConfig, seed: int, args: Arguments) -> dict[str, Any]:
    """Returns the values of the options that correspond to a run's configuration."""
    like_preset = replace(PRESETS[args.preset], guide=config.guide).state_size == config.state_size
    return {
        "preset": args.preset if like_preset else "another",
        "guide": config.guide,
        "likelihood": config.likelihood,
        "clutter": config.clutter,
        "world": config.data.world,
        "data": None if config.data_file is None else Path(config.data_file),
        "n_sequences": config.n_sequences,
        "seed": args.seed if seed == config.seed else config.seed,
    }


def steps_note(args: Arguments) -> str:
    """Returns a line about how --steps changed the schedule, or an empty string."""
    usual = PRESETS[args.preset].schedule.steps
    if args.steps is None or args.resume or args.steps == usual:
        return ""
    if args.steps < usual:
        return f"the whole schedule is shortened from {usual:,} steps to {args.steps:,}, in proportion\n"
    return f"the {args.steps - usual:,} steps beyond the preset's {usual:,} are added at the end of its schedule\n"


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[torch.device, bool]]:
    """Yields this process's device and whether it is the first; under `torchrun`, connects the processes."""
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
