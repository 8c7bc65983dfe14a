"""Many runs of one preset: seeds, ablations, guides. Each is trained and measured on fresh sequences.

Every run is a process of its own with a folder of its own under --out. Give the same command again to go on: what is
finished is kept, what was cut off resumes, what failed is tried anew. A run whose process is killed is begun again at
its last checkpoint, twice at most. The summary, one JSON and a table for each suite, counts how many seeds kept
position error and switch rate within the bars.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common import (
    TEST_SEED,
    device_of,
    environment,
    markdown,
    medians,
    per_n,
    start,
    train_or_resume,
    write_json,
)  # fmt: skip
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import evaluate_tracker
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm.dynamics import DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.predict import infer
from pyro_pixels.runs import GUIDES, Run, load_run
from pyro_pixels.worlds.base import simulate
from teach import schedule as lessons
from teach import sequences, teach

POSITION_BAR_PX, SWITCH_BAR = 0.75, 0.02
VALIDATION_SEED = TEST_SEED - 1
ATTEMPTS = 3  # at a run whose process is lost

Change = Callable[[RunConfig], RunConfig]


def _two_starts(config: RunConfig, model: PixelModel) -> Guide:
    guide = GUIDES["structured"](config, model)
    guide.head.n_starts = 2
    return guide


def _untracked(config: RunConfig, model: PixelModel) -> Guide:
    guide = GUIDES["attentive"](config, model)
    assert isinstance(guide, RecurrentGuide)
    return StructuredGuide(model.dynamics, guide.rnn, guide.head)


GUIDES["untracked"] = _untracked
GUIDES["two starts"] = _two_starts


def _run(**changes: Any) -> Change:
    return lambda c: replace(c, **changes)


def _dynamics(**changes: Any) -> Change:
    return lambda c: replace(c, dynamics=replace(c.dynamics, **changes))


def _schedule(**changes: Any) -> Change:
    return lambda c: replace(c, schedule=replace(c.schedule, **changes))


def _factors(**changes: float | None) -> Change:
    """Learning-rate factors; None takes one away."""

    def change(c: RunConfig) -> RunConfig:
        factors = {**c.schedule.learning_rate_factors, **{k.replace("__", "."): v for k, v in changes.items()}}
        kept = {k: v for k, v in factors.items() if v is not None}
        return replace(c, schedule=replace(c.schedule, learning_rate_factors=kept))

    return change


def _all(*changes: Change) -> Change:
    def change(c: RunConfig) -> RunConfig:
        for one in changes:
            c = one(c)
        return c

    return change


_PAPER = DynamicsConfig()
VARIANTS: dict[str, Change] = {
    "quick": lambda c: c,
    "guide: dynamics outside q (attention head)": _run(guide="attentive"),
    "guide: dynamics inside q, attention head": _run(guide="untracked"),
    "tracking: from the first and the last frame alone": _run(guide="two starts"),
    "renderer: starts as the paper's": _run(renderer_input_scale=None),
    "renderer: starts grey": _run(background_logit=0.0),
    "renderer: learning rate not raised": _factors(model__renderer=None),
    "dynamics: learning rate not raised": _factors(model__dynamics=None, model__dynamics__log_pi=None),
    "dynamics: u and delta not slowed": _factors(model__dynamics__u=None, model__dynamics__log_delta=None),
    "dynamics: delta 0.1": _dynamics(delta=_PAPER.delta),
    "dynamics: noises start as the paper's": _dynamics(
        state_noise=_PAPER.state_noise, position_noise=_PAPER.position_noise
    ),
    "dynamics: noises free from the start": _schedule(learn_from={}),
    "dynamics: mu, Sigma start as the paper's": _dynamics(
        start_spread=_PAPER.start_spread,
        start_velocity_spread=_PAPER.start_velocity_spread,
        start_variance=_PAPER.start_variance,
    ),
    "dynamics: starts not fitted": _schedule(fit_starts_at=()),
    "dynamics: Sigma_A learns 50 times faster": _factors(model__dynamics__root_Sigma_A=50.0),
    "schedule: KL weight 1 throughout": _schedule(kl_before=1.0),
    "schedule: not one object first": _schedule(single_object_steps=0),
    "schedule: constant learning rate": _schedule(decay_from=None),
    "schedule: mixed N in a batch": _schedule(one_n_per_batch=False),
}
"""The quick preset, and the quick preset with one ingredient left out, or changed."""

# What can replace each other.
VARIANTS["dynamics: starts neither fitted nor as the preset's"] = _all(
    VARIANTS["dynamics: mu, Sigma start as the paper's"], VARIANTS["dynamics: starts not fitted"]
)
# What can be left out by itself.
VARIANTS["all that is not needed left out at once"] = _all(
    *(VARIANTS[name] for name in (
        "dynamics: learning rate not raised", "dynamics: u and delta not slowed", "dynamics: delta 0.1",
        "dynamics: mu, Sigma start as the paper's", "dynamics: starts not fitted", "schedule: KL weight 1 throughout",
        "schedule: not one object first", "schedule: constant learning rate",
    ))
)  # fmt: skip


@dataclass
class Arguments:
    suite: Literal["seeds", "longer", "ablation", "recurrent", "taught", "small-noise"] = "seeds"
    """seeds: the quick preset; longer: beside it, with more steps, half an hour and an hour; ablation: with one
    ingredient left out; recurrent: the paper's guide and schedule at the quick preset's size; taught: the paper's
    guide, and the one with an attention head, taught by the quick runs of the same seeds, which must be there;
    small-noise: data whose 0.001 is read as a standard deviation, Sigma_A learned faster."""
    seeds: int = 10
    """How many."""
    first_seed: int = 0
    steps: int | None = None
    """Training steps, if not those of the preset. In the paper's schedule the dynamics are then frozen for a quarter of
    them, and the KL weight is annealed over the next."""
    n_test: int = 1500
    """Fresh sequences that every run is measured on."""
    out: Path = Path("runs/sweep")
    json: Path | None = None
    """Where the summary goes; default: SUITE.json in --out."""
    workers: int = 2
    """Runs at a time, one CPU thread each."""
    seed: int = TEST_SEED
    """Of the fresh sequences."""
    device: str = "cpu"
    job: str | None = None
    """Only this one run, VARIANT/SEED."""


def variants(args: Arguments) -> dict[str, RunConfig]:
    quick = PRESETS["quick"]
    if args.suite == "recurrent":
        steps, paper = args.steps or 4_000, PRESETS["paper"]
        quarter = steps // 4  # a twentieth each, as in the paper's 200,000 steps, would be too short to learn anything
        schedule = replace(
            paper.schedule, steps=steps, learn_from={"model.dynamics": quarter}, anneal_from=quarter,
            anneal_steps=quarter, evaluate_every=max(1, steps // 20),
        )  # fmt: skip
        return {"recurrent": replace(paper, state_size=quick.state_size, data=quick.data, schedule=schedule)}
    if args.suite == "taught":
        taught = replace(quick, guide_state_size=quick.state_size, schedule=lessons(args.steps or 4_000))
        return {f"taught {guide}": replace(taught, guide=guide) for guide in ("recurrent", "attentive")}
    chosen = VARIANTS if args.suite == "ablation" else {"quick": VARIANTS["quick"]}
    if args.suite == "longer":
        chosen |= {f"quick, {steps:,} steps": _schedule(steps=steps) for steps in (7_500, 15_000)}
    configs = {name: change(quick) for name, change in chosen.items()}
    if args.suite == "small-noise":
        faster = VARIANTS["dynamics: Sigma_A learns 50 times faster"](quick)  # the preset starts it far above the truth
        configs = {"small noise": replace(faster, data=replace(quick.data, position_noise=1e-6))}
    if args.steps is not None:
        configs = {name: replace(c, schedule=replace(c.schedule, steps=args.steps)) for name, c in configs.items()}
    return configs


def folder_of(args: Arguments, name: str, seed: int) -> Path:
    return args.out / "".join(c if c.isalnum() else "_" for c in name) / f"seed{seed}"


def one_run(args: Arguments, config: RunConfig, folder: Path) -> None:
    """Trains and measures; the folder's result.json says that it is done."""
    device = device_of(args.device)
    torch.set_num_threads(1)
    validation = simulate(config.data, 150, seed=VALIDATION_SEED)
    curve_file = folder / "curve.json"
    curve = json.loads(curve_file.read_text()) if curve_file.exists() else []

    def measure(run: Run, line: dict[str, float]) -> None:
        curve[:] = [point for point in curve if point["step"] < line["step"]]
        curve.append({"step": line["step"], "seconds": line["seconds"], **_position_errors(run, validation)})
        write_json(curve_file, curve)

    if args.suite == "taught":
        teacher = load_run(folder_of(args, "quick", config.seed), device)
        resume = (folder / "checkpoint.pt").exists()
        run, result = teach(teacher, config, sequences(teacher.config), folder, resume=resume, progress=False)
    else:
        run, result = train_or_resume(config, folder, device, measure)
    if result.interrupted:
        return
    test = simulate(config.data, args.n_test, seed=args.seed)
    about = {"train_seed": config.seed, "test_seed": args.seed, "steps": result.step, "seconds": result.seconds}
    about["health"] = check_health(run.model, run.guide, test[:300])._asdict()
    about |= {"environment": environment(device), **evaluate(run.model, run.guide, test)}
    write_json(folder / "result.json", {**about, "curve": curve})


def _position_errors(run: Run, data: Any) -> dict[str, float]:
    """Position error in pixels for each N, of sequences that are used for nothing else."""
    device = next(run.model.parameters()).device
    a = infer(run.guide, data.images.to(device), data.n_objects.to(device)).mean.cpu()
    in_pixels = metrics.fit_affine(a, data.positions, data.n_objects)(a)
    matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
    errors = metrics.errors(matched, data.positions, data.n_objects)
    return {str(n): metrics.nan_mean(errors[data.n_objects == n]) for n in (1, 2, 3)}


def succeeded(result: dict[str, Any]) -> bool:
    """Whether positions of each N, and identities of all sequences with several objects, are within the bars."""
    positions = [row["position_error_px"] <= POSITION_BAR_PX for row in result["by_n_objects"].values()]
    return all(positions) and (result["all"]["switch_rate"] or 0.0) <= SWITCH_BAR


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
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
                results.append(json.loads(file.read_text()))
        if results:
            successes = sum(map(succeeded, results))
            found[name] = {"successes": successes, "interval95": wilson(successes, len(results)), "runs": results}
    bars = {"position_error_px_of_each_n": POSITION_BAR_PX, "switch_rate_of_all": SWITCH_BAR}
    return {"suite": args.suite, "bars": bars, "variants": found}


def table(result: dict[str, Any]) -> str:
    """Markdown: medians over seeds (for N = 1 / 2 / 3 where there are three), and how many seeds succeeded."""
    header = ["", "seeds within the bars", "position error, px", "switch rate, %", "generation / floor",
              "interpolation / floor", "sides told, %", "bound, nats a frame", "seconds"]  # fmt: skip
    rows = []
    if "tracker" in result:
        rows.append(["classical tracker, true dynamics and radius", "-", *_errors(result["tracker"]), "-", "-", "-"])
    for name, variant in result["variants"].items():
        runs = variant["runs"]
        middle = {"by_n_objects": {n: medians([r["by_n_objects"][n] for r in runs]) for n in runs[0]["by_n_objects"]}}
        every = medians([r["all"] for r in runs])
        low, high = (100 * x for x in variant["interval95"])
        rows.append([
            name, f"{variant['successes']} of {len(runs)} ({low:.0f} to {high:.0f} %)",
            *_errors(middle),
            f"{100 * every['side_accuracy']:.1f}", f"{every['bound_per_frame_nats']:.1f}",
            f"{np.median([r['seconds'] for r in runs]):.0f}",
        ])  # fmt: skip
    return markdown(header, rows)


def _errors(result: dict[str, Any]) -> list[str]:
    return [
        per_n(result, lambda r: r["position_error_px"], 2),
        per_n(result, lambda r: None if r["switch_rate"] is None else 100 * r["switch_rate"], 1),
        per_n(result, lambda r: r["generation_error_px"] / r["generation_floor_px"], 2),
        per_n(result, lambda r: r["interpolation_error_px"] / r["interpolation_floor_px"], 2),
    ]


def main(args: Arguments) -> int:
    if args.seeds < 1 or args.workers < 1:
        raise ValueError(f"seeds is {args.seeds} and workers {args.workers}; wanted at least 1 of each")
    configs = variants(args)
    if args.job is not None:
        name, _, seed = args.job.rpartition("/")
        one_run(args, replace(configs[name], seed=int(seed)), folder_of(args, name, int(seed)))
        return 0
    jobs = [(name, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for name in configs]
    jobs = [(name, seed) for name, seed in jobs if not (folder_of(args, name, seed) / "result.json").exists()]

    def launch(job: tuple[str, int]) -> bool:
        options = ["--suite", args.suite, "--out", args.out, "--n-test", args.n_test, "--seed", args.seed]
        options += ["--device", args.device, "--job", f"{job[0]}/{job[1]}"]
        options += [] if args.steps is None else ["--steps", args.steps]
        for attempt in range(ATTEMPTS):
            done = subprocess.run([sys.executable, __file__, *map(str, options)], check=False)
            lost = done.returncode < 0 and attempt + 1 < ATTEMPTS  # killed from outside; its checkpoint is still there
            outcome = "done" if done.returncode == 0 else "lost, begun again" if lost else "FAILED"
            print(f"{job[0]}, seed {job[1]}: {outcome}", flush=True)
            if not lost:
                break
        return done.returncode == 0

    with ThreadPoolExecutor(args.workers) as pool:
        fine = all(list(pool.map(launch, jobs)))
    result = summary(args, list(configs))
    if args.suite == "small-noise":  # where the floors, which see positions and not pixels, are out of reach
        data = simulate(configs["small noise"].data, args.n_test, seed=args.seed)
        result["tracker"] = evaluate_tracker(data)
    out = args.json or args.out / f"{args.suite}.json"
    write_json(out, result)
    print(table(result))
    print(f"  {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    start(main, Arguments, __doc__)
