"""Checks of a checkpoint: every name, shape, type and value is checked before any part of it is used.

An optimiser state of the wrong shape would make torch's fused optimisers read and write out of bounds.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_pixels.data import ImageSequences

MAX_STEP = 10**12


def check_weights(module: nn.Module, weights: Any, path: str | Path) -> None:
    """Raises ValueError unless ``weights`` have the names, shapes and types of the module's state and are finite."""
    own, free = module.state_dict(), _free_shapes(module)
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{path} holds no weights of a {type(module).__name__}; train again, or restore a copy")
    fixed = {k: x for k, x in own.items() if k not in free}
    wrong = [
        f"{k}: {_described(weights[k])} for {tuple(fixed[k].shape)}"
        for k in sorted(fixed.keys() & weights.keys())
        if not isinstance(weights[k], Tensor) or weights[k].shape != fixed[k].shape
    ]
    wrong += [
        f"{k}: {_described(weights[k])} for {shape}"
        for k, shape in free.items()
        if k in weights and not (isinstance(weights[k], Tensor) and _has_shape(weights[k], shape))
    ]
    wrong += [f"{k}: missing" for k in sorted(fixed.keys() - weights.keys())]
    wrong += [f"{k}: unknown" for k in sorted(weights.keys() - fixed.keys() - free.keys())]
    if wrong:
        raise ValueError(
            f"{path} has another configuration ({len(wrong)} weights do not fit, such as {wrong[0]}); "
            "use the configuration it was trained with (config.json beside it) or another folder"
        )
    for name, x in weights.items():
        dtype = fixed[name].dtype if name in fixed else torch.float32
        if x.layout != torch.strided or x.is_floating_point() != dtype.is_floating_point or x.is_complex():
            raise ValueError(f"{path} has {name} of type {x.dtype}; wanted {dtype}. Train again, or restore a copy")
        if not is_finite(x):
            raise ValueError(
                f"{path} has values in {name} that are not finite; train again, or restore an earlier copy"
            )


def _free_shapes(module: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """Returns names and shapes of optional entries of a checkpoint (`PixelEvidence.may_have`); None is any size."""
    return {
        f"{part_name}.{name}": shape
        for part_name, part in module.named_modules()
        for name, shape in getattr(part, "may_have", {}).items()
    }


def _has_shape(x: Tensor, shape: tuple[int | None, ...]) -> bool:
    return x.dim() == len(shape) and all(wanted in (None, n) for n, wanted in zip(x.shape, shape))


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any, path: str | Path) -> None:
    """Raises ValueError unless ``state`` is a valid state of the optimiser: for each parameter the entries of `Adam`,
    finite and of the parameter's shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        raise ValueError(f"{path} holds no state of the optimiser; train again, or restore a copy")
    if [group.get("params") if isinstance(group, Mapping) else None for group in groups] != [g["params"] for g in own]:
        raise ValueError(
            f"{path} has the optimiser state of other parameters; "
            "resume with the learning_rate_factors it was trained with"
        )
    for i, kept in state["state"].items():
        if not isinstance(i, int) or not 0 <= i < len(parameters) or not isinstance(kept, Mapping):
            raise ValueError(f"{path} has the optimiser state of a parameter that does not exist; restore a copy")
        shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
        if kept.keys() != shapes.keys():
            raise ValueError(f"{path} has an optimiser state with {sorted(map(str, kept))}; wanted {sorted(shapes)}")
        for name, x in kept.items():
            if not isinstance(x, Tensor) or x.shape != shapes[name] or x.layout != torch.strided:
                raise ValueError(
                    f"{path} has {name} of parameter {i} as {_described(x)}; wanted {tuple(shapes[name])}. "
                    "Train again, or restore a copy"
                )
            if not x.is_floating_point() or not is_finite(x) or (name != "exp_avg" and bool((x < 0).any())):
                raise ValueError(f"{path} has impossible values in {name} of parameter {i}; restore a copy")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restores the state of each parameter, but not the optimiser's settings, which the current schedule and device
    determine."""
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def check_progress(state: Mapping[str, Any], path: str | Path, sums: Mapping[str, Collection[str]]) -> None:
    """Raises ValueError unless a checkpoint has valid step, seed and seconds, and finite numbers under the names that
    ``sums`` lists for each of its entries."""
    whole = {"step": MAX_STEP, "seed": MAX_STEP}
    for name, most in whole.items():
        x = state.get(name)
        if not isinstance(x, int) or isinstance(x, bool) or not 0 <= x <= most:
            raise ValueError(f"{path} has {name} {x!r}; wanted a whole number of at least 0. Restore a copy")
    numbers: list[tuple[str, Any]] = [("seconds", state.get("seconds"))]
    for entry, names in sums.items():
        given = state.get(entry)
        if not isinstance(given, Mapping) or given.keys() != set(names):
            raise ValueError(f"{path} has {entry} {given!r}; wanted {sorted(names)}. Restore a copy, or train again")
        numbers += given.items()
    for name, x in numbers:
        if not isinstance(x, int | float) or isinstance(x, bool) or not math.isfinite(x):
            raise ValueError(f"{path} has {name} {x!r}; wanted a finite number. Restore a copy, or train again")


def check_tensor(state: Mapping[str, Any], name: str, like: Tensor, path: str | Path) -> None:
    """Raises ValueError unless entry ``name`` is a finite tensor with the shape and type of ``like``."""
    x = state.get(name)
    if not isinstance(x, Tensor) or x.shape != like.shape or x.dtype != like.dtype or not is_finite(x):
        raise ValueError(
            f"{path} has {name} as {_described(x)}; wanted {tuple(like.shape)} of {like.dtype}. "
            "Restore a copy, or train again"
        )


def check_same_data(state: Mapping[str, Any], own: Mapping[str, str | None], path: str | Path) -> None:
    """Raises ValueError if a checkpoint was trained on other sequences than those with fingerprints ``own``."""
    for name, mark in own.items():
        kept = state.get(name)
        if kept is not None and mark is not None and kept != mark:
            raise ValueError(
                f"{path} was trained on sequences other than the given ones ({name} {str(kept)[:12]}, not "
                f"{mark[:12]}); restore the file it was trained on, or train another run on this one"
            )


def fingerprint(data: ImageSequences | None, tracks: Tensor | None = None) -> str | None:
    """Returns the SHA-256 of the images, numbers of objects and, if given, tracks; positions and other data that
    training never uses do not count."""
    if data is None:
        return None
    sha = hashlib.sha256()
    for x in (data.images, data.n_objects, tracks):
        if x is not None:
            x = x.detach().cpu().contiguous()
            sha.update(f"{x.dtype} {tuple(x.shape)} ".encode())
            for part in x.split(1_000) if x.dim() else [x]:
                sha.update(part.numpy().data)
    return sha.hexdigest()


def is_finite(x: Tensor) -> bool:
    """Tells whether all values are finite; integers always are."""
    return (not x.is_floating_point() and not x.is_complex()) or bool(x.isfinite().all())


def first_not_finite(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> str | None:
    """Returns the name of a parameter, buffer or optimiser state that is not finite; None if all are finite.

    Waits for the device once."""
    tensors = [(f"{part}.{name}", x) for part, module in modules.items() for name, x in module.state_dict().items()]
    if optimizer is not None:
        tensors += [(f"the optimiser's {k}", x) for kept in optimizer.state.values() for k, x in kept.items()]
    floats = [(name, x) for name, x in tensors if isinstance(x, Tensor) and x.is_floating_point()]
    if not floats:
        return None
    device = floats[0][1].device
    finite = torch.stack([x.isfinite().all().to(device, non_blocking=True) for _, x in floats]).tolist()
    return next((name for (name, _), good in zip(floats, finite) if not good), None)


def _described(x: Any) -> str:
    return f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
