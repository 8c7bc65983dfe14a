"""Locks of folders: a second training in the same folder is refused before it has written anything.

The operating system holds the lock, on the file ``.lock`` in the folder, and releases it however the process ends, so
there are no stale locks. Within a thread the lock is reentrant.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pyro_pixels._files import CannotWrite

NAME = ".lock"
_inodes: dict[Path, int] = {}  # of the locks of this process, to detect replaced folders


class FolderGone(CannotWrite):
    """A folder that this process had locked was removed or replaced by another."""


@contextmanager
def locked(*folders: str | Path | None) -> Iterator[None]:
    """Locks folders for this process and creates them if needed; None is skipped.

    Raises:
        ValueError: if another process has locked one of them, one is given twice, or one cannot be written to.
    """
    paths = [Path(folder).absolute() for folder in folders if folder is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given as the folder of two trainings; wanted a separate folder for each")
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(_locked(path))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is being trained{_by(path)}; wait until it has finished, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(f"cannot write to {folder} ({reason}); choose a folder that can be written to") from None
    outermost = folder not in _inodes
    try:
        if outermost:
            with suppress(OSError):  # on a full disk: the lock matters, not its content
                path.write_text(f"{os.getpid()}\n")
            _inodes[folder] = path.stat().st_ino
        yield
    finally:
        if outermost:
            _inodes.pop(folder, None)
        lock.release()


def check_still_there(folder: str | Path) -> None:
    """Raises `FolderGone`, a ValueError, if a folder that this process has locked was removed or replaced."""
    wanted = _inodes.get(Path(folder).absolute())
    if wanted is None:
        return
    try:
        same = (Path(folder) / NAME).stat().st_ino == wanted
    except OSError:
        same = False
    if not same:
        raise FolderGone(
            f"{folder} was removed during training, and its contents are lost; train again, in a folder that stays"
        )


def _by(path: Path) -> str:
    try:
        return f" by process {int(path.read_text())}"
    except (OSError, ValueError):
        return ""
