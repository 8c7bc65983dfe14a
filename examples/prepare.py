"""Converts your own films to an .npz for --data: GIF, MP4, TIFF, folders or globs of pictures, arrays.

Also writes a contact sheet, which shows what the model will see, and prints what was done and what may go wrong.
"""

from _common import say_where, start

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pyro_pixels._checks import Bounds
from pyro_pixels._options import Frames, Objects, Pixels, Share, result_file
from pyro_pixels.plots.film import plot_contact_sheet
from pyro_pixels.plots.paper import figure_beside, save_figure
from pyro_pixels.video import Background, check_film, prepare_video, save_prepared
from pyro_pixels.video.read import reads


@dataclass
class Arguments:
    films: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders of frames, or globs in quotes; one film each."""
    out: Path = Path("mine.npz")
    """The file to write; the contact sheet has the same name, with .png."""
    n_objects: tuple[Objects, ...] = ()
    """Number of objects: one for all, or one per film or per sequence; default: counted."""
    size: Pixels | None = None
    """Pixels of the longer side; larger films are shrunk. Default: 32, or with --window the film's own."""
    window: Pixels | None = None
    """For films with many objects: side of the square windows, each with one to three objects, that are cut from the
    shrunk film. Default: sequences show the whole film."""
    frames: Frames | None = None
    """Frames per sequence, to cut long films; default: films of up to 60 frames are kept whole."""
    stride: Frames | None = None
    """Frames between the starts of successive sequences; default: half of --frames."""
    crop: Annotated[tuple[int, int, int, int], Bounds(0, 10**6)] | None = None
    """Top, bottom, left, right, in the film's pixels."""
    invert: Annotated[bool | None, tyro.conf.DisallowNone] = None
    """Objects are darker than the background; default: detected."""
    background: Background | None = None
    """Keep it, or subtract the median over time, or what is larger than objects in each frame (local); default:
    the median, if objects stand out better without it."""
    threshold: Share | None = None
    """Fraction of an object's brightness, from 0 to 1; default: Otsu's."""
    grey: bool = False
    """Keep grey values; then train with --likelihood gaussian."""
    axes: str | None = None
    """Axes of arrays, in letters of NTHWC, if they are not (n,) T, H, W(, C); T, 1 or 3, H, W has colours first."""


def main(args: Arguments) -> None:
    out = result_file(args.out, ".npz")
    for film in args.films:
        for path in (out, out.with_suffix(".png")):
            if reads(film, path):
                raise ValueError(f"{path} would overwrite, or be added to, the film {film}; choose another --out")
    sheet = figure_beside(out)
    print(f"reading {', '.join(args.films)}")
    n = args.n_objects[0] if len(args.n_objects) == 1 else (args.n_objects or None)
    prepared = prepare_video(
        args.films, n_objects=n, size=args.size, window=args.window, frames=args.frames, stride=args.stride,
        crop=args.crop, invert=args.invert, background=args.background, threshold=args.threshold, grey=args.grey,
        axes=args.axes,
    )  # fmt: skip
    data, source = prepared.data, prepared.source
    for note in prepared.notes:
        print(f"  {note}")
    for warning in check_film(data):
        print(f"  ! {warning}")
    save_prepared(out, prepared)
    film = source.frames(0, data.images.shape[1])
    if film is None:
        raise ValueError(
            f"{out} is written, but {args.films[0]} changed meanwhile, so there is no contact sheet; repeat"
        )
    figure = plot_contact_sheet(
        source.of_window(film, 0, data.images.shape[-1]),
        data.images,
        prepared.counts,
        data.n_objects,
        threshold=prepared.threshold,
        notes=prepared.notes,
    )
    save_figure(figure, sheet)
    say_where([out, sheet])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
