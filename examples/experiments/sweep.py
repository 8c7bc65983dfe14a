"""Trains one preset many times: seeds, ablations, guides. Each run is evaluated on fresh sequences.

Every run is a separate process with its own folder under --out. Repeat the same command to continue: finished runs are
kept, interrupted ones resume, failed ones are tried again. A run whose process is killed restarts from its last
checkpoint, at most twice. The summary, a JSON file and a table per suite, counts the seeds whose position error and
switch rate are within the bars.
"""

from examples._common import device_of, new_folder, read_json, say_where, start, write_json
from examples.experiments._suites import configurations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pyro_pixels._options import Count, Seed, Seeds, Sequences, Workers, one_job, result_file
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import evaluate_tracker
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.queries.predict import infer
from pyro_pixels.result_tables import environment, seeds_table
from pyro_pixels.run_sequences import TEST_SEED, VALIDATION_SEED, training_sequences
from pyro_pixels.run_training import teach_run, train_run
from pyro_pixels.runs import Run, load_run
from pyro_pixels.worlds.base import simulate

POSITION_BAR_PX, SWITCH_BAR = 0.75, 0.02
ATTEMPTS = 3  # at a run whose process is killed
PROGRAM = [sys.executable, "-m", "examples.experiments.sweep"]


@dataclass
class Arguments:
    suite: Literal["seeds", "longer", "ablation", "recurrent", "taught", "small-noise"] = "seeds"
    """seeds: the quick preset; longer: also with more steps, for half an hour and an hour; ablation: with one
    ingredient left out at a time; recurrent: the paper's guide and schedule at the quick preset's size; taught: the
    paper's guide, and the one with an attention head, taught by the quick runs of the same seeds, which must exist;
    small-noise: data whose 0.001 is read as a standard deviation, with Sigma_A learned faster."""
    seeds: Seeds = 10
    """Number of training seeds."""
    first_seed: Seed = 0
    """The first of the training seeds."""
    steps: Count | None = None
    """Number of training steps. By default the suite's own; fewer shorten the schedule in proportion. In the paper's
    schedule the dynamics are frozen for a quarter of them, and the KL weight is annealed over the next."""
    n_test: Sequences = 1500
    """Number of fresh sequences for the evaluation of each run."""
    out: Path = Path("runs/sweep")
    """Folder for the runs, with a subfolder for each."""
    json: Path | None = None
    """File for the summary. By default SUITE.json in --out."""
    workers: Workers = 2
    """Number of runs at a time, each on one CPU thread."""
    seed: Seed = TEST_SEED
    """Seed of the fresh sequences."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, or auto, which is CUDA if available and else the CPU."""
    job: str | None = None
    """Run only this job, VARIANT/SEED."""


def folder_of(args: Arguments, name: str, seed: int) -> Path:
    return args.out / "".join(c if c.isalnum() else "_" for c in name) / f"seed{seed}"


def one_run(args: Arguments, config: RunConfig, folder: Path) -> None:
    """Trains and evaluates one run; result.json in its folder marks it as finished."""
    device = device_of(args.device)
    torch.set_num_threads(1)
    validation = simulate(config.data, 150, seed=VALIDATION_SEED)
    curve_file = folder / "curve.json"
    curve = read_json(curve_file) if curve_file.exists() else []

    def measure(run: Run, line: dict[str, float]) -> None:
        curve[:] = [point for point in curve if point["step"] < line["step"]]
        curve.append({"step": line["step"], "seconds": line["seconds"], **_position_errors(run, validation)})
        write_json(curve_file, curve)

    if args.suite == "taught":
        teacher = load_run(folder_of(args, "quick", config.seed), device)
        data, held_out = training_sequences(teacher.config), simulate(config.data, 60, seed=VALIDATION_SEED)
        run, result = teach_run(teacher, config, folder, data, validation=held_out, progress=False)
    else:
        data = simulate(config.data, config.n_sequences, seed=config.seed)
        run, result = train_run(config, folder, data, device=device, progress=False, on_evaluation=measure)
    if result.interrupted:
        return
    test = simulate(config.data, args.n_test, seed=args.seed)
    about = {"train_seed": config.seed, "test_seed": args.seed, "steps": result.step, "seconds": result.seconds}
    about["health"] = check_health(run.model, run.guide, test[:300])._asdict()
    about |= {"environment": environment(device), **evaluate(run.model, run.guide, test)}
    write_json(folder / "result.json", {**about, "curve": curve})


def _position_errors(run: Run, data: Any) -> dict[str, float]:
    """Returns the position error in pixels for each N, on sequences that are used for nothing else."""
    device = next(run.model.parameters()).device
    a = infer(run.guide, data.images.to(device), data.n_objects.to(device)).mean.cpu()
    in_pixels = metrics.fit_affine(a, data.positions, data.n_objects)(a)
    matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
    errors = metrics.errors(matched, data.positions, data.n_objects)
    return {str(n): metrics.nan_mean(errors[data.n_objects == n]) for n in (1, 2, 3)}


def succeeded(result: dict[str, Any]) -> bool:
    """Returns whether the position error of each N, and the switch rate of all sequences, are within the bars."""
    positions = [row["position_error_px"] <= POSITION_BAR_PX for row in result["by_n_objects"].values()]
    return all(positions) and (result["all"]["switch_rate"] or 0.0) <= SWITCH_BAR


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a proportion (Wilson, 1927)."""
    share, z2 = successes / n, z * z
    centre, half = (share + z2 / (2 * n)) / (1 + z2 / n), z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half / (1 + z2 / n)), min(1.0, centre + half / (1 + z2 / n))


def summary(args: Arguments, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        results = []
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            file = folder_of(args, name, seed) / "result.json"
            if file.exists():
                results.append(read_json(file))
        if results:
            successes = sum(map(succeeded, results))
            found[name] = {"successes": successes, "interval95": wilson(successes, len(results)), "runs": results}
    bars = {"position_error_px_of_each_n": POSITION_BAR_PX, "switch_rate_of_all": SWITCH_BAR}
    return {"suite": args.suite, "bars": bars, "variants": found}


def main(args: Arguments) -> int:
    configs, out = configurations(args.suite, args.steps), args.json or args.out / f"{args.suite}.json"
    device_of(args.device)
    new_folder(args.out)
    new_folder(result_file(out, ".json").parent)
    if args.job is not None:
        name, seed = one_job(args.job, configs)
        one_run(args, replace(configs[name], seed=seed), folder_of(args, name, seed))
        return 0
    jobs = [(name, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for name in configs]
    jobs = [(name, seed) for name, seed in jobs if not (folder_of(args, name, seed) / "result.json").exists()]

    def launch(job: tuple[str, int]) -> bool:
        options = ["--suite", args.suite, "--out", args.out, "--n-test", args.n_test, "--seed", args.seed]
        options += ["--device", args.device, "--job", f"{job[0]}/{job[1]}"]
        options += [] if args.steps is None else ["--steps", args.steps]
        for attempt in range(ATTEMPTS):
            done = subprocess.run([*PROGRAM, *map(str, options)], check=False)
            lost = done.returncode < 0 and attempt + 1 < ATTEMPTS  # killed from outside; its checkpoint still exists
            outcome = "done" if done.returncode == 0 else "killed, restarted" if lost else "FAILED"
            print(f"{job[0]}, seed {job[1]}: {outcome}", flush=True)
            if not lost:
                break
        return done.returncode == 0

    with ThreadPoolExecutor(args.workers) as pool:
        fine = all(list(pool.map(launch, jobs)))
    result = summary(args, list(configs))
    if args.suite == "small-noise":  # the floors, which see positions and not pixels, are out of reach
        data = simulate(configs["small noise"].data, args.n_test, seed=args.seed)
        result["tracker"] = evaluate_tracker(data)
    write_json(out, result)
    print(seeds_table(result))
    say_where([out])
    return 0 if fine else 1


if __name__ == "__main__":
    start(main, Arguments, __doc__)
