"""Films from files, folders and globs, as grey frames (T, H, W), float32 in [0, 1]."""

import gc
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_pixels.video.formats import (
    ALL,
    ANIMATIONS,
    ARRAYS,
    FORMATS,
    MOVIES,
    PICTURES,
    RawFilm,
    View,
    join,
    read_file,
)

HOT = 4  # an isolated pixel is clipped if it is this many times as bright as any two neighbours

Film = NDArray[np.float32]


def read_films(paths: str | Path | Sequence[str | Path], *, axes: str | None = None) -> list[Film]:
    """Reads films (T, H, W), grey, float32 in [0, 1].

    Bytes are divided by 255, unless none exceeds 1; integers that exceed 255, by the largest value of all films.

    Args:
        paths: a file, a folder of pictures (in natural order: 2 before 10) or of films, a glob such as ``"run*.png"``,
            or several of these. A ``.npy`` or ``.npz`` holds (T, H, W), (n, T, H, W), or either with colours last;
            (T, 1, H, W) and (T, 3, H, W) are one film with its colours first, except in files for ``--data``.
        axes: the axes of arrays, in the letters N, T, H, W and C, such as ``"HWT"``; default: as above.

    Raises:
        ValueError: if there is no such file, its format or the range of its values is unknown, its frames differ in
            size or type, or a library is missing.
    """
    return [film for film, _, _ in read_with_origins(paths, axes=axes)]


class Origin(NamedTuple):
    """The place from which a film was read, so that it alone can be read again."""

    path: str
    """Absolute: a file, a folder, or a glob."""
    index: int
    """The film's index among those that `read_films` finds there."""


class ReadFilm(NamedTuple):
    """A film as a view shows it."""

    frames: Film
    origin: Origin
    size: tuple[int, int]
    """(H, W) of the film itself."""


def read_with_origins(
    paths: str | Path | Sequence[str | Path], *, axes: str | None = None, view: View = np.asarray
) -> list[ReadFilm]:
    """Reads films as `read_films` does, each frame through ``view``, and returns each with its `Origin`."""
    given = [paths] if isinstance(paths, str | Path) else list(paths) if isinstance(paths, Iterable) else [paths]
    for path in given:
        if not isinstance(path, str | Path):
            raise ValueError(
                f"paths has a {type(path).__name__}; wanted names of files, folders or globs (numpy.save writes arrays)"
            )
    found: list[tuple[RawFilm, Origin]] = []
    gc.freeze()  # pyav's plugin collects garbage at every film, which is slow among all objects of torch
    try:
        for path in given:
            found += _read(str(path), axes, view)
    finally:
        gc.unfreeze()
    if not found:
        raise ValueError("there are no films; give at least one file, folder or glob")
    groups = ["" if _is_wide(x) else origin.path for x, origin in found]  # of films with one scale
    top: dict[str, float] = {}
    for (x, _), group in zip(found, groups):
        top[group] = float(np.maximum(top.get(group, 0.0), _brightest(x)))
    films = []
    for group in groups:  # each raw film is freed once it is scaled
        x, origin = found.pop(0)
        films.append(ReadFilm(to_unit(x, top[group], origin.path, view), origin, x.size))
    return films


def read_part(origin: Origin, part: range, *, axes: str | None = None) -> Film:
    """Reads the frames ``part`` of a film again. Movies are read only up to there; errors as in `read_films`."""
    found = [film for film, _ in _read(origin.path, axes, part=part)]
    top = float(np.max([_brightest(film) for film in found]))
    film = found[origin.index]
    frames = film.frames[max(0, part.start - film.first) : part.stop - film.first]
    return to_unit(film._replace(frames=frames), top, origin.path)


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


def _read(path: str, axes: str | None, view: View = np.asarray, part: range = ALL) -> list[tuple[RawFilm, Origin]]:
    """Returns raw films; ``part`` concerns single files that are movies or animations."""
    where = Path(path)

    def of_file(file: Path, part: range = ALL) -> list[tuple[RawFilm, Origin]]:
        return [(film, Origin(str(file.absolute()), i)) for i, film in enumerate(read_file(file, axes, view, part))]

    if where.is_dir():
        files = sorted((p for p in where.iterdir() if p.is_file() and not p.name.startswith(".")), key=_natural)
    elif where.is_file():
        return of_file(where, part)
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
        raise ValueError(f"{path} has no pictures or films; wanted {FORMATS}")
    found = [film for p in pictures for film in of_file(p)]
    if len(found) > 1 and all(len(film.frames) == 1 for film, _ in found):
        return [(join([film for film, _ in found], path), Origin(str(where.absolute()), 0))]
    return found


def _is_wide(film: RawFilm) -> bool:
    return film.top is None and film.frames.dtype.kind in "iu"


def _brightest(film: RawFilm) -> float:
    """Returns the largest value; a hot pixel, far brighter than any two neighbouring pixels, counts as those."""
    x = film.frames
    if film.top is not None:
        return film.top
    top = float(x.max())
    if x.dtype.kind not in "iu":
        return top
    pairs = [float(np.minimum(a, b).max(initial=0)) for f in x for a, b in ((f[1:], f[:-1]), (f[:, 1:], f[:, :-1]))]
    return top if top <= HOT * max(pairs) else max(pairs) or top


def to_unit(film: RawFilm, top: float, where: str, view: View = np.asarray) -> Film:
    """Scales a film to [0, 1] if ``top``, the largest of all films of one scale, exceeds 1: by 255, or by it if above.

    Frames that are not bytes are seen through ``view`` afterwards, where hot pixels are clipped.

    Raises:
        ValueError: if values are negative or not finite, or if floats exceed 255.
    """
    x = film.frames
    if film.top is not None:
        return (x if top <= 1 else x / np.float32(255)).astype(np.float32, copy=False)
    low, whole = float(x.min()), x.dtype.kind in "iu"
    if not (low >= 0 and (whole or top <= 255)):
        raise ValueError(
            f"{where} has values from {low:g} to {top:g}; wanted bytes, or numbers from 0 to 1; rescale them"
        )
    scale = np.float32(1 if top <= 1 else top if whole and top > 255 else 255)
    unit = ((f / scale).astype(np.float32, copy=False) for f in x)
    return np.stack([view(np.minimum(f, 1, out=f)).astype(np.float32, copy=False) for f in unit])


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Returns a key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]
