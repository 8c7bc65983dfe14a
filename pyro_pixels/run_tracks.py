"""Inferred tracks as files: tracks.csv for other programs, and tracks.gif, drawn over the user's own film."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_pixels.evaluation import metrics
from pyro_pixels.run_figures import RunView
from pyro_pixels.video.source import Source, load_source
from pyro_pixels.video.tracks import draw_tracks_gif, track_rows, write_csv


def write_tracks(
    view: RunView,
    out: Path,
    *,
    data_file: Path | None = None,
    scale: float | None = None,
    fps: float | None = None,
) -> list[Path]:
    """Writes tracks.csv, with all sequences, and tracks.gif, the first with the largest N, and returns their paths.

    The table counts sequences from ``view.first``, as their file does, and has a row for each object in each frame up
    to the last observed one. If prepare.py made ``data_file``, it also names the film of each row, positions are in
    pixels of the film, and the GIF is drawn over it; otherwise they are in pixels of the sequences.

    Args:
        data_file: the file of the view's sequences, if any.
        scale: metres per pixel; positions are then in metres.
        fps: frames per second; the table then has a time in seconds.

    Raises:
        ValueError: if ``scale`` or ``fps`` is not above 0, or the map to pixels is unknown.
    """
    if not isinstance(view.to_pixels, metrics.Affine):
        raise ValueError("positions are in latent units, as the renderer draws nothing yet; train for more steps")
    source = None if data_file is None else load_source(data_file)
    if source is not None:
        source = source._replace(first_frames=source.first_frames[view.first : view.first + len(view.data)])
    found = view.inference
    mean, cov = view.tracks(found.mean), view.to_pixels.covariance(torch.diag_embed(found.std.cpu().square()))
    component = view.states.p_z.argmax(-1).cpu()
    if view.order is not None:
        cov, component = metrics.reorder(cov, view.order), metrics.reorder(component, view.order)
    table = track_rows(mean, cov, component, view.data.n_objects, source=source, scale=scale, fps=fps)
    write_csv(out / "tracks.csv", *_in_file(view, source, *table))
    _draw(view, mean, source, out / "tracks.gif")
    return [out / "tracks.csv", out / "tracks.gif"]


def _in_file(
    view: RunView, source: Source | None, header: list[str], rows: Iterator[list[Any]]
) -> tuple[list[str], Iterator[list[Any]]]:
    """Returns the table without padded frames, with the sequences' indices in their file and, if known, their films."""
    starts, films = [(0, 0)] * len(view.data), []
    if source is not None and source.first_frames:
        starts, films = list(source.first_frames), film_names(source)
    ends = [first + length for (_, first), length in zip(starts, view.lengths.tolist())]
    return [*header, *(["film"] if films else [])], (
        [view.first + b, frame, *rest, *([films[starts[b][0]]] if films else [])]
        for b, frame, *rest in rows
        if frame < ends[b]
    )


def film_names(source: Source) -> list[str]:
    """Returns the path of each film below their common folder, with its index where a file holds several: a.npy[3]."""
    if not source.films:
        return []
    paths = [film.path for film in source.films]
    folder, n_films = os.path.commonpath([Path(path).parent for path in paths]), Counter(paths)
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    return [f"{name}[{film.index}]" if n_films[film.path] > 1 else name for name, film in zip(names, source.films)]


def _draw(view: RunView, mean: Tensor, source: Source | None, path: Path) -> None:
    """Writes the GIF over the film itself, or, if that is no longer available, over the images that the model saw."""
    row = int(view.pick(1)[0])
    T, tracks = int(view.lengths[row]), mean[row, : int(view.data.n_objects[row])]
    frames = None if source is None else source.frames(row, T)
    if frames is not None and source is not None:
        draw_tracks_gif(path, frames, source.to_source(tracks[:, : len(frames)]))
        return
    if source is not None:
        warnings.warn(
            "the original film was not found; tracks.gif is drawn over the images that the model saw", stacklevel=3
        )
    draw_tracks_gif(path, view.data.images[row, :T].float().nan_to_num(), tracks[:, :T])
