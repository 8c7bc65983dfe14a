"""Frames of NaN in evaluation: measures are those of the observed frames, and no sequence stops the others."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model

from pyro_pixels import evaluate, load_pretrained, simulate
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.answers import infer_all, predict_all
from pyro_pixels.evaluation.calibration import mahalanobis_distances
from pyro_pixels.evaluation.causes import has_walls
from pyro_pixels.evaluation.film import START_FRAMES, innovations, persistence_nll_per_frame, standardised_innovations
from pyro_pixels.evaluation.health import _path_residuals, check_health
from pyro_pixels.evaluation.table import format_table
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import select_component
from pyro_pixels.lgssm.marginal import response
from pyro_pixels.queries.evidence import log_evidence
from pyro_pixels.queries.filled import filled
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.predict import infer, interpolate
from pyro_pixels.run_figures import RunView

GAP = torch.zeros(30, dtype=torch.bool)
GAP[12:18] = True
BEFORE = {
    "position_error_px": 0.480934723477576,
    "switch_rate": 0.07692307692307693,
    "generation_error_px": 1.4943025367050355,
    "generation_floor_px": 1.1926855074416254,
    "interpolation_error_px": 0.8634647666684795,
    "side_accuracy": 1.0,
    "nll_per_frame_nats": 67.70023708343506,
    "bound_per_frame_nats": -20.18790513851838,
}
HEALTH_BEFORE = {
    "bound_per_frame_nats": -20.18790513851838,
    "bound_ratio": 0.16214914532626762,
    "coinciding_objects": 0.0,
    "component_certainty": 1.0,
    "innovation_autocorrelation": 0.14638303263461117,
    "innovation_mean_square": 0.9967234454662306,
    "path_residual": 0.1409163090025947,
    "position_noise": 0.13566973700277815,
    "smallest_component": 0.4050632911392405,
    "smoothing_residual": 0.1403217689311378,
    "unexplained_tracks": 0.05063291139240506,
}


@pytest.fixture(scope="module")
def recurrent():
    """A trained guide without dynamics, and sequences of one to three balls."""
    run = load_pretrained("recurrent")
    return run, simulate(run.config.data, 40, seed=21)


def hidden(data, unseen):
    """The sequences with frames of NaN, ``unseen`` (T,) or (n, T)."""
    unseen = unseen.expand(len(data), data.images.shape[1])
    return replace(data, images=data.images.float().masked_fill(unseen[..., None, None], torch.nan))


def as_film(data):
    return replace(data, positions=None, paths=None, sides=None, dynamics=None)


def test_without_missing_frames_the_numbers_are_those_of_before(recurrent):
    """Measured when evaluation took every frame for observed."""
    run, data = recurrent
    found = evaluate(run.model, run.guide, data)
    assert {name: found["all"][name] for name in BEFORE} == pytest.approx(BEFORE, rel=1e-5)
    assert "unobserved_position_error_px" not in found["all"]
    measures = check_health(run.model, run.guide, data).measures
    assert {name: measures[name] for name in HEALTH_BEFORE} == pytest.approx(HEALTH_BEFORE, rel=1e-5)


def test_errors_with_a_gap_are_those_of_inference_with_the_model(recurrent):
    run, data = recurrent
    gap = hidden(data, GAP)
    found, full = evaluate(run.model, run.guide, gap)["all"], evaluate(run.model, run.guide, data)["all"]
    a = infer(run.guide, gap.images, gap.n_objects, model=run.model).mean
    seen = data.positions.masked_fill(GAP[:, None], torch.nan)
    a = metrics.fit_affine(a, seen, data.n_objects)(a)
    a = metrics.reorder(a, metrics.assign(a, data.positions, data.n_objects))
    error = metrics.errors(a, data.positions, data.n_objects)
    assert found["position_error_px"] == pytest.approx(metrics.nan_mean(error.nanmean(-1)))
    assert found["unobserved_position_error_px"] == pytest.approx(metrics.nan_mean(error[..., GAP].nanmean(-1)))
    assert found["position_error_px"] < full["position_error_px"] + 0.15
    for name in ("generation_error_px", "interpolation_error_px"):  # from frames that are all seen
        assert found[name] == pytest.approx(full[name], rel=0.01)
    assert found["side_accuracy"] == full["side_accuracy"]
    assert abs(found["bound_per_frame_nats"] - full["bound_per_frame_nats"]) < 3
    one = [log_evidence(run.model, run.guide, gap.images, gap.n_objects, n_samples=1) for _ in range(10)]
    evidence = torch.stack([x.log_evidence for x in one]) / 24
    assert abs(float(evidence.mean()) - found["bound_per_frame_nats"]) < 5.5 * float(evidence.mean(1).std())


@pytest.mark.parametrize("kind", ["gap", "padding"])
def test_signs_of_health_are_not_made_by_missing_frames(kind, recurrent):
    run, data = recurrent
    unseen = GAP if kind == "gap" else torch.arange(30) >= 19 + torch.arange(len(data))[:, None] % 12
    found, full = (check_health(run.model, run.guide, x).measures for x in (hidden(data, unseen), data))
    for name in ("innovation_mean_square", "path_residual", "smoothing_residual", "component_certainty"):
        assert found[name] == pytest.approx(full[name], rel=0.2)
    found, full = (evaluate(run.model, run.guide, as_film(x), n_futures=1) for x in (hidden(data, unseen), data))
    wanted = full["all"]["innovation_mean_square"]
    assert found["all"]["innovation_mean_square"] == pytest.approx(wanted, rel=0.2)


def test_innovations_of_observed_frames_are_standard_normals():
    """Within 5.5 standard errors, with any frames missing; what these hold is ignored."""
    dynamics = make_model(n_components=1, delta=0.3, state_noise=0.02, position_noise=0.1).dynamics
    torch.manual_seed(0)
    _, a = kalman.sample(select_component(dynamics.lgssm(), torch.zeros(500, dtype=torch.long)), 12)
    seen = torch.rand(500, 12) < 0.6
    a = torch.where(seen.unsqueeze(-1), a, 1e3)
    e = innovations(dynamics, a, seen)
    counted = ~e.isnan().any(-1)
    assert torch.equal(counted, seen & (seen.cumsum(1) > START_FRAMES))
    squares = e[counted].square().detach()
    assert abs(float(squares.mean()) - 1) < 5.5 * (2 / squares.numel()) ** 0.5
    whole, ones = innovations(dynamics, a, None), torch.ones_like(seen)
    torch.testing.assert_close(innovations(dynamics, a, ones), whole, equal_nan=True)
    short = standardised_innovations(dynamics, a[:, :7])
    torch.testing.assert_close(standardised_innovations(dynamics, a, torch.arange(12) < 7)[..., :7, :], short)


def test_paths_are_fitted_to_observed_frames():
    dynamics = make_model().dynamics
    torch.manual_seed(0)
    a, seen = torch.randn(5, 9, 2, dtype=torch.float64), torch.rand(5, 9) < 0.7
    found = _path_residuals(dynamics, torch.where(seen.unsqueeze(-1), a, torch.nan), seen)
    F, drift, _ = response(dynamics.lgssm(), 9)
    for track, mask, residual in zip(a, seen, found):
        rows = mask.repeat_interleave(2)
        y = (track.flatten() - drift)[rows]
        wanted = y - F[rows] @ torch.linalg.lstsq(F[rows], y.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        torch.testing.assert_close(residual.flatten()[rows], wanted)


def test_padding_is_neither_predicted_nor_interpolated(recurrent):
    """Distances of sequences padded to 30 frames are those of the sequences themselves."""
    run, data = recurrent
    short = replace(data[:20], images=data.images[:20, :17], positions=data[:20].positions[:, :, :17], paths=None)
    padded = hidden(data[:20], torch.arange(30) >= 17)
    unknown = padded.positions.masked_fill((torch.arange(30) >= 17)[:, None], torch.nan)
    padded = replace(padded, positions=unknown, paths=None)
    found, wanted = (mahalanobis_distances(run.model, run.guide, x, n_seen=5) for x in (padded, short))
    for kind, each in wanted.items():
        torch.testing.assert_close(found[kind].squared[..., :17], each.squared, equal_nan=True, rtol=1e-4, atol=1e-6)
        assert found[kind].squared[..., 17:].isnan().all()
        assert torch.equal(found[kind].held, each.held)
    assert not wanted["interpolation"].squared[:, 0, 5:12].isnan().any()


def test_late_and_empty_sequences_leave_the_others_as_they_are(recurrent):
    run, data = recurrent
    unseen = torch.zeros(40, 30, dtype=torch.bool)
    unseen[:3, :6] = True
    unseen[3] = True
    some = hidden(data, unseen)
    found, wanted = (predict_all(run.model, run.guide, x, n_futures=2) for x in (some, data))
    assert torch.equal(found.generated[4:], wanted.generated[4:])
    assert torch.equal(found.interpolated[4:], wanted.interpolated[4:])
    mask = (torch.arange(30) >= 6) & (torch.arange(30) < 11)
    late = interpolate(run.model, run.guide, data.images[:3], data.n_objects[:3], mask)
    assert torch.equal(found.generated[:3], late.mean)
    nll = metrics.nll_per_frame(data.images[:3, 11:].float(), late.images[:, 11:]).double()
    torch.testing.assert_close(found.losses["nll_per_frame_nats"][:3], nll)
    assert all(bool(x[3].isnan()) and bool(x[4:].isfinite().all()) for x in found.losses.values())
    inferred = [infer_all(run.model, run.guide, x).mean[4:] for x in (some, data)]
    torch.testing.assert_close(*inferred, equal_nan=True)

    for result in (evaluate(run.model, run.guide, x, n_futures=1) for x in (some, as_film(some))):
        assert all(x is None or x == x for row in result["by_n_objects"].values() for x in row.values())
        assert format_table(result)
    with_rest = evaluate(run.model, run.guide, some)["all"]
    without = evaluate(run.model, run.guide, some[[*range(3), *range(4, 40)]])["all"]
    for name in ("position_error_px", "generation_error_px", "interpolation_floor_px", "bound_per_frame_nats"):
        assert with_rest[name] == pytest.approx(without[name], rel=0.05)
    for each in mahalanobis_distances(run.model, run.guide, some).values():
        assert each.squared[3].isnan().all()
        assert not each.squared[:3, 0].isnan().all(-1).any()
    assert check_health(run.model, run.guide, some).measures["path_residual"] < 0.2
    with pytest.raises(ValueError, match="no sequence has more than 2 observed frames"):
        check_health(run.model, run.guide, some[3:4])
    view = RunView(run, some, torch.device("cpu"))
    assert torch.equal(view.generation().mean[:3, :, 11:], late.mean[:, :, 11:])
    longer = view.generation(32)
    assert longer.mean.shape[2] == 32
    assert longer.observed[:, 0].sum(1).tolist() == [5] * 3 + [0] + [5] * 36
    torch.testing.assert_close(longer.mean[:, :, :30], view.generation().mean)


def test_frames_are_counted_from_the_first_observed_one():
    images = torch.zeros(3, 8, 1, 1)
    images[1, :2] = images[1, 6:] = images[2] = torch.nan
    data = ImageSequences(images, 1)
    times = [x.nonzero().squeeze(1).tolist() for x in data.first(2)]
    assert times == [[0, 1], [0, 1, 2, 3], [0, 1]]
    times = [x.nonzero().squeeze(1).tolist() for x in data.ends(1)]
    assert times == [[0, 7], [0, 1, 2, 5], [0]]
    assert data.later(3)[..., 0, 0].isnan().sum(1).tolist() == [0, 4, 5]
    assert torch.equal(data[:1].first(2), torch.arange(8) < 2)
    assert torch.equal(data[:1].later(3), images[:1, 3:])
    assert data.n_observed.nan_to_num(-1).tolist() == [8, 4, -1]
    late = torch.cat([torch.full((4, 3, 5, 5), torch.nan), torch.rand(4, 6, 5, 5)], 1)
    on_time = torch.cat([late[:, 3:], late[:, :3]], 1)
    found, wanted = (persistence_nll_per_frame(x, 2, is_density=True) for x in (late, on_time))
    torch.testing.assert_close(found, wanted)


def test_posterior_draws_after_a_gap_are_those_of_a_network_that_was_shown_forecasts(recurrent):
    run, data = recurrent
    alone = data[data.n_objects == 1]
    gap = hidden(alone, GAP)
    shown = filled(run.model, run.guide, gap.images, gap.n_objects)
    assert torch.equal(shown[:, ~GAP], alone.images[:, ~GAP].float())
    wanted = run.guide.q(shown, 1).mean.detach()
    a = to_inference_data(run.model, run.guide, gap.images, 1, n_samples=50).posterior.a.values[0]
    error = (torch.from_numpy(a).mean(0) - wanted)[:, :, 18:].abs() / run.guide.q(shown, 1).stddev[:, :, 18:].detach()
    assert float(error.max()) < 5.5 / 50**0.5  # standard errors


def test_walls_are_seen_in_observed_frames():
    time = torch.arange(40.0)
    bounce = (time * 0.11 + torch.arange(30.0)[:, None]) % 2
    tracks = torch.stack([torch.minimum(bounce, 2 - bounce), torch.zeros(30, 40)], -1)
    assert has_walls(tracks)
    padded = torch.cat([tracks, torch.full((30, 20, 2), torch.nan)], 1)
    assert has_walls(padded)
    assert not has_walls(padded * torch.nan)
