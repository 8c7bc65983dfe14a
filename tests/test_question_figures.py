"""Answers in pictures: what they mark and compare is what was seen, hidden and known."""

from dataclasses import replace

import pytest
import torch

from pyro_pixels import question_figures
from pyro_pixels.data import ImageSequences
from pyro_pixels.question_figures import Scene, draw_hidden, draw_retrodict, draw_what_if
from pyro_pixels.runs import load_pretrained
from pyro_pixels.worlds.base import simulate


@pytest.fixture(scope="module")
def data():
    """Six sequences, N = 1, 2, 3."""
    return simulate(load_pretrained().config.data, 6, seed=2)


@pytest.fixture
def regions(monkeypatch):
    """What `plot_regions` is given."""
    given, plot = [], question_figures.plots.plot_regions
    monkeypatch.setattr(
        question_figures.plots,
        "plot_regions",
        lambda *args, **kw: given.append(dict(kw, mean=args[0])) or plot(*args, **kw),
    )
    return given


def scene_of(data):
    return Scene(load_pretrained(), data, torch.device("cpu"), per_n=1, n_samples=2)


def test_positions_without_paths_are_unknown_before_the_first_frame(data, regions):
    scene = scene_of(replace(data, paths=None, dynamics=None))
    assert "parabolas" not in draw_retrodict(scene).text
    truth = regions[0]["truth"]
    assert truth[:, :, :10].isnan().all()
    torch.testing.assert_close(truth[:, :, 10:], data.positions[scene.rows], equal_nan=True)


@pytest.mark.parametrize("draw, n_before, n_seen", [(draw_retrodict, 10, 30), (draw_what_if, 0, 12)])
def test_frames_that_are_missing_are_not_marked_as_seen(data, regions, draw, n_before, n_seen):
    images = data.images.float()
    images[:, [3, 7]] = torch.nan
    draw(scene_of(replace(data, images=images)))
    wanted = torch.arange(30) < n_seen
    wanted[[3, 7]] = False
    known = regions[0]["known"]
    assert not known[:, :, :n_before].any()
    assert (known[:, :, n_before:] == wanted).all()


def test_the_title_names_the_truth_only_if_it_is_drawn(data):
    assert draw_what_if(scene_of(data)).title == "What if? In black sequence 2, N = 3, as it was"
    assert draw_what_if(scene_of(ImageSequences(data.images, data.n_objects))).title == "What if, in sequence 2, N = 3?"


def test_the_hidden_object_is_the_one_drawn_as_the_first(data, regions):
    scene = scene_of(data)
    swapped = [2, 0, 1]  # the guide's objects in another order than the true ones
    three = int((data.n_objects[scene.rows] == 3).nonzero()[0])
    scene.order[scene.rows[three]] = torch.tensor(swapped)
    assert draw_hidden(scene).title == "Positions where object 1 is hidden in frames 11 to 20"
    known = regions[0]["known"][three]
    assert (~known[0]).nonzero().squeeze(1).tolist() == [*range(10, 20)]
    assert known[1:].all()


def test_the_middle_third_is_that_of_each_sequence(data, regions):
    lengths = [30, 12, 21, 30, 30, 30]
    images = [v[:n].numpy() for v, n in zip(data.images, lengths)]
    answer = draw_hidden(scene_of(ImageSequences(images, data.n_objects)))
    assert answer.title == "Positions where object 1 is hidden in the middle third of each sequence"
    known = regions[0]["known"]
    for seen, n in zip(known[:, 0], (21, 12, 30)):  # of sequences 2, 1 and 0
        assert (~seen[:n]).nonzero().squeeze(1).tolist() == [*range(n // 3, 2 * n // 3)]
        assert not seen[n:].any()
