"""The map from latent units to pixels without true positions, found from what the renderer draws.

Latent positions are identified up to an affine map (Sec 3.3). Guides whose measurements are centroids of pixels
(`AttentionHead`, `TrackingHead`) fix it, untangled, refined or corrected ones too: each axis runs from -1 to 1 over the
image. For every other guide a single
object is drawn on a grid of latent positions within the range of the inferred ones, and the map is the least-squares
fit to the centroids of these drawings minus the empty canvas. Its error is the root mean square distance of the
centroids from the fit; if it is large, the latent space is not an affine picture of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels._pyro import check_precision_of
from pyro_pixels.evaluation.calibration import ScaledHead
from pyro_pixels.evaluation.metrics import Affine
from pyro_pixels.guides.base import Guide
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.guides.joint import JointGuide
from pyro_pixels.guides.refining import RefinedGuide
from pyro_pixels.guides.untangled import UntangledGuide
from pyro_pixels.model.pixel_model import PixelModel

GRID = 24  # positions along each axis
FAINT = 0.5  # fraction of the median mass below which drawings are ignored


class PixelMap(NamedTuple):
    """A map from latent units to pixels (column, row), rows downwards."""

    affine: Affine
    error_px: float
    """Root mean square distance of the drawn centroids from the map; 0 if the guide fixes the map."""
    known: bool
    """Whether the guide fixes the map, so that none was fitted."""


@torch.no_grad()
def map_to_pixels(model: PixelModel, guide: Guide, inferred: Tensor | None = None) -> PixelMap:
    """Returns the map of a trained model and guide, without true positions.

    Args:
        inferred: (..., 2), latent positions, over whose range the map is fitted. Not needed if the guide fixes the map.

    Raises:
        ValueError: if the map must be fitted and ``inferred`` is None, or if the renderer draws nothing there.
    """
    height, width = model.renderer.height, model.renderer.width
    if isinstance(_head_within(guide), AttentionHead):
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
        return PixelMap(Affine(torch.diag(half), half, 1.0), 0.0, True)
    if inferred is None:
        raise ValueError(f"{type(guide).__name__} has no fixed map to pixels; give inferred positions to fit one")
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


def _head_within(guide: object) -> object:
    """Returns the head of a guide, None if there is none, out of wrappers that leave the latent space as it is."""
    while isinstance(guide, UntangledGuide | RefinedGuide | JointGuide):
        guide = guide.guide
    head = getattr(guide, "head", None)
    while isinstance(head, ScaledHead):
        head = head.head
    return head


@torch.no_grad()
def drawn_centroids(model: PixelModel, a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns centroid (M, 2), (column, row), and mass (M,) of one object drawn at latent a (M, 2), in pixels."""
    check_precision_of("model", model)
    device = next(model.parameters()).device
    present = torch.ones(1, dtype=torch.bool, device=device)
    image = model.likelihood.checked_mean(model.renderer(a[None].to(device), present))  # (M, H, W)
    empty = model.likelihood.checked_mean(model.renderer(a[None, :1].to(device), ~present))
    drawn = (image - empty).clamp(min=0).double().cpu()
    H, W = drawn.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    mass = drawn.sum((-2, -1))
    place = torch.stack([(drawn * g).sum((-2, -1)) for g in (columns, rows)], -1)
    return place / mass.clamp(min=1e-12).unsqueeze(-1), mass
