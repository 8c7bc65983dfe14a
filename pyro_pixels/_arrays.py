"""Safe reading of .npz files: no array is unpacked before its size is known and within a limit.

A file of a few megabytes can claim terabytes in a header, or unpack to gigabytes. So the header of every array is read
first. Its shape and type must agree with the size of its entry, and the total size must stay below a limit.
"""

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 32 * 2**30
"""The largest total size of the arrays in a file, unpacked, and of the images simulated at once: 32 GiB."""
MAX_ENTRIES = 10_000
_KINDS = "biufcSUMm"  # booleans, integers, floats, complex numbers, strings, times; no objects or records


class Header(NamedTuple):
    """The header of an array, read before its data."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_arrays(
    path: str | Path, content: bytes | None = None, *, max_bytes: int = MAX_BYTES, names: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Returns the arrays of an .npz, or those listed in ``names`` that it has.

    Args:
        path: the path of the file, for messages, and to read from if ``content`` is not given.
        max_bytes: the largest total size of the arrays that are read, unpacked.

    Raises:
        ValueError: if the file is not an .npz of arrays, is damaged, or is larger than ``max_bytes``.
        FileNotFoundError: if there is no such file.
    """
    try:
        with zipfile.ZipFile(path if content is None else io.BytesIO(content)) as archive:
            headers = {name: _header(archive, name) for name in _entries(archive)}
            wanted = {name: header for name, header in headers.items() if names is None or name in names}
            total = sum(header.n_bytes for header in wanted.values())
            if total > max_bytes:
                raise _TooLarge(
                    f"{path} holds arrays of {total:,} bytes, more than max_bytes, {max_bytes:,}; wanted a smaller "
                    "file, or a larger limit"
                )
            return {name: _array(archive, name, header) for name, header in wanted.items()}
    except (FileNotFoundError, _TooLarge):
        raise
    except MemoryError:
        raise ValueError(f"{path} does not fit in memory; wanted a smaller file") from None
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as an .npz of arrays ({reason}); write it with numpy.savez_compressed"
        ) from None


class _TooLarge(ValueError):
    pass


def _entries(archive: zipfile.ZipFile) -> list[str]:
    entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    if not entries:
        raise ValueError("it holds no arrays")
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"it holds {len(entries):,} arrays")
    return [entry.filename.removesuffix(".npy") for entry in entries]


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(f"{name}.npy") as file:
        header = _read_header(file, name)
        size = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if header.n_bytes != size:
        raise ValueError(f"{name} has {header.n_bytes:,} bytes by its header but {size:,} in the file")
    return header


def _read_header(file: IO[bytes], name: str) -> Header:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{name} has the unknown format {version}")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(
            f"{name} holds Python objects, perhaps sequences of unequal length; pad those with "
            "ImageSequences(list_of_arrays, n_objects), and write them with save_sequences"
        )
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name} has type {dtype}; wanted numbers")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has shape {shape}")
    return Header(shape, dtype, fortran_order)


def _array(archive: zipfile.ZipFile, name: str, header: Header) -> NDArray[Any]:
    """Reads an array with a known header, up to its end, so that zipfile verifies its checksum."""
    array = np.empty(math.prod(header.shape), header.dtype)
    with archive.open(f"{name}.npy") as file:
        _read_header(file, name)
        view = array.view(np.uint8) if header.n_bytes else np.empty(0, np.uint8)
        done = 0
        while done < len(view):
            chunk = file.read(min(len(view) - done, 2**24))
            if not chunk:
                raise ValueError(f"{name} ends after {done:,} of {len(view):,} bytes")
            view[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        if file.read(1):
            raise ValueError(f"{name} is longer than its header says")
    return array.reshape(header.shape, order="F" if header.fortran_order else "C")
