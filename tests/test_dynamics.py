import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.distributions import BlockTracks, DenseTracks, StatePath
from pyro_pixels.lgssm.dynamics import (
    Dynamics,
    DynamicsConfig,
    dense_components,
    exact_components,
    hmm_components,
    select_component,
)
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig


def blocks_of_three(lgssm, n_frames):
    return BlockTracks(lgssm, n_frames, block=3)


every_components = pytest.mark.parametrize("components", [dense_components, blocks_of_three, hmm_components])

# Pyro's GaussianHMM loses digits when Sigma_H is small, also in float64. The largest absolute errors in nats at T = 30
# for Sigma_H = state_noise I in findings.md (2e-9, 3e-9, 3e-7, 3e-5), times 30 for other starts and machines.
HMM_TOLERANCE = {1e-3: 6e-8, 1e-4: 9e-8, 1e-6: 9e-6, 1e-8: 9e-4}


def make_dynamics(*, state_noise=1e-3, position_noise=1e-3, K=2, components=dense_components, seed=0):
    """Full covariances, unequal pi and moving starts, all different from the defaults."""
    torch.manual_seed(seed)
    config = DynamicsConfig(n_components=K, state_noise=state_noise, position_noise=position_noise)
    dynamics = Dynamics(config, components=components)
    with torch.no_grad():
        dynamics.u.normal_().mul_(0.1)
        dynamics.log_pi.normal_()
        dynamics.mu.normal_()
        for root in (dynamics.root_Sigma_H, dynamics.root_Sigma_A, dynamics.root_Sigma):
            smallest = root.diagonal(dim1=-2, dim2=-1).exp().min()
            root.add_(torch.tril(torch.randn_like(root), -1) * smallest)
    return dynamics


def systems_of(dynamics):
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (x.detach().numpy() for x in dynamics.lgssm())
    return [oracles.System(A, B, u, Sigma_H, Sigma_A, mu[k], Sigma[k]) for k in range(len(mu))]


def pi_of(dynamics):
    return dynamics.log_pi.detach().double().softmax(-1).numpy()


def brute_force_p_a(dynamics, a):
    systems, pi = systems_of(dynamics), pi_of(dynamics)
    return np.array([oracles.mixture_log_prob(systems, pi, x) for x in a.double().numpy()])


def draw_positions(dynamics, T, shape=(3,)):
    torch.manual_seed(1)
    return dynamics.positions(T).sample(shape)


def small_model(dynamics, size=5):
    torch.manual_seed(2)
    return PixelModel(dynamics, Renderer(size, size, 6))


def test_lgssm_has_the_structure_of_the_paper_and_the_starting_values_of_the_config():
    config = DynamicsConfig(n_components=3, delta=0.2, state_noise=0.01, position_noise=0.5, start_variance=2.0)
    dynamics = Dynamics(config)
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = dynamics.lgssm()
    wanted_A = [[1, 0, 0.2, 0], [0, 1, 0, 0.2], [0, 0, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(A, torch.tensor(wanted_A).double(), rtol=1e-6, atol=0)
    assert torch.equal(B, torch.eye(2, 4).double())
    assert torch.equal(u, torch.zeros(4).double())
    torch.testing.assert_close(Sigma_H, 0.01 * torch.eye(4).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(Sigma_A, 0.5 * torch.eye(2).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(Sigma, 2.0 * torch.eye(4).double().expand(3, 4, 4), rtol=1e-5, atol=0)
    assert torch.equal(mu[:, 2:], torch.zeros(3, 2).double())
    assert len(mu[:, :2].unique()) == 6
    torch.testing.assert_close(dynamics.delta, torch.tensor(0.2))
    torch.testing.assert_close(dynamics.pi, torch.full((3,), 1 / 3))


def test_paper_defaults():
    config = DynamicsConfig()
    assert (config.n_components, config.delta, config.state_noise) == (2, 0.1, 1e-3)
    assert (config.position_noise, config.start_variance) == (1.0, 1.0)


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("state_noise", HMM_TOLERANCE)
@pytest.mark.parametrize("components", [dense_components, blocks_of_three])
def test_p_a_equals_the_brute_force_mixture_of_dense_gaussians(T, state_noise, components):
    dynamics = make_dynamics(state_noise=state_noise, components=components)
    a = draw_positions(dynamics, T)
    assert oracles.relative_error(dynamics.positions(T).log_prob(a), brute_force_p_a(dynamics, a)) < 1e-8


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("state_noise, tolerance", HMM_TOLERANCE.items())
def test_hmm_p_a_equals_the_brute_force_mixture_of_dense_gaussians(T, state_noise, tolerance):
    dynamics = make_dynamics(state_noise=state_noise)
    dynamics.root_Sigma_H.data = dynamics.root_Sigma_H.data.diag().diag()
    a = draw_positions(dynamics, T)
    dynamics.components = hmm_components
    error = dynamics.positions(T).log_prob(a).detach().numpy() - brute_force_p_a(dynamics, a)
    assert np.abs(error).max() < tolerance


@every_components
@pytest.mark.parametrize("T", [1, 2, 30])
def test_p_a_at_the_start_of_training_equals_brute_force(components, T):
    torch.manual_seed(0)
    dynamics = Dynamics(components=components)
    a = draw_positions(dynamics, T)
    assert oracles.relative_error(dynamics.positions(T).log_prob(a), brute_force_p_a(dynamics, a)) < 1e-8


@every_components
def test_each_component_equals_its_dense_gaussian(components):
    dynamics = make_dynamics(K=3)
    a = draw_positions(dynamics, 4, ())
    log_prob = components(dynamics.lgssm(), 4).log_prob(a)
    wanted = [oracles.log_likelihood(system, a.numpy()) for system in systems_of(dynamics)]
    assert oracles.relative_error(log_prob, np.array(wanted)) < 1e-8


def test_log_prob_is_float64_also_for_float32_positions():
    dynamics = make_dynamics()
    a = draw_positions(dynamics, 30).float()
    log_prob = dynamics.positions(30).log_prob(a)
    assert log_prob.dtype == torch.float64
    assert oracles.relative_error(log_prob, brute_force_p_a(dynamics, a)) < 1e-8


@pytest.mark.parametrize("deterministic", ["Sigma_H", "Sigma"])
def test_blocks_are_exact_for_deterministic_motion_and_known_starts(deterministic):
    lgssm = make_dynamics().lgssm()
    lgssm = lgssm._replace(**{deterministic: torch.zeros_like(getattr(lgssm, deterministic))})
    a = torch.randn(5, 1, 10, 2, dtype=torch.float64)
    wanted = dense_components(lgssm, 10).log_prob(a)
    torch.testing.assert_close(blocks_of_three(lgssm, 10).log_prob(a), wanted, rtol=1e-9, atol=0)


def test_blocks_are_exact_for_states_of_any_size():
    """Position, velocity and acceleration along each axis."""
    lgssm, I = make_dynamics().lgssm(), torch.eye(2, dtype=torch.float64)
    A, B = torch.kron(torch.tensor([[1, 0.2, 0.02], [0, 1, 0.2], [0, 0, 1]], dtype=torch.float64), I), torch.eye(6)[:2]
    Sigma = torch.diag_embed(torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.3, 0.3]] * 2)).double()
    states = kalman.LGSSM(
        A, B.double(), torch.zeros(6).double(), 1e-3 * Sigma[0], lgssm.Sigma_A, torch.randn(2, 6).double(), Sigma
    )
    a = torch.randn(5, 1, 10, 2, dtype=torch.float64)
    wanted = dense_components(states, 10).log_prob(a)
    torch.testing.assert_close(blocks_of_three(states, 10).log_prob(a), wanted, rtol=1e-9, atol=0)


def test_long_sequences_go_by_blocks_and_agree_with_the_dense_gaussian():
    lgssm = make_dynamics().lgssm()
    assert isinstance(exact_components(lgssm, 30), DenseTracks)
    blocks = exact_components(lgssm, 150)
    assert isinstance(blocks, BlockTracks)
    a = blocks.sample((4,))
    torch.testing.assert_close(blocks.log_prob(a), dense_components(lgssm, 150).log_prob(a), rtol=1e-9, atol=0)


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("other", [hmm_components, blocks_of_three])
def test_gradients_of_all_parameters_agree(T, other):
    gradients = {}
    for components in (dense_components, other):
        dynamics = make_dynamics(position_noise=1.0).double()
        a = draw_positions(dynamics, T)
        dynamics.components = components
        dynamics.positions(T).log_prob(a).sum().backward()
        gradients[components] = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in dynamics.named_parameters()
        }
    wanted = gradients[dense_components]
    assert all(gradient.any() for gradient in wanted.values()) or T == 1
    for name, gradient in gradients[other].items():
        scale = wanted[name].abs().max().clamp(min=1.0)
        assert (gradient - wanted[name]).abs().max() < 1e-6 * scale, name


def test_gradients_of_p_a_equal_finite_differences():
    dynamics = make_dynamics(state_noise=0.1, position_noise=0.5).double()
    a = draw_positions(dynamics, 3, (2,))
    names, parameters = zip(*dynamics.named_parameters())

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dynamics = dynamics

        def forward(self, a):
            return self.dynamics.positions(3).log_prob(a)

    def value(a, *parameters):
        named = {f"dynamics.{name}": p for name, p in zip(names, parameters)}
        return torch.func.functional_call(LogProb(), named, (a,))

    inputs = [x.detach().clone().requires_grad_() for x in (a, *parameters)]
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("T", [1, 2, 8])
def test_component_posteriors_equal_brute_force(T):
    dynamics = make_dynamics(K=3, position_noise=0.5).double()
    a = draw_positions(dynamics, T, (2, 2))
    systems, pi = systems_of(dynamics), pi_of(dynamics)
    wanted = np.array([[oracles.mixture_posterior(systems, pi, x) for x in row] for row in a.numpy()])
    assert oracles.relative_error(dynamics.component_posterior(a).probs, wanted) < 1e-8
    assert oracles.relative_error(dynamics.positions(T).component_posterior(a).probs, wanted) < 1e-8
    expanded = dynamics.positions(T).expand([2, 2])
    assert oracles.relative_error(expanded.component_posterior(a).probs, wanted) < 1e-8


@pytest.mark.parametrize("missing", [(0,), (4,), (1, 2, 3), (0, 1, 2, 3, 4)])
def test_component_posterior_with_missing_frames_equals_brute_force(missing):
    dynamics = make_dynamics(K=3, position_noise=0.5).double()
    a = draw_positions(dynamics, 5, (2,))
    observed = torch.ones(2, 5, dtype=torch.bool)
    observed[1, list(missing)] = False
    systems, pi = systems_of(dynamics), pi_of(dynamics)
    wanted = [oracles.mixture_posterior(systems, pi, x, seen) for x, seen in zip(a.numpy(), observed.numpy())]
    hidden = torch.where(observed[..., None], a, torch.nan)
    assert oracles.relative_error(dynamics.component_posterior(hidden, observed).probs, np.array(wanted)) < 1e-8


def test_log_p_of_z_h_a_less_log_p_of_z_h_given_a_is_log_p_a_for_every_draw():
    T = 5
    dynamics = make_dynamics(state_noise=0.01, position_noise=0.1)
    model, systems, pi = small_model(dynamics), systems_of(dynamics), pi_of(dynamics)
    seen_components = set()
    for seed in range(8):
        torch.manual_seed(seed)
        trace = poutine.trace(model.joint).get_trace(None, torch.tensor([1]), T)
        trace.compute_log_prob()
        z, h, a = (trace.nodes[name]["value"][0, 0].detach().numpy() for name in ("z", "h", "a"))
        log_p_zha = sum(trace.nodes[name]["log_prob_sum"].item() for name in ("z", "h", "a"))
        places = oracles.h_index(range(T), 4)
        mean, cov = oracles.posterior(systems[int(z)], a)
        log_p_h_given_za = oracles.log_normal(h.ravel(), mean[places], cov[np.ix_(places, places)])
        log_p_z_given_a = np.log(oracles.mixture_posterior(systems, pi, a)[int(z)])
        log_p_a = dynamics.positions(T).log_prob(torch.tensor(a)).item()
        assert log_p_zha - log_p_h_given_za - log_p_z_given_a == pytest.approx(log_p_a, rel=1e-8)
        seen_components.add(int(z))
    assert seen_components == {0, 1}


@pytest.mark.parametrize("T", [1, 2, 6])
def test_state_path_log_prob_equals_the_dense_gaussian(T):
    dynamics = make_dynamics(state_noise=0.01)
    torch.manual_seed(4)
    path = StatePath(dynamics.lgssm(), T)
    h = path.sample()
    assert h.shape == (2, T, 4)
    places = oracles.h_index(range(T), 4)
    for k, system in enumerate(systems_of(dynamics)):
        mean, cov = oracles.joint_moments(system, T)
        wanted = oracles.log_normal(h[k].numpy().ravel(), mean[places], cov[np.ix_(places, places)])
        assert path.log_prob(h)[k].item() == pytest.approx(wanted, rel=1e-8)


@every_components
def test_sample_moments_of_positions(components):
    dynamics = make_dynamics(position_noise=0.5, components=components)
    T, n, pi = 4, 20_000, pi_of(dynamics)
    torch.manual_seed(5)
    draws = dynamics.positions(T).sample((n,)).flatten(1).numpy()
    places = oracles.a_index(range(T), T, 4, 2)
    moments = [oracles.joint_moments(system, T) for system in systems_of(dynamics)]
    mean = sum(p * m[places] for p, (m, _) in zip(pi, moments))
    second = sum(p * (C[np.ix_(places, places)] + np.outer(m[places], m[places])) for p, (m, C) in zip(pi, moments))
    assert oracles.worst_z_of_mean(draws, mean, second - np.outer(mean, mean)) < 6  # sigma
    products = np.einsum("ni,nj->nij", draws, draws)
    assert (np.abs(products.mean(0) - second) / (products.std(0) / np.sqrt(n))).max() < 6  # sigma


@pytest.mark.parametrize("components", [dense_components, blocks_of_three])
def test_mean_and_variance_of_positions_equal_the_mixtures(components):
    dynamics = make_dynamics(position_noise=0.5, components=components)
    T, pi = 3, pi_of(dynamics)
    p_a = dynamics.positions(T).expand([2])
    places = oracles.a_index(range(T), T, 4, 2)
    moments = [oracles.joint_moments(system, T) for system in systems_of(dynamics)]
    mean = sum(p * m[places] for p, (m, _) in zip(pi, moments))
    variance = sum(p * (np.diag(C)[places] + m[places] ** 2) for p, (m, C) in zip(pi, moments)) - mean**2
    for i in range(2):
        assert oracles.relative_error(p_a.mean[i], mean.reshape(T, 2)) < 1e-8
        assert oracles.relative_error(p_a.variance[i], variance.reshape(T, 2)) < 1e-8


@every_components
def test_expand_mask_and_to_event(components):
    dynamics = make_dynamics(components=components)
    p_a = dynamics.positions(4)
    assert p_a.batch_shape == ()
    assert p_a.event_shape == (4, 2)
    a = draw_positions(dynamics, 4, (3, 2))
    plain = p_a.log_prob(a)
    expanded = p_a.expand([3, 2])
    assert expanded.batch_shape == (3, 2)
    assert expanded.sample((5,)).shape == (5, 3, 2, 4, 2)
    torch.testing.assert_close(expanded.log_prob(a), plain, rtol=1e-12, atol=0)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    masked = expanded.mask(mask)
    torch.testing.assert_close(masked.log_prob(a), plain * mask, rtol=1e-12, atol=0)
    torch.testing.assert_close(masked.to_event(1).log_prob(a), (plain * mask).sum(-1), rtol=1e-12, atol=0)


@every_components
def test_positions_in_plates(components):
    p_a = make_dynamics(components=components).positions(4)

    def program():
        with pyro.plate("sequences", 3, dim=-2), pyro.plate("objects", 2, dim=-1):
            return pyro.sample("a", p_a)

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["a"]["value"].shape == (3, 2, 4, 2)
    assert trace.nodes["a"]["log_prob"].shape == (3, 2)


@every_components
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("n_frames", [1, 4])
def test_predictive_of_the_prior_has_a_dimension_of_samples_in_front(components, parallel, n_frames):
    S, n_objects = 4, torch.tensor([1, 3, 2])
    model = small_model(make_dynamics(components=components))
    samples = Predictive(model, num_samples=S, parallel=parallel)(None, n_objects, n_frames)
    assert samples["a"].shape == (S, 3, 3, n_frames, 2)
    assert samples["v"].shape == (S, 3, n_frames, 5, 5)
    assert len(samples["a"].flatten().unique()) == samples["a"].numel()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_the_joint_prior_has_a_dimension_of_samples_in_front(parallel):
    model = small_model(make_dynamics())
    samples = Predictive(model.joint, num_samples=4, parallel=parallel)(None, torch.tensor([1, 2]), 3)
    shapes = {name: tuple(value.shape) for name, value in samples.items() if name in "zhav"}
    assert shapes == {"z": (4, 2, 2), "h": (4, 2, 2, 3, 4), "a": (4, 2, 2, 3, 2), "v": (4, 2, 3, 5, 5)}


def test_select_component_picks_the_starts():
    lgssm = make_dynamics(K=3).lgssm()
    k = torch.tensor([[2, 0], [1, 1]])
    picked = select_component(lgssm, k)
    assert picked.mu.shape == (2, 2, 4)
    assert picked.Sigma.shape == (2, 2, 4, 4)
    assert torch.equal(picked.mu[0, 0], lgssm.mu[2])
    assert torch.equal(picked.Sigma[0, 1], lgssm.Sigma[0])
    assert torch.equal(picked.A, lgssm.A)


def test_position_noise_never_falls_below_its_floor():
    dynamics = Dynamics(DynamicsConfig(position_noise_floor=1e-4))
    with torch.no_grad():
        dynamics.root_Sigma_A.copy_(-100 * torch.eye(2))
    torch.testing.assert_close(dynamics.lgssm().Sigma_A, 1e-4 * torch.eye(2).double())
    assert torch.isfinite(dynamics.positions(10).log_prob(torch.zeros(10, 2)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_components": 0},
        {"delta": 0.0},
        {"delta": float("nan")},
        {"state_noise": 0.0},
        {"state_noise": -1e-3},
        {"start_variance": 0.0},
        {"position_noise_floor": 0.0},
        {"position_noise": 1e-6},
        {"position_noise": float("nan")},
    ],
    ids=str,
)
def test_config_errors_name_the_value(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}; wanted"):
        DynamicsConfig(**wrong)


def test_two_models_in_one_process_stay_apart():
    data = simulate(CannonballConfig(n_frames=3, height=8, width=8, radius=1.0), 4, seed=0)

    def build():
        torch.manual_seed(7)
        return PixelModel(Dynamics(), Renderer(8, 8, 6)), RecurrentGuide(InferenceRNN(8, 8, 6))

    (trained, guide), (other, other_guide) = build(), build()
    before = {name: p.detach().clone() for m in (other, other_guide) for name, p in m.named_parameters()}
    a = draw_positions(other.dynamics, 3)
    log_prob = other.dynamics.positions(3).log_prob(a).detach()
    fit(trained, guide, data, Schedule(steps=2, batch_size=4, learn_from={}), progress=False)
    assert not torch.equal(trained.dynamics.mu, other.dynamics.mu)
    assert not torch.equal(trained.dynamics.positions(3).log_prob(a), log_prob)
    for module in (other, other_guide):
        for name, p in module.named_parameters():
            assert torch.equal(p, before[name]), name
    assert torch.equal(other.dynamics.positions(3).log_prob(a), log_prob)
    assert len(pyro.get_param_store()) == 0


def test_mixture_distribution_is_a_pyro_mixture():
    p_a = make_dynamics(K=3).positions(2)
    assert isinstance(p_a, dist.MixtureSameFamily)
    torch.testing.assert_close(p_a.mixture_distribution.probs, make_dynamics(K=3).pi.double(), rtol=1e-6, atol=0)
