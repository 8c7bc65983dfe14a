"""A classical tracker as a baseline: blob detection, Kalman filters and the Hungarian method.

It is not in the paper. It sees the same pixels as the model, but is given what the model has to learn: the radius of a
ball and the true dynamics. `evaluate_tracker` returns a table of the same layout as `evaluate`.
"""

import math
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_pixels._batch import check_batch, object_mask
from pyro_pixels.data import ImageSequences, TrueDynamics
from pyro_pixels.evaluation import metrics
from pyro_pixels.evaluation.table import N_SEEN, errors_in_pixels, means_by_n
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.kalman import Gaussians

RADIUS = 2.0  # radius of a ball in pixels, `CannonballConfig.radius`
HIDDEN = 0.2  # excess area of a blob, as a fraction of a disk's area, from which it is split into one more disk


class BlobTracker:
    """A tracker of blobs with one Kalman filter per object and an optimal assignment in every frame.

    Centres are found with `find_disks`. Each object's filter is exact for the true dynamics, a mixture over the launch
    sides. In each frame centres are assigned to objects by maximum likelihood under the forecasts; an object without a
    centre, for instance because another ball hides it, has no measurement in that frame.

    Args:
        dynamics: the true parameters, in pixels.
        radius: radius of a ball, in pixels.
    """

    def __init__(self, dynamics: TrueDynamics, radius: float = RADIUS) -> None:
        self.dynamics, self.radius = dynamics, radius

    def track(self, images: Tensor, n_objects: Tensor) -> Tensor:
        """Returns positions (B, N, T, 2) in pixels: measured centres or else forecasts, NaN for absent objects.

        Args:
            images: (B, T, H, W), 0 or 1.
            n_objects: (B,).

        Raises:
            ValueError: if these do not fit together.
        """
        measured, forecast = self._follow(images, n_objects, torch.ones(images.shape[1:2], dtype=torch.bool))
        return torch.where(measured.isnan(), forecast, measured)

    def predict(self, images: Tensor, n_objects: Tensor, observed: Tensor) -> Tensor:
        """Returns positions (B, N, T, 2) at all frames by exact smoothing of the centres in the observed frames.

        Args:
            images: (B, T, H, W), 0 or 1; unobserved frames are ignored.
            n_objects: (B,).
            observed: bool, (T,) or (B, T), such as the first 5 frames, or these and the last 5 for interpolation.

        Raises:
            ValueError: if these do not fit together.
        """
        if observed.dtype != torch.bool or observed.shape not in (images.shape[1:2], images.shape[:2]):
            raise ValueError(
                f"observed is {observed.dtype} {tuple(observed.shape)}; wanted bool (T,) or (B, T), one per frame"
            )
        measured, _ = self._follow(images, n_objects, observed)
        path = metrics.floor_predictions(self.dynamics, measured, observed)
        return path.masked_fill(~object_mask(n_objects, path.shape[1])[:, :, None, None], torch.nan)

    def _follow(self, images: Tensor, n_objects: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns measured centres, NaN where there is none, and one-step forecasts, each (B, N, T, 2)."""
        check_batch(images, n_objects)
        centres = find_disks((images > 0.5) & observed[..., None, None], n_objects, self.radius)  # (B, N, T, 2)
        lgssm, batch = self.dynamics.lgssm, centres.shape[:2]
        state = Gaussians(lgssm.mu.expand(*batch, -1, -1), lgssm.Sigma.expand(*batch, -1, -1, -1))  # (B, N, K, ...)
        log_w = self.dynamics.pi.log().expand(*batch, -1)
        measured, forecasts = torch.full_like(centres, torch.nan), []
        for t in range(centres.shape[2]):
            state = kalman.predict(lgssm, state) if t else state
            forecasts.append((log_w.exp().unsqueeze(-1) * state.mean).sum(2) @ lgssm.B.mT)
            each = Gaussians(*(x.unsqueeze(2) for x in state))  # every object with every centre: (B, N, N, K, ...)
            density = kalman.update(lgssm, each, centres[:, None, :, t, None])[1]
            cost = -(log_w.unsqueeze(2) + density).logsumexp(-1)
            for b, n in enumerate(n_objects.tolist()):
                m = int((~centres[b, :, t, 0].isnan()).sum())
                objects, chosen = scipy.optimize.linear_sum_assignment(cost[b, :n, :m].numpy())
                measured[b, objects, t] = centres[b, chosen, t]
            a = measured[:, :, t]
            state, log_density = kalman.update(lgssm, state, a.nan_to_num().unsqueeze(2), ~a.isnan().any(-1, True))
            log_w = (log_w + log_density).log_softmax(-1)
        absent = ~object_mask(n_objects, batch[1])[:, :, None, None]
        return measured, torch.stack(forecasts, 2).masked_fill(absent, torch.nan)


def find_disks(images: Tensor, n_objects: Tensor, radius: float = RADIUS) -> Tensor:
    """Finds the centres (B, N, T, 2) of white disks, (column, row) in pixels, float64, padded with NaN.

    A blob is a 4-connected set of white pixels, and its centre is their mean. With fewer blobs than objects, the blob
    with the largest excess area over its disks is given one more disk, if the excess is at least a fifth of a disk,
    and k-means splits it. With more blobs than objects, the largest are used.

    Args:
        images: (B, T, H, W), bool.
        n_objects: (B,).
        radius: radius of a disk, in pixels.
    """
    B, T = images.shape[:2]
    centres = np.full((B, int(n_objects.max()), T, 2), np.nan)
    frames = images.numpy()
    for b, n in enumerate(n_objects.tolist()):
        for t in range(T):
            found = _find(frames[b, t], n, math.pi * radius**2)
            centres[b, : len(found), t] = found
    return torch.from_numpy(centres)


def evaluate_tracker(data: ImageSequences, *, n_seen: int = N_SEEN, radius: float = RADIUS) -> dict[str, Any]:
    """Evaluates a `BlobTracker`: the errors in pixels and the floors of `evaluate`.

    Args:
        data: sequences with ``positions`` and ``dynamics``.
        n_seen: observed frames before generation, and at either end for interpolation.
        radius: radius of a ball, in pixels.

    Raises:
        ValueError: if the truth is missing, or the sequences are too short.
    """
    T = data.images.shape[1]
    if data.positions is None or data.dynamics is None:
        raise ValueError("the sequences have no positions or no dynamics; wanted simulated ones (examples/simulate.py)")
    if n_seen < 1 or 2 * n_seen >= T:
        raise ValueError(
            f"sequences have {T} frames; observing {n_seen} (at least 1) at either end needs more than {2 * n_seen}"
        )
    tracker = BlobTracker(data.dynamics, radius)
    both = data.first(n_seen), data.ends(n_seen)
    generated, interpolated = (tracker.predict(data.images, data.n_objects, seen) for seen in both)
    tracked = tracker.track(data.images, data.n_objects)
    values = errors_in_pixels(data, tracked, generated, interpolated, n_seen)
    return {"n_seen": n_seen, "n_frames": T} | means_by_n(values, data.n_objects)


def _find(image: NDArray[np.bool_], n: int, area: float) -> NDArray[np.float64]:
    """Finds at most ``n`` centres (m, 2), (column, row), of disks of the given area in an image (H, W)."""
    labels, _ = scipy.ndimage.label(image)
    sizes = np.bincount(labels.ravel())[1:]
    blobs = np.argsort(-sizes, kind="stable")[:n]
    n_disks = np.ones(len(blobs), np.int64)
    while len(blobs) and n_disks.sum() < n:
        excess = sizes[blobs] / area - n_disks
        if excess.max() < HIDDEN:
            break
        n_disks[excess.argmax()] += 1
    centres = [
        _split(np.argwhere(labels == blob + 1)[:, ::-1].astype(float), int(k)) for blob, k in zip(blobs, n_disks)
    ]
    return np.concatenate(centres) if centres else np.empty((0, 2))


def _split(pixels: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Splits pixels (p, 2) into k clusters with centres (k, 2) by k-means, starting from pixels far apart."""
    centres = pixels.mean(0, keepdims=True)
    if k > 1:
        chosen = pixels[[((pixels - centres) ** 2).sum(1).argmax()]]
        while len(chosen) < k:
            nearest = ((pixels[:, None] - chosen) ** 2).sum(-1).min(1)
            chosen = np.concatenate([chosen, pixels[[nearest.argmax()]]])
        centres, _ = scipy.cluster.vq.kmeans2(pixels, chosen, minit="matrix")
    return centres
