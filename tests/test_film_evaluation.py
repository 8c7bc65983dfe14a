"""What is measured on films without true positions, and answers that are asked once, against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import make_guide, make_model

from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.answers import check_n_seen, infer_all, predict_all, seen_by_default
from pyro_pixels.evaluation.film import (
    forecast_nll_per_frame,
    innovation_mean_square,
    mean_image_nll_per_frame,
    persistence_nll_per_frame,
)
from pyro_pixels.evaluation.health import check_health
from pyro_pixels.evaluation.metrics import nll_per_frame
from pyro_pixels.evaluation.table import evaluate, format_table
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import select_component
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.counterfactual import Change, what_if
from pyro_pixels.queries.predict import generate, infer, interpolate
from pyro_pixels.training.elbo import bound


@pytest.fixture(scope="module")
def run():
    return make_model(), make_guide()


@pytest.fixture(scope="module")
def film(small_data):
    """The same sequences as a user has them: without positions."""
    return ImageSequences(small_data.images, small_data.n_objects)


def entropy(p):
    return -sum(x * math.log(x) for x in (p, 1 - p) if x)


def test_answers_are_those_of_the_queries(run, film):
    model, guide = run
    found = infer_all(model, guide, film, batch_size=5, seed=3)
    mean = infer(guide, film.images, film.n_objects).mean
    there = ~found.mean.isnan()
    torch.testing.assert_close(found.mean[there], mean[there])
    wanted = bound(model, guide, film, batch_size=5, seed=3)
    assert torch.equal(found.terms.bound, wanted.bound)
    predicted = predict_all(model, guide, film, n_seen=4)
    future = generate(model, guide, film.images[:, :4], film.n_objects, n_frames=11)
    between = interpolate(model, guide, film.images, film.n_objects, film.ends(4))
    assert torch.equal(predicted.generated, future.mean)
    assert torch.equal(predicted.interpolated, between.mean)
    assert film.ends(4).tolist() == [True] * 4 + [False] * 3 + [True] * 4
    torch.testing.assert_close(
        predicted.losses["nll_per_frame_nats"], nll_per_frame(film.images[:, 4:], future.images[:, 4:]).double()
    )


def test_clips_of_unequal_length_are_interpolated_between_their_own_ends(run, small_data):
    """In each, the answers and errors are those that `interpolate` gives for the clip alone, without padding."""
    model, guide = run
    lengths = [11, 11, 11, 8, 7, 9, 11, 11, 11, 8, 9, 11]
    images = small_data.images.float()
    for v, length in zip(images, lengths):
        v[length:] = torch.nan
    data = replace(small_data, images=images, dynamics=None, paths=None)
    predicted = predict_all(model, guide, data, n_seen=3)
    found = evaluate(model, guide, data, n_seen=3)["by_n_objects"]
    known = data.positions.masked_fill(~data.seen[:, None, :, None], torch.nan)
    affine = metrics.fit_affine(infer_all(model, guide, data).mean, known, data.n_objects)
    errors = {1: [], 2: [], 3: []}
    for b, (n, length) in enumerate(zip(data.n_objects.tolist(), lengths)):
        seen = (torch.arange(length) < 3) | (torch.arange(length) >= length - 3)
        alone = interpolate(model, guide, images[b : b + 1, :length], torch.tensor([n]), seen).mean
        torch.testing.assert_close(predicted.interpolated[b, :n, :length], alone[0, :n], rtol=1e-4, atol=1e-4)
        a, truth = affine(alone), data.positions[b : b + 1, :n, :length]
        order = metrics.assign(a[:, :, seen], truth[:, :, seen], torch.tensor([n]))
        error = metrics.errors(metrics.reorder(a, order), truth, torch.tensor([n]))
        errors[n].append(error[0, :, ~seen].mean())
    for n, wanted in errors.items():
        assert found[str(n)]["interpolation_error_px"] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-3)


def test_answers_leave_the_random_state_alone_and_serve_the_health_check(run, film):
    model, guide = run
    before = torch.get_rng_state()
    found = infer_all(model, guide, film)
    assert torch.equal(torch.get_rng_state(), before)
    assert check_health(model, guide, film, inferred=found) == check_health(model, guide, film)


def test_what_if_takes_an_inference_that_is_there(run, film):
    model, guide = run
    inferred = infer(guide, film.images, film.n_objects, n_samples=4)
    torch.manual_seed(1)
    found = what_if(model, guide, film.images, film.n_objects, Change(), frame=3, n_frames=6, inferred=inferred)
    assert torch.equal(found.samples[..., :3, :], inferred.samples[..., :3, :])
    parts = [inferred.of_part(slice(i, i + 6), 12, 3) for i in (0, 6)]
    assert torch.equal(torch.cat([part.samples for part in parts], 1), inferred.samples)
    assert torch.equal(torch.cat([part.mean for part in parts]), inferred.mean)
    with pytest.raises(ValueError, match="give the result of infer for these images"):
        what_if(model, guide, film.images[:2], film.n_objects[:2], Change(), frame=3, n_frames=6, inferred=inferred)


def test_covariances_that_are_not_wanted_are_nan(run, film):
    found = generate(*run, film.images[:, :5], film.n_objects, n_frames=8, covariances=False)
    assert found.cov.shape == (12, 3, 8, 2, 2)
    assert found.cov.isnan().all()


def test_the_mean_image_costs_its_entropy():
    images = torch.zeros(2, 5, 2, 2, dtype=torch.uint8)
    images[:, 1:, 0, 0] = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    images[:, 0, 0, 0] = torch.tensor([1, 0])  # so that half of all ten frames are white
    found = mean_image_nll_per_frame(images, 1, is_density=False)
    black = -3 * math.log(1 - 1e-6)
    assert found.tolist() == pytest.approx([entropy(0.5) + black] * 2, rel=1e-9)


def test_persistence_costs_nothing_where_nothing_moves_and_its_entropy_where_pixels_flip():
    still = torch.zeros(2, 6, 4, 4, dtype=torch.uint8)
    still[:, :, 1, 2] = 1
    assert persistence_nll_per_frame(still, 3, is_density=False).max() < 2e-5
    flips = torch.zeros(1, 5, 1, 4, dtype=torch.uint8)
    flips[0, 0] = torch.tensor([1, 1, 0, 0])
    flips[0, 1:] = torch.tensor([1, 0, 0, 0])  # of the white ones one half goes out
    found = persistence_nll_per_frame(flips, 1, is_density=False)
    assert float(found) == pytest.approx(2 * entropy(0.5), abs=1e-5)


@pytest.mark.parametrize("cost", [mean_image_nll_per_frame, persistence_nll_per_frame])
def test_grey_pixels_cost_what_a_gaussian_does(cost):
    torch.manual_seed(0)
    sd, n = 0.05, 40
    images = 0.5 + sd * torch.randn(n, 30, 6, 6)
    variance = sd**2 if cost is mean_image_nll_per_frame else 2 * sd**2
    wanted = 36 * 0.5 * math.log(2 * math.pi * math.e * variance)
    assert float(cost(images, 5, is_density=True).mean()) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("cost", [mean_image_nll_per_frame, persistence_nll_per_frame])
def test_frames_that_were_not_seen_do_not_count(cost, film):
    images = film.images.float()
    images[:, 8:] = torch.nan
    found = cost(images, 5, is_density=False)
    torch.testing.assert_close(found, cost(images[:, :8], 5, is_density=False))
    images[0, 4] = torch.nan
    assert cost(images, 5, is_density=False).isfinite().all()


def test_a_forecast_averages_futures_pixel_by_pixel(run, film):
    model, guide = run
    torch.manual_seed(0)
    future = generate(model, guide, film.images[:, :5], film.n_objects, n_frames=11, n_samples=3)
    unseen, samples = film.images[:, 5:], future.samples[..., 5:, :]
    found = forecast_nll_per_frame(model, samples, unseen, film.n_objects)
    wanted = nll_per_frame(unseen, future.sample_images[:, :, 5:].mean(0).double())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    grey = PixelModel(model.dynamics, model.renderer, GaussianPixels(0.2))
    one = forecast_nll_per_frame(grey, samples[:1], unseen, film.n_objects)
    given = grey.likelihood(grey.renderer(samples[0], torch.arange(3) < film.n_objects[:, None]))
    torch.testing.assert_close(one, (-given.log_prob(unseen.float()) / 6).double().detach(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_innovations_of_the_models_own_tracks_have_mean_square_1(run, scale):
    """Tracks of the prior; with deviations from their mean three times as large the squares are nine times as large."""
    dynamics, n = run[0].dynamics, 300
    data = ImageSequences(torch.zeros(n, 20, 4, 4, dtype=torch.uint8), [1, 2] * (n // 2))
    with torch.no_grad():
        torch.manual_seed(0)
        lgssm = dynamics.lgssm()
        k = torch.zeros(n, 2, dtype=torch.long)
        _, a = kalman.sample(select_component(lgssm, k), 20)
        mean = torch.zeros_like(a)
        h = lgssm.mu[0]
        for t in range(20):
            mean[:, :, t] = h @ lgssm.B.mT
            h = h @ lgssm.A.mT + lgssm.u
        a = mean + scale * (a - mean)
    found = innovation_mean_square(dynamics, a, data)
    sd = math.sqrt(2 / (36 * 1.5 * n))  # of the mean of squares of standard normals
    assert float(found.mean()) / scale**2 == pytest.approx(1, abs=5 * sd)


def test_without_positions_all_that_is_shown_was_measured(run, film, small_data):
    result = evaluate(*run, film)
    for row in (*result["by_n_objects"].values(), result["all"]):
        assert all(value is not None for value in row.values()), row
        names = {"forecast_nll_per_frame_nats", "mean_image_nll_per_frame_nats", "persistence_nll_per_frame_nats"}
        assert names | {"innovation_mean_square", "bound_per_frame_nats", "nll_per_frame_nats"} <= row.keys()
        assert not {"position_error_px", "switch_rate"} & row.keys()
    cells = format_table(result).splitlines()[2:6]
    assert not any(cell == "-" for line in cells for cell in line.split())
    assert "forecast" in format_table(result)
    assert "forecast" not in format_table(evaluate(*run, small_data))


@pytest.mark.parametrize("T, n_seen", [(2, 1), (3, 1), (4, 1), (5, 2), (10, 4), (11, 5), (30, 5)])
def test_short_sequences_show_fewer_frames_by_default(run, film, T, n_seen):
    assert seen_by_default(T) == n_seen
    if T <= 11:
        result = evaluate(*run, ImageSequences(film.images[:, :T], film.n_objects))
        assert result["n_seen"] == n_seen
        assert result["all"]["forecast_nll_per_frame_nats"] > 0


def test_too_many_seen_frames_are_refused_by_the_name_of_the_option():
    with pytest.raises(ValueError, match="--n-seen is 5 at either end, but sequences have 10 frames; give --n-seen"):
        check_n_seen(5, 10, "--n-seen")
    with pytest.raises(ValueError, match="give longer sequences"):
        check_n_seen(1, 2)
