"""The quick preset in other worlds: drift in noise, drift in grey, and walls, which a linear model can not hold.

Each case is trained, measured on fresh sequences and checked for health; docs/other_worlds.md shows what comes out.
Give the same command again to go on: what is finished is kept, what was cut off resumes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import TEST_SEED, Shown, device_of, environment, markdown, new_folder, per_n, save, start
from pyro_pixels._files import atomic_write
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.health import EXPECTED, check_health
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.plots import paper as plotting
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import build, load_config, load_run, save_config
from pyro_pixels.training.fitting import fit
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig

QUICK = PRESETS["quick"]
SIZE = {"height": QUICK.data.height, "width": QUICK.data.width}
MIXED = Look(shapes=("disk", "square", "cross", "ring"), least_size=0.7)
SALT_AND_PEPPER = 0.02
NOISY = replace(QUICK, data=DriftConfig(**SIZE, radius=2.5, look=replace(MIXED, salt_and_pepper=SALT_AND_PEPPER)))
FACTORS = {**QUICK.schedule.learning_rate_factors, "model.likelihood": 5.0}
CASES: dict[str, RunConfig] = {
    # half of the pixels that are replaced become white
    "drift_noisy_clutter": replace(NOISY, clutter=SALT_AND_PEPPER / 2),
    "drift_noisy": NOISY,
    "drift_grey": replace(
        QUICK,
        likelihood="gaussian",
        n_sequences=3_000,
        schedule=replace(QUICK.schedule, learning_rate_factors=FACTORS),
        data=DriftConfig(**SIZE, radius=2.5, look=replace(MIXED, brightness=(0.5, 1.0))),
    ),
    "bouncing": replace(QUICK, data=BouncingConfig(**SIZE)),
}
JUDGES = 60  # sequences for the health check, as in train.py


@dataclass
class Arguments:
    cases: tuple[str, ...] = tuple(CASES)
    """Which."""
    out: Path = Path("runs/worlds")
    """A folder for each case's run goes here."""
    json: Path = Path("docs/results/worlds.json")
    """Where the numbers go; those of other cases stay."""
    figures: Path = Path("docs/figures/worlds")
    steps: int | None = None
    """Training steps, if not the quick preset's."""
    n_sequences: int | None = None
    """How many sequences to train on, if not the preset's number."""
    n_test: int = 300
    """Fresh sequences that each run is measured on."""
    seed: int = 0
    """Of the training."""
    device: str = "cpu"


def main(args: Arguments) -> int:
    unknown = sorted(set(args.cases) - CASES.keys())
    if unknown:
        raise ValueError(f"there is no case '{unknown[0]}'; wanted some of {sorted(CASES)}")
    device = device_of(args.device)
    torch.set_num_threads(1)  # states this small share no work
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.cases:
        config = replace(CASES[name], seed=args.seed)
        if args.steps is not None:
            config = replace(config, schedule=replace(config.schedule, steps=args.steps))
        if args.n_sequences is not None:
            config = replace(config, n_sequences=args.n_sequences)
        if not train(args.out / name, config, device):
            print("stopped and saved; give the same command again to go on")
            return 130
        data = simulate(config.data, args.n_test, seed=TEST_SEED)
        results[name] = measure(args.out / name, data, device) | {"environment": environment(device)}
        with atomic_write(args.json) as file:
            file.write(json.dumps(results, indent=1).encode() + b"\n")
        draw(args.out / name, data, device, args.figures / f"{name}.png")
    print(table({name: results[name] for name in args.cases}))
    return 0


def train(folder: Path, config: RunConfig, device: torch.device) -> bool:
    """Trains a run in its folder, from where it is, and says whether to the end; another's folder is an error."""
    new_folder(folder)
    resume = (folder / "checkpoint.pt").exists()
    if resume and load_config(folder) != config:
        raise ValueError(f"{folder} holds a run of another configuration; remove it, or choose another --out")
    save_config(folder, config)
    run = build(config)
    result = fit(
        run.model.to(device), run.guide.to(device), simulate(config.data, config.n_sequences, seed=config.seed),
        config.schedule, seed=config.seed, run_dir=folder, resume=resume,
        validation=simulate(config.data, JUDGES, seed=TEST_SEED - 1),
    )  # fmt: skip
    return not result.interrupted


def measure(folder: Path, data: ImageSequences, device: torch.device) -> dict[str, Any]:
    """The table of `evaluate`, what the health check says, and what training cost."""
    run = load_run(folder, device)
    judges = simulate(run.config.data, JUDGES, seed=TEST_SEED - 1)
    measures, problems = check_health(run.model, run.guide, judges)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    likelihood = {name: p.tolist() for name, p in run.model.likelihood.named_parameters()}
    return {
        "evaluation": evaluate(run.model, run.guide, data),
        "health": {"measures": measures, "problems": problems},
        "likelihood": likelihood,
        "training": json.loads(lines[-1]),
    }


def draw(folder: Path, data: ImageSequences, device: torch.device, out: Path) -> None:
    """Two sequences of each N: tracks, forecasts from the first frames, and images below them."""
    shown = Shown(load_run(folder, device), data, device)
    rows, prediction = shown.pick(2), shown.generation()
    generated = shown.tracks(prediction.mean)[rows]
    generated[:, :, : shown.n_seen - 1] = torch.nan
    truth = data.positions
    figure = plotting.plot_trajectories(
        truth[rows] if truth is not None and shown.size is not None else None,
        shown.tracks(shown.inference.mean)[rows], generated,
        n_objects=data.n_objects[rows], size=shown.size, columns=6,
        images={"truth": data.images[rows], "generated": prediction.images.cpu()[rows]},
    )  # fmt: skip
    save(figure, out)


def table(results: dict[str, Any]) -> str:
    """Errors in pixels for each N, and what the health check found."""
    header = ["case", "position error", "switch rate", "generation error (floor)", "signs of failure"]
    rows = []
    for name, result in results.items():
        row, failed = result["evaluation"], result["health"]["measures"]
        signs = [f"{k} {x:.2f}" for k, x in failed.items() if k in EXPECTED and not _within(x, *EXPECTED[k])]
        floors = per_n(row, lambda r: r.get("generation_floor_px"), 2)
        rows.append([
            name, per_n(row, lambda r: r["position_error_px"], 2), per_n(row, lambda r: r["switch_rate"], 2),
            f"{per_n(row, lambda r: r['generation_error_px'], 2)} ({floors})", ", ".join(signs) or "none",
        ])  # fmt: skip
    return markdown(header, rows)


def _within(x: float, low: float, high: float) -> bool:
    return low <= x <= high


if __name__ == "__main__":
    start(main, Arguments, __doc__)
