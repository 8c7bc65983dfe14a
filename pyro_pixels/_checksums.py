"""SHA-256 checksums of the files in a folder, in its checksums.json: damaged files are refused before they are used.

The checksum of a new file is recorded before the file gets its name, alongside that of the file it replaces. So
whenever the process is killed, the file on disk matches a recorded checksum. Processes that write different files of
one folder, such as a training and an evaluation, take turns to record them. Files without a checksum, such as those of
version 0.1, are read with a warning.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pyro_pixels._files import atomic_write, fcntl

NAME = "checksums.json"
TRIES = 5  # a file may be replaced while it is being read
_ABOUT = "SHA-256 of the files beside this one: what each may have. Delete this file to use them unchecked."


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def checked_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Like `atomic_write`, but also records the checksum of the file."""
    path = Path(path)

    def note(part: Path) -> None:
        with open(part, "rb") as file:
            new = hashlib.file_digest(file, "sha256").hexdigest()
        with _in_turn(path.parent):
            files = _noted_or_none(path.parent)
            files[path.name] = [*_of_what_is_there(path, files), new]
            _write(path.parent, files)

    with atomic_write(path, before=note) as file:
        yield file


def read_checked(path: str | Path) -> bytes:
    """Returns the content of a file after verifying its checksum, if there is one.

    Raises:
        ValueError: if the checksum does not match.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    for _ in range(TRIES):
        wanted = noted(path.parent).get(path.name)
        content = path.read_bytes()
        if wanted is None:
            warn_unchecked(path)
            return content
        if digest(content) in wanted:
            return content
    raise ValueError(damaged(path))


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Writes JSON, with null for what is not finite; an older file stays until the new one is complete.

    In a run's folder the checksum is recorded.
    """
    with (checked_write if _is_of_a_run(path) else atomic_write)(path) as file:
        file.write(to_json(content, indent))


def to_json(content: Any, indent: int | None = None) -> bytes:
    """Returns JSON, with null for what is not finite, and a line break at the end."""
    return json.dumps(_with_null(content), indent=indent, allow_nan=False).encode() + b"\n"


def _with_null(content: Any) -> Any:
    """Returns the content with None for NaN and infinity, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _with_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Any:
    """Returns what `write_json` wrote.

    Raises:
        ValueError: if the file does not exist, is not JSON, or does not match its checksum.
    """
    try:
        return json.loads(read_checked(path) if _is_of_a_run(path) else path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} cannot be read ({reason}); restore a copy, or remove it and create it again"
        ) from None


def noted(folder: Path) -> dict[str, list[str]]:
    """Returns the recorded checksums of a folder by file name; empty if there are none.

    Raises:
        ValueError: if the record itself is damaged.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
        files = content["files"]
        whole = content["sha256"] == _of(files)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole, files = False, {}
    if not whole:
        raise ValueError(f"{path} is damaged; restore it, or delete it to use the files beside it unchecked")
    return files


def note_all(folder: Path, names: list[str]) -> None:
    """Records the checksums of the named files as they are, and drops all others."""
    _write(folder, {name: [digest((folder / name).read_bytes())] for name in names})


def damaged(path: Path) -> str:
    return (
        f"{path} does not match its checksum. Restore a copy; if you changed it yourself, delete {path.parent / NAME} "
        "to use it unchecked"
    )


def warn_unchecked(path: Path) -> None:
    """Warns of a folder without checksums, or of a file without one in a folder that has some, once in a process."""
    what = path if (path.parent / NAME).exists() else path.parent
    warnings.warn(f"{what} has no checksum, as in earlier versions: damage would go unnoticed", stacklevel=1)


def _is_of_a_run(path: Path) -> bool:
    return any((path.parent / name).exists() for name in (NAME, "config.json"))


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Locks a folder, so that one process at a time is inside, if the system supports such locks."""
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fd = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def _noted_or_none(folder: Path) -> dict[str, list[str]]:
    try:
        return noted(folder)
    except ValueError:
        return {}


def _of_what_is_there(path: Path, files: dict[str, list[str]]) -> list[str]:
    """Returns the checksum of the file to be replaced, if the file exists and matches its record."""
    try:
        present = digest(path.read_bytes())
    except OSError:
        return []
    return [present] if present in files.get(path.name, [present]) else []


def _write(folder: Path, files: dict[str, list[str]]) -> None:
    with atomic_write(folder / NAME) as file:
        content = {"about": _ABOUT, "files": files, "sha256": _of(files)}
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def _of(files: dict[str, list[str]]) -> str:
    return digest(json.dumps(files, sort_keys=True).encode())
