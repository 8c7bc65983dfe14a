"""Runs: building a model and a guide from a configuration, and loading trained ones from a folder.

A run is a folder with config.json (a `RunConfig`), metrics.jsonl (one line per evaluation) and checkpoint.pt. The same
configuration builds bitwise the same model and guide everywhere.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import nn

from pyro_pixels._arrays import MAX_BYTES, read_arrays
from pyro_pixels._checks import check_number
from pyro_pixels._checksums import checked_write, read_checked
from pyro_pixels._lock import locked
from pyro_pixels.config import RunConfig
from pyro_pixels.custom_guides import file_of, find_guide, guide_names, load_guides, load_unchanged
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.inference_rnn import InferenceRNN, StateNetwork
from pyro_pixels.guides.network_starts import start_alike, start_as_ramps, start_with_memory
from pyro_pixels.guides.other_networks import BidirectionalRNN, ConvolutionalFrontEnd
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.guides.tracking_head import TrackingHead
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model.likelihoods import LIKELIHOODS
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


def build(config: RunConfig, *, max_weights: int = MAX_WEIGHTS) -> Run:
    """Returns the untrained model and guide of a configuration; the caller's random state is not changed.

    Args:
        max_weights: the limit on the number of weights, checked before any are created.

    Raises:
        ValueError: if the configuration names a guide or a likelihood that is not in `GUIDES` or `LIKELIHOODS`, or
            needs more than ``max_weights``.
    """
    check_config(config, max_weights=max_weights)
    make_guide = find_guide(config.guide, GUIDES)
    assert make_guide is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        renderer = Renderer(
            config.data.height,
            config.data.width,
            config.state_size,
            background_logit=config.background_logit,
            input_scale=config.renderer_input_scale,
        )
        model = PixelModel(Dynamics(config.dynamics), renderer, LIKELIHOODS[config.likelihood]())
        return Run(config, model, make_guide(config, model), step=0)


def check_config(config: RunConfig, *, max_weights: int = MAX_WEIGHTS) -> None:
    """Raises the ValueError that `build` would raise, before anything is built or simulated."""
    if not isinstance(config, RunConfig):
        raise ValueError(f"config is a {type(config).__name__}; wanted a RunConfig, such as PRESETS['quick']")
    if find_guide(config.guide, GUIDES) is None:
        raise ValueError(
            f"there is no guide '{config.guide}'; wanted one of {guide_names(GUIDES)}, or add yours to GUIDES "
            "(in scripts, pass the file that does so with --custom)"
        )
    if config.likelihood not in LIKELIHOODS:
        raise ValueError(
            f"there is no likelihood '{config.likelihood}'; wanted one of {sorted(LIKELIHOODS)}, or add yours to "
            "LIKELIHOODS"
        )
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


def load_config(folder: str | Path, kind: type = RunConfig) -> Any:
    """Reads a run's config.json as a dataclass ``kind``.

    Raises:
        ValueError: if it is missing, not JSON, or has fields that are unknown to this version.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(read_checked(path))
    except FileNotFoundError:
        inside = sorted(config.parent for config in Path(folder).glob("*/config.json"))
        raise ValueError(
            f"there is no run in {folder} ({path.name} is missing); "
            + (f"give one of its folders, such as {inside[0]}" if inside else "train one with examples/train.py")
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or train again") from None
    return _from_dict(kind, values, str(path))


def use_custom_guide(config: RunConfig, where: str | Path, custom: str | Path | None) -> None:
    """Registers the guide of a run that was trained with a user's Python file; other guides need no file.

    A guide that has the right name but is not from the right file is refused.

    Args:
        config: the run's configuration.
        where: its folder, for messages.
        custom: the file that adds the guide to `GUIDES`. Loading a run executes no file that is not given here.

    Raises:
        ValueError: if the file is needed but not given, is missing, or is not the one that the run was trained with; or
            if the run was trained without a file, but another has registered a guide of that name.
    """
    if config.custom_file is None or config.custom_sha256 is None:
        given = () if custom is None else load_guides(custom, GUIDES).names
        other = file_of(config.guide, GUIDES)
        if other is not None and config.guide not in given:
            raise ValueError(
                f"{where} names no file of guides, but its guide '{config.guide}' would now be that of {other.path}; "
                "pass that file as custom=... if it is meant, or else use a new process"
            )
    elif custom is not None:
        load_unchanged(custom, config.custom_sha256, GUIDES, str(where))
    else:
        known = file_of(config.guide, GUIDES)
        if known is None or known.sha256 != config.custom_sha256:
            raise ValueError(
                f"the guide '{config.guide}' of {where} is defined in {config.custom_file}; if you trust that file, "
                "pass it as custom=..."
            )


def load_run(folder: str | Path, device: torch.device | str = "cpu", *, custom: str | Path | None = None) -> Run:
    """Returns the trained model and guide of a folder, on ``device`` and in evaluation mode, ready for queries.

    Args:
        custom: the Python file that adds the run's guide to `GUIDES`, if the run was trained with ``--custom`` and
            this process has not loaded that file yet.

    Raises:
        ValueError: if the folder holds no run, its checkpoint is damaged or of another configuration, or the file with
            its guide is not given or has changed.
    """
    config = load_config(folder)
    use_custom_guide(config, folder, custom)
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
    use_custom_guide(config, folder, None)
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
    with checked_write(Path(folder) / "about.json") as file:
        file.write(json.dumps({"step": run.step, **about}, indent=2).encode() + b"\n")


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
    """Returns the class of a world's configuration; version 0.1 had only cannonballs and stored no name."""
    name = values.get("world", "cannonballs") if isinstance(values, Mapping) else "cannonballs"
    if name not in WORLDS:
        raise ValueError(f"{where} has the unknown world '{name}'; wanted one of {sorted(WORLDS)}, or add it to WORLDS")
    return WORLDS[name]
