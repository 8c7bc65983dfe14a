"""What a trained run believes, as a file for arviz: posterior.nc, and pictures of what can be asked of it."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from common import QueryArguments, Shown, ask, new_folder, save, start
from matplotlib.figure import Figure
from pyro_pixels import metrics
from pyro_pixels.data import ImageSequences
from pyro_pixels.inference_data import to_inference_data
from scipy import stats

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # arviz 0.23 announces 1.0 whenever it is imported
    import arviz as az


@dataclass
class Arguments(QueryArguments):
    n_sequences: int = 30
    """How many sequences at most."""
    n_samples: int = 100
    """Draws of the posterior and of the prior."""
    n_seen: int = 15
    """Frames seen; those that follow are predicted."""


def main(args: Arguments) -> None:
    run, data, device = ask(args)
    out = new_folder(args.out or args.home / "arviz")
    T = data.images.shape[1]
    if not 0 < args.n_seen < T:
        raise ValueError(f"n_seen is {args.n_seen}; wanted at least 1 and fewer than the {T} frames that there are")
    seen = dataclasses.replace(
        data,
        images=data.images[:, : args.n_seen],
        positions=None if data.positions is None else data.positions[:, :, : args.n_seen],
    )
    shown = Shown(run, seen, device)
    truth = true_positions(shown, data)
    print(f"drawing {args.n_samples} times what {len(data)} sequences were and will be")
    inference = to_inference_data(
        run.model, run.guide, shown.images, shown.n_objects, n_samples=args.n_samples, n_frames_ahead=T - args.n_seen,
        positions=None if truth is None else truth[:, :, : args.n_seen], seed=args.seed,
    )  # fmt: skip
    inference.to_netcdf(str(out / "posterior.nc"))
    print(f"  {out / 'posterior.nc'}")
    save(draw_launches(inference), out / "launches.png")
    save(draw_velocities(inference, shown.to_pixels), out / "velocities.png")
    save(draw_futures(inference, shown.to_pixels, truth), out / "futures.png")
    save(draw_white_pixels(inference), out / "white_pixels.png")
    save(draw_weights(inference), out / "pareto_k.png")
    if truth is not None:
        save(draw_calibration(inference, shown.to_pixels, truth), out / "calibration.png")


def true_positions(shown: Shown, data: ImageSequences) -> np.ndarray | None:
    """Of all frames, in pixels and in the order of the model's objects; None if it is not known."""
    if shown.size is None or data.positions is None or shown.data.positions is None:
        return None
    found = shown.to_pixels(shown.inference.mean.cpu())
    return metrics.reorder(data.positions, metrics.assign(shown.data.positions, found, data.n_objects))


def in_pixels(a: xr.DataArray, to_pixels: Callable[[torch.Tensor], torch.Tensor]) -> xr.DataArray:
    """Positions whose last dimension is the axis."""
    return a.copy(data=to_pixels(torch.from_numpy(a.values)).numpy())


def draw_launches(inference: Any) -> Figure:
    """Velocities at the first frame: the learned prior of each component, and where the balls of the data are."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for k, colour in enumerate(("C0", "C1", "C2", "C3")[: inference.constant_data.sizes["component"]]):
        for group, kind in ((inference.prior, "kde"), (inference.posterior, "scatter")):
            h = group.h.isel(time=0).where(group.z == k).stack(ball=("chain", "draw", "sequence", "object"))
            h = h.dropna("ball")
            if h.sizes["ball"] < 10:
                continue
            look = {"color": colour, "alpha": 0.15, "markersize": 2, "label": f"component {k}"}
            az.plot_pair(
                {"vx": h.sel(state="vx").values[None], "vy": h.sel(state="vy").values[None]},
                kind=kind, ax=axes, scatter_kwargs=look,
                kde_kwargs={"contour_kwargs": {"colors": colour}, "contourf_kwargs": {"alpha": 0}},
            )  # fmt: skip
    axes.set(xlabel="vx at frame 1, latent units", ylabel="vy at frame 1, latent units")
    return figure


def draw_velocities(inference: Any, to_pixels: Callable[[torch.Tensor], torch.Tensor]) -> Figure:
    """Velocity of each ball at the first frame, in pixels a frame."""
    h = inference.posterior.h.isel(time=0, sequence=slice(0, 6)).sel(state=["vx", "vy"])
    at_rest = to_pixels(torch.zeros(2, dtype=torch.float64)).numpy()
    velocity = in_pixels(h * inference.constant_data.delta, to_pixels) - at_rest
    balls = velocity.stack(ball=("sequence", "object")).dropna("ball").transpose("chain", "draw", "ball", "state")
    names = [f"sequence {b}, ball {n}" for b, n in balls.ball.values]
    balls = balls.drop_vars(["ball", "sequence", "object"]).assign_coords(ball=names)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained", sharey=True)
    for axis, state in zip(axes, ("vx", "vy")):
        az.plot_forest(balls.sel(state=state, drop=True).to_dataset(name=state), combined=True, ax=axis, hdi_prob=0.9,
                       labeller=az.labels.NoVarLabeller(), textsize=8)  # fmt: skip
        axis.set_title(f"{state} at frame 1, pixels a frame (90 %)", fontsize=9)
    return figure


def draw_futures(
    inference: Any, to_pixels: Callable[[torch.Tensor], torch.Tensor], truth: torch.Tensor | None
) -> Figure:
    """Where the balls of one sequence of each N are believed to be, and were."""
    n_objects = inference.constant_data.n_objects.values
    rows = [int(np.flatnonzero(n_objects == n)[0]) for n in sorted(set(n_objects))]
    figure, axes = plt.subplots(2, len(rows), figsize=(3 * len(rows), 5), layout="constrained", squeeze=False)
    groups = [in_pixels(group.a, to_pixels) for group in (inference.posterior, inference.predictions)]
    for column, b in enumerate(rows):
        for i, name in enumerate(("x", "y")):
            axis = axes[i, column]
            for n in range(n_objects[b]):
                for a in groups:
                    drawn = a.isel(sequence=b, object=n).sel(axis=name)
                    az.plot_hdi(a.time.values, drawn.values, hdi_prob=0.9, color=f"C{n}", smooth=False, ax=axis)
                if truth is not None:
                    axis.plot(range(1, truth.shape[2] + 1), truth[b, n, :, i], ".", color=f"C{n}", markersize=3)
            axis.axvline(inference.posterior.time.values[-1] + 0.5, color="grey", linewidth=0.8)
            axis.set_title(f"sequence {b}: {name}", fontsize=9)
            axis.tick_params(labelsize=8)
    figure.supxlabel("frame", fontsize=9)
    return figure


def draw_white_pixels(inference: Any) -> Figure:
    """How many pixels of a frame are white: in the data, and in images that the model draws."""
    white = az.InferenceData(
        posterior_predictive=inference.posterior_predictive.sum(("row", "column")).astype(int),
        observed_data=inference.observed_data.sum(("row", "column")).astype(int),
    )
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    az.plot_ppc(white, kind="cumulative", num_pp_samples=50, ax=axes, textsize=8, random_seed=0)
    axes.set(xlabel="white pixels in a frame", ylabel="share of the frames")
    return figure


def draw_weights(inference: Any) -> Figure:
    """Pareto k of log p(v, a) - log q(a | v): how far the guide is from the posterior."""
    log_weight = inference.sample_stats.log_weight.stack(__sample__=("chain", "draw"))
    _, k = az.psislw(log_weight)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    az.plot_khat(k, ax=axes, show_hlines=True, textsize=8, color=[f"C{n - 1}" for n in inference.constant_data.n_objects.values])
    axes.set(xlabel="sequence", ylabel="Pareto k")
    return figure


def draw_calibration(
    inference: Any, to_pixels: Callable[[torch.Tensor], torch.Tensor], truth: torch.Tensor
) -> Figure:
    """How often the truth lies below a quantile, for the last frame that was seen and the last that was predicted."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained", sharey=True)
    titles = ("last frame seen", "last frame predicted")
    for axis, group, title in zip(axes, (inference.posterior, inference.predictions), titles):
        a = in_pixels(group.a, to_pixels).isel(time=-1)
        true = truth[:, :, int(a.time) - 1].numpy()
        below = (a < xr.DataArray(true, dims=("sequence", "object", "axis"))).mean(("chain", "draw"))
        az.plot_ecdf(below.values[~np.isnan(true)], cdf=stats.uniform().cdf, difference=True, confidence_bands=True,
                     ax=axis)  # fmt: skip
        axis.set_title(f"{title}, {int(a.time)}", fontsize=9)
        axis.set_xlabel("quantile")
    axes[0].set_ylabel("share of the truth below, minus quantile")
    return figure


if __name__ == "__main__":
    start(main, Arguments, __doc__)
