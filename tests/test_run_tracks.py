"""The table of tracks of sequences from a file: its frames, its sequences and their films."""

import csv
import json

import numpy as np
import pytest
import torch

from pyro_pixels.data import ImageSequences, load_sequences
from pyro_pixels.run_figures import RunView
from pyro_pixels.run_tracks import film_names, write_prediction, write_tracks
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


def view_of(drawn, folder, source, first, **options):
    """The view of the sequences from ``first`` on, in the file mine.npz, with ``source`` if there is one."""
    arrays = {} if source is None else {"source": np.array(json.dumps(source._asdict()))}
    np.savez(folder / "mine.npz", images=drawn.images, n_objects=drawn.n_objects, **arrays)
    data = load_sequences(folder / "mine.npz")[first:]
    return RunView(load_pretrained(), data, torch.device("cpu"), first=first, **options)


def rows_of(path):
    return list(csv.DictReader(path.open()))


def table(drawn, folder, source, first):
    """The rows of tracks.csv of `view_of`."""
    write_tracks(view_of(drawn, folder, source, first), folder, data_file=folder / "mine.npz", fps=10)
    return rows_of(folder / "tracks.csv")


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


@pytest.mark.filterwarnings("ignore:the original film was not found")
def test_overlapping_sequences_of_a_film_show_the_same_particles(tmp_path):
    whole = simulate(load_pretrained().config.data, 20, seed=2)
    whole = whole[whole.n_objects == 2][:4]
    cut = ImageSequences(torch.cat([whole.images[:, :20], whole.images[:, 10:]]), torch.cat([whole.n_objects] * 2))
    starts = tuple((film, frame) for frame in (0, 10) for film in range(4))
    films = tuple(Origin(f"/films/{i}.mp4", 0) for i in range(4))
    rows = table(cut, tmp_path, SOURCE._replace(first_frames=starts, films=films), first=0)
    keys = [(row["film"], int(row["frame"]), int(row["particle"])) for row in rows]
    assert sorted(keys) == [(f"{i}.mp4", t, 2 * i + n) for i in range(4) for t in range(30) for n in range(2)]
    sequences = {(row["film"], int(row["frame"])): int(row["sequence"]) for row in rows}
    assert {sequences["1.mp4", t] for t in range(10)} == {1}
    assert {sequences["1.mp4", t] for t in range(20, 30)} == {5}


def test_sequences_without_a_film_have_no_column_for_it(drawn, tmp_path):
    rows = table(drawn, tmp_path, None, first=2)
    assert "film" not in rows[0]
    assert {int(row["sequence"]) for row in rows} == {2, 3}
    assert max(int(row["frame"]) for row in rows if row["sequence"] == "2") == LENGTHS[2] - 1


def test_x_and_y_of_what_was_inferred_have_a_covariance(drawn, tmp_path):
    view = view_of(drawn, tmp_path, None, 0)
    rows = rows_of(write_tracks(view, tmp_path)[0])
    cov = view.to_pixels.covariance(view.inference.cov)
    wanted = [float(cov[b, n, t, 0, 1]) for b in range(4) for t in range(LENGTHS[b]) for n in range(drawn.n_objects[b])]
    assert [float(row["cov_xy"]) for row in rows] == pytest.approx(wanted, rel=1e-3)
    assert max(map(abs, wanted)) > 1e-3


def test_frames_missing_between_others_are_kept(drawn, tmp_path):
    images = drawn.images.clone()
    images[0, 2:4] = torch.nan
    rows = table(ImageSequences(images, drawn.n_objects), tmp_path, None, first=0)
    assert [int(row["frame"]) for row in rows if row["particle"] == "0"] == list(range(LENGTHS[0]))


def test_forecasts_are_in_the_films_own_pixels_and_go_beyond_its_end(drawn, tmp_path):
    source = SOURCE._replace(scale=(0.5, 0.25), corner=(7, 3))
    view = view_of(drawn, tmp_path, source, 1, n_seen=3)
    future = view.generation(n_frames=10)
    path = write_prediction(view, future, tmp_path / "a.csv", data_file=tmp_path / "mine.npz", scale=0.1, fps=10)
    rows = rows_of(path)
    assert list(rows[0]) == [
        "sequence", "frame", "time", "particle", "x", "y", "var_x", "cov_xy", "var_y", "component", "seen", "film",
    ]  # fmt: skip
    wanted = [(b, t, n) for b in (1, 2, 3) for t in range(10) for n in range(int(drawn.n_objects[b]))]
    found = [(int(r["sequence"]), int(r["frame"]) - STARTS[int(r["sequence"])][1]) for r in rows]
    assert found == [(b, t) for b, t, _ in wanted]
    assert [r["seen"] for r in rows] == [str(int(t < 3)) for _, t, _ in wanted]
    assert [float(r["time"]) for r in rows] == pytest.approx([int(r["frame"]) / 10 for r in rows])
    places = 0.1 * source.to_source(view.in_pixels(future.mean))
    variances = view.to_pixels.covariance(future.cov)
    for r, (b, t, n) in zip(rows, wanted):
        assert [float(r["x"]), float(r["y"])] == pytest.approx(places[b - 1, n, t], rel=1e-4)
        assert float(r["var_y"]) == pytest.approx(float(variances[b - 1, n, t, 1, 1]) * (0.1 / 0.25) ** 2, rel=1e-4)


def test_interpolations_end_with_the_film_and_count_missing_frames_as_not_seen(drawn, tmp_path):
    images = drawn.images.clone()
    images[0, 1] = torch.nan
    view = view_of(ImageSequences(images, drawn.n_objects), tmp_path, None, 0, n_seen=2)
    found = view.interpolation()
    rows = rows_of(write_prediction(view, found, tmp_path / "a.csv", lengths=view.lengths))
    first_particles = (drawn.n_objects.cumsum(0) - drawn.n_objects).tolist()
    for b, (n, particle) in enumerate(zip(LENGTHS, first_particles)):
        seen = [int(r["seen"]) for r in rows if r["particle"] == str(particle)]
        assert seen == [1, int(b > 0), *[0] * (n - 4), 1, 1]


def test_names_of_films_are_short_and_differ():
    assert film_names(SOURCE) == ["a.mp4", "b/a.mp4", "c.npy[1]", "c.npy[0]"]
    assert film_names(SOURCE._replace(films=FILMS[1:2])) == ["a.mp4"]
    assert film_names(SOURCE._replace(films=())) == []


def test_positions_in_pixels_are_in_the_order_of_all_other_arrays():
    """Also where the true objects are known, whose order figures and tables have."""
    data = simulate(load_pretrained().config.data, 12, seed=4)
    view = RunView(load_pretrained(), data, torch.device("cpu"))
    assert not torch.equal(view.order, torch.arange(3).expand(12, 3))
    mean = view.generation().mean
    assert torch.equal(view.in_pixels(mean), view.to_pixels(mean))
