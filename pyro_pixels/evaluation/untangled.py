"""Evaluation with identities corrected by p(a) (`guides.untangling`), or with refined tracks (`guides.refining`)."""

from typing import Any

import torch

from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.table import N_SEEN, evaluate, means_by_n
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.refining import N_STEPS, RefinedGuide
from pyro_pixels.guides.untangled import UntangledGuide, can_be_untangled
from pyro_pixels.guides.untangling import untangle
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
    """Returns the `MEASURES`, which depend on identities, as ``untangled_...``, for each N and for all sequences.

    If ``guide`` can be untangled, all are those of its `UntangledGuide`; otherwise only the first two are returned,
    for untangled means.

    Args:
        data: held-out sequences; without ``positions`` there are no errors in pixels.
        n_seen: observed frames before generation, and at either end for interpolation.

    Raises:
        ValueError: as in `evaluate`.
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
    """Returns the `MEASURES` of the guide's `RefinedGuide`, as ``refined_...``, for each N and for all sequences.

    It takes a few tenths of a second per sequence.

    Args:
        data: held-out sequences; without ``positions`` there are no errors in pixels.
        n_seen: observed frames before generation, and at either end for interpolation.
        n_steps: as in `guides.refine`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: as in `evaluate`, or if the guide's frames cannot be exchanged.
    """
    refined = RefinedGuide(guide, model, n_steps=n_steps)
    found = evaluate(model, refined, data, n_seen=n_seen, batch_size=batch_size, progress=progress)
    return _measures(found, "refined")


def merged(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of `evaluate` with those of `evaluate_untangled` or `evaluate_refined` added to its groups."""
    rows = {n: {**row, **other["by_n_objects"][n]} for n, row in result["by_n_objects"].items()}
    return {**result, "by_n_objects": rows, "all": {**result["all"], **other["all"]}}


def _measures(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the groups of a result with only the `MEASURES`, renamed to PREFIX_MEASURE."""

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {f"{prefix}_{name}": row[name] for name in MEASURES if name in row}

    return {"by_n_objects": {n: named(row) for n, row in found["by_n_objects"].items()}, "all": named(found["all"])}


def _positions_alone(model: PixelModel, guide: Guide, data: ImageSequences, batch_size: int) -> dict[str, torch.Tensor]:
    """Returns errors (n, N) and switches (n,) of untangled means, or {} if they cannot be measured in pixels."""
    if data.positions is None or not bool((data.n_objects == 1).any()):
        return {}
    device, N = next(model.parameters()).device, int(data.n_objects.max())
    found = []
    for start in range(0, len(data), batch_size):
        part = data[start : start + batch_size]
        n_objects = part.n_objects.to(device)
        a = infer(guide, part.images.to(device), n_objects, model=model).mean
        a = untangle(model.dynamics, a, n_objects).a
        found.append(torch.nn.functional.pad(a, (0, 0, 0, 0, 0, N - a.shape[1])).cpu())
    a = torch.cat(found)
    in_pixels = metrics.map_to_pixels(a, data)(a)
    matched = metrics.reorder(in_pixels, metrics.assign(in_pixels, data.positions, data.n_objects))
    return {
        "position_error_px": metrics.errors(matched, data.positions, data.n_objects).nanmean(-1),
        "switch_rate": metrics.switch_rates(matched, data.positions, data.n_objects),
    }
