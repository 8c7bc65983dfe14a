from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from conftest import make_guide, make_model
from test_untangle import make_dynamics

from pyro_pixels.guides import Guide
from pyro_pixels.guides.untangling import untangle
from pyro_pixels.model import PixelModel, Renderer
from pyro_pixels.training import AnnealedELBO, Schedule, fit
from pyro_pixels.training.distillation import log_prob_in_best_order
from pyro_pixels.training.own_tracks import OwnTracks, share_of_renamed


class Table(Guide):
    """Means of some sequences, whatever the images."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = torch.nn.Parameter(mean), std

    def encode(self, images, n_objects):
        return dist.Normal(self.mean, self.std).to_event(2)


def gradients(objective, model, guide, images, n_objects, seed=0):
    torch.manual_seed(seed)
    for p in [*model.parameters(), *guide.parameters()]:
        p.grad = None
    loss = objective(model, guide)(images, n_objects)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for part in (model, guide) for name, p in part.named_parameters() if p.grad is not None
    }


def test_the_lesson_is_added_to_the_bound_and_moves_q_alone(small_data):
    model, guide = make_model(), make_guide()
    part = small_data[small_data.n_objects > 1][:6]
    images, n_objects = part.images.float(), part.n_objects
    plain, plain_grad = gradients(AnnealedELBO(), model, guide, images, n_objects)
    both, both_grad = gradients(OwnTracks(2.0), model, guide, images, n_objects)
    torch.manual_seed(0)
    q_a = guide.q(images, n_objects)
    a = q_a.rsample()  # what the bound drew
    lesson = -log_prob_in_best_order(q_a, untangle(model.dynamics, a, n_objects, most=6).a.detach(), n_objects).sum()
    torch.testing.assert_close((both - plain).double(), 2.0 * lesson.detach().double(), rtol=1e-4, atol=1e-3)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(both_grad[name], plain_grad[name])
    assert any(not torch.equal(both_grad[name], plain_grad[name]) for name, _ in guide.named_parameters())


def test_single_objects_and_weight_0_leave_the_bound(small_data):
    model, guide = make_model(), make_guide()
    alone = small_data[small_data.n_objects == 1]
    images = alone.images.float()
    for objective, part in ((OwnTracks(1.0), alone), (OwnTracks(0.0), small_data)):
        images = part.images.float()
        plain, _ = gradients(AnnealedELBO(), model, guide, images, part.n_objects)
        assert float(gradients(objective, model, guide, images, part.n_objects)[0]) == float(plain)
    with pytest.raises(ValueError, match="at least 0"):
        OwnTracks(-1.0)


def test_the_lesson_leads_from_swapped_means_to_the_right_ones_and_leaves_those_alone():
    torch.manual_seed(0)
    dynamics, B, N, T = make_dynamics(1e-3), 20, 2, 12
    model = PixelModel(dynamics, Renderer(6, 6, 4))
    n_objects, images = torch.full((B,), N), torch.zeros(B, T, 6, 6)
    right = untangle(dynamics, dynamics.positions(T).sample(torch.Size((B, N))).float(), n_objects).a
    swapped = right.clone()
    swapped[:, 0, 8:], swapped[:, 1, 8:] = right[:, 1, 8:], right[:, 0, 8:]

    def lesson(mean):
        """Minus its gradient with respect to the means, in units of its standard deviation for a good guide."""
        guide, std = Table(mean.clone(), torch.tensor(0.03)), 0.03
        _, both = gradients(OwnTracks(1.0), model, guide, images, n_objects)
        _, plain = gradients(AnnealedELBO(), model, guide, images, n_objects)
        return (plain["mean"] - both["mean"]) * std

    orders = torch.stack([right, right.flip(1)])  # to p(a) the names of whole tracks are all one
    towards = (lesson(swapped) * (orders - swapped)).sum((2, 3, 4)).amax(0)
    apart = (right - swapped)[:, :, 8:].norm(dim=-1).mean((1, 2)) > 0.3  # ten times the standard deviation
    assert int(apart.sum()) > 8
    assert bool((towards[apart] > 10.0).all())
    kept = lesson(right)  # independent standard normals but where objects meet
    assert float(kept.mean().abs()) < 4 / kept.numel() ** 0.5
    assert float(kept.norm(dim=-1).mean()) < 2.0


def test_share_of_renamed():
    torch.manual_seed(1)
    dynamics, T = make_dynamics(1e-4), 10
    a = dynamics.positions(T).sample(torch.Size((5, 2))).float()
    a = untangle(dynamics, a, torch.full((5,), 2)).a
    assert share_of_renamed(dynamics, a, torch.full((5,), 2)) == 0.0
    a[:, 0, 7:], a[:, 1, 7:] = a[:, 1, 7:].clone(), a[:, 0, 7:].clone()
    assert share_of_renamed(dynamics, a, torch.full((5,), 2)) > 0.2
    assert share_of_renamed(dynamics, a[:, :1], torch.ones(5, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("change", [{"own_tracks_from": 3}, {"random_order_from": 3}])
def test_the_schedule_says_from_which_step_on_and_training_resumes_within(change, small_data, tmp_path):
    schedule = Schedule(steps=6, batch_size=6, learn_from={}, anneal_from=6, evaluate_every=1)

    def train(schedule, steps=6, resume=False, run_dir=None):
        model, guide = make_model(), make_guide()
        lines = []
        fit(
            model, guide, small_data, replace(schedule, steps=steps), resume=resume, run_dir=run_dir, progress=False,
            on_evaluation=lambda line: lines.append(line["bound_per_frame"]),
        )  # fmt: skip
        return lines, guide.state_dict()

    plain, _ = train(schedule)
    changed, weights = train(replace(schedule, **change))
    assert changed[:3] == plain[:3]
    assert changed[4:] != plain[4:]
    never, _ = train(replace(schedule, own_tracks_from=3, own_tracks_weight=0.0))
    assert never == plain
    train(replace(schedule, **change), 4, run_dir=tmp_path)
    _, resumed = train(replace(schedule, **change), resume=True, run_dir=tmp_path)
    for name, value in weights.items():
        assert torch.equal(resumed[name], value)
