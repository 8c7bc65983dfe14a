"""Other worlds: their physics is exact, their looks are what they say, and configurations name them."""

import dataclasses
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from test_data import assert_moments

from pyro_pixels._batch import object_mask
from pyro_pixels.config import RunConfig
from pyro_pixels.data import load_sequences, save_sequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.runs import PRETRAINED, load_config, save_config
from pyro_pixels.worlds.base import Motion, WorldConfig, simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.drawing import SHAPES, Look, paint
from pyro_pixels.worlds.others import WORLDS, BouncingConfig, DriftConfig

MIXED = Look(shapes=tuple(SHAPES), least_size=0.7, salt_and_pepper=0.05)
GREY = Look(shapes=("disk", "ring"), brightness=(0.4, 0.9), grey_noise=0.02)
SMALL = {"n_frames": 9, "height": 20, "width": 26}
CONFIGS = [kind(**SMALL, look=look) for kind in WORLDS.values() for look in (Look(), MIXED, GREY)]


def of_each(data, x):
    """The objects that are there, (M, T, 2)."""
    return x[object_mask(data.n_objects, x.shape[1])]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.world}-{c.look.is_grey}-{len(c.look.shapes)}")
def test_a_seed_gives_the_same_bytes_and_another_seed_others(config):
    one, two, other = (simulate(config, 6, seed=seed) for seed in (3, 3, 4))
    assert one.images.dtype == (torch.float32 if config.look.is_grey else torch.uint8)
    assert one.images.shape == (6, 9, 20, 26)
    assert 0 <= one.images.min() < one.images.max() <= 1
    for name in ("images", "n_objects", "positions", "paths"):
        assert getattr(one, name).numpy().tobytes() == getattr(two, name).numpy().tobytes()
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("world", [CannonballConfig, DriftConfig, BouncingConfig])
def test_a_look_does_not_change_the_motion(world):
    plain, mixed = simulate(world(**SMALL), 6, seed=0), simulate(world(**SMALL, look=MIXED), 6, seed=0)
    torch.testing.assert_close(plain.positions, mixed.positions, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(plain.images, mixed.images)


def test_drifting_objects_keep_their_velocity_and_cross_the_image():
    config = DriftConfig(height=32, width=32)
    data = simulate(config, 300, seed=0)
    paths, side = of_each(data, data.paths), data.sides[data.sides >= 0]
    A, u = data.dynamics.lgssm.A, data.dynamics.lgssm.u
    velocity = paths[:, 1] - paths[:, 0]
    h = torch.cat([paths[:, 0], velocity], -1)
    for t in range(1, config.n_frames):
        h = h @ A.mT + u
        torch.testing.assert_close(h[:, :2], paths[:, t], rtol=0, atol=1e-10)
    assert torch.equal(velocity[:, 0] > 0, side == 0)
    corner, room = config.room()
    across = (paths[..., 0] - corner[0]) / room[0]
    across = torch.where((side == 0)[:, None], across, 1 - across)
    for frame, (low, high) in ((0, config.entry), (-1, config.exit)):
        assert low <= across[:, frame].min() < low + 0.02
        assert high - 0.02 < across[:, frame].max() <= high


@pytest.mark.parametrize("side", [0, 1])
def test_moments_of_drift_are_those_of_its_true_dynamics(side):
    config = DriftConfig(n_frames=7, height=20, width=30, n_objects=(4,), exit=(0.5, 0.9))
    data = simulate(config, 2000, seed=0)
    lgssm = data.dynamics.lgssm
    chosen = data.sides == side
    paths = data.paths[chosen]
    start = torch.cat([paths[:, 0], paths[:, 1] - paths[:, 0]], -1).numpy()
    assert_moments(start, lgssm.mu[side].numpy(), lgssm.Sigma[side].numpy())  # 6 sigma
    noise = (data.positions - data.paths)[chosen].flatten(0, 1).numpy()
    assert_moments(noise, np.zeros(2), lgssm.Sigma_A.numpy())  # 6 sigma


def test_floors_of_drift_follow_from_the_geometry():
    """Without noise two frames tell everything; with it, the floor of a forecast is above the noise of one frame."""
    seen = torch.arange(30) < 5
    for noise in (1e-12, 0.04):
        data = simulate(DriftConfig(height=32, width=32, position_noise=noise), 90, seed=0)
        found = metrics.floor_predictions(data.dynamics, data.positions, seen)
        error = metrics.errors(found, data.paths, data.n_objects).nanmean((0, 1))
        if noise < 1e-6:
            assert error.max() < 1e-3
        else:
            assert 0.02 < error[:5].max() < 0.25  # the noise has a standard deviation of 0.2 pixels
            assert (error[6:].diff() > 0).all()
            assert 0.4 < error[-1] < 4.0


def bounce(start, step, low, high, n_frames):
    """One coordinate, walls hit one after the other."""
    x, path = start, []
    for _ in range(n_frames):
        path.append(x)
        x += step
        while not low <= x <= high:
            x, step = (2 * low - x, -step) if x < low else (2 * high - x, -step)
    return path


def test_walls_are_mirrors():
    config = BouncingConfig(n_frames=25, height=20, width=24, speed=(1.0, 9.0), n_objects=(3,))
    paths = of_each(data := simulate(config, 20, seed=0), data.paths).numpy()
    corner, room = config.room()
    n_bounces = 0
    for path in paths:
        for axis in range(2):
            x, low, high = path[:, axis], corner[axis], corner[axis] + room[axis]
            # a wall may lie between the first two frames; one of the ways in which they can follow is the right one
            ways = [x[1] - x[0], 2 * low - x[1] - x[0], 2 * high - x[1] - x[0]]
            errors = [np.abs(bounce(x[0], way, low, high, len(x)) - x).max() for way in ways]
            assert min(errors) < 1e-9
            n_bounces += int((np.diff(np.sign(np.diff(x))) != 0).sum())
    assert n_bounces > 100


def test_bouncing_objects_stay_in_view_and_are_not_linear():
    config = BouncingConfig(height=32, width=32)
    data = simulate(config, 200, seed=1)
    paths, positions = of_each(data, data.paths), of_each(data, data.positions)
    corner, room = (torch.from_numpy(x) for x in config.room())
    assert ((corner <= paths) & (paths <= corner + room)).all()
    assert abs((positions - paths).std().item() / 0.2 - 1) < 6 / (2 * positions.numel()) ** 0.5  # 6 sigma
    speed = (paths[:, 1:] - paths[:, :-1]).norm(dim=-1).amax(1)
    assert ((speed >= 1.0) & (speed <= 2.0)).all()
    turned = ((paths[:, 1:] - paths[:, :-1]).sign().diff(dim=1) != 0).flatten(1).any(1)
    assert turned.double().mean() > 0.9
    assert data.dynamics is None
    assert data.sides is None


AREAS = {"disk": np.pi, "square": np.pi, "cross": 20 / 9, "ring": 0.75 * np.pi}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_areas_and_reach_no_further_than_their_radius(name):
    r, one = 20.0, np.ones((1, 1))
    places = np.array([[[[31.3, 30.8]]]])
    image = paint(places, (64, 64), [SHAPES[name]], np.zeros((1, 1), int), r * one, one.astype(np.uint8))[0, 0]
    assert abs(image.sum() / (AREAS[name] * r**2) - 1) < 0.03
    row, column = np.nonzero(image)
    assert max(abs(column - 31.3).max(), abs(row - 30.8).max()) <= r
    far = paint(places + 100, (64, 64), [SHAPES[name]], np.zeros((1, 1), int), r * one, one.astype(np.uint8))
    assert not far.any()


def test_the_brightest_object_is_in_front_and_nan_draws_nothing():
    positions = np.array([[[[5.0, 5.0]], [[6.0, 5.0]], [[np.nan, np.nan]]]])
    values, radii = np.array([[0.9, 0.4, 1.0]]), np.array([[2.0, 2.0, 3.0]])
    image = paint(positions, (11, 12), [SHAPES["disk"]], np.zeros((1, 3), int), radii, values)[0, 0]
    first, second = ((np.arange(12) - x) ** 2 + (np.arange(11)[:, None] - 5) ** 2 <= 4 for x in (5, 6))
    np.testing.assert_array_equal(image, np.where(first, 0.9, np.where(second, 0.4, 0)).astype(np.float32))


def test_noise_of_pixels_is_what_the_look_says():
    base = DriftConfig(n_frames=10, height=32, width=32, n_objects=(1,))
    clean = simulate(base, 40, seed=0).images.bool()
    noisy = simulate(replace(base, look=Look(salt_and_pepper=0.1)), 40, seed=0).images.bool()
    for white in (True, False):
        share, n = (noisy != clean)[clean == white].double().mean().item(), int((clean == white).sum())
        assert abs(share - 0.05) < 6 * (0.05 * 0.95 / n) ** 0.5  # 6 sigma
    grey = simulate(replace(base, look=Look(brightness=(0.5, 0.5), grey_noise=0.05)), 40, seed=0).images
    on = grey[clean]
    assert abs(on.mean() - 0.5) < 6 * 0.05 / len(on) ** 0.5  # 6 sigma
    assert abs(on.std() / 0.05 - 1) < 6 / (2 * len(on)) ** 0.5  # 6 sigma
    assert ((grey[~clean] == 0).double().mean() - 0.5).abs() < 0.01  # noise below 0 is cut off


def test_each_object_keeps_its_own_grey_value_and_shape():
    look = Look(shapes=("disk", "cross"), brightness=(0.3, 1.0))
    data = simulate(
        DriftConfig(n_frames=6, height=32, width=32, n_objects=(1,), position_noise=0.0, look=look), 60, seed=0
    )
    brightest = data.images.amax((2, 3))
    assert torch.equal(brightest, brightest[:, :1].expand_as(brightest))
    assert 0.3 <= brightest.min() < 0.4 < 0.9 < brightest.max() <= 1
    area = (data.images > 0).sum((2, 3)).double().mean(1)
    assert ((area < 10.5).double().mean() - 0.5).abs() < 6 * 0.5 / 60**0.5  # crosses have 80/9 pixels, disks 4 pi


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.world}-{c.look.is_grey}-{len(c.look.shapes)}")
def test_worlds_survive_json_and_their_sequences_a_file(tmp_path, config):
    run = RunConfig(data=config)
    save_config(tmp_path, run)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["world"] == config.world
    assert load_config(tmp_path) == run
    data = simulate(config, 4, seed=0)
    save_sequences(tmp_path / "data.npz", data)
    loaded = load_sequences(tmp_path / "data.npz")
    assert torch.equal(loaded.images, data.images)
    assert loaded.images.dtype == data.images.dtype
    assert (loaded.dynamics is None) == (config.true_dynamics() is None)


def test_configurations_that_name_no_world_are_cannonballs(tmp_path):
    values = json.loads((PRETRAINED / "quick" / "config.json").read_text())
    for name in ("world", "look"):
        values["data"].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path).data == CannonballConfig(height=32, width=32)
    values["data"]["world"] = "underwater"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="there is no world 'underwater'; wanted one of"):
        load_config(tmp_path)


def test_a_world_of_ones_own_is_simulated_saved_and_loaded(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Still(WorldConfig):
        world: str = field(default="still", init=False)
        place: float = 4.0

        def move(self, rng, shape):
            paths = np.full((*shape, self.n_frames, 2), self.place)
            return Motion(paths, paths, None)

    monkeypatch.setitem(WORLDS, "still", Still)
    config = RunConfig(data=Still(place=6.0, height=20, width=20))
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config
    images = simulate(config.data, 2, seed=0).images
    assert images[:, :, 6, 6].all()
    assert not images[:, :, 16].any()


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        (DriftConfig, {"entry": (0.5, 0.2)}, r"entry is \(0.5, 0.2\)"),
        (DriftConfig, {"exit": (0.5, 1.2)}, r"exit is \(0.5, 1.2\)"),
        (DriftConfig, {"position_noise": -1.0}, "position_noise is -1.0"),
        (DriftConfig, {"position_noise": 40.0}, "have no room for objects of radius 2.0"),
        (BouncingConfig, {"speed": (2.0, 1.0)}, r"speed is \(2.0, 1.0\)"),
        (BouncingConfig, {"n_frames": 1}, "n_frames is 1"),
        (Look, {"shapes": ("disk", "star")}, r"shapes are \('disk', 'star'\); wanted one or more of"),
        (Look, {"shapes": ()}, "wanted one or more of"),
        (Look, {"least_size": 0.0}, "least_size is 0.0"),
        (Look, {"brightness": (0.0, 1.0)}, "brightness is"),
        (Look, {"salt_and_pepper": 1.1}, "salt_and_pepper is 1.1; wanted a probability"),
        (Look, {"grey_noise": float("nan")}, "grey_noise is nan"),
    ],
    ids=str,
)
def test_bad_configurations_raise(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_grey_files_with_values_beyond_black_and_white_raise(tmp_path, value):
    images = np.full((2, 3, 4, 5), 0.5, np.float32)
    np.savez(tmp_path / "good.npz", images=images, n_objects=np.ones(2, int))
    assert load_sequences(tmp_path / "good.npz").images.dtype == torch.float32
    images[1, 2, 0, 0] = value
    np.savez(tmp_path / "bad.npz", images=images, n_objects=np.ones(2, int))
    with pytest.raises(ValueError, match=r"wanted 0 for black to 1 for white|only whole frames may be NaN"):
        load_sequences(tmp_path / "bad.npz")


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DriftConfig().radius = 3.0
