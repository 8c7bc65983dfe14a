"""What a training loop needs that may be stopped at any time: checkpoints, a file of metrics, and a kind way to stop.

Files are written whole or not at all, and read without running any code that a file may bring.
"""

import json
import pickle
import signal
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_pixels._files import atomic_write

FORMAT = 1


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts); an older file stays until the new one is whole."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote. Only tensors and plain containers are accepted (``weights_only``).

    Raises:
        ValueError: if there is no such file, or it is truncated, of another kind, or holds anything executable.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}; train a run first (examples/train.py)") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights and is not opened; use only checkpoints that this package wrote"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint ({_first_line(error)}); train again or restore a copy"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this package (format {FORMAT}); train again with this version")
    return state


def load_weights(module: torch.nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """`load_state_dict` whose complaint is a ValueError that names what does not fit."""
    own = module.state_dict()
    free = tuple(f"{name}." for name, part in module.named_modules() if getattr(part, "any_state", False))
    own = {k: x for k, x in own.items() if not k.startswith(free)}
    fixed = {k: x for k, x in weights.items() if not k.startswith(free)}
    wrong = [
        f"{k}: {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
        for k in own.keys() & fixed.keys()
        if weights[k].shape != own[k].shape
    ]
    wrong += [f"{k}: missing" for k in sorted(own.keys() - fixed.keys())] + [
        f"{k}: unknown" for k in sorted(fixed.keys() - own.keys())
    ]
    if wrong:
        raise ValueError(
            f"{path} is of another configuration ({len(wrong)} weights do not fit, such as {wrong[0]}); "
            "use the configuration it was trained with (config.json beside it) or another folder"
        )
    module.load_state_dict(weights)


def read_lines(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(run_dir: Path, lines: Sequence[dict[str, float]]) -> None:
    """Writes a run's metrics.jsonl; an older file stays until the new one is whole."""
    with atomic_write(run_dir / "metrics.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set instead of killing; a second Ctrl-C kills. Handlers are put back."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may have handlers
        return

    def request_stop(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
