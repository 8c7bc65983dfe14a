"""Films from files: GIF, APNG, MP4 and similar, TIFF, folders and globs of pictures, and NumPy arrays.

All films become grey frames (T, H, W), float32 in [0, 1]. The formats are read by imageio with its pyav plugin,
tifffile and scikit-image, which ``pip install "pyro_pixels[video]"`` installs; they are imported only when needed.
"""

import gc
import glob
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_pixels._arrays import read_arrays

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MOVIES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
ANIMATIONS = {".gif", ".apng", ".webp"}
ARRAYS = {".npy", ".npz"}
LUMA = np.array([0.2125, 0.7154, 0.0721], np.float32)  # as in scikit-image's rgb2gray

Film = NDArray[np.float32]


def optional(name: str) -> Any:
    """Imports a module of the `video` extra; a ValueError names what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f'reading and preparing films needs {name.split(".")[0]}; pip install "pyro_pixels[video]"'
        ) from None


def read_films(paths: str | Path | Sequence[str | Path], *, axes: str | None = None) -> list[Film]:
    """Reads films (T, H, W), grey, float32 in [0, 1].

    Args:
        paths: a file, a folder of pictures (in natural order: 2 before 10) or of films, a glob such as ``"run*.png"``,
            or several of these. A ``.npy`` or ``.npz`` holds (T, H, W), (n, T, H, W), or either with colours last.
        axes: the axes of arrays, in the letters N, T, H, W and C, such as ``"HWT"``; default: as above.

    Raises:
        ValueError: if there is no such file, its format or the range of its values is unknown, or a library is missing.
    """
    return [film for film, _ in read_with_origins(paths, axes=axes)]


class Origin(NamedTuple):
    """The place from which a film was read, so that it alone can be read again."""

    path: str
    """Absolute: a file, a folder, or a glob."""
    index: int
    """The film's index among those that `read_films` finds there."""


def read_with_origins(
    paths: str | Path | Sequence[str | Path], *, axes: str | None = None
) -> list[tuple[Film, Origin]]:
    """Reads films as `read_films` does, and returns each with its `Origin`."""
    found: list[tuple[Film, Origin]] = []
    gc.freeze()  # pyav's plugin collects garbage at every film, which is slow among all objects of torch
    try:
        for path in [paths] if isinstance(paths, str | Path) else paths:
            found += _read(str(path), axes)
    finally:
        gc.unfreeze()
    if not found:
        raise ValueError("there are no films; give at least one file, folder or glob")
    return found


def reads(source: str | Path, path: Path) -> bool:
    """Tells whether reading a source, a file, folder or glob, reads a picture, film or array at ``path`` too."""
    where = Path(source)
    if where.is_dir():
        return path.resolve().parent == where.resolve()
    if where.is_file():
        return path.resolve() == where.resolve()
    return _is_glob(where) and Path(os.path.abspath(path)).match(os.path.abspath(where))


def _is_glob(path: Path) -> bool:
    return any(c in str(path) for c in "*?[")


def _read(path: str, axes: str | None) -> list[tuple[Film, Origin]]:
    where = Path(path)

    def of_file(file: Path) -> list[tuple[Film, Origin]]:
        return [(film, Origin(str(file.absolute()), i)) for i, film in enumerate(_read_file(file, axes))]

    if where.is_dir():
        files = sorted((p for p in where.iterdir() if p.is_file()), key=_natural)
    elif where.is_file():
        return of_file(where)
    elif _is_glob(where):
        files = sorted((Path(p) for p in glob.glob(path)), key=_natural)
    else:
        raise ValueError(f"there is no file or folder {path}")
    pictures = [p for p in files if p.suffix.lower() in PICTURES]
    films = [p for p in files if p.suffix.lower() in MOVIES | ANIMATIONS | ARRAYS]
    if pictures and films:
        raise ValueError(
            f"{path} has pictures and films, such as {pictures[0].name} and {films[0].name}; give one kind"
        )
    if films:
        return [film for p in films for film in of_file(p)]
    if not pictures:
        raise ValueError(f"{path} has no pictures or films; wanted {sorted(PICTURES | MOVIES | ANIMATIONS | ARRAYS)}")
    if len(pictures) > 1:
        frames = [_read_picture(p) for p in pictures]
        if all(f.ndim == 2 or f.shape[-1] in (3, 4) for f in frames):
            sizes = {f.shape[:2] for f in frames}
            if len(sizes) > 1:
                raise ValueError(f"{path}: pictures differ in size, {sorted(sizes)[:3]}; wanted frames of one size")
            grey = [to_grey(f, f.ndim == 3) for f in frames]
            return [(to_unit(np.stack(grey), path), Origin(str(where.absolute()), 0))]
    return [film for p in pictures for film in of_file(p)]


def _read_file(path: Path, axes: str | None) -> list[Film]:
    suffix = path.suffix.lower()
    try:
        if suffix in ARRAYS:
            return _from_array(_load_array(path), axes, str(path))
        if suffix in {".tif", ".tiff"}:
            return [_from_tiff(path)]
        if suffix in MOVIES:
            optional("av")
            frames = list(optional("imageio.v3").imiter(path, plugin="pyav"))
        elif suffix in ANIMATIONS | PICTURES:
            frames = list(optional("imageio.v3").imiter(path, plugin="pillow", mode="RGB"))
        else:
            raise ValueError(
                f"{path.name} has an unknown format; wanted {sorted(PICTURES | MOVIES | ANIMATIONS | ARRAYS)}"
            )
    except ValueError:
        raise
    except Exception as error:  # damaged files make readers raise errors of any kind
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); is it complete?") from None
    if not frames:
        raise ValueError(f"{path} has no frames")
    return [to_unit(np.stack([to_grey(f, f.ndim == 3) for f in frames]), str(path))]


def _load_array(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        arrays = read_arrays(path)
        name = "images" if "images" in arrays else next(iter(arrays))
        if name != "images" and len(arrays) > 1:
            raise ValueError(f"has the arrays {sorted(arrays)}; name the film's array 'images'")
        return arrays[name]
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as an array: {_first_line(error)}") from None


def _from_array(x: NDArray[Any], axes: str | None, where: str) -> list[Film]:
    if axes is not None:
        letters = axes.upper()
        if len(letters) != x.ndim or len(set(letters)) != x.ndim or not {"T", "H", "W"} <= set(letters) <= set("NTHWC"):
            raise ValueError(f"axes is '{axes}' for an array of shape {x.shape}; wanted letters of NTHWC, one per axis")
        x = x.transpose([letters.index(c) for c in "NTHWC" if c in letters])
        colour, many = "C" in letters, "N" in letters
    else:
        colour = x.ndim >= 4 and x.shape[-1] in (1, 3, 4)
        if x.ndim == 4 and not colour and x.shape[1] in (1, 3) and min(x.shape[2:]) >= 8:  # colours first
            x, colour = np.moveaxis(x, 1, -1), True
        many = x.ndim - colour == 4
    if x.ndim != 3 + colour + many or 0 in x.shape:
        raise ValueError(f"{where} has shape {x.shape}; wanted (T, H, W) or (n, T, H, W), colours last, or --axes")
    x = to_grey(x, bool(colour))
    unit = to_unit(x, where)
    return list(unit) if many else [unit]


def _from_tiff(path: Path) -> Film:
    with optional("tifffile").TiffFile(path) as file:
        series = file.series[0]
        x, axes = series.asarray(), series.axes
    colour = axes.endswith("S")
    x = to_grey(x, colour)
    if x.ndim == 2:
        raise ValueError(f"{path} has one frame; give a multi-page TIFF, or a folder or glob of pictures")
    if x.ndim != 3:
        raise ValueError(f"{path} has the axes {axes}; wanted the picture's axes and one for time")
    return to_unit(x, str(path))


def _read_picture(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() in {".tif", ".tiff"}:
            return optional("tifffile").imread(path)
        return optional("imageio.v3").imread(path)
    except (OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); is it complete?") from None


def to_grey(x: NDArray[Any], colour: bool) -> NDArray[Any]:
    """Converts colours in the last axis, if there are any, to luminance and drops transparency."""
    if not colour:
        return x
    if x.shape[-1] in (1, 2):
        return x[..., 0]
    return x[..., :3] @ LUMA if x.dtype.kind == "f" else (x[..., :3].astype(np.float32) @ LUMA).round().astype(x.dtype)


def to_unit(x: NDArray[Any], where: str = "the film") -> Film:
    """Scales values to [0, 1], if they exceed 1: up to 255 by 255, larger integers by the largest value of their film.

    Raises:
        ValueError: if values are negative or not finite, or if floats exceed 255.
    """
    if x.dtype == bool:
        return x.astype(np.float32)
    if x.dtype == np.uint8:
        return (x if x.max() <= 1 else x / np.float32(255)).astype(np.float32)
    low, high = float(x.min()), float(x.max())
    if x.dtype.kind in "iu" and low >= 0:
        return (x / np.float32(max(1.0, 255.0 if 1 < high <= 255 else high))).astype(np.float32)
    if low >= 0 and high <= 1:
        return x.astype(np.float32)
    if low >= 0 and 1 < high <= 255:
        return (x / 255).astype(np.float32)
    raise ValueError(f"{where} has values from {low:g} to {high:g}; wanted bytes, or numbers from 0 to 1; rescale them")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Returns a key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts if p]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
