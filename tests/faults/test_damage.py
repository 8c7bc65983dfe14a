"""Flipped bits and truncations of every file of a run and of packaged weights: refused, or without effect."""

import random
import shutil

import pytest
import torch
from tiny import DATA, assert_same_outcome, damage, outcome_of, train, with_schedule

from pyro_pixels import runs
from pyro_pixels._checksums import read_json, write_json
from pyro_pixels.run_figures import Snapshots
from pyro_pixels.runs import export_weights, load_config, load_pretrained, load_run

FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checksums.json", "snapshots.npz", "metrics.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make(tmp_path_factory.mktemp("trained") / "run")


def make(folder):
    """A run with every kind of file that scripts read again."""
    train(folder)
    run = load_run(folder)
    for step in (2, 6):
        Snapshots(folder / "snapshots.npz", DATA, resume=step > 2).take(run, {"step": step})
    write_json(folder / "metrics.json", {"all": {"position_error_px": 0.5}, "step": 6})
    return folder


def use(folder):
    """Reads all that querying and resuming read."""
    run = load_run(folder)
    means = Snapshots(folder / "snapshots.npz", DATA, resume=True).means
    found = {**outcome_of(folder), "config": load_config(folder), "measured": read_json(folder / "metrics.json")}
    return {**found, "means": {step: x.tolist() for step, x in means.items()}}, run


def damaged_and_used(trained, tmp_path, n, seed):
    rng, counts = random.Random(seed), {"refused": 0, "equal": 0, "last line dropped": 0}
    wanted, _ = use(trained)
    contents = {name: (trained / name).read_bytes() for name in FILES}
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    for i in range(n):
        name = FILES[i % len(FILES)]
        content, _ = damage(contents[name], rng)
        (folder / name).write_bytes(content)
        try:
            found, _ = use(folder)
        except ValueError as error:
            said = str(error)
            assert "\n" not in said, said
            assert str(folder) in said
            counts["refused"] += 1
        else:
            dropped = found["lines"] == wanted["lines"][:-1] and not content.endswith(b"\n")  # with a word
            assert_same_outcome(found, {**wanted, "lines": found["lines"]} if dropped else wanted)
            assert (found["measured"], found["means"]) == (wanted["measured"], wanted["means"])
            counts["last line dropped" if dropped else "equal"] += 1
        (folder / name).write_bytes(contents[name])
    assert sum(counts.values()) == n
    return counts


def test_some_damage_to_a_run(trained, tmp_path):
    counts = damaged_and_used(trained, tmp_path, 120, 0)
    assert counts["refused"] >= 110


@pytest.mark.slow
def test_much_damage_to_a_run(trained, tmp_path, record_property):
    counts = damaged_and_used(trained, tmp_path, 2000, 1)
    record_property("damage", str(counts))


def test_a_run_without_checksums_loads_with_a_word_and_its_archive_is_checked(trained, tmp_path):
    folder, rng, refused = tmp_path / "old", random.Random(2), 0
    shutil.copytree(trained, folder)
    (folder / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="has no checksum"):
        wanted = outcome_of(folder)
    content = (folder / "checkpoint.pt").read_bytes()
    for _ in range(60):
        (folder / "checkpoint.pt").write_bytes(damage(content, rng)[0])
        try:
            with pytest.warns(UserWarning, match="has no checksum"):
                found = outcome_of(folder)
        except ValueError:
            refused += 1
        else:  # in the padding between entries, or in what says how they were packed
            assert_same_outcome(found, wanted)
    assert refused > 20


def packaged_and_damaged(tmp_path, monkeypatch, n, seed):
    monkeypatch.setattr(runs, "PRETRAINED", tmp_path)
    run, counts = runs.build(with_schedule()), {"refused": 0, "equal": 0}
    export_weights(run, tmp_path / "mine", {"command": "none"})
    names = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert names == ["about.json", "checksums.json", "config.json", "weights.npz"]
    contents, rng = {name: (tmp_path / "mine" / name).read_bytes() for name in names}, random.Random(seed)
    for i in range(n):
        name = names[i % len(names)]
        (tmp_path / "mine" / name).write_bytes(damage(contents[name], rng)[0])
        try:
            found = load_pretrained("mine")
        except ValueError as error:
            counts["refused"] += "\n" not in str(error)
        else:
            for own, other in ((run.model, found.model), (run.guide, found.guide)):
                assert all(torch.equal(x, other.state_dict()[k]) for k, x in own.state_dict().items())
            counts["equal"] += 1
        (tmp_path / "mine" / name).write_bytes(contents[name])
    assert sum(counts.values()) == n, "a refusal is not one line"
    return counts


def test_some_damage_to_packaged_weights(tmp_path, monkeypatch):
    assert packaged_and_damaged(tmp_path, monkeypatch, 60, 3)["refused"] >= 55


@pytest.mark.slow
def test_much_damage_to_packaged_weights(tmp_path, monkeypatch, record_property):
    record_property("damage", str(packaged_and_damaged(tmp_path, monkeypatch, 1000, 4)))
