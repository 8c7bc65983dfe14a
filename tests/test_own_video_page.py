"""The page "Your own video", its commands run as they stand (slow) or with fewer films and steps."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyro_pixels.evaluation.metrics import assign, reorder
from pyro_pixels.video import load_source

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/your_own_video.md"
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S) for line in block.splitlines()
]

iio = pytest.importorskip("imageio.v3")
for library in ("skimage", "av", "pymunk"):
    pytest.importorskip(library)


def follow_the_page(folder, **instead):
    """Runs every command of the page in a folder; ``instead`` replaces words. Returns what they printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    printed = {}
    for line in COMMANDS:
        python, path, *words = shlex.split(line)
        assert python == "python"
        words = [instead.get(f"_{word}", word) for word in words]
        done = subprocess.run(
            [sys.executable, str(ROOT / path), *words], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
        printed[line] = done.stdout
    return printed


@pytest.mark.parametrize("script, name", [
    *(("docs/own_film.py", name) for name in ("imageio", "av", "pymunk")),
    *(("examples/train.py", name) for name in ("torch", "tyro")),
])  # fmt: skip
def test_a_library_that_is_not_installed_is_named_in_one_line(script, name, tmp_path):
    path = ROOT / script
    program = (
        f"import runpy, sys; sys.modules[{name!r}] = None; sys.argv = ['x', 'films', '1']; "
        f"sys.path.insert(0, {str(path.parent)!r}); runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {name} is not installed; pip install ")
    assert done.stderr.count("\n") == 1


def tracks_of(folder):
    """Film -> (n objects, T, 2) in the film's pixels, from the CSV."""
    rows = list(csv.DictReader((folder / "runs/mine/infer/tracks.csv").open()))
    found = {}
    for row in rows:
        film = int(row["film"].removeprefix("throw_").removesuffix(".mp4"))
        found.setdefault(film, {}).setdefault(int(row["particle"]), []).append((float(row["x"]), float(row["y"])))
    return {film: np.array(list(tracks.values())) for film, tracks in found.items()}, rows


def check_what_there_is(folder, n_films):
    tracks, rows = tracks_of(folder)
    source = load_source(folder / "mine.npz")
    assert len(tracks) == n_films // 10  # those held out
    n_sequences = len(source.first_frames)
    assert {int(row["sequence"]) for row in rows} == {*range(n_sequences - len(tracks), n_sequences)}
    assert {source.first_frames[int(row["sequence"])][0] for row in rows} == tracks.keys()
    assert source.size == (96, 128)
    assert len(source.films) == n_films
    assert float(rows[1]["time"]) == pytest.approx(float(rows[1]["frame"]) / 30, rel=1e-3)
    gif = iio.imread(folder / "runs/mine/infer/tracks.gif", index=None)
    assert gif.shape == (40, 320, 427, 3)  # 96 x 128 enlarged, and no square of what the model saw
    grey = gif[0].mean(-1)
    assert np.median(grey) > 150  # the wall, which the model saw as black
    made = {path.name for path in (folder / "runs/mine").rglob("*")}
    assert {"metrics.json", "tracks.csv", "tracks.gif", "generation.npz", "generation.csv", "what-if.png"} <= made
    with np.load(folder / "runs/mine/generate/generation.npz") as file:
        assert file["mean_px"].shape == file["mean"].shape
    return tracks


def test_the_commands_of_the_page_run(tmp_path):
    printed = follow_the_page(tmp_path, _120="12", _300="6")
    tracks = check_what_there_is(tmp_path, 12)
    assert all(np.isfinite(x).all() for x in tracks.values())
    prepared, table = (next(out for line, out in printed.items() if name in line) for name in ("prepare", "evaluate"))
    assert "  12 films of 40 frames, 96 x 128 pixels, shrunk to 24 x 32\n" in prepared
    assert "  120 films of 40 frames, 96 x 128 pixels, shrunk to 24 x 32\n" in PAGE.read_text()
    assert "persistence" in table
    assert " - " not in table


@pytest.mark.slow
def test_the_page_tracks_balls_of_another_physics_engine(tmp_path):
    """Within 1.5 pixels of the film, of which one of the sequences' pixels is 4."""
    import torch

    follow_the_page(tmp_path)
    tracks = check_what_there_is(tmp_path, 120)
    truth = np.load(tmp_path / "truth.npz")["positions"]
    errors = []
    for film, found in tracks.items():
        true = truth[film][np.isfinite(truth[film][:, 0, 0])]
        if len(true) != len(found):
            continue  # counted wrong
        n = torch.tensor([len(true)])
        a, b = torch.from_numpy(found)[None], torch.from_numpy(true)[None]
        errors.append(float((reorder(a, assign(a, b, n)) - b).norm(dim=-1).mean()))
    assert len(errors) >= 10
    assert np.median(errors) < 1.5
