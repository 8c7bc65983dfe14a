"""What the example scripts share: the command line, one-line errors, devices, data, and the figures of a run."""

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
import tyro
from torch import Tensor

from pyro_pixels._files import atomic_write
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.plots import paper as plotting
from pyro_pixels.queries.predict import Prediction, generate, infer, interpolate, reconstruct
from pyro_pixels.runs import Run, build, load_pretrained, load_run, save_config
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.loop import FitResult
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate

Arguments = TypeVar("Arguments")
TEST_SEED = 1_000_003  # fresh sequences for figures and tables; training seeds are small numbers


def start(main: Callable[[Arguments], int | None], arguments: type[Arguments], doc: str | None) -> None:
    """Reads the command line into ``arguments`` and runs ``main``; what is wrong is one line and exit code 2."""
    try:
        sys.exit(main(tyro.cli(arguments, description=doc)) or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def device_of(name: str) -> torch.device:
    """The device of that name (cpu, cuda, cuda:1, mps, or auto: the best there is); a ValueError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"'{name}' is no device; wanted cpu, cuda, mps or auto") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ValueError(f"there is no {device.type} device here; use --device cpu, or auto for the best there is")
    return device


@dataclass
class QueryArguments:
    """What every script that asks a trained run takes."""

    run: Path = Path("runs/quick")
    """Folder of a trained run."""
    pretrained: bool = False
    """Ask the weights that come with the package instead."""
    weights: str = "quick"
    """Which of them: quick, or long, which learned for fifteen times as many steps; only with --pretrained."""
    data: Path | None = None
    """An .npz of image sequences; default: fresh ones, simulated as the run's were."""
    out: Path | None = None
    """Where results go; default: in the run's folder, or runs/pretrained (runs/pretrained_NAME for other weights)."""
    n_sequences: int = 60
    """How many sequences at most."""
    seed: int = TEST_SEED
    """Of simulated sequences and of samples."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""

    @property
    def home(self) -> Path:
        """The folder that results go to by default."""
        if not self.pretrained:
            return self.run
        return Path("runs/pretrained" if self.weights == QueryArguments.weights else f"runs/pretrained_{self.weights}")


class Asked(NamedTuple):
    run: Run
    data: ImageSequences
    device: torch.device


def ask(args: QueryArguments) -> Asked:
    """The run and the sequences of a query, and where to work.

    Raises:
        ValueError: if weights that come with the package are named, and a run is asked.
    """
    if args.weights != QueryArguments.weights and not args.pretrained:
        raise ValueError(
            f"--weights {args.weights} names weights that come with the package, and {args.run} is asked; "
            f"add --pretrained, or leave --weights out"
        )
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    run = load_pretrained(args.weights, device) if args.pretrained else load_run(args.run, device)
    return Asked(run, sequences_for(run, args.data, args.n_sequences, args.seed), device)


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a number was measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": platform.processor() if name is None else name[1],
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }


def sequences_for(run: Run, data: Path | None, n_sequences: int, seed: int) -> ImageSequences:
    """Sequences from a file, or fresh ones simulated as the run's were; checked to fit the run."""
    found = simulate(run.config.data, n_sequences, seed=seed) if data is None else load_sequences(data)[:n_sequences]
    wanted = (run.config.data.height, run.config.data.width)
    if found.size != wanted:
        raise ValueError(
            f"the sequences are {found.size[0]} x {found.size[1]} pixels; "
            f"this run was trained on {wanted[0]} x {wanted[1]}"
        )
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def per_n(result: dict[str, Any], value: Callable[[dict[str, Any]], float | None], digits: int) -> str:
    """A value for each N of an evaluation, such as "0.14 / 0.18 / 0.22", without those that do not apply."""
    values = [value(row) for row in result["by_n_objects"].values()]
    return " / ".join(f"{v:.{digits}f}" for v in values if v is not None) or "-"


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each value over several rows of an evaluation, None where it does not apply."""
    return {key: None if rows[0][key] is None else float(np.median([row[key] for row in rows])) for key in rows[0]}


def shortened(schedule: Schedule, steps: int) -> Schedule:
    """A schedule of so many steps in which everything happens at the same share of them."""

    def at(step: int) -> int:
        return round(step * steps / schedule.steps)

    return replace(
        schedule,
        steps=steps,
        decay_from=None if schedule.decay_from is None else at(schedule.decay_from),
        learn_from={prefix: at(step) for prefix, step in schedule.learn_from.items()},
        anneal_from=at(schedule.anneal_from),
        anneal_steps=at(schedule.anneal_steps),
        single_object_steps=at(schedule.single_object_steps),
        fit_starts_at=tuple(at(step) for step in schedule.fit_starts_at),
        evaluate_every=max(1, at(schedule.evaluate_every)),
    )


def train_or_resume(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    on_evaluation: Callable[[Run, dict[str, float]], None] = lambda run, line: None,
) -> tuple[Run, FitResult]:
    """A run trained on simulated data, from its checkpoint on if the folder has one."""
    run = build(config)
    run = run._replace(model=run.model.to(device), guide=run.guide.to(device))
    save_config(folder, config)
    data = simulate(config.data, config.n_sequences, seed=config.seed)
    result = fit(
        run.model, run.guide, data, config.schedule, seed=config.seed, run_dir=folder,
        resume=(folder / "checkpoint.pt").exists(), progress=False,
        on_evaluation=lambda line: on_evaluation(run, line),
    )  # fmt: skip
    return run, result


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def new_folder(path: Path) -> Path:
    """A folder that can be written to, made if need be, or a ValueError."""
    with atomic_write(path / ".writable"):
        pass
    (path / ".writable").unlink(missing_ok=True)  # other processes do the same
    return path


def save_arrays(path: Path, **arrays: Tensor | None) -> None:
    """An .npz of what there is, in single precision."""
    values: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is not None:
            values[name] = x.cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **values)
    print(f"  {path}")


def save(figure: Any, path: Path) -> None:
    plotting.save_figure(figure, path)
    print(f"  {path}")


class Shown:
    """A few sequences of each N with everything a run has to say about them, in pixels where the truth is known."""

    def __init__(self, run: Run, data: ImageSequences, device: torch.device, *, n_seen: int = 5) -> None:
        self.run, self.data, self.device, self.n_seen = run, data, device, n_seen
        self.images, self.n_objects = data.images.to(device), data.n_objects.to(device)
        self.inference = infer(run.guide, self.images, self.n_objects)
        self.to_pixels: Callable[[Tensor], Tensor] = lambda a: a
        self.size: tuple[int, int] | None = None  # None: plots in latent units
        self.order: Tensor | None = None
        if data.positions is not None and bool((data.n_objects == 1).any()):
            self.to_pixels = metrics.fit_affine(self.inference.mean.cpu(), data.positions, data.n_objects)
            self.size = data.size
            self.order = metrics.assign(self.to_pixels(self.inference.mean.cpu()), data.positions, data.n_objects)

    def tracks(self, a: Tensor) -> Tensor:
        """Latent positions as they are plotted: in pixels and in the true objects' order if there is a truth."""
        a = self.to_pixels(a.cpu())
        return a if self.order is None else metrics.reorder(a, self.order)

    def generation(self, n_frames: int | None = None, n_samples: int = 0) -> Prediction:
        seen = self.images[:, : self.n_seen]
        return generate(
            self.run.model,
            self.run.guide,
            seen,
            self.n_objects,
            n_frames=n_frames or self.images.shape[1],
            n_samples=n_samples,
        )

    def interpolation(self, n_samples: int = 0) -> Prediction:
        time = torch.arange(self.images.shape[1], device=self.device)
        ends = (time < self.n_seen) | (time >= len(time) - self.n_seen)
        return interpolate(self.run.model, self.run.guide, self.images, self.n_objects, ends, n_samples=n_samples)

    def reconstruction(self) -> Tensor:
        return reconstruct(self.run.model, self.run.guide, self.images, self.n_objects)

    def pick(self, per_n: int) -> Tensor:
        """Indices of the first ``per_n`` sequences of each N, largest N first."""
        values = sorted(set(self.data.n_objects.tolist()), reverse=True)
        return torch.cat([(self.data.n_objects == n).nonzero().squeeze(1)[:per_n] for n in values])


def draw_inference(shown: Shown, out: Path) -> None:
    """positions.png, like Fig 3."""
    rows = shown.pick(3)
    mean = shown.tracks(shown.inference.mean)[rows]
    if shown.size is None:
        save(
            plotting.plot_inference_means({"inferred, latent units": _present(mean, shown, rows)}),
            out / "positions.png",
        )
    else:
        truth = shown.data.positions
        assert truth is not None
        n_objects = shown.data.n_objects[rows]
        save(plotting.plot_positions(truth[rows], mean, n_objects=n_objects, size=shown.size), out / "positions.png")


def draw_generation(shown: Shown, prediction: Prediction, out: Path) -> None:
    """generated_images.png like Fig 6, generated_trajectories.png like Fig 8, and generation.gif."""
    tau, rows = shown.n_seen, shown.pick(2)
    truth, drawn = shown.data.images, prediction.images.cpu()
    T = min(truth.shape[1], drawn.shape[1])
    figure = plotting.plot_generated_images(drawn[rows, tau:T], truth[rows, tau:T], rows=2)
    save(figure, out / "generated_images.png")
    generated = shown.tracks(prediction.mean[:, :, :T])
    generated[:, :, : tau - 1] = torch.nan
    figure = plotting.plot_trajectories(
        *_truth_and_inferred(shown, rows),
        generated[rows],
        n_objects=shown.data.n_objects[rows],
        size=shown.size,
        columns=3,
    )
    save(figure, out / "generated_trajectories.png")
    draw_forecast(shown, prediction, out / "generation.gif")


def draw_forecast(shown: Shown, prediction: Prediction, path: Path) -> None:
    """A GIF of the truth, the reconstruction, and what was generated after the first frames."""
    rows, T = shown.pick(1), min(shown.images.shape[1], prediction.images.shape[1])
    panels = {
        "truth": shown.data.images[rows, :T],
        "reconstruction": shown.reconstruction().cpu()[rows, :T],
        "generation": prediction.images.cpu()[rows, :T],
    }
    plotting.gif(path, panels, scale=4, mark={"generation": shown.n_seen})
    print(f"  {path}")


def draw_interpolation(shown: Shown, generated: Prediction, interpolated: Prediction, out: Path) -> None:
    """interpolation.png, like Fig 9."""
    rows = shown.pick(2)
    images = {
        "generated": generated.images.cpu()[rows],
        "truth": shown.data.images[rows],
        "interpolated": interpolated.images.cpu()[rows],
    }
    red, cyan = (shown.tracks(p.mean) for p in (generated, interpolated))
    red[:, :, : shown.n_seen - 1] = torch.nan
    figure = plotting.plot_trajectories(
        *_truth_and_inferred(shown, rows), red[rows], cyan[rows],
        n_objects=shown.data.n_objects[rows], size=shown.size, images=images, columns=3,
    )  # fmt: skip
    save(figure, out / "interpolation.png")


def draw_error_over_time(shown: Shown, generated: Prediction, interpolated: Prediction, out: Path) -> None:
    """error_over_time.png: mean error in each frame beside the floor; only where the true dynamics are known."""
    data = shown.data
    if shown.size is None or data.dynamics is None or data.positions is None:
        return
    truth, n_objects, observed = (
        data.positions,
        data.n_objects,
        {"generated": generated.observed.cpu(), "interpolated": interpolated.observed.cpu()},
    )
    errors, floors = {}, {}
    for name, prediction in (("generated", generated), ("interpolated", interpolated)):
        a = shown.to_pixels(prediction.mean.cpu())
        seen = observed[name]
        a = metrics.reorder(a, metrics.assign(a[:, :, seen], truth[:, :, seen], n_objects))
        errors[name] = metrics.errors(a, truth, n_objects).nanmean((0, 1))
        floor = metrics.floor_predictions(data.dynamics, truth, seen)
        floors[name] = metrics.errors(floor, truth, n_objects).nanmean((0, 1))
        floors[name][seen] = torch.nan
    save(
        plotting.plot_error_over_time(errors, floors=floors, seen=observed["interpolated"]), out / "error_over_time.png"
    )


def _truth_and_inferred(shown: Shown, rows: Tensor) -> tuple[Tensor | None, Tensor]:
    truth = None if shown.size is None or shown.data.positions is None else shown.data.positions[rows]
    return truth, shown.tracks(shown.inference.mean)[rows]


def _present(a: Tensor, shown: Shown, rows: Tensor) -> Tensor:
    n_objects = shown.data.n_objects[rows]
    absent = torch.arange(a.shape[1]) >= n_objects[:, None]
    return a.masked_fill(absent[:, :, None, None], torch.nan)
