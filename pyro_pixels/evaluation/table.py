"""The table of a trained model's errors and losses on held-out sequences (Secs 3.3-3.5), with their floors."""

from typing import Any

import scipy
import torch
from torch import Tensor

from pyro_pixels._checks import check_number
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.answers import (
    N_SEEN,
    Inferences,
    Predictions,
    check_n_seen,
    infer_all,
    predict_all,
    seen_by_default,
)
from pyro_pixels.evaluation.film import (
    innovation_mean_square,
    mean_image_nll_per_frame,
    persistence_nll_per_frame,
)
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.masks import seen_or_none

__all__ = ["N_SEEN", "errors_in_pixels", "evaluate", "format_table", "means_by_n", "table_of"]

N_FUTURES = 20  # futures over which forecasts are averaged if there are no true positions

Table = dict[str, dict[str, float | int | None]]


def evaluate(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    n_seen: int | None = None,
    n_futures: int | None = None,
    batch_size: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a model and its guide: errors, losses and floors, for each N and for all sequences.

    Args:
        model: the trained model.
        guide: the trained guide.
        data: held-out sequences. Errors in pixels need ``positions``, floors also need ``dynamics``; frames whose
            positions are NaN do not count, nor do sequences without an observed frame. In frames of NaN, positions are
            those of ``infer(..., model=model)``. Without positions, forecasts are compared with baselines without
            motion, and innovations are measured (`evaluation.film`).
        n_seen: observed frames before generation, and at either end for interpolation; default: 5, or fewer where
            sequences have fewer than 11 frames. They are counted from each sequence's first observed frame.
        n_futures: sampled futures per sequence whose images are averaged, for the measures of forecasts; 0 leaves those
            measures out. Default: 20 without positions, else 0.
        batch_size: sequences per batch.
        progress: show a progress bar on a terminal.

    Returns:
        ``by_n_objects`` and ``all``, each with the measures that docs/reproduction.md explains (None where a measure
        does not apply), the fitted affine map from latent units to pixels, and the learned dynamics in pixels.

    Raises:
        ValueError: if there are no sequences, they are too short or do not fit the model, or ``n_futures`` is negative.
    """
    T = data.images.shape[1]
    n_seen = seen_by_default(T) if n_seen is None else check_n_seen(n_seen, T)
    if n_futures is None:
        n_futures = N_FUTURES if data.positions is None else 0
    n_futures = check_number("n_futures", n_futures)
    if n_futures < 0:
        raise ValueError(f"n_futures is {n_futures}; wanted a number of sampled futures, 0 for none")
    inferred = infer_all(model, guide, data, batch_size=batch_size, progress=progress)
    predicted = predict_all(
        model, guide, data, n_seen=n_seen, n_futures=n_futures, batch_size=batch_size, progress=progress
    )
    return table_of(model, data, inferred, predicted)


def table_of(model: PixelModel, data: ImageSequences, inferred: Inferences, predicted: Predictions) -> dict[str, Any]:
    """Returns the result of `evaluate` from inferences and predictions that have been computed already."""
    n_seen, T = predicted.n_seen, data.images.shape[1]
    values = dict(predicted.losses)
    values["bound_per_frame_nats"] = inferred.terms.bound / data.n_observed
    values["constant_image_nll_per_frame_nats"] = metrics.constant_image_nll(data.later(n_seen))
    result: dict[str, Any] = {"n_seen": n_seen, "n_frames": T}
    if data.positions is None:
        values |= _known_of_a_film(model, data, inferred, n_seen)
    if data.positions is not None and bool((data.n_objects == 1).any()):
        affine = metrics.map_to_pixels(inferred.mean, data)
        result["affine"] = {"matrix": affine.matrix.tolist(), "offset": affine.offset.tolist(), "r2": affine.r2}
        result["dynamics"] = _dynamics_in_pixels(model, affine)
        between = predicted.interpolated
        values |= errors_in_pixels(
            data,
            affine(inferred.mean),
            affine(predicted.generated),
            None if between is None else affine(between),
            n_seen,
        )
        if data.sides is not None:
            values["side_accuracy"] = _side_accuracy(model, inferred.mean, affine(inferred.mean), data)

    return result | means_by_n(values, data.n_objects)


def _known_of_a_film(model: PixelModel, data: ImageSequences, inferred: Inferences, n_seen: int) -> dict[str, Tensor]:
    """Returns the measures (n,) that need no true positions, except those of the model's forecasts."""
    density = model.likelihood.is_density
    return {
        "mean_image_nll_per_frame_nats": mean_image_nll_per_frame(data.images, n_seen, is_density=density),
        "persistence_nll_per_frame_nats": persistence_nll_per_frame(data.images, n_seen, is_density=density),
        "innovation_mean_square": innovation_mean_square(model.dynamics, inferred.drawn, data),
    }


def errors_in_pixels(
    data: ImageSequences, inferred: Tensor, generated: Tensor, interpolated: Tensor | None, n_seen: int
) -> dict[str, Tensor]:
    """Returns the mean error of each object in pixels (n, N) and whether identities switched (n,).

    Objects are matched with the true ones over all frames for inference, and over the observed frames for generation
    and interpolation. Frames without true positions count for neither errors nor floors, nor do sequences without an
    observed frame. If there are unobserved frames with true positions, their error by inference from the other frames
    is returned as well.

    Args:
        data: sequences with ``positions``.
        inferred: positions (n, N, T, 2) in pixels, as all the others.
        generated: positions after ``n_seen`` observed frames.
        interpolated: positions between observed frames at both ends (`ImageSequences.ends`); None if no frame lies
            between.
        n_seen: the number of frames observed for generation, and at either end for interpolation.
    """
    n_objects, ends, seen = data.n_objects, data.ends(n_seen), data.first(n_seen)
    assert data.positions is not None
    time, some = torch.arange(data.positions.shape[2]), data.seen.any(1, keepdim=True)
    truth, unseen = metrics.in_frames(data.positions, some), metrics.in_frames(data.positions, some & ~data.seen)

    def matched(a: Tensor, frames: Tensor) -> Tensor:
        return metrics.reorder(a, metrics.assign(a, metrics.in_frames(truth, frames), n_objects))

    inferred = matched(inferred, torch.ones_like(time, dtype=torch.bool))
    values = {
        "position_error_px": metrics.errors(inferred, truth, n_objects).nanmean(-1),
        "switch_rate": metrics.switch_rates(inferred, truth, n_objects),
    }
    if bool(unseen.isfinite().any()):
        values["unobserved_position_error_px"] = metrics.errors(inferred, unseen, n_objects).nanmean(-1)
    targets = {"": truth} if data.paths is None else {"": truth, "path_": metrics.in_frames(data.paths, some)}
    predictions = {"generation": (matched(generated, seen & data.seen), seen, ~seen)}
    if interpolated is not None:
        between = ~ends & (time < data.lengths[:, None])
        predictions["interpolation"] = (matched(interpolated, ends & data.seen), ends, between)
    for kind, (prediction, observed, predicted) in predictions.items():
        floor = None if data.dynamics is None else metrics.floor_of(data, observed)
        for name, target in targets.items():
            target = metrics.in_frames(target, predicted)
            values[f"{kind}_{name}error_px"] = metrics.errors(prediction, target, n_objects).nanmean(-1)
            if floor is not None:
                values[f"{kind}_{name}floor_px"] = metrics.errors(floor, target, n_objects).nanmean(-1)
    return values


@torch.no_grad()
def _side_accuracy(model: PixelModel, inferred: Tensor, in_pixels: Tensor, data: ImageSequences) -> Tensor:
    """Returns (n, N), 1 where the likeliest component matches the launch side and else 0, NaN for absent objects.

    Components are matched with sides once for all sequences.
    """
    assert data.positions is not None
    assert data.sides is not None
    order, device = metrics.assign(in_pixels, data.positions, data.n_objects), model.dynamics.mu.device
    a, seen = metrics.reorder(inferred, order).nan_to_num(), seen_or_none(data.images)
    z = model.dynamics.component_posterior(a.to(device), None if seen is None else seen.to(device))
    k, present = z.logits.argmax(-1).cpu(), data.sides >= 0
    counts = torch.zeros(z.logits.shape[-1], 2)
    counts.index_put_((k[present], data.sides[present]), torch.ones(()), accumulate=True)
    component, side = scipy.optimize.linear_sum_assignment(-counts.numpy())
    side_of = torch.full((len(counts),), -1)
    side_of[torch.from_numpy(component)] = torch.from_numpy(side)
    return torch.where(present, (side_of[k] == data.sides).double(), torch.nan)


def means_by_n(values: dict[str, Tensor], n_objects: Tensor) -> dict[str, Any]:
    """Averages measures (n, ...), NaN where they do not apply, over the sequences of each N and over all."""
    groups = {str(n): n_objects == n for n in sorted(set(n_objects.tolist()))}
    return {
        "by_n_objects": {name: _means(values, group) for name, group in groups.items()},
        "all": _means(values, torch.ones(len(n_objects), dtype=torch.bool)),
    }


def _means(values: dict[str, Tensor], group: Tensor) -> dict[str, float | int | None]:
    """Averages each measure over a group of sequences, None where it does not apply."""
    means: dict[str, float | int | None] = {"n_sequences": int(group.sum())}
    for name, value in values.items():
        mean = metrics.nan_mean(value[group])
        means[name] = None if mean != mean else mean
    return means


@torch.no_grad()
def _dynamics_in_pixels(model: PixelModel, affine: metrics.Affine) -> dict[str, Any]:
    """Returns the learned dynamics in pixels and frames, the units of the truth.

    The acceleration in pixels per frame squared is delta u_v; images determine only this product.
    """
    lgssm = model.dynamics.lgssm()
    acceleration = affine.matrix @ (lgssm.A[0, 2] * lgssm.u[2:]).cpu()
    return {
        "acceleration_px_per_frame2": acceleration.tolist(),
        "degrees_from_down": float(torch.rad2deg(torch.atan2(acceleration[0], acceleration[1]))),
        "position_noise_sd_px": affine.covariance(lgssm.Sigma_A.cpu()).diagonal().sqrt().tolist(),
        "delta": float(model.dynamics.delta),
        "pi": model.dynamics.pi.tolist(),
    }


COLUMNS: dict[str, tuple[str, str]] = {
    "position_error_px": ("position error", "px"),
    "switch_rate": ("switch rate", ""),
    "generation_error_px": ("generation", "px"),
    "generation_floor_px": ("(floor)", "px"),
    "interpolation_error_px": ("interpolation", "px"),
    "interpolation_floor_px": ("(floor)", "px"),
    "nll_per_frame_nats": ("nll/frame", "nats"),
    "bound_per_frame_nats": ("bound/frame", "nats"),
}
FILM_COLUMNS: dict[str, tuple[str, str]] = {
    "n_sequences": ("sequences", ""),
    "bound_per_frame_nats": ("bound", "nats/frame"),
    "forecast_nll_per_frame_nats": ("forecast", "nats/frame"),
    "mean_image_nll_per_frame_nats": ("mean image", "nats/frame"),
    "persistence_nll_per_frame_nats": ("persistence", "nats/frame"),
    "innovation_mean_square": ("innovations", "(1 if true)"),
}
"""The columns for sequences without true positions."""


def format_table(result: dict[str, Any]) -> str:
    """Formats the result of `evaluate` as a short text table; for films, only of what was measured."""
    film = "innovation_mean_square" in result["all"]
    columns = FILM_COLUMNS if film else COLUMNS
    columns = {key: title for key, title in columns.items() if film is False or result["all"].get(key) is not None}
    rows: Table = {f"N = {n}": row for n, row in result["by_n_objects"].items()} | {"all": result["all"]}
    lines = ["       " + "".join(f"{word:>15}" for word in words) for words in zip(*columns.values())]
    for name, row in rows.items():
        cells = [row.get(key) for key in columns]
        lines.append(f"{name:<7}" + "".join(f"{_cell(cell):>15}" for cell in cells))
    if film:
        lines.append(
            f"forecast: -log p of the frames after the first {result['n_seen']}, against their mean image and the "
            "persistence of the last observed frame, both fitted to these very frames; lower is better"
        )
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
