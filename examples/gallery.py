"""One picture for each question that a trained model answers, in docs/figures/gallery (docs/gallery.md).

positions, velocities, starts, fan, missing and forecast are made here; all others are those of ask.py. The weights that
come with the package are asked unless --no-pretrained is given.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import ask
from ask import Scene
from common import draw_forecast, new_folder, save, start
from pyro_pixels.evaluation.calibration import coverage, mahalanobis_distances
from pyro_pixels.evaluation.metrics import Affine, assign, reorder
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.plots import answers as query_plots
from pyro_pixels.queries.predict import Prediction, smooth

Picture = Literal[
    "positions", "velocities", "filter", "starts", "fan", "forecast", "missing", "hidden", "stream", "what-if",
    "retrodict", "count", "evidence", "calibration",
]  # fmt: skip
MANY = {"starts", "count", "evidence", "calibration"}  # of all sequences; of 12 the others draw one of each N
CLOSER = {"positions", "velocities", "fan", "missing", "hidden", "stream"}  # balls cross half of the image


@dataclass
class Arguments(ask.Arguments):
    pretrained: bool = True
    """Ask the weights that come with the package; with --no-pretrained the run in --run."""
    out: Path = Path("docs/figures/gallery")
    """Folder for the pictures."""
    seed: int = 26
    """Of simulated sequences and of samples."""
    pictures: tuple[Picture, ...] = get_args(Picture)
    """Which pictures."""


def closer(figure: Figure, scene: Scene, margin: float = 3.0) -> Figure:
    """Each sequence fills its axes, in pixels."""
    if scene.size is None or scene.data.positions is None:
        return figure
    for ax, tracks in zip(figure.axes, scene.data.positions[scene.rows]):
        places = tracks[~tracks.isnan().any(-1)]
        low, high = places.min(0).values, places.max(0).values
        middle, reach = (low + high) / 2, float((high - low).max()) / 2 + margin
        (left, top), (right, bottom) = (middle - reach).tolist(), (middle + reach).tolist()
        ax.set(xlim=(left, right), ylim=(bottom, top))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def names(scene: Scene, found: Prediction) -> Tensor:
    """The order (B, N) that makes object n that of all frames: having seen fewer the guide may name them otherwise."""
    seen = found.observed
    means = (x[:, :, seen].cpu() for x in (found.mean, scene.inference.mean))
    return assign(*means, scene.data.n_objects).to(scene.device)


def positions(scene: Scene) -> Figure:
    found = scene.inference
    regions = Gaussians(found.mean, torch.diag_embed(found.std.square()))
    return scene.picture(regions, torch.zeros(found.mean.shape[:-1], dtype=torch.bool))


def velocities(scene: Scene) -> Figure:
    rows, h = scene.rows, smooth(scene.dynamics, scene.inference.mean)
    true = scene.true_moves()
    return query_plots.plot_moves(
        scene.tracks(h.mean[..., :2])[rows], scene.moves(h).mean[rows],
        truth=None if true is None else (scene.data.paths[rows], true[rows]),
        n_objects=scene.data.n_objects[rows], size=scene.size,
    )  # fmt: skip


def starts(scene: Scene) -> Figure:
    """Velocities are expected moves to the next frame, as images show no others."""
    lgssm, h = scene.dynamics.lgssm(), smooth(scene.dynamics, scene.inference.mean)
    to_pixels = scene.to_pixels if isinstance(scene.to_pixels, Affine) else Affine(torch.eye(2), torch.zeros(2), 1.0)
    B = to_pixels.matrix.to(lgssm.B) @ lgssm.B
    matrix = torch.cat([B, B @ lgssm.A - B])
    offset = torch.cat([to_pixels.offset.to(B), B @ lgssm.u])
    there = torch.arange(h.mean.shape[1]) < scene.data.n_objects[:, None]
    sides = scene.data.sides
    if sides is not None and scene.order is not None:  # of true objects; here the order is the guide's
        sides = torch.zeros_like(sides).scatter(1, scene.order, sides)
    return query_plots.plot_starts(
        lgssm.mu @ matrix.mT + offset, matrix @ lgssm.Sigma @ matrix.mT,
        h.mean[:, :, 0][there] @ matrix.mT + offset, h.p_z.argmax(-1)[there],
        sides=None if sides is None else sides[there], size=scene.size,
    )  # fmt: skip


def fan(scene: Scene) -> Figure:
    rows, future = scene.rows, scene.generation(n_samples=scene.args.n_samples)
    assert future.samples is not None
    known, order = scene.size is not None, names(scene, future)
    return query_plots.plot_fan(
        torch.stack([scene.tracks(reorder(a, order))[rows] for a in future.samples]), n_seen=scene.n_seen,
        images=scene.data.images[rows] if known else None,
        truth=scene.data.positions[rows] if known else None, n_objects=scene.data.n_objects[rows],
    )  # fmt: skip


def missing(scene: Scene) -> Figure:
    found = scene.interpolation()
    order = names(scene, found)
    return scene.picture(Gaussians(*(reorder(x, order) for x in (found.mean, found.cov))), found.observed)


def calibration(scene: Scene) -> Figure:
    """Without the correction that ask.py fits, which takes minutes."""
    levels = torch.linspace(0.05, 0.99, 48).tolist()
    found = mahalanobis_distances(scene.model, scene.guide, scene.data)
    for kind, x in found.items():
        print(f"{kind}: the 50 % regions hold {100 * float(coverage(x, (0.5,)).shares):.0f} %")
    return query_plots.plot_reliability({kind: tuple(coverage(x, levels)[:2]) for kind, x in found.items()})


PICTURES: dict[str, Callable[[Scene], Figure]] = {
    **ask.ASK, "positions": positions, "velocities": velocities, "starts": starts, "fan": fan, "missing": missing,
    "calibration": calibration,
}  # fmt: skip
assert set(PICTURES) | {"forecast"} == set(get_args(Picture))


@torch.no_grad()
def main(args: Arguments) -> None:
    out, scenes = new_folder(args.out), {}
    for name in args.pictures:
        began, n = time.perf_counter(), args.n_sequences if name in MANY else min(12, args.n_sequences)
        if n not in scenes:
            scenes[n] = Scene(replace(args, n_sequences=n), per_n=1)
        torch.manual_seed(args.seed)  # a picture is the same whichever others are made
        if name == "forecast":
            draw_forecast(scenes[n], scenes[n].generation(), out / "forecast.gif")
        else:
            figure = PICTURES[name](scenes[n])
            save(closer(figure, scenes[n]) if name in CLOSER else figure, out / f"{name}.png")
        print(f"  in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    start(main, Arguments, __doc__)
