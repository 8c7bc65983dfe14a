"""Evaluates a trained run on fresh sequences: errors in pixels, switches, losses and floors, as a table and as JSON.

--out is the JSON file to write, with figures next to it; default: metrics.json in the run's folder.
"""

from _common import QueryArguments, improved, new_folder, open_run, say_where, start, write_json

from dataclasses import dataclass
from typing import Any

from pyro_pixels._options import Frames, Sequences, result_file
from pyro_pixels.evaluation.answers import check_n_seen, infer_all, predict_all, seen_by_default
from pyro_pixels.evaluation.film import START_FRAMES
from pyro_pixels.evaluation.health import check_health, format_health
from pyro_pixels.evaluation.table import N_FUTURES, format_table, table_of
from pyro_pixels.evaluation.untangled import evaluate_refined, evaluate_untangled, merged
from pyro_pixels.result_tables import environment, per_n
from pyro_pixels.run_figures import draw_error_over_time


@dataclass
class Arguments(QueryArguments):
    n_sequences: Sequences = 300
    """Number of sequences to evaluate on; of a file, the first ones."""
    n_seen: Frames | None = None
    """Number of observed frames before generation, and at either end for interpolation. By default 5, or fewer if
    sequences have fewer than 11 frames."""
    trained_on_too: bool = False
    """Include the run's training sequences if --data is the file on which it was trained."""
    details: bool = False
    """Print all measures of the health check, and a sentence for each sign of failure."""
    untangle: bool = False
    """Also evaluate the run with identities corrected frame by frame by p(a): untangled_... in the JSON."""
    refine: bool = False
    """Also evaluate the run with positions and identities improved by ascent on log p(v, a): refined_... in the JSON.
    For guides that do not contain the dynamics; takes about 0.6 s per sequence of 30 frames of 32 x 32 on one core."""


def main(args: Arguments) -> None:
    out = result_file(args.out or args.home / "metrics.json", ".json", args.data)
    new_folder(out.parent)
    run, data, device = open_run(args, trained_on_too=args.trained_on_too, as_trained=True)
    if args.refine:
        improved(run, untangle=False, refine=True)  # fails early if it cannot be
    T = data.images.shape[1]
    n_seen = seen_by_default(T) if args.n_seen is None else check_n_seen(args.n_seen, T, "--n-seen")
    n_futures = N_FUTURES if data.positions is None else 0
    inferred = infer_all(run.model, run.guide, data, progress=True)
    predicted = predict_all(run.model, run.guide, data, n_seen=n_seen, n_futures=n_futures, progress=True)
    result = table_of(run.model, data, inferred, predicted)
    if args.untangle:
        result = merged(result, evaluate_untangled(run.model, run.guide, data, n_seen=n_seen))
    if args.refine:
        result = merged(result, evaluate_refined(run.model, run.guide, data, n_seen=n_seen, progress=True))
    fresh = args.data is None and (args.simulated or run.config.data_file is None)
    result |= {"step": run.step, "train_seed": run.config.seed, "test_seed": args.seed if fresh else None}
    result["environment"] = environment(device)
    health = check_health(run.model, run.guide, data, inferred=inferred) if T > START_FRAMES + 1 else None
    if health is not None:
        result["health"] = health._asdict()
    write_json(out, result, indent=2)
    print(format_table(result))
    if data.positions is not None and not bool((data.n_objects == 1).any()):
        print("errors in pixels need sequences with N = 1, which map latent positions to pixels; there are none here")
    for how in ("untangled", "refined"):
        if f"{how}_position_error_px" in result["all"]:
            print(_line(result, how))
    if health is not None:
        print(format_health(health, options=True, details=args.details))
    paths = draw_error_over_time(data, inferred.mean, predicted, out.parent)
    say_where([out, *paths])


def _line(result: dict[str, Any], how: str) -> str:
    """Returns a one-line summary for the terminal."""
    errors = per_n(result, lambda row: row.get(f"{how}_position_error_px"), 2)
    rates = per_n(result, lambda row: row.get(f"{how}_switch_rate"), 2)
    return f"{how}: position error {errors} px, switch rate {rates}"


if __name__ == "__main__":
    start(main, Arguments, __doc__)
