"""Exports the posterior of a trained run for arviz, as posterior.nc, and draws pictures of what it contains."""

from _common import QueryArguments, new_folder, open_sequences, progress, say_where, start

import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from pyro_pixels._files import atomic_write
from pyro_pixels._options import Draws, Frames, Sequences
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.run_figures import RunView

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")  # 0.23 announces 1.0 everywhere
import arviz as az  # noqa: E402

ToPixels = Callable[[Tensor], Tensor]
SHARE = 0.9  # probability of the intervals


@dataclass
class Arguments(QueryArguments):
    n_sequences: Sequences = 30
    """Number of sequences to query; of a file, the first ones."""
    n_samples: Draws = 100
    """Number of draws from the posterior and from the prior."""
    n_seen: Frames | None = None
    """Number of observed frames; those that follow are predicted. By default half of them, at most 15."""


def main(args: Arguments) -> None:
    plt.switch_backend("agg")
    (run, data, device), asked = open_sequences(args)
    out = new_folder(args.out or args.home / "arviz")
    T = data.images.shape[1]
    n_seen = max(1, min(15, T // 2)) if args.n_seen is None else args.n_seen
    if not 0 < n_seen < T:
        raise ValueError(f"--n-seen is {n_seen}; wanted at least 1 and fewer than the {T} frames of a sequence")
    view = RunView(run, first_frames(data, n_seen), device, first=asked.first)
    truth = in_the_models_order(data, view)
    print(f"drawing {args.n_samples} samples for {len(data)} sequences and their futures")
    inference = to_inference_data(
        run.model, run.guide, view.images, view.n_objects, n_samples=args.n_samples, n_frames_ahead=T - n_seen,
        positions=None if truth is None else first_frames(truth, n_seen).positions, seed=args.seed, progress=True,
        first=asked.first,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole = inference.to_netcdf(str(Path(folder) / "posterior.nc"))
        with open(whole, "rb") as source, atomic_write(out / "posterior.nc") as file:
            shutil.copyfileobj(source, file)
    if hasattr(az, "convert_to_datatree"):
        say_where([out / "posterior.nc"])
        print("drawing the pictures needs arviz 0.x; arviz 1 reads the file, but has other plotting functions")
        return
    figures: dict[str, Callable[[], Figure]] = {
        "launches": lambda: draw_launches(inference, view.to_pixels),
        "first_steps": lambda: draw_first_steps(inference, view.to_pixels, truth),
        "futures": lambda: draw_futures(inference, view.to_pixels, truth),
        "white_pixels": lambda: draw_white_pixels(inference),
    }
    k = pareto_k(inference)
    if np.isfinite(k).any():
        figures["pareto_k"] = lambda: draw_weights(inference, k)
    else:
        print(f"pareto_k: not drawn, as {args.n_samples} draws are too few to know it (--n-samples)")
    if truth is not None:
        figures["calibration"] = lambda: draw_calibration(inference, view.to_pixels, truth)
    for name, draw in progress(figures.items(), "pictures", len(figures)):
        save_figure(draw(), out / f"{name}.png", title_of(name, truth))
    say_where([out / "posterior.nc", *(out / f"{name}.png" for name in figures)])


def first_frames(data: ImageSequences, n: int) -> ImageSequences:
    """Returns the data with images and positions of the first ``n`` frames."""
    positions = None if data.positions is None else data.positions[:, :, :n]
    paths = None if data.paths is None else data.paths[:, :, :n]
    return dataclasses.replace(data, images=data.images[:, :n], positions=positions, paths=paths)


def in_the_models_order(data: ImageSequences, view: RunView) -> ImageSequences | None:
    """Returns the data with objects in the model's order; None if positions are unknown or not comparable in pixels."""
    if view.size is None or data.positions is None or view.data.positions is None:
        return None
    found = view.to_pixels(view.inference.mean.cpu())
    order = metrics.assign(view.data.positions, found, data.n_objects)
    paths = None if data.paths is None else metrics.reorder(data.paths, order)
    return dataclasses.replace(data, positions=metrics.reorder(data.positions, order), paths=paths)


def in_pixels(a: xr.DataArray, to_pixels: ToPixels) -> xr.DataArray:
    """Maps positions, whose last dimension is the axis, to pixels."""
    return a.copy(data=to_pixels(torch.from_numpy(a.values)).numpy())


def first_step(inference: Any, h: xr.DataArray, to_pixels: ToPixels) -> xr.DataArray:
    """Returns the expected move of each ball from frame 1 to 2, in pixels: delta (vx, vy) plus the (x, y) part of u.

    Images determine this sum, but not the velocities by themselves.
    """
    v = h.isel(time=0).sel(state=["vx", "vy"]).rename(state="axis").assign_coords(axis=["x", "y"])
    u = inference.constant_data.u.sel(state=["x", "y"]).rename(state="axis")
    step = in_pixels((inference.constant_data.delta * v + u).transpose(..., "axis"), to_pixels)
    return step - to_pixels(torch.zeros(2, dtype=torch.float64)).numpy()


TITLES = {
    "launches": "Steps from frame 1 to 2: of the balls seen (dots), and the learned prior of each component (lines)",
    "first_steps": "Steps from frame 1 to 2, ball by ball",
    "futures": "Positions seen and ahead, 90 % regions",
    "white_pixels": "White pixels of a frame: observed, and drawn from the model",
    "pareto_k": "How far importance weights can be trusted",
    "calibration": "Where the truth lies among the draws",
}
"""The title of each picture, without the truth that some show."""


def title_of(name: str, truth: ImageSequences | None) -> str:
    """Returns the title of a picture."""
    if name == "first_steps" and truth is not None and truth.paths is not None:
        return f"{TITLES[name]}, and the true ones (bars)"
    return f"{TITLES[name]} and the truth (dots)" if name == "futures" and truth is not None else TITLES[name]


def draw_launches(inference: Any, to_pixels: ToPixels) -> Figure:
    """Draws first steps: those of the observed balls (dots) and the learned prior of each component (lines)."""
    figure, panel = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for k in range(inference.constant_data.sizes["component"]):
        for group, kind in ((inference.posterior, "scatter"), (inference.prior, "kde")):
            step = first_step(inference, group.h, to_pixels).where(group.z == k)
            step = step.stack(ball=("chain", "draw", "sequence", "object")).dropna("ball")
            if step.sizes["ball"] > 1:
                az.plot_pair(
                    {name: step.sel(axis=name).values[None] for name in ("x", "y")},
                    kind=kind, ax=panel, textsize=8, scatter_kwargs={"color": f"C{k}", "alpha": 0.4, "s": 3},
                    kde_kwargs={"fill_last": True, "contourf_kwargs": {"alpha": 0},
                                "contour_kwargs": {"colors": "black", "linewidths": 0.8}},
                )  # fmt: skip
    panel.set_xlabel("step from frame 1 to 2, along x, pixels", fontsize=8)
    panel.set_ylabel("along y, downwards, pixels", fontsize=8)
    return figure


def draw_first_steps(inference: Any, to_pixels: ToPixels, truth: ImageSequences | None) -> Figure:
    """Draws first steps ball by ball, and the true ones (bars)."""
    step = first_step(inference, inference.posterior.h.isel(sequence=slice(0, 6)), to_pixels)
    balls = step.stack(ball=("sequence", "object")).dropna("ball").transpose("chain", "draw", "ball", "axis")
    which = balls.ball.values
    first = int(inference.posterior.sequence[0])
    balls = balls.drop_vars(["ball", "sequence", "object"])
    balls = balls.assign_coords(ball=[f"sequence {b}, ball {n}" for b, n in which])
    figure, panels = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
    for i, (panel, axis) in enumerate(zip(panels, ("x", "y"))):
        az.plot_forest(balls.sel(axis=axis, drop=True).to_dataset(name=axis), combined=True, ax=panel,
                       hdi_prob=SHARE, labeller=az.labels.NoVarLabeller(), textsize=7)  # type: ignore[attr-defined]  # fmt: skip
        if truth is not None and truth.paths is not None:
            true = [float(truth.paths[b - first, n - 1, 1, i] - truth.paths[b - first, n - 1, 0, i]) for b, n in which]
            panel.plot(true, sorted(panels[0].get_yticks(), reverse=True), "|", color="black", markersize=9)
        panel.set_title(f"step from frame 1 to 2, along {axis}, pixels", fontsize=8)
    return figure


def draw_futures(inference: Any, to_pixels: ToPixels, truth: ImageSequences | None) -> Figure:
    """Draws inferred, predicted and true positions of the balls in one sequence of each N."""
    first = int(inference.posterior.sequence[0])
    n_objects = inference.constant_data.n_objects.values
    rows = [int(np.flatnonzero(n_objects == n)[0]) for n in sorted(set(n_objects))]
    figure, panels = plt.subplots(2, len(rows), figsize=(2.4 * len(rows), 3.6), layout="constrained", squeeze=False)
    groups = [in_pixels(group.a, to_pixels) for group in (inference.posterior, inference.predictions)]
    for column, b in enumerate(rows):
        for i, name in enumerate(("x", "y")):
            panel = panels[i, column]
            for n in range(n_objects[b]):
                for a in groups:
                    drawn = a.isel(sequence=b, object=n).sel(axis=name)
                    az.plot_hdi(a.time.values, drawn.values, hdi_prob=SHARE, color=f"C{n}", smooth=False, ax=panel)
                if truth is not None and truth.positions is not None:
                    true = truth.positions[b, n, :, i]
                    panel.plot(range(1, len(true) + 1), true, ".", color=f"C{n}", markersize=2)
            panel.axvline(groups[0].time.values[-1] + 0.5, color="grey", linewidth=0.8)
            panel.set_title(f"sequence {first + b}: {name}", fontsize=8)
            panel.tick_params(labelsize=7)
    figure.supxlabel("frame", fontsize=8)
    figure.supylabel("pixels", fontsize=8)
    return figure


def draw_white_pixels(inference: Any) -> Figure:
    """Draws the distribution of the number of white pixels per frame: in the data, and in images from the model.

    If there are grey pixels, their values are added up. Unobserved frames are left out.
    """
    groups = {name: inference[name].v for name in ("posterior_predictive", "observed_data")}
    seen = groups["observed_data"].notnull().all(("row", "column")).stack(frame=("sequence", "time")).values
    grey = any(bool((v % 1 > 0).any()) for v in groups.values())
    white: Any = az.InferenceData(**{
        name: v.sum(("row", "column")).astype(float if grey else int).stack(frame=("sequence", "time"))
        .isel(frame=seen).reset_index("frame", drop=True).to_dataset()
        for name, v in groups.items()
    })  # fmt: skip
    figure, panel = plt.subplots(figsize=(4.5, 3), layout="constrained")
    n_draws = min(50, white.posterior_predictive.sizes["draw"])
    az.plot_ppc(white, kind="cumulative", num_pp_samples=n_draws, ax=panel, textsize=8, random_seed=0)
    panel.set_xlabel("sum of the pixels of a frame" if grey else "white pixels in a frame", fontsize=8)
    panel.set_ylabel("share of the frames", fontsize=8)
    return figure


def pareto_k(inference: Any) -> np.ndarray:
    """Returns Pareto k (B,) of the importance weights, NaN or infinite where there are too few draws to know it."""
    log_weight = inference.sample_stats.log_weight
    if log_weight.sizes["draw"] < 2:  # a single weight has no tail
        return np.full(log_weight.sizes["sequence"], np.nan)
    return az.psislw(log_weight.stack(__sample__=("chain", "draw")))[1].values


def draw_weights(inference: Any, k: np.ndarray) -> Figure:
    """Draws Pareto k of log p(v, a) - log q(a | v), which shows how far the guide is from the posterior."""
    n_objects = inference.constant_data.n_objects.values
    first = int(inference.posterior.sequence[0])
    figure, panel = plt.subplots(figsize=(4.5, 3), layout="constrained")
    colours: Any = [f"C{n - 1}" for n in n_objects]
    az.plot_khat(k, ax=panel, show_hlines=True, textsize=8, color=colours)
    for n in sorted(set(n_objects)):
        panel.plot([], [], "+", color=f"C{n - 1}", label=f"N = {n}")
    panel.legend(fontsize=8)
    panel.xaxis.set_major_formatter(lambda x, _: f"{first + x:g}")
    panel.set_xlabel("sequence", fontsize=8)
    panel.set_ylabel("Pareto k", fontsize=8)
    return figure


def draw_calibration(inference: Any, to_pixels: ToPixels, truth: ImageSequences) -> Figure:
    """Draws how often the truth lies below each quantile, for the last observed and the last predicted frame."""
    assert truth.positions is not None
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", sharey=True)
    titles = ("last frame seen", "last frame predicted")
    for panel, group, title in zip(panels, (inference.posterior, inference.predictions), titles):
        a = in_pixels(group.a, to_pixels).isel(time=-1)
        true = truth.positions[:, :, int(a.time) - 1].numpy()
        below = (a < xr.DataArray(true, dims=("sequence", "object", "axis"))).mean(("chain", "draw"))
        az.plot_ecdf(below.values[~np.isnan(true)], eval_points=np.linspace(0, 1, 101), cdf=stats.uniform().cdf,
                     difference=True, confidence_bands=True, ax=panel)  # fmt: skip
        panel.set_title(f"{title}, {int(a.time)}", fontsize=8)
        panel.set_xlabel("quantile", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("share of the truth below,\nminus quantile", fontsize=8)
    return figure


if __name__ == "__main__":
    start(main, Arguments, __doc__)
