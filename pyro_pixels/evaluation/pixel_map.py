"""From latent units to pixels without true positions: by asking the renderer where it draws.

Latent positions are found up to an affine map (Sec 3.3). A guide whose measurements are centroids of pixels
(`AttentionHead`, `TrackingHead`) has it built in: each axis runs from -1 to 1 over the image. For every other guide a
single object is drawn at a grid of latent positions, within the range of those that were inferred, and the map is the
least-squares fit to the centroids of what was drawn, less the empty canvas. Its error is the root mean square distance
of the centroids from the fit; where it is large, the latent space is not an affine picture of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels.evaluation.metrics import Affine
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.model.pixel_model import PixelModel

GRID = 24  # positions along each axis
FAINT = 0.5  # of the median mass: what is drawn less is not counted


class PixelMap(NamedTuple):
    """A map from latent units to pixels (column, row), rows downwards."""

    affine: Affine
    error_px: float
    """Root mean square distance of what is drawn from the map; 0 where the guide knows it."""
    known: bool
    """Whether it is the guide's own, and not fitted."""


@torch.no_grad()
def map_to_pixels(model: PixelModel, guide: Guide, inferred: Tensor | None = None) -> PixelMap:
    """The map of a trained model and guide, without true positions.

    Args:
        inferred: (..., 2), latent positions; the map is fitted over their range. Not needed where the guide knows it.

    Raises:
        ValueError: if the map is not known and nothing was inferred, or the renderer draws nothing there.
    """
    height, width = model.renderer.height, model.renderer.width
    if isinstance(getattr(guide, "head", None), AttentionHead):
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
        return PixelMap(Affine(torch.diag(half), half, 1.0), 0.0, True)
    if inferred is None:
        raise ValueError(f"a {type(guide).__name__} does not know pixels; give inferred positions to fit the map on")
    points = inferred.reshape(-1, 2)
    points = points[points.isfinite().all(-1)].double().cpu()
    low, high = points.quantile(0.01, 0), points.quantile(0.99, 0)
    axes = [torch.linspace(float(a), float(b), GRID, dtype=torch.float64) for a, b in zip(low, high)]
    x = torch.cartesian_prod(*axes)  # (G^2, 2)
    centroid, mass = drawn_centroids(model, x)
    there = mass > FAINT * mass.median()
    if int(there.sum()) < 6 or not float(mass.max()) > 1e-3:
        raise ValueError("the renderer draws nothing where objects were inferred; train for more steps")
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)[there]
    solution = torch.linalg.lstsq(design, centroid[there], driver="gelsd").solution
    e = (centroid[there] - design @ solution).square()
    spread = (centroid[there] - centroid[there].mean(0)).square().sum()
    affine = Affine(solution[:2].mT, solution[2], 1.0 - float(e.sum() / spread))
    return PixelMap(affine, float(e.sum(-1).mean().sqrt()), False)


@torch.no_grad()
def drawn_centroids(model: PixelModel, a: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (M, 2), (column, row), and mass (M,) of one object drawn at latent positions a (M, 2), in pixels."""
    device = next(model.parameters()).device
    present = torch.ones(1, dtype=torch.bool, device=device)
    image = model.likelihood.mean(model.renderer(a[None].to(device), present))  # (M, H, W)
    empty = model.likelihood.mean(model.renderer(a[None, :1].to(device), ~present))
    drawn = (image - empty).clamp(min=0).double().cpu()
    H, W = drawn.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    mass = drawn.sum((-2, -1))
    place = torch.stack([(drawn * g).sum((-2, -1)) for g in (columns, rows)], -1)
    return place / mass.clamp(min=1e-12).unsqueeze(-1), mass
