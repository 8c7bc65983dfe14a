"""Inferred and predicted tracks as files: tables for other programs, and tracks.gif, drawn over the user's own film."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_pixels.evaluation import metrics
from pyro_pixels.queries.predict import Prediction
from pyro_pixels.run_figures import RunView
from pyro_pixels.video.linking import Links, link_tracks
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
    """Writes tracks.csv, of all the view's sequences, and tracks.gif, of the first with the largest N; returns both.

    The table counts sequences from ``view.first``, as their file does, and has a row for each object in each frame up
    to the last observed one. If prepare.py made ``data_file``, it also names the film of each row, objects of sequences
    that overlap are linked to particles with one row in each frame, positions are in pixels of the film, and the GIF
    is drawn over it, with all windows of a clip; otherwise positions are in pixels of the sequences.

    Args:
        data_file: the file of the view's sequences, if any.
        scale: metres per pixel; positions are then in metres.
        fps: frames per second; the table then has a time in seconds.

    Raises:
        ValueError: if ``scale`` or ``fps`` is not above 0, or the map to pixels is unknown.
    """
    source, found = _source_of(view, data_file), view.inference
    assert found.cov is not None
    tracks = _in_pixels(view, found.mean, found.cov, view.states.p_z.argmax(-1))
    links = _link(view, *tracks[:2], source)
    table = track_rows(*tracks, view.data.n_objects, source=source, links=links, scale=scale, fps=fps)
    write_csv(out / "tracks.csv", *_in_file(view, source, view.lengths, *table))
    _draw(view, tracks[0], source, out / "tracks.gif")
    return [out / "tracks.csv", out / "tracks.gif"]


def write_prediction(
    view: RunView,
    prediction: Prediction,
    path: Path,
    *,
    lengths: Tensor | None = None,
    data_file: Path | None = None,
    scale: float | None = None,
    fps: float | None = None,
) -> Path:
    """Writes the table of a prediction: like tracks.csv, with a column ``seen``, 1 in observed frames, else 0.

    Args:
        view: the sequences that the prediction is for.
        prediction: the result of `RunView.generation` or `RunView.interpolation`.
        path: the CSV to write, which is returned.
        lengths: (B,), the number of frames of each sequence in the table; by default all of the prediction.
        data_file, scale, fps: as in `write_tracks`, with the same errors.
    """
    source, (B, N, T) = _source_of(view, data_file), prediction.mean.shape[:3]
    tracks = _in_pixels(view, prediction.mean, prediction.cov, prediction.component)
    seen = prediction.observed.cpu().expand(B, N, T)
    seen = seen if view.order is None else metrics.reorder(seen, view.order)
    table = track_rows(*tracks, view.data.n_objects, seen=seen, source=source, scale=scale, fps=fps)
    write_csv(path, *_in_file(view, source, torch.full((B,), T) if lengths is None else lengths, *table))
    return path


def _source_of(view: RunView, data_file: Path | None) -> Source | None:
    """Returns the origin of the view's sequences, None if prepare.py did not make their file."""
    source = None if data_file is None else load_source(data_file)
    if source is None:
        return None
    return source.part(view.first, len(view.data))


def _link(view: RunView, mean: Tensor, cov: Tensor, source: Source | None) -> Links | None:
    """Returns the particles of the films if sequences of one film may overlap, else None."""
    if source is None or len({film for film, _ in source.first_frames}) == len(source.first_frames):
        return None
    variances = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    places = source.in_shrunk_film(mean)
    return link_tracks(places, variances, view.data.n_objects, source.first_frames, view.lengths)


def _in_pixels(view: RunView, mean: Tensor, cov: Tensor, component: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latent means, covariances and components in pixels, and in the order of the true objects if known."""
    if not isinstance(view.to_pixels, metrics.Affine):
        raise ValueError("positions are in latent units, as the renderer draws nothing yet; train for more steps")
    cov, component = view.to_pixels.covariance(cov.cpu()), component.cpu()
    if view.order is not None:
        cov, component = metrics.reorder(cov, view.order), metrics.reorder(component, view.order)
    return view.tracks(mean), cov, component


def _in_file(
    view: RunView, source: Source | None, lengths: Tensor, header: list[str], rows: Iterator[list[Any]]
) -> tuple[list[str], Iterator[list[Any]]]:
    """Returns the first frames of the table, with the sequences' indices in their file and, if known, their films."""
    starts, films = [(0, 0)] * len(view.data), []
    if source is not None and source.first_frames:
        starts, films = list(source.first_frames), film_names(source)
    ends = [first + length for (_, first), length in zip(starts, lengths.tolist())]
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
    T, n = int(view.lengths[row]), view.data.n_objects
    frames = None if source is None else source.frames(row, T)
    if frames is not None and source is not None:
        first = source.first_frames[row]
        rows = [b for b, start in enumerate(source.first_frames) if start == first] if source.windows else [row]
        places = source.to_source(mean)[:, :, : len(frames)]
        draw_tracks_gif(path, frames, np.concatenate([places[b, : n[b]] for b in rows]))
        return
    tracks = mean[row, : int(n[row])]
    if source is not None:
        warnings.warn(
            "the original film was not found; tracks.gif is drawn over the images that the model saw", stacklevel=3
        )
    draw_tracks_gif(path, view.data.images[row, :T].float().nan_to_num(), tracks[:, :T])
