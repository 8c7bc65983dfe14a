"""Guides, worlds and likelihoods from a file or a package: used by name, and refused when they have changed."""

from examples.experiments import export_pretrained, reproduce_paper

import json
import re
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import infer
import simulate as draw
import teach
import train
from pyro_pixels import custom
from pyro_pixels.custom import find, known_names, load_file
from pyro_pixels.data import save_sequences
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import (
    GUIDES,
    REGISTRIES,
    build,
    check_custom,
    load_config,
    load_pretrained,
    load_run,
    named,
    names_in,
)
from pyro_pixels.training.fitting import fit
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/other_worlds.md").read_text()
OWN_WORLD = re.search(r"^```python\n(# my_world\.py\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
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
def _files_are_forgotten():
    """As in a process of its own."""
    yield
    forget()


BUILT_IN = {kind: dict(registry) for kind, registry in REGISTRIES.items()}


def forget():
    for kind, registry in REGISTRIES.items():
        registry.clear()
        registry.update(BUILT_IN[kind])
    custom._loaded.clear()
    custom._imported.clear()


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
    with pytest.raises(ValueError, match=f"{folder} needs the definitions in {own}; if you trust that file"):
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
    load_file(own, REGISTRIES)
    load_file(other, REGISTRIES)
    with pytest.raises(ValueError, match=f"{folder} needs the definitions in {own}; if you trust that file"):
        load_run(folder)
    assert load_run(folder, custom=own).guide.scale == 0.1
    assert load_run(folder).guide.scale == 0.1
    load_file(other, REGISTRIES)
    assert build(replace(PRESETS["quick"], guide="nowhere")).guide.scale == 0.2


def test_a_guide_of_the_same_name_that_is_from_no_file_is_refused(trained):
    folder, own = trained
    GUIDES["nowhere"] = GUIDES["recurrent"]  # as a package or a line of the caller's program may do
    with pytest.raises(ValueError, match=f"{folder} needs the definitions in {own}"):
        load_run(folder)
    assert load_run(folder, custom=own).guide.scale == 0.1


def test_a_file_may_replace_a_built_in_guide_but_neither_is_taken_for_the_other(tmp_path):
    own = write(tmp_path / "own.py", name="recurrent")
    built_in = replace(PRESETS["quick"], guide="recurrent", state_size=8)
    custom = train.configure(train.Arguments(custom=own, threads=1))
    assert custom.guide == "recurrent"
    forget()
    with pytest.raises(ValueError, match=f"r needs the definitions in {own}"):
        check_custom(custom, "r", None)
    check_custom(built_in, "r", None)
    check_custom(custom, "r", own)
    assert type(build(custom).guide).__name__ == "Nowhere"
    with pytest.raises(ValueError, match=f"r names no file for its guide 'recurrent', .* that of {own}") as error:
        check_custom(built_in, "r", None)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="names no file for its guide"):
        load_pretrained("recurrent")
    check_custom(built_in, "r", own)  # the caller says that this run was trained with the file


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
    with pytest.raises(ValueError, match=f"names no file for its guide 'attentive', which would .* {own}"):
        teach.main(teach.Arguments(teacher=tmp_path / "r", out=tmp_path / "t", steps=1, progress=False))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is not a Python file"),
        ("x = 1\n", "adds no guide, world or likelihood"),
        ("import nothing_of_that_name\n", "fails: ModuleNotFoundError: No module named"),
        ("def f(:\n", "fails: SyntaxError"),
        (GUIDE.replace("NAME", "recurrent").replace("SCALE", "1.0") + "1 / 0\n", "fails: ZeroDivisionError"),
        ("raise SystemExit(0)\n", "fails: SystemExit: 0"),
    ],
)
def test_files_that_add_nothing(tmp_path, content, message):
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_file(path, REGISTRIES)
    assert "\n" not in str(error.value)
    assert REGISTRIES == BUILT_IN


def test_of_several_guides_one_is_chosen(tmp_path):
    own = write(tmp_path / "own.py", name="a")
    own.write_text(own.read_text() + '\nGUIDES["b"] = GUIDES["a"]\n')
    arguments = train.Arguments(custom=own, threads=1)
    with pytest.raises(ValueError, match=r"adds the guides \['a', 'b'\]; choose one with --guide"):
        train.configure(arguments)
    assert train.configure(replace(arguments, guide="b")).guide == "b"
    with pytest.raises(ValueError, match="adds the guides 'a', 'b', but the run would use none of these; leave out"):
        train.configure(replace(arguments, guide="structured"))


def test_installed_packages_announce_what_they_have(monkeypatch, tmp_path):
    write(tmp_path / "their_package.py", name="ignored")
    (tmp_path / "their_package.py").open("a").write(f"\nmake = GUIDES['ignored']\n{OWN_WORLD}")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("theirs", "their_package:make", "pyro_pixels.guides"),
              EntryPoint("friction", "their_package:FrictionConfig", "pyro_pixels.worlds"),
              EntryPoint("their_pixels", "their_package:LaplacePixels", "pyro_pixels" ".likelihoods"),
              EntryPoint("broken", "no_such_package:make", "pyro_pixels.guides")]  # fmt: skip

    def announced(group, name=None):
        return [p for p in points if p.group == group and name in (None, p.name)]

    monkeypatch.setattr(custom, "entry_points", announced)
    assert {"theirs", "broken", "structured"} <= set(known_names("guide", REGISTRIES))
    run = build(replace(PRESETS["quick"], guide="theirs", likelihood="their_pixels", state_size=8))
    assert (type(run.guide).__name__, type(run.model.likelihood).__name__) == ("Nowhere", "LaplacePixels")
    assert named("world", "friction")().kept == 0.9
    with pytest.raises(ValueError, match="'broken' is in no_such_package:make, which cannot be imported"):
        find("guide", "broken", REGISTRIES)
    with pytest.raises(ValueError, match=r"there is no guide 'nobody'; wanted one of \[.*'theirs'"):
        build(replace(PRESETS["quick"], guide="nobody"))


def test_the_example_is_such_a_file():
    names = load_file(ROOT / "examples/custom_guide.py", REGISTRIES).names
    assert names == {"guide": ("centroid",), "world": (), "likelihood": ()}


@pytest.fixture
def my_world(tmp_path, monkeypatch):
    """The file of docs/other_worlds.md; the quick preset is small."""
    quick = PRESETS["quick"]
    small = CannonballConfig(height=20, width=24, n_frames=6)
    monkeypatch.setitem(PRESETS, "quick", replace(quick, state_size=8, guide_state_size=8, data=small))
    path = tmp_path / "my_world.py"
    path.write_text(OWN_WORLD)
    return path


SMALL = {"n_sequences": 30, "steps": 2, "threads": 1, "progress": False}


def test_the_documented_world_and_likelihood_are_trained_and_read(my_world, tmp_path):
    folder, out = tmp_path / "r", tmp_path / "o"
    assert train.main(train.Arguments(run=folder, custom=my_world, **SMALL)) == 0
    forget()
    with pytest.raises(ValueError, match=f"{folder} needs the definitions in {my_world}; if you trust that file"):
        load_run(folder)
    assert infer.main(infer.Arguments(run=folder, out=out, n_sequences=3)) is None
    config = load_config(folder)
    assert (config.data.world, config.data.kept, config.likelihood) == ("friction", 0.9, "laplace")
    assert (config.data.width, config.guide, config.custom_file) == (24, "structured", str(my_world))
    assert type(load_run(folder).model.likelihood).__name__ == "LaplacePixels"
    forget()
    assert train.main(train.Arguments(run=folder, resume=True, steps=3, threads=1, progress=False)) == 0
    forget()
    my_world.write_text(my_world.read_text().replace("0.9", "0.8"))
    with pytest.raises(ValueError, match="has changed since") as error:
        infer.main(infer.Arguments(run=folder, out=out, n_sequences=3))
    assert "\n" not in str(error.value)


def test_a_run_that_names_no_file_is_read_with_custom(my_world, tmp_path):
    """As one that was trained in Python."""
    load_file(my_world, REGISTRIES)
    config = replace(PRESETS["quick"], data=named("world", "friction")(n_frames=6, height=20, width=20))
    run, folder = build(config), tmp_path / "w"
    schedule = replace(config.schedule.with_steps(2), batch_size=4)
    fit(
        run.model, run.guide, simulate(config.data, 12, seed=0), schedule, run_dir=folder, config=config, progress=False
    )
    forget()
    with pytest.raises(ValueError, match=r"there is no world 'friction'; wanted one of .* with --custom") as error:
        infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3))
    assert "\n" not in str(error.value)
    infer.main(infer.Arguments(run=folder, out=tmp_path / "o", n_sequences=3, custom=my_world))
    assert (tmp_path / "o/positions.npz").exists()


def test_a_world_of_the_same_name_from_another_file_is_refused(my_world, tmp_path):
    config = train.configure(train.Arguments(custom=my_world, threads=1))
    other = tmp_path / "other.py"
    other.write_text(my_world.read_text().replace("0.9", "0.8"))
    load_file(other, REGISTRIES)
    with pytest.raises(ValueError, match=f"r needs the definitions in {my_world}"):
        check_custom(config, "r")
    built_in = replace(config, custom_file=None, custom_sha256=None)
    with pytest.raises(ValueError, match=f"r names no file for its world 'friction', .* that of {other}"):
        check_custom(built_in, "r")


def test_what_a_file_adds_one_of_is_used_unless_another_is_named(my_world):
    write(my_world.with_name("guide.py"))
    my_world.write_text(my_world.read_text() + my_world.with_name("guide.py").read_text())

    def names(**options):
        return names_in(train.configure(train.Arguments(custom=my_world, **options)))

    assert names() == {"guide": "nowhere", "world": "friction", "likelihood": "laplace"}
    named = {"guide": "structured", "world": "drift"}
    assert names(**named) == {**named, "likelihood": "laplace"}
    assert names(data=Path("films.npz"))["world"] == "cannonballs"
    with pytest.raises(ValueError, match="the guide 'nowhere', the world 'friction', the likelihood 'laplace', but"):
        names(**named, likelihood="gaussian")
    with pytest.raises(ValueError, match=r"there is no world 'elsewhere'; wanted one of \['bouncing', .*'friction'\]"):
        names(world="elsewhere")


def test_a_taught_run_keeps_the_file_of_its_teachers_world(my_world, tmp_path):
    folder, guide = tmp_path / "r", write(tmp_path / "guide.py")
    assert train.main(train.Arguments(run=folder, custom=my_world, **SMALL)) == 0
    forget()
    both = tmp_path / "both.py"
    both.write_text(my_world.read_text() + guide.read_text())
    moved = my_world.rename(tmp_path / "moved.py")
    taught = teach.Arguments(teacher=folder, teacher_custom=moved, steps=1, progress=False)
    with pytest.raises(ValueError, match=f"the world 'friction' is from {moved}, and a run keeps one file; put both"):
        teach.main(replace(taught, out=tmp_path / "t", custom=guide))
    for own, expected in ((None, moved), (both, both)):
        forget()
        out = tmp_path / f"t_{expected.stem}"
        assert teach.main(replace(taught, out=out, custom=own)) == 0
        assert json.loads((out / "config.json").read_text())["custom_file"] == str(expected)


def test_the_paper_is_reproduced_with_a_guide_from_a_file(my_world, tmp_path):
    own, folder = write(tmp_path / "own.py"), tmp_path / "r"
    assert train.main(train.Arguments(run=folder, custom=own, **SMALL)) == 0
    assert train.main(train.Arguments(run=tmp_path / "w", custom=my_world, **SMALL)) == 0
    args = reproduce_paper.Arguments(run=folder, recurrent=folder, device="cpu")
    for moved in (False, True):
        forget()
        if moved:
            own = own.rename(tmp_path / "moved.py")
            for options, missing in (({}, "own.py"), ({"custom": own}, "own.py")):
                with pytest.raises(ValueError, match=rf"{missing}, which is gone; pass its new location with --custom"):
                    reproduce_paper.Reproduction(replace(args, **options))
            args = replace(args, custom=own, recurrent_custom=own)
        work = reproduce_paper.Reproduction(args)
        assert type(work.run.guide).__name__ == type(work.recurrent.guide).__name__ == "Nowhere"
    for name, option in (("custom", "run"), ("recurrent_custom", "recurrent")):
        with pytest.raises(ValueError, match=f"is for the run of --{option}, which is not given"):
            reproduce_paper.Reproduction(reproduce_paper.Arguments(**{name: own}, device="cpu"))
    with pytest.raises(ValueError, match=r"w was trained in the world 'friction', but .* cannonballs; give") as error:
        reproduce_paper.Reproduction(reproduce_paper.Arguments(run=tmp_path / "w", device="cpu"))
    assert "\n" not in str(error.value)


def test_a_run_with_a_guide_from_a_file_is_not_exported(trained, tmp_path):
    """`load_pretrained`, which executes no file, could not open it."""
    folder, own = trained
    for there in (True, False):
        with pytest.raises(ValueError, match=f"{folder} needs the definitions in {own}, which do not come") as error:
            export_pretrained.main(export_pretrained.Arguments(run=folder, folder=tmp_path / "weights", name="mine"))
        assert "\n" not in str(error.value)
        if there:
            own.unlink()
    assert not (tmp_path / "weights").exists()


def test_a_world_of_a_file_is_simulated(my_world, tmp_path):
    config = draw.configure(draw.Arguments(custom=my_world, height=40))
    assert (config.world, config.height, config.width) == ("friction", 40, 32)
    with pytest.raises(ValueError, match=r"guide.py adds the guide 'nowhere', but no world"):
        draw.configure(draw.Arguments(custom=write(tmp_path / "guide.py")))


MINE = """
@dataclass(frozen=True)
class Mine(FrictionConfig):
    world: str = field(default="mine", init=False)
"""


@pytest.mark.parametrize(
    "content, message",
    [
        ("WORLDS['mine'] = FrictionConfig", "is the class FrictionConfig, whose field world is 'friction'; wanted"),
        ("WORLDS['mine'] = FrictionConfig()", "wanted a subclass of WorldConfig with a method move"),
        ("WORLDS['mine'] = WorldConfig", "wanted a subclass of WorldConfig with a method move"),
        (
            "class Mine(FrictionConfig):\n    world = 'mine'\nWORLDS['mine'] = Mine",
            "wanted a frozen dataclass",
        ),
        (
            f"{MINE}    pull: float = field(kw_only=True)\nWORLDS['mine'] = Mine",
            "the world 'mine' of .*my_world.py cannot be made of .*height, width alone .TypeError: .*'pull'.*defaults",
        ),
        (
            f"{MINE}    def __post_init__(self):\n        {{}}[1]\nWORLDS['mine'] = Mine",
            "the world 'mine' of .*my_world.py cannot be made of .* alone .KeyError: 1.; give its other fields",
        ),
    ],
)
def test_what_is_no_world_is_refused_in_one_line(my_world, content, message):
    my_world.write_text(f"{my_world.read_text()}\n{content}\n")
    for script in (train, draw):
        with pytest.raises(ValueError, match=message) as error:
            script.configure(script.Arguments(custom=my_world, world="mine"))
        assert "\n" not in str(error.value)


WANTED = {
    "guide": "wanted a function of config and model that returns a Guide",
    "likelihood": "wanted a class or function without arguments that makes a PixelLikelihood",
}
NO_FACTORIES = [
    ("guide", "lambda config, model: None", "makes a NoneType"),
    ("guide", "lambda config, model: Guide", "makes a ABCMeta"),
    ("guide", "lambda config: None", r"fails: TypeError: <lambda>\(\) takes 1 positional argument but 2 were given"),
    ("guide", "lambda config, model: {}[1]", "fails: KeyError: 1"),
    ("guide", "nn.Linear", "fails: TypeError"),
    ("guide", "nn.Linear(1, 1)", "is a Linear"),
    ("guide", "nn", "is a module"),
    ("likelihood", "nn.Linear(1, 1)", "is a Linear"),
    ("likelihood", "lambda: None", "makes a NoneType"),
    ("likelihood", "lambda logits: None", "fails: TypeError"),
]


@pytest.mark.parametrize("from_package", [False, True])
@pytest.mark.parametrize("kind, factory, message", NO_FACTORIES)
def test_what_makes_no_guide_or_likelihood_is_refused_in_one_line(
    tmp_path, monkeypatch, kind, factory, message, from_package
):
    own = tmp_path / "their_factories.py"
    imports = "from torch import nn\nfrom pyro_pixels.guides.base import Guide\nfrom pyro_pixels.runs import REGISTRIES"
    own.write_text(f"{imports}\nmine = {factory}\n" + ("" if from_package else f"REGISTRIES['{kind}']['x'] = mine\n"))
    if from_package:
        point = EntryPoint("x", f"{own.stem}:mine", f"pyro_pixels.{kind}s")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, own.stem, raising=False)
        monkeypatch.setattr(custom, "entry_points", lambda group, **_: [point] if group == point.group else [])
    else:
        load_file(own, REGISTRIES)
    origin = f"{own.stem}:mine" if from_package else str(own)
    with pytest.raises(ValueError, match=f"^the {kind} 'x' of {origin} {message}.*; {WANTED[kind]}$") as error:
        build(replace(PRESETS["quick"], **{kind: "x"}, state_size=8))
    assert "\n" not in str(error.value)


def test_a_factory_of_the_callers_program_fails_with_its_own_error(monkeypatch):
    monkeypatch.setitem(GUIDES, "x", lambda config, model: {}[1])
    with pytest.raises(KeyError):
        build(replace(PRESETS["quick"], guide="x", state_size=8))
    monkeypatch.setitem(GUIDES, "x", lambda config, model: None)
    with pytest.raises(ValueError, match=r"^the guide 'x' makes a NoneType; wanted a function"):
        build(replace(PRESETS["quick"], guide="x", state_size=8))
