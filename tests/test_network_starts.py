from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from pyro_pixels.config import RunConfig
from pyro_pixels.guides import ConvolutionalFrontEnd, InferenceRNN, LinearHead, RecurrentGuide
from pyro_pixels.guides.network_starts import start_alike, start_as_ramps, start_with_memory
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import build


def make_rnn(front_end=None, state_size=64):
    torch.manual_seed(0)
    return InferenceRNN(12, 10, state_size, front_end=front_end)


def test_ramps_are_linear_in_column_and_row():
    rnn = make_rnn()
    start_as_ramps(rnn, white=0.0)
    W = rnn.from_image.weight.detach().unflatten(1, (12, 10)).double()
    columns, rows = W[:, :, 1:] - W[:, :, :-1], W[:, 1:] - W[:, :-1]
    torch.testing.assert_close(columns, columns[:, :1, :1].expand_as(columns), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows, rows[:, :1, :1].expand_as(rows), atol=1e-6, rtol=0)
    torch.testing.assert_close(W.mean((1, 2)), torch.zeros(128).double(), atol=1e-6, rtol=0)
    assert len(torch.unique(columns[:, 0, 0])) == 128  # each unit has a ramp of its own


def test_without_ramps_the_start_is_the_papers():
    rnn = make_rnn(state_size=128)
    paper = rnn.from_image.weight.std().item()
    start_as_ramps(rnn, ramp=0.0, white=1.0)
    assert rnn.from_image.weight.std().item() == pytest.approx(paper, rel=0.03)  # 30,720 weights: 7 sigma
    other = make_rnn(state_size=128)
    torch.testing.assert_close(rnn.from_states.weight, other.from_states.weight)  # nothing else is touched


def test_the_first_states_are_nearly_affine_in_the_place_of_one_object():
    """R^2 of the best affine map from place to the image's part of the gates, one white pixel anywhere."""

    def r2(rnn):
        images = torch.eye(120).unflatten(1, (12, 10)).unsqueeze(1)
        y = torch.nn.functional.linear(images.flatten(1), rnn.from_image.weight).detach()
        grid = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij"), -1).flatten(0, 1)
        design = torch.cat([grid, torch.ones(120, 1)], 1)
        residual = y - design @ torch.linalg.lstsq(design, y).solution
        return 1 - float(residual.var() / y.var())

    rnn = make_rnn()
    assert r2(rnn) < 0.1
    start_as_ramps(rnn)
    assert r2(rnn) > 0.9


def test_all_objects_start_alike():
    rnn, phi = make_rnn(), make_rnn().phi_s0.detach()
    start_alike(rnn, own=0.25)
    torch.testing.assert_close(rnn.phi_s0[2, 1], phi[0, 0] + 0.25 * phi[2, 1])
    start_alike(rnn, own=0.0)
    torch.testing.assert_close(rnn.phi_s0, rnn.phi_s0[:1, :1].expand_as(rnn.phi_s0))
    s_0 = rnn.start(torch.tensor([3, 1]))
    torch.testing.assert_close(s_0[0, 2], s_0[1, 0])


def test_memory_is_the_identity_from_the_state_before():
    """By the literal recursion: with no other weights s_t^1 = sigm(1) tanh(2 s_{t-1}^1), and s_t^2 takes a share."""
    rnn = make_rnn(state_size=8)
    for p in (rnn.from_states.weight, rnn.from_image.weight):
        torch.nn.init.zeros_(p)
    start_with_memory(rnn, gain=2.0)
    s_0 = 0.5 * torch.randn(1, 2, 8)
    s = rnn.advance(s_0, torch.zeros(1, 3, 12, 10)).detach()
    beta, before = torch.sigmoid(torch.tensor(1.0)), s_0
    for t in range(3):
        first = beta * torch.tanh(2 * before[:, 0])
        second = (1 - beta) * first + beta * torch.tanh(2 * before[:, 1])
        torch.testing.assert_close(s[:, :, t], torch.stack([first, second], 1))
        before = s[:, :, t]
    paper, other = make_rnn(), make_rnn()
    start_with_memory(other)
    changed = (paper.from_states.weight != other.from_states.weight).nonzero()
    assert changed.tolist() == [[64 + i, i] for i in range(64)]


def test_a_front_end_has_no_ramps():
    with pytest.raises(ValueError, match="front_end"):
        start_as_ramps(make_rnn(ConvolutionalFrontEnd()))


def test_a_configuration_can_ask_for_both():
    config = RunConfig(state_size=16, data=SMALL, image_ramps=3.0, common_s0=0.1, memory=1.0)
    run, again, paper = build(config), build(config), build(RunConfig(state_size=16, data=SMALL))
    torch.testing.assert_close(dict(run.guide.state_dict()), dict(again.guide.state_dict()))
    assert bool(
        (run.guide.rnn.from_states.weight - paper.guide.rnn.from_states.weight).diagonal(-16).allclose(torch.ones(16))
    )
    spread = {
        name: (r.guide.rnn.phi_s0[:, 0] - r.guide.rnn.phi_s0[0, 0]).detach().std()
        for name, r in (("own", paper), ("alike", run))
    }
    assert float(spread["alike"]) < 0.2 * float(spread["own"])


@pytest.mark.parametrize("name", ["recurrent", "recurrent_long", "paper_learned"])
def test_presets_of_the_papers_network_have_nothing_else_in_them(name):
    config = PRESETS[name]
    small = replace(config, state_size=16, data=SMALL)
    guide = build(small).guide
    assert type(guide) is RecurrentGuide
    assert type(guide.rnn) is InferenceRNN
    assert type(guide.head) is LinearHead
    assert config.schedule.single_object_steps == 0
    held = [config.schedule.learn_from[f"model.dynamics.root_Sigma_{noise}"] for noise in "HA"]
    assert min(held) > config.schedule.steps
    assert [config.schedule.kl_weight(step) for step in (0, config.schedule.steps - 1)] == [3.0, 1.0]
    assert PRESETS["paper"].image_ramps is PRESETS["paper"].memory is PRESETS["paper"].common_s0 is None
