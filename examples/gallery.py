"""Draws a picture for each question that a trained model can answer (docs/gallery.md).

Uses the weights that come with the package unless --run or --no-pretrained is given. Pictures go to the folder
`gallery` in the run's folder, or in runs/pretrained.
"""

from _common import QueryArguments, new_folder, open_sequences, progress, say_where, start

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_pixels._options import Draws, Seed, Sequences
from pyro_pixels.evaluation.metrics import Affine, assign, reorder
from pyro_pixels.lgssm.kalman import Gaussians
from pyro_pixels.plots import answers as plots
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.queries.predict import Prediction, smooth
from pyro_pixels.question_figures import QUESTIONS, Scene
from pyro_pixels.run_figures import draw_forecast

Picture = Literal[
    "positions", "velocities", "filter", "starts", "fan", "forecast", "missing", "hidden", "stream", "what-if",
    "retrodict", "count", "evidence", "calibration",
]  # fmt: skip
MANY = {"starts", "count", "evidence", "calibration"}  # use all sequences; the others draw one of each N out of 12
CLOSER = {"positions", "velocities", "fan", "missing", "hidden", "stream"}  # zoomed in: balls cross half of the image


@dataclass
class Arguments(QueryArguments):
    pretrained: bool = True
    """Use the weights that come with the package; with --no-pretrained, or a --run other than the default,
    use the run."""
    docs: bool = False
    """Redraw the pictures of the documentation, in docs/figures/gallery."""
    n_sequences: Sequences = 60
    """Number of sequences to query; of a file, the first ones."""
    seed: Seed = 26
    """Seed of simulated sequences and of samples."""
    pictures: tuple[Picture, ...] = get_args(Picture)
    """The pictures to make."""
    n_samples: Draws = 20
    """Number of samples of q(a | v) to average over."""


def closer(figure: Figure, scene: Scene, name: str, margin: float = 3.0) -> Figure:
    """Returns the figure; if ``name`` is in `CLOSER` and it is in pixels, each sequence is zoomed to fill its axes."""
    if name not in CLOSER or scene.size is None or scene.data.positions is None:
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
    """Returns the order (B, N) that matches objects to those inferred from all frames; their numbers may differ."""
    unseen = ~found.observed.cpu().expand(found.mean.shape[:3])[..., None]  # zero in both, these frames cost nothing
    few, all_ = (x.cpu().masked_fill(unseen, 0.0) for x in (found.mean, scene.inference.mean))
    return assign(few, all_, scene.data.n_objects).to(scene.device)


def what_is_lacking(scene: Scene, name: str) -> str:
    """Returns what the sequences have too little of to draw this picture, or nothing."""
    T = scene.images.shape[1]
    if name == "calibration" and scene.data.positions is None:
        return "no true positions"
    if name in {"missing", "stream", "calibration"} and T < 3:
        return f"only {T} frames; wanted at least 3"
    return ""


def draw_positions(scene: Scene) -> Figure:
    rows, found = scene.rows.to(scene.device), scene.inference
    assert found.cov is not None
    regions = Gaussians(found.mean[rows], found.cov[rows])
    return scene.picture(regions, torch.zeros(regions.mean.shape[:-1], dtype=torch.bool))


def draw_velocities(scene: Scene) -> Figure:
    rows, h = scene.rows, smooth(scene.dynamics, scene.inference.mean)
    true = scene.true_moves()
    tracks = scene.tracks(h.mean[..., :2])
    return plots.plot_moves(
        tracks.masked_fill(scene.padding(tracks.shape[2]), torch.nan)[rows], scene.moves(h).mean[rows],
        truth=None if true is None or scene.data.paths is None else (scene.data.paths[rows], true[rows]),
        n_objects=scene.data.n_objects[rows], size=scene.size,
    )  # fmt: skip


def draw_starts(scene: Scene) -> Figure:
    """Draws starts; velocities are expected moves to the next frame, since images determine no others."""
    lgssm, h = scene.dynamics.lgssm(), smooth(scene.dynamics, scene.inference.mean)
    to_pixels = scene.to_pixels if isinstance(scene.to_pixels, Affine) else Affine(torch.eye(2), torch.zeros(2), 1.0)
    B = to_pixels.matrix.to(lgssm.B) @ lgssm.B
    matrix = torch.cat([B, B @ lgssm.A - B])
    offset = torch.cat([to_pixels.offset.to(B), B @ lgssm.u])
    there = torch.arange(h.mean.shape[1]) < scene.data.n_objects[:, None]
    sides = scene.data.sides
    if sides is not None and scene.order is not None:  # from the true order of objects to the guide's
        sides = torch.zeros_like(sides).scatter(1, scene.order, sides)
    return plots.plot_starts(
        lgssm.mu @ matrix.mT + offset, matrix @ lgssm.Sigma @ matrix.mT,
        h.mean[:, :, 0][there] @ matrix.mT + offset, h.p_z.argmax(-1)[there],
        sides=None if sides is None else sides[there], size=scene.size,
    )  # fmt: skip


def draw_fan(scene: Scene) -> Figure:
    rows, future = scene.rows, scene.generation(n_samples=scene.n_samples)
    assert future.samples is not None
    order, positions = names(scene, future), scene.data.positions
    return plots.plot_fan(
        torch.stack([scene.tracks(reorder(a, order))[rows] for a in future.samples]), n_seen=scene.n_seen,
        images=None if scene.size is None else scene.data.images[rows],
        truth=None if scene.size is None or positions is None else positions[rows],
        n_objects=scene.data.n_objects[rows],
    )  # fmt: skip


def draw_missing(scene: Scene) -> Figure:
    found = scene.interpolation()
    order, rows = names(scene, found), scene.rows.to(scene.device)
    known = found.observed.expand(found.mean.shape[:3])[rows]
    return scene.picture(Gaussians(*(reorder(x, order)[rows] for x in (found.mean, found.cov))), known)


OWN: dict[str, Callable[[Scene], Figure]] = {
    "positions": draw_positions,
    "velocities": draw_velocities,
    "starts": draw_starts,
    "fan": draw_fan,
    "missing": draw_missing,
}
assert OWN.keys() | QUESTIONS.keys() | {"forecast"} == set(get_args(Picture))


@torch.no_grad()
def main(args: Arguments) -> None:
    args.pretrained = args.pretrained and args.run == QueryArguments.run
    if args.docs and args.out is not None:
        raise ValueError(f"--docs and --out {args.out} contradict each other; leave one of them out")
    out = new_folder(Path("docs/figures/gallery") if args.docs else args.out or args.home / "gallery")
    scenes: dict[int, Scene] = {}
    paths, texts = [], []
    for name in progress(args.pictures, "pictures"):
        n = args.n_sequences if name in MANY else min(12, args.n_sequences)
        if n not in scenes:
            opened, asked = open_sequences(replace(args, n_sequences=n))
            scenes[n] = Scene(*opened, per_n=1, n_samples=args.n_samples, first=asked.first)
            scenes[n].progress, scenes[n].shows_progress = progress, True
        lacking = what_is_lacking(scenes[n], name)
        if lacking:
            texts.append(f"{name}: not drawn, as the sequences have {lacking}")
            continue
        torch.manual_seed(args.seed)  # so that a picture does not depend on the others
        path = out / f"{name}.png"
        if name == "forecast":
            path = draw_forecast(scenes[n], scenes[n].generation(), out / "forecast.gif")
        elif name in OWN:
            save_figure(closer(OWN[name](scenes[n]), scenes[n], name), path)
        else:
            answer = QUESTIONS[name](scenes[n])
            save_figure(closer(answer.figure, scenes[n], name), path)
            if answer.text:
                texts.append(f"{name}: {answer.text}")
        paths.append(path)
    if not paths:
        raise ValueError(f"{'; '.join(texts)}; choose other --pictures, or other sequences")
    print("\n".join(texts), end="\n" if texts else "")
    say_where(paths)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
