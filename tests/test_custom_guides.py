"""Guides from a user's file or an installed package: trained and read by name, refused when they have changed."""

import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import infer
import teach
import train
from pyro_pixels import custom_guides, runs
from pyro_pixels.custom_guides import find_guide, guide_names, load_guides
from pyro_pixels.data import save_sequences
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import GUIDES, build, load_config, load_pretrained, load_run, use_custom_guide
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

GUIDE = """
import pyro.distributions as dist
import torch
from torch import nn
from pyro_pixels.guides.base import Guide
from pyro_pixels.runs import GUIDES

class Nowhere(Guide):
    def __init__(self, scale):
        super().__init__()
        self.mu, self.scale = nn.Parameter(torch.zeros(2)), scale

    def encode(self, images, n_objects):
        shape = (len(images), int(n_objects.max()), images.shape[1], 2)
        return dist.Normal(self.mu.expand(shape), self.scale).to_event(2)

GUIDES["NAME"] = lambda config, model: Nowhere(SCALE)
"""


@pytest.fixture(autouse=True)
def _guides_are_forgotten():
    """As in a process of its own."""
    yield
    forget()


BUILT_IN = dict(GUIDES)


def forget():
    GUIDES.clear()
    GUIDES.update(BUILT_IN)
    custom_guides._loaded.clear()


def write(path, name="nowhere", scale=0.1):
    path.write_text(GUIDE.replace("NAME", name).replace("SCALE", str(scale)))
    return path


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("custom") / "data.npz"
    save_sequences(path, simulate(CannonballConfig(height=12, width=12, n_frames=12, radius=1.5), 30, seed=0))
    return path


@pytest.fixture
def trained(data_file, tmp_path):
    """A run trained with a guide from a file, in a process that has forgotten it since."""
    own = write(tmp_path / "infer.py")  # called as a script is
    arguments = train.Arguments(run=tmp_path / "r", data=data_file, steps=2, threads=1, progress=False, custom=own)
    assert train.main(arguments) == 0
    forget()
    return tmp_path / "r", own


def test_a_run_keeps_the_file_of_its_guide_and_is_read_with_it(trained, tmp_path):
    folder, own = trained
    config = load_config(folder)
    assert (config.guide, config.custom_file) == ("nowhere", str(own))
    assert len(config.custom_sha256) == 64
    infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3))
    assert (tmp_path / "o/positions.npz").exists()
    assert load_run(folder, custom=own).guide.scale == 0.1
    assert sys.modules["infer"] is infer


def test_reading_a_run_runs_no_file_unless_it_is_named(trained):
    folder, own = trained
    with pytest.raises(ValueError, match=f"'nowhere' of {folder} is defined in {own}; if you trust that file"):
        load_run(folder)
    assert "nowhere" not in GUIDES


def test_a_changed_file_is_refused_in_one_line_and_a_moved_one_is_found(trained, tmp_path):
    folder, own = trained
    moved = tmp_path / "elsewhere.py"
    moved.write_text(own.read_text())
    write(own, scale=0.2)
    with pytest.raises(ValueError, match=r"changed since .*; restore it, pass .*--custom.*, or train again") as error:
        infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has changed since"):
        train.main(train.Arguments(run=folder, resume=True, steps=3, threads=1, progress=False))
    own.unlink()
    with pytest.raises(ValueError, match=r"is gone; pass its new location with --custom"):
        infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3))
    infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3, custom=moved))
    assert train.main(train.Arguments(run=folder, resume=True, steps=3, threads=1, progress=False, custom=moved)) == 0


def test_of_two_files_with_a_guide_of_one_name_the_runs_own_is_used(trained, tmp_path):
    folder, own = trained
    other = write(tmp_path / "other.py", scale=0.2)
    load_guides(own, GUIDES)
    load_guides(other, GUIDES)
    with pytest.raises(ValueError, match=f"'nowhere' of {folder} is defined in {own}; if you trust that file"):
        load_run(folder)
    assert load_run(folder, custom=own).guide.scale == 0.1
    assert load_run(folder).guide.scale == 0.1
    load_guides(other, GUIDES)
    assert build(replace(PRESETS["quick"], guide="nowhere")).guide.scale == 0.2


def test_a_guide_of_the_same_name_that_is_from_no_file_is_refused(trained):
    folder, own = trained
    GUIDES["nowhere"] = GUIDES["recurrent"]  # as a package or a line of the caller's program may do
    with pytest.raises(ValueError, match=f"'nowhere' of {folder} is defined in {own}"):
        load_run(folder)
    assert load_run(folder, custom=own).guide.scale == 0.1


def test_a_file_may_replace_a_built_in_guide_but_neither_is_taken_for_the_other(tmp_path):
    own = write(tmp_path / "own.py", name="recurrent")
    built_in = replace(PRESETS["quick"], guide="recurrent", state_size=8)
    custom = train.configure(train.Arguments(custom=own, threads=1))
    assert custom.guide == "recurrent"
    forget()
    with pytest.raises(ValueError, match=f"'recurrent' of r is defined in {own}"):
        use_custom_guide(custom, "r", None)
    use_custom_guide(built_in, "r", None)
    use_custom_guide(custom, "r", own)
    assert type(build(custom).guide).__name__ == "Nowhere"
    with pytest.raises(ValueError, match=f"r names no file .* 'recurrent' would now be that of {own}") as error:
        use_custom_guide(built_in, "r", None)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="names no file of guides"):
        load_pretrained("recurrent")
    use_custom_guide(built_in, "r", own)  # the caller says that this run was trained with the file


def test_a_guide_from_a_file_is_taught(trained, tmp_path):
    folder, _ = trained
    other = write(tmp_path / "other.py", name="other")
    assert teach.main(teach.Arguments(teacher=folder, out=tmp_path / "t", custom=other, steps=1, progress=False)) == 0
    assert json.loads((tmp_path / "t/config.json").read_text())["custom_file"] == str(other)


def test_a_teachers_file_does_not_replace_the_guide_that_is_taught(data_file, tmp_path):
    own = write(tmp_path / "own.py", name="attentive")
    arguments = train.Arguments(run=tmp_path / "r", data=data_file, steps=1, threads=1, progress=False, custom=own)
    assert train.main(arguments) == 0
    forget()
    with pytest.raises(ValueError, match=f"names no file of guides, but its guide 'attentive' would .* {own}"):
        teach.main(teach.Arguments(teacher=tmp_path / "r", out=tmp_path / "t", steps=1, progress=False))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is not a Python file"),
        ("x = 1\n", "adds no guide"),
        ("import nothing_of_that_name\n", "fails: ModuleNotFoundError: No module named"),
        ("def f(:\n", "fails: SyntaxError"),
        (GUIDE.replace("NAME", "recurrent").replace("SCALE", "1.0") + "1 / 0\n", "fails: ZeroDivisionError"),
    ],
)
def test_files_that_add_no_guide(tmp_path, content, message):
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_guides(path, GUIDES)
    assert "\n" not in str(error.value)
    assert GUIDES == BUILT_IN


def test_of_several_guides_one_is_chosen(tmp_path):
    own = write(tmp_path / "own.py", name="a")
    own.write_text(own.read_text() + '\nGUIDES["b"] = GUIDES["a"]\n')
    arguments = train.Arguments(custom=own, threads=1)
    with pytest.raises(ValueError, match=r"adds the guides \['a', 'b'\]; choose one with --guide"):
        train.configure(arguments)
    assert train.configure(replace(arguments, guide="b")).guide == "b"
    with pytest.raises(ValueError, match="no guide 'structured'; leave out --guide or --custom"):
        train.configure(replace(arguments, guide="structured"))


def test_installed_packages_announce_guides(monkeypatch, tmp_path):
    write(tmp_path / "their_package.py", name="ignored")
    (tmp_path / "their_package.py").open("a").write("\nmake = GUIDES['ignored']\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("theirs", "their_package:make", custom_guides.GROUP),
              EntryPoint("broken", "no_such_package:make", custom_guides.GROUP)]  # fmt: skip

    def announced(group, name=None):
        assert group == "pyro_pixels.guides"
        return [p for p in points if name in (None, p.name)]

    monkeypatch.setattr(custom_guides, "entry_points", announced)
    assert {"theirs", "broken", "structured"} <= set(guide_names(GUIDES))
    run = build(replace(PRESETS["quick"], guide="theirs", state_size=8))
    assert type(run.guide).__name__ == "Nowhere"
    with pytest.raises(ValueError, match="'broken' is in no_such_package:make, which cannot be imported"):
        find_guide("broken", GUIDES)
    with pytest.raises(ValueError, match=r"there is no guide 'nobody'; wanted one of \[.*'theirs'"):
        build(replace(PRESETS["quick"], guide="nobody"))
    assert runs.GUIDES is GUIDES


def test_the_example_is_such_a_file():
    root = Path(__file__).parent.parent
    assert load_guides(root / "examples/custom_guide.py", GUIDES).names == ("centroid",)
