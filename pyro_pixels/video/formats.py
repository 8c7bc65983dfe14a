"""Grey frames from single files: GIF, APNG, MP4 and similar, TIFF, pictures, and NumPy arrays.

A film need not fit into memory: of frames of bytes, as those of movies, only what a view makes of each is kept. Other
types are kept as they are, since their scale depends on the largest value.

The formats are read by imageio with its pyav plugin, tifffile and scikit-image, of the extra `video`; they are imported
only when needed.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_pixels._arrays import read_arrays

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MOVIES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
ANIMATIONS = {".gif", ".apng", ".webp"}
ARRAYS = {".npy", ".npz"}
FORMATS = sorted(PICTURES | MOVIES | ANIMATIONS | ARRAYS)
LUMA = np.array([0.2125, 0.7154, 0.0721], np.float32)  # as in scikit-image's rgb2gray

ALL = range(sys.maxsize)

View = Callable[[NDArray[Any]], NDArray[Any]]
"""What is kept of a frame (H, W), linear in its values, such as a part of it at a lower resolution."""


class RawFilm(NamedTuple):
    """A film, grey, on the scale of its file."""

    frames: NDArray[Any]
    """(T, H, W), of the file's own type; of bytes, what the view made of them."""
    size: tuple[int, int]
    """(H, W) of the file's frames."""
    top: int | None
    """The largest byte; None for other types."""
    first: int = 0
    """The index in the file of the first frame of ``frames``."""


def optional(name: str) -> Any:
    """Imports a module of the extra `video`; a ValueError says how to install it if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"reading and preparing films needs {name.split('.')[0]}; install pyro_pixels with its extra 'video', from "
            'the repository by pip install -e ".[video]"'
        ) from None


def read_file(path: Path, axes: str | None = None, view: View = np.asarray, part: range = ALL) -> list[RawFilm]:
    """Reads the films of a file; a picture is a film of one frame. Errors as in `read_films`.

    Args:
        path: the file.
        axes: as in `read_films`.
        view: applied to each frame of bytes.
        part: the frames that are wanted; others may be read as well.
    """
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        x, known = _load_array(path)
        return [collect(film, str(path), view) for film in _from_array(x, axes or known, str(path))]
    if suffix in {".tif", ".tiff"}:
        return [collect(film, str(path), view) for film in _from_tiff(path)]
    if suffix in MOVIES:
        return [collect(_movie(path), str(path), view, part)]
    if suffix not in ANIMATIONS | PICTURES:
        raise ValueError(f"{path.name} has an unknown format; wanted {FORMATS}")
    return [collect((_animation if suffix in ANIMATIONS else _pictures)(path), str(path), view, part)]


def collect(frames: Iterable[NDArray[Any]], where: str, view: View = np.asarray, part: range = ALL) -> RawFilm:
    """Makes a film of frames (H, W), whose memory is needed only while the next is read, if they are bytes.

    Raises:
        ValueError: if there are no frames in ``part`` or frames differ in size or type.
    """
    kept, sizes, types, top, n = [], set(), set(), 0, 0
    for frame in frames:
        sizes.add(frame.shape)
        types.add(str(frame.dtype))
        top = max(top, int(frame.max())) if frame.dtype == np.uint8 else top
        if n in part:
            kept.append(view(frame) if frame.dtype == np.uint8 else frame)
        n += 1
        if n >= part.stop and top > 1:  # the scale is known
            break
    if not kept:
        raise ValueError(f"{where} has no frames" + (f" from {part.start} on" if n else ""))
    _check_alike(sizes, types, where)
    if types == {"uint8"}:
        return RawFilm(np.stack(kept), sizes.pop(), top, part.start)
    return RawFilm(frames if isinstance(frames, np.ndarray) else np.stack(kept), sizes.pop(), None, part.start)


def join(films: Sequence[RawFilm], where: str) -> RawFilm:
    """Makes one film of several. Errors as in `collect`."""
    _check_alike({f.size for f in films}, {str(f.frames.dtype) if f.top is None else "uint8" for f in films}, where)
    tops = [film.top for film in films if film.top is not None]
    return RawFilm(np.concatenate([film.frames for film in films]), films[0].size, max(tops, default=None))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of readers, which are of any kind for damaged files, into a ValueError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); is it complete?") from None


def _check_alike(sizes: set[Any], types: set[str], where: str) -> None:
    if len(sizes) > 1:
        raise ValueError(f"{where}: frames differ in size, {sorted(sizes)[:3]}; wanted frames of one size")
    if len(types) > 1:
        raise ValueError(
            f"{where}: frames differ in type, {sorted(types)}; wanted one number of bits, so convert some of them"
        )


def _movie(path: Path) -> Iterator[NDArray[Any]]:
    imageio, av = optional("imageio.v3"), optional("av")
    with _reading(path):
        with av.open(str(path)) as container:
            first = next(container.decode(video=0), None)
        turns = round(getattr(first, "rotation", 0) / 90)  # by which players turn it, counter-clockwise
        for frame in imageio.imiter(path, plugin="pyav"):
            yield np.rot90(to_grey(frame, True), turns)


def _pictures(path: Path) -> Iterator[NDArray[Any]]:
    """Yields a picture, or several in one file, turned as the camera was held."""
    imageio, orientation = optional("imageio.v3"), 1
    with _reading(path), imageio.imopen(path, "r", plugin="pillow") as file:
        for t, frame in enumerate(file.iter()):
            orientation = _orientation(file) if t == 0 else orientation
            yield upright(to_grey(frame, frame.ndim == 3), orientation)


def _animation(path: Path) -> Iterator[NDArray[Any]]:
    """Yields the frames of an animation; what is transparent has one grey value, whichever colours are hidden there."""
    imageio, orientation, below = optional("imageio.v3"), 1, None
    with _reading(path):
        small = _starts_small(path)
    if small:
        optional("av")
    with _reading(path), imageio.imopen(path, "r", plugin="pillow") as file:
        for t, frame in enumerate(_on_a_canvas(path, file) if small else file.iter(mode="RGBA")):
            orientation = _orientation(file) if t == 0 else orientation
            grey, hidden = to_grey(frame, True), frame[..., 3] == 0
            if below is None and hidden.any():
                below = grey[hidden][0]
            yield upright(grey if below is None else np.where(hidden, below, grey), orientation)


def _orientation(file: Any) -> int:
    """Returns the tag of the first picture in imageio's open file, once it is read: the tag may stand behind it."""
    return file.metadata(index=0, exclude_applied=False).get("Orientation", 1)


def _starts_small(path: Path) -> bool:
    """Tells whether a file is a GIF whose first frame does not fill the canvas."""
    with optional("PIL.Image").open(path) as picture:
        return picture.format == "GIF" and any(tile[1] != (0, 0, *picture.size) for tile in picture.tile)


def _on_a_canvas(path: Path, file: Any) -> Iterator[NDArray[Any]]:
    """Yields the frames (H, W, 4) of such a GIF by pyav; Pillow, which leaves trails, finds damage."""
    frames = optional("imageio.v3").imiter(path, plugin="pyav", format="rgba")
    for t, by_pillow in enumerate(file.iter(mode="RGBA")):
        frame = next(frames, None)
        if frame is None:
            raise ValueError(f"frame {t + 1} is damaged")
        hidden = by_pillow[..., :3] if t == 0 else 0  # the colour of what is transparent
        yield np.dstack([np.where(frame[..., 3:] == 0, hidden, frame[..., :3]), frame[..., 3]]).astype(np.uint8)


def upright(x: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Returns pictures (..., H, W) as they are to be seen, given their tag Orientation of EXIF and TIFF, 1 to 8."""
    turns, mirrored = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True),
                       8: (1, False)}.get(orientation, (0, False))  # fmt: skip
    if mirrored:
        x = x[..., ::-1]
    return np.rot90(x, turns, (-2, -1)) if turns else x


def _from_tiff(path: Path) -> list[NDArray[Any]]:
    """Reads all pages as one film, or one film per series, such as a position of the stage, of an OME-TIFF."""
    tifffile = optional("tifffile")
    with _reading(path), tifffile.TiffFile(path) as file:
        found = [
            (s.asarray(), s.axes, s.keyframe.tags.valueof("Orientation", 1))
            for s in file.series
            if not s.keyframe.is_reduced  # a thumbnail is
        ]
        separate = bool(file.is_ome)
    films = []
    for x, axes, orientation in found:
        if "S" in axes:  # samples, such as colours
            x, axes = np.moveaxis(x, axes.index("S"), -1), axes.replace("S", "")
            x = to_grey(x, True)
        if x.ndim not in (2, 3):
            raise ValueError(f"{path} has the axes {axes}; wanted the picture's axes and one for time")
        films.append(upright(x.reshape(-1, *x.shape[-2:]), orientation))
    if not films:
        raise ValueError(f"{path} has no frames")
    if separate:
        return films
    _check_alike({x.shape[1:] for x in films}, {str(x.dtype) for x in films}, str(path))
    return [np.concatenate(films)]


def _load_array(path: Path) -> tuple[NDArray[Any], str | None]:
    """Returns an array, and its axes if it lies in a file for ``--data``, which has numbers of objects."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False), None
        arrays = read_arrays(path)
        name = "images" if "images" in arrays else next(iter(arrays))
        if name != "images" and len(arrays) > 1:
            raise ValueError(f"has the arrays {sorted(arrays)}; name the film's array 'images'")
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as an array: {_first_line(error)}") from None
    x = arrays[name]
    ours = "n_objects" in arrays and x.ndim == 4 and arrays["n_objects"].shape == x.shape[:1]
    return x, "NTHW" if ours else None


def _from_array(x: NDArray[Any], axes: str | None, where: str) -> list[NDArray[Any]]:
    if x.dtype.kind not in "buif":
        raise ValueError(f"{where} has the type {x.dtype}; wanted numbers")
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
    return list(x) if many else [x]


def to_grey(x: NDArray[Any], colour: bool) -> NDArray[Any]:
    """Converts colours in the last axis, if there are any, to luminance and drops transparency; bits become bytes."""
    if colour and x.shape[-1] in (1, 2):
        x = x[..., 0]
    elif colour and x.dtype.kind == "f":
        x = x[..., :3] @ LUMA
    elif colour:
        x = (x[..., :3].astype(np.float32) @ LUMA).round().astype(x.dtype)
    return x * np.uint8(255) if x.dtype == bool else x


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
