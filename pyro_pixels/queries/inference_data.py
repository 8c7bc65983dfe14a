"""Posterior, predictions, prior and data of a trained model as one arviz object (Secs 2.2 and 3.3-3.4).

`to_inference_data` samples q(a | v) p(h, z | a), continues each sample into future frames with the dynamics, samples
the prior, and labels all dimensions, so that arviz can plot, compare and store everything. Samples are independent and
form a single chain, so their effective sample size is their number.

Dimensions and their coordinates:

    chain, draw     0;  0 .. S - 1
    sequence        0 .. B - 1, the index in ``images``, or counted from ``first``
    object, time    1 .. N;  1 .. T, as in the paper; in ``predictions`` time starts at T + 1
    axis, state     "x", "y";  "x", "y", "vx", "vy", in latent units
    component       0 .. K - 1, the values of z
    row, column     0 .. H - 1;  0 .. W - 1, pixels

For absent objects a, h, z and positions are NaN, which is why z is stored as a float.

Departures from the paper: none.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from tqdm import tqdm

from pyro_pixels._arrays import MAX_BYTES
from pyro_pixels._batch import object_mask
from pyro_pixels._checks import check_number
from pyro_pixels._convert import checked_batch
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.joint import JointGuide
from pyro_pixels.lgssm import kalman
from pyro_pixels.model.likelihoods import BernoulliPixels
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.filled import filled
from pyro_pixels.queries.parts import PIXELS_AT_ONCE, rows_of_parts

OBJECT = ("sequence", "object")
PIXELS = ("sequence", "time", "row", "column")
LATENTS = {"a": (*OBJECT, "time", "axis"), "h": (*OBJECT, "time", "state"), "z": OBJECT}
CONSTANTS = {
    "n_objects": ("sequence",),
    "positions": (*OBJECT, "time", "axis"),
    "delta": (),
    "u": ("state",),
    "Sigma_H": ("state", "state_bis"),
    "Sigma_A": ("axis", "axis_bis"),
    "pi": ("component",),
    "mu": ("component", "state"),
    "Sigma": ("component", "state", "state_bis"),
}
DIMENSIONS = {
    "posterior": LATENTS,
    "sample_stats": {"log_weight": ("sequence",)},
    "log_likelihood": {"v": ("sequence", "time")},
    "posterior_predictive": {"v": PIXELS},
    "predictions": {"a": LATENTS["a"], "h": LATENTS["h"], "v": PIXELS},  # z does not change
    "prior": LATENTS,
    "prior_predictive": {"v": PIXELS},
    "observed_data": {"v": PIXELS},
    "constant_data": CONSTANTS,
}
"""The variables of each group with their dimensions, except chain and draw, which all but the data groups have."""

Groups = dict[str, dict[str, Tensor]]


@torch.no_grad()
def to_inference_data(
    model: PixelModel,
    guide: Guide,
    images: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    n_samples: int = 200,
    n_frames_ahead: int = 0,
    positions: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
    first: int = 0,
) -> Any:
    """Collects posterior, predictions, prior and data with labelled dimensions for ``arviz``.

    ============================  ======================================================================================
    group                         variables
    ============================  ======================================================================================
    ``posterior``                 a, h, z from q(a | v) p(h, z | a)
    ``sample_stats``              log_weight, log p(v, a) - log q(a | v) of each sequence: its mean is the ELBO, and its
                                  Pareto k shows how far the guide is from the posterior
    ``log_likelihood``            v, log p(v_t | a_t) of each frame, for ``arviz.loo`` and ``arviz.compare``
    ``posterior_predictive``      v, sampled given the posterior's a
    ``predictions``               a, h, v in the frames after the last, each the future of the same posterior sample;
                                  missing if ``n_frames_ahead`` is 0
    ``prior``                     a, h, z sampled from the prior
    ``prior_predictive``          v, sampled given the prior's a
    ``observed_data``             v
    ``constant_data``             the learned delta, u, Sigma_H, Sigma_A, pi, mu, Sigma; n_objects; positions if given
    ============================  ======================================================================================

    Args:
        model: the trained model.
        guide: the trained guide.
        images: (B, T, H, W) in [0, 1] or uint8. Frames of NaN are unobserved: they are NaN in ``observed_data``, 0 in
            ``log_likelihood``, and drawn in ``posterior_predictive``.
        n_objects: (B,), a list, or one number for all sequences.
        n_samples: S, the number of samples from posterior and prior. Drawn images take S B T H W bytes per group as
            uint8, with `BernoulliPixels`, and four times as much as float32, with other likelihoods.
        n_frames_ahead: the number of frames to predict.
        positions: (B, N, T, 2), true positions in pixels in the order of the model's objects, stored unchanged.
        seed: seeds all samples; the caller's random state is not changed.
        progress: show a progress bar on a terminal.
        first: the number of the first sequence, where they are part of a file.

    Returns:
        An ``arviz.InferenceData``, which ``arviz.from_netcdf`` reads back, or, with arviz 1 or later, an
        ``xarray.DataTree``, which ``xarray.open_datatree`` reads back. Both have ``to_netcdf``.

    Raises:
        ValueError: if the images do not fit the model or the guide, pixels are outside [0, 1], or a number is out of
            range.
    """
    images, n_objects = checked_batch(images, n_objects, (model.renderer.height, model.renderer.width))
    _check_options(model, images, n_objects, n_samples, n_frames_ahead, positions)
    T, device = images.shape[1], images.device

    rows = rows_of_parts(len(images), (T + n_frames_ahead) * images[0, 0].numel())

    def draw(n: int) -> Groups:
        return _side_by_side([draw_some(images[part], n_objects[part], n) for part in rows], int(n_objects.max()))

    def draw_some(images: Tensor, n_objects: Tensor, n: int) -> Groups:
        groups = _posterior(model, guide, images, n_objects, n)
        if n_frames_ahead:
            groups["predictions"] = _future(model, groups["posterior"]["h"], n_objects, n_frames_ahead)
        return groups | _prior(model, n_objects, T, n)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        groups = _in_parts(draw, n_samples, PIXELS_AT_ONCE // images[rows[0]].numel(), progress)
    groups = {group: {name: x.unsqueeze(0) for name, x in drawn.items()} for group, drawn in groups.items()}
    binary = bool(((images == 0) | (images == 1)).all())  # False if frames are NaN
    groups["observed_data"] = {"v": images.to(torch.uint8 if binary else torch.float32)}
    groups["constant_data"] = _constants(model, n_objects, positions)
    return _labelled(groups, _coordinates(groups, first))


def _posterior(model: PixelModel, guide: Guide, images: Tensor, n_objects: Tensor, n: int) -> Groups:
    """Draws n samples in parallel, as Pyro's Predictive does, and returns them with their densities."""
    joint = JointGuide(guide, model.dynamics, filled=partial(filled, model, guide))
    with pyro.plate("draws", n, dim=-2):
        q = poutine.trace(joint).get_trace(images, n_objects)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(images, n_objects)
    for trace in (q, p):
        trace.compute_log_prob()
    q_nodes: Any = q.nodes
    p_nodes: Any = p.nodes
    p_v = p_nodes["v"]["fn"]
    # q(h, z | a) is exact, so h and z do not contribute to the weight
    log_weight = p_nodes["v"]["log_prob"] + p_nodes["a"]["log_prob"] - q_nodes["a"]["log_prob"]
    return {
        "posterior": _without_absent({name: q_nodes[name]["value"] for name in LATENTS}, n_objects),
        "sample_stats": {"log_weight": log_weight},
        "log_likelihood": {"v": p_v.base_dist.log_prob(p_nodes["v"]["value"]).sum((-2, -1))},
        "posterior_predictive": {"v": p_v.sample().to(_pixel_type(model))},
    }


def _future(model: PixelModel, h: Tensor, n_objects: Tensor, n_frames: int) -> dict[str, Tensor]:
    """Continues states h (n, B, N, T, 4) with a sample of p(h, a, v) in ``n_frames`` more frames."""
    lgssm = model.dynamics.lgssm()
    h = kalman.sample_rollout(lgssm, h[..., -1, :], n_frames)
    a = kalman.sample_observations(lgssm, h)
    logits = model.renderer(a.nan_to_num(), object_mask(n_objects, a.shape[-3]))
    v = model.likelihood(logits).sample().to(_pixel_type(model))
    return {"a": a, "h": h, "v": v}  # absent objects stay NaN


def _prior(model: PixelModel, n_objects: Tensor, n_frames: int, n: int) -> Groups:
    """Draws n samples from the prior."""
    drawn = Predictive(model.joint, num_samples=n, parallel=True)(None, n_objects, n_frames)
    return {
        "prior": _without_absent({name: drawn[name] for name in LATENTS}, n_objects),
        "prior_predictive": {"v": drawn["v"].to(_pixel_type(model))},
    }


def _pixel_type(model: PixelModel) -> torch.dtype:
    """Returns the type in which drawn images are stored."""
    return torch.uint8 if isinstance(model.likelihood, BernoulliPixels) else torch.float32


def _without_absent(draws: dict[str, Tensor], n_objects: Tensor) -> dict[str, Tensor]:
    """Sets latents (n, B, N, ...) of absent objects to NaN."""
    present = object_mask(n_objects, int(n_objects.max()))
    return {name: torch.where(present[(..., *[None] * (x.dim() - 3))], x, torch.nan) for name, x in draws.items()}


def _in_parts(draw: Callable[[int], Groups], n_samples: int, batch_size: int, progress: bool) -> Groups:
    """Draws ``n_samples`` samples in batches and moves them to the CPU."""
    batch_size = max(1, batch_size)
    sizes = [min(batch_size, n_samples - start) for start in range(0, n_samples, batch_size)]
    bar = tqdm(sizes, desc="samples", disable=None if progress else True, leave=False)
    parts = [{group: {name: x.cpu() for name, x in drawn.items()} for group, drawn in draw(n).items()} for n in bar]
    return {
        group: {name: torch.cat([part[group][name] for part in parts]) for name in drawn}
        for group, drawn in parts[0].items()
    }


def _side_by_side(parts: list[Groups], n_objects: int) -> Groups:
    """Joins the samples of different sequences on the CPU, padded with NaN where some have fewer objects."""
    if len(parts) == 1:
        return parts[0]

    def join(group: str, name: str) -> Tensor:
        tensors = [part[group][name].cpu() for part in parts]
        if "object" in DIMENSIONS[group][name]:
            missing = [(0, 0) * (x.dim() - 3) + (0, n_objects - x.shape[2]) for x in tensors]
            tensors = [F.pad(x, pad, value=torch.nan) for x, pad in zip(tensors, missing)]
        return torch.cat(tensors, 1)

    return {group: {name: join(group, name) for name in drawn} for group, drawn in parts[0].items()}


def _constants(model: PixelModel, n_objects: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
    """Returns the learned parameters and the given data."""
    dynamics, lgssm = model.dynamics, model.dynamics.lgssm()
    constants = {"n_objects": n_objects, "delta": dynamics.delta, "pi": dynamics.pi}
    constants |= {name: getattr(lgssm, name) for name in ("u", "Sigma_H", "Sigma_A", "mu", "Sigma")}
    return constants if positions is None else constants | {"positions": positions}


def _coordinates(groups: Groups, first: int) -> dict[str, Sequence[Any]]:
    """Returns the coordinate of every dimension."""
    _, S, _, N, T, _ = groups["posterior"]["a"].shape
    B, _, H, W = groups["observed_data"]["v"].shape
    axis = ["x", "y"]
    state = [*axis, "vx", "vy"]
    counted = {"draw": S, "row": H, "column": W, "component": len(groups["constant_data"]["pi"])}
    return {
        "chain": [0],
        **{name: range(size) for name, size in counted.items()},
        "sequence": range(first, first + B),
        "object": range(1, N + 1),
        "time": range(1, T + 1),
        "axis": axis,
        "axis_bis": axis,
        "state": state,
        "state_bis": state,
    }


def _labelled(groups: Groups, coordinates: Mapping[str, Sequence[Any]]) -> Any:
    """Returns the groups as xarray data sets, in the container that the installed arviz uses.

    arviz's own `from_dict` takes different arguments in 0.x and in 1.x, and guesses names of dimensions.
    """
    # imported here because the import is slow and training does not need it
    import arviz
    import xarray

    def labelled(group: str, variables: dict[str, Tensor]) -> xarray.Dataset:
        drawn = () if group.endswith("_data") else ("chain", "draw")
        arrays = {name: ((*drawn, *DIMENSIONS[group][name]), x.detach().cpu().numpy()) for name, x in variables.items()}
        of_group = dict(coordinates)
        if group == "predictions":
            T, n_ahead = len(coordinates["time"]), variables["a"].shape[-2]
            of_group["time"] = range(T + 1, T + n_ahead + 1)
        names = {name for dims, _ in arrays.values() for name in dims}
        return xarray.Dataset(arrays, {name: list(x) for name, x in of_group.items() if name in names})

    data_sets = {group: labelled(group, variables) for group, variables in groups.items()}
    if hasattr(arviz, "convert_to_datatree"):
        return xarray.DataTree.from_dict(data_sets)
    return arviz.InferenceData(**data_sets)  # type: ignore[attr-defined]


def _check_options(
    model: PixelModel,
    images: Tensor,
    n_objects: Tensor,
    n_samples: int,
    n_frames_ahead: int,
    positions: Tensor | None,
) -> None:
    """Checks the options of `to_inference_data`."""
    check_number("n_samples", n_samples, 1)
    check_number("n_frames_ahead", n_frames_ahead, 0)
    n_bytes = n_samples * images[:, :1].numel() * (2 * images.shape[1] + n_frames_ahead) * _pixel_type(model).itemsize
    if n_bytes > MAX_BYTES:
        raise ValueError(
            f"{n_samples:,} samples of the images of {len(images):,} sequences take {n_bytes:,} bytes, more than "
            f"{MAX_BYTES:,}; request fewer samples, or pass fewer sequences"
        )
    wanted = (len(images), int(n_objects.max()), images.shape[1], 2)
    if positions is not None and positions.shape != wanted:
        raise ValueError(f"positions have shape {tuple(positions.shape)}; wanted (B, N, T, 2) = {wanted}")
