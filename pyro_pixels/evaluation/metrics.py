"""Metrics: errors in pixels, identity switches, pixel losses, and the floors set by the physics.

Latent positions are identified up to an affine map (Sec 3.3). One map, fitted by least squares on the sequences with a
single object, takes all latent positions to pixels; objects are matched with the true ones sequence by sequence.
True positions may be NaN in unobserved frames; such frames do not count.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_pixels._batch import object_mask, unseen_frames
from pyro_pixels._matching import assign, pairwise_distances, reorder  # noqa: F401  # also of this module
from pyro_pixels.data import ImageSequences, TrueDynamics
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.kalman import LGSSM
from pyro_pixels.lgssm.marginal import marginal_moments

SWITCH_FRAMES = 4  # the assignments over this number of first and last frames are compared


class Affine(NamedTuple):
    """An affine map from latent units to pixels, latent @ matrix.T + offset, in float64."""

    matrix: Tensor  # (2, 2)
    offset: Tensor  # (2,)
    r2: float  # fraction of the variance of the pixel positions that the map explains on the data it was fitted to

    def __call__(self, a: Tensor) -> Tensor:
        """Maps latent positions (..., 2) to pixels."""
        return a.to(self.matrix) @ self.matrix.mT + self.offset

    def covariance(self, cov: Tensor) -> Tensor:
        """Maps latent covariances (..., 2, 2) to square pixels."""
        return self.matrix @ cov.to(self.matrix) @ self.matrix.mT


def fit_affine(latent: Tensor, positions: Tensor, n_objects: Tensor) -> Affine:
    """Fits the map from latent to true positions by least squares on the sequences with N = 1.

    Args:
        latent: (B, N, T, 2), inferred positions; frames in which these or the true ones are not finite do not count.
        positions: (B, N, T, 2), true positions in pixels.
        n_objects: (B,).

    Raises:
        ValueError: if no sequence has a single object, or none of these has a frame that counts.
    """
    alone = n_objects == 1
    if not alone.any():
        raise ValueError(
            "no sequence has N = 1, but the map from latent units to pixels is fitted to those; add some to the file"
        )
    x = latent[alone, 0].detach().reshape(-1, 2).double()
    y = positions[alone, 0].reshape(-1, 2).double()
    there = (x.isfinite() & y.isfinite()).all(-1)  # in unobserved frames either may be unknown
    if not there.any():
        raise ValueError(
            "no frame of a sequence with N = 1 has both an inferred and a true position that are finite, so the map "
            "from latent units to pixels cannot be fitted; check the inferred positions"
        )
    x, y = x[there], y[there]
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    solution = torch.linalg.lstsq(design, y, driver="gelsd").solution
    residual = (y - design @ solution).square().sum() / (y - y.mean(0)).square().sum()
    return Affine(solution[:2].mT, solution[2], 1.0 - float(residual))


def map_to_pixels(latent: Tensor, data: ImageSequences) -> Affine:
    """Returns the `fit_affine` of inferred positions (n, N, T, 2) in the observed frames of sequences with N = 1."""
    assert data.positions is not None
    return fit_affine(latent, in_frames(data.positions, data.seen), data.n_objects)


def in_frames(a: Tensor, frames: Tensor) -> Tensor:
    """Returns positions (n, N, T, 2), NaN outside ``frames``, bool, (T,) or (n, T)."""
    frames = frames if frames.dim() == 1 else frames.unsqueeze(1)
    return a.masked_fill(~frames.unsqueeze(-1), torch.nan)


def errors(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """Returns the distance (B, N, T) between matched positions, NaN for absent objects and where the truth is NaN."""
    distance = (predicted - truth).norm(dim=-1)
    return torch.where(object_mask(n_objects, truth.shape[1]).unsqueeze(-1), distance, torch.nan)


def known_ends(truth: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
    """Returns masks (B, T) of the first and of the last frames in which all objects have true positions.

    Each has `SWITCH_FRAMES` frames; in a sequence with fewer such frames, each has them all.
    """
    absent = ~object_mask(n_objects, truth.shape[1])
    known = (truth.isfinite().all(-1) | absent.unsqueeze(-1)).all(1)
    rank, n_known = known.cumsum(1), known.sum(1, keepdim=True)
    return known & (rank <= SWITCH_FRAMES), known & (rank > n_known - SWITCH_FRAMES)


def switches(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """Returns (B,) bool, True where the best assignments over the first and over the last frames differ.

    The frames are those of `known_ends`. Counting changes of the best permutation frame by frame would mislead: noise
    alone causes many without any switch.
    """
    first, last = (
        assign(predicted, truth.masked_fill(~frames[:, None, :, None], torch.nan), n_objects)
        for frames in known_ends(truth, n_objects)
    )
    return (first != last).any(1)


def switch_rates(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """Returns (B,) float64, 1 for `switches` and else 0; NaN with one object or fewer than two frames to compare."""
    first, last = known_ends(truth, n_objects)
    comparable = (n_objects > 1) & ((first | last).sum(1) > 1)
    return torch.where(comparable, switches(predicted, truth, n_objects).double(), torch.nan)


def nll_per_frame(images: Tensor, probabilities: Tensor) -> Tensor:
    """Returns -log p (B,) of images (B, T, H, W) within [0, 1] under pixel probabilities, in nats per observed frame.

    Probabilities are clamped to [1e-6, 1 - 1e-6]. The value is NaN if no frame was observed.
    """
    p = probabilities.clamp(1e-6, 1 - 1e-6)
    seen = ~unseen_frames(images)
    loss = F.binary_cross_entropy(p, images.to(p.dtype).nan_to_num(), reduction="none").sum((2, 3))
    return loss.mean(1) if bool(seen.all()) else torch.where(seen, loss, torch.nan).nanmean(1)


def constant_image_nll(images: Tensor, *, batch_size: int = 100) -> Tensor:
    """Returns `nll_per_frame` (B,), float64, of a single grey value, the mean of all observed pixels, if any."""
    parts = images.split(batch_size)
    total = sum(float(part.double().nansum()) for part in parts)
    n = sum(int((~part.isnan()).sum()) if part.is_floating_point() else part.numel() for part in parts)
    if not n:
        return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)
    grey = torch.tensor(total / n, dtype=torch.float64, device=images.device)
    return torch.cat([nll_per_frame(part, grey.expand(part.shape)) for part in parts])


def paper_style_loss(images: Tensor, probabilities: Tensor) -> Tensor:
    """Returns the loss (B,) that may be behind the paper's 0.691: a mean cross entropy with probabilities as logits.

    A perfect frame then scores about 0.689 and a black one ln 2 = 0.693. This reading is a guess; see
    docs/reproduction.md.
    """
    seen, targets = ~unseen_frames(images), images.to(probabilities.dtype).nan_to_num()
    loss = F.binary_cross_entropy_with_logits(probabilities, targets, reduction="none")
    return loss.mean((1, 2, 3)) if bool(seen.all()) else torch.where(seen, loss.mean((2, 3)), torch.nan).nanmean(1)


def floor_predictions(dynamics: TrueDynamics, positions: Tensor, observed: Tensor) -> Tensor:
    """Predicts positions (B, N, T, 2) from the true noisy positions in the observed frames, the errors' floor.

    This is exact inference with the data's true parameters: the smoothed mean of B h_t, averaged over the two launch
    sides with their posterior probabilities. It is a floor in practice, not a proven bound, because the launch is taken
    as a Gaussian with the true first two moments, and because a mean minimises the squared, not the absolute distance.

    Args:
        dynamics: the true parameters, in pixels.
        positions: (B, N, T, 2) in pixels; where they are NaN, the object counts as unobserved.
        observed: bool, (T,) or (B, T).
    """
    lgssm: LGSSM = dynamics.lgssm

    def predict(tracks: Tensor, seen: Tensor) -> Tensor:
        a = tracks.unsqueeze(-3)
        z = (kalman.log_likelihood(lgssm, a, seen) + dynamics.pi.log()).softmax(-1)
        mean = kalman.rts_smoother(lgssm, a, seen).mean @ lgssm.B.mT
        return (z[..., None, None] * mean).sum(-3)

    known = positions.isfinite().all(-1)
    if observed.dim() == 2:
        return predict(positions, (known & observed.unsqueeze(1)).unsqueeze(-2))
    whole = (known | ~observed).all(-1)
    found = torch.empty_like(positions)
    found[whole] = predict(positions[whole], observed)  # one mask, so covariances are computed once
    found[~whole] = predict(positions[~whole], (known[~whole] & observed).unsqueeze(-2))
    return found


def floor_of(data: ImageSequences, observed: Tensor) -> Tensor:
    """Returns the `floor_predictions` (n, N, T, 2) of sequences with ``positions`` and ``dynamics``.

    Args:
        data: true positions in frames without an image are not used.
        observed: bool, (T,) or (n, T).
    """
    assert data.positions is not None
    assert data.dynamics is not None
    return floor_predictions(
        data.dynamics, data.positions.masked_fill(~data.seen[:, None, :, None], torch.nan), observed
    )


def likeliest_labels(dynamics: TrueDynamics, positions: Tensor, n_objects: Tensor, *, reach: float = 4.0) -> Tensor:
    """Relabels true positions (B, N, T, 2) by maximum likelihood, as an observer of unlabelled positions would.

    The likelihood is Eq (10) with the data's true parameters. The search starts from the true labels and exchanges two
    objects over an interval of frames, the best exchange first, as long as that raises the likelihood. The `switches`
    of the result are a floor: even exact positions do not tell these objects apart.

    Args:
        dynamics: the true parameters, in pixels.
        positions: in pixels, NaN for absent objects; objects that are NaN in single frames keep their labels.
        n_objects: (B,).
        reach: only objects that come within this distance in pixels of each other are exchanged.
    """
    a, T = positions.clone(), positions.shape[2]
    mean, C = marginal_moments(dynamics.lgssm, T)
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
            near = improved & ((a[:, i] - a[:, j]).norm(dim=-1).amin(1) < reach)  # False if either object is NaN
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
    """Returns the mean of the values that are not NaN, or NaN if there are none."""
    return float(np.nanmean(x.numpy())) if bool((~x.isnan()).any()) else float("nan")
