"""EM for the mixture over starts: recovery of known mixtures, and agreement with the likelihood it maximises."""

import pytest
import torch

from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig, select_component
from pyro_pixels.training.start_mixture import fit_starts

TRUE_PI = torch.tensor([0.3, 0.7])


def make_dynamics(seed=0, **config):
    torch.manual_seed(seed)
    return Dynamics(DynamicsConfig(**{"delta": 0.2, "state_noise": 1e-5, "position_noise": 1e-3, **config}))


def true_dynamics():
    """Two starts that lie far apart, with full covariances."""
    dynamics = make_dynamics()
    mu = torch.tensor([[-0.5, 0.1, 0.4, -0.2], [0.5, -0.1, -0.4, -0.1]])
    root = 0.1 * torch.eye(4) + 0.03 * torch.randn(2, 4, 4).tril(-1)
    dynamics.set_starts(TRUE_PI.log(), mu, root @ root.mT)
    return dynamics


def draw(dynamics, n, n_frames=12):
    z = torch.multinomial(dynamics.pi.detach(), n, replacement=True)
    with torch.no_grad():
        return kalman.sample(select_component(dynamics.lgssm(), z), n_frames)[1], z


def test_set_starts_sets_what_it_says():
    dynamics = make_dynamics()
    root = torch.randn(2, 4, 4)
    Sigma, mu = root @ root.mT + torch.eye(4), torch.randn(2, 4)
    dynamics.set_starts(TRUE_PI.log(), mu, Sigma)
    lgssm = dynamics.lgssm()
    torch.testing.assert_close(lgssm.Sigma.float(), Sigma)
    torch.testing.assert_close(lgssm.mu.float(), mu)
    torch.testing.assert_close(dynamics.pi, TRUE_PI)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mixture_is_recovered(seed):
    """4,000 tracks: standard errors are below 0.1 / sqrt(1,200) = 0.003 for mu, 0.008 for pi; bounds are 6 of them."""
    truth = true_dynamics()
    torch.manual_seed(seed)
    a, z = draw(truth, 4_000)
    dynamics = make_dynamics(seed=seed + 10)
    fit_starts(dynamics, a, seed=seed)
    order = dynamics.mu[:, 0].argsort()
    torch.testing.assert_close(dynamics.mu[order], truth.mu, rtol=0, atol=0.02)
    torch.testing.assert_close(dynamics.pi[order], TRUE_PI, rtol=0, atol=0.045)
    fitted, true = dynamics.lgssm().Sigma[order], truth.lgssm().Sigma
    torch.testing.assert_close(fitted, true, rtol=0, atol=6 * 0.02 * (2 / 1_200) ** 0.5)
    told = dynamics.component_posterior(a).logits.argmax(-1)
    assert float((order.argsort()[told] == z).float().mean()) > 0.999


def test_nothing_else_changes_and_the_likelihood_of_the_tracks_rises_to_that_of_the_truth():
    truth = true_dynamics()
    a, _ = draw(truth, 2_000)
    dynamics = make_dynamics(seed=3)
    before = {name: p.detach().clone() for name, p in dynamics.named_parameters()}
    start = dynamics.positions(12).log_prob(a).mean().detach()
    fit_starts(dynamics, a)
    changed = {name for name, p in dynamics.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"log_pi", "mu", "root_Sigma"}
    reached, true = (d.positions(12).log_prob(a).mean().detach() for d in (dynamics, truth))
    assert float(reached) > float(start) + 1
    assert float(reached) > float(true) - 0.002  # maximum likelihood beats the truth but for the floor of the variance


def test_what_it_returns_is_what_tracks_say_of_their_starts():
    """log p(a) = log p(m) + what does not depend on the starts: differences between two mixtures agree."""
    a, _ = draw(true_dynamics(), 500)
    reached, likelihood = [], []
    for K in (1, 2):
        dynamics = make_dynamics(seed=3, n_components=K)
        reached.append(fit_starts(dynamics, a))
        likelihood.append(float(dynamics.positions(12).log_prob(a).mean().detach()))
    assert reached[1] - reached[0] == pytest.approx(likelihood[1] - likelihood[0], abs=1e-4)


def test_the_same_tracks_and_seed_give_the_same_starts():
    a, _ = draw(true_dynamics(), 300)
    one, two = make_dynamics(seed=4), make_dynamics(seed=4)
    assert fit_starts(one, a, seed=5) == fit_starts(two, a, seed=5)
    assert torch.equal(one.root_Sigma, two.root_Sigma)


@pytest.mark.parametrize("shape", [(19, 5, 2), (50, 1, 2), (50, 2)])
def test_too_few_tracks_raise(shape):
    with pytest.raises(ValueError, match=r"wanted \(n >= 20, T >= 2, 2\)"):
        fit_starts(make_dynamics(), torch.zeros(shape))


def test_a_subclass_with_other_starts_is_refused_and_unchanged():
    class Shifted(Dynamics):
        def lgssm(self):
            lgssm = super().lgssm()
            return lgssm._replace(mu=lgssm.mu + 1)

    class Consistent(Shifted):
        def set_starts(self, log_pi, mu, Sigma):
            super().set_starts(log_pi, mu - 1, Sigma)

    a, _ = draw(true_dynamics(), 200)
    shifted, consistent = Shifted(), Consistent()
    before = {name: x.clone() for name, x in shifted.state_dict().items()}
    with pytest.raises(ValueError, match=r"Shifted\.lgssm has other starts than those that set_starts sets"):
        fit_starts(shifted, a)
    assert all(torch.equal(x, before[name]) for name, x in shifted.state_dict().items())
    plain = Dynamics()
    assert fit_starts(consistent, a) == pytest.approx(fit_starts(plain, a))
    torch.testing.assert_close(consistent.lgssm().mu, plain.lgssm().mu, rtol=0, atol=1e-5)
