"""Files that lie about themselves, full disks, and parts that are left over."""

import errno
import io
import os
import struct
import subprocess
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import assert_same_outcome, outcome_of, train, train_or_resume

from pyro_pixels._files import CannotWrite, atomic_write, sweep
from pyro_pixels.data import load_sequences, save_sequences
from pyro_pixels.training.checkpoints import load_checkpoint, save_checkpoint
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

GOOD = {"images": np.ones((3, 4, 5, 6), np.uint8), "n_objects": np.array([1, 2, 2])}
SMALL = simulate(CannonballConfig(n_frames=4, height=8, width=8, radius=1.0), 4, seed=0)


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-len(header) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def write_npz(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_header_that_claims_terabytes_is_refused_at_once(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 1000), }"
    write_npz(tmp_path / "f.npz", {"images": npy(header), "n_objects": as_npy(np.array([1]))})
    with pytest.raises(ValueError, match=r"images has 1,000,000,000,000,000 bytes by its header but 0 in the file"):
        load_sequences(tmp_path / "f.npz")


def test_a_bomb_is_refused_before_it_unpacks(tmp_path):
    np.savez_compressed(tmp_path / "f.npz", images=np.zeros((4, 1000, 100, 100), np.uint8), n_objects=np.ones(4, int))
    assert (tmp_path / "f.npz").stat().st_size < 100_000
    with pytest.raises(ValueError, match="holds arrays of 40,000,032 bytes, more than max_bytes, 30,000,000"):
        load_sequences(tmp_path / "f.npz", max_bytes=30_000_000)
    assert len(load_sequences(tmp_path / "f.npz")) == 4


def test_arrays_that_are_not_asked_for_are_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "f.npz", **GOOD, more=np.zeros(50_000_000, np.uint8))
    assert len(load_sequences(tmp_path / "f.npz", max_bytes=10_000)) == 3


WRONG = {
    "n_objects of a billion": {"n_objects": np.array([1, 2, 10**9])},
    "n_objects beyond int64": {"n_objects": np.array([1, 2, 2**63 + 5], np.uint64)},
    "n_objects negative": {"n_objects": np.array([1, 2, -1])},
    "n_objects of floats": {"n_objects": np.array([1.0, 2.0, 2.0])},
    "n_objects complex": {"n_objects": np.array([1, 2, 2], complex)},
    "n_objects texts": {"n_objects": np.array(["1", "2", "2"])},
    "images texts": {"images": np.array(["a", "b", "c"])},
    "images complex": {"images": np.ones((3, 4, 5, 6), complex)},
    "images times": {"images": np.ones((3, 4, 5, 6), "m8[s]")},
    "images records": {"images": np.ones((3, 4, 5, 6), [("a", "u1")])},
    "images objects": {"images": np.array([[1], [2, 3]], dtype=object)},
    "images 300": {"images": np.full((3, 4, 5, 6), 300, np.int64)},
    "no images": {"images": None},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_wrong_arrays_are_refused_in_one_line(tmp_path, change):
    np.savez(tmp_path / "f.npz", **{k: x for k, x in {**GOOD, **change}.items() if x is not None})
    with pytest.raises(ValueError, match=r"f\.npz") as error:
        load_sequences(tmp_path / "f.npz")
    assert "\n" not in str(error.value)
    assert "allow_pickle" not in str(error.value)


@pytest.mark.parametrize("name", ["A", "u", "Sigma_H", "Sigma_A", "mu", "Sigma", "pi"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e9])
def test_true_parameters_that_are_none_are_refused(tmp_path, name, value):
    save_sequences(tmp_path / "f.npz", SMALL)
    arrays = dict(np.load(tmp_path / "f.npz"))
    arrays[f"true_{name}"].flat[0] = value
    np.savez(tmp_path / "f.npz", **arrays)
    if value == -1e9 and name in ("A", "u", "mu"):
        assert load_sequences(tmp_path / "f.npz").dynamics is not None
        return
    with pytest.raises(ValueError, match=f"true_{name}"):
        load_sequences(tmp_path / "f.npz")


class FullDisk:
    """Makes every write after the first few fail as on a full disk."""

    def __init__(self, monkeypatch, call: str, after: int) -> None:
        self.calls, self.after, original = 0, after, getattr(os, call)

        def full(*args, **options):
            self.calls += 1
            if self.calls > self.after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **options)

        monkeypatch.setattr(os, call, full)


@pytest.mark.parametrize("after", range(0, 16, 6))
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there_and_is_said_in_one_line(tmp_path, call, after):
    train(tmp_path / "whole")
    assert train_on_a_full_disk(tmp_path / "run", outcome_of(tmp_path / "whole"), call, after)


def train_on_a_full_disk(folder, whole, call, after):
    """Trains, is refused, and trains again once there is room; False where there was room for all of it."""
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, call, after)
        try:
            train(folder)
        except CannotWrite as error:
            said = str(error)
        else:
            return False
    assert "No space left on device" in said
    assert "\n" not in said
    train_or_resume(folder)
    assert_same_outcome(outcome_of(folder), whole)
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_tmpfs_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ValueError, match="No space left on device"):
            train(disk / "run")
        assert not list((disk / "run").rglob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_parts_are_unpredictable_follow_no_link_and_are_swept(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".f.{os.getpid()}.part").symlink_to(victim)
    names = []
    with atomic_write(tmp_path / "f") as file:
        names += [path.name for path in tmp_path.glob(".f.*.part") if not path.is_symlink()]
        file.write(b"new")
        assert not sweep(tmp_path, again=True), "a part that is being written was taken away"
    assert victim.read_text() == "precious"
    assert len(names) == 1
    assert str(os.getpid()) not in names[0].split(".")
    (tmp_path / ".g.0123456789abcdef.part").write_bytes(b"left by a killed process")
    (tmp_path / ".g.999999999.part").write_bytes(b"left by version 0.1")
    (tmp_path / ".g.mine.part").write_bytes(b"no part of ours")
    gone = {path.name for path in sweep(tmp_path, again=True)}
    assert {".g.0123456789abcdef.part", ".g.999999999.part"} == gone
    assert (tmp_path / ".g.mine.part").exists()


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "f").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "f").is_symlink()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A whole file of sequences and a whole checkpoint, to be changed."""
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def make_seeds(folder):
    save_sequences(folder / "data.npz", SMALL)
    np.savez(folder / "stored.npz", **GOOD)
    save_checkpoint(folder / "c.pt", {"step": 1, "model": {"w": torch.arange(20.0)}, "list": [1, "a", None]})
    return {name: (folder / name).read_bytes() for name in ("data.npz", "stored.npz", "c.pt")}


def changed(content: bytes, places, values, cut) -> bytes:
    new = bytearray(content)
    for place, value in zip(places, values):
        new[place % len(new)] = value
    return bytes(new[: cut % (len(new) + 1)] if cut else new)


CHANGES = {
    "places": st.lists(st.integers(0, 10**6), min_size=1, max_size=6),
    "values": st.lists(st.integers(0, 255), min_size=6, max_size=6),
    "cut": st.one_of(st.just(0), st.integers(1, 10**6)),
}


def fuzz(seeds, tmp_path, places, values, cut):
    """Every changed file is read, or refused in one line of a ValueError."""
    refused, lines = 0, []
    for name, content in seeds.items():
        path = tmp_path / name
        path.write_bytes(changed(content, places, values, cut))
        try:
            (load_checkpoint if name == "c.pt" else load_sequences)(path)
        except ValueError as error:
            refused += 1
            lines.append(str(error).count("\n") + 1)
    assert set(lines) <= {1}
    return refused


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**CHANGES)
def test_changed_files_are_read_or_refused(seeds, tmp_path, places, values, cut):
    fuzz(seeds, tmp_path, places, values, cut)


def fuzz_once(seeds, folder, rng):
    k = int(rng.integers(1, 7))
    cut = int(rng.integers(1, 10**6)) if rng.random() < 0.2 else 0
    return fuzz(seeds, folder, rng.integers(0, 10**6, k).tolist(), rng.integers(0, 256, k).tolist(), cut)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_ten_minutes_of_changed_files(seeds, tmp_path, record_property):
    """Seconds by the environment variable FUZZ_SECONDS."""
    rng, started, n, refused = np.random.default_rng(0), time.monotonic(), 0, 0
    while time.monotonic() - started < float(os.environ.get("FUZZ_SECONDS", 600)):
        refused += fuzz_once(seeds, tmp_path, rng)
        n += len(seeds)
    record_property("files", n)
    record_property("refused", refused)
