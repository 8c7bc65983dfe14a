"""Crowded films cut into windows by prepare.py: linked tracks against the truth (docs/your_own_video.md).

The film shows 40 soft discs in uneven light, 240 x 320 pixels and 200 frames; the discs keep inside, and their
velocities change a little in every frame. The commands of the page are run on it: prepare.py with ``--window 32
--frames 10``, train.py with 300 steps, infer.py on all windows.

    pip install trackpy
    python benchmarks/crowded_films.py --seeds 0 1 2
    python benchmarks/crowded_films.py --colloids trackpy-examples/sample_data/bulk_water

The first command writes docs/results/crowded_films.json, and for comparison the results of trackpy, with the true size
of the discs; the second draws docs/figures/crowded_film.png, the tracks of a real film (its frames are at
github.com/soft-matter/trackpy-examples).
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pyro_pixels._files import atomic_write
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.plots.style import OBJECTS, SEEN, TEXT
from pyro_pixels.video import load_source, read_films

HERE = Path(__file__).absolute().parent.parent
OUT, FIGURE = Path("docs/results/crowded_films.json"), Path("docs/figures/crowded_film.png")
F, H, W, DISCS, RADIUS = 200, 240, 320, 40, 3.0
T, SIDE, STEPS = 10, 32, 300
NEAR = 2.0  # pixels; a position farther from every true one is wrong
Tracks = NDArray[np.float64]  # (rows, 4): frame, particle, x, y


def discs(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Returns a film (F, H, W) and the true positions (F, DISCS, 2), column and row."""
    rng = np.random.default_rng(seed)
    edge, size = 8, np.array([W, H])
    p, v = rng.uniform(edge, size - edge, (DISCS, 2)), rng.normal(0, 0.8, (DISCS, 2))
    rows, columns = np.mgrid[:H, :W]
    film, truth = np.zeros((F, H, W), np.uint8), np.zeros((F, DISCS, 2))
    for t in range(F):
        truth[t] = p
        off = np.hypot(columns - p[:, 0, None, None], rows - p[:, 1, None, None]).min(0)
        frame = 60 + 20 * columns / W + 140 / (1 + np.exp(2 * (off - RADIUS))) + rng.normal(0, 6, (H, W))
        film[t] = frame.clip(0, 255)
        p = p + v
        v = v + rng.normal(0, 0.05, v.shape)
        v = np.where(p < edge, abs(v), np.where(p > size - edge, -abs(v), v))
    return film, truth


def run(script: str, *options: str, folder: Path) -> None:
    """Runs a script of examples/ in a folder, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "examples" / script), *options]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def track(film: str, folder: Path, *options: str, seed: int = 0, likelihood: str = "bernoulli") -> Tracks:
    """Returns the table of the page's commands for a film in the folder, each (frame, particle) in one row."""
    run("prepare.py", film, "--window", str(SIDE), "--frames", str(T), *options, folder=folder)
    train = ("--steps", str(STEPS), "--seed", str(seed), "--likelihood", likelihood, "--no-progress")
    run("train.py", "--data", "mine.npz", "--run", "mine", *train, folder=folder)
    run("infer.py", "--data", "mine.npz", "--run", "mine", folder=folder)
    with (folder / "mine" / "infer" / "tracks.csv").open() as file:
        return np.array(
            [[float(row[name]) for name in ("frame", "particle", "x", "y")] for row in csv.DictReader(file)]
        )


def compare(tracks: Tracks, truth: NDArray[np.float64]) -> dict[str, float]:
    """Returns shares, errors in pixels and changes of identity of tracks, against true positions (F, n, 2)."""
    found, rows = 0, []
    for t, places in enumerate(truth):
        now = tracks[tracks[:, 0] == t]
        off, disc = scipy.spatial.cKDTree(places).query(now[:, 2:])
        rows += [(particle, t, d, e) for (_, particle, *_), d, e in zip(now, disc, off)]
        found += int((scipy.spatial.cKDTree(now[:, 2:]).query(places)[0] < NEAR).sum()) if len(now) else 0
    particle, frame, disc, off = (np.array(x) for x in zip(*sorted(rows)))
    near = off < NEAR
    particle, frame, disc = particle[near], frame[near], disc[near]
    follows = (particle[1:] == particle[:-1]) & (frame[1:] == frame[:-1] + 1)
    return {
        "found": found / truth[..., 0].size,
        "wrong": 1 - float(near.mean()),
        "error_px": float(np.sqrt(np.square(off[near]).mean())),
        "identity_changes_per_1000_steps": 1_000 * float((disc[1:] != disc[:-1])[follows].mean()),
        "median_track_frames": float(np.median(np.unique(particle, return_counts=True)[1])),
    }


def by_trackpy(film: NDArray[np.uint8]) -> Tracks | None:
    """Returns trackpy's tracks, None if it is not installed."""
    try:
        import trackpy  # type: ignore[import-not-found]
    except ImportError:
        return None
    trackpy.quiet()
    found = trackpy.batch(film, 2 * round(RADIUS) + 3, minmass=1_000, processes=1)
    return trackpy.link(found, 5, memory=3)[["frame", "particle", "x", "y"]].to_numpy(float)


def measure(seed: int) -> dict[str, Any]:
    """Returns the comparison of the page's commands, and of trackpy, for one film."""
    film, truth = discs(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.time()
        np.save(folder / "film.npy", film)
        tracks = track("film.npy", folder, seed=seed)
        seconds = time.time() - started
        n_windows = len(load_source(folder / "mine.npz").windows)  # type: ignore[union-attr]
    other = by_trackpy(film)
    return {
        "windows": n_windows, "seconds": round(seconds), **compare(tracks, truth),
        **({} if other is None else {"trackpy": compare(other, truth)}),
        "torch": torch.__version__, "python": platform.python_version(), "steps": STEPS,
    }  # fmt: skip


def draw(tracks: Tracks, frames: NDArray[np.float32], windows: NDArray[np.int64], first: int) -> Figure:
    """Draws the windows of one clip over its first frame, and the tracks so far of all particles over its last."""
    figure = Figure((9, 3.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    last = first + len(frames) - 1
    for ax, frame, title in (
        (left, frames[0], f"frame {first}: windows"),
        (right, frames[-1], f"frame {last}: tracks"),
    ):
        ax.imshow(frame, cmap="gray", vmin=np.quantile(frames, 0.001), vmax=frames.max())
        ax.set_title(title, **TEXT)
        ax.set(xticks=[], yticks=[])
    for corner in windows:
        left.add_patch(Rectangle(tuple(corner - 0.5), SIDE, SIDE, fill=False, edgecolor=SEEN, linewidth=0.8))
    now = tracks[tracks[:, 0] == last, 1]
    for particle in now:
        path = tracks[(tracks[:, 1] == particle) & (tracks[:, 0] <= last)]
        right.plot(*path[np.argsort(path[:, 0]), 2:].T, color=OBJECTS[int(particle) % len(OBJECTS)], linewidth=0.9)
    return figure


def draw_colloids(source: Path, near: int = 100) -> None:
    """Tracks the colloids and draws FIGURE, of the clip that begins nearest to a frame."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--background", "local", "--grey", "--threshold", "0.4")
        tracks = track(str(source / "*.png"), folder, *options, likelihood="gaussian")
        origin = load_source(folder / "mine.npz")
    assert origin is not None
    first = min((t for _, t in origin.first_frames), key=lambda t: abs(t - near))
    windows = [c for c, start in zip(origin.windows, origin.first_frames) if start == (0, first)]
    frames = read_films(str(source / "*.png"))[0][first : first + T]
    figure = draw(tracks, frames, np.array(windows), first)
    save_figure(figure, FIGURE, "Colloids in water: windows of one clip, and the tracks of all windows, linked")
    print(f"{len(tracks):,} rows of {len(np.unique(tracks[:, 1])):,} particles in {len(origin.windows):,} windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--colloids", type=Path, help="bulk_water, with its frames as PNG; draws the figure only")
    args = parser.parse_args()
    if args.colloids is not None:
        if not any(args.colloids.glob("*.png")):
            parser.error(f"{args.colloids} has no PNG; wanted sample_data/bulk_water of soft-matter/trackpy-examples")
        draw_colloids(args.colloids.absolute())
        return
    results = {str(seed): measure(seed) for seed in args.seeds}
    with atomic_write(OUT) as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")
    for seed, found in results.items():
        print(seed, found)


if __name__ == "__main__":
    main()
