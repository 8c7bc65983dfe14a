import dataclasses

import numpy as np
import oracles
import pytest
import torch

from pyro_pixels._batch import object_mask
from pyro_pixels._files import atomic_write
from pyro_pixels.data import ImageSequences, load_sequences, save_sequences
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig, true_dynamics
from pyro_pixels.worlds.drawing import render_disks

SMALL = CannonballConfig(n_frames=5, height=16, width=20)
FIELDS = ("images", "n_objects", "positions", "paths", "sides")


def assert_same_sequences(data, wanted):
    for name in FIELDS:
        x, y = getattr(data, name), getattr(wanted, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert (data.dynamics is None) == (wanted.dynamics is None)
    if data.dynamics is not None:
        for x, y in zip((*data.dynamics.lgssm, data.dynamics.pi), (*wanted.dynamics.lgssm, wanted.dynamics.pi)):
            assert torch.equal(x, y)


def present_of(data):
    return object_mask(data.n_objects, data.positions.shape[1])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        save_sequences(tmp_path / name, simulate(SMALL, 6, seed=seed))
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    first, second = simulate(SMALL, 6, seed=3), simulate(SMALL, 6, seed=4)
    assert_same_sequences(simulate(SMALL, 6, seed=3), first)
    assert not torch.equal(first.images, second.images)


def test_simulated_fields_and_shapes():
    data = simulate(SMALL, 7, seed=0)
    assert len(data) == 7
    assert data.size == (16, 20)
    assert data.images.shape == (7, 5, 16, 20)
    assert data.images.dtype == torch.uint8
    assert set(data.images.unique().tolist()) == {0, 1}
    assert data.n_objects.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert data.positions.shape == data.paths.shape == (7, 3, 5, 2)
    present = present_of(data)
    for x in (data.positions, data.paths):
        assert torch.equal(x.isfinite().all(-1).all(-1), present)
        assert x[~present].isnan().all()


def test_noise_free_paths_obey_newtons_recursion_in_pixels(tmp_path):
    save_sequences(tmp_path / "data.npz", simulate(CannonballConfig(n_objects=(2, 3)), 10, seed=1))
    file = np.load(tmp_path / "data.npz")
    A, B, u = file["true_A"], file["true_B"], file["true_u"]
    assert not file["true_Sigma_H"].any()
    delta = A[0, 2]
    np.testing.assert_array_equal(A, [[1, 0, delta, 0], [0, 1, 0, delta], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert delta == 0.015
    present = np.isfinite(file["paths"]).all((2, 3))
    assert present.sum() == 25
    for path in file["paths"][present]:
        h = np.concatenate([path[0], (path[1] - path[0] - u[:2]) / delta])
        for t in range(30):
            np.testing.assert_allclose(B @ h, path[t], rtol=0, atol=1e-9)
            h = A @ h + u


def test_force_is_that_of_the_paper_in_pixels_with_rows_counted_downwards():
    config = CannonballConfig(gravity=5.0, delta=0.02, position_noise=0.01)
    lgssm = true_dynamics(config).lgssm
    pixels_per_unit = (lgssm.Sigma_A[1, 1] / 0.01).sqrt().item()
    force = 5.0 * pixels_per_unit * np.array([0, 0.5 * 0.02**2, 0, 0.02])
    np.testing.assert_allclose(lgssm.u.numpy(), force, rtol=1e-12)


@pytest.mark.parametrize("radius", [0.4, 1.0, 1.5, 2.0, 3.3])
def test_disks_equal_a_literal_pixel_loop(radius):
    rng = np.random.default_rng(0)
    positions = rng.uniform(-5, 16, (2, 4, 3, 2))
    positions[0, 0] = [[3, 4], [0, 0], [9.5, 6.5]]  # on pixel centres, at a corner, between pixels
    positions[0, 1] = positions[0, 0] + 0.7  # overlapping
    positions[0, 2] = [[-1.0, 5.0], [-40.0, 3.0], [1e5, 1e5]]  # partly and wholly off the image
    positions[1, 3] = np.nan
    images = render_disks(positions, 9, 11, radius)
    assert images.dtype == np.uint8
    for i in range(2):
        np.testing.assert_array_equal(images[i], oracles.disks(positions[i], 9, 11, radius))


def test_images_show_the_noisy_positions():
    data = simulate(SMALL, 3, seed=2)
    for i in range(3):
        wanted = oracles.disks(data.positions[i].numpy(), 16, 20, 2.0)
        np.testing.assert_array_equal(data.images[i].numpy(), wanted)


@pytest.mark.parametrize(
    "config",
    [
        CannonballConfig(),
        CannonballConfig(position_noise=1e-6),
        CannonballConfig(n_frames=50, height=32, width=32, n_objects=(4,)),
        CannonballConfig(position_noise=0.1),
        CannonballConfig(height=24, width=40, radius=1.0, state_noise=3e-3),
    ],
    ids=["default", "little_noise", "T50_32x32_N4", "much_noise", "state_noise"],
)
def test_all_balls_lie_wholly_inside_the_image(config):
    data = simulate(config, 60, seed=0)
    positions = data.positions[present_of(data)]
    for axis, size in enumerate((config.width, config.height)):
        assert positions[..., axis].min() >= config.radius
        assert positions[..., axis].max() <= size - 1 - config.radius


def test_paths_of_extreme_shots_reach_neither_border_nor_leave_much_room():
    config = CannonballConfig(n_frames=10, height=12, width=12, radius=1.0, position_noise=0.0)
    data = simulate(config, 1000, seed=0)
    paths = data.paths[present_of(data)]
    low, high = paths.flatten(0, 1).amin(0), paths.flatten(0, 1).amax(0)
    assert (low >= 1.0).all()
    assert (high <= 10.0).all()
    assert (low < 1.7).all()
    assert (high > 9.3).all()
    assert torch.equal(data.positions.nan_to_num(), data.paths.nan_to_num())


def test_long_small_sequences_of_four_objects():
    config = CannonballConfig(n_frames=50, height=32, width=32, n_objects=(4,))
    data = simulate(config, 2, seed=0)
    assert data.images.shape == (2, 50, 32, 32)
    assert data.positions.shape == (2, 4, 50, 2)
    assert data.n_objects.tolist() == [4, 4]
    assert (data.images.flatten(2).sum(-1) > 0).all()


def test_sides_say_which_way_the_balls_fly():
    data = simulate(SMALL, 60, seed=0)
    present = present_of(data)
    x = data.paths[..., 0]
    assert torch.equal(data.sides == -1, ~present)
    assert set(data.sides[present].tolist()) == {0, 1}
    assert (x[data.sides == 0].diff(dim=-1) > 0).all()
    assert (x[data.sides == 1].diff(dim=-1) < 0).all()


def test_each_side_is_as_likely_as_true_pi():
    data = simulate(CannonballConfig(n_frames=2, height=8, width=8, radius=1.0, n_objects=(3,)), 1000, seed=0)
    assert data.dynamics.pi.tolist() == [0.5, 0.5]
    share = data.sides.double().mean().item()
    assert abs(share - 0.5) < 6 * 0.5 / np.sqrt(3000)  # sigma


def assert_moments(draws, mean, cov, sigmas=6):
    n = len(draws)
    assert (np.abs(draws.mean(0) - mean) < sigmas * draws.std(0) / np.sqrt(n)).all()
    products = np.einsum("ni,nj->nij", draws - mean, draws - mean)
    assert (np.abs(products.mean(0) - cov) <= sigmas * products.std(0) / np.sqrt(n)).all()


@pytest.mark.parametrize("side", [0, 1])
def test_moments_of_the_first_state_are_those_of_the_true_dynamics(side):
    config = CannonballConfig(n_frames=3, height=12, width=15, radius=1.0, n_objects=(4,))
    data = simulate(config, 2000, seed=0)
    A, _, u, _, _, mu, Sigma = (x.numpy() for x in true_dynamics(config).lgssm)
    paths = data.paths[data.sides == side].numpy()
    velocity = (paths[:, 1] - paths[:, 0] - u[:2]) / A[0, 2]
    assert_moments(np.concatenate([paths[:, 0], velocity], 1), mu[side], Sigma[side])  # 6 sigma


@pytest.mark.parametrize("side", [0, 1])
def test_moments_of_noisy_positions_are_those_of_the_true_dynamics(side):
    config = CannonballConfig(
        n_frames=4, height=12, width=15, radius=1.0, n_objects=(4,), state_noise=1e-3, position_noise=1e-2
    )
    data = simulate(config, 2000, seed=1)
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (x.numpy() for x in true_dynamics(config).lgssm)
    mean, cov = oracles.joint_moments((A, B, u, Sigma_H, Sigma_A, mu[side], Sigma[side]), 4)
    places = oracles.a_index(range(4), 4, 4, 2)
    draws = data.positions[data.sides == side].flatten(1).numpy()
    assert_moments(draws, mean[places], cov[np.ix_(places, places)])  # 6 sigma
    noise = (data.positions - data.paths).flatten(0, 2).numpy()
    assert_moments(noise, np.zeros(2), Sigma_A)  # 6 sigma


def test_slices_and_index_tensors_pick_sequences():
    data = simulate(SMALL, 6, seed=0)
    by_slice, by_index, by_mask = data[1:3], data[torch.tensor([1, 2])], data[data.n_objects == 3]
    assert_same_sequences(by_slice, by_index)
    assert by_slice.n_objects.tolist() == [2, 3]
    assert torch.equal(by_slice.positions[1, :3], data.positions[2])
    assert torch.equal(by_mask.images, data.images[[2, 5]])
    assert ImageSequences(data.images, data.n_objects)[:2].positions is None


def test_object_mask():
    assert object_mask(torch.tensor([1, 3, 2]), 3).int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_round_trip_of_simulated_sequences(tmp_path):
    data = simulate(SMALL, 6, seed=0)
    save_sequences(tmp_path / "new" / "folder" / "data.npz", data)
    assert_same_sequences(load_sequences(tmp_path / "new" / "folder" / "data.npz"), data)


def test_round_trip_of_images_and_numbers_of_objects_alone(tmp_path):
    data = simulate(SMALL, 6, seed=0)
    data = ImageSequences(data.images, data.n_objects)
    save_sequences(str(tmp_path / "data.npz"), data)
    assert_same_sequences(load_sequences(str(tmp_path / "data.npz")), data)


@pytest.mark.parametrize("pick", [lambda n: n == 1, lambda n: n <= 2], ids=["N=1", "N<=2"])
def test_round_trip_of_the_sequences_with_few_objects(tmp_path, pick):
    data = simulate(SMALL, 6, seed=0)
    part = data[pick(data.n_objects)]
    save_sequences(tmp_path / "part.npz", part)
    loaded = load_sequences(tmp_path / "part.npz")
    assert torch.equal(loaded.images, part.images)
    N = int(part.n_objects.max())
    torch.testing.assert_close(loaded.positions[:, :N], part.positions[:, :N], rtol=0, atol=0, equal_nan=True)


def test_round_trip_of_one_simulated_sequence(tmp_path):
    data = simulate(SMALL, 1, seed=0)
    save_sequences(tmp_path / "one.npz", data)
    assert torch.equal(load_sequences(tmp_path / "one.npz").images, data.images)


def test_user_files_may_have_other_types_of_integers_and_floats_and_more_arrays(tmp_path):
    np.savez(
        tmp_path / "user.npz",
        images=np.ones((2, 3, 4, 5), np.uint8),
        n_objects=np.array([2, 1], np.uint8),
        positions=np.ones((2, 2, 3, 2), np.float32),
        comment=np.array("mine"),
    )
    data = load_sequences(tmp_path / "user.npz")
    assert data.n_objects.dtype == torch.int64
    assert data.n_objects.tolist() == [2, 1]
    assert data.positions.dtype == torch.float64
    assert data.positions[1, 1].isnan().all()
    assert (data.positions[0] == 1).all()
    assert data.dynamics is None
    assert data.paths is None
    assert data.sides is None


def test_some_but_not_all_true_parameters_are_left_out(tmp_path):
    np.savez(tmp_path / "f.npz", images=np.ones((1, 2, 4, 4), np.uint8), n_objects=np.array([1]), true_A=np.eye(4))
    assert load_sequences(tmp_path / "f.npz").dynamics is None


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_no_part(tmp_path, interruption, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def write():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise interruption

    with pytest.raises(interruption):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_an_interrupted_save_keeps_the_old_sequences(tmp_path, monkeypatch):
    data, path = simulate(SMALL, 3, seed=0), tmp_path / "data.npz"
    save_sequences(path, data)

    def fails_half_way(file, **arrays):
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", fails_half_way)
    with pytest.raises(OSError, match="no space left"):
        save_sequences(path, simulate(SMALL, 3, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]
    assert_same_sequences(load_sequences(path), data)


def test_a_write_replaces_the_old_file_only_at_its_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("below", ["data.npz", "folder/data.npz"])
def test_a_folder_that_cannot_be_written_to_raises(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")  # no folder can lie under a file, for root neither
    with pytest.raises(ValueError, match="choose a folder that can be written to"):
        save_sequences(tmp_path / "file" / below, simulate(SMALL, 3, seed=0))


def good_arrays():
    return {
        "images": np.ones((3, 4, 5, 6), np.uint8),
        "n_objects": np.array([1, 2, 2]),
        "positions": np.ones((3, 2, 4, 2)),
        "sides": np.zeros((3, 2), np.int64),
    }


def with_value(x, index, value):
    x = x.copy()
    x[index] = value
    return x


def test_the_arrays_that_the_next_tests_break_are_good(tmp_path):
    np.savez(tmp_path / "good.npz", **good_arrays())
    assert len(load_sequences(tmp_path / "good.npz")) == 3


IMAGES, POSITIONS = good_arrays()["images"], good_arrays()["positions"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "has no array 'images', only .* wanted images and n_objects"),
        ({"n_objects": None}, "has no array 'n_objects'"),
        ({"images": with_value(IMAGES.astype(float), (0, 0, 1, 0), np.nan)}, "images have NaN in part of a frame"),
        ({"images": 3.0 * IMAGES}, "images have values from 3 to 3; wanted 0 for black to 1 for white"),
        ({"images": IMAGES - 2.0}, "images have values from -1 to -1; wanted"),
        ({"images": IMAGES[0]}, r"images have shape \(4, 5, 6\); wanted \(n, T, H, W\)"),
        ({"images": np.stack([IMAGES] * 3, -1)}, "colour in the last axis; wanted grey images: examples/prepare.py"),
        ({"images": 2 * IMAGES}, "images have the values 2 to 2; wanted 0 and 1 only"),
        ({"images": IMAGES[:0], "n_objects": np.zeros(0, int)}, "none of them 0"),
        ({"images": IMAGES[..., :0]}, "none of them 0"),
        ({"images": IMAGES[:, :1]}, "sequences have 1 frame; wanted at least 2"),
        ({"n_objects": np.array([1, 2])}, r"n_objects has shape \(2,\) .* wanted integers \(3,\)"),
        ({"n_objects": np.array([[1], [2], [2]])}, r"wanted integers \(3,\)"),
        ({"n_objects": np.array(2)}, r"wanted integers \(3,\)"),
        ({"n_objects": np.array([1, 0, 2])}, "value 0; every sequence needs at least 1 object"),
        ({"n_objects": np.array([1, -1, 2])}, "value -1; every sequence needs at least 1 object"),
        ({"n_objects": np.array([1.0, 2.0, 2.0])}, r"type float64; wanted integers \(3,\)"),
        ({"positions": POSITIONS[:, :1]}, r"positions have shape .* wanted floats \(n, N_max, T, 2\) = \(3, 2, 4, 2\)"),
        ({"positions": POSITIONS[..., :1]}, "positions have shape"),
        ({"positions": POSITIONS[:, :, :3]}, "positions have shape"),
        ({"positions": POSITIONS.astype(int)}, "positions have .* type int64; wanted floats"),
        ({"positions": with_value(POSITIONS, (0, 0, 1), np.nan)}, "positions of existing objects are not finite"),
        ({"positions": with_value(POSITIONS, (1, 1, 3), np.inf)}, "positions of existing objects are not finite"),
        ({"paths": POSITIONS[:2]}, "paths have shape"),
        ({"sides": np.zeros((3, 3), int)}, r"sides have shape \(3, 3\)"),
        ({"sides": np.zeros((3, 2))}, "sides have .* type float64; wanted integers"),
        ({"images": np.array([{}, {}, {}])}, "cannot be read as an .npz of arrays"),
        ({"extra": np.array([{}])}, "cannot be read as an .npz of arrays"),
    ],
)
def test_files_with_wrong_contents_raise_and_say_what_is_wanted(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    arrays = {name: x for name, x in (good_arrays() | changes).items() if x is not None}
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_sequences(path)
    assert str(path) in str(error.value)


def test_nan_for_objects_that_are_not_there_is_fine(tmp_path):
    arrays = good_arrays() | {"positions": with_value(POSITIONS, (0, 1), np.nan)}
    np.savez(tmp_path / "f.npz", **arrays)
    assert load_sequences(tmp_path / "f.npz").positions[0, 1].isnan().all()


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.npz"):
        load_sequences(tmp_path / "nowhere.npz")


def broken_files():
    rng = np.random.default_rng(0)

    def npz(path):
        with open(path, "wb") as file:
            np.savez_compressed(file, images=rng.integers(2, size=(3, 4, 8, 8)).astype(np.uint8), n_objects=[1, 1, 1])
        return path.read_bytes()

    def npy(path):
        with open(path, "wb") as file:
            np.save(file, np.zeros((3, 4, 8, 8), np.uint8))

    def pickle(path):
        path.write_bytes(b"\x80\x04]\x94.")

    def damaged(path):
        content = bytearray(npz(path))
        content[100:120] = bytes(20)
        path.write_bytes(content)

    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("images, n_objects\n1, 2\n"),
        "pickle": pickle,
        "truncated": lambda path: path.write_bytes(npz(path)[:-40]),
        "folder": lambda path: path.mkdir(),
        "npy": npy,
        "damaged": damaged,
    }


@pytest.mark.parametrize("make", broken_files().values(), ids=broken_files())
def test_files_that_are_no_npz_raise(tmp_path, make):
    make(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz of arrays"):
        load_sequences(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_frames": 1}, "n_frames is 1; wanted a whole number of at least 2"),
        ({"n_objects": ()}, r"n_objects is \(\)"),
        ({"n_objects": (1, 0)}, r"n_objects is \(1, 0\)"),
        ({"radius": 0.0}, "balls of radius 0.0 do not fit"),
        ({"radius": float("nan")}, "balls of radius nan do not fit"),
        ({"radius": 24.0}, "balls of radius 24.0 do not fit an image of 48 x 48 pixels"),
        ({"height": 5}, "do not fit an image of 5 x 48 pixels"),
        ({"width": 5}, "do not fit an image of 48 x 5 pixels"),
        ({"position_noise": -1e-3}, "position_noise is -0.001"),
        ({"state_noise": -1e-3}, "state_noise is -0.001"),
        ({"delta": 0.0}, "delta above 0"),
    ],
    ids=str,
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        CannonballConfig(**wrong)


@pytest.mark.parametrize("n", [0, -1])
def test_simulating_no_sequences_raises(n):
    with pytest.raises(ValueError, match=f"n_sequences is {n}; wanted at least 1"):
        simulate(SMALL, n, seed=0)


def test_configs_and_sequences_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.n_frames = 3


def test_a_longer_look_at_the_same_world():
    """More frames than there is room for: the first ones are those of the shorter set, and gravity is the same."""
    short = CannonballConfig(n_frames=10, position_noise=0.0)
    long = dataclasses.replace(short, n_frames=16, n_frames_in_view=10)
    a, b = simulate(short, 6, seed=3), simulate(long, 6, seed=3)
    assert torch.equal(a.images, b.images[:, :10])
    torch.testing.assert_close(a.paths, b.paths[:, :, :10], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.dynamics.lgssm.u, b.dynamics.lgssm.u, rtol=0, atol=0)
    with pytest.raises(ValueError, match="n_frames_in_view is 1; wanted"):
        CannonballConfig(n_frames_in_view=1)
