"""Distils a trained run's guide into another guide, such as the paper's inference network.

The new run, in --out, has the teacher's model and the new guide, which learns from the teacher's draws for unlabelled
images (`pyro_pixels.training.distillation`). Every script that queries a run works with it. Ctrl-C and SIGTERM save
first; --resume then continues as if training had not been interrupted.
"""

from _common import device_of, new_folder, read_config, read_run, say_where, start, with_named

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pyro_pixels._options import Count, Seed, Size, Threads, refuse_changes, refuse_with_pretrained
from pyro_pixels.config import RunConfig
from pyro_pixels.custom import file_of
from pyro_pixels.data import load_sequences
from pyro_pixels.run_sequences import MOST_HELD_OUT, VALIDATION_SEED, training_sequences
from pyro_pixels.run_training import teach_run, teaching_schedule
from pyro_pixels.runs import REGISTRIES, check_custom, load_pretrained, named, names_in
from pyro_pixels.worlds.base import simulate


@dataclass
class Arguments:
    teacher: Path = Path("runs/quick")
    """Folder of the run whose guide is the teacher."""
    teacher_custom: Path | None = None
    """The Python file with the teacher's own guide, world or likelihood, if the run does not name it or it has moved
    since."""
    pretrained: bool = False
    """Use the weights that come with the package as the teacher instead."""
    data: Path | None = None
    """An .npz of image sequences to learn from. By default the teacher's training sequences."""
    guide: str | None = None
    """Name of the new guide in `GUIDES`: recurrent is the paper's. By default attentive, which is the paper's with an
    attention head, or the guide that --custom adds."""
    custom: Path | None = None
    """A Python file that adds the new guide to `GUIDES` (docs/write_a_guide.md); if the teacher's world or likelihood
    is your own, the file has to add that too."""
    state_size: Size = 256
    """Length of the states of the new guide."""
    steps: Count = 4_000
    """Number of training steps; the learning rate falls in the second half."""
    seed: Seed = 0
    """Seed of the initial weights, the batches and the teacher's draws."""
    out: Path = Path("runs/taught")
    """Folder of the new run."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    threads: Threads = 1
    """Number of CPU threads."""
    resume: bool = False
    """Resume the run in --out with its own configuration."""
    progress: bool = True
    """Show a progress bar."""


def configure(args: Arguments, teacher: RunConfig) -> RunConfig:
    """Returns the teacher's configuration with the new guide, and with the teacher's custom file if it needs that."""
    needed = (file_of(kind, name, REGISTRIES) for kind, name in names_in(teacher).items() if kind != "guide")
    file = next((found for found in needed if found is not None), None)
    config = replace(
        teacher,
        guide="attentive",
        custom_file=None if file is None else str(file.path),
        custom_sha256=None if file is None else file.sha256,
        guide_state_size=args.state_size,
        seed=args.seed,
        schedule=teaching_schedule(args.steps),
    )
    config = with_named(config, args.custom, guide=args.guide)
    check_custom(config, args.out, args.custom)
    return config


def main(args: Arguments) -> int:
    if args.guide is not None and args.custom is None:
        named("guide", args.guide)
    if not args.resume and (args.out / "checkpoint.pt").exists():
        raise ValueError(f"{args.out} holds a trained run; give --resume to continue it, or another folder with --out")
    if args.pretrained:
        refuse_with_pretrained(args, ("teacher", "teacher_custom"))
    device, folder = device_of(args.device), new_folder(args.out)
    torch.set_num_threads(args.threads)
    teacher = load_pretrained(device=device) if args.pretrained else read_run(args.teacher, device, args.teacher_custom)
    config = read_config(args.out, args.custom) if args.resume else configure(args, teacher.config)
    if args.resume:
        there = {"guide": config.guide, "state_size": config.guide_state_size, "seed": config.seed}
        refuse_changes(args, {**there, "steps": config.schedule.steps}, args.out)
    if args.data is None:
        data, source = training_sequences(teacher.config), "the teacher's own training sequences"
    else:
        data, source = load_sequences(args.data), f"the sequences in {args.data}"
    print(f"teaching the guide '{config.guide}' from {source}, {config.schedule.steps:,} steps")
    validation = simulate(config.data, MOST_HELD_OUT, seed=VALIDATION_SEED) if config.data_file is None else None
    _, result = teach_run(teacher, config, folder, data, validation=validation, progress=args.progress)
    if result.interrupted:
        print(f"stopped and saved at step {result.step:,}; repeat the same command with --resume to continue")
        return 130
    bound = result.metrics.get("validation_bound_per_frame")
    held_out = "" if bound is None else f"; bound of held-out sequences {bound:.1f} nats per frame"
    print(f"taught {result.step:,} steps in {result.seconds:.0f} s{held_out}")
    say_where([args.out])
    print(f"next: python examples/evaluate.py --run {args.out}")
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
