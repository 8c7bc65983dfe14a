"""Trains the paper's network on its own many times: seeds, one ball, ablations, and the ceiling.

Every run is a separate process with its own folder under --out. Repeat the same command to continue: finished runs are
kept, interrupted ones resume. Each suite is summarised in a JSON file and in tables.
"""

from examples._common import device_of, new_folder, read_json, start, write_json

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_pixels._options import Count, Seed, Seeds, Sequences, Workers, one_job, result_file
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.evaluation.untangled import evaluate_untangled, merged
from pyro_pixels.guides.untangling import untangle
from pyro_pixels.presets import NEVER, PRESETS
from pyro_pixels.queries.predict import infer
from pyro_pixels.result_tables import environment, markdown
from pyro_pixels.run_sequences import TEST_SEED, VALIDATION_SEED
from pyro_pixels.runs import Run, build
from pyro_pixels.training.distillation import GivenTracks
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate

N_VALIDATION = 300
CANDIDATES, CANDIDATE_STEPS = 3, 250  # of the suites `seeds` and `long`
PROGRAM = [sys.executable, "-m", "examples.experiments.sweep_recurrent"]
ONE_STEPS, ONE_KL_UNTIL = 1_500, 6_500  # of the suite `one`: KL weight 3 until step 6,500 of 8,000, shortened
MEASURES = (("error_px", 1.0), ("switch_rate", 100.0))  # with their factors in tables

Change = Callable[[RunConfig], RunConfig]


def _run(**changes: Any) -> Change:
    return lambda c: replace(c, **changes)


def _schedule(**changes: Any) -> Change:
    return lambda c: replace(c, schedule=replace(c.schedule, **changes))


def _paper_noises(c: RunConfig) -> RunConfig:
    return replace(c, dynamics=replace(c.dynamics, state_noise=1e-3, position_noise=1.0))


ABLATION: dict[str, Change] = {
    "recurrent": lambda c: c,
    "renderer: starts as the paper's": _run(background_logit=0.0, renderer_input_scale=None),
    "all weights start as the paper's": _run(background_logit=0.0, renderer_input_scale=None, image_ramps=None),
    "noises: start as the paper's": _paper_noises,
    "noises: free from the start": _schedule(learn_from={}),
    "no ramps": _run(image_ramps=None),
    "nearly equal s_0": _run(common_s0=0.1),
    "KL weight 1": _schedule(kl_before=1.0),
    "N = 1 alone for the first 500 steps": _schedule(single_object_steps=500),
    "learning rate 0.001": _schedule(learning_rate=1e-3),
    "no self-training": _schedule(own_tracks_from=None),
    "objects always drawn in the same order": _schedule(random_order_from=None),
    "neither self-training nor random order": _schedule(own_tracks_from=None, random_order_from=None),
}
"""The preset `recurrent`, as it is and with one ingredient left out or changed; docs/learning.md has a row for each."""


@dataclass
class Arguments:
    suite: Literal["seeds", "long", "one", "ablation", "ceiling"] = "seeds"
    """seeds: the preset `recurrent`, best of three starts by the bound; long: `recurrent_long`, likewise; one: N = 1
    alone, one start, the schedule shortened to 1,500 steps with the KL weight lowered later; ablation: one start, with
    one ingredient left out at a time; ceiling: the same network trained on true positions."""
    seeds: Seeds = 5
    """Number of training seeds."""
    first_seed: Seed = 10
    steps: Count | None = None
    """Number of training steps, if not the suite's own; fewer shorten the schedule."""
    n_test: Sequences = 1200
    """Number of fresh sequences for the evaluation of each run."""
    out: Path = Path("runs/recurrent")
    json: Path | None = None
    """File for the summary; default: SUITE.json in --out."""
    workers: Workers = 2
    """Number of runs at a time, one CPU thread each."""
    only: tuple[str, ...] = ()
    """Variants of the suite to run, if not all."""
    device: str = "cpu"
    job: str | None = None
    """Run only this job, VARIANT/SEED."""


def variants(args: Arguments) -> dict[str, RunConfig]:
    preset = PRESETS["recurrent_long" if args.suite == "long" else "recurrent"]
    if args.steps is not None:
        preset = replace(preset, schedule=preset.schedule.with_steps(args.steps))
    if args.suite == "ablation":
        found = {name: change(preset) for name, change in ABLATION.items()}
    elif args.suite == "ceiling":
        found = {"ceiling": replace(preset, schedule=_lessons(preset.schedule))}
    elif args.suite == "one":
        schedule = replace(preset.schedule, anneal_from=ONE_KL_UNTIL).with_steps(args.steps or ONE_STEPS)
        found = {"N = 1 alone": replace(preset, data=replace(preset.data, n_objects=(1,)), schedule=schedule)}
    else:
        found = {"recurrent_long" if args.suite == "long" else "recurrent": preset}
    unknown = set(args.only) - found.keys()
    if unknown:
        raise ValueError(
            f"the suite {args.suite} has no variant {sorted(unknown)[0]!r}; wanted some of {sorted(found)}"
        )
    return {name: config for name, config in found.items() if not args.only or name in args.only}


def _lessons(schedule: Schedule) -> Schedule:
    """Returns the schedule with the same steps for the guide alone."""
    return replace(schedule, learn_from={"model": NEVER}, fit_starts_at=(), clip_norm=100.0, own_tracks_from=None)


def folder_of(args: Arguments, name: str, seed: int) -> Path:
    return args.out / args.suite / "".join(c if c.isalnum() else "_" for c in name) / f"seed{seed}"


class Curve:
    """Errors on validation sequences, used for nothing else, at every evaluation; saved in a file."""

    def __init__(self, path: Path, run: Run, data: ImageSequences) -> None:
        self.path, self.run, self.data = path, run, data
        self.points: list[dict[str, Any]] = read_json(path) if path.exists() else []
        self.spent = self.points[-1]["cpu_seconds"] if self.points else 0.0
        self.began = time.process_time()

    def take(self, line: dict[str, float]) -> None:
        self.spent += time.process_time() - self.began  # by training, without the measurements below
        seconds = {"seconds": line["seconds"], "cpu_seconds": round(self.spent, 1)}
        found = errors(self.run, self.data)
        self.points = [point for point in self.points if point["step"] < line["step"]]
        self.points.append({"step": line["step"], **seconds, "bound": line["validation_bound_per_frame"], **found})
        write_json(self.path, self.points)
        print(f"{self.path.parent}: {json.dumps(self.points[-1])}", flush=True)
        self.began = time.process_time()


def errors(run: Run, data: ImageSequences) -> dict[str, Any]:
    """Returns R^2, and position errors for each N and switch rates for N >= 2, as inferred and untangled."""
    assert data.positions is not None
    device = next(run.model.parameters()).device
    mean = infer(run.guide, data.images.to(device), data.n_objects.to(device)).mean
    affine = metrics.fit_affine(mean.cpu(), data.positions, data.n_objects)
    found: dict[str, Any] = {"r2": affine.r2}
    renamed = untangle(run.model.dynamics, mean, data.n_objects.to(device)).a
    for prefix, a in (("", mean), ("untangled_", renamed)):
        in_pixels = affine(a.cpu())
        matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
        error = metrics.errors(matched, data.positions, data.n_objects)
        switched = metrics.switches(matched, data.positions, data.n_objects).double()
        by_n = {int(n): data.n_objects == n for n in data.n_objects.unique()}
        found[f"{prefix}error_px"] = [round(metrics.nan_mean(error[chosen]), 3) for chosen in by_n.values()]
        found[f"{prefix}switch_rate"] = [round(float(switched[by_n[n]].mean()), 3) for n in by_n if n > 1]
    return found


def true_tracks(data: ImageSequences) -> Tensor:
    """Returns true positions (n, N, T, 2) as targets for the ceiling; each axis of the image runs from -1 to 1."""
    assert data.positions is not None
    height, width = data.size
    half = torch.tensor([width - 1, height - 1]) / 2
    return ((data.positions - half) / half).float().nan_to_num()


def one_run(args: Arguments, name: str, config: RunConfig, folder: Path) -> None:
    """Trains and evaluates one run; result.json in its folder marks it as finished."""
    device = device_of(args.device)
    torch.set_num_threads(1)
    run = build(config)
    run = run._replace(model=run.model.to(device), guide=run.guide.to(device))
    data = simulate(config.data, config.n_sequences, seed=config.seed)
    validation = simulate(config.data, N_VALIDATION, seed=VALIDATION_SEED)
    curve = Curve(folder / "curve.json", run, validation)
    options: dict[str, Any] = {}
    if args.suite == "ceiling":
        options |= {"objective": GivenTracks, "tracks": true_tracks(data)}
    elif args.suite in ("seeds", "long"):
        others = [build(replace(config, seed=config.seed + 1_000 * i)) for i in range(1, CANDIDATES)]
        options["candidates"] = [(other.model.to(device), other.guide.to(device)) for other in others]
        options["candidate_steps"] = max(1, min(CANDIDATE_STEPS, config.schedule.steps - 1))
    result = fit(
        run.model, run.guide, data, config.schedule, seed=config.seed, run_dir=folder, validation=validation,
        resume=(folder / "checkpoint.pt").exists(), progress=False, on_evaluation=curve.take, config=config,
        **options,
    )  # fmt: skip
    if result.interrupted:
        return
    test = simulate(config.data, args.n_test, seed=TEST_SEED)
    about = {"train_seed": config.seed, "test_seed": TEST_SEED, "steps": result.step, "seconds": result.seconds}
    about |= {"cpu_seconds": curve.spent, "environment": environment(device), "curve": curve.points}
    if args.suite in ("ceiling", "one"):  # the first trains no model, the second is about one number
        write_json(folder / "result.json", {**about, "test": errors(run, test)})
        return
    about["health"] = check_health(run.model, run.guide, test[:300])._asdict()
    found = merged(evaluate(run.model, run.guide, test), evaluate_untangled(run.model, run.guide, test))
    write_json(folder / "result.json", {**about, "test": errors(run, test), **found})


def summary(args: Arguments, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        files = [folder_of(args, name, seed) / "result.json" for seed in seeds]
        runs = [read_json(file) for file in files if file.exists()]
        if runs:
            found[name] = runs
    return {"suite": args.suite, "variants": found}


def tables(result: dict[str, Any]) -> str:
    """Returns tables of positions and identities, and of predictions: medians over seeds, with (smallest-largest)."""
    found, predicted = [], []
    for name, runs in result["variants"].items():
        tests, about = [run["test"] for run in runs], [name, str(len(runs)), f"{runs[0]['steps']:,}"]
        columns = [(f"{prefix}{key}", factor) for prefix in ("", "untangled_") for key, factor in MEASURES]
        parts = [[[factor * x for x in xs] for xs in zip(*(t[key] for t in tests))] for key, factor in columns]
        seconds = f"{np.median([run['cpu_seconds'] for run in runs]):.0f}"
        r2 = _spread([t["r2"] for t in tests], 3)
        found.append(
            [*about, r2, *(" / ".join(_spread(xs, 2 - i % 2) for xs in x) for i, x in enumerate(parts)), seconds]
        )
        if all("by_n_objects" in run for run in runs):
            predicted.append([*about, *_predictions(runs)])
    first = ["", "seeds", "steps", "R^2", "position error, px", "switch rate, %", "untangled: position error, px",
             "untangled: switch rate, %", "CPU s"]  # fmt: skip
    second = ["", "seeds", "steps", "generation / floor", "untangled", "interpolation / floor", "untangled",
              "launch side correct, %", "gravity off, degrees", "health signs"]  # fmt: skip
    return "\n\n".join(markdown(header, rows) for header, rows in ((first, found), (second, predicted)) if rows)


def _predictions(runs: list[dict[str, Any]]) -> list[str]:
    """Returns the cells of the runs in the second table."""
    columns = []
    for kind in ("generation", "interpolation"):
        for prefix in ("", "untangled_"):
            groups = [[run["by_n_objects"][n] for run in runs] for n in runs[0]["by_n_objects"]]
            ratios = [[r[f"{prefix}{kind}_error_px"] / r[f"{kind}_floor_px"] for r in group] for group in groups]
            columns.append(" / ".join(_spread(x, 2) for x in ratios))
    sides = _spread([100 * run["all"]["side_accuracy"] for run in runs], 1)
    gravity = _spread([abs(run["dynamics"]["degrees_from_down"]) for run in runs], 1)
    return [*columns, sides, gravity, _spread([len(run["health"]["problems"]) for run in runs], 0)]


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, np.median, max))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def main(args: Arguments) -> int:
    configs, path = variants(args), args.json or args.out / f"{args.suite}.json"
    device_of(args.device)
    new_folder(args.out)
    new_folder(result_file(path, ".json").parent)
    if args.job is not None:
        name, seed = one_job(args.job, configs)
        one_run(args, name, replace(configs[name], seed=seed), folder_of(args, name, seed))
        return 0
    jobs = [(name, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for name in configs]
    jobs = [(name, seed) for name, seed in jobs if not (folder_of(args, name, seed) / "result.json").exists()]

    def launch(job: tuple[str, int]) -> bool:
        options = ["--suite", args.suite, "--out", args.out, "--n-test", args.n_test]
        options += ["--device", args.device, "--job", f"{job[0]}/{job[1]}"]
        options += [] if args.steps is None else ["--steps", args.steps]
        done = subprocess.run([*PROGRAM, *map(str, options)], check=False)
        print(f"{job[0]}, seed {job[1]}: {'done' if done.returncode == 0 else 'FAILED'}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(args.workers) as pool:
        well = all(list(pool.map(launch, jobs)))
    result = summary(args, list(configs))
    write_json(path, result)
    print(f"{tables(result)}\n  {path}")
    return 0 if well else 1


if __name__ == "__main__":
    start(main, Arguments, __doc__)
