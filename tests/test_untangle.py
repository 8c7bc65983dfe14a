import itertools

import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model

from pyro_pixels._batch import object_mask
from pyro_pixels.guides import InferenceRNN, RecurrentGuide
from pyro_pixels.guides.untangled import UntangledGuide
from pyro_pixels.guides.untangling import _Moves, renamed, resample_labels, untangle
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.queries.predict import infer


def make_dynamics(position_noise=2e-3):
    torch.manual_seed(3)
    dynamics = Dynamics(
        DynamicsConfig(
            delta=0.2, state_noise=1e-6, position_noise=position_noise, start_spread=0.3, start_velocity_spread=0.3,
            start_variance=0.1,
        )
    )  # fmt: skip
    with torch.no_grad():
        dynamics.u.copy_(torch.tensor([0.0, 0.0, 0.01, -0.03]))
        dynamics.log_pi.copy_(torch.tensor([0.3, -0.4]))
    return dynamics


def tiny_model():
    dynamics = make_dynamics(0.02)
    return PixelModel(dynamics, Renderer(8, 8, 8))


def log_p(dynamics, a, n_objects):
    present = object_mask(n_objects, a.shape[1])
    return torch.where(present, dynamics.positions(a.shape[2]).log_prob(a.double()), 0.0).sum(1).detach()


def all_labellings(N, T):
    """(N!^T, N, T), the first object's name in the first frame included."""
    orders = list(itertools.permutations(range(N)))
    return torch.stack([torch.tensor(chosen).T for chosen in itertools.product(orders, repeat=T)])


def test_gains_are_the_changes_of_log_p():
    torch.manual_seed(0)
    dynamics, n_objects, T = make_dynamics(), torch.tensor([3, 2, 1]), 4
    a = 0.3 * torch.randn(3, 3, T, 2)
    gains = _Moves(dynamics, n_objects, 3, T, True, 0.0).gains(a).detach()
    before = log_p(dynamics, a, n_objects)
    pairs = list(itertools.combinations(range(3), 2))
    for b, (q, (i, j)), s, e in itertools.product(range(3), enumerate(pairs), range(T), range(T)):
        if s > e or (s, e) == (0, T - 1) or j >= n_objects[b]:
            assert gains[b, q, s, e] == -torch.inf
            continue
        changed = a[b : b + 1].clone()
        changed[0, i, s : e + 1], changed[0, j, s : e + 1] = a[b, j, s : e + 1], a[b, i, s : e + 1]
        wanted = log_p(dynamics, changed, n_objects[b : b + 1]) - before[b]
        assert float(gains[b, q, s, e]) == pytest.approx(float(wanted), abs=1e-8)


def test_tails_alone():
    gains = _Moves(make_dynamics(), torch.tensor([2]), 2, 5, False, 0.0).gains(torch.randn(1, 2, 5, 2))
    assert gains.isfinite().nonzero()[:, 2:].tolist() == [[s, 4] for s in range(1, 5)]


def test_no_labelling_is_likelier_where_objects_stay_apart():
    """Against all 2^5 and all 6^3 labellings of tracks that were tangled."""
    for N, T in ((2, 5), (3, 3)):
        torch.manual_seed(N)
        dynamics, B = make_dynamics(1e-4), 8
        a = dynamics.positions(T).sample(torch.Size((B, N))).float()
        labellings = all_labellings(N, T)
        tangled = renamed(a, labellings[torch.randint(len(labellings), (B,))])
        found = untangle(dynamics, tangled, torch.full((B,), N))
        every = torch.stack(
            [log_p(dynamics, renamed(tangled, x.expand(B, N, T)), torch.full((B,), N)) for x in labellings]
        )
        reached = log_p(dynamics, found.a, torch.full((B,), N))
        assert bool((reached <= every.amax(0) + 1e-8).all())
        assert int((reached >= every.amax(0) - 1e-6).sum()) >= B - 1  # greedy: a local optimum at worst
        torch.testing.assert_close(reached - log_p(dynamics, tangled, torch.full((B,), N)), found.gain)


def test_swapped_tracks_are_mended_and_good_ones_left_alone():
    torch.manual_seed(1)
    dynamics, B, N, T = make_dynamics(1e-4), 20, 3, 30
    a = dynamics.positions(T).sample(torch.Size((B, N))).float()
    n_objects = torch.full((B,), N)
    kept = untangle(dynamics, a, n_objects).a
    tangled = a.clone()
    tangled[:, 0, 12:], tangled[:, 1, 12:] = a[:, 1, 12:], a[:, 0, 12:]
    tangled[:, 1, 20:], tangled[:, 2, 20:] = tangled[:, 2, 20:].clone(), tangled[:, 1, 20:].clone()
    found = untangle(dynamics, tangled, n_objects)
    # Which objects change their names, the first ten frames or the last, is the same to p(a).
    orders = [found.a[:, list(order)] for order in itertools.permutations(range(N))]
    right = torch.stack([(x - kept).abs().amax((1, 2, 3)) < 1e-6 for x in orders]).any(0)
    assert int(right.sum()) >= B - 1
    assert float((kept != a).any(-1).float().mean()) < 0.05  # where objects meet
    torch.testing.assert_close(found.rename(tangled), found.a)


def test_most_frames_keep_their_names():
    torch.manual_seed(1)
    dynamics, B, N, T = make_dynamics(1e-4), 20, 2, 20
    a = untangle(dynamics, dynamics.positions(T).sample(torch.Size((B, N))).float(), torch.full((B,), N)).a
    for t in (4, 16):
        tangled = torch.cat([a[:, :, :t], a.flip(1)[:, :, t:]], 2)
        labels = untangle(dynamics, tangled, torch.full((B,), N)).labels
        assert float((labels != torch.arange(N)[:, None]).double().mean()) <= 0.2 + 0.05


def test_moves_are_proposed_where_every_one_of_them_costs_thousands_of_nats():
    torch.manual_seed(2)
    dynamics = make_dynamics(2e-6)
    a = dynamics.positions(10).sample(torch.Size((4, 2))).float()
    a[:, 1] += 5.0
    moved = resample_labels(PixelModel(dynamics, Renderer(8, 8, 8)), a, torch.full((4,), 2))
    assert bool((moved.labels == torch.arange(2)[:, None]).all())


def test_absent_objects_and_single_ones_stay():
    torch.manual_seed(2)
    a, n_objects = torch.randn(3, 3, 6, 2), torch.tensor([1, 2, 1])
    a[0, 1:] = torch.nan
    found = untangle(make_dynamics(), a, n_objects)
    assert found.labels[0].tolist() == torch.arange(3)[:, None].expand(3, 6).tolist()
    assert found.labels[1, 2].tolist() == [2] * 6
    torch.testing.assert_close(found.a[0, 0], a[0, 0])
    model = make_model()
    moved = resample_labels(model, a.nan_to_num(), n_objects)
    assert bool((moved.labels[:, 2] == 2).all())
    assert bool((moved.labels[[0, 2]] == torch.arange(3)[:, None]).all())


@pytest.mark.parametrize("seen", [False, True])
def test_moves_leave_the_target_what_it_is(seen):
    """Chains that start at draws from p, over all 8 labellings of two tracks of 3 frames, are there after 3 moves."""
    torch.manual_seed(4)
    model = tiny_model()
    N, T, chains = 2, 3, 20_000
    a = 0.15 * torch.randn(1, N, T, 2)
    labellings = all_labellings(N, T)
    every = renamed(a.expand(8, N, T, 2), labellings)
    n_objects = torch.full((8,), N)
    images = torch.bernoulli(torch.full((1, T, 8, 8), 0.3))
    target = log_p(model.dynamics, every, n_objects)
    if seen:
        logits = model.renderer(every, object_mask(n_objects, N))
        target = target + model.likelihood(logits).log_prob(images.expand(8, T, 8, 8))
    p = target.detach().softmax(0)
    start = torch.multinomial(p, chains, replacement=True)
    moved = resample_labels(
        model, every[start], torch.full((chains,), N), images.expand(chains, T, 8, 8) if seen else None, n_moves=3
    )
    end = renamed(labellings[start], moved.labels)
    counts = (end[:, None] == labellings).all((2, 3)).double().sum(0)
    deviation = (counts - chains * p) / (chains * p * (1 - p)).sqrt()
    assert float(deviation.abs().max()) < 4.0  # standard deviations, of 8
    assert float((end != labellings[start]).any(2).any(1).float().mean()) > 0.1  # they do move


def test_a_chain_finds_the_target_from_one_point():
    torch.manual_seed(5)
    model = tiny_model()
    a, labellings, chains = 0.1 * torch.randn(1, 2, 3, 2), all_labellings(2, 3), 5_000
    p = log_p(model.dynamics, renamed(a.expand(8, 2, 3, 2), labellings), torch.full((8,), 2)).softmax(0)
    moved = resample_labels(model, a.expand(chains, 2, 3, 2), torch.full((chains,), 2), n_moves=30)
    # Exchanging all frames is no move, and windows reach every labelling.
    counts = (moved.labels[:, None] == labellings).all((2, 3)).double().sum(0)
    assert float(((counts - chains * p) / (chains * p * (1 - p)).sqrt()).abs().max()) < 4.0


def test_an_untangled_guide_is_a_guide():
    torch.manual_seed(6)
    model, guide = tiny_model(), RecurrentGuide(InferenceRNN(8, 8, 16))
    images, n_objects = torch.bernoulli(torch.full((4, 6, 8, 8), 0.2)), torch.tensor([3, 2, 1, 3])
    untangled = UntangledGuide(guide, model.dynamics)
    plain, other = infer(guide, images, n_objects), infer(untangled, images, n_objects)
    found = untangle(model.dynamics, plain.mean, n_objects)
    torch.testing.assert_close(other.mean, found.a)
    torch.testing.assert_close(other.std, found.rename(plain.std))
    assert [name for name, _ in untangled.named_parameters()] == [
        f"guide.{name}" for name, _ in guide.named_parameters()
    ]
    q, q_other = guide.q(images, n_objects), untangled.q(images, n_objects)
    a = q.sample()
    torch.testing.assert_close(
        torch.where(object_mask(n_objects, 3), q_other.log_prob(renamed(a, found.labels)), 0.0).sum(1),
        torch.where(object_mask(n_objects, 3), q.log_prob(a), 0.0).sum(1),
    )  # the same draws, renamed


def test_what_cannot_be_untangled_is_refused():
    with pytest.raises(ValueError, match="wanted \\(B, N, T, 2\\)"):
        untangle(make_dynamics(), torch.zeros(2, 3, 2), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="contains 3, but the tracks have only 2"):
        untangle(make_dynamics(), torch.zeros(1, 2, 4, 2), torch.tensor([3]))

    class Correlated(type(make_guide())):
        def encode(self, images, n_objects):
            q_a = super().encode(images, n_objects)
            return dist.Independent(dist.StudentT(3.0, q_a.base_dist.loc, q_a.base_dist.scale), 2)

    guide = Correlated(make_guide().rnn)
    model = make_model()
    images = torch.zeros(1, 5, model.renderer.height, model.renderer.width)
    with pytest.raises(ValueError, match="cannot be exchanged"):
        UntangledGuide(guide, model.dynamics).q(images, torch.tensor([2]))
