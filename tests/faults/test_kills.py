"""SIGKILL at every write, and at any time: what is resumed ends as a run that was never killed, bit for bit."""

import random
import signal

import pytest
from tiny import assert_same_outcome, in_a_fork, kill_at_write, kill_in, outcome_of, train, train_or_resume

from pyro_pixels._checksums import noted
from pyro_pixels.runs import load_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return outcome_of(folder)


def finish(folder, whole, kills):
    """Begins or resumes until nothing is left to do, killed once by each of ``kills``; how many did."""
    killed = 0
    for prepare in [*kills, lambda: None, lambda: None]:
        code = in_a_fork(lambda: train_or_resume(folder), prepare=prepare)
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        if (folder / "checkpoint.pt").exists():  # what is there after a kill is whole
            assert load_run(folder).step % 2 == 0
        if code == 0:
            break
    assert_same_outcome(outcome_of(folder), whole)
    assert not list(folder.glob(".*.part")), "parts of killed writers are left over"
    assert noted(folder).keys() >= {"config.json", "metrics.jsonl", "checkpoint.pt"}
    return killed


def kill_at(writes, folder, whole):
    killed = 0
    for n in writes:
        for after in (False, True):
            killed += finish(folder / f"{n}{after}", whole, [kill_at_write(n, after)])
    return killed


def test_some_kills(whole, tmp_path):
    assert kill_at((2, 9, 15, 22), tmp_path / "at", whole) == 8
    rng = random.Random(0)
    kills = [kill_in(rng.uniform(0.0, 0.3)) for _ in range(3)]
    finish(tmp_path / "some", whole, kills)


@pytest.mark.slow
def test_kills_at_every_write(whole, tmp_path, record_property):
    n, killed = 0, 0
    while True:
        n += 1
        here = kill_at((n,), tmp_path, whole)
        killed += here
        if not here:
            break
    record_property("kills", killed)
    assert killed >= 100


@pytest.mark.slow
def test_kills_at_any_time(whole, tmp_path, record_property):
    rng, killed, runs = random.Random(1), 0, 0
    while killed < 120:
        runs += 1
        killed += finish(tmp_path / str(runs), whole, [kill_in(rng.uniform(0.0, 0.4)) for _ in range(4)])
    record_property("kills", killed)
    record_property("runs", runs)
