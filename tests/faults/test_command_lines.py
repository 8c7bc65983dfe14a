"""Command lines that are wrong: exit code 2, one line, no traceback, nothing written; every option of every script.

Values are made from the annotations of each script's arguments, so that a new option, or a new script, is covered as
soon as it is there.
"""

import _common

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bad
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WORLD, train

from pyro_pixels._checks import ANY
from pyro_pixels.data import save_sequences
from pyro_pixels.runs import export_weights, load_run
from pyro_pixels.worlds.base import simulate

SCRIPTS = {name: bad.load(path) for name, path in bad.scripts().items()}
LINES = [(name, line) for name, script in SCRIPTS.items() for line in bad.bad_lines(script.Arguments)]


def refused(script, line):
    """What is wrong with how a command line ended that must be refused before anything is done."""

    def main(args):
        raise AssertionError(f"{script.__name__} takes {line}")

    end = bad.run(line, main, script.Arguments, script.__doc__)
    named = any(word.strip("-") and word in end.said for words in line for word in words.split("="))
    return None if end.code == 2 and end.is_one_line and named else (script.__name__, line, end)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name, line, message", [
    ("prepare", "vig -n 2", "Unrecognized options: -n, 2"),
    ("infer", "--question x", "Unrecognized options: --question, x"),
    ("train", "--step 5", "Unrecognized options: --step, 5; perhaps --steps"),
    ("train", "--no-such-option-as-this --nor-such-a-long-option-as-this --nor-this", "Unrecognized options: "
        "--no-such-option-as-this, --nor-such-a-long-option-as-this, --nor-this"),
    ("train", "--steps", "Missing value for argument '--steps'. Expected 1 values"),
    ("train", "--preset x", "invalid choice 'x' for argument '--preset'. Expected one of ('quick', 'recurrent', "
        "'recurrent_long', 'paper', 'paper_learned')"),
    ("train", "--seed 2.5", "--seed: invalid literal for int() with base 10: '2.5'"),
    ("train", "--steps x", "--steps: no type matching {None}|INT could be instantiated from ['x']"),
])  # fmt: skip
def test_errors_of_the_command_line_keep_their_message(name, line, message, encoding, monkeypatch):
    """tyro frames its errors where the terminal has the characters for it."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *line.split()])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}; --help lists all options$"):
        _common.parse(SCRIPTS[name].Arguments, None)


def test_every_script_is_there_and_every_number_has_bounds():
    assert len(SCRIPTS) >= 23
    assert SCRIPTS.keys() >= {"train", "sweep", "bench", "prepare"}
    without = [
        f"{name} {option}"
        for name, script in SCRIPTS.items()
        for _, option, kind, bounds, _ in bad.options_of(script.Arguments)
        if kind in (int, float) and bounds == ANY
    ]
    assert not without


def test_many_command_lines_with_bad_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = LINES[::4]
    assert len(lines) > 400
    assert not [x for name, line in lines if (x := refused(SCRIPTS[name], line))]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_command_lines_with_bad_values(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    assert not [x for name, line in LINES if (x := refused(SCRIPTS[name], line))]
    assert not list(tmp_path.iterdir())
    record_property("lines", len(LINES))


NUMBERS = [
    (name, option, kind, bounds)
    for name, script in SCRIPTS.items()
    for _, option, kind, bounds, _ in bad.options_of(script.Arguments)
    if kind in (int, float)
]


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_number_out_of_bounds(data):
    name, option, kind, bounds = data.draw(st.sampled_from(NUMBERS))
    wrong = [st.floats(allow_nan=True).filter(lambda x: not bounds.hold(x) or kind is int)]
    if bounds.low is not None:
        wrong.append(st.integers(max_value=int(bounds.low) - 1))
    if bounds.high is not None:
        wrong.append(st.integers(min_value=int(bounds.high) + 1))
    wrong.append(st.text(st.characters(categories=["L", "S"]), max_size=5).filter(lambda x: x not in ("nan", "inf")))
    assert refused(SCRIPTS[name], [option, str(data.draw(st.one_of(wrong)))]) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, files of sequences, and files that are none."""
    folder = tmp_path_factory.mktemp("place")
    train(folder / "run")
    save_sequences(folder / "data.npz", simulate(WORLD, 4, seed=0))
    images = np.zeros((3, 4, 8, 8), np.uint8)
    np.savez(folder / "short.npz", images=images[:, :4], n_objects=np.ones(3, int))
    np.savez(folder / "other_size.npz", images=np.zeros((3, 12, 9, 9), np.uint8), n_objects=np.ones(3, int))
    np.savez(folder / "no_images.npz", n_objects=np.ones(3, int))
    (folder / "garbage.npz").write_bytes(b"PK\x03\x04 and more")
    (folder / "text").write_text("a text\n")
    (folder / "a_folder").mkdir()
    run = load_run(folder / "run")
    export_weights(run, folder / "exported", {"command": "none"})
    return folder


CUSTOM = str(bad.ROOT / "examples/custom_guide.py")
RUN, OUT = ["--run", "run"], ["--out", "new"]
QUERIES = ("ask", "evaluate", "generate", "infer", "interpolate", "to_arviz", "gallery")
NOT_PRETRAINED = {"gallery": ["--no-pretrained"]}


def of_queries():
    for name in (*QUERIES, "latent_space"):
        own = NOT_PRETRAINED.get(name, [])
        for wrong in (
            ["--run", "missing"], ["--run", "text"], ["--run", "exported"], ["--run", "a_folder"],
            [*RUN, "--data", "missing.npz"], [*RUN, "--data", "garbage.npz"], [*RUN, "--data", "text"],
            [*RUN, "--data", "a_folder"], [*RUN, "--data", "no_images.npz"], [*RUN, "--data", "other_size.npz"],
            [*RUN, "--device", "nonsense"], [*RUN, "--device", "cuda:99"], [*RUN, "--weights", "long"],
            [*RUN, "--simulated", "--data", "data.npz"], [*RUN, "--out", "text/x.json"],
            [*RUN, "--custom", "missing.py"],
        ):  # fmt: skip
            yield name, [*wrong, *own]
        if name != "gallery":
            yield name, ["--pretrained", "--weights", "../quick"]


COMMANDS = [
    *of_queries(),
    ("evaluate", [*RUN, "--out", "m.txt"]),
    ("evaluate", [*RUN, "--n-seen", "3"]),
    ("evaluate", [*RUN, "--data", "short.npz", "--n-seen", "2"]),
    ("generate", [*RUN, "--n-seen", "6", *OUT], "--n-seen"),
    ("generate", [*RUN, "--n-seen", "5", "--n-frames", "5", *OUT]),
    ("generate", [*RUN, "--data", "short.npz", "--n-seen", "4", *OUT], "--n-seen"),
    ("interpolate", [*RUN, "--n-seen", "3", *OUT]),
    ("interpolate", [*RUN, "--n-seen", "16", *OUT], "--n-seen"),
    ("interpolate", [*RUN, "--data", "short.npz", "--n-seen", "2", *OUT]),
    ("to_arviz", [*RUN, "--n-seen", "6", *OUT]),
    ("to_arviz", [*RUN, "--n-samples", "0", *OUT], "--n-samples is 0"),
    ("infer", [*RUN, "--scale", "0", *OUT]),
    ("gallery", ["--docs", "--out", "new"]),
    ("latent_space", [*RUN, "--out", "x.json"]),
    ("simulate", ["--out", "x.png"]),
    ("simulate", ["--out", "text/x.npz", "--n-sequences", "2"]),
    ("simulate", ["--n-objects"]),
    ("simulate", ["--height", "2", "--width", "2"]),
    ("simulate", ["--radius", "40"]),
    ("simulate", ["--n-sequences", "100000000"]),
    ("simulate", ["--world", "drift", "config:bouncing-config"]),
    ("simulate", ["--world", "nonsense"], "no world 'nonsense'"),
    ("simulate", ["--custom", "missing.py"]),
    ("simulate", ["--custom", CUSTOM], "adds the guide 'centroid', but no world"),
    ("simulate", ["config:cannonball-config", "--config.gravity", "nan"], "gravity is nan"),
    ("simulate", ["config:cannonball-config", "--config.gravity", "1e300"], "gravity is 1e+300"),
    ("simulate", ["config:drift-config", "--config.look.salt-and-pepper", "1.5"], "salt_and_pepper is 1.5"),
    ("simulate", ["config:drift-config", "--config.exit", "0.9", "0.1"], "exit is (0.9, 0.1)"),
    ("simulate", ["config:no-config"], "config:no-config"),
    ("prepare", ["missing.gif", "--out", "new.npz"]),
    ("prepare", ["text", "--out", "new.npz"]),
    ("prepare", ["a_folder", "--out", "new.npz"]),
    ("prepare", ["garbage.npz", "--out", "new.npz"]),
    ("prepare", ["data.npz", "--out", "data.npz"]),
    ("prepare", ["data.npz", "--out", "new.txt"]),
    ("prepare", ["data.npz", "--out", "text/new.npz"]),
    ("prepare", ["--grey=maybe", "--out", "new.npz"]),
    ("prepare", []),
    ("quickstart", ["--run", "text"]),
    ("quickstart", ["--run", "new", "--data", "missing.npz"]),
    ("quickstart", ["--run", "new", "--data", "no_images.npz"]),
    ("quickstart", ["--run", "new", "--device", "nonsense"]),
    ("train", ["--run", "run"]),
    ("train", ["--run", "text"]),
    ("train", ["--run", "new", "--guide", "nonsense"]),
    ("train", ["--run", "new", "--likelihood", "nonsense"]),
    ("train", ["--run", "new", "--world", "nonsense"], "no world 'nonsense'"),
    ("train", ["--run", "new", "--custom", "missing.py"]),
    ("train", ["--run", "new", "--custom", CUSTOM, "--guide", "structured"], "would use none of these"),
    ("train", ["--run", "new", "--device", "nonsense"]),
    ("train", ["--run", "new", "--data", "missing.npz"]),
    ("train", ["--run", "new", "--data", "garbage.npz"]),
    ("train", ["--run", "new", "--data", "data.npz", "--world", "drift"]),
    ("train", ["--run", "new", "--data", "data.npz", "--n-sequences", "3"]),
    ("train", ["--run", "new", "--guide", "recurrent", "--clutter", "0.1"]),
    ("train", ["--run", "new", "--seeds", "2", "--starts", "2"]),
    ("train", ["--run", "new", "--n-sequences", "100000000"]),
    ("train", ["--run", "missing", "--resume"]),
    ("train", ["--run", "text", "--resume"]),
    ("train", [*RUN, "--resume", "--guide", "attentive"]),
    ("train", [*RUN, "--resume", "--seed", "5"]),
    ("train", [*RUN, "--resume", "--data", "data.npz"]),
    ("teach", ["--teacher", "missing", *OUT]),
    ("teach", ["--teacher", "run", "--out", "run"]),
    ("teach", ["--teacher", "run", "--out", "text"]),
    ("teach", ["--teacher", "run", *OUT, "--guide", "nonsense"]),
    ("teach", ["--teacher", "run", *OUT, "--data", "missing.npz"]),
    ("teach", ["--teacher", "run", *OUT, "--data", "other_size.npz"]),
    ("teach", ["--teacher", "run", "--out", "missing", "--resume"]),
    ("export_pretrained", ["--run", "missing", "--folder", "new"]),
    ("export_pretrained", [*RUN, "--folder", "new"]),
    ("export_pretrained", [*RUN, "--folder", "new", "--name", "../../escaped"], "--name is"),
    ("export_pretrained", [*RUN, "--folder", ".", "--name", "run"]),
    ("compare_guides", ["--guides", "nonsense", "--custom", CUSTOM, *OUT], "no guide 'nonsense'"),
    ("compare_guides", ["--custom", "missing.py", *OUT]),
    ("compare_guides", ["--custom", "text", *OUT]),
    ("compare_guides", ["--device", "nonsense", *OUT]),
    ("compare_guides", ["--out", "text"]),
    ("other_worlds", ["--cases", "nonsense", *OUT]),
    ("other_worlds", ["--device", "nonsense", *OUT]),
    ("other_worlds", ["--json", "text", *OUT]),
    ("other_worlds", ["--out", "text"]),
    ("sweep", ["--job", "nonsense/0", *OUT]),
    ("sweep", ["--job", "quick/x", *OUT]),
    ("sweep", ["--job", "quick/-1", *OUT]),
    ("sweep", ["--device", "nonsense", *OUT]),
    ("sweep", ["--out", "text"]),
    ("sweep", ["--json", "text/x.json", *OUT]),
    ("sweep_recurrent", ["--job", "nonsense/0", *OUT]),
    ("sweep_recurrent", ["--job", "recurrent/x", *OUT]),
    ("sweep_recurrent", ["--only", "nonsense", *OUT]),
    ("sweep_recurrent", ["--device", "nonsense", *OUT]),
    ("sweep_recurrent", ["--out", "text"]),
    ("train_edlstm", ["--run", "run"]),
    ("train_edlstm", ["--run", "text"]),
    ("train_edlstm", ["--run", "new", "--data", "missing.npz"]),
    ("train_edlstm", ["--run", "new", "--data", "short.npz"]),
    ("train_edlstm", ["--run", "new", "--device", "nonsense"]),
    ("train_edlstm", ["--run", "run", "--resume"]),
    ("train_edlstm", ["--run", "missing", "--resume"]),
    ("reproduce_paper", ["--docs", "missing"]),
    ("reproduce_paper", ["--docs", "a_folder"]),
    ("bench", ["--device", "nonsense", *OUT]),
    ("bench", ["--only", "nonsense"], "'nonsense'"),
    ("bench", ["--only", "step", "--page", "missing.md", *OUT]),
    ("gpu", ["--only", "nonsense"]),
    ("gpu", ["--device", "nonsense", "--runs", "new", "--results", "new"]),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c[0]}-{' '.join(c[1])}")
def test_a_wrong_command_is_one_line_and_nothing_is_written(command, place, monkeypatch):
    """A third entry is part of what is said."""
    name, line, *words = command
    monkeypatch.chdir(place)
    before, script = bad.tree(place), SCRIPTS[name]
    end = bad.run(line, script.main, script.Arguments, script.__doc__)
    assert end.code == 2, end
    assert end.is_one_line, end.said
    assert len(end.said) < 400
    assert all(word in end.said for word in words)
    assert bad.tree(place) == before


def interrupted(args):
    raise KeyboardInterrupt


def no_memory(args):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory\nmore lines")


def no_file(args):
    Path("missing/file").read_text()


def wrong_in_a_program(args):
    """To whose message Pyro adds the shapes of all sites."""

    def program():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        raise ValueError("wrong; do this")

    pyro.poutine.trace(program).get_trace()


@pytest.mark.parametrize(
    "main, code, said",
    [
        (wrong_in_a_program, 2, "error: wrong; do this\n"),
        (interrupted, 130, "stopped\n"),
        (no_memory, 1, "error: not enough memory;"),
        (no_file, 2, "error: missing/file: No such file or directory\n"),
    ],
)
def test_what_ends_a_script_on_its_way_is_one_line(main, code, said):
    end = bad.run([], main, SCRIPTS["train"].Arguments, None)
    assert end.code == code
    assert end.said.startswith(said)
    assert end.said.count("\n") == 1


def process_of(name, *line, cwd, path=()):
    folder = bad.scripts()[name].parent.relative_to(bad.ROOT).as_posix()
    module = ["-m", f"{folder}.{name}".replace("/", ".")]
    script = [str(bad.ROOT / folder / f"{name}.py")] if folder == "examples" else module
    path = os.pathsep.join([*map(str, path), str(bad.ROOT)])
    return subprocess.run(
        [sys.executable, *script, *line], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=False, preexec_fn=_as_from_a_terminal,
    )  # fmt: skip


def _as_from_a_terminal():
    """Ctrl-C is heeded, also where the tests run in the background and are deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("name, line", [
    ("train", ["--threads", "100000"]), ("sweep", ["--no-such-option"]), ("infer", ["--pretrained", "--data", "text"]),
], ids=str)  # fmt: skip
def test_processes_of_their_own_say_the_same(name, line, place):
    before, done = bad.tree(place), process_of(name, *line, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert bad.End(2, done.stderr).is_one_line, done.stderr
    assert bad.tree(place) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_script_starts_is_one_line(name, tmp_path):
    """In the import of torch, before which no script imports anything that takes long."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = process_of(name, "--help", cwd=tmp_path, path=[tmp_path])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_a_run_without_checksums_is_one_line_of_warning(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "old")
    (tmp_path / "old/checksums.json").unlink()
    done = process_of("infer", "--run", "old", "--n-sequences", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: old has no checksum, as in earlier versions: damage would go unnoticed\n"


VALID = [
    ("to_arviz", [*RUN, "--n-seen", "3", "--n-samples", "1", "--n-sequences", "1"]),
    ("generate", [*RUN, "--n-seen", "3", "--n-frames", "5", "--n-sequences", "4"]),
    ("interpolate", [*RUN, "--data", "short.npz", "--n-seen", "1"]),
]


@pytest.mark.parametrize("name, line", VALID, ids=[name for name, _ in VALID])
def test_small_numbers_that_are_valid(name, line, place, tmp_path, monkeypatch):
    """One draw of one sequence; fewer frames than the data have; short clips."""
    monkeypatch.chdir(place)
    script = SCRIPTS[name]
    end = bad.run([*line, "--out", str(tmp_path / "new")], script.main, script.Arguments, script.__doc__)
    assert end.code == 0, end
    assert list((tmp_path / "new").iterdir())
