"""From nothing to a table in minutes: simulates cannonballs, trains the quick preset, evaluates it, draws everything.

Everything lands in one folder: config.json, metrics.jsonl, checkpoint.pt, metrics.json, figures and a GIF.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import train
from common import (
    TEST_SEED,
    Shown,
    device_of,
    draw_generation,
    draw_inference,
    draw_interpolation,
    new_folder,
    save,
    sequences_for,
    start,
)  # fmt: skip
from pyro_pixels import lgssm
from pyro_pixels.plots import paper as plotting
from pyro_pixels.runs import build, load_run


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder for everything; a run that is there already is gone on with."""
    data: Path | None = None
    """An .npz of your own image sequences; default: simulated cannonballs."""
    steps: int | None = None
    """Training steps, if not the preset's."""
    seed: int = 0
    device: str = "auto"


def main(args: Arguments) -> int:
    started = time.perf_counter()
    out, device = new_folder(args.run), device_of(args.device)
    there = (args.run / "checkpoint.pt").exists()
    print("1. learning from images alone" + (" (a run is there already: going on with it)" if there else ""))
    code = train.main(
        train.Arguments(
            run=args.run, data=args.data, steps=args.steps, seed=args.seed, device=args.device, resume=there
        )
    )
    if code:
        return code

    run = load_run(args.run, device)
    print("2. measuring it on fresh sequences" if args.data is None else "2. measuring it on the file's sequences")
    evaluate.main(evaluate.Arguments(run=args.run, data=args.data, device=args.device))

    print("3. drawing what it knows")
    data = sequences_for(run, args.data, 60, TEST_SEED + 1)
    save(
        plotting.plot_sequences(data.images[:6], columns=3, titles=[f"N = {n}" for n in data.n_objects[:6].tolist()]),
        out / "sequences.png",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        h, a = lgssm.sample(build(run.config).model.dynamics.lgssm(), data.images.shape[1], (3,))
    save(plotting.plot_start(h[:, 0, :, :2].detach(), a[:, 0].detach()), out / "start.png")
    shown = Shown(run, data, device)
    generated, interpolated = shown.generation(), shown.interpolation()
    draw_inference(shown, out)
    draw_generation(shown, generated, out)
    draw_interpolation(shown, generated, interpolated, out)
    print(f"done in {time.perf_counter() - started:.0f} s; look at {out / 'generation.gif'} first")
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
