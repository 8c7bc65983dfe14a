"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name ``path`` only once it is whole; until then an older file there stays.

    Raises:
        ValueError: if the folder cannot be made or written to.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "wb")  # noqa: SIM115  # closed by the with below; only opening it is tried here
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a folder that can be written to") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(part, path)
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror}); choose another name") from None
    finally:
        part.unlink(missing_ok=True)
