"""Real grey films of colloids in water: positions compared with those of trackpy (docs/your_own_video.md).

The film is that of trackpy's tutorial, ``sample_data/bulk_water`` of github.com/soft-matter/trackpy-examples. It is cut
into windows of 32 x 32 pixels and 20 frames in which trackpy follows one or two particles from the first frame to the
last and finds no others; most windows also contain fainter, out-of-focus particles, which are not counted. The quick
preset is trained on windows of the first three quarters of the time and tested on later ones, beside a blob detector.

    pip install trackpy
    python benchmarks/grey_colloids.py trackpy-examples/sample_data/bulk_water

writes docs/results/grey_colloids.json and docs/figures/grey_colloids.png.
"""

import argparse
import platform
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy import ndimage

from pyro_pixels import PRESETS, build, evaluate, fit
from pyro_pixels._checksums import write_json
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.pixel_map import map_to_pixels
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.plots.style import FONT, INFERRED, SEEN, TEXT, add_legend, draw_tracks, grid
from pyro_pixels.runs import Run
from pyro_pixels.video import prepare_video

FRAMES, WINDOW, T, STEPS = 300, 32, 20, 300
MARGIN, BRIGHT, FAINT = 4, 200, 130  # pixels from the edge; least trackpy mass of followed and of excluded particles
OUT, FIGURE = Path("docs/results/grey_colloids.json"), Path("docs/figures/grey_colloids.png")
BACKGROUNDS = ("keep", "local")


class Windows(NamedTuple):
    """Windows of a film, in temporal order."""

    images: NDArray[np.uint8]  # (n, T, 32, 32), as in the film: particles are dark
    n_objects: NDArray[np.int64]  # (n,)
    positions: NDArray[np.float64]  # (n, 2, T, 2), NaN for absent particles
    start: NDArray[np.int64]  # (n,), first frames


def cut(folder: Path) -> Windows:
    """Returns the windows that contain one or two particles in all of their frames."""
    import trackpy  # type: ignore[import-not-found]
    from imageio.v3 import imread

    trackpy.quiet()
    film = np.stack([imread(path)[..., 1] for path in sorted(folder.glob("*.png"))[:FRAMES]])  # green, as the tutorial
    found = trackpy.batch(film, 11, minmass=20, invert=True, processes=1)
    tracks = trackpy.filter_stubs(trackpy.link(found, 5, memory=3), 25).reset_index(drop=True)
    mass = tracks.groupby("particle")["mass"].mean()
    tracks = tracks[tracks.particle.isin(mass[mass > BRIGHT].index)]
    windows: list[tuple[NDArray[np.uint8], int, NDArray[np.float64], int]] = []
    for t in range(0, FRAMES - T + 1, 10):
        now = tracks[(tracks.frame >= t) & (tracks.frame < t + T)]
        paths = [path.sort_values("frame")[["x", "y"]].to_numpy() for _, path in now.groupby("particle")]
        paths = [path for path in paths if len(path) == T]
        others = found[(found.frame >= t) & (found.frame < t + T) & (found.mass > FAINT)][["x", "y"]].to_numpy()
        for y in range(0, film.shape[1] - WINDOW + 1, 12):
            for x in range(0, film.shape[2] - WINDOW + 1, 12):
                corner = np.array([x, y])
                here = [path - corner for path in paths if _inside(path - corner, -MARGIN).all()]
                if len(here) in (1, 2) and _inside(others - corner, 2).sum() == len(here) * T:
                    positions = np.full((2, T, 2), np.nan)
                    positions[: len(here)] = here
                    windows.append((film[t : t + T, y : y + WINDOW, x : x + WINDOW], len(here), positions, t))
    return Windows(*(np.stack(x) for x in zip(*windows)))


def _inside(places: NDArray[np.float64], margin: int) -> NDArray[np.bool_]:
    return np.all((places >= -margin) & (places < WINDOW + margin), axis=-1)


def blobs(images: NDArray[np.float32], n_objects: NDArray[np.int64], positions: NDArray[np.float64]) -> dict[str, Any]:
    """Returns, by N, the mean pixel error of the N strongest Laplacian-of-Gaussian maxima, matched frame by frame."""
    errors: dict[str, list[float]] = {"1": [], "2": []}
    for film, n, paths in zip(images, n_objects, positions):
        for frame, truth in zip(film, paths[:n].swapaxes(0, 1)):
            response = -ndimage.gaussian_laplace(frame, 2)
            peak = np.argwhere(response == ndimage.maximum_filter(response, 5))
            best = peak[np.argsort(-response[tuple(peak.T)])[:n], ::-1]
            if len(best) == n:
                distance = np.linalg.norm(best[:, None] - truth, axis=-1)
                orders = map(list, permutations(range(n)))
                errors[str(n)].append(min(distance[range(n), order].mean() for order in orders))
    return {n: float(np.mean(e)) for n, e in errors.items()}


def draw(windows: Windows, test: NDArray[np.bool_], run: Run, data: ImageSequences) -> Figure:
    """Draws three test windows for each of N = 1, 2, evenly spaced in time: the film, and the guide's pixel weights."""
    firsts = []
    for n in (1, 2):
        of_n = np.flatnonzero(test & (windows.n_objects == n))
        firsts += [int(of_n[i * len(of_n) // 3]) for i in range(3)]
    shown = data[torch.tensor(firsts)]
    with torch.no_grad():
        paths = map_to_pixels(run.model, run.guide).affine(run.guide.q(shown.images, shown.n_objects).mean).numpy()
        weights = run.guide.see(shown.images).numpy()
    figure, cells = grid(len(firsts), len(firsts), 1.5, [1.6, 1.5])
    for (filmed, seen), i, path, weight in zip(cells, firsts, paths, weights):
        filmed.imshow(windows.images[i, 0], cmap="gray")
        filmed.set_title(f"N = {windows.n_objects[i]}, frame {windows.start[i]}", **TEXT)
        seen.imshow(weight[0], cmap="gray", vmin=0, vmax=1)
        for ax in (filmed, seen):
            ax.set(xticks=[0, WINDOW - 1], yticks=[0, WINDOW - 1])
            ax.tick_params(labelsize=FONT - 2)
            draw_tracks(ax, windows.positions[i], SEEN, linewidth=2.5, alpha=0.8)
            draw_tracks(ax, path[: windows.n_objects[i]], INFERRED, linewidth=1.0)
    cells[0][0].set_ylabel("film", **TEXT)
    cells[0][1].set_ylabel("weights", **TEXT)
    return add_legend(
        figure, [], [Line2D([], [], color=c, label=n) for n, c in (("trackpy", SEEN), ("inferred", INFERRED))]
    )


def measure(windows: Windows, background: str, seed: int) -> tuple[dict[str, Any], Figure]:
    """Trains on windows prepared with a background option; evaluates and draws the positions in later ones."""
    start = time.time()
    with TemporaryDirectory() as folder:
        path = Path(folder, "windows.npy")
        np.save(path, windows.images)
        prepared = prepare_video(path, n_objects=windows.n_objects.tolist(), background=background, grey=True)  # type: ignore[arg-type]
    last = int(np.quantile(windows.start, 0.75))
    train, test = windows.start <= last - T, windows.start >= last
    data = ImageSequences(prepared.data.images, prepared.data.n_objects, torch.from_numpy(windows.positions))
    preset = PRESETS["quick"]
    schedule = replace(preset.schedule, steps=STEPS)
    config = replace(preset, seed=seed, likelihood="gaussian", schedule=schedule, data=replace(preset.data, n_frames=T))
    run = build(config)
    fit(run.model, run.guide, data[torch.from_numpy(train)], schedule, progress=False)
    table = evaluate(run.model, run.guide, data[torch.from_numpy(test)])
    names = ("position_error_px", "switch_rate")
    found = {
        "by_n_objects": {n: {name: row[name] for name in names} for n, row in table["by_n_objects"].items()},
        "found": run.guide.pixel_evidence.statistics._asdict(),
        "blobs": blobs(prepared.data.images.numpy()[test], windows.n_objects[test], windows.positions[test]),
        "windows": {"train": int(train.sum()), "test": int(test.sum())},
        "seconds": round(time.time() - start),
    }
    return found, draw(windows, test, run, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="bulk_water, with its frames as PNG")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if not any(args.folder.glob("*.png")):
        parser.error(f"{args.folder} has no PNG; wanted sample_data/bulk_water of soft-matter/trackpy-examples")
    torch.set_num_threads(1)
    windows = cut(args.folder)
    results: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "steps": STEPS}
    for background in BACKGROUNDS:
        for seed in args.seeds:
            found, figure = measure(windows, background, seed)
            results.setdefault(background, {})[str(seed)] = found
            print(background, seed, found, flush=True)
            write_json(OUT, results)
    save_figure(figure, FIGURE, f"Grey colloids, background {background}, first frames of test windows")


if __name__ == "__main__":
    main()
