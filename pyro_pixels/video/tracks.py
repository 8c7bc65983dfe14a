"""Export of tracks: a CSV with trackpy's columns, and a GIF over the film itself."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from pyro_pixels._files import atomic_write
from pyro_pixels.video.linking import Links
from pyro_pixels.video.source import Source

Floats = NDArray[np.float64]
COLUMNS = ("sequence", "frame", "particle", "x", "y", "var_x", "cov_xy", "var_y", "component")


def track_rows(
    positions: ArrayLike, covariances: ArrayLike, components: ArrayLike, n_objects: ArrayLike, *,
    seen: ArrayLike | None = None, source: Source | None = None, links: Links | None = None,
    scale: float | None = None, fps: float | None = None,
) -> tuple[list[str], Iterator[list[Any]]]:  # fmt: skip
    """Returns the header, and one row per sequence, frame and object.

    ``frame`` counts from 0, within the film if ``source`` holds the first frames of the sequences; ``particle`` counts
    the objects of all sequences. y points downwards.

    Args:
        positions: (n, N, T, 2) in pixels of the sequences, (column, row).
        covariances: (n, N, T, 2, 2), in square pixels.
        components: (n, N), the likeliest component of each object.
        n_objects: (n,).
        seen: (n, N, T), whether each object was observed in each frame; if given, a column ``seen``, 1 or 0, is added.
        source: maps positions to the film's own pixels.
        links: the particles of a film whose sequences overlap; there is then one row for each in each frame.
        scale: metres per pixel of the film; if given, x and y are in metres.
        fps: frames per second; if given, a column ``time`` in seconds is added.

    Raises:
        ValueError: if ``scale`` or ``fps`` is not above 0.
    """
    for name, value in (("scale", scale), ("fps", fps)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name} is {value}; wanted a number above 0")
    a, C = np.asarray(positions, np.float64), np.asarray(covariances, np.float64)
    if source is not None:
        a, C = source.to_source(a), source.to_source_covariances(C)
    unit = scale or 1.0
    a, C = a * unit, C * unit**2
    k, n = np.asarray(components), np.asarray(n_objects)
    known = None if seen is None else np.asarray(seen, int)
    header = [*COLUMNS[:2], *(["time"] if fps else []), *COLUMNS[2:], *([] if known is None else ["seen"])]

    def rows() -> Iterator[list[Any]]:
        particle = 0
        for b in range(len(a)):
            first = source.first_frames[b][1] if source is not None and source.first_frames else 0
            for t in range(a.shape[2]):
                for i in range(int(n[b])):
                    if links is not None and not links.best[b, i, t]:
                        continue
                    (x, y), S = a[b, i, t], C[b, i, t]
                    time = [f"{(first + t) / fps:.6g}"] if fps else []
                    numbers = (x, y, S[0, 0], S[0, 1], S[1, 1])
                    rest = [int(k[b, i]), *([] if known is None else [known[b, i, t]])]
                    which = particle + i if links is None else int(links.particles[b, i])
                    yield [b, first + t, *time, which, *(f"{v:.6g}" for v in numbers), *rest]
            particle += int(n[b])

    return header, rows()


def write_csv(path: str | Path, header: Sequence[str], rows: Iterator[list[Any]]) -> None:
    """Writes the header and rows of `track_rows`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def draw_tracks_gif(
    path: str | Path, frames: ArrayLike, positions: ArrayLike, *, height: int = 320, tail: int = 12, duration: int = 80
) -> None:
    """Writes a GIF of frames (T, H, W), in [0, 1], with tracks (N, T, 2), in the frames' pixels, drawn over them.

    Args:
        height: height of the GIF, in pixels: smaller frames are enlarged to it, and larger ones shrunk to twice that.
        tail: the number of past frames over which tracks are drawn.
        duration: milliseconds per frame.

    Raises:
        ValueError: if there are not as many positions as frames.
    """
    v, a = np.asarray(frames), np.asarray(positions, np.float64)
    if v.ndim != 3 or a.ndim != 3 or a.shape[1:] != (len(v), 2):
        raise ValueError(f"frames have shape {v.shape}, positions {a.shape}; wanted (T, H, W) and (N, T, 2)")
    zoom = height / v.shape[1]
    zoom = zoom if zoom > 1 else min(1.0, 2 * zoom)
    size = (round(v.shape[2] * zoom), round(v.shape[1] * zoom))
    pictures = [_picture(v[t], a[:, max(0, t - tail) : t + 1], size, zoom) for t in range(len(v))]
    with atomic_write(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def _picture(frame: NDArray[Any], tracks: NDArray[np.float64], size: tuple[int, int], zoom: float) -> Image.Image:
    from pyro_pixels.plots.style import OBJECTS  # loads matplotlib, which reading films does not need

    resampling = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    picture = Image.fromarray((255 * frame.clip(0, 1)).astype(np.uint8)).resize(size, resampling).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for i, track in enumerate((tracks + 0.5) * zoom):
        track, colour = track[np.isfinite(track).all(-1)], OBJECTS[i % len(OBJECTS)]
        if len(track) > 1:
            draw.line([tuple(p) for p in track], fill=colour, width=2)
        if len(track):
            (x, y), r = track[-1], 4
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2)
    return picture
