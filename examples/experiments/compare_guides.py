"""Compares guides in a table: the library's and your own, each trained with the same data, seed and schedule.

All start from the quick preset, its schedule shortened to --steps. Repeat the same command to continue: finished runs
are kept, interrupted ones resume. "bound less AutoNormal's" is the cost of amortisation: the bound of the trained guide
on a few sequences, minus that of Pyro's AutoNormal fitted to each of them with the same model.
"""

from examples._common import device_of, new_folder, read_json, start, write_json

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyro_pixels._options import Count, Seeds, Sequences, result_file
from pyro_pixels.config import RunConfig
from pyro_pixels.custom import CustomFile, load_file
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.mean_field import fit_mean_field
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.guides.base import Guide
from pyro_pixels.presets import PRESETS
from pyro_pixels.result_tables import environment, markdown, medians, medians_per_n, per_n
from pyro_pixels.run_sequences import TEST_SEED
from pyro_pixels.run_training import train_run
from pyro_pixels.runs import GUIDES, REGISTRIES, Run, names_in
from pyro_pixels.training.elbo import bound
from pyro_pixels.worlds.base import simulate

BOUND_SAMPLES = 10


@dataclass
class Arguments:
    guides: tuple[str, ...] = ()
    """Names in `GUIDES`; default: all guides of the library and of --custom."""
    custom: Path = Path("examples/custom_guide.py")
    """A Python file that adds guides to `GUIDES`."""
    steps: Count = 300
    """Number of training steps of each guide."""
    seeds: Seeds = 1
    """Number of seeds, from 0 on; the table shows medians."""
    n_sequences: Sequences = 9_000
    """Number of training sequences."""
    n_test: Sequences = 300
    """Number of fresh sequences for the evaluation of each run."""
    n_fitted: Sequences = 12
    """Number of these sequences to which AutoNormal is fitted."""
    fit_steps: Count = 300
    """Number of steps of that fit."""
    out: Path = Path("runs/guides")
    json: Path | None = None
    """File for the summary; default: guides.json in --out."""
    device: str = "cpu"


def one_run(args: Arguments, config: RunConfig, folder: Path) -> bool:
    """Trains and evaluates one run; result.json in its folder marks it as finished. False if Ctrl-C interrupted it."""
    device = device_of(args.device)
    data = simulate(config.data, config.n_sequences, seed=config.seed)
    run, result = train_run(config, folder, data, device=device, progress=False)
    if result.interrupted:
        return False
    test = simulate(config.data, args.n_test, seed=TEST_SEED)
    about = {
        "train_seed": config.seed,
        "steps": result.step,
        "seconds": result.seconds,
        "parameters": own_parameters(run),
        "fitted": amortisation_gap(run, test[: args.n_fitted], args.fit_steps),
        "environment": environment(device),
    }
    write_json(folder / "result.json", {**about, **evaluate(run.model, run.guide, test)})
    return True


def own_parameters(run: Run) -> int:
    """Returns the number of the guide's parameters that are not the model's."""
    shared = {id(p) for p in run.model.parameters()}
    return sum(p.numel() for p in run.guide.parameters() if id(p) not in shared)


def amortisation_gap(run: Run, data: ImageSequences, steps: int) -> dict[str, float]:
    """Returns the bounds of the guide and of `AutoNormal` on the same sequences, nats per frame, and the difference."""
    fitted = fit_mean_field(run.model, data, run.guide, steps=steps)

    def mean_bound(guide: Guide) -> float:
        bounds = [bound(run.model, guide, data, seed=seed).bound.mean() for seed in range(BOUND_SAMPLES)]
        return float(torch.stack(bounds).mean()) / data.images.shape[1]

    of_guide, of_fitted = mean_bound(run.guide), mean_bound(fitted)
    return {"guide_bound": of_guide, "auto_normal_bound": of_fitted, "gap": of_guide - of_fitted}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns a Markdown table with one row per guide: medians over seeds, for N = 1 / 2 / 3 separately."""
    header = ["guide", "position error, px", "switch rate, %", "bound, nats per frame", "bound less AutoNormal's",
              "parameters", "seconds a step", "seconds"]  # fmt: skip
    rows = []
    for name, runs in results.items():
        middle = medians_per_n(runs)
        fitted, cost = (medians([pick(r) for r in runs]) for pick in (lambda r: r["fitted"], _cost))
        rows.append([
            name,
            per_n(middle, lambda r: r["position_error_px"], 2),
            per_n(middle, lambda r: None if r["switch_rate"] is None else 100 * r["switch_rate"], 0),
            per_n(middle, lambda r: r["bound_per_frame_nats"], 1),
            f"{fitted['gap']:+.2f}",
            f"{runs[0]['parameters']:,}",
            f"{cost['seconds_per_step']:.3f}",
            f"{cost['seconds']:.0f}",
        ])  # fmt: skip
    return markdown(header, rows)


def _cost(result: dict[str, Any]) -> dict[str, float]:
    return {"seconds": result["seconds"], "seconds_per_step": result["seconds"] / result["steps"]}


def configuration(base: RunConfig, name: str, seed: int, file: CustomFile) -> RunConfig:
    """Returns the configuration of one run, with the path and checksum of the file if it uses that."""
    config = replace(base, guide=name, seed=seed)
    used = any(name in file.names[kind] for kind, name in names_in(config).items())
    return replace(config, custom_file=str(file.path), custom_sha256=file.sha256) if used else config


def main(args: Arguments) -> int:
    torch.set_num_threads(1)
    device_of(args.device)
    out = result_file(args.json or new_folder(args.out) / "guides.json", ".json")
    new_folder(out.parent)
    file = load_file(args.custom, REGISTRIES)
    if not file.names["guide"]:
        raise ValueError(f"{args.custom} adds {file.describe()}, but no guide; wanted one to compare")
    names = args.guides or tuple(GUIDES)
    for name in names:
        if name not in GUIDES:
            raise ValueError(f"there is no guide '{name}'; wanted some of {sorted(GUIDES)}, or a --custom that adds it")
    quick = PRESETS["quick"]
    base = replace(quick, schedule=quick.schedule.shortened(args.steps), n_sequences=args.n_sequences)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names:
            folder = args.out / name / f"seed{seed}"
            if not (folder / "result.json").exists():
                print(f"{name}, seed {seed}", flush=True)
                if not one_run(args, configuration(base, name, seed, file), folder):
                    print("stopped and saved; repeat the same command to continue")
                    return 130
            found = read_json(folder / "result.json")
            if found["steps"] != args.steps:
                raise ValueError(
                    f"{folder} was trained for {found['steps']} steps; give that number as --steps, or another --out"
                )
            results[name].append(found)
    write_json(out, {"steps": args.steps, "guides": results})
    print(table(results))
    print(f"  {out}")
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
