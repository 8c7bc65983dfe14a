"""SHA-256 of the files of a folder, in its checksums.json: a file that was damaged is refused before it is used.

A checksum is noted before its file takes its name, beside that of the file which is there until then, so that whenever
the process is killed the file that is there is one of those noted. Processes that write different files of one folder,
as a training and an evaluation do, note them in turn. Files that are not noted, as those of version 0.1, are read with
a warning.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pyro_pixels._files import atomic_write, fcntl

NAME = "checksums.json"
TRIES = 5  # a file may be replaced while it is read
_ABOUT = "SHA-256 of the files beside this one: what each may have. Delete this file to use them unchecked."


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def checked_write(path: str | Path) -> Iterator[IO[bytes]]:
    """`atomic_write` of a file whose checksum is noted beside it."""
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
    """The content of a file, its checksum verified where there is one.

    Raises:
        ValueError: if it is not what was written.
        OSError: if it cannot be read.
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
    """Writes JSON; an older file stays until the new one is whole. In the folder of a run its checksum is noted."""
    with (checked_write if _is_of_a_run(path) else atomic_write)(path) as file:
        file.write(json.dumps(content, indent=indent).encode() + b"\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        ValueError: if there is no such file, it is no JSON, or it is not what was written.
    """
    try:
        return json.loads(read_checked(path) if _is_of_a_run(path) else path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} cannot be read ({reason}); restore a copy, or remove it and make it anew") from None


def noted(folder: Path) -> dict[str, list[str]]:
    """The checksums of a folder, by the names of its files; none where nothing was noted.

    Raises:
        ValueError: if they are damaged themselves.
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
    """Notes the checksums of files as they are, and of no others."""
    _write(folder, {name: [digest((folder / name).read_bytes())] for name in names})


def damaged(path: Path) -> str:
    return (
        f"{path} is not what was written: its checksum is another. Restore a copy; if you changed it yourself, delete "
        f"{path.parent / NAME} to use it unchecked"
    )


def warn_unchecked(path: Path) -> None:
    """Warns once in a process of a folder without checksums, and of each file that others beside it have noted."""
    what = path if (path.parent / NAME).exists() else path.parent
    warnings.warn(f"{what} has no checksum, as in earlier versions: damage would go unnoticed", stacklevel=1)


def _is_of_a_run(path: Path) -> bool:
    return any((path.parent / name).exists() for name in (NAME, "config.json"))


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Only one process at a time has it for a folder, where the system has such locks."""
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
    """The checksum of the file that is to be replaced, if it is a good one."""
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
