"""The yardstick computes what pyro_pixels computes; operations and densities are counted and checked. No timings."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import oracles
import pyro
import pytest
import torch
from conftest import SMALL, make_guide, make_model

from benchmarks import asking, bench, densities, growth, memory, parts_of_step, report
from benchmarks.paper_weights import in_paper_names
from benchmarks.steps import KL_WEIGHT, LITERAL, OURS, PRODUCT, STRUCTURED, LiteralStep, OurStep, make_step
from benchmarks.timing import MatrixProduct, Stopwatch, exponent, product_flops, ratio
from pyro_pixels.config import RunConfig
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.runs import Run, build
from pyro_pixels.training.fitting import fit
from pyro_pixels.training.schedule import Schedule
from pyro_pixels.worlds.base import simulate

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def in_new_process(*command, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(autouse=True)
def _pyro_store():
    yield
    pyro.clear_param_store()


def tiny(n_objects):
    return RunConfig(
        state_size=5, guide_state_size=6, max_objects=max(n_objects),
        data=replace(SMALL, n_objects=n_objects), schedule=Schedule(batch_size=3),
    )  # fmt: skip


def test_our_step_is_that_of_fit():
    data = simulate(SMALL, 1, seed=0)  # one sequence, so that both have the same batches
    schedule = Schedule(steps=3, batch_size=1, learn_from={}, kl_before=KL_WEIGHT, anneal_from=10)
    model, guide = make_model(), make_guide()
    run = Run(RunConfig(schedule=schedule), copy.deepcopy(model), copy.deepcopy(guide), step=0)
    step = OurStep(run, data, CPU)
    fit(model, guide, data, schedule, seed=4, progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for _ in range(3):
            step()
    for wanted, stepped in ((model, run.model), (guide, run.guide)):
        for name, p in stepped.named_parameters():
            assert torch.equal(p, wanted.get_parameter(name)), name


def test_products_are_counted_as_by_hand():
    """A product and its two gradients are three. Images need none, and nothing is before the first object; the gradient
    of the weights goes over all diagonals, whose corners are empty."""
    config = tiny(n_objects=(3,))
    B, N, T = config.schedule.batch_size, 3, config.data.n_frames
    P, D, E = config.data.height * config.data.width, config.state_size, config.guide_state_size
    frames, cells = B * T, B * N * T
    halves = 2 * cells - frames  # products with a state before: in time, and among the objects
    with_corners = B * (2 * N - 1) * (T + N - 1)
    image, recurrence, head = 2 * frames * P * 2 * E, 2 * (2 * halves + with_corners) * E * 2 * E, 2 * cells * E * 4
    objects, pixels = 2 * (2 * cells * 2 * D), 2 * frames * D * P
    networks = 2 * image + recurrence + 3 * (head + objects + pixels)

    dynamics, a = Dynamics(config.dynamics), torch.randn(B, N, T, 2, requires_grad=True)
    prior = product_flops(lambda: dynamics.positions(T).log_prob(a).sum().backward())
    assert product_flops(make_step(OurStep, config, CPU)) == networks + prior


def test_the_literal_step_trains_what_ours_trains():
    """A step of Adam moves each learned number by its learning rate."""
    config = replace(tiny(n_objects=(1, 2, 3)), guide_state_size=None)
    run = build(config)
    wanted = {name: x.clone() for name, x in in_paper_names(run.model, run.guide).items()}
    step = LiteralStep(run, simulate(config.data, 3, seed=0), CPU)
    step()
    trained = {name.replace("$$$", "."): p.detach() for name, p in pyro.get_param_store().items()}
    assert trained.keys() == wanted.keys()
    for name, p in trained.items():
        assert float((p - wanted[name]).abs().max()) == pytest.approx(config.schedule.learning_rate, rel=1e-2), name


@pytest.mark.parametrize("T", [1, 2, 6])
def test_brute_force_is_the_oracles(T):
    torch.manual_seed(T)
    dynamics = Dynamics(DynamicsConfig(state_noise=0.3, start_velocity_spread=0.5))
    for p in dynamics.parameters():
        p.data += 0.3 * torch.randn_like(p)
    a = torch.randn(2, 3, T, 2, dtype=torch.float64)
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (x.detach().numpy() for x in dynamics.lgssm())
    systems = [oracles.System(A, B, u, Sigma_H, Sigma_A, *start) for start in zip(mu, Sigma)]
    pi = dynamics.pi.detach().double().numpy()
    wanted = [[oracles.mixture_log_prob(systems, pi, x.numpy()) for x in row] for row in a]
    assert oracles.relative_error(densities.brute_force(dynamics, a), np.array(wanted)) < 1e-7


def test_every_density_is_right():
    torch.manual_seed(0)
    found = densities.measure(Stopwatch(CPU, rounds=1), frames=(5, 12))
    assert found["value_error"].keys() == found["gradient_error"].keys() == {5, 12}
    for kind, bound in (("value_error", 1e-6), ("gradient_error", 1e-4)):
        for errors in found[kind].values():
            assert errors.keys() == densities.METHODS.keys()
            assert 0 <= max(errors.values()) < bound


def test_a_wrong_density_is_caught():
    wrong = {"half": lambda dynamics, a: 0.5 * densities.kalman_loop(dynamics, a)}
    found = densities.measure(Stopwatch(CPU, rounds=1), frames=(5,), methods=wrong)
    assert found["value_error"][5]["half"] == pytest.approx(0.5)


def test_calls_take_turns_and_stop_in_time():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    assert all(len(times) == 4 for times in Stopwatch(CPU, rounds=4).compare(calls).values())
    assert order == ["A", "B"] * 5  # the first round is not timed
    late = Stopwatch(CPU, rounds=9, seconds=0.0).compare(calls)
    assert all(len(times) == 3 for times in late.values())


def test_ratio_and_exponent():
    assert ratio([1.0, 2.0, 3.0], [2.0, 6.0, 12.0]) == 3.0  # the median of 2, 3, 4
    sizes = [1, 2, 4, 8, 16]
    times = [[9.0], [9.0], [4.0**1.5], [8.0**1.5], [16.0**1.5]]
    assert exponent(sizes, times) == pytest.approx(1.5)  # the lower half does not count


def test_operations_of_a_matrix_product():
    assert product_flops(MatrixProduct(CPU)) == 2 * 1536**3


def test_parts_of_a_step_lie_within_it_and_nothing_stays_patched():
    step = make_step(OurStep, replace(tiny(n_objects=(2,)), guide="structured"), CPU)  # torch wraps Adam's step once
    before = [vars(owner).get(name) for part in parts_of_step.PARTS.values() for owner, name in part]
    seconds = parts_of_step.seconds_of(step, rounds=2)
    assert seconds.keys() == {"step", *parts_of_step.PARTS}
    for part, times in seconds.items():
        assert all(0 < t <= whole for t, whole in zip(times, seconds["step"], strict=True)), part
    assert [vars(owner).get(name) for part in parts_of_step.PARTS.values() for owner, name in part] == before


def test_queries_are_asked():
    found = asking.measure(Stopwatch(CPU, rounds=1), n_sequences=3)
    assert {"infer", "reconstruct", "smooth", "generate", "interpolate"} < found["seconds"].keys()
    assert all(len(times) == 1 for times in found["seconds"].values())


def test_peak_memory_is_that_of_the_process_itself(tmp_path):
    """100 MB more, though the process that starts this one has used more than that before."""
    code = """
import numpy
from benchmarks import memory
before = memory.peak_of_process()
x = numpy.ones(100_000_000, numpy.uint8)
print((memory.peak_of_process() - before) / 1e6)
"""
    done = in_new_process("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 90 < float(done.stdout) < 130


def test_memory_grows_by_size(monkeypatch):
    monkeypatch.setattr(memory, "GROWING", ("batch",))
    monkeypatch.setattr(memory, "AXES", {"batch": growth.AXES["batch"]._replace(values=(5, 80))})
    found = memory.measure_growth(Stopwatch(CPU))["batch"]
    more = {size: x["peak"] - x["before"] for size, x in found.items()}
    assert more["80"] > more["5"] + 20e6  # images alone, and their logits, are 20 MB
    table = report.memory_growth({"batch": found, "environment": {}})
    assert f"5: {more['5'] / 1e6:,.0f}, 80: {more['80'] / 1e6:,.0f}" in table


def some_steps(watch):
    names = [LITERAL, OURS, f"{OURS}, N = 1", f"{OURS}, N = 3", f"{STRUCTURED}, N = 1", PRODUCT]
    seconds = dict(zip(names, ([4.0, 6.0], [2.0, 2.0], [0.5, 0.5], [1.5, 1.5], [1.0, 1.0], [0.25, 0.25])))
    return {"sizes": {"T": 30}, "flops": dict.fromkeys(names, 10**9), "seconds": seconds}


@pytest.fixture
def short(monkeypatch):
    """Parts that take no time."""
    axes = {"frames": growth.Axis((4, 5, 6), growth.AXES["frames"].change)}
    monkeypatch.setitem(bench.PARTS, "step", some_steps)
    monkeypatch.setitem(bench.PARTS, "density", partial(densities.measure, frames=(4, 5, 6)))
    monkeypatch.setitem(bench.PARTS, "growth", partial(growth.measure, axes=axes, base=tiny(n_objects=(2,))))


def arguments(tmp_path, **changes):
    return bench.Arguments(device="cpu", rounds=2, seconds=0.0, out=tmp_path / "results", **changes)


def test_parts_join_those_that_are_there(short, tmp_path, capsys):
    bench.main(arguments(tmp_path, only=("step", "density")))
    file = tmp_path / "results" / "cpu.json"
    before = json.loads(file.read_text())
    bench.main(arguments(tmp_path, only=("growth",)))
    after = json.loads(file.read_text())
    assert after.keys() == {"step", "density", "growth"}
    assert after["step"] == before["step"]
    assert after["growth"]["environment"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "results" / "cpu_growth.png").stat().st_size > 1000
    assert "Kalman loop" in capsys.readouterr().out


def test_the_table_of_steps(short, tmp_path, capsys):
    bench.main(arguments(tmp_path, only=("step",)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert table[LITERAL][1] == "1.00"
    assert table[OURS][1:] == ["2.50", "1.00", "0", "12 %"]  # the median of 4 / 2 and 6 / 2; 0.5 of 4 GFLOP/s
    assert table[f"{OURS}, one N a batch, mean"][1] == "5.00"
    assert table[f"{STRUCTURED}, N = 1"][1] == table[PRODUCT][1] == "-"


def test_a_page_is_filled_from_the_file(short, tmp_path):
    bench.main(arguments(tmp_path, only=("growth", "step")))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin cpu growth -->\nold\n<!-- end cpu growth -->\nb\n")
    with pytest.raises(ValueError, match="begin cpu step"):
        bench.main(arguments(tmp_path, only=(), page=page))
    page.write_text(page.read_text() + "<!-- begin cpu step -->\n<!-- end cpu step -->\n")
    bench.main(arguments(tmp_path, only=(), page=page))
    text = page.read_text()
    assert "old" not in text
    assert "| frames | 4: " in text
    assert (tmp_path / "figures" / "performance" / "cpu_growth.png").exists()
    assert "](figures/performance/cpu_growth.png)" in text


def test_the_page_of_the_documentation_has_a_place_for_every_part():
    text = (ROOT / "docs" / "performance.md").read_text()
    for part in bench.PARTS.keys() - {"kernels"}:  # which is for CUDA, and in gpu_report's table
        assert f"<!-- begin cpu {part} -->\n" in text
        assert f"<!-- end cpu {part} -->\n" in text


def test_wrong_input_is_one_line(tmp_path):
    done = in_new_process("-m", "benchmarks.bench", "--rounds", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --rounds is 0; wanted a whole number of at least 1, at most 1,000,000\n"


def test_a_broken_file_of_results_is_told(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text("{")
    with pytest.raises(ValueError, match=r"cpu\.json cannot be read"):
        bench.main(arguments(tmp_path, only=()))
