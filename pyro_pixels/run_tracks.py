"""Inferred tracks as files: tracks.csv for other programs, and tracks.gif, drawn over the user's own film."""

import warnings
from pathlib import Path

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
    first: int = 0,
    scale: float | None = None,
    fps: float | None = None,
) -> list[Path]:
    """Writes tracks.csv, with all sequences, and tracks.gif, the first with the largest N, and returns their paths.

    If prepare.py made ``data_file``, positions are in pixels of the original film, and the GIF is drawn over that film;
    otherwise they are in pixels of the sequences.

    Args:
        data_file: the file of the view's sequences, if any.
        first: the index in ``data_file`` of the first sequence of the view.
        scale: metres per pixel; positions are then in metres.
        fps: frames per second; the table then has a time in seconds.

    Raises:
        ValueError: if ``scale`` or ``fps`` is not above 0, or the map to pixels is unknown.
    """
    if not isinstance(view.to_pixels, metrics.Affine):
        raise ValueError("positions are in latent units, as the renderer draws nothing yet; train for more steps")
    source = None if data_file is None else load_source(data_file)
    if source is not None:
        source = source._replace(first_frames=source.first_frames[first : first + len(view.data)])
    found = view.inference
    mean, cov = view.tracks(found.mean), view.to_pixels.covariance(torch.diag_embed(found.std.cpu().square()))
    component = view.states.p_z.argmax(-1).cpu()
    if view.order is not None:
        cov, component = metrics.reorder(cov, view.order), metrics.reorder(component, view.order)
    table = track_rows(mean, cov, component, view.data.n_objects, source=source, scale=scale, fps=fps)
    write_csv(out / "tracks.csv", *table)
    _draw(view, mean, source, out / "tracks.gif")
    return [out / "tracks.csv", out / "tracks.gif"]


def _draw(view: RunView, mean: Tensor, source: Source | None, path: Path) -> None:
    """Writes the GIF over the film itself, or, if that is no longer available, over the images that the model saw."""
    row = int(view.pick(1)[0])
    T, tracks = int(view.data.seen[row].sum()), mean[row, : int(view.data.n_objects[row])]
    frames = None if source is None else source.frames(row, T)
    if frames is not None and source is not None:
        draw_tracks_gif(path, frames, source.to_source(tracks[:, : len(frames)]))
        return
    if source is not None:
        warnings.warn(
            "the original film was not found; tracks.gif is drawn over the images that the model saw", stacklevel=3
        )
    draw_tracks_gif(path, view.data.images[row].float().nan_to_num(), tracks)
