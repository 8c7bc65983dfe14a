"""The table of tracks of sequences from a file: its frames, its sequences and their films."""

import csv
import json

import numpy as np
import pytest
import torch

from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.run_figures import RunView
from pyro_pixels.run_tracks import film_names, write_tracks
from pyro_pixels.runs import load_pretrained
from pyro_pixels.video import Source
from pyro_pixels.video.read import Origin
from pyro_pixels.worlds.base import simulate

LENGTHS = [6, 8, 7, 8]
STARTS = ((0, 0), (0, 3), (1, 0), (2, 5))  # (film, frame)
FILMS = (Origin("/films/a.mp4", 0), Origin("/films/b/a.mp4", 0), Origin("/films/c.npy", 1), Origin("/films/c.npy", 0))
SOURCE = Source(1.0, (0.0, 0.0), (0, 0), (32, 32), STARTS, FILMS)


@pytest.fixture(scope="module")
def drawn():
    data = simulate(load_pretrained().config.data, 4, seed=2)
    return ImageSequences([v[:n].numpy() for v, n in zip(data.images, LENGTHS)], data.n_objects)


def table(drawn, folder, source, first):
    """The rows of tracks.csv for the sequences from ``first`` on, in a file with ``source`` if there is one."""
    arrays = {} if source is None else {"source": np.array(json.dumps(source._asdict()))}
    np.savez(folder / "mine.npz", images=drawn.images, n_objects=drawn.n_objects, **arrays)
    data = load_sequences(folder / "mine.npz")[first:]
    view = RunView(load_pretrained(), data, torch.device("cpu"), first=first)
    write_tracks(view, folder, data_file=folder / "mine.npz", fps=10)
    return list(csv.DictReader((folder / "tracks.csv").open()))


@pytest.mark.filterwarnings("ignore:the original film was not found")
def test_the_table_can_be_joined_with_the_films(drawn, tmp_path):
    rows = table(drawn, tmp_path, SOURCE, first=1)
    wanted = [
        (b, film, frame)
        for b, film in ((1, "a.mp4"), (2, "b/a.mp4"), (3, "c.npy[1]"))
        for frame in range(STARTS[b][1], STARTS[b][1] + LENGTHS[b])  # and none after the film's end
        for _ in range(int(drawn.n_objects[b]))
    ]
    assert [(int(row["sequence"]), row["film"], int(row["frame"])) for row in rows] == wanted
    assert [float(row["time"]) for row in rows] == pytest.approx([frame / 10 for *_, frame in wanted])
    assert list(rows[0])[:3] == ["sequence", "frame", "time"]
    assert list(rows[0])[-1] == "film"


def test_sequences_without_a_film_have_no_column_for_it(drawn, tmp_path):
    rows = table(drawn, tmp_path, None, first=2)
    assert "film" not in rows[0]
    assert {int(row["sequence"]) for row in rows} == {2, 3}
    assert max(int(row["frame"]) for row in rows if row["sequence"] == "2") == LENGTHS[2] - 1


def test_frames_missing_between_others_are_kept(drawn, tmp_path):
    images = drawn.images.clone()
    images[0, 2:4] = torch.nan
    rows = table(ImageSequences(images, drawn.n_objects), tmp_path, None, first=0)
    assert [int(row["frame"]) for row in rows if row["particle"] == "0"] == list(range(LENGTHS[0]))


def test_names_of_films_are_short_and_differ():
    assert film_names(SOURCE) == ["a.mp4", "b/a.mp4", "c.npy[1]", "c.npy[0]"]
    assert film_names(SOURCE._replace(films=FILMS[1:2])) == ["a.mp4"]
    assert film_names(SOURCE._replace(films=())) == []
