"""The map from image sequences back to the film from which they were made: its files, frames and pixels."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_pixels._arrays import read_arrays
from pyro_pixels.video.read import Film, Origin, read_part


class Source(NamedTuple):
    """The origin of the sequences: source pixels = (pixels + window + 0.5 - offset) / scale - 0.5 + corner."""

    scale: tuple[float, float]
    """Pixels of the sequences per pixel of the film, (horizontal, vertical): sides are rounded to whole pixels."""
    offset: tuple[float, float]
    """(column, row) of the film's corner in the sequences, whose margins are black."""
    corner: tuple[int, int]
    """(column, row) of the crop's corner in the film."""
    size: tuple[int, int]
    """(H, W) of the film."""
    first_frames: tuple[tuple[int, int], ...] = ()
    """(film, frame) at which each sequence begins."""
    films: tuple[Origin, ...] = ()
    """The origin of each film."""
    axes: str | None = None
    """The ``axes`` with which films that are arrays were read."""
    windows: tuple[tuple[int, int], ...] = ()
    """(column, row) of each sequence's window in the shrunk film; none if sequences show all of it."""

    def part(self, first: int, n: int) -> "Source":
        """Returns the origin of ``n`` sequences from ``first`` on."""
        rows = slice(first, first + n)
        return self._replace(first_frames=self.first_frames[rows], windows=self.windows[rows])

    def frames(self, row: int, n_frames: int) -> Film | None:
        """Reads the film's own frames (T, H, W) of a sequence again; returns None if they are no longer available."""
        if row >= len(self.first_frames) or not self.films:
            return None
        film, first = self.first_frames[row]
        try:
            frames = read_part(self.films[film], range(first, first + n_frames), axes=self.axes)
        except (ValueError, IndexError):
            return None
        return frames if len(frames) and frames.shape[1:] == self.size else None

    def to_source(self, positions: Any) -> NDArray[np.float64]:
        """Maps positions (..., 2), (column, row), to the film's own pixels.

        If the sequences are windows, the first axis of the positions is that of the sequences.
        """
        inside = self.in_shrunk_film(positions) + 0.5
        return inside / np.asarray(self.scale) - 0.5 + np.asarray(self.corner)

    def in_shrunk_film(self, positions: Any) -> NDArray[np.float64]:
        """Maps positions as `to_source` does to pixels of the cropped and shrunk film, which have the same size as
        those of the sequences."""
        inside = np.asarray(positions, np.float64) - np.asarray(self.offset)
        if not self.windows:
            return inside
        if len(inside) != len(self.windows):
            raise ValueError(f"positions are of {len(inside)} sequences; wanted those of all {len(self.windows)}")
        return inside + np.reshape(self.windows, (len(inside), *[1] * (inside.ndim - 2), 2))

    def of_window(self, frames: Film, row: int, side: int) -> Film:
        """Returns what a sequence's window of ``side`` pixels shows of the film's own frames (T, H, W)."""
        if not self.windows:
            return frames
        corners = np.array([[0, 0], [side, side]]) - 0.5  # the outer edges
        (left, top), (right, bottom) = np.round(self.part(row, 1).to_source(corners[None])[0] + 0.5).astype(int)
        return frames[:, top:bottom, left:right]

    def to_source_covariances(self, covariances: Any) -> NDArray[np.float64]:
        """Maps covariances (..., 2, 2) to square pixels of the film."""
        return np.asarray(covariances, np.float64) / np.outer(self.scale, self.scale)


def load_source(path: str | Path) -> Source | None:
    """Returns the map back to the film's pixels from a file written by `save_prepared`, None from other files.

    A file of an older version, with one scale for both axes, gives the map with which it was made.

    Raises:
        ValueError: if the file cannot be read, or the map is damaged.
    """
    found = read_arrays(path, names=("source",))
    if "source" not in found:
        return None
    try:
        values = json.loads(str(found["source"]))
        first = tuple((int(a), int(b)) for a, b in values["first_frames"])
        offset, corner, size = (tuple(values[name]) for name in ("offset", "corner", "size"))
        films = tuple(Origin(str(path), int(i)) for path, i in values.get("films", ()))
        scale = values["scale"]
        x, y = scale if isinstance(scale, list) else (scale, scale)
        windows = tuple((int(a), int(b)) for a, b in values.get("windows", ()))
        if windows and len(windows) != len(first):
            raise ValueError(f"{len(windows)} windows for {len(first)} sequences")
        return Source((float(x), float(y)), offset, corner, size, first, films, values.get("axes"), windows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: its map to the film is damaged ({error}); create it again with prepare.py") from None
