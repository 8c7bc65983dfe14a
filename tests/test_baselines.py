"""The ED-LSTM against a literal loop, its training killed and resumed, and a tracker on data whose truth is known."""

import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_pixels.evaluation.ed_lstm import EDLSTM, EDLSTMConfig, evaluate_edlstm, fit_edlstm, load_edlstm
from pyro_pixels.training.checkpoints import load_checkpoint, read_lines, save_checkpoint
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

QUICK = CannonballConfig(height=32, width=32)


def make_net(seed=0, height=12, width=12, state_size=16, n_layers=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EDLSTM(EDLSTMConfig(height, width, state_size, n_layers))


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("n_seen", [None, 0, 3, 20])
def test_forward_is_fig_7_step_by_step(small_data, n_layers, n_seen):
    net = make_net(n_layers=n_layers).double()
    cell = nn.LSTMCell(16, 16).double()
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in net.lstm.state_dict().items()})
    images = small_data.images[:4].double().flatten(2)
    linear = [layer for layer in (*net.encoder, *net.decoder) if isinstance(layer, nn.Linear)]
    assert len(linear) == 2 * n_layers
    h = c = torch.zeros(4, 16, dtype=torch.float64)
    v, wanted = torch.zeros(4, 144, dtype=torch.float64), []
    for t in range(images.shape[1]):
        for i, layer in enumerate(linear[:n_layers]):
            v = layer(v if i == 0 else v.relu())
        h, c = cell(v, (h, c))
        x = h
        for i, layer in enumerate(linear[n_layers:]):
            x = layer(x if i == 0 else x.relu())
        wanted.append(x)
        v = images[:, t] if n_seen is None or t < n_seen else x.sigmoid()
    logits = net(small_data.images[:4], n_seen)
    torch.testing.assert_close(logits.flatten(2), torch.stack(wanted, 1), rtol=1e-12, atol=1e-12)


def test_own_predictions_matter_only_behind_the_seen_frames(small_data):
    net = make_net()
    true, own = net(small_data.images), net(small_data.images, n_seen=5)
    torch.testing.assert_close(own[:, :6], true[:, :6])
    assert ((own[:, 6:] - true[:, 6:]).abs().amax((0, 2, 3)) > 1e-3).all()
    generated = net.generate(small_data.images[:, :5], 14)
    assert generated.shape == (12, 14, 12, 12)
    torch.testing.assert_close(generated[:, :11], own.sigmoid())


@pytest.mark.parametrize("n_layers", [1, 2])
def test_weights_start_with_the_papers_variance(n_layers):
    net = make_net(height=20, width=16, state_size=100, n_layers=n_layers)
    matrices = [p for p in net.parameters() if p.dim() == 2]
    assert {tuple(p.shape) for p in matrices} >= {(100, 320), (400, 100), (320, 100)}
    for p in matrices:  # at least 10,000 elements, so their variance is within 7 % (5 standard errors)
        assert p.detach().square().mean().item() == pytest.approx(p.numel() ** -0.5, rel=0.07)
    assert all((p == 0).all() for p in net.parameters() if p.dim() == 1)


def test_default_sizes_are_the_papers():
    assert EDLSTMConfig() == EDLSTMConfig(height=48, width=48, state_size=2048, n_layers=1)


@pytest.mark.parametrize("own_predictions", [False, True])
def test_it_learns_two_sequences_by_heart(small_data, own_predictions):
    net, two = make_net(state_size=64), small_data[4:6]
    fit_edlstm(
        net, two, steps=150, own_predictions=own_predictions, batch_size=2, learning_rate=0.01, progress=False
    )  # fmt: skip
    row = evaluate_edlstm(net, two, radius=1.5)["all"]
    assert row["nll_per_frame_nats"] < 0.2 * row["constant_image_nll_per_frame_nats"]
    assert row["missing_share"] < 0.1
    assert row["generation_error_px"] < 0.5


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_stopped_and_resumed_run_is_an_uninterrupted_one(small_data, tmp_path, stop_at):
    options = {"steps": 6, "own_predictions": True, "batch_size": 5, "seed": 3, "progress": False, "evaluate_every": 2}
    whole, first, second = make_net(), make_net(), make_net(seed=9)
    fit_edlstm(whole, small_data, run_dir=tmp_path / "whole", **options)
    calls = []

    def kill(*_):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = first.register_forward_hook(kill)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    result = fit_edlstm(first, small_data, run_dir=tmp_path / "parts", **options)
    hook.remove()
    assert (result.interrupted, result.step) == (True, stop_at)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    result = fit_edlstm(second, small_data, run_dir=tmp_path / "parts", resume=True, **options)
    assert (result.interrupted, result.step) == (False, 6)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for name, p in whole.state_dict().items():
        assert torch.equal(p, second.state_dict()[name])
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values()):
        assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [read_lines(tmp_path / name) for name in ("whole", "parts")]
    assert [line["step"] for line in lines[0]] == [2, 4, 6]
    assert [[x["step"], x["nll_per_frame"]] for x in lines[0]] == [[x["step"], x["nll_per_frame"]] for x in lines[1]]


def test_training_leaves_the_random_state_and_does_not_use_it(small_data):
    nets = make_net(), make_net()
    for i, net in enumerate(nets):
        torch.manual_seed(i)
        before = torch.get_rng_state()
        fit_edlstm(net, small_data, steps=2, own_predictions=False, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(nets[0].lstm.weight_hh_l0, nets[1].lstm.weight_hh_l0)


def test_an_epoch_uses_every_sequence_once(small_data):
    net, seen = make_net(), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit_edlstm(net, small_data, steps=6, own_predictions=False, batch_size=4, progress=False)
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        sums = sorted(map(tuple, epoch.sum((2, 3)).tolist()))
        assert sums == sorted(map(tuple, small_data.images.sum((2, 3)).tolist()))


def test_resume_refusals_and_loading(small_data, tmp_path):
    options = {"steps": 1, "own_predictions": False, "progress": False}
    with pytest.raises(ValueError, match="no checkpoint"):
        fit_edlstm(make_net(), small_data, run_dir=tmp_path, resume=True, **options)
    net = make_net(n_layers=2)
    fit_edlstm(net, small_data, run_dir=tmp_path, **options)
    before = torch.get_rng_state()
    loaded = load_edlstm(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == net.config
    torch.testing.assert_close(loaded(small_data.images), net(small_data.images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds a trained run"):
        fit_edlstm(net, small_data, run_dir=tmp_path, **options)
    for changed, match in (({"seed": 1}, "seed 0, not 1"), ({"own_predictions": True}, "own_predictions False")):
        with pytest.raises(ValueError, match=match):
            fit_edlstm(net, small_data, run_dir=tmp_path, resume=True, **{**options, **changed})
    with pytest.raises(ValueError, match="config"):
        fit_edlstm(make_net(), small_data, run_dir=tmp_path, resume=True, **options)
    with pytest.raises(ValueError, match="run_dir"):
        fit_edlstm(net, small_data, resume=True, **options)
    save_checkpoint(tmp_path / "other" / "checkpoint.pt", {"step": 1, "model": {}})
    with pytest.raises(ValueError, match="no ED-LSTM"):
        load_edlstm(tmp_path / "other")


def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_stays(small_data, tmp_path):
    net = make_net()
    fit_edlstm(net, small_data, steps=1, own_predictions=False, run_dir=tmp_path, progress=False)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    net.register_forward_hook(lambda *args: args[2] * torch.nan)
    with pytest.raises(FloatingPointError, match="at step 3"):
        fit_edlstm(net, small_data, steps=3, own_predictions=False, run_dir=tmp_path, resume=True, progress=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


class Draws(EDLSTM):
    """Generates what it is given."""

    def __init__(self, images):
        super().__init__(EDLSTMConfig(*images.shape[2:], 4))
        self.images = images.float()

    def generate(self, images, n_frames):
        return self.images


def test_evaluation_of_perfect_and_of_black_images():
    data = simulate(QUICK, 12, seed=5)
    table = evaluate_edlstm(Draws(data.images), data, batch_size=12)
    assert set(table["by_n_objects"]) == {"1", "2", "3"}
    assert table["all"]["n_sequences"] == 12
    assert table["all"]["nll_per_frame_nats"] < 0.01
    assert table["by_n_objects"]["1"]["generation_error_px"] < 0.2
    assert table["by_n_objects"]["1"]["missing_share"] == 0.0
    assert table["all"]["generation_error_px"] < 0.4
    assert 0 < table["all"]["generation_found_error_px"] <= table["all"]["generation_error_px"]
    black = evaluate_edlstm(Draws(torch.zeros_like(data.images)), data, batch_size=12)["all"]
    assert black["missing_share"] == 1.0
    assert black["generation_found_error_px"] is None
    from_centre = (data.positions[:, :, 5:] - 15.5).norm(dim=-1).mean(-1)
    assert black["generation_error_px"] == pytest.approx(float(from_centre.nanmean()), rel=1e-12)
    assert black["nll_per_frame_nats"] > black["constant_image_nll_per_frame_nats"]
    without = evaluate_edlstm(Draws(data.images), replace(data, positions=None), batch_size=12)["all"]
    assert not [name for name in without if name.endswith("_px")]


def test_unobserved_frames_do_not_count():
    data = simulate(QUICK, 6, seed=5)
    images, positions = data.images.float(), data.positions.clone()
    images[:, 8] = images[1::2, 20:] = torch.nan
    positions[:, :, 8] = positions[1::2, :, 20:] = torch.nan
    row = evaluate_edlstm(Draws(data.images), replace(data, images=images, positions=positions), batch_size=6)["all"]
    assert 0 < row["generation_error_px"] < 0.4
    assert row["nll_per_frame_nats"] < 0.01 < row["constant_image_nll_per_frame_nats"]


@pytest.mark.parametrize("own_predictions", [False, True])
def test_frames_that_were_not_seen_are_black_as_inputs_and_cost_nothing(small_data, tmp_path, own_predictions):
    images, positions = small_data.images.float(), small_data.positions.clone()
    images[1, 2:4], images[2, 7:] = torch.nan, torch.nan
    positions[1, :, 2:4], positions[2, :, 7:] = torch.nan, torch.nan
    data = replace(small_data, images=images, positions=positions, paths=None)
    net = make_net()
    first = net(images, 5 if own_predictions else None)
    assert torch.equal(first, net(images.nan_to_num(), 5 if own_predictions else None))
    wanted = F.binary_cross_entropy_with_logits(first, images.nan_to_num(), reduction="none").sum((2, 3))
    result = fit_edlstm(
        net, data, steps=1, own_predictions=own_predictions, batch_size=12, run_dir=tmp_path, progress=False
    )
    assert result.metrics["nll_per_frame"] == pytest.approx(float(wanted[data.seen].mean()), rel=1e-5)
    table = evaluate_edlstm(net, data)["all"]
    assert all(x is None or x == x for x in table.values())
    assert table["generation_error_px"] > 0


BAD = {
    "no state": lambda d: EDLSTMConfig(state_size=0),
    "half a layer": lambda d: EDLSTMConfig(n_layers=0.5),
    "other size": lambda d: make_net(height=13)(d.images),
    "no batch": lambda d: make_net()(d.images[0]),
    "negative n_seen": lambda d: make_net()(d.images, -1),
    "nothing to generate": lambda d: make_net().generate(d.images, 11),
    "no steps": lambda d: fit_edlstm(make_net(), d, steps=0, own_predictions=False),
    "no learning": lambda d: fit_edlstm(make_net(), d, steps=1, own_predictions=False, learning_rate=0.0),
    "seen all": lambda d: evaluate_edlstm(make_net(), d, n_seen=11),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_value_error(small_data, call):
    with pytest.raises(ValueError, match=r"wanted|give|needs more"):
        call(small_data)
