"""Shows whether the latent space of a run is torn: where single objects are in the image, and where q(a | v) puts them.

Left: true paths of single objects in pixels, and the inferred ones in latent units. Right: inferred positions of all
frames, coloured by the true column and row. In a good run the colours change evenly; where the space is torn,
neighbours in the image lie far apart. The more the best cubic map to pixels improves on the best affine one, the more
warped the space is. The script also prints the health check, which sees neither labels nor this figure.
"""

from examples._common import QueryArguments, new_folder, open_run, say_where, start

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pyro_pixels._options import Sequences, result_file
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.health import check_health, format_health
from pyro_pixels.plots.paper import save_figure
from pyro_pixels.queries.predict import infer

N_PATHS = 30


@dataclass
class Arguments(QueryArguments):
    n_sequences: Sequences = 600
    """Number of sequences to query; a third of the simulated ones has a single object."""


def error_of_polynomial(a: Tensor, positions: Tensor, degree: int) -> float:
    """Returns the mean error, in pixels, of the best polynomial map of ``degree`` from a (..., 2) to ``positions``."""
    x, y = ((a - a.mean(0)) / a.std(0)).unbind(-1)
    terms = torch.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)], -1)
    return float((terms @ torch.linalg.lstsq(terms, positions).solution - positions).norm(dim=-1).mean())


def main(args: Arguments) -> None:
    out = result_file(args.out or args.home / "latent_space.png", ".png")
    new_folder(out.parent)
    run, data, device = open_run(args)
    alone = data[data.n_objects == 1]
    if alone.positions is None or not len(alone):
        raise ValueError("no sequence has N = 1 and known positions; give --data that has some, or leave it out")
    a = infer(run.guide, alone.images.to(device), alone.n_objects.to(device)).mean.cpu()
    affine = metrics.fit_affine(a, alone.positions, alone.n_objects)
    latent, pixels = a[:, 0], alone.positions[:, 0]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    for path, where in zip(latent[:N_PATHS], pixels[:N_PATHS]):
        axes[0].plot(*where.T, lw=0.7)
        axes[1].plot(*path.T, lw=0.7)
    axes[0].set(title="true paths, pixels", xlim=(0, data.size[1] - 1), ylim=(data.size[0] - 1, 0))
    axes[1].set_title("inferred, latent units")
    for axis, colour, name in zip(axes[2:], pixels.flatten(0, 1).T, ("column", "row")):
        axis.scatter(*latent.flatten(0, 1).T, c=colour, s=1)
        axis.set_title(f"coloured by {name}")
    figure.suptitle(f"step {run.step:,}, seed {run.config.seed}: R² of the affine map {affine.r2:.2f}")
    save_figure(figure, out)
    there = pixels.isfinite().all(-1)  # unobserved frames may have no true positions
    points, places = latent[there].double(), pixels[there]
    left = [error_of_polynomial(points, places, degree) for degree in (1, 3)]
    print(f"R^2 of the best affine map to pixels, N = 1: {affine.r2:.3f}")
    print(f"error of the best affine map {left[0]:.2f} pixels, of the best cubic one {left[1]:.2f}")
    print(format_health(check_health(run.model, run.guide, data)))
    say_where([out])


if __name__ == "__main__":
    start(main, Arguments, __doc__)
