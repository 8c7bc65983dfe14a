"""Atomic writing of files.

An unfinished file has an unpredictable name, ``.NAME.<16 hex digits>.part``, in the folder of the final file. It is
opened with O_EXCL, so it follows no symbolic link and overwrites nothing. Its writer holds a lock on it, if the system
supports such locks, so that the parts of killed writers are recognised and removed the next time a process writes to
the folder.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None

_PART = re.compile(r"\..+\.(?:(?P<token>[0-9a-f]{16})|(?P<pid>\d{1,10}))\.part")  # the latter from version 0.1
_swept: set[Path] = set()


class CannotWrite(OSError, ValueError):
    """A file could not be written: no such folder, no permission, or a full disk; an older file is left unchanged."""


@contextmanager
def atomic_write(path: str | Path, *, before: Callable[[Path], None] | None = None) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces ``path`` only once it is complete; until then an older file there stays.

    Args:
        before: called with the temporary path of the complete file, before it is renamed.

    Raises:
        CannotWrite: if the folder cannot be created or written to, or the disk is full. It is a ValueError.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        part, file = _new_part(path)
    except OSError as error:
        raise CannotWrite(f"cannot write {path} ({error.strerror}); choose a folder that can be written to") from None
    held = None if fcntl is None else os.dup(file.fileno())  # holds the lock until the part is renamed
    try:
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if isinstance(error, CannotWrite) or error.errno is None:
                raise
            raise CannotWrite(f"cannot write {path} ({error.strerror}); {_as_it_was(path)}") from None
        if before is not None:
            before(part)
        try:
            os.replace(part, path)
        except OSError as error:
            raise CannotWrite(f"cannot write {path} ({error.strerror}); choose another name") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def sweep(folder: str | Path, again: bool = False) -> list[Path]:
    """Removes parts of dead writers from a folder and returns their paths; once per process unless ``again`` is set."""
    folder = Path(folder).absolute()
    if folder in _swept and not again:
        return []
    _swept.add(folder)
    removed = []
    for part in folder.glob(".*.part"):
        match = _PART.fullmatch(part.name)
        if match is not None and (_is_alone(part) if match["token"] else not _is_running(int(match["pid"]))):
            with suppress(OSError):
                part.unlink(missing_ok=True)
                removed.append(part)
    return removed


def _new_part(path: Path) -> tuple[Path, IO[bytes]]:
    """Returns a new file in the folder of ``path``, locked by this process."""
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:  # pragma: no cover  # one in 2^64
            continue
        file = os.fdopen(fd, "wb")
        if fcntl is None:  # pragma: no cover
            return part, file
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return part, file
        file.close()  # swept by another process before it was locked


def _is_alone(part: Path) -> bool:
    """Tells whether no process is writing a part, which is then removed."""
    if fcntl is None:  # pragma: no cover
        return False
    try:
        fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink(missing_ok=True)  # while locked: a writer that was about to lock it makes another
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _as_it_was(path: Path) -> str:
    return "the existing file is unchanged" if path.exists() else "no file was written"
