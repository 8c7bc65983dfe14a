from dataclasses import replace

import pytest
import torch
from conftest import make_guide, make_model

from pyro_pixels.evaluation import evaluate, evaluate_untangled
from pyro_pixels.evaluation.untangled import merged
from pyro_pixels.guides import StructuredGuide, UntangledGuide
from pyro_pixels.guides.heads import AttentionHead


def test_the_measures_are_those_of_the_untangled_guide(small_data):
    model, guide = make_model(), make_guide()
    found = evaluate_untangled(model, guide, small_data)
    wanted = evaluate(model, UntangledGuide(guide, model.dynamics), small_data)
    for n, row in found["by_n_objects"].items():
        assert row.keys() == {f"untangled_{name}" for name in (
            "position_error_px", "switch_rate", "generation_error_px", "interpolation_error_px", "bound_per_frame_nats",
        )}  # fmt: skip
        for name, value in row.items():
            assert value == wanted["by_n_objects"][n][name.removeprefix("untangled_")]
    plain = evaluate(model, guide, small_data)
    both = merged(plain, found)
    assert both["all"].items() >= plain["all"].items() | found["all"].items()
    assert both["affine"] == plain["affine"]
    one = both["by_n_objects"]["1"]
    assert one["untangled_position_error_px"] == pytest.approx(one["position_error_px"])


def test_frames_without_true_positions_do_not_count(small_data):
    model, other = make_model(), make_guide()
    torch.manual_seed(0)
    guide = StructuredGuide(model.dynamics, other.rnn, AttentionHead(other.rnn.height, other.rnn.width, 8))
    positions, images = small_data.positions.clone(), small_data.images.float()
    positions[:, :, 5] = images[:, 5] = torch.nan
    positions[1::2, :, 7:] = images[1::2, 7:] = torch.nan
    found = evaluate_untangled(model, guide, replace(small_data, images=images, positions=positions))["by_n_objects"]
    for n, row in found.items():
        assert 0 < row["untangled_position_error_px"] < 20
        assert row["untangled_switch_rate"] is None if n == "1" else 0 <= row["untangled_switch_rate"] <= 1


def test_of_a_guide_that_ties_frames_together_means_are_untangled(small_data):
    model, other = make_model(), make_guide()
    torch.manual_seed(0)
    head = AttentionHead(other.rnn.height, other.rnn.width, other.rnn.state_size)
    guide = StructuredGuide(model.dynamics, other.rnn, head)
    found = evaluate_untangled(model, guide, small_data, batch_size=5)
    assert found["all"].keys() == {"untangled_position_error_px", "untangled_switch_rate"}
    plain = evaluate(model, guide, small_data)["by_n_objects"]["1"]
    assert found["by_n_objects"]["1"]["untangled_position_error_px"] == pytest.approx(plain["position_error_px"])
    assert found["by_n_objects"]["1"]["untangled_switch_rate"] is None
