import oracles
import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.joint import JointGuide, StatePosterior
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.lgssm.distributions import StatePath
from pyro_pixels.lgssm.dynamics import select_component
from pyro_pixels.lgssm.kalman import LGSSM
from pyro_pixels.queries.predict import smooth


class Certain(Guide):
    """q(a | v) is a point, the same for every sequence's images."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def encode(self, images, n_objects):
        return dist.Normal(self.a, 1e-9).to_event(2)


def structured(model):
    torch.manual_seed(3)
    return StructuredGuide(model.dynamics, InferenceRNN(12, 12, 8))


GUIDES = {"recurrent": lambda model: make_guide(), "structured": structured}


@pytest.mark.parametrize("T", [1, 5])
def test_state_posterior_is_the_conditional_of_the_joint_gaussian(T):
    system = oracles.random_system(0)
    lgssm = LGSSM(*(torch.from_numpy(x) for x in system))
    a = torch.randn(T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, cov = oracles.condition(
        *oracles.joint_moments(system, T), oracles.a_index(range(T), T, 4, 2), a.flatten().numpy()
    )
    mean, cov = mean[: 4 * T], cov[: 4 * T, : 4 * T]
    q_h = StatePosterior(lgssm, a)
    torch.manual_seed(0)
    h = q_h.sample((4_000,))
    for drawn in h[:5]:
        wanted = oracles.log_normal(drawn.flatten().numpy(), mean, cov)
        assert q_h.log_prob(drawn).item() == pytest.approx(wanted, rel=1e-9)
    flat = h.flatten(1).numpy()
    assert oracles.worst_z_of_mean(flat, mean, cov) < 5.5  # sigma
    assert oracles.worst_z_of_covariance(flat, mean, cov) < 5.5  # sigma


def test_state_posterior_broadcasts_and_expands():
    model = make_model()
    z = torch.tensor([[0, 1, 1], [1, 0, 0]])
    a = torch.randn(4, 1, 3, 6, 2)
    lgssm = select_component(model.dynamics.lgssm(), z)
    q_h = StatePosterior(lgssm, a)
    h = q_h.sample()
    assert h.shape == (4, 2, 3, 6, 4)
    log_q = q_h.log_prob(h)
    alone = StatePosterior(lgssm._replace(mu=lgssm.mu[1, 2], Sigma=lgssm.Sigma[1, 2]), a[3, 0, 2])
    assert log_q[3, 1, 2].item() == pytest.approx(alone.log_prob(h[3, 1, 2]).item(), rel=1e-10)
    wider = q_h.expand(torch.Size((7, 4, 2, 3)))
    assert wider.sample().shape == (7, 4, 2, 3, 6, 4)
    assert wider.sample().std(0).min() > 0


@pytest.mark.parametrize("name", GUIDES)
def test_given_a_the_densities_of_z_and_h_cancel(small_data, name):
    model = make_model()
    guide = JointGuide(GUIDES[name](model), model.dynamics)
    images, n_objects = small_data.images[:6], small_data.n_objects[:6]
    torch.manual_seed(0)
    q = poutine.trace(guide).get_trace(images, n_objects)
    joint = poutine.trace(poutine.replay(model.joint, trace=q)).get_trace(images, n_objects)
    marginal = poutine.trace(poutine.replay(model, trace=q)).get_trace(images, n_objects)
    for trace in (q, joint, marginal):
        trace.compute_log_prob()
    exact = sum(joint.nodes[s]["log_prob"] for s in "zha") - sum(q.nodes[s]["log_prob"] for s in "zh")
    torch.testing.assert_close(exact, marginal.nodes["a"]["log_prob"], rtol=0, atol=1e-6)
    assert exact.dtype == torch.float64
    assert [site for site in q.stochastic_nodes if len(site) == 1] == ["a", "z", "h"]


def test_absent_objects_do_not_count(small_data):
    model = make_model()
    guide = JointGuide(make_guide(), model.dynamics)
    one, all_ = small_data.n_objects == 1, slice(None)
    torch.manual_seed(0)
    q = poutine.trace(guide).get_trace(small_data.images, small_data.n_objects)

    def log_q(rows, n):
        values = {s: q.nodes[s]["value"][rows, :n] for s in "azh"}
        program = poutine.condition(guide, values)
        trace = poutine.trace(program).get_trace(small_data.images[rows], small_data.n_objects[rows])
        trace.compute_log_prob()
        return sum(trace.nodes[s]["log_prob"] for s in "azh")

    torch.testing.assert_close(log_q(all_, 3)[one], log_q(one, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GUIDES)
def test_the_bound_is_that_of_the_model_without_z_and_h(small_data, name):
    model = make_model()
    guide = GUIDES[name](model)
    torch.manual_seed(5)
    wanted = Trace_ELBO().loss(model, guide, small_data.images, small_data.n_objects)
    torch.manual_seed(5)  # both draw a first
    joint = JointGuide(guide, model.dynamics)
    assert Trace_ELBO().loss(model.joint, joint, small_data.images, small_data.n_objects) == pytest.approx(
        wanted, rel=1e-9
    )


@pytest.mark.parametrize("name", GUIDES)
def test_the_bound_with_enumeration_has_that_mean(small_data, name):
    """``TraceEnum_ELBO`` wants log-probabilities of one type from all sites."""
    model = make_model()
    joint = JointGuide(GUIDES[name](model), model.dynamics)
    args = model.joint, joint, small_data.images, small_data.n_objects
    torch.manual_seed(5)
    wanted = Trace_ELBO().loss(*args)
    torch.manual_seed(5)
    assert TraceEnum_ELBO(max_plate_nesting=1).loss(*args) == pytest.approx(wanted, rel=1e-6)


def test_states_may_be_given_in_float32(small_data):
    model, n_objects = make_model(), small_data.n_objects
    h = torch.randn(len(n_objects), 3, 11, 4)
    densities = []
    for given in (h, h.double()):
        torch.manual_seed(0)  # z is drawn
        trace = poutine.trace(poutine.condition(model.joint, {"h": given})).get_trace(None, n_objects, 11)
        trace.compute_log_prob()
        densities.append(trace.nodes["h"]["log_prob"])
    assert torch.equal(*densities)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_the_posterior_of_z_and_h(parallel):
    model = make_model(delta=0.3, state_noise=0.05, position_noise=0.3, start_spread=0.3)
    torch.manual_seed(1)
    a = model.dynamics.positions(5).sample((2, 2)).float()
    images, n_objects, n = torch.zeros(2, 5, 12, 12), torch.tensor([2, 1]), 2_000 if parallel else 60
    guide = JointGuide(Certain(a), model.dynamics)
    draws = Predictive(model.joint, guide=guide, num_samples=n, parallel=parallel)(images, n_objects)
    assert draws["a"].shape == (n, 2, 2, 5, 2)
    assert draws["h"].shape == (n, 2, 2, 5, 4)
    assert draws["v"].shape == (n, 2, 5, 12, 12)
    states = smooth(model.dynamics, a)
    p = states.p_z[..., 1]
    assert ((p > 0.02) & (p < 0.98)).all()  # or there is nothing to see
    assert ((draws["z"].double().mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()  # sigma
    error = (draws["h"].mean(0) - states.mean).abs()
    assert (error < 5 * (states.cov.diagonal(dim1=-2, dim2=-1) / n).sqrt()).all()  # sigma


def test_a_guide_conditioned_on_positions_answers_for_them(small_data):
    model = make_model()
    images, n_objects = small_data.images[:2], small_data.n_objects[:2]
    a = model.dynamics.positions(11).sample((2, 2))
    given = poutine.condition(JointGuide(make_guide(), model.dynamics), {"a": a})
    torch.manual_seed(0)
    draws = Predictive(given, num_samples=500, parallel=True)(images, n_objects)
    states = smooth(model.dynamics, a)
    error = (draws["h"].mean(0) - states.mean).abs()
    assert (error < 5 * (states.cov.diagonal(dim1=-2, dim2=-1) / 500).sqrt()).all()  # sigma


def test_components_can_be_given_to_the_joint_model():
    model = make_model()
    launched = poutine.condition(model.joint, {"z": torch.ones(2, 3, dtype=torch.long)})
    torch.manual_seed(0)
    h = Predictive(launched, num_samples=500, parallel=True)(None, torch.tensor([3, 3]), 4)["h"][..., 0, :]
    lgssm = model.dynamics.lgssm()
    sigma = (lgssm.Sigma[1].diagonal() / 500).sqrt()
    assert ((h.mean(0) - lgssm.mu[1]).abs() < 5 * sigma).all()


def test_h_is_drawn_from_the_prior_where_the_guide_has_no_z_and_h(small_data):
    """Why `JointGuide` exists: a guide over a alone leaves h to the prior, and it then has nothing to do with a."""
    model, images, n_objects = make_model(), small_data.images[2:3], small_data.n_objects[2:3]
    a = 50 + torch.randn(1, 3, 11, 2)
    for guide, near in {Certain(a): False, JointGuide(Certain(a), model.dynamics): True}.items():
        h = Predictive(model.joint, guide=guide, num_samples=3)(images, n_objects)["h"]
        assert bool(((h[..., :2] - a).abs() < 10).all()) is near


def test_the_guide_takes_no_images_of_another_size(small_data):
    model = make_model()
    with pytest.raises(ValueError, match="this"):
        JointGuide(make_guide(), model.dynamics)(small_data.images[..., 1:], small_data.n_objects)


def test_state_path_and_posterior_agree_when_nothing_is_known():
    """With Sigma_A huge the positions say nothing, and p(h | a) is p(h)."""
    lgssm = select_component(make_model().dynamics.lgssm(), torch.tensor(0))
    blind = lgssm._replace(Sigma_A=1e12 * torch.eye(2, dtype=torch.float64))
    h = StatePath(lgssm, 6).sample()
    log_q = StatePosterior(blind, torch.zeros(6, 2)).log_prob(h)
    assert log_q.item() == pytest.approx(StatePath(lgssm, 6).log_prob(h).item(), abs=1e-6)
