"""The guide with the dynamics inside: exactly the posterior of a linear-Gaussian measurement."""

import itertools

import pyro
import pytest
import torch
from conftest import SMALL, make_model
from pyro.infer import Predictive
from torch.autograd import gradcheck

from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.long_tracks import FilteredTracks
from pyro_pixels.guides.structured import UNSEEN, ConditionedTracks, StructuredGuide, factor_sum, solve_sum
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig, select_component
from pyro_pixels.lgssm.marginal import marginal_moments
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule


@pytest.fixture
def dynamics():
    torch.manual_seed(1)
    dynamics = Dynamics(DynamicsConfig(delta=0.3, state_noise=1e-2, position_noise=0.1, n_components=3)).double()
    with torch.no_grad():
        dynamics.u.normal_()
        dynamics.log_pi.normal_()
    return dynamics


@pytest.fixture
def measured(dynamics):
    """Measurements y of 4 tracks, their variances R, and q(a) = p(a | y)."""
    torch.manual_seed(2)
    y, R = torch.randn(4, 5, 2, dtype=torch.float64), torch.rand(4, 5, 2, dtype=torch.float64) + 0.1
    return y, R, ConditionedTracks(dynamics, y, R)


def test_it_is_bayes_rule(dynamics, measured):
    """log q(a) = log p(a) + log p(y | a) - log p(y), with log p(y) from a Kalman filter with noise Sigma_A + R."""
    y, R, q = measured
    a = torch.randn(7, 4, 5, 2, dtype=torch.float64)
    joint = dynamics.positions(5).log_prob(a) + torch.distributions.Normal(a, R.sqrt()).log_prob(y).sum((-2, -1))
    R_constant = torch.full_like(R, 0.3)
    noisier = dynamics.lgssm()._replace(Sigma_A=dynamics.lgssm().Sigma_A + 0.3 * torch.eye(2, dtype=torch.float64))
    by_filter = (kalman.log_likelihood(noisier, y.unsqueeze(-3)) + dynamics.pi.log()).logsumexp(-1)
    torch.testing.assert_close(ConditionedTracks(dynamics, y, R_constant).log_evidence, by_filter, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.log_prob(a), joint - q.log_evidence, rtol=1e-9, atol=1e-9)


def test_moments_and_samples_agree(measured):
    """Means and variances of 40,000 draws are the closed-form ones within 6 standard errors."""
    _, _, q = measured
    torch.manual_seed(3)
    n = 40_000
    draws = q.sample((n,))
    standard_error = (q.variance / n).sqrt()
    assert ((draws.mean(0) - q.mean).abs() < 6 * standard_error).all()
    fourth = (draws - q.mean).pow(4).mean(0)
    assert ((draws.var(0) - q.variance).abs() < 6 * ((fourth - q.variance**2) / n).sqrt()).all()


def test_moments_by_brute_force(dynamics, measured):
    """Mean and variance of the mixture from dense Gaussian conditioning, component by component."""
    y, R, q = measured
    m, C = marginal_moments(dynamics.lgssm(), 5)
    first, second = torch.zeros(4, 10, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
    for b, k in itertools.product(range(4), range(3)):
        gain = C[k] @ torch.linalg.inv(C[k] + torch.diag(R[b].flatten()))
        mean = m[k] + gain @ (y[b].flatten() - m[k])
        w = q.component.probs[b, k]
        first[b] += w * mean
        second[b] += w * ((C[k] - gain @ C[k]).diagonal() + mean**2)
    torch.testing.assert_close(q.mean.flatten(-2), first, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(q.variance.flatten(-2), second - first**2, rtol=1e-7, atol=1e-10)


def test_the_bound_is_tight_where_the_images_are_linear(dynamics):
    """If y is what is observed and R its true noise, log p(y, a) - log q(a) is log p(y) for every draw."""
    torch.manual_seed(4)
    y, R = torch.randn(3, 6, 2, dtype=torch.float64), torch.full((3, 6, 2), 0.2, dtype=torch.float64)
    q = ConditionedTracks(dynamics, y, R)
    a = q.rsample((5,))
    log_joint = dynamics.positions(6).log_prob(a) + torch.distributions.Normal(a, R.sqrt()).log_prob(y).sum((-2, -1))
    torch.testing.assert_close(log_joint - q.log_prob(a), q.log_evidence.expand(5, 3), rtol=1e-9, atol=1e-9)


def test_unseen_frames_are_integrated_out(small_data):
    """q of the seen frames alone is what a Kalman smoother gives that measures y with noise R and misses the others."""
    model = make_model(position_noise=0.2, state_noise=0.02, delta=0.3)
    guide = structured(model)
    images, n_objects = small_data.images.float(), small_data.n_objects
    observed = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0]).bool()
    q, p_z = guide.encode_observed(images, n_objects, observed)
    y, R = (
        guide.head(guide.rnn(images, n_objects), images, n_objects)[0].double(),
        float(guide.head.to_log_sigma.bias[0].exp()) ** 2,
    )
    lgssm = model.dynamics.lgssm()
    # a is h's position with its own noise Sigma_A, measured with noise R; R is the same everywhere but for 1e-3 weights
    noisy = lgssm._replace(Sigma_A=lgssm.Sigma_A + R * torch.eye(2))
    log_z = kalman.log_likelihood(noisy, y.unsqueeze(-3), observed) + model.dynamics.pi.log()
    hidden = kalman.rts_smoother(noisy, y.unsqueeze(-3), observed)
    mean = (log_z.softmax(-1)[..., None, None] * hidden.mean[..., :2]).sum(-3)
    torch.testing.assert_close(q.mean[:, :, ~observed], mean[:, :, ~observed], rtol=0.02, atol=0.02)
    torch.testing.assert_close(p_z.probs, log_z.softmax(-1), rtol=0.05, atol=0.02)
    other = images.clone()
    other[:, 8:] = 1 - other[:, 8:]
    again, _ = guide.encode_observed(other, n_objects, observed)
    torch.testing.assert_close(again.mean, q.mean, rtol=1e-6, atol=1e-6)


def test_covariances_of_frames_by_sampling(measured):
    """Covariance of the two coordinates of each frame, 40,000 draws, 6 standard errors."""
    _, _, q = measured
    torch.manual_seed(6)
    n = 40_000
    centred = q.sample((n,)) - q.mean
    product = centred[..., 0] * centred[..., 1]
    assert ((product.mean(0) - q.frame_covariance[..., 0, 1]).abs() < 6 * product.std(0) / n**0.5).all()


def test_gradients_of_the_solver():
    torch.manual_seed(5)
    root = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    R = (torch.rand(2, 4, 3, dtype=torch.float64) + 0.1).requires_grad_()
    b = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)

    def solved(root, R, b):
        C = root @ root.mT
        return solve_sum(C, R, b, factor_sum(C, R))

    assert gradcheck(solved, (root, R, b))


def test_gradient_of_the_log_evidence_is_that_of_autograd(dynamics, measured):
    y, R, _ = measured
    R = R.clone().requires_grad_()
    m, C = marginal_moments(dynamics.lgssm(), 5)
    by_torch = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=dynamics.log_pi),
        torch.distributions.MultivariateNormal(m, C + torch.diag_embed(R.flatten(-2)).unsqueeze(-3)),
    ).log_prob(y.flatten(-2))
    parameters = [R, *dynamics.parameters()]
    wanted = torch.autograd.grad(by_torch.sum(), parameters, allow_unused=True)
    found = torch.autograd.grad(ConditionedTracks(dynamics, y, R).log_evidence.sum(), parameters, allow_unused=True)
    for x, y_ in zip(found, wanted):
        torch.testing.assert_close(x, y_, rtol=1e-8, atol=1e-9)


def test_a_single_track_has_the_gradients_of_a_batch(dynamics, measured):
    y, R, _ = measured
    gradients = []
    for shape in ((), (1,), (1, 1)):
        given = [x[0].expand(*shape, 5, 2).clone().requires_grad_() for x in (y, R)]
        q = ConditionedTracks(dynamics, *given)
        torch.manual_seed(7)
        total = q.log_evidence.sum() + q.rsample((3,)).cos().sum() + q.variance.sum()
        found = torch.autograd.grad(total, [*given, *dynamics.parameters()], allow_unused=True)
        gradients.append([x.flatten() for x in found if x is not None])
    for actual, wanted in zip(gradients[0] + gradients[1], 2 * gradients[2], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


def test_gradients_of_the_moments(dynamics, measured):
    y, R, _ = measured

    def moments(y, R):
        q = ConditionedTracks(dynamics, y, R)
        return q.mean, q.frame_covariance

    assert gradcheck(moments, [x.clone().requires_grad_() for x in (y, R)])


class CertainVelocities(Dynamics):
    """Sigma_k is singular: the velocities of h_1 are known."""

    def _lgssm(self):
        lgssm, kept = super()._lgssm(), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        return lgssm._replace(Sigma=lgssm.Sigma * kept.outer(kept))


@pytest.mark.parametrize("kind", [Dynamics, CertainVelocities])
def test_nearly_singular_starts(kind):
    """The evidence is the Kalman filter's, and its gradient finite."""
    torch.manual_seed(0)
    dynamics = kind(DynamicsConfig(n_components=2, position_noise=0.1, state_noise=0.01))
    with torch.no_grad():
        dynamics.root_Sigma[:, 2, 0], dynamics.root_Sigma[:, 3, 1] = 3.3, -3.3
        for i in (2, 3):
            dynamics.root_Sigma[:, i, i] = -20.7  # a standard deviation of 1e-9
    y, R = torch.randn(4, 6, 2, dtype=torch.float64), torch.full((4, 6, 2), 0.3, dtype=torch.float64)
    lgssm = dynamics.lgssm()
    noisier = lgssm._replace(Sigma_A=lgssm.Sigma_A + 0.3 * torch.eye(2, dtype=torch.float64))
    by_filter = (kalman.log_likelihood(noisier, y.unsqueeze(-3)) + dynamics.pi.log()).logsumexp(-1)
    q = ConditionedTracks(dynamics, y, R)
    torch.testing.assert_close(q.log_evidence, by_filter, rtol=1e-8, atol=1e-8)
    gradients = torch.autograd.grad((q.log_evidence + q.rsample().sum((-2, -1))).sum(), list(dynamics.parameters()))
    assert all(x.isfinite().all() for x in gradients)


class Damped(Dynamics):
    """Velocities decay, so A^j is not I + j N."""

    def lgssm(self):
        lgssm = super().lgssm()
        return lgssm._replace(A=lgssm.A @ torch.tensor([1.0, 1.0, 0.8, 0.8], dtype=torch.float64).diag())


class WideStarts(Dynamics):
    def lgssm(self):
        lgssm = super().lgssm()
        return lgssm._replace(Sigma=4 * lgssm.Sigma)


@pytest.mark.parametrize("kind", [Damped, WideStarts])
def test_dynamics_with_another_lgssm_have_the_filters_evidence(kind):
    torch.manual_seed(0)
    dynamics = kind(DynamicsConfig(position_noise=0.1, state_noise=0.01))
    y, R = torch.randn(4, 6, 2, dtype=torch.float64), torch.full((4, 6, 2), 0.3, dtype=torch.float64)

    def by_filter(lgssm):
        return (kalman.log_likelihood(lgssm, y.unsqueeze(-3)) + dynamics.pi.log()).logsumexp(-1)

    lgssm = dynamics.lgssm()
    noisier = lgssm._replace(Sigma_A=lgssm.Sigma_A + 0.3 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(dynamics.positions(6).log_prob(y), by_filter(lgssm))
    torch.testing.assert_close(ConditionedTracks(dynamics, y, R).log_evidence, by_filter(noisier))
    torch.testing.assert_close(FilteredTracks(dynamics, y, R).log_evidence, by_filter(noisier))


def test_unseen_frames_say_nothing_however_far_away():
    """Under gravity an object is 4,000 units away after 2,000 frames; the forecast there is the filter's."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(n_components=1, delta=0.2, position_noise=0.01, state_noise=1e-6))
    with torch.no_grad():
        dynamics.u[3] = 0.01
    y, R = torch.randn(1, 2_000, 2, dtype=torch.float64), torch.full((1, 2_000, 2), 0.01, dtype=torch.float64)
    R[:, 5:] = UNSEEN
    lgssm = select_component(dynamics.lgssm(), torch.tensor([0]))
    seen = torch.arange(2_000) < 5
    noisier = lgssm._replace(Sigma_A=lgssm.Sigma_A + 0.01 * torch.eye(2, dtype=torch.float64))
    wanted = kalman.rts_smoother(noisier, y, seen).mean[:, -1] @ lgssm.B.mT
    assert float(wanted.norm()) > 1_000
    torch.testing.assert_close(FilteredTracks(dynamics, y, R).mean[:, -1], wanted, rtol=1e-6, atol=0)


def structured(model):
    rnn = InferenceRNN(SMALL.height, SMALL.width, 8)
    return StructuredGuide(model.dynamics, rnn, AttentionHead(SMALL.height, SMALL.width, 8))


def test_it_trains_and_answers_like_any_guide(small_data):
    model = make_model()
    guide = structured(model)
    fit(model, guide, small_data, Schedule(steps=2, batch_size=4, learn_from={}), progress=False)
    posterior = Predictive(pyro.poutine.uncondition(model), guide=guide, num_samples=3, parallel=True)
    draws = posterior(small_data.images[:3].float(), small_data.n_objects[:3])
    assert draws["a"].shape == (3, 3, 3, 11, 2)
    assert draws["v"].shape == (3, 3, 11, 12, 12)


def test_kl_is_not_negative(small_data):
    """The KL of a normalised q is at least 0; its one-sample estimate averages above -6 standard errors."""
    model = make_model()
    elbo = AnnealedELBO()
    loss, kl = elbo(model, structured(model)), []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(50):
            loss(small_data.images.float(), small_data.n_objects)
            kl.append(elbo.terms.kl)
    kl = torch.stack(kl)
    assert (kl.mean(0) > -6 * kl.std(0) / 50**0.5).all()
