"""Grey frames from single files: GIF, APNG, MP4 and similar, TIFF, pictures, and NumPy arrays.

The formats are read by imageio with its pyav plugin, tifffile and scikit-image, which
``pip install "pyro_pixels[video]"`` installs; they are imported only when needed.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_pixels._arrays import read_arrays

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MOVIES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
ANIMATIONS = {".gif", ".apng", ".webp"}
ARRAYS = {".npy", ".npz"}
FORMATS = sorted(PICTURES | MOVIES | ANIMATIONS | ARRAYS)
LUMA = np.array([0.2125, 0.7154, 0.0721], np.float32)  # as in scikit-image's rgb2gray

Frames = NDArray[Any]
"""(T, H, W), grey, of the file's own type and scale."""


def optional(name: str) -> Any:
    """Imports a module of the `video` extra; a ValueError names what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f'reading and preparing films needs {name.split(".")[0]}; pip install "pyro_pixels[video]"'
        ) from None


def read_file(path: Path, axes: str | None = None) -> list[Frames]:
    """Reads the films of a file; a picture is a film of one frame. Errors as in `read_films`."""
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        x, known = _load_array(path)
        return _from_array(x, axes or known, str(path))
    if suffix in {".tif", ".tiff"}:
        return _from_tiff(path)
    if suffix in MOVIES:
        return [_from_movie(path)]
    if suffix not in ANIMATIONS | PICTURES:
        raise ValueError(f"{path.name} has an unknown format; wanted {FORMATS}")
    imageio = optional("imageio.v3")
    options: dict[str, Any] = {"mode": "RGB"} if suffix in ANIMATIONS else {"rotate": True}  # as the camera was held
    with _reading(path):
        frames = [to_grey(f, f.ndim == 3) for f in imageio.imiter(path, plugin="pillow", **options)]
    return [stack(frames, str(path))]


def stack(frames: Sequence[NDArray[Any]], where: str) -> Frames:
    """Stacks frames (H, W), or raises a ValueError if there are none or they differ in size or type."""
    if not frames:
        raise ValueError(f"{where} has no frames")
    _check_alike(frames, where)
    return np.stack(frames)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of readers, which are of any kind for damaged files, into a ValueError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); is it complete?") from None


def _check_alike(frames: Sequence[NDArray[Any]], where: str) -> None:
    sizes = sorted({f.shape[-2:] for f in frames})
    if len(sizes) > 1:
        raise ValueError(f"{where}: frames differ in size, {sizes[:3]}; wanted frames of one size")
    types = sorted({str(f.dtype) for f in frames})
    if len(types) > 1:
        raise ValueError(f"{where}: frames differ in type, {types}; wanted one number of bits, so convert some of them")


def _from_movie(path: Path) -> Frames:
    imageio, av = optional("imageio.v3"), optional("av")
    with _reading(path):
        with av.open(str(path)) as container:
            first = next(container.decode(video=0), None)
        turns = round(getattr(first, "rotation", 0) / 90)  # by which players turn it, counter-clockwise
        frames = [np.rot90(to_grey(f, True), turns) for f in imageio.imiter(path, plugin="pyav")]
    return stack(frames, str(path))


def _from_tiff(path: Path) -> list[Frames]:
    """Reads all pages as one film, or one film per series, such as a position of the stage, of an OME-TIFF."""
    tifffile = optional("tifffile")
    with _reading(path), tifffile.TiffFile(path) as file:
        found = [(s.asarray(), s.axes) for s in file.series if not s.keyframe.is_reduced]  # a thumbnail is
        separate = bool(file.is_ome)
    films = []
    for x, axes in found:
        if "S" in axes:  # samples, such as colours
            x, axes = np.moveaxis(x, axes.index("S"), -1), axes.replace("S", "")
            x = to_grey(x, True)
        if x.ndim not in (2, 3):
            raise ValueError(f"{path} has the axes {axes}; wanted the picture's axes and one for time")
        films.append(x.reshape(-1, *x.shape[-2:]))
    if not films:
        raise ValueError(f"{path} has no frames")
    if separate:
        return films
    _check_alike(films, str(path))
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


def _from_array(x: NDArray[Any], axes: str | None, where: str) -> list[Frames]:
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
