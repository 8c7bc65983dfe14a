"""Calibration: the coverage of predicted regions, and a correction of two variances.

A prediction of a position is N(mean, cov). Its region of level p contains all positions within the Mahalanobis distance
whose square is the p-quantile of chi^2 with 2 degrees of freedom. `mahalanobis_distances` measures the squared distance
of every true position, and `coverage` the fraction within the region of each level, which is p for a calibrated model.
Positions and covariances are mapped to pixels by the affine map that is fitted on the sequences with a single object,
and objects are matched with the true ones over the observed frames.

Where identities are wrong no covariance helps; `Distances.held` marks the sequences in which they are right.

`fit_correction` finds the factors on Sigma_A and on the guide's variances R that maximise the likelihood of the true
positions of validation sequences. The corrected model stays within the same family. None of this is in the paper.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_pixels._batch import check_any, object_mask
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.answers import check_n_seen, forecast, seen_by_default
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.latent_states import averaged
from pyro_pixels.queries.predict import Prediction, interpolate

MOST_TRIALS = 30  # evaluations in `fit_correction`
LEVELS = (0.5, 0.9, 0.95)
KINDS = ("smoothing", "forecasting", "interpolation")
Module = TypeVar("Module", bound=nn.Module)


class Distances(NamedTuple):
    """Squared Mahalanobis distances of true positions from their predictions."""

    squared: Tensor  # (B, N, T), NaN for absent objects and in frames that are not predicted or have no truth
    log_density: Tensor  # (B, N, T), of the true positions, per square pixel; NaN in the same places
    held: Tensor  # (B,) bool, True where identities did not switch


class Coverage(NamedTuple):
    """The fraction of true positions within the predicted regions of each level."""

    levels: Tensor  # (L,)
    shares: Tensor  # (L,)
    n_positions: int


class Correction(NamedTuple):
    """Factors on the variances of a model and its guide."""

    position_noise: float = 1.0  # on Sigma_A
    measurement_noise: float = 1.0  # on the guide's R


def coverage(distances: Distances, levels: Sequence[float] = LEVELS, among: Tensor | None = None) -> Coverage:
    """Returns the coverage of each level; a fine grid of levels gives a reliability curve.

    Args:
        distances: from `mahalanobis_distances`.
        levels: numbers between 0 and 1.
        among: (B,) bool, the sequences to use, by default all.

    Raises:
        ValueError: if a level is not between 0 and 1.
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels are {tuple(levels)}; wanted numbers between 0 and 1")
    squared = distances.squared if among is None else distances.squared[among]
    squared = squared[~squared.isnan()]
    radius = torch.from_numpy(2 * scipy.special.gammaincinv(1, np.asarray(levels, float)))
    shares = (squared.unsqueeze(-1) <= radius).double().mean(0)
    return Coverage(torch.tensor(levels, dtype=torch.float64), shares, len(squared))


@torch.no_grad()
def mahalanobis_distances(
    model: PixelModel, guide: Guide, data: ImageSequences, *, n_seen: int | None = None, n_samples: int = 0,
    batch_size: int = 100,
) -> dict[str, Distances]:  # fmt: skip
    """Measures the distances of true positions from smoothing, forecasting and interpolation.

    Args:
        model: the trained model.
        guide: the trained guide.
        data: sequences with ``positions``, some with N = 1.
        n_seen: observed frames before forecasting, counted from each sequence's first observed one, and at either end
            of it for interpolation; default: 5, or fewer where sequences have fewer than 11 frames.
        n_samples: if above 0, predictions are `averaged` over this number of samples of q. Use it for guides that do
            not know the dynamics, whose covariances otherwise leave out the uncertainty of q and z.
        batch_size: sequences per batch.

    Returns:
        Each of `KINDS` -> its `Distances`: of smoothing in all frames, of forecasting in those after the first, of
        interpolation in those between the first and the last. Sequences without an observed frame have none.

    Raises:
        ValueError: if there are no sequences, the truth is missing, or the sequences are too short.
    """
    check_any(len(data), "to predict")
    T, N = data.images.shape[1], int(data.n_objects.max())
    if data.positions is None:
        raise ValueError("the sequences have no positions; wanted simulated ones (examples/simulate.py)")
    n_seen = check_n_seen(seen_by_default(T) if n_seen is None else n_seen, T)
    device = next(model.parameters()).device
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in KINDS}
    for i in range(0, len(data), batch_size):
        part = data[i : i + batch_size]
        images, n_objects = part.images.to(device), part.n_objects.to(device)
        for kind, seen in _observed(part, n_seen).items():
            found = (
                forecast(model, guide, part, n_seen, n_samples=n_samples)
                if kind == "forecasting"
                else interpolate(model, guide, images, n_objects, seen.to(device), n_samples=n_samples)
            )
            moments[kind].append(_moments(averaged(model, found, n_objects) if n_samples else found, N))
    found = {kind: [torch.cat(x) for x in zip(*parts)] for kind, parts in moments.items()}
    to_pixels, masks = metrics.map_to_pixels(found["smoothing"][0], data), _observed(data, n_seen)
    some, before_end = data.seen.any(1, keepdim=True), torch.arange(T) < data.lengths[:, None]
    predicted = {
        "smoothing": some.expand_as(data.seen),
        "forecasting": some & ~masks["forecasting"],
        "interpolation": before_end & ~masks["interpolation"],
    }
    return {
        kind: _compare(
            data, to_pixels(mean), to_pixels.covariance(cov), masks[kind] & data.seen, predicted[kind].unsqueeze(1)
        )
        for kind, (mean, cov) in found.items()
    }


def _observed(data: ImageSequences, n_seen: int) -> dict[str, Tensor]:
    """Returns for each of `KINDS` the mask of the frames that are given, as far as they are not NaN."""
    everywhere = torch.ones(data.images.shape[1], dtype=torch.bool)
    return {"smoothing": everywhere, "forecasting": data.first(n_seen), "interpolation": data.ends(n_seen)}


def _moments(prediction: Prediction, n_objects: int) -> tuple[Tensor, Tensor]:
    """Returns mean and covariance, padded with NaN to ``n_objects`` objects."""
    missing = n_objects - prediction.mean.shape[1]
    mean, cov = prediction.mean.cpu(), prediction.cov.cpu()
    pad = mean.new_full((len(mean), missing, *mean.shape[2:]), torch.nan)
    return torch.cat([mean, pad], 1), torch.cat([cov, pad.unsqueeze(-1).expand(*pad.shape, 2)], 1)


def _compare(data: ImageSequences, mean: Tensor, cov: Tensor, seen: Tensor, predicted: Tensor) -> Distances:
    """Matches objects over the frames ``seen`` (n, T) and measures distances in the frames ``predicted`` (n, 1, T)."""
    truth, n_objects = data.positions, data.n_objects
    assert truth is not None
    shown = metrics.in_frames(truth, seen)
    order = metrics.assign(mean, shown, n_objects)
    mean, cov = metrics.reorder(mean, order), metrics.reorder(cov, order)
    valid = object_mask(n_objects, truth.shape[1]).unsqueeze(-1) & predicted & truth.isfinite().all(-1)
    eye = torch.eye(2, dtype=cov.dtype)
    L = torch.linalg.cholesky(torch.where(valid[..., None, None], cov, eye))
    e = (truth - mean).nan_to_num().unsqueeze(-1)
    squared = torch.linalg.solve_triangular(L, e, upper=False).square().sum((-2, -1))
    log_density = -0.5 * squared - L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - float(np.log(2 * np.pi))
    nan = torch.full_like(squared, torch.nan)
    held = ~metrics.switches(mean, shown, n_objects)
    return Distances(torch.where(valid, squared, nan), torch.where(valid, log_density, nan), held)


def corrected(model: PixelModel, guide: Guide, correction: Correction) -> tuple[PixelModel, Guide]:
    """Returns copies of model and guide with corrected variances; dynamics that they share stay shared.

    Raises:
        ValueError: if the guide has no ``head`` that returns a standard deviation.
    """
    if not isinstance(getattr(guide, "head", None), nn.Module):
        raise ValueError(f"a {type(guide).__name__} has no head that returns R; wanted a recurrent or structured guide")
    model, guide = copy.deepcopy((model, guide))
    root, factor = model.dynamics.root_Sigma_A, correction.position_noise**0.5
    with torch.no_grad():
        root.copy_(factor * root.tril(-1) + torch.diag_embed(root.diagonal() + np.log(factor)))
    guide.head = ScaledHead(guide.head, correction.measurement_noise**0.5)  # type: ignore[arg-type]
    return model, guide


class ScaledHead(nn.Module):
    """A wrapper that multiplies the standard deviations of a head by a factor."""

    def __init__(self, head: nn.Module, factor: float) -> None:
        super().__init__()
        self.head, self.factor = head, factor

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor, **told: float) -> tuple[Tensor, Tensor]:
        """Returns the head's mean and its standard deviation times the factor."""
        mean, std = self.head(s, images, n_objects, **told)
        return mean, self.factor * std


def fit_correction(
    model: PixelModel,
    guide: Guide,
    data: ImageSequences,
    *,
    n_seen: int | None = None,
    n_samples: int = 0,
    progress: bool = False,
) -> Correction:
    """Fits the correction by maximum likelihood of the true positions of validation sequences.

    Sequences with switched identities are left out, because wrong identities would be mistaken for noise. The three
    kinds of predictions have equal weight.

    Args:
        model: the trained model.
        guide: the trained guide.
        data: validation sequences with ``positions``, different from those whose coverage is reported; 60 are enough.
        n_seen: as in `mahalanobis_distances`.
        n_samples: as in `mahalanobis_distances`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: if identities switch in all sequences, or as in `mahalanobis_distances` and `corrected`.
    """
    held = mahalanobis_distances(model, guide, data, n_seen=n_seen)["smoothing"].held
    check_any(int(held.sum()), "whose identities are right, on which variances can be corrected")
    data = data[held.nonzero().squeeze(1)]

    def loss(log_factors: np.ndarray) -> float:
        trial = corrected(model, guide, Correction(*np.exp(log_factors).tolist()))
        with torch.random.fork_rng(devices=[]):  # the same samples for every trial
            torch.manual_seed(0)
            each = mahalanobis_distances(*trial, data, n_seen=n_seen, n_samples=n_samples)
        bar.update()
        return -sum(float(x.log_density[x.held].nanmean()) for x in each.values())

    simplex = np.log([(1.0, 1.0), (2.0, 1.0), (1.0, 0.3)])
    options = {"initial_simplex": simplex, "xatol": 0.1, "fatol": 1e-3, "maxfev": MOST_TRIALS}
    with tqdm(total=MOST_TRIALS, desc="correction", disable=None if progress else True, leave=False) as bar:
        found = scipy.optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options=options)
    return Correction(*np.exp(found.x).tolist())
