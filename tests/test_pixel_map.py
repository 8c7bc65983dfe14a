"""Latent units to pixels without true positions, and what-if on dynamics whose u hides a drift."""

import pytest
import torch

from pyro_pixels import infer, load_pretrained, simulate
from pyro_pixels.evaluation.calibration import Correction, corrected
from pyro_pixels.evaluation.metrics import fit_affine
from pyro_pixels.evaluation.pixel_map import drawn_centroids, map_to_pixels
from pyro_pixels.guides import AttentionHead, RefinedGuide, UntangledGuide
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.lgssm.kalman import rollout
from pyro_pixels.queries.counterfactual import canonical, scale_force, scale_period


@pytest.fixture(scope="module")
def asked():
    run = load_pretrained()
    data = simulate(run.config.data, 30, seed=5)
    return run, data, infer(run.guide, data.images, data.n_objects).mean


def test_the_map_of_a_centroid_guide_is_that_of_the_true_positions(asked):
    run, data, mean = asked
    found = map_to_pixels(run.model, run.guide)
    truth = fit_affine(mean, data.positions, data.n_objects)
    assert found.known
    points = mean[data.n_objects == 1, 0].reshape(-1, 2)
    assert (found.affine(points) - truth(points)).norm(dim=-1).mean() < 0.3  # pixels


def test_the_renderer_tells_the_map_of_any_guide(asked):
    run, data, mean = asked
    other = RecurrentGuide(run.guide.rnn)  # a linear head knows no pixels
    present = mean[data.n_objects == 1, 0]
    found = map_to_pixels(run.model, other, present)
    truth = fit_affine(mean, data.positions, data.n_objects)
    points = present.reshape(-1, 2)
    assert not found.known
    assert (found.affine(points) - truth(points)).norm(dim=-1).mean() < 0.5  # pixels
    assert 0 < found.error_px < 1
    with pytest.raises(ValueError, match="has no fixed map to pixels"):
        map_to_pixels(run.model, other)


def test_a_mirrored_latent_space_is_mirrored_back(asked):
    run = asked[0]
    centroid, mass = drawn_centroids(run.model, torch.tensor([[-0.4, 0.0], [0.4, 0.0], [0.0, 0.3]]))
    assert centroid[1, 0] > centroid[0, 0] + 8
    assert centroid[2, 1] > centroid[0, 1] + 3  # rows are counted downwards
    assert (mass > 5).all()


def hidden(lgssm, drift):
    """The same tracks with a drift in u's position part, which all velocities make up for."""
    delta = lgssm.A[0, 2]
    u, mu = lgssm.u.clone(), lgssm.mu.clone()
    u[:2] += drift
    mu[:, 2:] -= drift / delta
    return lgssm._replace(u=u, mu=mu)


def path(lgssm, n=12):
    return rollout(lgssm, lgssm.mu[0], torch.zeros(4, 4, dtype=torch.float64), n).mean[:, :2]


@pytest.mark.parametrize("change, factor", [(scale_force, 0.0), (scale_force, 0.5), (scale_period, 0.5)])
def test_a_drift_in_the_position_part_of_u_changes_no_answer(asked, change, factor):
    lgssm = asked[0].model.dynamics.lgssm()
    drift = torch.tensor([0.03, -0.02], dtype=torch.float64)
    same = hidden(lgssm, drift)
    torch.testing.assert_close(path(same), path(lgssm))
    torch.testing.assert_close(path(change(same, factor)), path(change(lgssm, factor)))


def test_without_gravity_discs_of_constant_velocity_go_on_as_they_were(asked):
    lgssm = asked[0].model.dynamics.lgssm()
    still = lgssm._replace(u=torch.tensor([0.05, -0.01, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(path(scale_force(still, 0.0)), path(still))
    falling = scale_force(lgssm, 0.0)
    a = path(falling)
    assert (a[2:] - 2 * a[1:-1] + a[:-2]).abs().max() < 1e-12


def test_the_canonical_form_moves_the_drift_into_the_velocities(asked):
    lgssm = hidden(asked[0].model.dynamics.lgssm(), torch.tensor([0.1, 0.2], dtype=torch.float64))
    found = canonical(lgssm)
    torch.testing.assert_close(found.u[:2], found.A[0, 2] * found.u[2:] / 2)
    torch.testing.assert_close(path(found), path(lgssm))


@pytest.mark.parametrize("change", [canonical, lambda x: scale_force(x, 0.5), lambda x: scale_period(x, 0.5)])
def test_dynamics_of_another_kind_are_refused(asked, change):
    lgssm = asked[0].model.dynamics.lgssm()
    I = torch.eye(4, dtype=torch.float64)
    damped = lgssm.A @ torch.tensor([1.0, 1.0, 0.4, 0.4], dtype=torch.float64).diag()
    sprung = lgssm.A - 0.1 * I[[2, 3, 0, 1]].tril()
    for A in (damped, sprung, I[:2, :2]):
        with pytest.raises(ValueError, match=r"the transition A is .*; wanted motion at constant velocity") as error:
            change(lgssm._replace(A=A))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"the observed part B is .*; wanted B = \[I, 0\]"):
        change(lgssm._replace(B=2 * lgssm.B))


def test_changes_of_the_dynamics_can_be_composed(asked):
    lgssm = asked[0].model.dynamics.lgssm()
    one, other = scale_period(scale_force(canonical(lgssm), 0.5), 2.0), scale_force(scale_period(lgssm, 2.0), 0.5)
    torch.testing.assert_close(path(one), path(canonical(other)))


def test_the_map_is_known_through_wrappers(asked):
    run = asked[0]
    wanted = map_to_pixels(run.model, run.guide)
    rnn = run.guide.rnn
    plain = RecurrentGuide(rnn, AttentionHead(rnn.height, rnn.width, rnn.state_size))
    twice = corrected(*corrected(run.model, run.guide, Correction(1.0, 0.32)), Correction(0.5, 2.0))
    once = corrected(run.model, plain, Correction(1.0, 0.5))
    untangled = UntangledGuide(once[1], once[0].dynamics)
    for model, guide in (twice, once, (once[0], untangled), (once[0], RefinedGuide(untangled, once[0]))):
        found = map_to_pixels(model, guide)
        assert found.known
        assert torch.equal(found.affine.matrix, wanted.affine.matrix)
    linear = UntangledGuide(RecurrentGuide(rnn), run.model.dynamics)
    with pytest.raises(ValueError, match="UntangledGuide has no fixed map to pixels; give inferred positions"):
        map_to_pixels(run.model, linear)
