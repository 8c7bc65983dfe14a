"""Configurations and run folders."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SMALL

import pyro_pixels
from pyro_pixels.config import RunConfig
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.evaluation.untangled import evaluate_untangled
from pyro_pixels.guides.heads import LinearHead
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import (
    GUIDES,
    PRETRAINED,
    build,
    export_weights,
    load_config,
    load_pretrained,
    load_run,
    save_config,
)
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate

TINY = RunConfig(state_size=8, data=SMALL, schedule=Schedule(steps=2, batch_size=4, evaluate_every=1))


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY], ids=[*PRESETS, "tiny"])
def test_config_survives_json(tmp_path, config):
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config


def test_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    assert (paper.guide, paper.state_size, paper.data.height, paper.data.width) == ("recurrent", 1024, 48, 48)
    assert (paper.dynamics.delta, paper.dynamics.state_noise, paper.dynamics.position_noise) == (0.1, 1e-3, 1.0)
    assert paper.dynamics.n_components == 2


@pytest.mark.parametrize("guide", GUIDES)
def test_a_saved_run_comes_back_as_it_was(tmp_path, small_data, guide):
    config = dataclasses.replace(TINY, guide=guide)
    run = build(config)
    save_config(tmp_path, config)
    fit(run.model, run.guide, small_data, config.schedule, run_dir=tmp_path, progress=False)
    again = load_run(tmp_path)
    assert again.step == 2
    for a, b in ((run.model, again.model), (run.guide, again.guide)):
        assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_building_is_seeded_and_leaves_the_callers_random_state():
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    one, two, other = build(TINY), build(TINY), build(dataclasses.replace(TINY, seed=1))
    torch.testing.assert_close(torch.rand(2), wanted, rtol=0, atol=0)
    assert torch.equal(one.model.dynamics.mu, two.model.dynamics.mu)
    assert not torch.equal(one.model.dynamics.mu, other.model.dynamics.mu)


def test_bad_folders(tmp_path, small_data):
    with pytest.raises(ValueError, match="no run"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"colour": 1}))
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data": 3}))
    with pytest.raises(ValueError, match="CannonballConfig"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no guide 'mine'"):
        build(RunConfig(guide="mine"))


def test_a_checkpoint_of_another_configuration(tmp_path, small_data):
    run = build(TINY)
    fit(run.model, run.guide, small_data, TINY.schedule, run_dir=tmp_path, progress=False)
    save_config(tmp_path, dataclasses.replace(TINY, state_size=9))
    with pytest.raises(ValueError, match="another configuration"):
        load_run(tmp_path)


def test_exports_are_few_and_there():
    assert len(pyro_pixels.__all__) <= 30
    assert all(hasattr(pyro_pixels, name) for name in pyro_pixels.__all__)


@pytest.mark.slow
def test_the_paper_preset_runs():
    """48 x 48, state 1024, batch 20: 20 steps on a CPU; the bound is finite and rises."""
    config = PRESETS["paper"]
    data = pyro_pixels.simulate(config.data, 60, seed=0)
    run = build(config)
    lines = []
    schedule = dataclasses.replace(config.schedule, steps=20, evaluate_every=5)
    fit(run.model, run.guide, data, schedule, progress=False, on_evaluation=lines.append)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["bound_per_frame"] > lines[0]["bound_per_frame"]


@pytest.mark.slow
def test_the_quick_preset_finds_one_ball():
    """300 of its steps: on fresh sequences one ball is found within 0.5 px, and the images are explained far better
    than by the best single grey value."""
    config = PRESETS["quick"]
    run = build(config)
    schedule = dataclasses.replace(config.schedule, steps=300)
    fit(run.model, run.guide, pyro_pixels.simulate(config.data, 3000, seed=0), schedule, progress=False)
    result = pyro_pixels.evaluate(run.model, run.guide, pyro_pixels.simulate(config.data, 150, seed=1))
    one = result["by_n_objects"]["1"]
    assert one["position_error_px"] < 0.5
    assert one["bound_per_frame_nats"] > -0.5 * one["constant_image_nll_per_frame_nats"]
    assert result["affine"]["r2"] > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_bound_of_the_cpu(small_data):
    from pyro_pixels.training.elbo import bound

    for guide in GUIDES:
        run = build(dataclasses.replace(TINY, guide=guide))
        fit(run.model.cuda(), run.guide.cuda(), small_data, TINY.schedule, progress=False)
        images, n_objects = small_data.images, small_data.n_objects
        on_gpu = run.guide.q(images.cuda(), n_objects.cuda()).mean.cpu()
        on_cpu = run.guide.cpu().q(images, n_objects).mean
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)
        assert bool(bound(run.model.cpu(), run.guide, small_data).bound.isfinite().all())


def test_the_papers_network_comes_trained_by_the_bound_alone():
    """90 fresh sequences; names put right by p(a) make it better. Limits are far from what was measured."""
    run = load_pretrained("recurrent")
    assert type(run.guide.head) is LinearHead
    data = simulate(run.config.data, 90, seed=31)
    plain = evaluate(run.model, run.guide, data)["by_n_objects"]
    untangled = evaluate_untangled(run.model, run.guide, data)["by_n_objects"]
    for n, most in (("1", 0.6), ("2", 1.3), ("3", 2.4)):
        assert plain[n]["position_error_px"] < most
        assert untangled[n]["untangled_position_error_px"] <= plain[n]["position_error_px"] + 1e-9
    assert untangled["2"]["untangled_switch_rate"] < 0.15


@pytest.mark.parametrize(("name", "bound", "generation"), [("quick", -35, 1.5), ("long", -22, 1.35)])
def test_the_pretrained_weights_are_small_and_good(name, bound, generation):
    """90 fresh sequences; the limits are far from what was measured, and out of reach without training."""
    run = load_pretrained(name)
    folder = PRETRAINED / name
    assert sum(path.stat().st_size for path in PRETRAINED.glob("*/*")) < 5e6
    about = json.loads((folder / "about.json").read_text())
    assert run.step == about["step"] > 100
    assert {"command", "seed", "metrics"} <= about.keys()
    result = evaluate(run.model, run.guide, simulate(run.config.data, 90, seed=31), n_futures=16)
    for row in result["by_n_objects"].values():
        assert row["position_error_px"] < 0.75
        assert row["generation_error_px"] < generation * row["generation_floor_px"]
        assert row["interpolation_error_px"] < 1.5 * row["interpolation_floor_px"]
        assert row["side_accuracy"] > 0.95
        # a forecast that says how sure it is costs less than its mean alone, and less than knowing nothing
        assert row["averaged_nll_per_frame_nats"] < row["nll_per_frame_nats"]
        assert row["averaged_nll_per_frame_nats"] < 0.6 * row["constant_image_nll_per_frame_nats"]
    assert result["all"]["bound_per_frame_nats"] > bound
    with pytest.raises(ValueError, match="no pretrained weights 'huge'; wanted one of"):
        load_pretrained("huge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_seen": 15}, "n_seen is 15 at either end, but sequences have 30 frames"),
        ({"n_seen": 0}, "n_seen is 0 at .* give n_seen from 1 to 14"),
        ({"n_futures": -1}, "n_futures is -1; wanted a number of sampled futures"),
    ],
)
def test_evaluate_says_what_it_cannot_do(options, message):
    run = load_pretrained("quick")
    with pytest.raises(ValueError, match=message):
        evaluate(run.model, run.guide, simulate(run.config.data, 3, seed=0), **options)


def test_exported_weights_come_back(tmp_path, monkeypatch):
    run = build(dataclasses.replace(PRESETS["quick"], seed=5, state_size=8, guide_state_size=4))
    export_weights(run, tmp_path / "mine", {"command": "none", "metrics": {"error": math.nan}})
    assert '"error": null' in (tmp_path / "mine/about.json").read_text()
    monkeypatch.setattr("pyro_pixels.runs.PRETRAINED", tmp_path)
    back = load_pretrained("mine")
    for own, loaded in ((run.model, back.model), (run.guide, back.guide)):
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in own.state_dict().items())
