"""Figures of a trained run: inference, generation and interpolation against the truth. Each returns its paths."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_pixels._arrays import read_arrays
from pyro_pixels._batch import object_mask
from pyro_pixels._checksums import checked_write, read_checked
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.answers import Predictions, forecast, seen_by_default
from pyro_pixels.evaluation.pixel_map import map_to_pixels
from pyro_pixels.plots import paper as plots
from pyro_pixels.queries.masks import seen_or_none
from pyro_pixels.queries.predict import Prediction, States, infer, interpolate, render, smooth
from pyro_pixels.runs import Run
from pyro_pixels.training.checkpoints import read_lines


class RunView:
    """A set of sequences with a run's inference and predictions for them, in pixels.

    Attributes:
        inference: positions inferred from all frames, in latent units, with ``n_samples`` samples.
        n_seen: the number of observed frames before generation and at either end for interpolation; by default 5, or
            fewer in short sequences.
        to_pixels: maps latent positions to pixels. It is fitted to the true positions of single objects if there are
            any, else it is that of `map_to_pixels`, or the identity if the renderer draws nothing yet.
        size: (H, W), or None if positions are plotted in latent units.
        order: (B, N), which inferred object is which true one; None if no true positions are known.
        first: the index, in the file of the sequences, of the first one; titles count from it.
        progress: wraps the items of long loops, for example in a progress bar with the given name.
        shows_progress: whether long queries show a progress bar on a terminal.
    """

    progress: Callable[[Iterable[Any], str], Iterable[Any]] = staticmethod(lambda items, name: items)
    shows_progress: bool = False

    def __init__(
        self, run: Run, data: ImageSequences, device: torch.device, *, n_seen: int | None = None, n_samples: int = 0,
        first: int = 0,
    ) -> None:  # fmt: skip
        T = data.images.shape[1]
        self.n_seen = seen_by_default(T) if n_seen is None else n_seen
        self.run, self.data, self.device, self.first = run, data, device, first
        self.images, self.n_objects = data.images.to(device), data.n_objects.to(device)
        self.inference = infer(run.guide, self.images, self.n_objects, n_samples=n_samples, model=run.model)
        self.to_pixels: Callable[[Tensor], Tensor] = lambda a: a
        self.size: tuple[int, int] | None = None
        self.order: Tensor | None = None
        if data.positions is not None and bool((data.n_objects == 1).any()):
            self.to_pixels = metrics.map_to_pixels(self.inference.mean.cpu(), data)
            self.size = data.size
            self.order = metrics.assign(self.to_pixels(self.inference.mean.cpu()), data.positions, data.n_objects)
            return
        present = self.inference.mean[object_mask(self.n_objects, self.inference.mean.shape[1])]
        with suppress(ValueError):  # an untrained renderer draws nothing: latent units are kept
            self.to_pixels = map_to_pixels(run.model, run.guide, present).affine
            self.size = data.size

    def tracks(self, a: Tensor) -> Tensor:
        """Returns latent positions as plotted: mapped by `to_pixels`, and in the order of the true objects if known."""
        a = self.to_pixels(a.cpu())
        return a if self.order is None else metrics.reorder(a, self.order)

    def in_pixels(self, a: Tensor) -> Tensor | None:
        """Returns latent positions in pixels, in their own order, or None if there is no map to pixels."""
        return None if self.size is None else self.to_pixels(a.cpu())

    def generation(self, n_frames: int | None = None, n_samples: int = 0) -> Prediction:
        """Generates the frames after the first ``n_seen``; raises ValueError if there are too few or none follow."""
        T = self.images.shape[1]
        n_frames = n_frames or T
        if self.n_seen > T or self.n_seen >= n_frames:
            raise ValueError(
                f"cannot generate up to frame {n_frames} from the first {self.n_seen} frames of sequences of {T}; give "
                "a smaller --n-seen, or longer sequences" + ("" if n_frames == T else ", or a larger --n-frames")
            )
        return forecast(self.run.model, self.run.guide, self.data, self.n_seen, n_frames=n_frames, n_samples=n_samples)

    def interpolation(self, n_samples: int = 0) -> Prediction:
        """Interpolates between the first and the last ``n_seen`` frames; raises ValueError if none lie between.

        The last frames of a sequence are those before its padding, if it is shorter than others.
        """
        T = self.images.shape[1]
        if 2 * self.n_seen >= T:
            raise ValueError(
                f"sequences have {T} frames, so {self.n_seen} at either end leave none to fill; give a smaller "
                "--n-seen, or longer sequences"
            )
        ends = self.data.ends(self.n_seen).to(self.device)
        return interpolate(self.run.model, self.run.guide, self.images, self.n_objects, ends, n_samples=n_samples)

    @cached_property
    def lengths(self) -> Tensor:
        """The number of frames of each sequence (B,)."""
        return self.data.lengths

    def padding(self, n_frames: int) -> Tensor:
        """Returns the mask (B, 1, n_frames, 1) of frames beyond the last of each sequence, for positions.

        If there are more frames than the sequences have, the others lie before the first.
        """
        last = n_frames - self.data.images.shape[1] + self.lengths
        return torch.arange(n_frames)[:, None] >= last[:, None, None, None]

    @cached_property
    def reconstruction(self) -> Tensor:
        """The images (B, T, H, W) that the renderer draws at the inferred positions."""
        return render(self.run.model, self.inference.mean, self.n_objects)

    @cached_property
    def states(self) -> States:
        """The states, positions and velocities, given the inferred positions."""
        return smooth(self.run.model.dynamics, self.inference.mean, seen_or_none(self.images))

    def pick(self, per_n: int) -> Tensor:
        """Returns indices of the first ``per_n`` sequences of each N, largest N first."""
        values = sorted(set(self.data.n_objects.tolist()), reverse=True)
        return torch.cat([(self.data.n_objects == n).nonzero().squeeze(1)[:per_n] for n in values])

    def titles(self, rows: Tensor) -> list[str]:
        """Returns a title for each of the sequences ``rows``: its index in the file, counted from 0, and its N."""
        return [
            f"sequence {self.first + b}, N = {n}" for b, n in zip(rows.tolist(), self.data.n_objects[rows].tolist())
        ]

    def truth_and_inferred(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the true positions of the sequences ``rows``, None if unknown, and the inferred ones.

        The inferred ones are NaN where a sequence is only padded.
        """
        truth = None if self.order is None or self.data.positions is None else self.data.positions[rows]
        inferred = self.tracks(self.inference.mean).masked_fill(self.padding(self.data.images.shape[1]), torch.nan)
        return truth, inferred[rows]


def draw_sequences(data: ImageSequences, path: Path) -> Path:
    """Draws six sequences, each overlaid in time, like Fig 1."""
    titles = [f"N = {n}" for n in data.n_objects[:6].tolist()]
    figure = plots.plot_sequences(data.images[:6], columns=3, titles=titles)
    plots.save_figure(figure, path, "Sequences, later frames lighter")
    return path


def draw_inference(view: RunView, out: Path) -> list[Path]:
    """Writes positions.png, like Fig 3."""
    rows, path = view.pick(3), out / "positions.png"
    n_objects = view.data.n_objects[rows]
    truth, mean = view.truth_and_inferred(rows)
    if truth is None:
        absent = torch.arange(mean.shape[1]) >= n_objects[:, None]
        mean = mean.masked_fill(absent[:, :, None, None], torch.nan)
        if view.size is None:
            figure = plots.plot_inference_means({"inferred, latent units": mean})
        else:
            figure = plots.plot_trajectories(
                None, mean, n_objects=n_objects, size=view.size, columns=3, titles=view.titles(rows)
            )
    elif view.size is None:
        figure = plots.plot_positions(truth, mean, n_objects=n_objects)
    else:
        figure = plots.plot_trajectories(
            truth, mean, n_objects=n_objects, size=view.size, columns=3, titles=view.titles(rows)
        )
    plots.save_figure(figure, path, "Inferred positions")
    return [path]


def draw_generation(view: RunView, prediction: Prediction, out: Path) -> list[Path]:
    """Writes generated_images.png like Fig 6, generated_trajectories.png like Fig 8, and generation.gif.

    Each sequence ends with its last frame, or with the last generated one if that is later than in any sequence.
    """
    tau, rows, (film, last) = view.n_seen, view.pick(2), (view.images.shape[1], prediction.mean.shape[2])
    beyond, truth = _beyond(view, last)[rows], _with_frames(view.data.images[rows], last, -3)
    drawn = prediction.images.cpu()[rows].masked_fill(beyond[:, :, None, None], torch.nan)
    images, trajectories = out / "generated_images.png", out / "generated_trajectories.png"
    figure = plots.plot_generated_images(drawn[:, tau:], truth[:, tau:], rows=2)
    what = f"generated, and true up to frame {film}" if last > film else "generated and true"
    plots.save_figure(figure, images, f"Frames {tau + 1} to {last}, {what}, later ones lighter")
    generated = view.tracks(prediction.mean)[rows].masked_fill(beyond[:, None, :, None], torch.nan)
    generated[:, :, : tau - 1] = torch.nan
    true, inferred = (None if a is None else _with_frames(a, last, -2) for a in view.truth_and_inferred(rows))
    figure = plots.plot_trajectories(
        true, inferred, generated,
        n_objects=view.data.n_objects[rows], size=view.size, columns=3, titles=view.titles(rows),
    )  # fmt: skip
    until = f", up to frame {last}" if last > film else ""
    plots.save_figure(figure, trajectories, f"Generated from the first {tau} frames on{until}")
    return [images, trajectories, draw_forecast(view, prediction, out / "generation.gif")]


def draw_forecast(view: RunView, prediction: Prediction, path: Path) -> Path:
    """Writes a GIF of the truth, the reconstruction, and the frames generated after the first ones."""
    rows, last = view.pick(1), prediction.images.shape[1]
    padded, beyond = (_beyond(view, n)[rows, :, None, None] for n in (view.images.shape[1], last))
    reconstruction = view.reconstruction[rows.to(view.device)].cpu().masked_fill(padded, torch.nan)
    panels = {
        "truth": _with_frames(view.data.images[rows], last, -3),
        "reconstruction": _with_frames(reconstruction, last, -3),
        "generation": prediction.images.cpu()[rows].masked_fill(beyond, torch.nan),
    }
    plots.gif(path, panels, scale=4, mark={"generation": view.n_seen})
    return path


def _beyond(view: RunView, n_frames: int) -> Tensor:
    """Returns the mask (B, n_frames) of frames after the end of each sequence; none if all sequences are shorter."""
    ends = view.lengths if n_frames <= view.images.shape[1] else torch.full_like(view.lengths, n_frames)
    return torch.arange(n_frames) >= ends[:, None]


def _with_frames(x: Tensor, n_frames: int, axis: int) -> Tensor:
    """Returns ``x`` with so many frames along ``axis``: later ones are cut off, or NaN is appended."""
    x = x if x.is_floating_point() else x.float()
    return F.pad(x, [0, 0] * (-axis - 1) + [0, n_frames - x.shape[axis]], value=torch.nan)


def draw_interpolation(view: RunView, generated: Prediction, interpolated: Prediction, out: Path) -> list[Path]:
    """Writes interpolation.png, like Fig 9, up to the last frame of each sequence."""
    rows, path = view.pick(2), out / "interpolation.png"
    padding, found = view.padding(view.images.shape[1]), (generated, interpolated)
    left, right = (p.images.cpu().masked_fill(padding[:, 0, :, :, None], 0.0)[rows] for p in found)
    images = {"generated": left, "truth": view.data.images[rows], "interpolated": right}
    red, cyan = (view.tracks(p.mean).masked_fill(padding, torch.nan) for p in found)
    red[:, :, : view.n_seen - 1] = torch.nan
    figure = plots.plot_trajectories(
        *view.truth_and_inferred(rows), red[rows], cyan[rows],
        n_objects=view.data.n_objects[rows], size=view.size, images=images, columns=3, titles=view.titles(rows),
    )  # fmt: skip
    plots.save_figure(figure, path, f"Generated from the first {view.n_seen} frames, interpolated from both ends")
    return [path]


def draw_error_over_time(data: ImageSequences, inferred: Tensor, predicted: Predictions, out: Path) -> list[Path]:
    """Writes error_over_time.png, the mean error and its floor in each frame, if the true dynamics are known.

    Args:
        inferred: latent positions (n, N, T, 2) that the map to pixels is fitted on.
        predicted: the generated and interpolated positions.
    """
    path = out / "error_over_time.png"
    if data.dynamics is None or data.positions is None or not bool((data.n_objects == 1).any()):
        return []
    truth, n_objects, ends = data.positions, data.n_objects, data.ends(predicted.n_seen)
    to_pixels = metrics.map_to_pixels(inferred, data)
    found = {"generated": (predicted.generated, data.first(predicted.n_seen))}
    if predicted.interpolated is not None:
        found["interpolated"] = (predicted.interpolated, ends)
    errors, floors = {}, {}
    for name, (positions, seen) in found.items():
        a = to_pixels(positions)
        a = metrics.reorder(a, metrics.assign(a, metrics.in_frames(truth, seen & data.seen), n_objects))
        errors[name] = metrics.errors(a, truth, n_objects).nanmean((0, 1))
        floor = metrics.floor_of(data, seen)
        floors[name] = metrics.errors(floor, metrics.in_frames(truth, ~seen), n_objects).nanmean((0, 1))
    shown = None if "interpolated" not in found else ends if ends.dim() == 1 else ends.all(0)
    figure = plots.plot_error_over_time(errors, floors=floors, seen=predicted.n_seen, seen_by_interpolation=shown)
    plots.save_figure(figure, path, f"Mean error over {len(truth)} sequences")
    return [path]


class Snapshots:
    """Inferred means of up to 20 sequences at every evaluation of a training, kept in a file; plotted like Fig 5(a)."""

    def __init__(self, path: Path, data: ImageSequences, *, resume: bool) -> None:
        """With ``resume``, keeps the means that are already in the file."""
        two = data.n_objects == min(2, int(data.n_objects.max()))
        self.path, self.shown = path, data[two if bool(two.any()) else slice(None)][:20]
        self.means: dict[str, np.ndarray] = {}
        if resume and path.exists():
            self.means = dict(_read_means(path))

    def take(self, run: Run, metrics: dict[str, float]) -> None:
        """Adds the means of a run in training; ``metrics`` is the line of the evaluation."""
        device = next(run.model.parameters()).device
        inferred = infer(run.guide, self.shown.images.to(device), self.shown.n_objects.to(device))
        self.means[str(int(metrics["step"]))] = inferred.mean.cpu().numpy()
        with checked_write(self.path) as file:
            np.savez(file, **self.means)  # type: ignore[arg-type]


def _read_means(path: Path) -> dict[str, np.ndarray]:
    """Returns the means of `Snapshots` by step; raises ValueError if the file is damaged."""
    try:
        means = read_arrays(path, read_checked(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); remove it to continue without it") from None
    if not all(name.isdecimal() and x.ndim == 4 and x.dtype.kind == "f" for name, x in means.items()):
        raise ValueError(f"{path} holds no inferred means; remove it to continue without it")
    return means


def draw_stages(snapshots: Path, path: Path) -> list[Path]:
    """Draws the first, middle and last of a training's `Snapshots` like Fig 5(a); nothing if there are none."""
    if not snapshots.exists():
        return []
    means = {int(step): x for step, x in _read_means(snapshots).items()}
    if not means:
        return []
    steps = sorted(means)
    stages = {f"step {s:,}": means[s] for s in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))}
    plots.save_figure(plots.plot_inference_means(stages), path, "Inferred means while training")
    return [path]


def draw_training(folder: Path) -> list[Path]:
    """Writes training.png and inference_means.png from the metrics and the snapshots in a run's folder."""
    path = folder / "training.png"
    plots.save_figure(plots.plot_training(read_lines(folder)), path, "The bound while training")
    return [path, *draw_stages(folder / "snapshots.npz", folder / "inference_means.png")]
