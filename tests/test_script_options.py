"""Options of the scripts: what is refused, what the defaults are, and which sequences a run is asked about."""

import _common
from examples.experiments import (
    _suites,
    export_pretrained,
    latent_space,
    sweep,
    sweep_recurrent,
    switches,
    train_edlstm,
)

import csv
import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ask
import evaluate
import gallery
import generate
import infer
import interpolate
import quickstart
import simulate
import teach
import to_arviz
import train
from pyro_pixels._options import check_options, refuse_changes, result_file
from pyro_pixels.data import ImageSequences, load_sequences, save_sequences
from pyro_pixels.presets import PRESETS
from pyro_pixels.run_sequences import run_sequences, sequences_to_ask
from pyro_pixels.runs import load_config, load_pretrained
from pyro_pixels.worlds.base import simulate as draw_sequences
from pyro_pixels.worlds.cannonballs import CannonballConfig
from pyro_pixels.worlds.others import DriftConfig

ROOT = Path(__file__).parent.parent
SMALL = CannonballConfig(height=20, width=24, n_frames=12)
SCRIPTS = (
    evaluate, gallery, generate, infer, interpolate, quickstart, simulate, sweep, teach, to_arviz, train, train_edlstm,
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "mine.npz"
    save_sequences(path, draw_sequences(SMALL, 30, seed=0))
    return path


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    """A run of two steps on the file."""
    folder = tmp_path_factory.mktemp("run") / "r"
    assert train.main(train.Arguments(run=folder, data=file, steps=2, threads=1, progress=False)) == 0
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_defaults_are_within_bounds_and_numbers_beyond_are_refused(script):
    check_options(script.Arguments())
    for name in ("seed", "n_samples", "threads", "n_sequences"):
        if name not in {field.name for field in dataclasses.fields(script.Arguments)}:
            continue
        for wrong in (-1, 10**20, 1.5):
            with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} is {wrong}; wanted a .*\d$"):
                check_options(script.Arguments(**{name: wrong}))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_every_option_says_what_it_does(script):
    """As a sentence below each field, which is what --help prints."""
    source = Path(script.__file__).read_text()
    body = source[source.index("class Arguments") :]
    for field in script.Arguments.__annotations__:
        described = body.split(f"\n    {field}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert described.startswith('"""'), field
        assert described.split('"""')[1].strip().endswith("."), field


def test_options_of_another_run_are_refused(tmp_path):
    args = train.Arguments(guide="attentive", seed=0)
    refuse_changes(args, {"guide": "attentive", "seed": 7}, tmp_path)  # the default is no option that is given
    with pytest.raises(ValueError, match=r"--guide is attentive, but the run in .* was trained with structured"):
        refuse_changes(args, {"guide": "structured"}, tmp_path)


@pytest.mark.parametrize(
    "script", [ask, evaluate, gallery, generate, infer, interpolate, latent_space, switches, teach, to_arviz],
    ids=lambda module: module.__name__,
)  # fmt: skip
def test_options_of_a_run_are_refused_with_the_weights_of_the_package(script, tmp_path):
    of_run = {"custom": "own.py", "run": "mine"}
    options = {"teacher_custom": "own.py", "teacher": "mine"} if script is teach else of_run
    if script is gallery:  # which takes the run if one is named
        del options["run"]
    for name, value in options.items():
        out = {} if script in (evaluate, latent_space) else {"out": tmp_path / "o"}
        args = script.Arguments(pretrained=True, device="cpu", **{name: Path(value)}, **out)
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=rf"^{option} {value} is for a run .*; leave {option} out") as error:
            script.main(args)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_results_overwrite_neither_their_input_nor_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"does not end in .npz"):
        simulate.main(simulate.Arguments(out=tmp_path / "x.png"))
    with pytest.raises(ValueError, match="would be overwritten"):
        result_file(tmp_path / "a.json", ".json", tmp_path / "." / "a.json")
    with pytest.raises(ValueError, match="would be overwritten"):
        export_pretrained.main(export_pretrained.Arguments(run=tmp_path / "r", folder=tmp_path, name="r"))
    with pytest.raises(ValueError, match=r"does not end in .png"):
        latent_space.main(latent_space.Arguments(out=tmp_path / "x.json"))


def test_plain_options_describe_a_world_and_its_configuration_still_does():
    args = simulate.Arguments(world="drift", height=20, n_frames=12, n_objects=(1, 2))
    assert simulate.configure(args) == DriftConfig(height=20, width=32, n_frames=12, n_objects=(1, 2))
    assert simulate.configure(simulate.Arguments()) == CannonballConfig(height=32, width=32)
    drift = DriftConfig(exit=(0.5, 1.0))
    assert simulate.configure(simulate.Arguments(config=drift, width=40)) == replace(drift, width=40)
    with pytest.raises(ValueError, match="--world bouncing contradicts"):
        simulate.configure(simulate.Arguments(config=drift, world="bouncing"))


@pytest.mark.parametrize("world", ["cannonball", "drift", "bouncing"])
def test_images_are_as_large_whether_a_world_is_configured_or_not(world, monkeypatch):
    monkeypatch.setattr("sys.argv", ["simulate.py", f"config:{world}-config", "--config.radius", "1.5"])
    config = simulate.configure(_common.parse(simulate.Arguments, None))
    assert (config.height, config.width, config.radius) == (32, 32, 1.5)


def test_errors_that_need_a_single_object_are_explained(tmp_path, capsys):
    data = draw_sequences(replace(load_pretrained().config.data, n_frames=8), 6, seed=0)
    for name, some, wanted in (("two", data.n_objects > 1, True), ("all", data.n_objects > 0, False)):
        save_sequences(tmp_path / f"{name}.npz", data[some.nonzero().squeeze(1)])
        arguments = evaluate.Arguments(pretrained=True, data=tmp_path / f"{name}.npz", out=tmp_path / "m.json")
        evaluate.main(arguments)
        assert ("errors in pixels need sequences with N = 1" in capsys.readouterr().out) == wanted


def test_contradicting_options_of_training_are_refused(file, tmp_path):
    for wrong, words in (
        ({"data": file, "world": "drift"}, "--world drift is for simulated sequences"),
        ({"data": file, "n_sequences": 9}, "--n-sequences 9 is for simulated sequences"),
        ({"guide": "recurrent", "clutter": 0.01}, "the guide 'recurrent' has no clutter parameter"),
        ({"run": file}, "cannot write"),
    ):
        with pytest.raises(ValueError, match=words):
            train.main(train.Arguments(**{"run": tmp_path / "r", "steps": 2, "progress": False, **wrong}))


def test_a_file_that_is_no_folder_is_told_before_anything_is_simulated(file, monkeypatch):
    def simulated(*_args, **_options):
        raise AssertionError("sequences were simulated first")

    monkeypatch.setattr("pyro_pixels.run_sequences.simulate", simulated)
    with pytest.raises(ValueError, match="cannot write"):
        train.main(train.Arguments(run=file))


def test_resuming_refuses_what_the_run_was_not_trained_with(trained, file, tmp_path):
    (tmp_path / "other.npz").write_bytes(file.read_bytes())
    for wrong in ({"guide": "attentive"}, {"seed": 5}, {"likelihood": "gaussian"}, {"data": tmp_path / "other.npz"}):
        with pytest.raises(ValueError, match="leave the option out to continue"):
            train.main(train.Arguments(run=trained, resume=True, progress=False, **wrong))
    assert train.main(train.Arguments(run=trained, resume=True, progress=False, data=file, steps=2)) == 0


def test_fewer_steps_shorten_the_schedule_and_it_is_said():
    config = train.configure(train.Arguments(steps=300))
    assert config.schedule == PRESETS["quick"].schedule.shortened(300)
    assert "from 1,000 steps to 300, in proportion" in train.steps_note(train.Arguments(steps=300))
    assert train.steps_note(train.Arguments(steps=1_000)) == train.steps_note(train.Arguments()) == ""
    assert "added at the end" in train.steps_note(train.Arguments(steps=1_500))


def test_what_is_held_out_is_kept_in_the_run_and_asked_about(trained, file):
    config = load_config(trained)
    assert (config.n_sequences, config.n_held_out) == (30, 3)
    split, data = run_sequences(config), load_sequences(file)
    assert (len(split.training), len(split.held_out)) == (27, 3)
    found, source, where, first = sequences_to_ask(config, None, 60, 0)
    assert (where, first) == (file, 27)
    assert np.array_equal(found.images, data.images[27:])
    assert "3 held-out sequences of" in source
    assert "(27 to 29, counted from 0)" in source
    assert len(sequences_to_ask(config, file, 60, 0, trained_on_too=False).data) == 3
    everything, source, where, first = sequences_to_ask(config, file, 20, 0)
    assert (where, first) == (file, 0)
    assert len(everything) == 20
    assert "the first 20 of 30 sequences in" in source
    assert "trained on 27" in source
    assert "5 simulated sequences" in sequences_to_ask(config, None, 5, 0, simulated=True).source


@pytest.mark.parametrize(
    "script, table",
    [(infer, "tracks.csv"), (generate, "generation.csv"), (interpolate, "interpolation.csv")],
    ids=["infer", "generate", "interpolate"],
)
def test_a_file_that_is_named_is_queried_whole(script, table, trained, tmp_path):
    data = draw_sequences(replace(SMALL, n_objects=(1,)), 70, seed=1)
    np.savez(tmp_path / "long.npz", images=data.images, n_objects=data.n_objects)
    for n_sequences, n in ((None, 70), (2, 2)):
        args = script.Arguments(
            run=trained, data=tmp_path / "long.npz", n_sequences=n_sequences, out=tmp_path, device="cpu"
        )
        script.main(args)
        rows = list(csv.DictReader((tmp_path / table).open()))
        assert {int(row["sequence"]) for row in rows} == set(range(n))


def test_of_other_sequences_60_are_queried(trained, monkeypatch):
    config = load_config(trained)
    assert len(sequences_to_ask(config, None, None, 0, simulated=True).data) == 60
    monkeypatch.setattr("pyro_pixels.run_sequences.ASKED", 2)
    found, source, _, first = sequences_to_ask(config, None, None, 0)
    assert (len(found), first) == (2, 27)
    assert source.startswith("the first 2 of 3 held-out sequences of")
    assert source.endswith("(27 to 28, counted from 0)")


def test_a_run_that_held_nothing_out_asks_for_sequences(trained):
    config = replace(load_config(trained), n_held_out=0)
    with pytest.raises(ValueError, match=r"no sequences of .* were held out of training; give others with --data"):
        sequences_to_ask(config, None, 60, 0)
    with pytest.raises(ValueError, match="give --trained-on-too to use those that this run was trained on"):
        sequences_to_ask(config, Path(config.data_file), 60, 0, trained_on_too=False)


def test_a_film_given_as_data_is_sent_to_prepare(tmp_path, trained):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no zip file")
    for path in (film, tmp_path):
        for main, args in ((train.main, train.Arguments(run=tmp_path / "r", data=path)),
                           (infer.main, infer.Arguments(run=trained, data=path, device="cpu"))):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{path} is not an .npz .* convert it with examples/prepare.py"):
                main(args)


def test_the_folder_of_several_runs_is_not_taken_for_an_untrained_one(trained):
    with pytest.raises(ValueError, match=f"there is no run in {trained.parent} .*; give one of its .* as {trained}$"):
        infer.main(infer.Arguments(run=trained.parent, device="cpu"))


def test_training_warns_of_grey_images_under_the_bernoulli_likelihood(file, tmp_path, capsys):
    data = load_sequences(file)
    images = data.images.float()
    images[0, -1] = torch.nan  # black and white, with an unobserved frame
    for name, x in (("white", images), ("grey", images * 0.5)):
        save_sequences(tmp_path / f"{name}.npz", ImageSequences(x, data.n_objects))
    warned = []
    for name, likelihood in (("white", "bernoulli"), ("grey", "bernoulli"), ("grey", "gaussian")):
        args = train.Arguments(run=tmp_path / "r", data=tmp_path / f"{name}.npz", likelihood=likelihood)
        train.make_job(args, 0, torch.device("cpu")).introduce()
        warned.append("! images are grey, but the likelihood is bernoulli" in capsys.readouterr().out)
    assert warned == [False, True, False]


def test_a_run_on_a_file_is_measured_on_what_was_held_out(trained, file, tmp_path, capsys):
    for options in ({}, {"data": file}):
        evaluate.main(evaluate.Arguments(run=trained, out=tmp_path / "m.json", device="cpu", **options))
        assert "3 held-out sequences of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="contradict each other"):
        evaluate.main(evaluate.Arguments(run=trained, data=file, simulated=True, out=tmp_path / "m.json"))


def test_the_quickstart_draws_what_was_held_out_of_a_file(file, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(quickstart, "draw", lambda run, shown, *_: drawn.append(shown) or [])
    save_sequences(tmp_path / "few.npz", load_sequences(file)[:9])
    for data in (file, tmp_path / "few.npz"):
        quickstart.main(quickstart.Arguments(run=tmp_path / data.stem, data=data, steps=2, device="cpu"))
    assert [(len(shown.data), shown.first) for shown in drawn] == [(3, 27), (9, 0)]  # few have none held out
    assert np.array_equal(drawn[0].data.images, load_sequences(file).images[27:])


def test_pictures_of_the_gallery_do_not_land_on_tracked_files():
    assert gallery.Arguments().home == Path("runs/pretrained")
    with pytest.raises(ValueError, match="--docs and --out"):
        gallery.main(gallery.Arguments(docs=True, out=Path("g")))


def test_ablations_have_the_names_of_their_tables_and_results_and_each_changes_something():
    own = sweep_recurrent.variants(sweep_recurrent.Arguments(suite="ablation"))
    page = (ROOT / "docs/learning.md").read_text()
    table = re.search(r"<!-- begin table 4 -->\n(.*?)<!-- end table 4 -->", page, re.DOTALL)[1]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert ["recurrent", *rows[1:]] == list(own)
    of_quick = _suites.ablation()
    for configs, results in ((own, "recurrent_ablation"), (of_quick, "sweeps")):
        found = json.loads((ROOT / f"docs/results/{results}.json").read_text())
        assert list(found.get("ablation", found)["variants"]) == list(configs)
        names = list(configs)
        assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if configs[a] == configs[b]]
