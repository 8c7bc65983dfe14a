import subprocess
import sys
from pathlib import Path

import arviz as az
import arviz_base
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import make_guide, make_model
from matplotlib import pyplot as plt
from pyro import poutine

import to_arviz
from pyro_pixels._batch import object_mask
from pyro_pixels.guides.inference_rnn import InferenceRNN
from pyro_pixels.guides.structured import StructuredGuide
from pyro_pixels.model.likelihoods import GaussianPixels
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries import inference_data
from pyro_pixels.queries.inference_data import DIMENSIONS, to_inference_data
from pyro_pixels.queries.predict import infer, render

ROOT = Path(__file__).parent.parent
B, N, T, S, AHEAD = 6, 3, 11, 150, 4


@pytest.fixture(scope="module")
def world(small_data):
    """A model whose components and noises are all seen at T = 11, its guide, and six sequences."""
    model = make_model(delta=0.3, state_noise=0.02, position_noise=0.2, start_spread=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        guide = StructuredGuide(model.dynamics, InferenceRNN(12, 12, 8))
    return model, guide, small_data[:B]


def made(world, n_samples):
    model, guide, data = world
    return to_inference_data(
        model, guide, data.images, data.n_objects, n_samples=n_samples, n_frames_ahead=AHEAD, positions=data.positions
    )


@pytest.fixture(scope="module")
def everything(world):
    return made(world, S)


def values(group, name):
    """A variable without its chain, as a tensor."""
    return torch.from_numpy(group[name].values[0])


def present(data):
    return object_mask(data.n_objects, N)


def test_groups_dimensions_and_coordinates(everything):
    assert isinstance(everything, az.InferenceData)
    assert set(everything.groups()) == set(DIMENSIONS)
    sizes = {"chain": 1, "draw": S, "sequence": B, "object": N, "time": T, "axis": 2, "axis_bis": 2, "state": 4,
             "state_bis": 4, "component": 2, "row": 12, "column": 12}  # fmt: skip
    for group, variables in DIMENSIONS.items():
        assert set(everything[group].data_vars) == set(variables)
        for name, dims in variables.items():
            x = everything[group][name]
            drawn = () if group.endswith("_data") else ("chain", "draw")
            assert x.dims == drawn + dims, (group, name)
            wanted = sizes | {"time": AHEAD if group == "predictions" else T}
            assert x.shape == tuple(wanted[dim] for dim in x.dims)
    a = everything.posterior.a
    assert a.axis.values.tolist() == ["x", "y"]
    assert everything.posterior.state.values.tolist() == ["x", "y", "vx", "vy"]
    assert a.object.values.tolist() == [1, 2, 3]
    assert a.time.values.tolist() == list(range(1, T + 1))
    assert everything.predictions.time.values.tolist() == [12, 13, 14, 15]


def test_absent_objects_are_nan_and_nothing_else_is(everything, world):
    absent = ~present(world[2]).numpy()
    for group, variables in DIMENSIONS.items():
        for name in variables:
            x = everything[group][name]
            missing = np.isnan(x.values)
            if "object" in x.dims:
                assert (missing == xr.DataArray(absent, dims=("sequence", "object")).broadcast_like(x).values).all()
            else:
                assert not missing.any(), (group, name)


def test_positions_are_those_of_the_guide(everything, world):
    _, guide, data = world
    there = present(data)
    a, wanted = values(everything.posterior, "a"), infer(guide, data.images, data.n_objects)
    assert (((a.mean(0) - wanted.mean) / wanted.std)[there].abs() < 5.5 / S**0.5).all()  # sigma
    assert ((a.std(0) / wanted.std - 1)[there].abs() < 5.5 / (2 * S) ** 0.5).all()  # sigma
    assert torch.equal(torch.from_numpy(everything.observed_data.v.values), data.images)
    np.testing.assert_array_equal(everything.constant_data.positions, data.positions)


def test_components_and_states_are_drawn_given_the_positions(everything, world):
    model, _, data = world
    there = present(data)
    a, h, z = (values(everything.posterior, name) for name in "ahz")
    p = model.dynamics.component_posterior(a.nan_to_num()).probs[..., 1].detach()
    assert 0.05 < p[:, there].mean() < 0.95  # or there is nothing to see
    error = ((z - p).mean(0) / (p * (1 - p)).mean(0).clamp(min=1e-3).sqrt())[there]
    assert (error.abs() < 5 / S**0.5).all()  # sigma
    lgssm = model.dynamics.lgssm()
    noise = (a - h[..., :2])[:, there].flatten(0, -2)
    correlation = lgssm.Sigma_A[0, 0].detach()
    # given the data the noise is smaller on average than before, and not zero
    assert 0.2 * correlation < noise.var(0).min() < noise.var(0).max() < 1.5 * correlation


def test_predictions_go_on_where_each_draw_ended(everything, world):
    model, _, data = world
    there = present(data)
    lgssm = model.dynamics.lgssm()
    h = torch.cat([values(everything.posterior, "h")[..., -1:, :], values(everything.predictions, "h")], -2)[:, there]
    eta = (h[..., 1:, :] - h[..., :-1, :] @ lgssm.A.mT - lgssm.u).detach().flatten(0, -2)
    sigma = (lgssm.Sigma_H.diagonal() / len(eta)).sqrt()
    assert (eta.mean(0).abs() < 5 * sigma).all()
    assert ((eta.var(0) / lgssm.Sigma_H.diagonal() - 1).abs() < 5 * (2 / len(eta)) ** 0.5).all()  # sigma
    noise = (values(everything.predictions, "a") - values(everything.predictions, "h")[..., :2])[:, there]
    noise = noise.flatten(0, -2)
    assert ((noise.var(0) / lgssm.Sigma_A.diagonal() - 1).abs() < 5 * (2 / len(noise)) ** 0.5).all()  # sigma


@pytest.mark.parametrize("group, latents", {"posterior_predictive": "posterior", "predictions": "predictions",
                                            "prior_predictive": "prior"}.items())  # fmt: skip
def test_images_are_drawn_at_the_positions(everything, world, group, latents):
    model, _, data = world
    p = render(model, values(everything[latents], "a").nan_to_num(), data.n_objects).double()
    v = values(everything[group], "v")
    assert v.dtype == torch.uint8
    error = (v - p).mean(0) / ((p * (1 - p)).mean(0) / S).sqrt()
    assert error.abs().max() < 6  # sigma, of up to 10,000 pixels
    assert error.var().item() == pytest.approx(1, abs=0.1)


def test_log_weight_and_log_likelihood_are_those_of_the_draws(everything, world):
    model, guide, data = world
    a = values(everything.posterior, "a")[:3].nan_to_num()
    for i, drawn in enumerate(a):
        p = poutine.trace(poutine.condition(model, {"a": drawn})).get_trace(data.images, data.n_objects)
        q = poutine.trace(poutine.condition(guide, {"a": drawn})).get_trace(data.images, data.n_objects)
        p.compute_log_prob()
        q.compute_log_prob()
        log_p_v = p.nodes["v"]["log_prob"].double()
        log_w = log_p_v + p.nodes["a"]["log_prob"] - q.nodes["a"]["log_prob"]
        torch.testing.assert_close(values(everything.sample_stats, "log_weight")[i], log_w.detach(), rtol=1e-5, atol=0)
        per_frame = values(everything.log_likelihood, "v")[i]
        torch.testing.assert_close(per_frame.double().sum(-1), log_p_v.detach(), rtol=1e-5, atol=0)
        probability = render(model, drawn, data.n_objects)
        wanted = torch.where(data.images.bool(), probability, 1 - probability).log().sum((-2, -1))
        torch.testing.assert_close(per_frame, wanted, rtol=1e-4, atol=0)


def test_the_prior_knows_nothing_of_the_images(everything, world):
    model, _, data = world
    there = present(data)
    a, z = (values(everything.prior, name)[:, there] for name in "az")
    p_a = model.dynamics.positions(T)
    n = a[..., 0, 0].numel()
    assert ((a.mean((0, 1)) - p_a.mean).abs() < 5 * (p_a.variance / n).sqrt()).all()  # sigma
    assert abs(z.mean() - 0.5) < 5 * 0.5 / n**0.5  # sigma


def test_learned_parameters_are_constants(everything, world):
    model = world[0]
    lgssm = model.dynamics.lgssm()
    for name in ("u", "Sigma_H", "Sigma_A", "mu", "Sigma"):
        np.testing.assert_array_equal(everything.constant_data[name], getattr(lgssm, name).detach())
    assert everything.constant_data.Sigma.sel(component=1, state="vx", state_bis="vx").item() == pytest.approx(1.0)
    assert everything.constant_data.delta.item() == pytest.approx(0.3)
    assert everything.constant_data.n_objects.values.tolist() == [1, 2, 3, 1, 2, 3]


def test_a_seed_gives_the_same_draws_and_leaves_the_callers_alone(small_data):
    model, guide, data = make_model(), make_guide(), small_data[:2]
    before = torch.get_rng_state()
    first, again, other = (
        to_inference_data(model, guide, data.images, data.n_objects, n_samples=3, seed=seed) for seed in (4, 4, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert "predictions" not in first.groups()
    assert "positions" not in first.constant_data
    for group in first.groups():
        xr.testing.assert_identical(first[group], again[group])
    assert not first.posterior.a.equals(other.posterior.a)


def test_draws_in_parts_are_as_many_and_all_different(small_data, monkeypatch):
    data = small_data[:2]
    monkeypatch.setattr(inference_data, "PIXELS_AT_ONCE", 2 * data.images.numel())
    found = to_inference_data(make_model(), make_guide(), data.images, data.n_objects, n_samples=5, n_frames_ahead=1)
    assert {group: found[group].sizes["draw"] for group in found.groups() if not group.endswith("_data")} == {
        group: 5 for group in DIMENSIONS if not group.endswith("_data")
    }
    assert len(np.unique(found.posterior.a.values[0, :, 0, 0, 0, 0])) == 5


def test_netcdf_and_back(world, tmp_path):
    few = made(world, 3)
    few.to_netcdf(tmp_path / "all.nc")
    again = az.from_netcdf(tmp_path / "all.nc")
    assert set(again.groups()) == set(few.groups())
    for group in few.groups():
        xr.testing.assert_equal(again[group].load(), few[group])


def test_arviz_1_gets_a_data_tree(world, monkeypatch, tmp_path):
    """arviz 1 needs Python 3.12; its base package has the same interface and is the real thing here."""
    few = made(world, 3)
    monkeypatch.setitem(sys.modules, "arviz", arviz_base)
    tree = made(world, 3)
    assert isinstance(tree, xr.DataTree)
    assert arviz_base.convert_to_datatree(tree) is tree
    drawn = arviz_base.extract(tree, var_names="a", keep_dataset=True)
    assert drawn.a.sizes["sample"] == few.posterior.sizes["chain"] * few.posterior.sizes["draw"]
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        assert set(tree.children) == set(again.children) == set(few.groups())
        for group in few.groups():
            xr.testing.assert_identical(tree[group].to_dataset(), few[group])
            xr.testing.assert_equal(again[group].to_dataset(), few[group])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arviz_compares_models(everything, world):
    """A model with the true background is better than one with a grey canvas, and arviz says so."""
    _, guide, data = world
    loo = az.loo(everything, var_name="v", pointwise=True)
    assert loo.loo_i.dims == ("sequence", "time")
    assert loo.n_data_points == B * T
    dark = make_model(delta=0.3, state_noise=0.02, position_noise=0.2, start_spread=0.5)
    with torch.no_grad():
        dark.renderer.to_v.weight.zero_()
        dark.renderer.to_v.bias.fill_(float(torch.logit(data.images.float().mean())))
    other = to_inference_data(dark, guide, data.images, data.n_objects, n_samples=S)
    table = az.compare({"grey": everything, "dark": other}, ic="loo", var_name="v")
    assert table.index[0] == "dark"
    # its images do not depend on a: nothing is lost by leaving one out
    wanted = other.log_likelihood.v.isel(chain=0, draw=0).sum().item()
    assert table.elpd_loo["dark"] == pytest.approx(wanted, rel=1e-5)


def test_grey_images_stay_grey(small_data):
    """Observed values are stored unchanged, and all draws are those of the model's likelihood."""
    plain, guide = make_model(), make_guide()
    model = PixelModel(plain.dynamics, plain.renderer, GaussianPixels(0.05))
    images = 0.1 + 0.6 * small_data.images[:2].float()
    grey = to_inference_data(model, guide, images, small_data.n_objects[:2], n_samples=30, n_frames_ahead=2)
    assert torch.equal(torch.from_numpy(grey.observed_data.v.values), images)
    for group, latents in (("posterior_predictive", "posterior"), ("predictions",) * 2, ("prior_predictive", "prior")):
        drawn = values(grey[group], "v")
        assert drawn.dtype == torch.float32
        expected = render(model, values(grey[latents], "a").nan_to_num(), small_data.n_objects[:2])
        assert (drawn - expected).std() == pytest.approx(0.05, rel=0.02)


def test_the_picture_of_white_pixels_leaves_missing_frames_out_and_adds_grey_values(small_data):
    plain, guide, data = make_model(), make_guide(), small_data[:2]
    images = data.images.float()
    images[0, 3:] = torch.nan
    white = images.sum((-2, -1))
    grey = PixelModel(plain.dynamics, plain.renderer, GaussianPixels(0.05))
    cases = ((plain, images, white, "white pixels"), (grey, 0.5 * images, 0.5 * white, "sum of the pixels"))
    for model, v, wanted, label in cases:
        figure = to_arviz.draw_white_pixels(to_inference_data(model, guide, v, data.n_objects, n_samples=3))
        panel = figure.axes[0]
        x = next(line.get_xdata() for line in panel.get_lines() if line.get_label() == "Observed")
        assert min(x) == pytest.approx(float(wanted.nan_to_num(torch.inf).min()))  # not 0, of a frame without pixels
        assert panel.get_xlabel().startswith(label)
        plt.close(figure)


def test_arviz_is_imported_when_it_is_needed():
    code = "import sys, pyro_pixels.queries.inference_data; sys.exit('arviz' in sys.modules or 'xarray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


BAD = {
    "no draw": ({"n_samples": 0}, "n_samples is 0"),
    "into the past": ({"n_frames_ahead": -1}, "n_frames_ahead is -1"),
    "positions of others": ({"positions": torch.zeros(2, 3, 11, 2)}, r"wanted \(B, N, T, 2\) = \(2, 2, 11, 2\)"),
    "another size": ({"images": torch.zeros(2, 11, 9, 9)}, "images are 9 x 9"),
    "0 and 255": ({"images": torch.full((2, 11, 12, 12), 255)}, "images have values from 255 to 255"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD.keys())
def test_bad_input(small_data, options, message):
    data = small_data[:2]
    arguments = {"images": data.images, "n_objects": data.n_objects} | options
    with pytest.raises(ValueError, match=message):
        to_inference_data(make_model(), make_guide(), **arguments)
