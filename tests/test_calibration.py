"""Coverage where it is known, and a correction that finds what was spoilt."""

import json
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from test_queries import Oracle
from torch import nn

from pyro_pixels._checksums import write_json
from pyro_pixels.evaluation.calibration import (
    Correction,
    Distances,
    corrected,
    coverage,
    fit_correction,
    mahalanobis_distances,
)
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.question_figures import Scene, draw_calibration
from pyro_pixels.runs import load_pretrained
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig


def test_coverage_of_gaussians_is_nominal():
    """Squared distances of 40,000 draws of N(0, I): coverage is the level within 6 standard errors."""
    torch.manual_seed(0)
    squared = torch.randn(100, 2, 200, 2, dtype=torch.float64).square().sum(-1)
    d = Distances(squared, squared, torch.ones(100, dtype=torch.bool))
    levels = torch.linspace(0.05, 0.95, 19).tolist()
    found = coverage(d, levels)
    assert found.n_positions == 40_000
    error = (found.levels * (1 - found.levels) / 40_000).sqrt()
    assert ((found.shares - found.levels).abs() < 6 * error).all()


def test_coverage_counts_what_is_there():
    squared = torch.tensor([[[0.1, torch.nan, 9.0]], [[0.1, 0.1, 0.1]]])
    d = Distances(squared, squared, torch.tensor([True, False]))
    assert coverage(d).n_positions == 5
    only = coverage(d, (0.5,), among=d.held)
    assert (only.n_positions, float(only.shares)) == (2, 0.5)


class Measured(nn.Module):
    """A head that measures the true positions with noise of standard deviation ``true``, and states ``stated``."""

    def __init__(self, positions, true, stated):
        super().__init__()
        torch.manual_seed(0)
        self.y, self.stated = positions.nan_to_num() + true * torch.randn(positions.shape), stated

    def forward(self, s, images, n_objects):
        y = self.y[:, : int(n_objects.max()), : images.shape[1]]
        return y, torch.full_like(y, self.stated)


def world(stated=0.3, position_noise=1.0, n=40):
    """N = 1 in 12 x 12 pixels, true dynamics, measured with noise 0.3; Sigma_A off by a factor, R as stated."""
    config = CannonballConfig(n_frames=11, height=12, width=12, radius=1.5, n_objects=(1,), position_noise=4e-3)
    data = simulate(config, n, seed=3)
    true = data.dynamics.lgssm
    dynamics = Dynamics(DynamicsConfig(delta=config.delta, state_noise=1e-10, position_noise=0.1)).double()
    with torch.no_grad():
        dynamics.u.copy_(true.u)
        dynamics.set_starts(data.dynamics.pi.log(), true.mu, true.Sigma)
        L = torch.linalg.cholesky(position_noise * true.Sigma_A)
        dynamics.root_Sigma_A.copy_(L.tril(-1) + torch.diag_embed(L.diagonal().log()))
    model = PixelModel(dynamics, Renderer(12, 12, 4))
    guide = StructuredGuide(dynamics, InferenceRNN(12, 12, 8), Measured(data.positions, 0.3, stated))
    return data, model, guide.double()


def test_a_true_model_is_calibrated():
    """Right dynamics and right noise: the regions hold what they say, 6 standard errors of 40 independent sequences."""
    data, model, guide = world()
    for kind, d in mahalanobis_distances(model, guide, data, n_seen=3).items():
        found = coverage(d)
        assert found.n_positions == {"smoothing": 440, "forecasting": 320, "interpolation": 200}[kind]
        assert ((found.shares - found.levels).abs() < 6 * (found.levels * (1 - found.levels) / 40).sqrt()).all(), kind
        assert float(d.squared.nanmean()) == pytest.approx(2, abs=6 * 2 / 40**0.5)
        assert d.held.all()


def test_positions_that_are_unknown_are_not_counted():
    """Their distances are left out, those of the same predictions elsewhere stay."""
    data, model, guide = world(n=10)
    images, positions = data.images.float(), data.positions.clone()
    images[:, [5, 9]] = torch.nan
    whole = mahalanobis_distances(model, guide, replace(data, images=images), n_seen=3)
    positions[:, :, [5, 9]] = torch.nan
    found = mahalanobis_distances(model, guide, replace(data, images=images, positions=positions), n_seen=3)
    known = positions.isfinite().all(-1)
    for kind, missing in {"smoothing": 20, "forecasting": 20, "interpolation": 10}.items():
        assert coverage(found[kind]).n_positions == coverage(whole[kind]).n_positions - missing
        for name in ("squared", "log_density"):
            each = getattr(found[kind], name)
            assert each[~known].isnan().all()
            assert torch.equal(each[known].isnan(), getattr(whole[kind], name)[known].isnan())
        assert found[kind].held.all()


def test_a_correction_finds_what_was_spoilt():
    """R stated 4 times too large, Sigma_A at a third of what is true: the fit undoes both within a factor 1.6.

    The variance of an estimated variance from m residuals is 2 / m; 40 sequences of 11 frames of 2 coordinates have
    about 800, half of which tell of either noise: 7 % a standard error, so 1.6 is more than 6.
    """
    data, model, guide = world(stated=0.6, position_noise=1 / 3)
    found = fit_correction(model, guide, data, n_seen=3)
    assert 1 / 1.6 < found.measurement_noise * 4 < 1.6
    assert 1 / 1.6 < found.position_noise / 3 < 1.6
    before, after = (
        mahalanobis_distances(*pair, data, n_seen=3) for pair in ((model, guide), corrected(model, guide, found))
    )
    for kind in before:
        off = [(coverage(x[kind]).shares - coverage(x[kind]).levels).abs().max() for x in (before, after)]
        assert off[1] < 0.12
    rise = [float((after[kind].log_density - before[kind].log_density).nanmean()) for kind in before]
    assert sum(rise) > 0.2  # nats a position, of the three kinds


def test_corrected_copies_share_what_was_shared():
    model = make_model(position_noise=0.2)
    guide = StructuredGuide(model.dynamics, InferenceRNN(SMALL.height, SMALL.width, 8))
    Sigma_A = model.dynamics.lgssm().Sigma_A.clone()
    other_model, other_guide = corrected(model, guide, Correction(3.0, 0.25))
    assert other_guide.dynamics is other_model.dynamics
    floor = model.dynamics.config.position_noise_floor * torch.eye(2)
    torch.testing.assert_close(other_model.dynamics.lgssm().Sigma_A - floor, 3 * (Sigma_A - floor))
    torch.testing.assert_close(model.dynamics.lgssm().Sigma_A, Sigma_A)
    images, n_objects = torch.rand(2, 5, SMALL.height, SMALL.width), torch.tensor([1, 2])
    plain = make_guide()
    _, scaled = corrected(model, plain, Correction(1.0, 0.25))
    torch.testing.assert_close(scaled.q(images, n_objects).stddev, 0.5 * plain.q(images, n_objects).stddev)


def test_averaged_predictions_are_less_sure(small_data):
    """A guide without the dynamics: its uncertainty widens every region of the forecast.

    log N(x; m, C) + d^2 / 2 is -log det(C) / 2 - log 2 pi, whatever x.
    """
    model, data = make_model(n_components=1, position_noise=1e-3, delta=0.3), small_data[:6]
    guide = Oracle(data.positions / 12, std=0.3)
    torch.manual_seed(0)
    plain, wide = (mahalanobis_distances(model, guide, data, n_seen=3, n_samples=n)["forecasting"] for n in (0, 20))
    log_area = [-(x.log_density + x.squared / 2)[~x.squared.isnan()] for x in (plain, wide)]
    assert (log_area[1] > log_area[0] + 0.5).all()


def test_what_cannot_be_measured_is_refused(small_data):
    model, guide = make_model(), make_guide()
    with pytest.raises(ValueError, match="positions"):
        mahalanobis_distances(model, guide, small_data.__class__(small_data.images, small_data.n_objects))
    with pytest.raises(ValueError, match="no sequences to predict; wanted at least one"):
        mahalanobis_distances(model, guide, small_data[:0])
    with pytest.raises(ValueError, match="frames"):
        mahalanobis_distances(model, guide, small_data, n_seen=6)
    with pytest.raises(ValueError, match="levels"):
        coverage(Distances(*3 * [torch.zeros(1, 1, 1)]), (0.5, 1.0))
    with pytest.raises(ValueError, match="head"):
        corrected(model, Oracle(torch.zeros(1, 1, 3, 2)), Correction())


def test_objects_are_matched(small_data):
    """Objects in another order are the same objects: distances do not change."""
    model = make_model(n_components=1, position_noise=0.1, delta=0.3)
    a = small_data.positions / 12
    reordered = a.clone()
    three = small_data.n_objects == 3
    reordered[three] = a[three][:, [2, 0, 1]]

    class Known(Oracle):
        def encode(self, images, n_objects):
            return dist.Normal(self.positions[:, :, : images.shape[1]], self.std).to_event(2)

    one, two = (
        mahalanobis_distances(model, Known(x, std=0.3), small_data, n_seen=3)["forecasting"] for x in (a, reordered)
    )
    torch.testing.assert_close(one.squared, two.squared, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_shares_of_no_positions_are_a_dash_and_null(tmp_path):
    run = load_pretrained("quick")
    data, validation = (simulate(replace(run.config.data, n_frames=12), n, seed=n) for n in (6, 5))
    positions, half = data.positions.clone(), data.positions.shape[2] // 2
    for b in (data.n_objects > 1).nonzero().squeeze(1):  # identities are wrong from here on
        N = int(data.n_objects[b])
        positions[b, :N, half:] = positions[b, :N, half:].roll(1, 0)
    answer = draw_calibration(Scene(run, replace(data, positions=positions), torch.device("cpu")), validation)
    rows = [row.split(" | ") for row in answer.text.splitlines() if row.startswith("| smoothing |")]
    assert {cells[1]: cells[3] == "- |" for cells in rows} == {"all": False, "1": False, "2": True, "3": True}
    assert "nan" not in answer.text
    write_json(tmp_path / "calibration.json", answer.numbers)
    text = (tmp_path / "calibration.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["coverage"]["smoothing"]["2"]["held"] == [None] * 3
