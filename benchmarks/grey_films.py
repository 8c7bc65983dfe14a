"""Errors on films with sensor noise, salt and pepper, and still backgrounds, without options (docs/your_own_video.md).

Each film is 600 sequences of discs with constant velocity. The quick preset, shortened to 300 steps, is trained on it
and evaluated on 150 new sequences. ``python benchmarks/grey_films.py noise_05 salt --seeds 0 1 2`` writes
docs/results/grey_films.json.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from pyro_pixels import PRESETS, build, evaluate, fit, simulate
from pyro_pixels._checksums import write_json
from pyro_pixels.data import ImageSequences
from pyro_pixels.worlds.drawing import Look
from pyro_pixels.worlds.others import DriftConfig

WORLD = DriftConfig(height=32, width=32, radius=2.5, look=Look(brightness=(0.9, 1.0)))
STEPS, OUT = 300, Path("docs/results/grey_films.json")
KINDS = ("clean", "noise_00", "noise_05", "noise_10", "salt", "texture")


def film(kind: str, n: int, seed: int) -> ImageSequences:
    """Returns ``n`` sequences of a kind."""
    if kind in ("clean", "salt"):
        return simulate(replace(WORLD, look=Look(salt_and_pepper=0.01 if kind == "salt" else 0.0)), n, seed=seed)
    data, rng = simulate(WORLD, n, seed=seed), np.random.default_rng(seed)
    images = data.images.float().numpy()
    if kind == "texture":
        texture = gaussian_filter(np.random.default_rng(5).random((32, 32)), 3)
        images = np.maximum(images, 0.4 * (texture - texture.min()) / np.ptp(texture))
    noise = 0.02 if kind == "texture" else int(kind[-2:]) / 100
    images = (images + rng.normal(0, noise, images.shape)).clip(0, 1)
    return replace(data, images=torch.from_numpy(images.astype(np.float32)))


def measure(kind: str, seed: int = 0) -> dict[str, object]:
    """Returns position error in pixels and switch rate for each N; the seed sets both film and starting values."""
    preset, start = PRESETS["quick"], time.time()
    likelihood = "bernoulli" if kind in ("clean", "salt") else "gaussian"
    config = replace(preset, seed=seed, likelihood=likelihood, schedule=replace(preset.schedule, steps=STEPS))
    run = build(config)
    fit(run.model, run.guide, film(kind, 600, seed), config.schedule, progress=False)
    table = evaluate(run.model, run.guide, film(kind, 150, 77 + seed))
    names = ("position_error_px", "switch_rate")
    rows = {n: {name: row[name] for name in names} for n, row in table["by_n_objects"].items()}
    found = run.guide.pixel_evidence.statistics._asdict()
    return {"by_n_objects": rows, "found": found, "seconds": round(time.time() - start), "seed": config.seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(KINDS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if unknown := sorted(set(args.kinds) - set(KINDS)):
        parser.error(f"there is no film '{unknown[0]}'; wanted some of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    for seed in args.seeds:
        for kind in args.kinds or KINDS:
            found = measure(kind, seed) | {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "steps": STEPS,
            }
            results = json.loads(OUT.read_text()) if OUT.exists() else {}
            results.setdefault(kind, {})[str(seed)] = found
            write_json(OUT, results)
            print(kind, seed, found["by_n_objects"], flush=True)


if __name__ == "__main__":
    main()
