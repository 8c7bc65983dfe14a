"""Filtered and averaged states, and the past, against dense Gaussians and draws."""

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_queries import true_world

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.structured import ConditionedTracks, StructuredGuide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.queries.counterfactual import canonical
from pyro_pixels.queries.latent_states import (
    averaged,
    filter_states,
    moves,
    positions,
    posterior_states,
    retrodict,
    states,
)
from pyro_pixels.queries.predict import States, generate, interpolate, smooth


def make_dynamics(K=3, seed=1, **options):
    torch.manual_seed(seed)
    dynamics = Dynamics(DynamicsConfig(n_components=K, **{"delta": 0.3, "position_noise": 0.4, **options})).double()
    with torch.no_grad():
        dynamics.u.normal_()
        dynamics.log_pi.normal_()
        dynamics.root_Sigma_H.normal_().mul_(0.5)
    return dynamics


def systems(dynamics):
    """Its components, for the oracles."""
    lgssm = kalman.LGSSM(*(x.detach().numpy() for x in dynamics.lgssm()))
    return [oracles.System(*lgssm[:5], mu, Sigma) for mu, Sigma in zip(lgssm.mu, lgssm.Sigma)]


def mixed(weights, moments):
    """Mean and covariance of a mixture of (mean, cov)."""
    mean = sum(w * m for w, (m, _) in zip(weights, moments))
    return mean, sum(w * (C + np.outer(m - mean, m - mean)) for w, (m, C) in zip(weights, moments))


@settings(max_examples=10, deadline=None)
@given(observed=st.lists(st.booleans(), min_size=1, max_size=5))
def test_filtered_states_are_those_of_the_dense_mixture(observed):
    dynamics, T = make_dynamics(K=2), len(observed)
    a = torch.randn(T, 2, dtype=torch.float64)
    found = filter_states(dynamics, a, torch.tensor(observed))
    each, pi = systems(dynamics), dynamics.pi.detach().numpy()
    for t in range(T):
        p_z = oracles.mixture_posterior(each, pi, a[: t + 1].numpy(), observed[: t + 1])
        moments = [oracles.filtered(s, a.numpy(), observed) for s in each]
        mean, cov = mixed(p_z, [(m[t], C[t]) for m, C in moments])
        np.testing.assert_allclose(found.p_z[t], p_z, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found.mean[t], mean, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found.cov[t], cov, rtol=1e-7, atol=1e-9)


def test_the_last_filtered_state_is_the_smoothed_one():
    dynamics, a = make_dynamics(), torch.randn(2, 3, 7, 2)
    one, two = filter_states(dynamics, a), smooth(dynamics, a)
    torch.testing.assert_close(one.mean[..., -1, :], two.mean[..., -1, :], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.cov[..., -1, :, :], two.cov[..., -1, :, :], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.p_z[..., -1, :], two.p_z)


def measured(dynamics, n_samples, T=6, R=0.3):
    """States averaged over q(a) = p(a | y), and y."""
    torch.manual_seed(2)
    y = torch.randn(2, T, 2, dtype=torch.float64)
    q_a = ConditionedTracks(dynamics, y, torch.full_like(y, R))
    return y, posterior_states(dynamics, q_a.sample((n_samples,)))


def test_averaged_states_are_those_given_what_was_measured():
    """q(a) = p(a | y) averaged out is a smoother with noise Sigma_A + R; 6 standard errors of 2,000 samples."""
    dynamics, n = make_dynamics(), 2_000
    y, found = measured(dynamics, n)
    lgssm = dynamics.lgssm()
    noisy = lgssm._replace(Sigma_A=lgssm.Sigma_A + 0.3 * torch.eye(2))
    w = (kalman.log_likelihood(noisy, y.unsqueeze(-3)) + dynamics.pi.log()).softmax(-1)
    each = kalman.rts_smoother(noisy, y.unsqueeze(-3))
    mean = torch.einsum("bk,bktd->btd", w, each.mean)
    variance = torch.einsum("bk,bktd->btd", w, (each.mean - mean.unsqueeze(1)) ** 2 + each.cov.diagonal(0, -2, -1))
    for value in (found.mean, found.samples.mean(0)):
        assert ((value - mean).abs() < 6 * (variance / n).sqrt()).all()
    assert ((found.p_z - w).abs() < 6 * (w * (1 - w) / n).sqrt() + 1e-9).all()
    fourth = (found.samples - mean).pow(4).mean(0)
    standard_error = ((fourth - variance**2) / n).sqrt()
    for value in (found.cov.diagonal(0, -2, -1), found.samples.var(0)):
        assert ((value - variance).abs() < 6 * standard_error).all()


def test_sampled_paths_keep_the_motion():
    """Velocities of a sampled path are those of its positions: with next to no Sigma_H a path is a parabola."""
    dynamics = make_dynamics()
    with torch.no_grad():
        dynamics.root_Sigma_H.copy_(-12 * torch.eye(4))
    _, found = measured(dynamics, 5)
    h, lgssm = found.samples, dynamics.lgssm()
    torch.testing.assert_close(h[..., 1:, :], h[..., :-1, :] @ lgssm.A.mT + lgssm.u, rtol=0, atol=1e-4)


def test_images_to_states(small_data):
    model, guide = make_model(), make_guide()
    torch.manual_seed(0)
    found = states(model, guide, small_data.images, small_data.n_objects, n_samples=4)
    assert found.mean.shape == (12, 3, 11, 4)
    assert found.cov.shape == (12, 3, 11, 4, 4)
    assert found.samples.shape == (4, 12, 3, 11, 4)
    assert found.p_z.shape == (12, 3, 2)


class Sure(Guide):
    """q(a | v) = N(positions, std^2), without correlations."""

    def __init__(self, a, std):
        super().__init__()
        self.a, self.std = a, std

    def encode(self, images, n_objects):
        return dist.Normal(self.a[:, :, : images.shape[1]], self.std).to_event(2)


def test_an_averaged_forecast_leaves_nothing_out():
    """Of q with variance s^2, one component: a Kalman filter whose Sigma_A is not counted twice but whose a is noisy.

    With E[h | a] = M a + c linear, Cov[h] = Cov[h | a] + s^2 M M'; 6 standard errors of 1,000 samples.
    """
    n, s, tau, T = 1_000, 0.4, 4, 8
    model = make_model(n_components=1, delta=0.3, state_noise=0.02, position_noise=0.1)
    a = torch.randn(1, 1, tau, 2, dtype=torch.float64)
    images, one = torch.zeros(1, tau, SMALL.height, SMALL.width), torch.ones(1, dtype=torch.long)
    torch.manual_seed(0)
    plain = generate(model, Sure(a, s), images, one, n_frames=T, n_samples=n)
    found = averaged(model, plain, one)
    (system,) = systems(model.dynamics)
    mean, cov = oracles.joint_moments(system, T)
    seen, unseen = oracles.a_index(range(tau), T, 4, 2), oracles.a_index(range(tau, T), T, 4, 2)
    M = np.linalg.solve(cov[np.ix_(seen, seen)], cov[np.ix_(seen, unseen)]).T
    given_a = oracles.condition(mean, cov, seen, a.flatten().numpy())
    wanted = given_a[1][np.ix_(unseen, unseen)] + s**2 * M @ M.T
    # exactly the paper's without q's uncertainty
    plain_cov = torch.block_diag(*plain.cov[0, 0, tau:]).numpy()
    inside = np.kron(np.eye(T - tau), np.ones((2, 2))) > 0
    np.testing.assert_allclose(plain_cov[inside], given_a[1][np.ix_(unseen, unseen)][inside], rtol=1e-8)
    spread = np.sqrt(np.diag(s**2 * M @ M.T))
    assert (np.abs(found.mean[0, 0, tau:].flatten().numpy() - given_a[0][unseen]) < 6 * spread / n**0.5).all()
    variance = torch.diagonal(found.cov[0, 0, tau:], 0, -2, -1).flatten().numpy()
    assert (np.abs(variance - np.diag(wanted)) < 6 * spread**2 * (2 / n) ** 0.5).all()
    torch.testing.assert_close(found.mean[0, 0, :tau], a[0, 0])
    torch.testing.assert_close(found.cov[0, 0, :tau], (s**2 * torch.eye(2)).expand(tau, 2, 2).double())


def test_averaging_leaves_a_guide_that_averages_as_it_is(small_data):
    """For a structured guide `averaged` estimates what it says already: 6 standard errors of 500 samples."""
    model = make_model(position_noise=0.2, state_noise=0.02, delta=0.3)
    guide = StructuredGuide(model.dynamics, InferenceRNN(SMALL.height, SMALL.width, 8))
    images, n_objects, n = small_data.images[:2], small_data.n_objects[:2], 500
    torch.manual_seed(1)
    observed = torch.arange(11) % 4 == 0
    p = interpolate(model, guide, images, n_objects, observed, n_samples=n)
    q = averaged(model, p, n_objects)
    variance = p.cov.diagonal(0, -2, -1)
    assert ((q.mean - p.mean).abs() < 6 * (variance / n).sqrt()).all()
    fourth = (p.samples - p.mean).pow(4).mean(0)
    standard_error = ((fourth - variance**2).clamp(min=0) / n).sqrt()
    assert ((q.cov.diagonal(0, -2, -1) - variance).abs() < 6 * standard_error).all()


def test_the_past_is_that_of_a_dense_gaussian_with_a_wide_start():
    """3 frames before the first, of which nothing is known: the dense posterior with variance 1e7 at the earliest."""
    system = oracles.random_system(7)
    n, T, wide = 3, 5, 1e7
    a = np.random.default_rng(0).standard_normal((T + n, 2))
    observed = np.arange(T + n) >= n
    mean, cov = oracles.smoothed(system._replace(mu=np.zeros(4), Sigma=wide * np.eye(4)), a, observed)
    lgssm = kalman.LGSSM(*(torch.tensor(x) for x in system))
    backwards = kalman.reverse(lgssm)
    h = kalman.rollout(backwards, torch.tensor(mean[n]), torch.tensor(cov[n]), n)
    np.testing.assert_allclose(h.mean.flip(0), mean[:n], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(h.cov.flip(0), cov[:n], rtol=1e-4, atol=1e-4)


def test_there_and_back_again():
    """Without Sigma_H the dynamics, run on from the retrodicted past, arrive at the first frame; so do samples."""
    dynamics = make_dynamics()
    lgssm = dynamics.lgssm()._replace(Sigma_H=torch.zeros(4, 4, dtype=torch.float64))
    dynamics.lgssm = lambda: lgssm
    _, found = measured(dynamics, 50)
    before = retrodict(dynamics, found, 4)
    again = kalman.rollout(lgssm, before.mean[..., 0, :], before.cov[..., 0, :, :], 4)
    torch.testing.assert_close(again.mean[..., -1, :], found.mean[..., 0, :])
    torch.testing.assert_close(again.cov[..., -1, :, :], found.cov[..., 0, :, :])
    torch.testing.assert_close(before.samples[..., -1, :] @ lgssm.A.mT + lgssm.u, found.samples[..., 0, :])


def test_samples_of_the_past_have_its_moments():
    """20,000 draws from a Gaussian first state, 6 standard errors."""
    dynamics, n = make_dynamics(K=1), 20_000
    h_1 = smooth(dynamics, torch.randn(4, 2))
    L = torch.linalg.cholesky(h_1.cov[0])
    torch.manual_seed(0)
    draws = (h_1.mean[0] + torch.randn(n, 4, dtype=torch.float64) @ L.mT).unsqueeze(1)
    past = retrodict(dynamics, h_1._replace(samples=draws), 3)
    assert past.mean.shape == (3, 4)
    for t in range(3):
        x, m, C = (y.detach().numpy() for y in (past.samples[:, t], past.mean[t], past.cov[t]))
        assert oracles.worst_z_of_mean(x, m, C) < 6
        assert oracles.worst_z_of_covariance(x, m, C) < 6


def test_moves_are_the_differences_of_a_path():
    """Of the true paths given the true dynamics, and of any path without noise, whose state determines the next one."""
    data, model = true_world()
    present = data.n_objects[:, None] > torch.arange(3)
    found = moves(model.dynamics, smooth(model.dynamics, data.paths.nan_to_num()))
    true = data.paths.diff(dim=2)
    torch.testing.assert_close(found.mean[:, :, :-1][present], true[present], rtol=0, atol=1e-3)
    assert true[present].norm(dim=-1).mean() > 0.4

    dynamics = make_dynamics()
    lgssm = dynamics.lgssm()
    path = kalman.rollout(lgssm, lgssm.mu[0], torch.zeros(4, 4, dtype=torch.float64), 9).mean
    exact = moves(dynamics, path)
    torch.testing.assert_close(exact[:-1], path[:, :2].diff(dim=0))


class _Other(Dynamics):
    """The same distribution of tracks as other dynamics, with another u."""

    def __init__(self, same):
        super().__init__(same.config)
        self.load_state_dict(same.state_dict())
        self.double()

    def lgssm(self):
        return canonical(super().lgssm())


def test_moves_do_not_depend_on_the_drift_that_u_shares_with_the_velocities():
    dynamics = make_dynamics()
    other, a = _Other(dynamics), torch.randn(2, 3, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(other.positions(7).log_prob(a), dynamics.positions(7).log_prob(a))
    one, two = smooth(dynamics, a), smooth(other, a)
    assert (one.mean[..., 2:] - two.mean[..., 2:]).abs().min() > 0.1
    for x, y in zip(moves(dynamics, one), moves(other, two)):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


def test_moves_of_draws_have_the_moments_of_moves():
    dynamics = make_dynamics()
    torch.manual_seed(0)
    found = posterior_states(dynamics, torch.randn(3, 7, 2, dtype=torch.float64).expand(4_000, 3, 7, 2))
    mean, cov = moves(dynamics, found)
    drawn = moves(dynamics, found.samples)
    std = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((drawn.mean(0) - mean).abs() < 6 * std / 4_000**0.5).all()  # 6 standard errors
    torch.testing.assert_close(drawn.std(0), std, rtol=6 / 8_000**0.5, atol=0)


def test_positions_of_states():
    dynamics = make_dynamics()
    found = smooth(dynamics, torch.randn(5, 2))
    with_noise, without = positions(dynamics, found), positions(dynamics, found, noise=False)
    torch.testing.assert_close(with_noise.cov - without.cov, dynamics.lgssm().Sigma_A.expand(5, 2, 2))
    torch.testing.assert_close(without.cov, found.cov[:, :2, :2])


@pytest.mark.parametrize("N", [2, 3])
def test_a_mask_of_sequences_holds_for_all_their_objects(N):
    """Also where there are as many sequences as objects, and it could be taken for a mask of objects."""
    dynamics, observed = make_dynamics(), torch.rand(3, 7) < 0.6
    a = torch.randn(4, 3, N, 7, 2)  # samples of three sequences
    for query, x in ((smooth, a), (smooth, a[0]), (filter_states, a), (filter_states, a[0])):
        found, wanted = query(dynamics, x, observed), query(dynamics, x, observed[:, None].expand(3, N, 7))
        torch.testing.assert_close(found.mean, wanted.mean)
        torch.testing.assert_close(found.cov.expand_as(wanted.cov), wanted.cov)
    found = posterior_states(dynamics, a, observed)
    torch.testing.assert_close(found.mean, posterior_states(dynamics, a, observed[:, None]).mean)
    alone = posterior_states(dynamics, a[:, 0], observed[:N])  # samples (S, N, T, 2) of one sequence, a mask (N, T)
    torch.testing.assert_close(alone.mean, posterior_states(dynamics, a[:, :1], observed[None, :N]).mean[0])


def test_positions_of_nan_are_unobserved():
    dynamics, observed = make_dynamics(), torch.rand(4, 2, 7) < 0.6
    a = torch.randn(4, 2, 7, 2)
    holes, rest = a.masked_fill(~observed.unsqueeze(-1), torch.nan), torch.arange(7) != 3
    holes[0, 0, :, 0] = torch.nan  # one coordinate is enough
    observed[0, 0] = False
    for query in (smooth, filter_states):
        for mask in (None, rest, rest.expand(4, 7), rest.expand(4, 2, 7)):
            found, wanted = query(dynamics, holes, mask), query(dynamics, a, observed & (mask is None or rest))
            assert all(torch.equal(x, y) for x, y in zip(found[:3], wanted[:3]))
    prior = smooth(dynamics, a[0, 0], torch.zeros(7).bool())
    torch.testing.assert_close(smooth(dynamics, holes).mean[0, 0], prior.mean)


BAD = {
    "a mask of other sequences": lambda: smooth(make_dynamics(), torch.zeros(3, 2, 5, 2), torch.ones(2, 5).bool()),
    "no samples": lambda: posterior_states(make_dynamics(), None),
    "none asked for": lambda: states(make_model(), make_guide(), torch.zeros(1, 4, 12, 12), torch.ones(1).long(),
                                     n_samples=0),
    "no frames before": lambda: retrodict(make_dynamics(), smooth(make_dynamics(), torch.zeros(3, 2)), 0),
    "a prediction without samples": lambda: averaged(
        make_model(),
        generate(make_model(), make_guide(), torch.zeros(1, 4, 12, 12), torch.ones(1).long(), n_frames=6),
        torch.ones(1).long(),
    ),
    "a mask of another length": lambda: filter_states(make_dynamics(), torch.zeros(3, 2), torch.ones(4).bool()),
    "a mask of numbers": lambda: smooth(make_dynamics(), torch.full((3, 2), torch.nan), torch.ones(3)),
}  # fmt: skip


@pytest.mark.parametrize("query", BAD.values(), ids=BAD.keys())
def test_bad_input(query):
    with pytest.raises(ValueError):
        query()


def test_states_without_samples_have_none():
    assert isinstance(found := smooth(make_dynamics(), torch.zeros(3, 2)), States)
    assert retrodict(make_dynamics(), found, 2).samples is None
