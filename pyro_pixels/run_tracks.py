"""What a run found, as files for other programs and over the user's own film: tracks.csv and tracks.gif."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from pyro_pixels.evaluation import metrics
from pyro_pixels.run_figures import RunView
from pyro_pixels.video.prepare import Source, load_source
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
    """Writes tracks.csv, all sequences, and tracks.gif, the first of the most objects. Returns their paths.

    Positions are in the pixels of the film that prepare.py read, where ``data_file`` came from it, and the GIF is drawn
    over that film; else they are in those of the sequences. In metres with ``scale``, metres in a pixel; with ``fps``
    there is a time in seconds.

    Args:
        first: which sequence of ``data_file`` is the first of the view's.

    Raises:
        ValueError: if ``scale`` or ``fps`` are not above 0, or the map to pixels could not be found.
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
    """Over the film itself, or, where it is not there any more, over what the model saw."""
    row = int(view.pick(1)[0])
    T, tracks = int(view.data.seen[row].sum()), mean[row, : int(view.data.n_objects[row])]
    frames = None if source is None else source.frames(row, T)
    if frames is not None and source is not None:
        draw_tracks_gif(path, frames, source.to_source(tracks[:, : len(frames)]))
        return
    if source is not None:
        warnings.warn(
            "the film is not where it was prepared from; tracks.gif is drawn over what the model saw", stacklevel=3
        )
    draw_tracks_gif(path, view.data.images[row].float().nan_to_num(), tracks)
