import itertools

import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model

from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.training.distillation import GivenTracks, draw_tracks, log_prob_in_best_order
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule

LESSONS = Schedule(
    steps=60, batch_size=12, learning_rate=1e-2, learn_from={"model": 60}, anneal_from=60, evaluate_every=1
)


def some_q(n_objects, T=4):
    shape = (len(n_objects), int(n_objects.max()), T, 2)
    return dist.Normal(torch.randn(shape), torch.rand(shape) + 0.1).to_event(2)


def test_the_best_order_is_the_best_of_all():
    torch.manual_seed(0)
    n_objects = torch.tensor([3, 1, 2, 3, 2, 1])
    q = some_q(n_objects)
    a = torch.randn(6, 3, 4, 2)
    for b, n in enumerate(n_objects.tolist()):
        orders = [[*order, *range(n, 3)] for order in itertools.permutations(range(n))]
        wanted = max(float(q.log_prob(a[:, order])[b, :n].sum()) for order in orders)
        assert float(log_prob_in_best_order(q, a, n_objects)[b]) == pytest.approx(wanted, rel=1e-5)


def test_the_order_of_the_tracks_does_not_matter_and_absent_objects_do_not():
    torch.manual_seed(1)
    n_objects = torch.tensor([3, 3, 2])
    q, a = some_q(n_objects), torch.randn(3, 3, 4, 2)
    wanted = log_prob_in_best_order(q, a, n_objects)
    other = torch.stack([a[0, [2, 0, 1]], a[1, [1, 0, 2]], a[2, [1, 0, 2]]])
    other[2, 2] = 1e3
    torch.testing.assert_close(log_prob_in_best_order(q, other, n_objects), wanted)


def test_gradients_are_those_of_the_best_order_alone():
    torch.manual_seed(2)
    n_objects = torch.tensor([2, 1])
    mean = torch.randn(2, 2, 4, 2, requires_grad=True)
    a = mean.detach().flip(1) + 0.1 * torch.randn(2, 2, 4, 2)
    a[1] = torch.randn(2, 4, 2)
    log_prob_in_best_order(dist.Normal(mean, 1.0).to_event(2), a, n_objects).sum().backward()
    wanted = a.flip(1) - mean.detach()
    wanted[1] = a[1] - mean.detach()[1]
    wanted[1, 1] = 0.0  # absent
    torch.testing.assert_close(mean.grad, wanted)


def test_too_many_objects_are_refused():
    n_objects = torch.tensor([7])
    with pytest.raises(ValueError, match="at most 6"):
        log_prob_in_best_order(some_q(n_objects), torch.zeros(1, 7, 4, 2), n_objects)


def test_draws_are_those_of_the_guide(small_data):
    model, guide = make_model(), make_guide()
    teacher = StructuredGuide(model.dynamics, guide.rnn)
    drawn = draw_tracks(teacher, small_data, batch_size=5, seed=3)
    assert drawn.shape == (12, 3, 11, 2)
    assert torch.equal(drawn, draw_tracks(teacher, small_data, batch_size=5, seed=3))
    with torch.no_grad():
        q = teacher.q(small_data.images, small_data.n_objects)
        errors = (drawn - q.mean).abs() / q.variance.sqrt()
    present = torch.arange(3) < small_data.n_objects[:, None]
    assert float(errors[present].max()) < 6  # sigma


def test_a_guide_learns_from_tracks_and_the_model_stays(small_data):
    model, guide = make_model(), make_guide()
    tracks = draw_tracks(StructuredGuide(model.dynamics, make_guide(1).rnn), small_data)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def log_q():
        with torch.no_grad():
            q = guide.q(small_data.images, small_data.n_objects)
            return float(log_prob_in_best_order(q, tracks, small_data.n_objects).mean())

    first = log_q()
    result = fit(model, guide, small_data, LESSONS, objective=GivenTracks, tracks=tracks, progress=False)
    assert result.metrics["kl_per_frame"] == pytest.approx(-log_q() / 11, abs=0.3)  # before the last step
    assert log_q() > first + 11  # a nat a frame
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_tracks_are_asked_for(small_data):
    with pytest.raises(ValueError, match="needs tracks"):
        fit(make_model(), make_guide(), small_data, LESSONS, objective=GivenTracks, progress=False)


def test_as_many_tracks_as_sequences(small_data):
    with pytest.raises(ValueError, match="3 tracks for 12 sequences"):
        fit(make_model(), make_guide(), small_data, LESSONS, objective=GivenTracks, tracks=torch.zeros(3, 3, 11, 2))
