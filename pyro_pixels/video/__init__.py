"""Your own films: from files to image sequences, and from tracks back to the film's pixels."""

from pyro_pixels.video.check import check_film, count_components
from pyro_pixels.video.contrast import Background
from pyro_pixels.video.linking import Links, link_tracks
from pyro_pixels.video.prepare import (
    Prepared,
    load_video,
    prepare_video,
    save_prepared,
)
from pyro_pixels.video.read import read_films
from pyro_pixels.video.source import Source, load_source
from pyro_pixels.video.tracks import draw_tracks_gif, track_rows, write_csv

__all__ = [
    "Background",
    "Links",
    "Prepared",
    "Source",
    "check_film",
    "count_components",
    "draw_tracks_gif",
    "link_tracks",
    "load_source",
    "load_video",
    "prepare_video",
    "read_films",
    "save_prepared",
    "track_rows",
    "write_csv",
]
