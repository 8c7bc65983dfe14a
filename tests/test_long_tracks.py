"""The filter's p(a | y) of long sequences against the dense Gaussian, and against itself in time."""

import pytest
import torch

from pyro_pixels.guides import structured
from pyro_pixels.guides.long_tracks import FilteredTracks
from pyro_pixels.guides.structured import UNSEEN, ConditionedTracks
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.queries.predict import generate, interpolate
from pyro_pixels.runs import load_pretrained
from pyro_pixels.worlds.base import simulate


@pytest.fixture
def world():
    """Dynamics, measurements y (3, 2, 12, 2) and their variances, some frames unseen."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(state_noise=1e-3, position_noise=0.02, start_velocity_spread=0.5)).double()
    with torch.no_grad():
        dynamics.u.normal_(std=0.1)
        dynamics.log_pi.normal_()
    y, R = torch.randn(3, 2, 12, 2).double(), torch.rand(3, 2, 12, 2).double() * 0.1 + 0.01
    R[1, :, 4:8], R[2, 0, 9:] = UNSEEN, UNSEEN
    return dynamics, y, R


def test_the_moments_the_evidence_and_the_density_are_those_of_the_dense_gaussian(world):
    dense, filtered = ConditionedTracks(*world), FilteredTracks(*world)
    for name in ("mean", "frame_covariance", "variance", "log_evidence"):
        torch.testing.assert_close(getattr(filtered, name), getattr(dense, name), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(filtered.component.probs, dense.component.probs, rtol=1e-6, atol=1e-8)
    a = torch.randn(5, 3, 2, 12, 2)
    torch.testing.assert_close(filtered.log_prob(a), dense.log_prob(a), rtol=1e-8, atol=1e-5)


def test_gradients_are_those_of_the_dense_gaussian(world):
    gradients = []
    for kind in (ConditionedTracks, FilteredTracks):
        dynamics, y, R = world
        y, R = y.clone().requires_grad_(), R.clone().requires_grad_()
        q = kind(dynamics, y, R)
        (q.mean.sum() + q.log_evidence.sum()).backward()
        gradients.append((y.grad, R.grad))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_draws_have_the_moments(world):
    torch.manual_seed(1)
    q, n = FilteredTracks(*world), 4000
    with torch.no_grad():
        a = q.rsample(torch.Size((n,)))
        assert a.shape == (n, 3, 2, 12, 2)
        assert ((a.mean(0) - q.mean).abs() < 6 * (q.variance / n).sqrt()).all()  # 6 sigma
        lagged = ((a[:, ..., 1:, :] - q.mean[..., 1:, :]) * (a[:, ..., :-1, :] - q.mean[..., :-1, :])).mean(0)
        dense = ConditionedTracks(*world)
        b = dense.rsample(torch.Size((n,)))
        wanted = (b[:, ..., 1:, :] - q.mean[..., 1:, :]) * (b[:, ..., :-1, :] - q.mean[..., :-1, :])
        assert ((lagged - wanted.mean(0)).abs() < 8 * wanted.std(0) * (2 / n) ** 0.5).all()  # 8 sigma of a difference


def test_long_predictions_are_those_of_the_dense_form(monkeypatch):
    run = load_pretrained()
    data = simulate(run.config.data, 3, seed=5)
    seen = torch.arange(30) % 7 < 3
    answers = []
    for limit in (128, 0):
        monkeypatch.setattr(structured, "DENSE_FRAMES", limit)
        forecast = generate(run.model, run.guide, data.images[:, :8], data.n_objects, n_frames=40)
        between = interpolate(run.model, run.guide, data.images, data.n_objects, seen)
        answers.append((forecast, between))
    (forecast, between), (long_forecast, long_between) = answers
    # only the frames up to the last seen are tracked, so that tracks start in others: within a third of a pixel
    torch.testing.assert_close(long_between.mean, between.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(long_forecast.mean, forecast.mean, rtol=0, atol=0.02)


def test_a_thousand_frames_of_four_sequences():
    run = load_pretrained()
    data = simulate(run.config.data, 4, seed=3)
    short, long = (
        generate(run.model, run.guide, data.images[:, :5], data.n_objects, n_frames=T, n_samples=1) for T in (30, 1000)
    )
    assert long.images.shape == (4, 1000, 32, 32)
    assert long.mean.isfinite().all()
    assert long.samples is not None
    assert long.samples.shape == (1, 4, 3, 1000, 2)
    torch.testing.assert_close(long.mean[:, :, :30], short.mean, rtol=0, atol=0.02)
