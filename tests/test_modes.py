"""Training and evaluation mode: guides with Dropout and BatchNorm are trained in one and queried in the other."""

import pyro.distributions as dist
import pytest
import torch
from conftest import make_model
from torch import nn

from pyro_pixels.config import RunConfig
from pyro_pixels.guides.base import Guide
from pyro_pixels.queries.predict import infer
from pyro_pixels.runs import GUIDES, build, load_pretrained, load_run
from pyro_pixels.training.distillation import draw_tracks
from pyro_pixels.training.elbo import bound
from pyro_pixels.training.fitting import fit, fit_together
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.training.svi import Training
from pyro_pixels.worlds.cannonballs import CannonballConfig

BRIEF = Schedule(steps=6, batch_size=4, learn_from={}, anneal_from=0, anneal_steps=0, evaluate_every=2)
SIZE = 12


class Moody(Guide):
    """A guide whose answers depend on its mode; it notes the mode of each training step."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.BatchNorm1d(SIZE**2), nn.Dropout(0.5), nn.Linear(SIZE**2, 12))
        self.steps = []

    def encode(self, images, n_objects):
        if torch.is_grad_enabled():
            self.steps.append(self.training)
        s = self.layers(images.flatten(2).flatten(0, 1)).view(len(images), images.shape[1], 3, 4).transpose(1, 2)
        s = s[:, : int(n_objects.max())]
        return dist.Normal(s[..., :2], s[..., 2:].exp()).to_event(2)


def modes(*modules):
    return {part.training for module in modules for part in module.modules()}


def test_steps_are_taken_in_training_mode_and_all_else_in_evaluation_mode(small_data):
    """The numbers with and without evaluations are the same, as these change no running averages."""
    kept = []
    for validation in (None, small_data[:3]):
        model, guide, seen = make_model(), Moody(), []

        def ask(line, guide=guide, seen=seen):
            infer(guide, small_data.images, small_data.n_objects)
            seen.append(modes(guide))

        if validation is None:
            fit(model, guide, small_data, BRIEF, progress=False)
        else:
            fit(model, guide, small_data, BRIEF, progress=False, validation=validation, on_evaluation=ask)
            assert seen == [{False}] * 3
        assert guide.steps == [True] * 6
        assert modes(model, guide) == {False}
        kept.append(guide.state_dict())
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not torch.equal(kept[0]["layers.0.running_mean"], torch.zeros(SIZE**2))


def test_queries_after_training_give_one_answer_and_change_nothing(small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(GUIDES, "moody", lambda config, model: Moody())
    world = CannonballConfig(height=SIZE, width=SIZE, n_frames=11)
    config = RunConfig(guide="moody", data=world, state_size=8, schedule=BRIEF)
    run = build(config)
    fit(run.model, run.guide, small_data, BRIEF, run_dir=tmp_path, config=config, progress=False)
    loaded = load_run(tmp_path)
    before = {name: x.clone() for name, x in loaded.guide.state_dict().items()}
    answers = [infer(guide, small_data.images, small_data.n_objects) for guide in (run.guide, loaded.guide, run.guide)]
    assert torch.equal(answers[0].mean, answers[1].mean)
    assert torch.equal(answers[0].mean, answers[2].mean)
    alone = infer(run.guide, small_data.images[:1], small_data.n_objects[:1])
    n = int(small_data.n_objects[0])
    torch.testing.assert_close(alone.mean[0, :n], answers[0].mean[0, :n], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in loaded.guide.state_dict().items())
    loaded.guide.steps.clear()
    longer = Schedule(steps=8, batch_size=4, learn_from={}, anneal_from=0, anneal_steps=0, evaluate_every=2)
    fit(loaded.model, loaded.guide, small_data, longer, run_dir=tmp_path, resume=True, progress=False)
    assert loaded.guide.steps == [True, True]


def test_bounds_and_draws_do_not_depend_on_the_mode(small_data):
    model, guide = make_model(), Moody()
    for measure in (lambda: bound(model, guide, small_data).bound, lambda: draw_tracks(guide, small_data)):
        guide.train()
        first = measure()
        assert modes(guide) == {True}
        guide.eval()
        assert torch.equal(first, measure())
        assert modes(guide) == {False}


def test_a_part_that_the_user_keeps_in_evaluation_mode_stays_in_it(small_data):
    class Kept(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    guide = Moody()
    guide.layers[0] = Kept(SIZE**2)
    fit(make_model(), guide, small_data, BRIEF, progress=False)
    assert int(guide.layers[0].num_batches_tracked) == 0


def test_trainings_together_and_pretrained_runs_end_in_evaluation_mode(small_data):
    runs = [(make_model(seed), Moody()) for seed in (0, 1)]
    fit_together([Training(*run, small_data, BRIEF) for run in runs], progress=False)
    assert all(run[1].steps == [True] * 6 for run in runs)
    assert modes(*runs[0], *runs[1]) == {False}
    run = load_pretrained("quick")
    assert modes(run.model, run.guide) == {False}


def test_training_that_fails_ends_in_evaluation_mode(small_data):
    def refuse(line):
        raise RuntimeError("enough")

    model, guide = make_model(), Moody()
    with pytest.raises(RuntimeError, match="enough"):
        fit(model, guide, small_data, BRIEF, progress=False, on_evaluation=refuse)
    assert modes(model, guide) == {False}
