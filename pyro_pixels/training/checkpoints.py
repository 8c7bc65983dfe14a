"""Checkpoints, the metrics file, and a graceful stop for training loops that may be interrupted at any time.

Files are written atomically and have a checksum in the same folder. Reading them never executes code that a file may
contain, and no part of a checkpoint is used before all of it has been checked (`training.states`).
"""

import dataclasses
import io
import json
import math
import pickle
import signal
import threading
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_pixels._checksums import checked_write, damaged, digest, noted, read_checked, to_json, warn_unchecked
from pyro_pixels.training.states import check_weights

FORMAT = 1


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts); an older file stays until the new one is complete.

    Raises:
        CannotWrite: if the file cannot be written, or the disk is full. It is a ValueError.
    """
    with checked_write(path) as file:
        buffer = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError
        torch.save({"format": FORMAT, **state}, buffer)
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote. Only tensors and plain containers are accepted (``weights_only``).

    Raises:
        ValueError: if the file does not exist, was changed, is truncated or of another kind, or contains anything
            executable.
    """
    path = Path(path)
    try:
        content = read_checked(path)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}; train a run first (examples/train.py)") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); restore a copy, or train again") from None
    _check_archive(path, content)
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights and was not opened; use only checkpoints that this package wrote"
        ) from None
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ValueError(
            f"{path} is not a complete checkpoint ({_first_line(error)}); train again or restore a copy"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this package (format {FORMAT}); train again with this version")
    return state


def _check_archive(path: Path, content: bytes) -> None:
    """Raises ValueError unless ``content`` is a zip of uncompressed entries, each with the right CRC-32."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            fits = sum(entry.file_size for entry in entries) <= len(content)
            bad = archive.testzip() if stored and fits else None
            wrong = None if bad is None else f"its entry {bad!r} is damaged"
            if not (stored and fits):
                wrong = "its entries are larger than the file"
    except Exception as error:  # zipfile raises many kinds
        wrong = _first_line(error)
    if wrong is not None:
        raise ValueError(f"{path} is not a complete checkpoint ({wrong}); train again or restore a copy")


def load_weights(module: torch.nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """Calls `load_state_dict` after a check of names, shapes, types and values (`states.check_weights`).

    Raises:
        ValueError: if the weights do not fit the module; the message names the first that does not.
    """
    check_weights(module, weights, path)
    module.load_state_dict(weights)


def write_config(run_dir: str | Path, config: Any) -> None:
    """Writes a dataclass to config.json in the folder of a run, which is created if needed."""
    with checked_write(Path(run_dir) / "config.json") as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=2).encode() + b"\n")


def read_lines(run_dir: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl, with NaN for null; none if there is no such file.

    An incomplete last line, which a crash may leave behind, is dropped with a warning.

    Raises:
        ValueError: if the file is damaged elsewhere.
    """
    path = run_dir / "metrics.jsonl"
    try:
        content = path.read_bytes()
        wanted = noted(run_dir).get(path.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); restore a copy, or delete it") from None
    if wanted is None:
        warn_unchecked(path)
    elif digest(content) not in wanted:
        whole = content[: content.rfind(b"\n") + 1]
        if whole == content or digest(whole) not in wanted:
            raise ValueError(damaged(path))
    lines: list[dict[str, float]] = []
    rows = content.splitlines()
    for i, row in enumerate(rows):
        try:
            line = json.loads(row)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("it has no step")
        except (ValueError, RecursionError) as error:
            if i == len(rows) - 1 and not content.endswith(b"\n"):
                warnings.warn(f"the last line of {path} is incomplete and is ignored", stacklevel=2)
                break
            raise ValueError(
                f"line {i + 1} of {path} is not a line of metrics ({_first_line(error)}); restore a copy, or delete it"
            ) from None
        lines.append({key: math.nan if value is None else value for key, value in line.items()})
    return lines


def write_lines(run_dir: Path, lines: Sequence[dict[str, float]]) -> None:
    """Writes a run's metrics.jsonl; an older file stays until the new one is complete. What is not finite is null."""
    with checked_write(run_dir / "metrics.jsonl") as file:
        file.writelines(to_json(line) for line in lines)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C and SIGTERM set; once it is set, another signal raises KeyboardInterrupt.

    The previous signal handlers are restored on exit.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
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
