"""Measures a trained run on fresh sequences: errors in pixels, switches, losses and floors, as a table and as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from common import TEST_SEED, Shown, device_of, draw_error_over_time, environment, sequences_for, start
from pyro_pixels.data import atomic_write
from pyro_pixels.evaluation import N_SEEN, evaluate, format_table
from pyro_pixels.runs import load_run


@dataclass
class Arguments:
    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    data: Path | None = None
    """An .npz of image sequences; default: fresh ones, simulated as the run's were."""
    out: Path | None = None
    """The JSON to write, figures beside it; default: metrics.json in the run's folder."""
    n_sequences: int = 300
    """How many sequences at most."""
    n_seen: int = N_SEEN
    """Frames seen before generation, and at either end for interpolation."""
    seed: int = TEST_SEED
    device: str = "auto"


def main(args: Arguments) -> None:
    device = device_of(args.device)
    run = load_run(args.run, device)
    data = sequences_for(run, args.data, args.n_sequences, args.seed)
    print(f"evaluating {args.run} (step {run.step:,}) on {len(data)} sequences")
    result = evaluate(run.model, run.guide, data, n_seen=args.n_seen)
    result |= {"step": run.step, "train_seed": run.config.seed, "test_seed": args.seed if args.data is None else None}
    result["environment"] = environment(device)
    out = args.out or args.run / "metrics.json"
    with atomic_write(out) as file:
        file.write(json.dumps(result, indent=2).encode() + b"\n")
    print(format_table(result))
    print(f"  {out}")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    draw_error_over_time(shown, shown.generation(), shown.interpolation(), out.parent)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
