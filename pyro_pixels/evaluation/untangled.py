"""How good a trained model is with names put right by p(a) (`guides.untangling`), or refined (`guides.refining`)."""

from typing import Any

import torch

from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.table import N_SEEN, evaluate, means_by_n
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.refining import N_STEPS, RefinedGuide
from pyro_pixels.guides.untangling import UntangledGuide, can_be_untangled, untangle
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import infer

MEASURES = (
    "position_error_px",
    "switch_rate",
    "generation_error_px",
    "interpolation_error_px",
    "bound_per_frame_nats",
)


def evaluate_untangled(
    model: PixelModel, guide: Guide, data: ImageSequences, *, n_seen: int = N_SEEN, batch_size: int = 100
) -> dict[str, Any]:
    """The measures of `evaluate` that names change, as ``untangled_...``, for each N and for all sequences.

    All of them with an `UntangledGuide` in the place of ``guide`` where there can be one; otherwise the first two, of
    untangled means.

    Args:
        data: fresh sequences; those without ``positions`` have no errors in pixels.
        n_seen: frames seen before generation, and at either end for interpolation.

    Raises:
        ValueError: as `evaluate`.
    """
    device = next(model.parameters()).device
    some = data[:1]
    if can_be_untangled(guide.q(some.images.to(device), some.n_objects.to(device))):
        other = UntangledGuide(guide, model.dynamics)
        found = evaluate(model, other, data, n_seen=n_seen, batch_size=batch_size)
    else:
        found = means_by_n(_positions_alone(model, guide, data, batch_size), data.n_objects)
    return _measures(found, "untangled")


def evaluate_refined(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    n_seen: int = N_SEEN,
    n_steps: int = N_STEPS,
    batch_size: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    """The measures of `evaluate_untangled`, as ``refined_...``, with a `RefinedGuide` in the place of ``guide``.

    Takes a few tenths of a second a sequence.

    Args:
        data: fresh sequences; those without ``positions`` have no errors in pixels.
        n_seen: frames seen before generation, and at either end for interpolation.
        n_steps: of `guides.refine`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: as `evaluate`, or if the guide's frames cannot be exchanged.
    """
    refined = RefinedGuide(guide, model, n_steps=n_steps)
    found = evaluate(model, refined, data, n_seen=n_seen, batch_size=batch_size, progress=progress)
    return _measures(found, "refined")


def merged(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The result of `evaluate` with the measures of `evaluate_untangled` or `evaluate_refined` in its groups."""
    rows = {n: {**row, **other["by_n_objects"][n]} for n, row in result["by_n_objects"].items()}
    return {**result, "by_n_objects": rows, "all": {**result["all"], **other["all"]}}


def _measures(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The groups of a result with those measures alone that names change, called PREFIX_MEASURE."""

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {f"{prefix}_{name}": row[name] for name in MEASURES if name in row}

    return {"by_n_objects": {n: named(row) for n, row in found["by_n_objects"].items()}, "all": named(found["all"])}


def _positions_alone(model: PixelModel, guide: Guide, data: ImageSequences, batch_size: int) -> dict[str, torch.Tensor]:
    """Errors (n, N) and switches (n,) of untangled means, as far as positions are known."""
    if data.positions is None or not bool((data.n_objects == 1).any()):
        return {}
    device, N = next(model.parameters()).device, int(data.n_objects.max())
    found = []
    for start in range(0, len(data), batch_size):
        part = data[start : start + batch_size]
        n_objects = part.n_objects.to(device)
        a = untangle(model.dynamics, infer(guide, part.images.to(device), n_objects).mean, n_objects).a
        found.append(torch.nn.functional.pad(a, (0, 0, 0, 0, 0, N - a.shape[1])).cpu())
    a = torch.cat(found)
    in_pixels = metrics.fit_affine(a, data.positions, data.n_objects)(a)
    matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
    switched = metrics.switches(matched, data.positions, data.n_objects).double()
    return {
        "position_error_px": metrics.errors(matched, data.positions, data.n_objects).mean(-1),
        "switch_rate": torch.where(data.n_objects > 1, switched, torch.nan),
    }
