"""Measures peak memory of queries on many sequences, each query in its own process.

`python -m benchmarks.many_sequences` queries the untrained quick preset on 10,000 sequences of 12 frames, 48 x 48
pixels (an argument changes the number), and writes docs/results/many_sequences.json.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_of_process
from pyro_pixels._checksums import write_json
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.table import evaluate
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.evidence import count_objects
from pyro_pixels.queries.inference_data import to_inference_data
from pyro_pixels.queries.predict import generate, infer
from pyro_pixels.result_tables import environment
from pyro_pixels.runs import Run, build
from pyro_pixels.worlds.base import simulate

FRAMES, SIZE, N_SEEN = 12, 48, 5
OUT = Path("docs/results/many_sequences.json")
QUERIES: dict[str, Callable[[Run, ImageSequences], Any]] = {
    "infer": lambda run, data: infer(run.guide, data.images, data.n_objects),
    "generate": lambda run, data: generate(
        run.model, run.guide, data.images[:, :N_SEEN], data.n_objects, n_frames=FRAMES
    ),
    "evaluate": lambda run, data: evaluate(run.model, run.guide, data),
    "to_inference_data, 2 samples": lambda run, data: to_inference_data(
        run.model, run.guide, data.images, data.n_objects, n_samples=2
    ),
    "count_objects, 1 sample": lambda run, data: count_objects(run.model, run.guide, data.images, 3, n_samples=1),
}


def main(n: int, query: str | None = None) -> None:
    torch.set_num_threads(1)
    if query is not None:
        print(json.dumps(measure(n, query)))
        return
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in QUERIES:
        command = [sys.executable, "-m", "benchmarks.many_sequences", str(n), name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.setdefault(str(n), {})[name] = json.loads(done.stdout)
        found["environment"] = environment(torch.device("cpu"))
        write_json(OUT, found)
        print(n, name, found[str(n)][name], flush=True)


def measure(n: int, query: str) -> dict[str, float]:
    """Returns bytes of the process before the query, images included, and at its peak; and seconds."""
    quick = PRESETS["quick"]
    config = replace(quick, data=replace(quick.data, height=SIZE, width=SIZE, n_frames=FRAMES))
    run, some = build(config), simulate(config.data, min(n, 200), seed=0)
    index = torch.arange(n) % len(some)  # memory does not depend on the images' content
    assert some.positions is not None
    data = ImageSequences(some.images[index], some.n_objects[index], some.positions[index])
    before, began = peak_of_process(), time.perf_counter()
    QUERIES[query](run, data)
    return {"before": before, "peak": peak_of_process(), "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, *sys.argv[2:3])
