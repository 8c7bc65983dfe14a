"""From films to image sequences for a model: crop, shrink, invert, subtract the background, threshold, count, cut.

`prepare_video` describes what it did in `Prepared.notes` and keeps the map back to the film's own pixels (`Source`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_pixels._arrays import read_arrays
from pyro_pixels._checks import Bounds, check_number, check_value
from pyro_pixels._files import atomic_write
from pyro_pixels.data import ImageSequences
from pyro_pixels.video.check import SMALLEST, count_components, number_of_objects
from pyro_pixels.video.contrast import (
    Background,
    are_darker,
    brightness,
    choose_threshold,
    pixels_of,
    without_background,
)
from pyro_pixels.video.formats import optional
from pyro_pixels.video.read import Origin, read_with_origins
from pyro_pixels.video.source import Source
from pyro_pixels.video.windows import MOST, find_windows, without_dust

COARSE = 1 / 8  # fraction of the film's resolution below which a note warns
WHOLE = 2**31  # size of films that are not shrunk
LONG, CUT = 60, 30  # films of more than LONG frames are cut into sequences of CUT, half overlapping


class Prepared(NamedTuple):
    """Sequences, and how they were made."""

    data: ImageSequences
    notes: list[str]
    """What was done, and what may be wrong, one line each."""
    source: Source
    threshold: float | None
    counts: NDArray[np.int64]
    """(n, T), the number of connected components in each frame, -1 beyond a film's end."""


def load_video(paths: str | Path | Sequence[str | Path], **options: Any) -> ImageSequences:
    """Returns sequences from your own films; options and errors as in `prepare_video`, which also returns notes."""
    return prepare_video(paths, **options).data


def prepare_video(
    paths: str | Path | Sequence[str | Path],
    *,
    n_objects: ArrayLike | None = None,
    size: int | None = None,
    window: int | None = None,
    frames: int | None = None,
    stride: int | None = None,
    crop: tuple[int, int, int, int] | None = None,
    invert: bool | None = None,
    background: Background | None = None,
    threshold: float | None = None,
    grey: bool = False,
    axes: str | None = None,
) -> Prepared:
    """Reads films and converts them to sequences.

    Args:
        paths, axes: as in `read_films`.
        n_objects: one number for all sequences, or one per film or per sequence; default: those stored with the images
            in an .npz, else connected components are counted.
        size: films are shrunk, by area averaging and with their aspect ratio kept, until the longer side is ``size``
            pixels, and padded to a square with black. Smaller films are not enlarged. Default: 32, or with ``window``
            the film's own size.
        window: for crowded films: the side of square windows, in pixels of the shrunk film. Sequences are then windows
            with one to three objects each, as `find_windows` places them.
        frames: T of the sequences into which each film is cut; default: films of up to 60 frames are kept whole, of up
            to 30 with ``window``.
        stride: frames between the starts of successive sequences; default: half of ``frames``.
        crop: (top, bottom, left, right), in the film's pixels.
        invert: whether objects are darker than the background; default: detected.
        background: "keep", or what is subtracted: the "median" over time, or the "local" background of each frame, a
            smoothed grey opening. The latter leaves what is bright and smaller than a quarter of the sequences' size,
            and removes uneven or changing light and out-of-focus neighbours. Default: the median if objects stand out
            better without it.
        threshold: grey value, after all these steps, above which a pixel is white; default: Otsu's.
        grey: keep grey values, for the likelihoods "gaussian" and "continuous_bernoulli".

    Raises:
        ValueError: if a film cannot be read, an option is out of range, no sequence shows an object, or no window
            holds one.
    """
    given = None if n_objects is None else _whole("n_objects", n_objects)
    window = None if window is None else check_number("window", window, 8)
    if window is not None and given is not None:
        raise ValueError(
            f"n_objects is {n_objects} and window is {window}; objects are counted in each window: leave one out"
        )
    size = (32 if window is None else WHOLE) if size is None else check_number("size", size, 8)
    frames = None if frames is None else check_number("frames", frames, 2)
    stride = None if stride is None else check_number("stride", stride, 1)
    threshold = check_value("threshold", threshold, float | None, Bounds(0, 1))
    if background not in (None, *get_args(Background)):
        raise ValueError(f"background is {background!r}; wanted one of {', '.join(get_args(Background))}, or None")
    view = _View(size, None if crop is None else _box(crop))
    read, notes = read_with_origins(paths, axes=axes, view=view), []
    films = [film.frames for film in read]
    if given is None and window is None:
        given = _numbers_beside([film.origin for film in read])
        notes += [] if given is None else ["n_objects is read from the file; override it with --n-objects"]
    shape = read[0].size
    if any(film.size != shape for film in read):
        raise ValueError(
            f"films differ in size, {sorted({film.size for film in read})}; prepare films of one size at a time"
        )
    if any(len(f) < 2 for f in films):
        raise ValueError("a film has 1 frame, which shows no motion; give frames in one file, a folder or a glob")
    top, bottom, left, right = view.box(shape)
    scale = (films[0].shape[2] / (right - left), films[0].shape[1] / (bottom - top))
    seen_as = films[0].shape[1:]
    if window is not None and min(seen_as) < window:
        raise ValueError(
            f"window is {window} for films of {seen_as[0]} x {seen_as[1]} pixels; wanted at most {min(seen_as)}"
        )
    notes.append(f"{_lengths('film', [len(f) for f in films])}, {shape[0]} x {shape[1]} pixels"
                 + ("" if size == WHOLE and crop is None else f", shrunk to {seen_as[0]} x {seen_as[1]}"))  # fmt: skip
    if min(scale) < COARSE:
        notes.append(
            f"a pixel stands for {1 / scale[1]:.0f} x {1 / scale[0]:.0f} of the film's, so smaller objects are lost: "
            "crop to where objects are (--crop), or keep more pixels (--size)"
        )
    excess = [f - np.median(f) for f in films]
    invert = are_darker(films, excess, window) if invert is None else invert
    notes.append(
        f"objects are {'darker' if invert else 'brighter'} than the background{', inverted' if invert else ''}"
    )
    excess = [-x if invert else x for x in excess]
    excess, said = without_background(excess, background, given, window)
    notes.append(said)
    top_value = brightness(excess, window)
    if top_value <= 0:
        raise ValueError("nothing moves or stands out in these films; look at them, or change --crop or --background")
    values = [np.clip(x / top_value, 0, 1).astype(np.float32) for x in excess]
    chosen = choose_threshold(pixels_of(values, window)) if threshold is None else threshold
    white = [x > chosen for x in values]
    if not grey:
        notes.append(
            f"threshold {chosen:.2f} of an object's brightness; {np.mean([w.mean() for w in white]):.1%} white"
        )
    else:
        notes.append(
            "grey values are kept; train with --likelihood gaussian"
            + ("" if threshold is None else f"; the threshold {threshold:.2f} only serves to count objects")
        )
    if window is not None and frames is None and max(map(len, films)) > CUT:
        frames = CUT
    starts, T = _cuts([len(f) for f in films], frames, stride, notes)
    kept = values if grey else [w.astype(np.uint8) for w in white]
    corners: list[tuple[int, int]] = []
    if window is None:
        square = max(seen_as)
        offset = ((square - seen_as[1]) // 2, (square - seen_as[0]) // 2)
        images = [_letterbox(kept[film][t : t + T], square, offset) for film, t in starts]
        of_film = [count_components(w)[0] for w in white]
        counts = [of_film[film][t : t + T] for film, t in starts]
    else:
        offset = (0, 0)
        starts, corners, counts = _windows(white, starts, T, window, notes)
        images = [_in_window(kept[film][t : t + T], c, window) for (film, t), c in zip(starts, corners)]
    n, keep = _numbers(given, counts, [film for film, _ in starts], len(films), notes, in_windows=window is not None)
    if not any(keep):
        raise ValueError("no sequence shows an object; lower the threshold, or look at the contact sheet")
    chosen_images = [x for x, k in zip(images, keep) if k]
    first = tuple(s for s, k in zip(starts, keep) if k)
    data = ImageSequences(chosen_images, [x for x, k in zip(n, keep) if k])  # type: ignore[arg-type]
    origins, windows = tuple(film.origin for film in read), tuple(c for c, k in zip(corners, keep) if k)
    source = Source(scale, offset, (left, top), shape, first, origins, axes, windows)
    padded = np.full((len(first), data.images.shape[1]), -1)
    for row, c in zip(padded, [c for c, k in zip(counts, keep) if k]):
        row[: len(c)] = c
    lengths = [min(len(films[film]) - t, T) for film, t in first]
    short = "" if len({*lengths, T}) == 1 else f", padded to {T} with unobserved frames"
    notes.append(f"{_lengths('sequence', lengths)}{short}; N: "
                 f"{dict(zip(*[v.tolist() for v in data.n_objects.unique(return_counts=True)]))}")  # fmt: skip
    return Prepared(data, notes, source, None if grey else chosen, padded)


def save_prepared(path: str | Path, prepared: Prepared) -> None:
    """Writes the .npz for the scripts' ``--data``, with the map back to the film's pixels for `load_source`."""
    data = prepared.data
    arrays: dict[str, Any] = {"images": data.images.numpy(), "n_objects": data.n_objects.numpy()}
    arrays["source"] = np.array(json.dumps(prepared.source._asdict()))
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


class _View:
    """A frame's crop, (top, bottom, left, right), at most ``size`` pixels long and wide; a `formats.View`."""

    def __init__(self, size: int, crop: tuple[int, int, int, int] | None) -> None:
        self.size, self.crop = size, crop

    def box(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        height, width = shape
        top, bottom, left, right = self.crop or (0, height, 0, width)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"crop is {self.crop} for films of {height} x {width}; wanted (top, bottom, left, right)")
        return top, bottom, left, right

    def __call__(self, frame: NDArray[Any]) -> NDArray[Any]:
        top, bottom, left, right = self.box(frame.shape)
        frame = frame[top:bottom, left:right]
        scale = self.size / max(frame.shape)
        if scale >= 1:
            return frame.copy()  # a slice would keep the whole frame
        height, width = (max(1, round(side * scale)) for side in frame.shape)
        shrunk = optional("skimage.transform").resize_local_mean(frame, (height, width), preserve_range=True)
        return np.asarray(shrunk, np.float32)


def _box(crop: ArrayLike) -> tuple[int, int, int, int]:
    box = _whole("crop", crop)
    if not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"crop is {crop}; wanted (top, bottom, left, right)")
    top, bottom, left, right = box
    return top, bottom, left, right


def _in_window(film: NDArray[Any], corner: tuple[int, int], side: int) -> NDArray[Any]:
    left, top = corner
    return film[:, top : top + side, left : left + side]


def _windows(
    white: list[NDArray[np.bool_]], starts: list[tuple[int, int]], T: int, side: int, notes: list[str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[NDArray[np.int64]]]:
    """Returns the start, the corner and the component counts of each window."""
    objects = [without_dust(w, SMALLEST) for w in white]
    clips = [objects[film][t : t + T] for film, t in starts]
    placed = [(start, window) for start, clip in zip(starts, clips) for window in find_windows(clip, side)]
    if not placed:
        raise ValueError(
            f"no window of {side} pixels holds 1 to {MOST} objects for {T} frames; wanted larger or smaller windows "
            "(--window), fewer frames (--frames), or a higher threshold (--threshold)"
        )
    share = sum(w.area for _, w in placed) / sum(int(clip.sum()) for clip in clips)
    notes.append(f"{len(placed)} windows of {side} x {side} pixels hold {share:.0%} of what the objects cover; others "
                 "reach the film's edge, move too far, or are too many")  # fmt: skip
    return [start for start, _ in placed], [w.corner for _, w in placed], [w.counts for _, w in placed]


def _letterbox(film: NDArray[Any], square: int, offset: tuple[int, int]) -> NDArray[Any]:
    found = np.zeros((len(film), square, square), film.dtype)
    found[:, offset[1] : offset[1] + film.shape[1], offset[0] : offset[0] + film.shape[2]] = film
    return found


def _cuts(
    lengths: list[int], frames: int | None, stride: int | None, notes: list[str]
) -> tuple[list[tuple[int, int]], int]:
    """Returns (film, first frame) of each sequence, and T."""
    if frames is None and max(lengths) <= LONG:
        if stride is not None:
            raise ValueError(f"stride is {stride} without frames; give the length of sequences (--frames)")
        return [(i, 0) for i in range(len(lengths))], max(lengths)
    T = frames or CUT
    if max(lengths) < T:
        raise ValueError(f"frames is {T}; wanted from 2 to the length of the longest film, {max(lengths)}")
    stride = max(1, T // 2) if stride is None else stride
    notes.append(f"cut into sequences of {T} frames, one every {stride}")
    starts = [range(0, max(L - T, 0) + 1, stride) for L in lengths]
    between = sum((len(each) - 1) * max(0, stride - T) for each in starts)
    left = sum(max(L - T, 0) % stride for L in lengths)
    if left + between:
        where = "at the ends of films" if not between else "between sequences or at the ends of films"
        notes.append(f"{left + between} frames {where} are in no sequence; to keep them, choose another --stride")
    return [(i, t) for i, each in enumerate(starts) for t in each], T


def _lengths(what: str, lengths: list[int]) -> str:
    """Returns a text such as "12 films of 12 to 40 frames"."""
    low, high = min(lengths), max(lengths)
    many = f"{len(lengths)} {what}" + ("" if len(lengths) == 1 else "s")
    return f"{many} of {high if low == high else f'{low} to {high}'} frames"


def _whole(name: str, values: ArrayLike) -> int | list[int]:
    """Returns a whole number, or a list of them, from numbers, sequences, arrays or tensors of any type."""
    try:
        found = np.asarray(values)
    except (ValueError, TypeError):  # rows of unequal length; a tensor on a GPU
        found = np.array("")
    whole = found.ndim < 2 and found.dtype.kind in "iuf" and bool((found == np.round(found)).all())
    if not whole or not np.isfinite(found).all():
        raise ValueError(f"{name} is {' '.join(repr(values).split())[:60]}; wanted a whole number, or a list of them")
    return found.astype(np.int64).tolist()


def _numbers_beside(origins: list[Origin]) -> list[int] | None:
    """Returns N of each film if all are from .npz files that store ``n_objects``, as files for ``--data`` do."""
    in_file: dict[str, NDArray[Any] | None] = {}
    numbers = []
    for path, i in origins:
        if Path(path).suffix.lower() != ".npz":
            return None
        if path not in in_file:
            in_file[path] = read_arrays(path, names=("n_objects",)).get("n_objects")
        n = in_file[path]
        if n is None or n.ndim != 1 or n.dtype.kind not in "iu" or i >= len(n):
            return None
        numbers.append(int(n[i]))
    return numbers


def _numbers(
    n_objects: int | Sequence[int] | None,
    counts: list[NDArray[np.int64]],
    film: list[int],
    n_films: int,
    notes: list[str],
    *,
    in_windows: bool,
) -> tuple[list[int], list[bool]]:
    """Returns N of each sequence, and whether each has any object."""
    if n_objects is not None:
        if isinstance(n_objects, int):
            n = [n_objects] * len(counts)
        elif len(n_objects) == len(counts):
            n = [int(x) for x in n_objects]
        elif len(n_objects) == n_films:
            n = [int(n_objects[i]) for i in film]
        else:
            raise ValueError(f"n_objects has length {len(n_objects)} for {len(counts)} sequences of {n_films} films")
        if min(n) < 1:
            raise ValueError(f"n_objects has the value {min(n)}; every sequence needs at least 1 object")
        return n, [True] * len(n)
    n = [number_of_objects(c) for c in counts]
    agree = float(np.mean([np.mean(c == k) for c, k in zip(counts, n)]))
    other = "another --threshold" if in_windows else "--n-objects"
    notes.append(f"n_objects was counted: {agree:.0%} of the frames show that many components"
                 + (f"; check the contact sheet, or give {other}" if agree < 0.8 else ""))  # fmt: skip
    keep = [k > 0 for k in n]
    if not all(keep):
        notes.append(f"{len(keep) - sum(keep)} sequences without an object were left out")
    return n, keep
