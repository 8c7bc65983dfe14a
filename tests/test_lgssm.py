import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.kalman import LGSSM, Gaussians
from pyro_pixels.lgssm.marginal import marginal_moments, response

SYSTEMS = {
    "regular": oracles.random_system(0),
    "d3_p1": oracles.random_system(1, d=3, p=1),
    "d5_p3": oracles.random_system(2, d=5, p=3),
    "d2_p4": oracles.random_system(3, d=2, p=4),
    "Sigma_H_zero": oracles.random_system(4, Sigma_H_rank=0),
    "Sigma_H_and_Sigma_singular": oracles.random_system(5, Sigma_H_rank=1, Sigma_rank=2),
    "nothing_random_but_Sigma_A": oracles.random_system(6, Sigma_H_rank=0, Sigma_rank=0),
}
every_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


def to_torch(system):
    return LGSSM(*(torch.tensor(x) for x in system))


def draw_data(system, T, seed=0):
    return np.random.default_rng(seed).standard_normal((T, len(system.B))) * 2


def observed_but(T, missing):
    return np.array([t not in missing for t in range(T)])


def assert_exact(system, a, observed, tolerance=1e-8):
    model, data = to_torch(system), torch.tensor(a)
    mask = None if observed is None else torch.tensor(observed)
    result = kalman.kalman_filter(model, data, mask)
    assert result.log_likelihood.shape == ()
    wanted = oracles.log_likelihood(system, a, observed)
    assert abs(result.log_likelihood.item() - wanted) <= tolerance * max(abs(wanted), 1.0)
    assert kalman.log_likelihood(model, data, mask) == result.log_likelihood
    for (mean, cov), (wanted_mean, wanted_cov) in [
        ((result.mean, result.cov), oracles.filtered(system, a, observed)),
        ((result.predicted_mean, result.predicted_cov), oracles.predicted(system, a, observed)),
        (kalman.rts_smoother(model, data, mask), oracles.smoothed(system, a, observed)),
    ]:
        assert oracles.relative_error(mean, wanted_mean) < tolerance
        assert oracles.relative_error(cov, wanted_cov) < tolerance


@every_system
@pytest.mark.parametrize("T", [1, 2, 12])
def test_filter_smoother_and_likelihood_equal_the_dense_gaussian(system, T):
    assert_exact(system, draw_data(system, T), None)


@pytest.mark.parametrize("name", ["regular", "d3_p1", "Sigma_H_zero", "Sigma_H_and_Sigma_singular"])
@given(observed=st.lists(st.booleans(), min_size=1, max_size=6))
@example(observed=[False])
@example(observed=[False] * 4)
@example(observed=[False, True, True])
@example(observed=[True, True, False])
@example(observed=[True, False, False, False, True])
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_missing_steps_equal_the_dense_gaussian(name, observed):
    system = SYSTEMS[name]
    assert_exact(system, draw_data(system, len(observed)), np.array(observed))


def test_all_steps_missing_leaves_the_prior():
    model = to_torch(SYSTEMS["regular"])
    result = kalman.kalman_filter(model, torch.zeros(4, 2).double(), torch.zeros(4, dtype=torch.bool))
    prior = kalman.rollout(model, model.mu, model.Sigma, 3)
    assert result.log_likelihood == 0
    assert torch.equal(result.mean[0], model.mu)
    torch.testing.assert_close(result.mean[1:], prior.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.cov[1:], prior.cov, rtol=1e-12, atol=1e-12)


def test_data_components_and_masks_broadcast_as_separate_calls():
    T, K, n_data, n_masks = 4, 3, 2, 2
    base = to_torch(SYSTEMS["regular"])
    starts = [to_torch(oracles.random_system(10 + k)) for k in range(K)]
    model = base._replace(mu=torch.stack([s.mu for s in starts]), Sigma=torch.stack([s.Sigma for s in starts]))
    a = torch.tensor(draw_data(SYSTEMS["regular"], T * n_data)).reshape(n_data, 1, T, 2)
    masks = torch.tensor([[True, False, True, True], [False, True, True, False]]).reshape(n_masks, 1, 1, T)

    result = kalman.kalman_filter(model, a, masks)
    smoothed = kalman.rts_smoother(model, a, masks)
    assert result.log_likelihood.shape == (n_masks, n_data, K)
    assert smoothed.mean.shape == (n_masks, n_data, K, T, 4)
    full_cov = smoothed.cov.expand(n_masks, n_data, K, T, 4, 4)
    for m in range(n_masks):
        for i in range(n_data):
            for k in range(K):
                one = base._replace(mu=model.mu[k], Sigma=model.Sigma[k])
                wanted = kalman.kalman_filter(one, a[i, 0], masks[m, 0, 0])
                wanted_smooth = kalman.rts_smoother(one, a[i, 0], masks[m, 0, 0])
                assert oracles.relative_error(result.log_likelihood[m, i, k], wanted.log_likelihood) < 1e-12
                assert oracles.relative_error(result.mean[m, i, k], wanted.mean) < 1e-12
                assert oracles.relative_error(smoothed.mean[m, i, k], wanted_smooth.mean) < 1e-12
                assert oracles.relative_error(full_cov[m, i, k], wanted_smooth.cov) < 1e-11


@pytest.mark.parametrize(
    "a_batch, mask_batch, wanted", [((), (3,), (3,)), ((3,), (), (3,)), ((2, 1), (3,), (2, 3)), ((5,), None, (5,))]
)
def test_batch_shapes(a_batch, mask_batch, wanted):
    model = to_torch(SYSTEMS["regular"])
    observed = None if mask_batch is None else torch.ones(*mask_batch, 3, dtype=torch.bool)
    a = torch.randn(*a_batch, 3, 2).double()
    assert kalman.log_likelihood(model, a, observed).shape == wanted
    assert kalman.rts_smoother(model, a, observed).mean.shape == (*wanted, 3, 4)
    assert kalman.sample_posterior(model, a, observed, (7,)).shape == (7, *wanted, 3, 4)


def test_nan_at_missing_steps_changes_neither_values_nor_gradients():
    system = SYSTEMS["regular"]
    a = torch.tensor(draw_data(system, 5))
    observed = torch.tensor([False, True, False, True, False])
    with_nan = torch.where(observed[:, None], a, torch.nan)

    def evaluate(data):
        data = data.clone().requires_grad_()
        model = LGSSM(*(torch.tensor(x).requires_grad_() for x in system))
        value = kalman.log_likelihood(model, data, observed) + kalman.rts_smoother(model, data, observed).mean.sum()
        return value, torch.autograd.grad(value, [*model, data])

    value, gradients = evaluate(with_nan)
    wanted, wanted_gradients = evaluate(a)
    assert value == wanted
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        assert torch.isfinite(gradient).all()
        assert torch.equal(gradient, wanted_gradient)
    assert torch.isfinite(kalman.sample_posterior(to_torch(system), with_nan, observed)).all()


def test_positions_of_another_type_are_cast_to_the_type_of_the_model():
    model = to_torch(SYSTEMS["regular"])
    a = torch.randn(3, 2)
    result = kalman.kalman_filter(model, a)
    assert result.mean.dtype == torch.float64
    assert result.log_likelihood == kalman.log_likelihood(model, a.double())


@pytest.mark.parametrize("quantity", ["log_likelihood", "smoothed_mean", "smoothed_cov"])
def test_gradients_equal_finite_differences(quantity):
    system = oracles.random_system(7, d=3, p=2)
    observed = torch.tensor([True, False, True])

    def value(A, B, u, root_H, root_A, mu, root, a):
        model = LGSSM(A, B, u, root_H @ root_H.mT, root_A @ root_A.mT, mu, root @ root.mT)
        if quantity == "log_likelihood":
            return kalman.log_likelihood(model, a, observed)
        return kalman.rts_smoother(model, a, observed)[quantity == "smoothed_cov"]

    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (torch.tensor(x) for x in system)
    inputs = [A, B, u, *map(torch.linalg.cholesky, (Sigma_H, Sigma_A)), mu, torch.linalg.cholesky(Sigma)]
    inputs.append(torch.tensor(draw_data(system, 3)))
    assert torch.autograd.gradcheck(value, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", ["regular", "Sigma_H_zero", "Sigma_H_and_Sigma_singular"])
@pytest.mark.parametrize("missing", [(), (0, 2), (0, 1, 2, 3)])
def test_posterior_draws_have_the_smoothed_moments_jointly_over_time(name, missing):
    system, T, n = SYSTEMS[name], 4, 20_000
    a, observed = draw_data(system, T), observed_but(T, missing)
    torch.manual_seed(0)
    draws = kalman.sample_posterior(to_torch(system), torch.tensor(a), torch.tensor(observed), (n,))
    h = oracles.h_index(range(T), 4)
    mean, cov = oracles.posterior(system, a, observed)
    mean, cov = mean[h], cov[np.ix_(h, h)]
    draws = draws.reshape(n, -1).numpy()
    assert oracles.worst_z_of_mean(draws, mean, cov) < 6  # sigma
    assert oracles.worst_z_of_covariance(draws, mean, cov) < 6  # sigma


def test_posterior_draws_of_a_batch_of_components_have_each_ones_smoothed_mean():
    starts = [oracles.random_system(10 + k) for k in range(2)]
    base = SYSTEMS["regular"]
    systems = [base._replace(mu=s.mu, Sigma=s.Sigma) for s in starts]
    model = to_torch(base)._replace(
        mu=torch.stack([torch.tensor(s.mu) for s in systems]),
        Sigma=torch.stack([torch.tensor(s.Sigma) for s in systems]),
    )
    a, n = draw_data(base, 3), 10_000
    torch.manual_seed(1)
    draws = kalman.sample_posterior(model, torch.tensor(a), None, (n,))
    assert draws.shape == (n, 2, 3, 4)
    h = oracles.h_index(range(3), 4)
    for k, system in enumerate(systems):
        mean, cov = oracles.posterior(system, a)
        one = draws[:, k].reshape(n, -1).numpy()
        assert oracles.worst_z_of_mean(one, mean[h], cov[np.ix_(h, h)]) < 6  # sigma


@pytest.mark.parametrize("name", ["regular", "Sigma_H_zero", "d3_p1"])
def test_prior_draws_have_the_moments_of_the_model(name):
    system, T, n = SYSTEMS[name], 4, 20_000
    d, p = len(system.mu), len(system.B)
    torch.manual_seed(2)
    h, a = kalman.sample(to_torch(system), T, (n,))
    assert h.shape == (n, T, d)
    assert a.shape == (n, T, p)
    draws = torch.cat([h.flatten(1), a.flatten(1)], 1).numpy()
    mean, cov = oracles.joint_moments(system, T)
    assert oracles.worst_z_of_mean(draws, mean, cov) < 6  # sigma
    assert oracles.worst_z_of_covariance(draws, mean, cov) < 6  # sigma
    a_mean, a_cov = marginal_moments(to_torch(system), T)
    assert oracles.worst_z_of_covariance(a.flatten(1).numpy(), a_mean.numpy(), a_cov.numpy()) < 6  # sigma


@pytest.mark.parametrize("batch", [(), (3,)])
def test_prior_draws_of_one_step_and_a_batch_have_the_right_shapes(batch):
    model = to_torch(SYSTEMS["regular"])
    model = model._replace(mu=model.mu.expand(*batch, 4), Sigma=model.Sigma.expand(*batch, 4, 4))
    h, a = kalman.sample(model, 1, (5, 2))
    assert h.shape == (5, 2, *batch, 1, 4)
    assert a.shape == (5, 2, *batch, 1, 2)


@every_system
def test_rollout_equals_smoothing_with_the_future_missing(system):
    n_seen, n_steps = 3, 4
    a = draw_data(system, n_seen + n_steps)
    observed = observed_but(n_seen + n_steps, range(n_seen, n_seen + n_steps))
    model = to_torch(system)
    seen = kalman.kalman_filter(model, torch.tensor(a[:n_seen]))
    mean, cov = kalman.rollout(model, seen.mean[-1], seen.cov[-1], n_steps)
    wanted_mean, wanted_cov = oracles.smoothed(system, a, observed)
    assert oracles.relative_error(mean, wanted_mean[n_seen:]) < 1e-8
    assert oracles.relative_error(cov, wanted_cov[n_seen:]) < 1e-8


def test_rollout_of_no_steps_is_empty():
    model = to_torch(SYSTEMS["regular"])
    mean, cov = kalman.rollout(model, model.mu.expand(3, 4), model.Sigma, 0)
    assert mean.shape == (3, 0, 4)
    assert cov.shape == (0, 4, 4)
    assert kalman.sample_rollout(model, model.mu.expand(3, 4), 0).shape == (3, 0, 4)


def test_sampled_rollouts_have_the_rollouts_moments():
    system, n = SYSTEMS["regular"], 20_000
    torch.manual_seed(3)
    draws = kalman.sample_rollout(to_torch(system), torch.tensor(system.mu).expand(n, 4), 3)
    known_start = system._replace(Sigma=np.zeros((4, 4)))
    mean, cov = oracles.joint_moments(known_start, 4)
    later = oracles.h_index([1, 2, 3], 4)
    mean, cov = mean[later], cov[np.ix_(later, later)]
    draws = draws.reshape(n, -1).numpy()
    assert oracles.worst_z_of_mean(draws, mean, cov) < 6  # sigma
    assert oracles.worst_z_of_covariance(draws, mean, cov) < 6  # sigma


def test_sampled_rollout_without_state_noise_is_the_mean():
    model = to_torch(SYSTEMS["Sigma_H_zero"])
    wanted = kalman.rollout(model, model.mu, model.Sigma, 5).mean
    torch.testing.assert_close(kalman.sample_rollout(model, model.mu, 5), wanted, rtol=1e-13, atol=1e-13)


@every_system
def test_observation_moments_of_missing_steps_equal_the_dense_gaussian(system):
    T, p, d = 6, len(system.B), len(system.mu)
    missing = (0, 3, 5)
    a, observed = draw_data(system, T), observed_but(T, missing)
    model = to_torch(system)
    states = kalman.rts_smoother(model, torch.tensor(a), torch.tensor(observed))
    noisy, clean = kalman.observation_moments(model, states), kalman.observation_moments(model, states, noise=False)
    mean, cov = oracles.posterior(system, a, observed)
    for t in missing:
        places = oracles.a_index([t], T, d, p)
        wanted = cov[np.ix_(places, places)]
        assert oracles.relative_error(noisy.mean[t], mean[places]) < 1e-8
        assert oracles.relative_error(noisy.cov[t], wanted) < 1e-8
        assert torch.equal(clean.mean, noisy.mean)
        assert oracles.relative_error(clean.cov[t] + model.Sigma_A, wanted) < 1e-8


@every_system
@pytest.mark.parametrize("T", [1, 2, 12])
def test_marginal_moments_equal_the_dense_gaussian(system, T):
    mean, cov = marginal_moments(to_torch(system), T)
    wanted_mean, wanted_cov = oracles.joint_moments(system, T)
    places = oracles.a_index(range(T), T, len(system.mu), len(system.B))
    assert oracles.relative_error(mean, wanted_mean[places]) < 1e-8
    assert oracles.relative_error(cov, wanted_cov[np.ix_(places, places)]) < 1e-8


@pytest.mark.parametrize("name", ["regular", "d3_p1", "d2_p4", "Sigma_H_zero"])
@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_the_hand_written_gradients_of_the_response(name, T):
    model = to_torch(SYSTEMS[name])

    def value(*parts):
        lgssm = model._replace(**dict(zip(("A", "B", "u", "Sigma_H", "Sigma_A"), parts)))
        return response(lgssm, T)

    parts = (model.A, model.B, model.u, model.Sigma_H, model.Sigma_A)
    # Sigma_H may be any matrix here, so that each of its elements is moved alone: V is linear in it, not symmetric.
    assert torch.autograd.gradcheck(value, [x.clone().requires_grad_() for x in parts])


@pytest.mark.parametrize("T", [1, 2, 3, 30, 130])
@pytest.mark.parametrize("d, p", [(4, 2), (5, 3)])
def test_the_closed_form_for_constant_velocities_is_the_general_one(T, d, p):
    """Values, and gradients in all parameters and in N, for an A = I + N that is no multiple of the paper's."""
    system, half, found = to_torch(oracles.random_system(0, d=d, p=p)), d // 2, []
    N = torch.tensor(np.random.default_rng(0).standard_normal((half, d - half)))
    for kind in (kalman.ConstantVelocity, LGSSM):
        leaves = [x.clone().requires_grad_() for x in (N, *system[1:])]
        A = torch.eye(d, dtype=torch.float64) + torch.nn.functional.pad(leaves[0], (half, 0, 0, d - half))
        lgssm = kind(A, *leaves[1:])
        moments = (*response(lgssm, T), *marginal_moments(lgssm._replace(mu=2 * lgssm.mu), T))
        torch.manual_seed(1)
        total = sum((x * torch.randn_like(x)).sum() for x in moments)
        found.append([*moments, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)])
    for actual, wanted in zip(*found, strict=True):
        scale = max(float(wanted.detach().abs().max()), 1.0)
        assert float((actual - wanted).detach().abs().max()) < 1e-11 * scale


def test_marginal_moments_of_a_batch_of_components_equal_separate_ones():
    model = to_torch(SYSTEMS["regular"])
    batch = model._replace(mu=torch.stack([model.mu, -model.mu]), Sigma=torch.stack([model.Sigma, 3 * model.Sigma]))
    mean, cov = marginal_moments(batch, 5)
    for k in range(2):
        wanted_mean, wanted_cov = marginal_moments(model._replace(mu=batch.mu[k], Sigma=batch.Sigma[k]), 5)
        assert oracles.relative_error(mean[k], wanted_mean) < 1e-13
        assert oracles.relative_error(cov[k], wanted_cov) < 1e-13


def test_semidefinite_cholesky_of_a_definite_matrix_is_the_cholesky_factor():
    Sigma = torch.stack([torch.tensor(oracles.random_system(s, d=5).Sigma) for s in range(3)])
    torch.testing.assert_close(
        kalman.semidefinite_cholesky(Sigma), torch.linalg.cholesky(Sigma), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_semidefinite_cholesky_of_a_singular_matrix_is_a_lower_root_with_finite_gradient(rank, scale):
    root = (scale * torch.tensor(np.random.default_rng(rank).standard_normal((4, rank)))).requires_grad_()
    Sigma = root @ root.mT
    L = kalman.semidefinite_cholesky(Sigma)
    assert torch.equal(L, L.tril())
    assert oracles.relative_error(L @ L.mT, Sigma.detach()) < 1e-12
    assert int((L != 0).any(0).sum()) == rank
    L.sum().backward()
    assert torch.isfinite(root.grad).all()


def test_semidefinite_cholesky_of_a_batch_treats_every_matrix_by_itself():
    batch = torch.stack([torch.zeros(3, 3), torch.eye(3), 1e-20 * torch.eye(3), torch.diag(torch.tensor([4.0, 0, 9]))])
    wanted = torch.stack([torch.zeros(3, 3), torch.eye(3), 1e-10 * torch.eye(3), torch.diag(torch.tensor([2.0, 0, 3]))])
    torch.testing.assert_close(kalman.semidefinite_cholesky(batch.double()), wanted.double())


@pytest.mark.parametrize("missing", [(), (0,), (2, 3), (5,)])
def test_filter_and_smoother_equal_filterpy(missing):
    filterpy = pytest.importorskip("filterpy.kalman")
    T = 6
    system = SYSTEMS["regular"]._replace(u=np.zeros(4))  # filterpy's smoother knows no control input
    a, observed = draw_data(system, T), observed_but(T, missing)
    other = filterpy.KalmanFilter(dim_x=4, dim_z=2)
    other.x, other.P = system.mu.copy(), system.Sigma.copy()
    other.F, other.Q, other.H, other.R = system.A, system.Sigma_H, system.B, system.Sigma_A
    means, covs, log_likelihood = [], [], 0.0
    for t in range(T):
        if t > 0:
            other.predict()
        other.update(a[t] if observed[t] else None)
        log_likelihood += other.log_likelihood if observed[t] else 0.0
        means.append(other.x.copy())
        covs.append(other.P.copy())
    smooth_mean, smooth_cov, _, _ = other.rts_smoother(np.array(means), np.array(covs))

    model, data, mask = to_torch(system), torch.tensor(a), torch.tensor(observed)
    result, smoothed = kalman.kalman_filter(model, data, mask), kalman.rts_smoother(model, data, mask)
    assert oracles.relative_error(result.log_likelihood, np.array(log_likelihood)) < 1e-8
    assert oracles.relative_error(result.mean, np.array(means)) < 1e-8
    assert oracles.relative_error(result.cov, np.array(covs)) < 1e-8
    assert oracles.relative_error(smoothed.mean, smooth_mean) < 1e-8
    assert oracles.relative_error(smoothed.cov, smooth_cov) < 1e-8


@pytest.mark.parametrize("function", [kalman.kalman_filter, kalman.rts_smoother, kalman.sample_posterior])
@pytest.mark.parametrize("shape", [(2,), (5, 3), (0, 2), (4, 5, 1)])
def test_positions_of_a_wrong_shape_raise(function, shape):
    with pytest.raises(ValueError, match=r"wanted \(\.\.\., T >= 1, 2\)"):
        function(to_torch(SYSTEMS["regular"]), torch.zeros(shape).double())


@pytest.mark.parametrize("function", [kalman.kalman_filter, kalman.rts_smoother, kalman.sample_posterior])
@pytest.mark.parametrize(
    "observed",
    [torch.ones(4, dtype=torch.bool), torch.ones(5), torch.tensor(True), torch.ones(5, 2, dtype=torch.bool)],
    ids=["T", "float", "scalar", "one_a_coordinate"],
)
def test_a_mask_of_a_wrong_shape_or_type_raises(function, observed):
    with pytest.raises(ValueError, match=r"wanted bool \(\.\.\., T = 5\)"):
        function(to_torch(SYSTEMS["regular"]), torch.zeros(5, 2).double(), observed)


def test_long_deterministic_motion_keeps_the_covariances_positive():
    delta = 0.015
    A = np.eye(4) + delta * np.eye(4, k=2)
    system = oracles.System(
        A, np.eye(2, 4), np.array([0, -1e-3, 0, -0.1]), np.zeros((4, 4)), 1e-6 * np.eye(2), np.zeros(4), np.eye(4)
    )
    a = torch.tensor(draw_data(system, 60)) * 0.01
    model = to_torch(system)
    states: Gaussians = kalman.rts_smoother(model, a)
    variances = states.cov.diagonal(dim1=-2, dim2=-1)
    assert (variances > 0).all()
    wanted_mean, _ = oracles.smoothed(system, a.numpy())
    assert oracles.relative_error(states.mean, wanted_mean) < 1e-6
