"""The table of a trained model's errors and losses on held-out sequences (Secs 3.3-3.5), beside their floors."""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._checks import check_number
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import generate, infer, interpolate
from pyro_pixels.training.elbo import bound

N_SEEN = 5  # observed frames at the start, and for interpolation also at the end (Secs 3.4, 3.5)

Table = dict[str, dict[str, float | int | None]]


def evaluate(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    n_seen: int = N_SEEN,
    n_futures: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a model and its guide: errors, losses and floors, for each N and for all sequences.

    Args:
        model: the trained model.
        guide: the trained guide.
        data: held-out sequences. Errors in pixels need ``positions``, floors also need ``dynamics``.
        n_seen: observed frames before generation, and at either end for interpolation.
        n_futures: sampled futures per sequence whose images are averaged for ``averaged_nll_per_frame_nats``; with 0
            it is left out.
        batch_size: sequences per batch.
        progress: show a progress bar on a terminal.

    Returns:
        ``by_n_objects`` and ``all``, each with the measures that docs/reproduction.md explains (None where a measure
        does not apply), the fitted affine map from latent units to pixels, and the learned dynamics in pixels.

    Raises:
        ValueError: if the sequences are too short or do not fit the model, or ``n_futures`` is negative.
    """
    n_seen, n_futures = check_number("n_seen", n_seen), check_number("n_futures", n_futures)
    if n_futures < 0:
        raise ValueError(f"n_futures is {n_futures}; wanted a number of sampled futures, 0 for none")
    T = data.images.shape[1]
    if n_seen < 1 or 2 * n_seen >= T:
        raise ValueError(
            f"sequences have {T} frames; to see {n_seen} (at least 1) at either end they need more than {2 * n_seen}"
        )
    time = torch.arange(T)
    ends = (time < n_seen) | (time >= T - n_seen)
    found = _query(model, guide, data, ends, n_seen, n_futures, batch_size, progress)
    inferred, generated, interpolated, values = found

    result: dict[str, Any] = {"n_seen": n_seen, "n_frames": T}
    if data.positions is not None and bool((data.n_objects == 1).any()):
        affine = metrics.fit_affine(inferred, data.positions, data.n_objects)
        result["affine"] = {"matrix": affine.matrix.tolist(), "offset": affine.offset.tolist(), "r2": affine.r2}
        result["dynamics"] = _dynamics_in_pixels(model, affine)
        values |= errors_in_pixels(data, affine(inferred), affine(generated), affine(interpolated), ends, n_seen)
        if data.sides is not None:
            values["side_accuracy"] = _side_accuracy(model, inferred, affine(inferred), data)

    return result | means_by_n(values, data.n_objects)


@torch.no_grad()
def _query(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    ends: Tensor,
    n_seen: int,
    n_futures: int,
    batch_size: int,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Returns latent positions (n, N, T, 2) by inference, generation and interpolation, and losses (n,)."""
    device = next(model.parameters()).device
    T, N = data.images.shape[1], int(data.n_objects.max())
    positions: list[list[Tensor]] = [[], [], []]
    losses: dict[str, list[Tensor]] = {}
    batches = range(0, len(data), batch_size)
    for start in tqdm(batches, desc="errors and losses", disable=None if progress else True, leave=False):
        part = data[start : start + batch_size]
        images, n_objects = part.images.to(device), part.n_objects.to(device)
        future = generate(model, guide, images[:, :n_seen], n_objects, n_frames=T, n_samples=n_futures)
        between = interpolate(model, guide, images, n_objects, ends.to(device))
        for found, a in zip(positions, (infer(guide, images, n_objects).mean, future.mean, between.mean)):
            padding = a.new_full((a.shape[0], N - a.shape[1], T, 2), torch.nan)
            found.append(torch.cat([a, padding], 1).cpu())
        unseen, drawn = part.images[:, n_seen:].float(), future.images[:, n_seen:].cpu()
        found_losses = {
            "nll_per_frame_nats": metrics.nll_per_frame(unseen, drawn),
            "paper_style_loss": metrics.paper_style_loss(unseen, drawn),
        }
        if future.sample_images is not None:
            averaged = future.sample_images[:, :, n_seen:].mean(0).cpu()
            found_losses["averaged_nll_per_frame_nats"] = metrics.nll_per_frame(unseen, averaged)
        for name, value in found_losses.items():
            losses.setdefault(name, []).append(value.double())
    inferred, generated, interpolated = (torch.cat(p) for p in positions)
    values = {name: torch.cat(parts) for name, parts in losses.items()}
    values["bound_per_frame_nats"] = bound(model, guide, data, batch_size=batch_size).bound / data.seen.sum(1)
    values["constant_image_nll_per_frame_nats"] = metrics.constant_image_nll(data.images[:, n_seen:])
    return inferred, generated, interpolated, values


def errors_in_pixels(
    data: ImageSequences, inferred: Tensor, generated: Tensor, interpolated: Tensor, ends: Tensor, n_seen: int
) -> dict[str, Tensor]:
    """Returns the mean error of each object in pixels (n, N) and whether identities switched (n,).

    Objects are matched with the true ones over all frames for inference, and over the observed frames for generation
    and interpolation.

    Args:
        data: sequences with ``positions``.
        inferred: positions (n, N, T, 2) in pixels, as all the others.
        generated: positions after ``n_seen`` observed frames.
        interpolated: positions between observed frames at both ends.
        ends: (T,) bool, the frames observed for interpolation.
        n_seen: the number of frames observed for generation.
    """
    truth, n_objects = data.positions, data.n_objects
    assert truth is not None
    seen = torch.arange(len(ends)) < n_seen

    def matched(a: Tensor, frames: Tensor) -> Tensor:
        return metrics.reorder(a, metrics.assign(a[:, :, frames], truth[:, :, frames], n_objects))

    inferred, generated, interpolated = (
        matched(inferred, torch.ones_like(ends)),
        matched(generated, seen),
        matched(interpolated, ends),
    )
    values = {
        "position_error_px": metrics.errors(inferred, truth, n_objects).nanmean(-1),
        "switch_rate": torch.where(n_objects > 1, metrics.switches(inferred, truth, n_objects).double(), torch.nan),
    }
    targets = {"": truth} if data.paths is None else {"": truth, "path_": data.paths}
    predictions = {"generation": (generated, seen), "interpolation": (interpolated, ends)}
    for kind, (prediction, observed) in predictions.items():
        floor = None if data.dynamics is None else metrics.floor_predictions(data.dynamics, truth, observed)
        for name, target in targets.items():
            error = metrics.errors(prediction, target, n_objects)
            values[f"{kind}_{name}error_px"] = error[..., ~observed].mean(-1)
            if floor is not None:
                error = metrics.errors(floor, target, n_objects)
                values[f"{kind}_{name}floor_px"] = error[..., ~observed].mean(-1)
    return values


@torch.no_grad()
def _side_accuracy(model: PixelModel, inferred: Tensor, in_pixels: Tensor, data: ImageSequences) -> Tensor:
    """Returns (n, N), 1 where the likeliest component gives the launch side and else 0, NaN for absent objects.

    Components are matched with sides once for all sequences.
    """
    assert data.positions is not None
    assert data.sides is not None
    order = metrics.assign(in_pixels, data.positions, data.n_objects)
    a = metrics.reorder(inferred, order).nan_to_num()
    z = model.dynamics.component_posterior(a.to(model.dynamics.mu.device))
    k, present = z.logits.argmax(-1).cpu(), data.sides >= 0
    counts = torch.zeros(z.logits.shape[-1], 2)
    counts.index_put_((k[present], data.sides[present]), torch.ones(()), accumulate=True)
    component, side = linear_sum_assignment(-counts.numpy())
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


def format_table(result: dict[str, Any]) -> str:
    """Formats the result of `evaluate` as a short text table."""
    columns = {
        "position error": "position_error_px",
        "switch rate": "switch_rate",
        "generation": "generation_error_px",
        "(floor)": "generation_floor_px",
        "interpolation": "interpolation_error_px",
        "(floor) ": "interpolation_floor_px",
        "nll/frame": "nll_per_frame_nats",
        "bound/frame": "bound_per_frame_nats",
    }
    rows: Table = {f"N = {n}": row for n, row in result["by_n_objects"].items()} | {"all": result["all"]}
    lines = ["       " + "".join(f"{title.strip():>15}" for title in columns)]
    lines.append("       " + "".join(f"{unit:>15}" for unit in ("px", "", "px", "px", "px", "px", "nats", "nats")))
    for name, row in rows.items():
        cells = [row.get(key) for key in columns.values()]
        lines.append(f"{name:<7}" + "".join(f"{'-' if cell is None else format(cell, '.2f'):>15}" for cell in cells))
    return "\n".join(lines)
