"""Crowded and long films: windows around whole objects, and tracks of sequences linked to particles of the film."""

import numpy as np
import pytest

import prepare
from pyro_pixels.video import load_source, prepare_video, save_prepared
from pyro_pixels.video.linking import link_tracks
from pyro_pixels.video.windows import EDGE, MOST, find_windows, without_dust

pytest.importorskip("skimage")

H, W, F, SIDE = 96, 128, 40, 32
Y, X = np.mgrid[:H, :W]


def crowd(n=12, seed=0):
    """(F, n, 2), discs that keep inside the film."""
    rng = np.random.default_rng(seed)
    p, v = rng.uniform(6, [W - 6, H - 6], (n, 2)), rng.normal(0, 0.5, (n, 2))
    places = []
    for _ in range(F):
        places.append(p)
        p = p + v
        v = np.where((p < 5) | (p > [W - 6, H - 6]), -v, v)
    return np.stack(places)


def film_of(places, radius=3, noise=0.02, seed=0):
    """(F, H, W), soft discs on grey ground."""
    off = np.hypot(X - places[..., 0, None, None], Y - places[..., 1, None, None]).min(1)
    noisy = 0.2 + 0.7 / (1 + np.exp(2 * (off - radius)))
    return (noisy + np.random.default_rng(seed).normal(0, noise, noisy.shape)).clip(0, 1)


def test_no_object_crosses_the_edge_of_a_window_and_each_is_in_one():
    for seed in range(10):
        white = film_of(crowd(seed=seed), noise=0)[:12] > 0.5
        windows = find_windows(white, SIDE)
        covered = np.zeros(white.shape, bool)
        for (left, top), counts, area in windows:
            inside = white[:, top : top + SIDE, left : left + SIDE]
            assert inside.shape == (12, SIDE, SIDE)
            assert inside.sum() == inside[:, EDGE:-EDGE, EDGE:-EDGE].sum()
            assert 1 <= counts.max() <= MOST
            new = ~covered[:, top : top + SIDE, left : left + SIDE]
            assert area == (inside & new).sum() > 0
            covered[:, top : top + SIDE, left : left + SIDE] = True
        assert sum(w.area for w in windows) == (white & covered).sum()
        assert (white & covered).sum() > 0.3 * white.sum()


def test_an_object_alone_is_in_the_middle_of_its_window_and_far_ones_have_windows_of_their_own():
    white = np.zeros((3, 80, 120), bool)
    white[:, 38:42, 58:62] = True
    (window,) = find_windows(white, SIDE)
    assert window.corner == (60 - SIDE // 2, 40 - SIDE // 2)
    white[:, 38:42, 100:104] = True
    assert len(find_windows(white, SIDE)) == 2


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(slice(10, 70), slice(40, 44)), (slice(0, 4), slice(40, 44)), (slice(30, 34), slice(117, 120))],
)
def test_what_is_too_long_or_at_the_edge_of_the_film_is_in_no_window(rows, columns):
    white = np.zeros((3, 80, 120), bool)
    white[:, rows, columns] = True
    assert find_windows(white, SIDE) == []


def test_dust_is_no_object():
    white = np.zeros((2, 20, 20), bool)
    white[:, 2:6, 2:6] = white[0, 10, 10] = white[1, 15, 15:18] = True
    found = without_dust(white, 2)
    assert found.sum() == 32
    assert found[:, 2:6, 2:6].all()


@pytest.mark.parametrize("dark", [False, True])
def test_windows_of_a_film_are_where_they_are_said_to_be(tmp_path, dark):
    """Centroids in windows of a film with few objects, mapped back to its pixels, against the truth."""
    places = crowd(5, seed=3)
    film = film_of(places)
    np.save(tmp_path / "a.npy", 1 - film if dark else film)
    prepared = prepare_video(tmp_path / "a.npy", window=SIDE, frames=10)
    save_prepared(tmp_path / "mine.npz", prepared)
    source = load_source(tmp_path / "mine.npz")
    assert source == prepared.source
    data, alone = prepared.data, (prepared.data.n_objects == 1).numpy()
    assert alone.sum() > 10
    rows, columns = np.mgrid[:SIDE, :SIDE]
    v = data.images.numpy().astype(float)
    mass = v.sum((2, 3))
    found = source.to_source(np.stack([(v * c).sum((2, 3)) / mass for c in (columns, rows)], -1))
    starts = np.array([t for _, t in source.first_frames])
    truth = places[starts[:, None] + np.arange(10)]  # (n, T, 5, 2)
    off = np.linalg.norm(found[:, :, None] - truth, axis=-1).min(-1)
    assert np.median(off[alone]) < 0.3
    assert off[alone].max() < 1.5


def test_the_contact_sheet_shows_the_window_of_a_shrunk_film(tmp_path):
    film = film_of(crowd(5))
    np.save(tmp_path / "a.npy", np.repeat(np.repeat(film, 2, 1), 2, 2))
    prepared = prepare_video(tmp_path / "a.npy", size=128, window=SIDE, frames=10)
    frames = prepared.source.frames(0, 10)
    assert frames is not None
    shown = prepared.source.of_window(frames, 0, SIDE)
    left, top = prepared.source.windows[0]
    assert shown.shape == (10, 2 * SIDE, 2 * SIDE)
    assert np.array_equal(shown, frames[:, 2 * top : 2 * (top + SIDE), 2 * left : 2 * (left + SIDE)])


def test_bad_windows_are_refused_in_one_line(tmp_path):
    np.save(tmp_path / "a.npy", film_of(crowd(5)))
    for options, message in (
        ({"window": 100}, "window is 100 for films of 96 x 128"),
        ({"window": 7}, "window is 7; wanted"),
        ({"window": 32, "n_objects": 2}, "counted in each window"),
        ({"window": 10, "frames": 30}, r"no window of 10 pixels .*--window.*--frames"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            prepare_video(tmp_path / "a.npy", **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_a_film_without_objects_is_refused(tmp_path, grey):
    np.save(tmp_path / "a.npy", np.full((12, 64, 64), grey))
    with pytest.raises(ValueError, match="nothing moves or stands out"):
        prepare_video(tmp_path / "a.npy", window=SIDE)


def test_few_objects_in_a_large_film_are_found(tmp_path):
    """They cover less than 0.2 % of the pixels."""
    film = np.full((12, 400, 400), 0.2)
    film[:, 200:206, 100:106] = film[:, 50:56, 300:306] = 0.8
    film += np.random.default_rng(0).normal(0, 0.03, film.shape)
    np.save(tmp_path / "a.npy", film.clip(0, 1))
    prepared = prepare_video(tmp_path / "a.npy", window=SIDE, background="keep")
    assert prepared.data.n_objects.tolist() == [1, 1]
    assert prepared.source.windows == ((303 - 16, 53 - 16), (103 - 16, 203 - 16))


def test_damaged_windows_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", film_of(crowd(5)))
    prepared = prepare_video(tmp_path / "a.npy", window=SIDE, frames=10)
    save_prepared(tmp_path / "a.npz", prepared._replace(source=prepared.source._replace(windows=((0, 0),))))
    with pytest.raises(ValueError, match="1 windows for"):
        load_source(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="wanted those of all"):
        prepared.source.to_source(np.zeros((1, 10, 2)))


def test_the_script_cuts_windows(tmp_path, capsys):
    np.save(tmp_path / "a.npy", film_of(crowd(5)))
    prepare.main(prepare.Arguments((str(tmp_path / "a.npy"),), out=tmp_path / "mine.npz", window=SIDE, frames=10))
    assert "windows of 32 x 32 pixels hold" in capsys.readouterr().out
    assert (tmp_path / "mine.png").exists()


def cut(truth, T, stride, most, rng):
    """Sequences of T frames of tracks (F, n, 2): positions with noise, each object in a random place, and identities.

    Each sequence shows up to ``most`` objects, and each object is in one of the sequences of each start, or in two.
    """
    positions, who, starts = [], [], []
    for t in range(0, len(truth) - T + 1, stride):
        order = rng.permutation(truth.shape[1])
        groups = [order[i : i + most] for i in range(0, len(order), most)]
        groups.append(rng.choice(order, most, replace=False))
        for group in groups:
            a = np.zeros((most, T, 2))
            a[: len(group)] = truth[t : t + T, group].swapaxes(0, 1)
            positions.append(a + rng.normal(0, 0.3, a.shape))
            who.append([*group, *[-1] * (most - len(group))])
            starts.append((0, t))
    return np.stack(positions), np.array(who), starts


@pytest.mark.parametrize("seed", range(5))
def test_objects_of_overlapping_sequences_are_the_same_particles(seed):
    rng = np.random.default_rng(seed)
    a, who, starts = cut(crowd(8, seed), 12, 6, 3, rng)
    n = (who >= 0).sum(1)
    variances = rng.uniform(0.1, 1, a.shape[:3])
    links = link_tracks(a, variances, n, starts, [12] * len(a))
    assert ((links.particles >= 0) == (who >= 0)).all()
    pairs = set(zip(links.particles[who >= 0].tolist(), who[who >= 0].tolist()))
    assert len(pairs) == 8  # a bijection: no particle is two objects, no object two particles
    chosen: dict[tuple[int, int], list[float]] = {}
    every: dict[tuple[int, int], list[float]] = {}
    for b, i, t in np.argwhere(who[:, :, None] >= np.zeros(12)):
        key = (int(links.particles[b, i]), starts[b][1] + int(t))
        every.setdefault(key, []).append(variances[b, i, t])
        if links.best[b, i, t]:
            chosen.setdefault(key, []).append(variances[b, i, t])
    assert {key: [min(v)] for key, v in every.items()} == chosen


def test_far_tracks_other_films_and_sequences_that_share_no_frame_are_other_particles():
    line = np.stack([np.arange(10.0), np.zeros(10)], -1)[None]  # (1, T, 2)
    a = np.stack([line, np.add(line, [0, 3]), np.add(line, [0, 0.5]), line, line])
    starts = [(0, 0), (0, 0), (0, 0), (1, 0), (0, 10)]
    links = link_tracks(a, np.ones((5, 1, 10)), [1] * 5, starts, [10] * 5)
    assert links.particles[:, 0].tolist() == [0, 1, 0, 3, 2]
    assert links.best[:, 0].all(1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("gap", [1, 2, 5, 6])
def test_a_track_that_goes_on_after_a_gap_is_the_same_particle(gap):
    """Two objects that meet in the gap and cross: only their velocities tell which is which."""
    t = np.arange(40.0)
    truth = np.stack([np.stack([t, 0 * t], -1), np.stack([t, 2 * (t - 12 - gap / 2)], -1)])  # they meet in the gap
    a = np.stack([truth[:, :13], truth[::-1, 12 + gap : 25 + gap]])
    links = link_tracks(a, np.ones(a.shape[:3]), [2, 2], [(0, 0), (0, 12 + gap)], [13, 13])
    assert links.particles.tolist() == ([[0, 1], [1, 0]] if gap <= 5 else [[0, 1], [2, 3]])
    assert links.best.all()


def test_shared_frames_tell_more_than_a_forecast():
    """The second sequence is wrong in its first half, where the first one ends."""
    line = np.stack([0.5 * np.arange(20), np.full(20, 20.0)], -1)
    a = np.stack([line[t : t + 10] for t in (0, 5, 10)])[:, None]
    a[1, 0, :5, 1] += np.linspace(9, 1, 5)
    a[1, 0, 5:, 1] += 0.1
    links = link_tracks(a, np.ones(a.shape[:3]), [1] * 3, [(0, 0), (0, 5), (0, 10)], [10] * 3)
    assert links.particles[:, 0].tolist() == [0, 1, 1]


def test_positions_that_are_nan_are_no_estimates():
    a = np.stack([np.arange(12.0), np.zeros(12)], -1)
    a = np.stack([a[:6], a[5:11], a[11:][[0] * 6]])[:, None]
    a[0, 0, 5] = a[1, 0, 4:] = np.nan
    variances = np.ones((3, 1, 6))
    variances[1, 0, 1] = np.inf
    links = link_tracks(a, variances, [1, 1, 1], [(0, 0), (0, 5), (0, 11)], [6, 6, 1])
    assert links.particles[:, 0].tolist() == [0, 0, 0]  # each begins where the one before leads
    counted = [[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert links.best[:, 0].astype(int).tolist() == counted
    assert link_tracks(a[:0], variances[:0], [], [], []).particles.shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variances": np.ones((2, 1, 5))}, r"wanted \(n, N, T, 2\) and \(n, N, T\)"),
        ({"n_objects": [1, 2]}, "n_objects has values from 1 to 2; wanted 0 to 1"),
        ({"lengths": [4, 5]}, "lengths has values from 4 to 5; wanted 0 to 4"),
        ({"starts": [(0, 0)]}, "starts has length 1 for positions of 2 sequences"),
        ({"starts": [(0, 0), (0, -1)]}, "starts has the frame -1"),
    ],
)
def test_tracks_that_do_not_fit_are_refused(change, message):
    given = {"positions": np.zeros((2, 1, 4, 2)), "variances": np.ones((2, 1, 4)), "n_objects": [1, 1]}
    given |= {"starts": [(0, 0), (0, 2)], "lengths": [4, 4]} | change
    with pytest.raises(ValueError, match=message):
        link_tracks(*(given[name] for name in ("positions", "variances", "n_objects", "starts", "lengths")))


def test_frames_beyond_a_films_end_link_nothing():
    a = np.zeros((2, 1, 6, 2))
    a[0, :, :4] = 9
    links = link_tracks(a, np.ones((2, 1, 6)), [1, 1], [(0, 0), (0, 4)], [4, 6])
    assert links.particles[:, 0].tolist() == [0, 1]
    assert links.best.sum((1, 2)).tolist() == [4, 6]
