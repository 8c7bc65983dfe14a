"""How good is it: errors in pixels, identity switches, pixel losses, and the floors that physics sets.

Latent positions are found up to an affine map (Sec 3.3), so one map, fitted by least squares on the sequences with a
single object and used for all, takes them to pixels. Which latent object is which true one is settled per sequence.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_pixels import lgssm as exact
from pyro_pixels._batch import object_mask
from pyro_pixels.data import TrueDynamics
from pyro_pixels.lgssm.kalman import LGSSM

SWITCH_FRAMES = 4  # the assignment over so many first frames is compared with that over so many last ones


class Affine(NamedTuple):
    """pixels = latent @ matrix.T + offset, in float64."""

    matrix: Tensor  # (2, 2)
    offset: Tensor  # (2,)
    r2: float  # share of the variance of the pixel positions that the map explains, on what it was fitted on

    def __call__(self, a: Tensor) -> Tensor:
        """Latent positions (..., 2) in pixels."""
        return a.to(self.matrix) @ self.matrix.mT + self.offset

    def covariance(self, cov: Tensor) -> Tensor:
        """Latent covariances (..., 2, 2) in square pixels."""
        return self.matrix @ cov.to(self.matrix) @ self.matrix.mT


def fit_affine(latent: Tensor, positions: Tensor, n_objects: Tensor) -> Affine:
    """The least-squares map from latent to true positions over the sequences with N = 1.

    Args:
        latent, positions: (B, N, T, 2); n_objects: (B,).

    Raises:
        ValueError: if no sequence has a single object, so that which object is which would have to be guessed.
    """
    alone = n_objects == 1
    if not alone.any():
        raise ValueError(
            "no sequence has N = 1, which the map from latent units to pixels is fitted on; add some to the file"
        )
    x = latent[alone, 0].reshape(-1, 2).double()
    y = positions[alone, 0].reshape(-1, 2).double()
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    solution = torch.linalg.lstsq(design, y, driver="gelsd").solution
    residual = (y - design @ solution).square().sum() / (y - y.mean(0)).square().sum()
    return Affine(solution[:2].mT, solution[2], 1.0 - float(residual))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, N) mean over time of the distance between object i of ``a`` and object j of ``b``, both (B, N, T, 2)."""
    return (a.unsqueeze(2) - b.unsqueeze(1)).norm(dim=-1).mean(-1)


def assign(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """The best one-to-one assignment of each sequence, by mean distance over all the frames given.

    Returns:
        order (B, N) int64: ``predicted[b, order[b, n]]`` belongs to ``truth[b, n]``; absent objects keep their place.
    """
    costs = distances(predicted, truth)
    order = torch.arange(predicted.shape[1]).repeat(len(predicted), 1)
    for b, n in enumerate(n_objects.tolist()):
        rows, columns = linear_sum_assignment(costs[b, :n, :n].numpy())
        order[b, torch.from_numpy(columns)] = torch.from_numpy(rows)
    return order


def reorder(a: Tensor, order: Tensor) -> Tensor:
    """Objects of ``a`` (B, N, ...) in the order (B, N) that `assign` gave."""
    return a[torch.arange(len(a)).unsqueeze(1), order]


def errors(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """(B, N, T) distance in pixels of two sets of positions in the same order, NaN where there is no object."""
    distance = (predicted - truth).norm(dim=-1)
    return torch.where(object_mask(n_objects, truth.shape[1]).unsqueeze(-1), distance, torch.nan)


def switches(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """(B,) bool: the best assignment over the first frames is not that over the last, identities have swapped.

    A per-frame count of permutations is no measure of swaps: noise alone, with no swap at all, makes many.
    """
    k = min(SWITCH_FRAMES, truth.shape[2])
    first = assign(predicted[:, :, :k], truth[:, :, :k], n_objects)
    last = assign(predicted[:, :, -k:], truth[:, :, -k:], n_objects)
    return (first != last).any(1)


def nll_per_frame(images: Tensor, probabilities: Tensor) -> Tensor:
    """(B,) -log p of binary images (B, T, H, W) under pixel probabilities, in nats per frame.

    Probabilities are kept 1e-6 away from 0 and 1.
    """
    p = probabilities.clamp(1e-6, 1 - 1e-6)
    return F.binary_cross_entropy(p, images.to(p.dtype), reduction="none").sum((2, 3)).mean(1)


def paper_style_loss(images: Tensor, probabilities: Tensor) -> Tensor:
    """(B,) what the paper's 0.691 may be: probabilities taken for logits in a cross entropy averaged over pixels.

    A perfect frame then scores about 0.689 and a black one ln 2 = 0.693. Not proven; see docs/reproduction.md.
    """
    return F.binary_cross_entropy_with_logits(probabilities, images.to(probabilities.dtype), reduction="none").mean(
        (1, 2, 3)
    )


def floor_predictions(dynamics: TrueDynamics, positions: Tensor, observed: Tensor) -> Tensor:
    """The best guess (B, N, T, 2) of an observer who is given the true noisy positions at the observed frames.

    Exact inference with the data's true parameters: the smoothed mean of B h_t, averaged over the two launch sides with
    their posterior probabilities. A floor for all practical purposes, not a proven bound: the launch is taken as a
    Gaussian with the true first two moments, and a mean is the best guess in squared rather than absolute distance.

    Args:
        positions: (B, N, T, 2) in pixels, NaN where there is no object.
        observed: (T,) bool.
    """
    lgssm: LGSSM = dynamics.lgssm
    a = positions.nan_to_num().unsqueeze(-3)
    z = (exact.log_likelihood(lgssm, a, observed) + dynamics.pi.log()).softmax(-1)
    mean = exact.rts_smoother(lgssm, a, observed).mean @ lgssm.B.mT
    return (z[..., None, None] * mean).sum(-3)


def likeliest_labels(dynamics: TrueDynamics, positions: Tensor, n_objects: Tensor, *, reach: float = 4.0) -> Tensor:
    """Positions (B, N, T, 2) with the labels that an observer finds likeliest who is given them without labels.

    Exact likelihoods with the data's true parameters, Eq (10). The observer starts from the true labels and exchanges
    two objects over an interval of frames as long as that raises the likelihood, the best exchange first. What
    `switches` counts in the result is therefore a floor: not even exact positions tell these objects apart. Only
    objects that come within ``reach`` pixels of each other are tried.

    Args:
        positions: in pixels, NaN where there is no object.
    """
    a, T = positions.clone(), positions.shape[2]
    mean, C = exact.marginal_moments(dynamics.lgssm, T)
    P, log_det = torch.linalg.inv(C), torch.logdet(C)

    def log_p(tracks: Tensor) -> Tensor:
        e = tracks.flatten(-2).unsqueeze(-2) - mean
        distance = torch.einsum("bki,kij,bkj->bk", e, P, e)
        return (dynamics.pi.log() - 0.5 * (distance + log_det)).logsumexp(-1)  # up to a constant

    intervals = [(t, end) for t in range(T) for end in range(t + 1, T + 1) if (t, end) != (0, T)]
    improved = n_objects > 1
    while bool(improved.any()):
        best, exchanged = torch.full((len(a),), 1e-9, dtype=a.dtype), a.clone()
        for j, i in itertools.combinations(range(a.shape[1]), 2):
            near = improved & ((a[:, i] - a[:, j]).norm(dim=-1).amin(1) < reach)  # False where one of them is NaN
            x, y = a[near, i], a[near, j]
            before = log_p(x) + log_p(y)
            for t, end in intervals:
                x_new, y_new = x.clone(), y.clone()
                x_new[:, t:end], y_new[:, t:end] = y[:, t:end], x[:, t:end]
                gain = log_p(x_new) + log_p(y_new) - before
                better = gain > best[near]
                rows = near.nonzero()[better, 0]
                best[rows] = gain[better]
                exchanged[rows] = a[rows]
                exchanged[rows, i], exchanged[rows, j] = x_new[better], y_new[better]
        improved = improved & (best > 1e-9)
        a = exchanged
    return a


def nan_mean(x: Tensor) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    return float(np.nanmean(x.numpy())) if bool((~x.isnan()).any()) else float("nan")
