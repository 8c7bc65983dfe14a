"""Measures a trained run on fresh sequences: errors in pixels, switches, losses and floors, as a table and as JSON.

--out is the JSON to write, figures go beside it; default: metrics.json in the run's folder.
"""

import json
from dataclasses import dataclass
from typing import Any

from common import QueryArguments, Shown, ask, draw_error_over_time, environment, per_n, start
from pyro_pixels._files import atomic_write
from pyro_pixels.evaluation.health import START_FRAMES, check_health, format_health
from pyro_pixels.evaluation.table import N_SEEN, evaluate, format_table
from pyro_pixels.evaluation.untangled import evaluate_untangled, merged


@dataclass
class Arguments(QueryArguments):
    n_sequences: int = 300
    """How many sequences at most."""
    n_seen: int = N_SEEN
    """Frames seen before generation, and at either end for interpolation."""
    untangle: bool = False
    """Measure also what comes out when p(a) renames the objects frame by frame: untangled_... in the JSON."""


def main(args: Arguments) -> None:
    run, data, device = ask(args)
    what = "the pretrained weights" if args.pretrained else args.run
    print(f"evaluating {what} (step {run.step:,}) on {len(data)} sequences")
    result = evaluate(run.model, run.guide, data, n_seen=args.n_seen)
    if args.untangle:
        result = merged(result, evaluate_untangled(run.model, run.guide, data, n_seen=args.n_seen))
    result |= {"step": run.step, "train_seed": run.config.seed, "test_seed": args.seed if args.data is None else None}
    result["environment"] = environment(device)
    health = check_health(run.model, run.guide, data) if data.images.shape[1] > START_FRAMES + 1 else None
    if health is not None:
        result["health"] = health._asdict()
    out = args.out or args.home / "metrics.json"
    with atomic_write(out) as file:
        file.write(json.dumps(result, indent=2).encode() + b"\n")
    print(format_table(result))
    if args.untangle:
        print(_untangled(result))
    if health is not None:
        print(format_health(health))
    print(f"  {out}")
    shown = Shown(run, data, device, n_seen=args.n_seen)
    draw_error_over_time(shown, shown.generation(), shown.interpolation(), out.parent)


def _untangled(result: dict[str, Any]) -> str:
    """One line for people."""
    errors = per_n(result, lambda row: row.get("untangled_position_error_px"), 2)
    rates = per_n(result, lambda row: row.get("untangled_switch_rate"), 2)
    return f"untangled: position error {errors} px, switch rate {rates}"


if __name__ == "__main__":
    start(main, Arguments, __doc__)
