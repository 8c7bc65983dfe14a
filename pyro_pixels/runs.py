"""Runs: building a model and a guide from a configuration, and loading trained ones from a folder.

A run is a folder with config.json (a `RunConfig`), metrics.jsonl (one line per evaluation) and checkpoint.pt. The same
configuration builds bitwise the same model and guide everywhere.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import nn

from pyro_pixels._arrays import MAX_BYTES, read_arrays
from pyro_pixels._checks import check_number
from pyro_pixels._checksums import checked_write, read_checked, write_json
from pyro_pixels._lock import locked
from pyro_pixels.config import RunConfig
from pyro_pixels.custom import (
    check_factory,
    file_of,
    find,
    known_names,
    load_file,
    load_unchanged,
    loaded_file,
    make,
    where,
)
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.inference_rnn import InferenceRNN, StateNetwork
from pyro_pixels.guides.network_starts import start_alike, start_as_ramps, start_with_memory
from pyro_pixels.guides.other_networks import BidirectionalRNN, ConvolutionalFrontEnd
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.likelihoods import LIKELIHOODS, PixelLikelihood
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.training.checkpoints import load_checkpoint, load_weights, write_config
from pyro_pixels.training.states import check_weights, first_not_finite
from pyro_pixels.worlds.base import WorldConfig
from pyro_pixels.worlds.others import WORLDS


class Run(NamedTuple):
    """A model and its guide with their configuration."""

    config: RunConfig
    model: PixelModel
    guide: Guide
    step: int
    """The number of training steps done."""


def _recurrent(config: RunConfig, model: PixelModel) -> Guide:
    return RecurrentGuide(_rnn(config))


def _attentive(config: RunConfig, model: PixelModel) -> Guide:
    return _with_attention(_rnn(config))


def _convolutional(config: RunConfig, model: PixelModel) -> Guide:
    return _with_attention(_rnn(config, ConvolutionalFrontEnd()))


def _bidirectional(config: RunConfig, model: PixelModel) -> Guide:
    return _with_attention(BidirectionalRNN(_rnn(config), _rnn(config)))


def _structured(config: RunConfig, model: PixelModel) -> Guide:
    rnn = _rnn(config)
    head = TrackingHead(model.dynamics, rnn.height, rnn.width, rnn.state_size, clutter=config.clutter)
    return StructuredGuide(model.dynamics, rnn, head)


def _rnn(config: RunConfig, front_end: nn.Module | None = None) -> InferenceRNN:
    state_size = config.guide_state_size or config.state_size
    rnn = InferenceRNN(config.data.height, config.data.width, state_size, config.max_objects, front_end)
    if config.image_ramps is not None:
        start_as_ramps(rnn, ramp=config.image_ramps)
    if config.common_s0 is not None:
        start_alike(rnn, own=config.common_s0)
    if config.memory is not None:
        start_with_memory(rnn, gain=config.memory)
    return rnn


def _with_attention(rnn: StateNetwork) -> Guide:
    return RecurrentGuide(rnn, AttentionHead(rnn.height, rnn.width, rnn.state_size))


MAX_WEIGHTS = 2 * 10**9
"""The largest number of weights of model and guide, 8 GB in single precision; the paper's have 30 million."""

GUIDES: dict[str, Callable[[RunConfig, PixelModel], Guide]] = {
    "recurrent": _recurrent,  # the paper's
    "attentive": _attentive,  # the paper's with an `AttentionHead`
    "convolutional": _convolutional,  # "attentive" behind a `ConvolutionalFrontEnd`
    "bidirectional": _bidirectional,  # "attentive" in both directions of time
    "structured": _structured,
}
"""Name -> factory of the guides that a configuration can refer to; add your own to train and load it by name.

Guides that installed packages register as entry points `pyro_pixels.guides` are found as well."""

REGISTRIES: dict[str, dict[str, Any]] = {"guide": GUIDES, "world": WORLDS, "likelihood": LIKELIHOODS}
"""Kind -> registry of what a configuration refers to by name."""


def named(kind: str, name: str) -> Any:
    """Returns the factory of a guide or a likelihood, or the class of a world, from its registry or a package.

    Raises:
        ValueError: if there is nothing of that name, what is registered as a guide or a likelihood cannot be called, or
            what is registered as a world is none or has another name.
    """
    found = find(kind, name, REGISTRIES)
    if kind != "world":
        check_factory(kind, name, REGISTRIES)
        return found
    what = where(kind, name, REGISTRIES)
    if not isinstance(found, type) or not issubclass(found, WorldConfig) or inspect.isabstract(found):
        raise ValueError(f"{what} is {found!r}; wanted a subclass of WorldConfig with a method move")
    own = next(field.default for field in dataclasses.fields(found) if field.name == "world")
    if own != name:
        raise ValueError(
            f"{what} is the class {found.__name__}, whose field world is {own!r}; wanted a frozen dataclass "
            f'with the line world: str = field(default="{name}", init=False)'
        )
    return found


def names_in(config: RunConfig) -> dict[str, str]:
    """Returns the names of the guide, the world and the likelihood of a configuration."""
    return {"guide": config.guide, "world": config.data.world, "likelihood": config.likelihood}


def build(config: RunConfig, *, max_weights: int = MAX_WEIGHTS) -> Run:
    """Returns the untrained model and guide of a configuration; the caller's random state is not changed.

    Args:
        max_weights: the limit on the number of weights, checked before any are created.

    Raises:
        ValueError: if the configuration names a guide or a likelihood that is not in `GUIDES` or `LIKELIHOODS`, or
            whose factory makes something else, or needs more than ``max_weights``.
    """
    check_config(config, max_weights=max_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        renderer = Renderer(
            config.data.height,
            config.data.width,
            config.state_size,
            background_logit=config.background_logit,
            input_scale=config.renderer_input_scale,
        )
        likelihood = make("likelihood", config.likelihood, REGISTRIES, (), PixelLikelihood)
        model = PixelModel(Dynamics(config.dynamics), renderer, likelihood)
        return Run(config, model, make("guide", config.guide, REGISTRIES, (config, model), Guide), step=0)


def check_config(config: RunConfig, *, max_weights: int = MAX_WEIGHTS) -> None:
    """Raises the ValueError that `build` would raise, before anything is built or simulated."""
    if not isinstance(config, RunConfig):
        raise ValueError(f"config is a {type(config).__name__}; wanted a RunConfig, such as PRESETS['quick']")
    for kind in ("guide", "likelihood"):
        named(kind, names_in(config)[kind])
    pixels, D, K = config.data.height * config.data.width, config.state_size, config.dynamics.n_components
    S = config.guide_state_size or D
    n = D * (pixels + 7) + 2 * S * (2 * S + pixels) + config.max_objects**2 * S + 21 * K
    if n > max_weights:
        raise ValueError(
            f"state_size {D}, guide_state_size {S}, {config.data.height} x {config.data.width} pixels and max_objects "
            f"{config.max_objects} make about {n:,} weights, more than max_weights, {max_weights:,}; wanted fewer"
        )


def save_config(folder: str | Path, config: RunConfig) -> None:
    """Writes config.json into the folder of a run, which is created if needed.

    For a training, pass the configuration to `fit` instead, which writes it once it has locked the folder.

    Raises:
        ValueError: if another process trains in the folder, or it cannot be written to.
    """
    with locked(folder):
        write_config(folder, config)


def load_config(folder: str | Path, kind: type = RunConfig, *, custom: str | Path | None = None) -> Any:
    """Reads a run's config.json as a dataclass ``kind``.

    Args:
        custom: the Python file that adds what the configuration names to the registries, executed first if given.

    Raises:
        ValueError: if it is missing, not JSON, or has fields that are unknown to this version; or if the custom file is
            missing, fails, or is not the one that the run was trained with.
    """
    values = _values(folder)
    file, sha256 = _recorded(values)
    if custom is not None and sha256 is not None:
        load_unchanged(custom, sha256, REGISTRIES, str(folder))
    elif custom is not None:
        load_file(custom, REGISTRIES)
    elif sha256 is not None and _world_name(values.get("data")) not in known_names("world", REGISTRIES):
        raise ValueError(_needs(folder, file))
    return _from_dict(kind, values, str(Path(folder) / "config.json"))


def recorded_file(folder: str | Path) -> str | None:
    """Returns the path of the Python file that a run was trained with, as its configuration has it, or None."""
    return _recorded(_values(folder))[0]


def _values(folder: str | Path) -> Any:
    """Returns the content of a run's config.json."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(read_checked(path))
    except FileNotFoundError:
        inside = sorted(config.parent for config in Path(folder).glob("*/config.json"))
        raise ValueError(
            f"there is no run in {folder} ({path.name} is missing); "
            + (f"give one of its folders, such as {inside[0]}" if inside else "train one with examples/train.py")
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or train again") from None


def _recorded(values: Any) -> tuple[str | None, str | None]:
    """Returns the path and the checksum of the custom file in a configuration, or None for both."""
    found = [values.get(name) if isinstance(values, Mapping) else None for name in ("custom_file", "custom_sha256")]
    return (found[0], found[1]) if all(isinstance(x, str) for x in found) else (None, None)


def _needs(where: str | Path, file: str | None) -> str:
    return f"{where} needs the definitions in {file}; if you trust that file, pass it as custom=..."


def check_custom(config: RunConfig, where: str | Path, custom: str | Path | None = None) -> None:
    """Refuses a guide, a world or a likelihood that has the right name but is not the one that a run was trained with.

    Args:
        config: the run's configuration.
        where: its folder, for messages.
        custom: a file whose definitions are meant even if the configuration does not name it.

    Raises:
        ValueError: if the file that the run was trained with has not been executed in this process, or what is
            registered under one of its names is from elsewhere; or if the run was trained without a file, but one has
            registered something under one of its names.
    """
    given = None if custom is None else load_file(custom, REGISTRIES)
    own = given if config.custom_sha256 is None else loaded_file(config.custom_sha256)
    if config.custom_sha256 is not None and own is None:
        raise ValueError(_needs(where, config.custom_file))
    for kind, name in names_in(config).items():
        now = file_of(kind, name, REGISTRIES)
        if own is not None and now is not None and now.sha256 == own.sha256:
            continue
        if own is not None and name in own.names[kind]:
            raise ValueError(_needs(where, config.custom_file))
        if now is not None:
            raise ValueError(
                f"{where} names no file for its {kind} '{name}', which would now be that of {now.path}; pass that file "
                "as custom=... if it is meant, or else use a new process"
            )


def load_run(folder: str | Path, device: torch.device | str = "cpu", *, custom: str | Path | None = None) -> Run:
    """Returns the trained model and guide of a folder, on ``device`` and in evaluation mode, ready for queries.

    Args:
        custom: the Python file that adds the run's guide, world or likelihood to the registries, if this process has
            not executed that file yet. Loading a run executes no file that is not given here.

    Raises:
        ValueError: if the folder holds no run, its checkpoint is damaged or of another configuration, or the custom
            file is not given or has changed.
    """
    config = load_config(folder, custom=custom)
    check_custom(config, folder, custom)
    run = build(config)
    path = Path(folder) / "checkpoint.pt"
    state = load_checkpoint(path)
    check_weights(run.model, state.get("model"), path)
    check_weights(run.guide, state.get("guide"), path)
    run.model.load_state_dict(state["model"])
    run.guide.load_state_dict(state["guide"])
    step = check_number(f"step in {path}", state.get("step"), 0)
    return _ready(run, device, step)


PRETRAINED = Path(__file__).parent / "pretrained"


def load_pretrained(name: str = "quick", device: torch.device | str = "cpu") -> Run:
    """Returns a run that comes with the package, as shown in docs/reproduction.md, in evaluation mode.

    Args:
        name: a folder in pyro_pixels/pretrained: quick, trained for 1,000 steps; long, for 15,000; or recurrent, with
            the paper's network. Its about.json records how the run was made and how good it is.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = PRETRAINED / name
    names = sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir())
    if name not in names:
        raise ValueError(f"there are no pretrained weights '{name}'; wanted one of {names}")
    config, path = load_config(folder), folder / "weights.npz"
    check_custom(config, folder)
    run = build(config)
    try:
        arrays = read_arrays(path, read_checked(path), max_bytes=MAX_BYTES)
        about = json.loads(read_checked(folder / "about.json"))
        step = check_number(f"step in {folder / 'about.json'}", about.get("step"), 0)
    except (OSError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder} has incomplete weights ({error}); reinstall the package") from None
    weights = {key: torch.from_numpy(x) for key, x in arrays.items()}
    for part, module in (("model", run.model), ("guide", run.guide)):
        own = {key.removeprefix(f"{part}."): x for key, x in weights.items() if key.startswith(f"{part}.")}
        load_weights(module, own, path)
    return _ready(run, device, step)


def _ready(run: Run, device: torch.device | str, step: int) -> Run:
    """Returns a trained run on ``device``, in evaluation mode."""
    return run._replace(model=run.model.to(device).eval(), guide=run.guide.to(device).eval(), step=step)


def export_weights(run: Run, folder: str | Path, about: Mapping[str, Any]) -> None:
    """Writes config.json, weights.npz (float32, nothing executable) and about.json for `load_pretrained`."""
    weights = {
        f"{part}.{key}": x.float().cpu().numpy()
        for part, module in (("model", run.model), ("guide", run.guide))
        for key, x in module.state_dict().items()
    }
    bad = first_not_finite({"model": run.model, "guide": run.guide})
    if bad is not None:
        raise ValueError(f"{bad} has values that are not finite; export a run with finite weights")
    write_config(folder, run.config)
    with checked_write(Path(folder) / "weights.npz") as file:
        np.savez_compressed(file, **weights)  # type: ignore[arg-type]
    write_json(Path(folder) / "about.json", {"step": run.step, **about}, indent=2)


def _from_dict(kind: type, values: Any, where: str) -> Any:
    """Returns a dataclass from the nested dicts and lists of its JSON form."""
    if kind is WorldConfig:
        kind = _world_of(values, where)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} has {values!r} where the fields of {kind.__name__} were wanted")
    types = get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"{where} has the unknown field '{unknown[0]}'; {kind.__name__} knows {sorted(types)}")
    arguments, given = {}, {field.name for field in dataclasses.fields(kind) if field.init}
    for name, value in ((name, value) for name, value in values.items() if name in given):
        if dataclasses.is_dataclass(types[name]):
            value = _from_dict(types[name], value, where)  # type: ignore[arg-type]
        arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{where} does not describe a {kind.__name__} ({error}); train again") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _world_of(values: Any, where: str) -> type[WorldConfig]:
    """Returns the class of a world's configuration."""
    try:
        return named("world", _world_name(values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _world_name(values: Any) -> str:
    """Returns the name of a world in its configuration; version 0.1 had only cannonballs and stored no name."""
    return str(values.get("world", "cannonballs")) if isinstance(values, Mapping) else "cannonballs"
