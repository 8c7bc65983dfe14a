"""A custom guide from start to finish: define it, train it, evaluate it, query it. About a minute on a CPU.

Copy this file and change `CentroidGuide`. docs/write_a_guide.md explains each part;
examples/experiments/compare_guides.py compares the result with the guides of the library.
"""

from _common import start

import time
from dataclasses import dataclass, replace

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_pixels._options import Count, Seed, Sequences
from pyro_pixels.evaluation.table import evaluate, format_table
from pyro_pixels.guides import Guide, object_mask
from pyro_pixels.presets import PRESETS
from pyro_pixels.queries.predict import generate, infer
from pyro_pixels.run_sequences import TEST_SEED
from pyro_pixels.runs import GUIDES, build
from pyro_pixels.training.fitting import fit
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.cannonballs import CannonballConfig


class CentroidGuide(Guide):
    """A guide without memory: a network assigns pixels to objects, which are at the centroids of their white pixels."""

    grid: Tensor

    def __init__(self, height: int, width: int, hidden: int = 64, max_objects: int = 3) -> None:
        super().__init__()
        self.whose = nn.Sequential(
            nn.Linear(height * width, hidden), nn.ReLU(), nn.Linear(hidden, max_objects * height * width)
        )
        self.log_sigma = nn.Parameter(torch.tensor(-3.0))
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("grid", torch.stack([x, y], -1).flatten(0, 1))  # (P, 2): coordinates of the P pixels

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        N, v = int(n_objects.max()), images.flatten(2)  # (B, T, P)
        claim = self.whose(v).unflatten(-1, (-1, v.shape[-1]))[:, :, :N]  # (B, T, N, P)
        absent = ~object_mask(n_objects, N)[:, None, :, None]
        share = claim.masked_fill(absent, -torch.inf).softmax(2) * v.unsqueeze(2)
        mu = share @ self.grid / (share.sum(-1, keepdim=True) + 1e-3)  # (B, T, N, 2); the centre if it has no pixels
        return dist.Normal(mu.transpose(1, 2), self.log_sigma.exp()).to_event(2)


GUIDES["centroid"] = lambda config, model: CentroidGuide(config.data.height, config.data.width)


@dataclass
class Arguments:
    steps: Count = 400
    """Number of training steps; the schedule is shortened in proportion."""
    n_sequences: Sequences = 2_000
    """Number of training sequences."""
    n_test: Sequences = 150
    """Number of fresh sequences for the evaluation."""
    seed: Seed = 0
    """Seed of the data, the initial weights and training."""


def main(args: Arguments) -> int:
    torch.set_num_threads(1)
    quick, small = PRESETS["quick"], CannonballConfig(height=24, width=24)
    config = replace(quick, guide="centroid", state_size=128, data=small, seed=args.seed)
    run = build(replace(config, schedule=quick.schedule.shortened(args.steps)))

    started = time.perf_counter()
    fit(run.model, run.guide, simulate(small, args.n_sequences, seed=args.seed), run.config.schedule, seed=args.seed)
    print(f"{args.steps} steps in {time.perf_counter() - started:.0f} s; evaluated on fresh sequences:")

    fresh = simulate(small, args.n_test, seed=TEST_SEED)
    print(format_table(evaluate(run.model, run.guide, fresh)))

    where = infer(run.guide, fresh.images[:1], fresh.n_objects[:1])
    print("the first object of the first sequence, latent units:", where.mean[0, 0, 0].tolist())
    future = generate(run.model, run.guide, fresh.images[:1, :5], fresh.n_objects[:1], n_frames=30)
    print("where it will be in frame 30, from the first 5:", future.mean[0, 0, -1].tolist())
    return 0


if __name__ == "__main__":
    start(main, Arguments, __doc__)
