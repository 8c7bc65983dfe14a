"""examples/paper_in_pyro.py: the library's bound and gradients, the paper's settings, and (slow) one ball found."""

from examples import paper_in_pyro
from examples.paper_in_pyro import PAPER, PaperInPyro, Settings

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pyro
import pytest
import torch
from conftest import SMALL
from pyro import poutine
from pyro.infer import Trace_ELBO

from benchmarks.paper_weights import in_paper_names, paper_program
from pyro_pixels import PRESETS, AnnealedELBO, InferenceRNN, RecurrentGuide, Renderer, build, simulate
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.model.pixel_model import PixelModel

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "paper_in_pyro.py"
BETA = 2.0


def run(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(autouse=True)
def _pyro_store():
    yield
    pyro.clear_param_store()


def both(dtype, height=12, width=12):
    """Our model and guide with every parameter moved away from its start, and the paper's program with their values."""
    torch.manual_seed(0)
    dynamics = Dynamics(DynamicsConfig(state_noise=1e-2, position_noise_floor=1e-15))
    model = PixelModel(dynamics, Renderer(height, width, state_size=8)).to(dtype)
    guide = RecurrentGuide(InferenceRNN(height, width, state_size=8, max_objects=3)).to(dtype)
    for p in [*model.parameters(), *guide.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    return model, guide, paper_program(model, guide)


@pytest.mark.parametrize("N", [(1,), (3,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("size", [(12, 12), (10, 15)], ids=str)
def test_bound_and_gradients_are_the_librarys(N, size):
    """In float64, from the same draws, with the KL weighed; alone and with numbers of objects mixed in a batch."""
    data = simulate(replace(SMALL, n_objects=N, height=size[0], width=size[1]), 6, seed=0)
    model, guide, program = both(torch.float64, *size)
    program.to(torch.float64)
    torch.manual_seed(2)
    loss = AnnealedELBO(BETA)(model, guide)(data.images.double(), data.n_objects)
    loss.backward()
    torch.manual_seed(2)
    v = data.images.flatten(2).double()
    with pyro.validation_enabled(True):
        wanted = Trace_ELBO().differentiable_loss(program.model, program.guide, v, data.n_objects, BETA)
    wanted.backward()
    assert oracles.relative_error(loss, wanted.detach()) < 1e-8  # as exact as Pyro's GaussianHMM is
    ours = in_paper_names(model, guide, lambda p: p.grad)
    theirs = {name: p.grad for name, p in program.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert oracles.relative_error(gradient, theirs[name]) < 1e-6, name


def test_each_term_of_the_bound_is_the_librarys_in_float32(small_data):
    """As both are used: networks in float32, the density of the positions in float64. The scale is on a alone."""
    model, guide, program = both(torch.float32)
    assert program.dynamics.u.dtype == torch.float64
    a = guide.q(small_data.images, small_data.n_objects).sample()

    def terms(model, guide, images, a, *more):
        programs = [poutine.condition(p, data={"a": a}) for p in (model, guide)]
        traces = [poutine.trace(p).get_trace(images, small_data.n_objects, *more) for p in programs]
        for trace in traces:
            trace.compute_log_prob()
        p, q = (trace.nodes for trace in traces)
        return np.array([float(site["log_prob_sum"].detach()) for site in (p["v"], p["a"], q["a"])])

    v = small_data.images.flatten(2).float()
    wanted = terms(model, guide, small_data.images.float(), a)
    np.testing.assert_allclose(terms(program.model, program.guide, v, a.double()), wanted, rtol=1e-4)
    weighed = terms(program.model, program.guide, v, a.double(), BETA)
    np.testing.assert_allclose(weighed, wanted * [1, BETA, BETA], rtol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_positions_have_the_density_of_brute_force(T):
    """The mixture of GaussianHMMs draws h_1 from N(mu_k, Sigma_k), with no transition before it."""
    torch.manual_seed(T)
    dynamics = paper_in_pyro.Dynamics(Settings(Sigma_H=0.3, Sigma_A=0.5, mu_position=1.0))
    for p in dynamics.parameters():
        p.data += 0.3 * torch.randn_like(p)
    names = {"root_H": "root_Sigma_H", "root_A": "root_Sigma_A", "root_k": "root_Sigma"}
    ours = Dynamics(DynamicsConfig(position_noise_floor=1e-15)).double()
    ours.load_state_dict({names.get(name, name): x for name, x in dynamics.state_dict().items()})
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (x.detach().numpy() for x in ours.lgssm())
    systems = [oracles.System(A, B, u, Sigma_H, Sigma_A, *start) for start in zip(mu, Sigma)]
    a = torch.randn(5, T, 2, dtype=torch.float64)
    wanted = np.array([oracles.mixture_log_prob(systems, ours.pi.detach().numpy(), x.numpy()) for x in a])
    assert oracles.relative_error(dynamics(T).log_prob(a), wanted) < 1e-7


def test_the_papers_settings_are_those_of_the_librarys_paper_preset():
    config = PRESETS["paper"]
    d, schedule = config.dynamics, config.schedule
    wanted = Settings(
        H=config.data.height, W=config.data.width, D=config.state_size, delta=d.delta, Sigma_H=d.state_noise,
        Sigma_A=d.position_noise, Sigma_k=d.start_variance, mu_position=d.start_spread,
        mu_velocity=d.start_velocity_spread, W_std=0.0, b_v=config.background_logit, ramps=0.0,
        learn_dynamics=schedule.learn_from["model.dynamics"], learn_noise=schedule.learn_from["model.dynamics"],
        beta=schedule.kl_start, beta_last=1.0, rate_phi=schedule.learning_rate, rate_theta=schedule.learning_rate,
        rate_u=schedule.learning_rate, decay=1.0, steps=schedule.steps,
    )  # fmt: skip
    assert wanted == PAPER
    assert d.n_components == 2


@pytest.mark.parametrize("name", ["paper", "quick"])
def test_weights_start_as_those_of_the_library(name):
    """The same spread of every weight and bias, within sampling error; the others are equal."""
    s = PAPER._replace(D=64) if name == "paper" else Settings(D=64, ramps=0.0)
    config = replace(PRESETS[name], guide="recurrent", state_size=64, guide_state_size=None)
    ours = build(config)
    torch.manual_seed(0)
    start = dict(PaperInPyro(s, 3).named_parameters())
    for key, p in in_paper_names(ours.model, ours.guide).items():
        spread, wanted = (float(x.detach().double().square().mean().sqrt()) for x in (start[key], p))
        if key == "dynamics.mu":  # too few numbers; their scales are in the test above
            continue
        drawn = not key.startswith("dynamics")
        error = 5 / p.numel() ** 0.5 if drawn else 1e-3  # 5 sigma of a difference; the library's floor of Sigma_A
        assert abs(spread - wanted) <= error * wanted + 1e-6, key


def test_images_weights_start_as_ramps():
    """Added to the paper's start: planes over the image, each axis from -1 to 1, which least squares finds."""
    networks = []
    for ramps in (0.0, 3.0):
        torch.manual_seed(0)
        networks.append(PaperInPyro(Settings(H=12, W=16, D=8, ramps=ramps), 1).network)
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 16))  # (P, 2)
    for name in ("beta", "s_hat"):
        flat, ramp = (getattr(network, name).weight.detach() for network in networks)
        added = (ramp - flat)[:, 16:] / flat.std()
        slopes = torch.linalg.lstsq(grid, added.T).solution  # (2, D)
        torch.testing.assert_close(grid @ slopes, added.T, rtol=1e-4, atol=1e-4)
        assert 1.0 < float(slopes.std()) < 6.0  # 3 times N(0, 1)
        assert torch.equal(ramp[:, :16], flat[:, :16])


def test_what_is_held_stays(small_data):
    """Noises by default; with the paper's settings all of the dynamics; nothing once its step has come."""
    v = small_data.images.flatten(2)
    small = Settings(H=12, W=12, D=4, steps=2)
    changed = {}
    for name, s in {"ours": small, "paper": small._replace(learn_dynamics=9, learn_noise=9),
                    "free": small._replace(learn_noise=1)}.items():  # fmt: skip
        pyro.clear_param_store()
        torch.manual_seed(0)
        program = PaperInPyro(s, 3)
        before = {key: p.detach().clone() for key, p in program.named_parameters()}
        paper_in_pyro.train(program, v, small_data.n_objects, s)
        changed[name] = {key for key, p in program.named_parameters() if not torch.equal(p, before[key])}
    everything, noise = set(before), {"dynamics.root_H", "dynamics.root_A"}
    assert changed["free"] == everything
    assert changed["ours"] == everything - noise
    assert changed["paper"] == {key for key in everything if not key.startswith("dynamics.")}


def test_the_map_to_pixels_undoes_any_affine_map_and_order():
    torch.manual_seed(0)
    truth = torch.randn(5, 3, 7, 2, dtype=torch.float64)
    orders = torch.stack([torch.randperm(3) for _ in range(5)])
    a = truth[torch.arange(5)[:, None], orders] @ torch.tensor([[0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64) + 4
    assert (paper_in_pyro.to_pixels(a, truth) - truth).abs().max() < 1e-9


def test_a_tiny_run_prints_errors_and_draws(tmp_path):
    options = ("--steps", 3, "--D", 8, "--H", 16, "--W", 20, "--n-objects", 1, 2, "--out", "a/b.png")
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"N = 1: position error \d+\.\d\d px\nN = 2: position error \d+\.\d\d px\n", done.stdout)
    assert "nats a frame" in done.stderr
    assert (tmp_path / "a/b.png").stat().st_size > 5_000
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]
    assert run(*options, cwd=tmp_path).stdout == done.stdout  # the seed decides everything


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("--steps", 0), "--steps is 0; wanted a number above 0"),
        (("--delta", "nan"), "--delta is nan"),
        (("--D", "many"), "invalid int value"),
        (("--n-objects", 0), "n_objects is (0,)"),
        (("--H", 4), "do not fit an image"),
        (("--device", "abacus"), "abacus"),
        (("--unknown",), "unrecognized arguments"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_wrong_input_is_one_line(arguments, wanted, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert wanted in done.stderr


def test_help_names_every_setting(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("--device", "--steps", "--seed", "--n-objects", "--out", *(f"--{x}" for x in Settings._fields)):
        assert name in done.stdout


def test_it_fits_on_200_lines():
    assert len(SCRIPT.read_text().splitlines()) <= 200


@pytest.mark.slow
def test_it_finds_one_ball(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"error (\S+) px", done.stdout)[1]) < 0.6
