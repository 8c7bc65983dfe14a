"""Teaches another guide what a trained run's guide sees, such as the paper's inference network.

The new run, in --out, has the teacher's model and a guide of its own. It learned from the teacher's draws for images
that nobody labelled (`pyro_pixels.training.distillation`), and every script that asks a run can ask it. Ctrl-C and
SIGTERM save first; --resume then goes on as if nothing had happened.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import TEST_SEED, device_of, new_folder, start
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.runs import GUIDES, Run, build, load_config, load_pretrained, load_run, save_config
from pyro_pixels.training.distillation import GivenTracks, draw_tracks
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate


@dataclass
class Arguments:
    teacher: Path = Path("runs/quick")
    """Folder of the run whose guide is the teacher."""
    pretrained: bool = False
    """The weights that come with the package teach instead."""
    data: Path | None = None
    """An .npz of image sequences to learn from; default: those that the teacher learned from."""
    guide: str = "attentive"
    """Who learns, a name in `GUIDES`: recurrent is the paper's, attentive the paper's with an attention head."""
    state_size: int = 256
    """Length of its states."""
    steps: int = 4_000
    """Training steps; in the second half the learning rate falls."""
    seed: int = 0
    """Of the starting weights, the batches and the teacher's draws."""
    out: Path = Path("runs/taught")
    """Folder of the new run."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    threads: int = 1
    resume: bool = False
    """Go on with the run in --out, with its own configuration."""
    progress: bool = True


def schedule(steps: int) -> Schedule:
    """Of the guide alone."""
    return Schedule(
        steps=steps, learning_rate=1e-3, decay_from=steps // 2, learn_from={"model": steps}, anneal_from=steps,
        one_n_per_batch=True, clip_norm=30.0, evaluate_every=max(1, steps // 8),
    )  # fmt: skip


def sequences(config: RunConfig) -> ImageSequences:
    """What a run learned from."""
    if config.data_file is not None:
        return load_sequences(config.data_file)
    return simulate(config.data, config.n_sequences, seed=config.seed)


def teach(
    teacher: Run, config: RunConfig, data: ImageSequences, folder: Path, *, resume: bool, progress: bool
) -> tuple[Run, FitResult]:
    """A run of the teacher's model and the guide of ``config``, on the teacher's device."""
    device = next(teacher.model.parameters()).device
    run = build(config)
    run.model.load_state_dict(teacher.model.state_dict())
    run = run._replace(model=run.model.to(device), guide=run.guide.to(device))
    save_config(folder, config)
    held_out = simulate(config.data, 60, seed=TEST_SEED - 1) if config.data_file is None else None
    tracks = draw_tracks(teacher.guide, data, seed=config.seed)
    result = fit(
        run.model, run.guide, data, config.schedule, seed=config.seed, run_dir=folder, validation=held_out,
        resume=resume, progress=progress, objective=GivenTracks, tracks=tracks,
    )  # fmt: skip
    return run._replace(step=result.step), result


def main(args: Arguments) -> int:
    for name in ("state_size", "steps", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; wanted at least 1")
    if args.guide not in GUIDES:
        raise ValueError(f"there is no guide '{args.guide}'; wanted one of {sorted(GUIDES)}")
    if not args.resume and (args.out / "checkpoint.pt").exists():
        raise ValueError(
            f"{args.out} holds a trained run; give --resume to go on with it, or another folder with --out"
        )
    device = device_of(args.device)
    torch.set_num_threads(args.threads)
    teacher = load_pretrained(device=device) if args.pretrained else load_run(args.teacher, device)
    config = replace(
        teacher.config,
        guide=args.guide,
        guide_state_size=args.state_size,
        seed=args.seed,
        schedule=schedule(args.steps),
    )
    if args.resume:
        config = load_config(args.out)
    data = sequences(teacher.config) if args.data is None else load_sequences(args.data)
    _, result = teach(teacher, config, data, new_folder(args.out), resume=args.resume, progress=args.progress)
    if result.interrupted:
        print(f"stopped and saved at step {result.step:,}; give the same command with --resume to go on")
        return 130
    bound = result.metrics.get("validation_bound_per_frame")
    held_out = "" if bound is None else f"; bound of held-out sequences {bound:.1f} nats per frame"
    print(f"taught {result.step:,} steps in {result.seconds:.0f} s{held_out}\n  {args.out}")
    print(f"next: python examples/evaluate.py --run {args.out}")
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
