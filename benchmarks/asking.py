"""Times the queries with the pretrained weights, and the simulation of data."""

from functools import partial
from typing import Any

import torch

from benchmarks.timing import Stopwatch
from pyro_pixels.queries.predict import generate, infer, interpolate, reconstruct, smooth
from pyro_pixels.runs import load_pretrained
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig

N_SEEN = 5  # frames at the start and, for interpolation, also at the end


def measure(watch: Stopwatch, *, n_sequences: int = 60) -> dict[str, Any]:
    """Returns times of each query on ``n_sequences`` sequences, and of simulating as many."""
    run = load_pretrained(device=watch.device)
    data = simulate(run.config.data, n_sequences, seed=0)
    images, n_objects = data.images.to(watch.device), data.n_objects.to(watch.device)
    a = infer(run.guide, images, n_objects).mean
    T = images.shape[1]
    time = torch.arange(T, device=watch.device)
    ends = (time < N_SEEN) | (time >= T - N_SEEN)
    seconds = watch.compare(
        {
            "infer": partial(infer, run.guide, images, n_objects),
            "reconstruct": partial(reconstruct, run.model, run.guide, images, n_objects),
            "smooth": partial(smooth, run.model.dynamics, a),
            "generate": partial(generate, run.model, run.guide, images[:, :N_SEEN], n_objects, n_frames=T),
            "interpolate": partial(interpolate, run.model, run.guide, images, n_objects, ends),
            "simulate, 32 x 32": partial(simulate, run.config.data, n_sequences, seed=1),
            "simulate, 48 x 48": partial(simulate, CannonballConfig(), n_sequences, seed=1),
        }
    )
    return {"n_sequences": n_sequences, "seconds": seconds}
