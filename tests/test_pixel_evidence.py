"""Which pixels show an object: noise, background and clutter, estimated from the film."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from benchmarks import grey_films
from pyro_pixels import PRESETS, build, simulate
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.guides.pixel_evidence import PixelEvidence
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.runs import load_run, save_config
from pyro_pixels.training.fitting import fit
from pyro_pixels.video import check_film
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import DriftConfig

GREY = DriftConfig(height=32, width=32, radius=2.5, look=Look(brightness=(0.9, 1.0)))


def blobs():
    y, x = np.mgrid[:32, :32]
    rng = np.random.default_rng(5)
    centres = rng.uniform(0, 31, (5, 2))
    return np.max([0.6 * np.exp(-((y - r) ** 2 + (x - c) ** 2) / 12) for r, c in centres], 0)


BACKGROUNDS = {
    "blobs": blobs(),
    "slope": np.linspace(0, 0.5, 32)[:, None] * np.ones(32),
    "texture": 4 * gaussian_filter(np.random.default_rng(0).random((32, 32)), 3) - 1.7,
}


def film(*, noise=0.0, background=None, salt=0.0, n=90, seed=0):
    data = simulate(replace(GREY, look=Look(salt_and_pepper=salt)) if salt else GREY, n, seed=seed)
    images = data.images.float().numpy()
    if background is not None:
        images = np.maximum(images, background.clip(0, 1))
    if noise:
        images = (images + np.random.default_rng(seed).normal(0, noise, images.shape)).clip(0, 1)
    return replace(data, images=images.astype(np.float32))


def untrained_error(data, guide):
    """Mean error in pixels for each N of the measurements that an untrained tracking head makes."""
    with torch.no_grad():
        seen = guide.see(data.images)
        y, _ = guide.head(guide.rnn(seen, data.n_objects), seen, data.n_objects)
    y = (y + 1) / 2 * 31
    y = metrics.reorder(y, metrics.assign(y, data.positions, data.n_objects))
    error = metrics.errors(y, data.positions, data.n_objects).mean(-1)
    return [float(error[data.n_objects == n].nanmean()) for n in (1, 2, 3)]


def test_clean_films_are_left_alone_to_the_bit():
    for config in (CannonballConfig(height=32, width=32), GREY, replace(GREY, look=Look(shapes=("cross", "ring")))):
        data, evidence = simulate(config, 60, seed=0), PixelEvidence()
        evidence.estimate(data.images, data.n_objects)
        assert not evidence.active
        assert evidence(data.images.float()) is not None
        assert torch.equal(evidence(data.images.float()), data.images.float())
        assert evidence.state_dict() == {}


@pytest.mark.parametrize(
    "options, bound",
    [
        ({"noise": 0.05}, 0.3),
        ({"noise": 0.10}, 0.4),
        ({"salt": 0.01}, 0.3),
        *(({"background": b, "noise": 0.02}, 0.3) for b in BACKGROUNDS.values()),
        ({"background": BACKGROUNDS["blobs"], "noise": 0.05}, 0.4),
    ],
    ids=["noise 0.05", "noise 0.10", "salt and pepper", *BACKGROUNDS, "blobs and noise"],
)
def test_positions_without_options_and_without_training(options, bound):
    data, run = film(**options), build(PRESETS["quick"])
    run.guide.look_at(data.images, data.n_objects)
    assert max(untrained_error(data, run.guide)) < bound
    plain = build(PRESETS["quick"]).guide
    assert max(untrained_error(data, plain)) > 2 * bound


def test_what_is_found_is_what_was_put_in():
    found = build(PRESETS["quick"]).guide.look_at
    x = film(salt=0.01)
    assert found(x.images, x.n_objects).clutter == pytest.approx(0.005, rel=0.1)  # half of the pixels turn white
    x = film(background=np.full((32, 32), 0.3), noise=0.05)
    told = found(x.images, x.n_objects)
    assert told.has_background
    assert told.noise == pytest.approx(0.05, rel=0.2)  # objects widen the bulk a little
    assert told.contrast == pytest.approx(0.68, abs=0.05)


def test_noise_is_found_where_a_background_was_subtracted():
    """Then more than half of the pixels are exactly black, as in a film without noise."""
    data = film(noise=0.05)
    images = (data.images - 0.015).clip(0, 1)
    assert 0.58 < float((images == 0).float().mean()) < 0.7
    told = PixelEvidence().estimate(images, data.n_objects)
    assert 0.015 < told.noise < 0.05


def test_objects_that_rest_are_no_background():
    """Beads that hardly move are bright in the median of all frames; without them nothing would be left."""
    rng, y, x = np.random.default_rng(0), *np.mgrid[:20, :20]
    places = np.array([[5.0, 6.0], [14.0, 12.0]])
    images = np.zeros((4, 15, 20, 20))
    for b in range(4):
        for t in range(15):
            for r, c in places + rng.normal(0, 0.2, places.shape):
                images[b, t] = np.maximum(images[b, t], (y - r) ** 2 + (x - c) ** 2 < 6)
    images = (images + rng.normal(0, 0.05, images.shape)).clip(0, 1)
    guide = build(replace(PRESETS["quick"], data=CannonballConfig(height=20, width=20))).guide
    told = guide.look_at(torch.from_numpy(images), torch.full((4,), 2))
    assert not told.has_background
    weights = guide.see(torch.from_numpy(images))
    assert weights[:, :, 5, 6].min() > 0.7
    assert weights[:, :, 10, 2].max() < 0.1


def with_neighbours(data, brightness, seed=0):
    """A film in which two blurred things, which are none of the objects, move along the rim."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:32, :32]
    images = data.images.float().numpy().copy()
    for sequence in images:
        for row, column in ((3 + rng.uniform(0, 2), rng.uniform(4, 28)), (28 - rng.uniform(0, 2), rng.uniform(4, 28))):
            drift = rng.uniform(-0.15, 0.15)
            for t, frame in enumerate(sequence):
                blob = np.exp(-((y - row) ** 2 + (x - column - drift * t) ** 2) / 8)
                np.maximum(frame, brightness * blob, out=frame)
    return replace(data, images=images)


def test_what_is_fainter_than_objects_weighs_nothing():
    data = with_neighbours(film(noise=0.05), 0.4)
    guide = build(PRESETS["quick"]).guide
    assert guide.look_at(data.images, data.n_objects).others == 0
    assert max(untrained_error(data, guide)) < 0.4
    weights = guide.see(data.images)
    assert float(weights[:, :, :2].mean() + weights[:, :, 30:].mean()) < 0.01


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["clean", "noise"])
def test_things_that_are_none_of_the_objects_are_allowed_for(tmp_path, noise):
    """A single object had all the pixels of such films, and was seen at the centroid of everything."""
    data = with_neighbours(film(noise=noise), 1.0)
    config = small(guide="structured", data=GREY)
    run = build(config)
    with torch.no_grad():
        run.guide.look_at(data.images, data.n_objects)
    assert 0.01 < run.guide.pixel_evidence.statistics.others < 0.05
    assert any("--background local" in warning for warning in check_film(data))
    told = build(config).guide
    told.load_state_dict(run.guide.state_dict())
    assert told.pixel_evidence.statistics == run.guide.pixel_evidence.statistics
    alone = data[data.n_objects == 1]
    error = {}
    for others in (True, False):
        if not others:
            state = run.guide.state_dict()
            state["pixel_evidence.others"] = torch.zeros(())
            told.load_state_dict(state)
        with torch.no_grad():
            y = told.encode(told.see(alone.images), alone.n_objects)._y.unflatten(-1, (-1, 2))
        error[others] = float(((y.float() + 1) / 2 * 31 - alone.positions[:, :1]).norm(dim=-1).mean())
    assert error[True] < 1.0 < 3.0 < error[False]


def test_a_state_has_all_estimates_or_none():
    guide = build(small(guide="recurrent", data=GREY)).guide
    data = film(noise=0.05, n=30)
    guide.look_at(data.images, data.n_objects)
    found, state = guide.pixel_evidence.statistics, guide.state_dict()
    other = build(small(guide="recurrent", data=GREY)).guide
    other.load_state_dict(state)
    assert other.pixel_evidence.statistics == found
    assert other.pixel_evidence.by_height.data_ptr() != guide.pixel_evidence.by_height.data_ptr()
    del state["pixel_evidence.by_height"]
    with pytest.raises(RuntimeError, match=r"Missing key.*pixel_evidence.by_height"):
        other.load_state_dict(state)


def test_runs_of_versions_that_looked_for_no_others_are_read():
    data, evidence = film(noise=0.05, n=30), PixelEvidence()
    evidence.estimate(data.images, data.n_objects)
    state = evidence.state_dict()
    del state["others"]
    again = PixelEvidence()
    again.load_state_dict(state)
    assert again.statistics == evidence.statistics


def test_single_pixels_may_be_the_objects():
    rng = np.random.default_rng(0)
    images = np.zeros((20, 10, 16, 16), np.uint8)
    for b in range(20):
        for t in range(10):
            images[b, t, rng.integers(16), rng.integers(16)] = 1
    evidence = PixelEvidence()
    evidence.estimate(torch.from_numpy(images), torch.ones(20, dtype=torch.long))
    assert not evidence.active


def small(**options):
    schedule = replace(PRESETS["quick"].schedule, steps=2, single_object_steps=0, fit_starts_at=(), evaluate_every=1)
    return replace(
        PRESETS["quick"], state_size=16, guide_state_size=8, likelihood="gaussian", schedule=schedule, **options
    )


@pytest.mark.parametrize("guide", ["recurrent", "attentive", "structured"])
def test_fit_looks_at_the_film_and_the_run_keeps_what_it_saw(tmp_path, guide):
    data = film(noise=0.05, background=BACKGROUNDS["slope"], n=30)
    config = small(guide=guide, data=GREY)
    run = build(config)
    save_config(tmp_path, config)
    fit(run.model, run.guide, data, config.schedule, run_dir=tmp_path, progress=False)
    assert run.guide.pixel_evidence.active
    again = load_run(tmp_path)
    assert torch.equal(again.guide.see(data.images), run.guide.see(data.images))
    assert again.guide.pixel_evidence.statistics == run.guide.pixel_evidence.statistics
    assert float(run.guide.see(data.images)[:, :, 30].median()) == 0.0  # the bright end of the slope


def test_the_renderer_starts_from_the_background_and_the_likelihood_from_the_noise():
    data = film(noise=0.05, background=BACKGROUNDS["slope"], n=30)
    config = small(data=GREY)
    run = build(replace(config, schedule=replace(config.schedule, learning_rate=1e-9)))
    fit(run.model, run.guide, data, replace(config.schedule, learning_rate=1e-9), progress=False)
    b_v = run.model.renderer.to_v.bias.sigmoid().view(32, 32)
    assert (b_v[1:] - torch.from_numpy(BACKGROUNDS["slope"])[1:]).abs().max() < 0.03
    likelihood = run.model.likelihood
    assert isinstance(likelihood, GaussianPixels)
    assert float(likelihood.log_std.exp()) == pytest.approx(0.05, rel=0.15)


def test_frames_that_were_not_seen_do_not_count():
    data = film(noise=0.05, n=30)
    images = data.images.clone()
    images[:, ::3] = torch.nan
    guide = build(PRESETS["quick"]).guide
    told = guide.look_at(images, data.n_objects)
    assert told.noise == pytest.approx(guide.look_at(data.images, data.n_objects).noise, rel=0.1)
    assert guide.see(ImageSequences(images, data.n_objects).images).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind, most", [("noise_05", 0.3), ("noise_10", 0.6), ("salt", 0.5), ("texture", 0.4)])
def test_noisy_films_are_tracked_without_options(kind, most):
    """The bars of docs/your_own_video.md, by 300 steps; without weights of pixels 5 % of noise made 4 pixels."""
    rows = grey_films.measure(kind)["by_n_objects"]
    for row in rows.values():
        assert row["position_error_px"] < most
        assert (row["switch_rate"] or 0) <= 0.03
