"""The classical tracker: disks found where they are, tracks near the floors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.blob_tracker import BlobTracker, evaluate_tracker, find_disks
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.drawing import render_disks

QUICK = CannonballConfig(height=32, width=32)


def disks(*centres):
    """One 32 x 32 frame (1, 1, 32, 32) with disks of radius 2 at (column, row)."""
    return torch.from_numpy(render_disks(np.array(centres, float)[None, :, None], 32, 32, 2.0)).bool()


def found(image, n):
    centres = find_disks(image, torch.tensor([n]))[0, :, 0]
    centres = centres[~centres.isnan().any(-1)]
    return centres[centres[:, 0].argsort()]


def test_disks_apart_are_found_where_they_are():
    where = torch.tensor([[5.0, 20.0], [14.5, 9.5], [27.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(found(disks(*where.tolist()), 3), where, rtol=0, atol=1e-12)
    assert len(found(disks(*where.tolist()), 2)) == 2
    assert len(found(torch.zeros(1, 1, 32, 32, dtype=torch.bool), 3)) == 0


@pytest.mark.parametrize("distance", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("degrees", [0, 30, 45, 80])
def test_touching_disks_are_split(distance, degrees):
    step = distance * torch.tensor([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    two = torch.tensor([12.3, 10.8], dtype=torch.float64) + torch.outer(torch.tensor([0.0, 1.0]).double(), step)
    image = disks(*two.tolist(), [25.0, 25.0])
    assert (found(image, 3)[:2] - two).norm(dim=-1).max() < 0.75
    assert (found(image, 3)[2] - 25.0).norm() < 1e-12
    assert len(found(image, 4)) <= 4


def test_three_in_a_row_are_split():
    three = torch.tensor([[10.0, 10.0], [13.0, 11.0], [16.0, 10.0]], dtype=torch.float64)
    assert (found(disks(*three.tolist()), 3) - three).norm(dim=-1).max() < 0.75


def test_a_hidden_disk_is_not_made_up():
    assert len(found(disks([10.0, 10.0], [10.3, 10.0]), 2)) == 1


def test_one_ball_is_followed_to_a_fraction_of_a_pixel():
    data = simulate(replace(QUICK, n_objects=(1,)), 20, seed=1)
    tracks = BlobTracker(data.dynamics).track(data.images, data.n_objects)
    assert tracks.shape == (20, 1, 30, 2)
    assert tracks.dtype == torch.float64
    assert metrics.errors(tracks, data.positions, data.n_objects).max() < 0.5


@pytest.fixture(scope="module")
def cannonballs():
    """30 sequences, 10 of each N."""
    return simulate(QUICK, 30, seed=2)


def test_tracker_on_30_sequences(cannonballs):
    table = evaluate_tracker(cannonballs)
    for n, row in table["by_n_objects"].items():
        assert row["n_sequences"] == 10
        assert row["position_error_px"] < 0.5
        assert row["generation_error_px"] < 1.15 * row["generation_floor_px"]
        assert row["interpolation_error_px"] < 1.25 * row["interpolation_floor_px"]
        assert row["switch_rate"] is None if n == "1" else row["switch_rate"] <= 0.2
    assert table["by_n_objects"]["1"]["generation_error_px"] < 1.03 * table["by_n_objects"]["1"]["generation_floor_px"]
    assert (table["n_seen"], table["n_frames"]) == (5, 30)


def test_frames_without_true_positions_do_not_count(cannonballs):
    images, positions = cannonballs.images.float(), cannonballs.positions.clone()
    images[:, 9] = positions[:, :, 9] = torch.nan
    images[1::2, 24:] = positions[1::2, :, 24:] = torch.nan
    data = replace(cannonballs, images=images, positions=positions)
    table = evaluate_tracker(data)["all"]
    for kind in ("generation", "interpolation"):
        assert table[f"{kind}_error_px"] < 1.3 * table[f"{kind}_floor_px"]
    tracker, first = BlobTracker(data.dynamics), torch.arange(30) < 5
    path = tracker.predict(data.images, data.n_objects, first)
    each = metrics.errors(path, positions, data.n_objects)[:, 0, 5:]
    assert torch.equal(each.isnan(), positions[:, 0, 5:, 0].isnan())


def test_tracks_are_nan_exactly_where_there_is_no_object(cannonballs):
    data = cannonballs[:9]
    tracker, ends = BlobTracker(data.dynamics), (torch.arange(30) < 5) | (torch.arange(30) >= 25)
    images = data.images.clone()
    images[:, 12] = 0  # nothing to measure: the forecast takes its place
    tracks = tracker.track(images, data.n_objects)
    assert torch.equal(tracks.isnan(), data.positions.isnan())
    one = data.n_objects == 1
    assert (tracks[one, 0, 12] - data.paths[one, 0, 12]).norm(dim=-1).max() < 1.5
    path = tracker.predict(data.images, data.n_objects, ends)
    assert torch.equal(path.isnan(), data.positions.isnan())
    images[:, 5:25] = 1
    again = tracker.predict(images, data.n_objects, ends)  # only observed frames are looked at
    torch.testing.assert_close(again, path, rtol=0, atol=0, equal_nan=True)


BAD = {
    "no truth": lambda d: evaluate_tracker(replace(d, positions=None)),
    "no dynamics": lambda d: evaluate_tracker(replace(d, dynamics=None)),
    "too short": lambda d: evaluate_tracker(d, n_seen=6),
    "numbers of others": lambda d: BlobTracker(d.dynamics).track(d.images, d.n_objects[:3]),
    "mask of others": lambda d: BlobTracker(d.dynamics).predict(d.images, d.n_objects, torch.ones(3).bool()),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_value_error(small_data, call):
    with pytest.raises(ValueError, match=r"wanted|give|needs more"):
        call(small_data)
