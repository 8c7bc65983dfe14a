"""Soft assignment of white pixels to objects, and the Gaussian prior over the paths around which it is made.

Used by `TrackingHead`, whose module describes the method. Several hypotheses about all objects can be kept side by
side: S hypotheses about N objects are N S blobs, those of an object next to each other.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels.guides.heads import WhitePixels
from pyro_pixels.lgssm.dynamics import Dynamics, collapse_components
from pyro_pixels.lgssm.marginal import response, start_moments
from pyro_pixels.lgssm.small_matrices import cholesky_solve, det_2x2, inverse_2x2

TRACK_NOISE = 0.02  # standard deviation of measurements around a path, in latent units
LEAST_MASS = 1e-4  # of an object's pixels, so that its centroid is finite
LATER_START = 0.03  # nats by which tracks must be likelier for each start before theirs; rounding is below 0.001


class Pixels(NamedTuple):
    """The white pixels of each frame, as rows of coordinates for matrix products."""

    v: Tensor  # (B, T, k), their values; 0 for padding
    homogeneous: Tensor  # (B, T, 3, k), rows: column, row and 1
    weighed: Tensor  # (B, T, 3, k), the same times v; sums over pixels are moments and masses

    @classmethod
    def of(cls, white: WhitePixels) -> "Pixels":
        """Returns the white pixels in this layout."""
        homogeneous = white.homogeneous()
        return cls(white.v, homogeneous, white.v.unsqueeze(-2) * homogeneous)


class Tracks(NamedTuple):
    """A Gaussian approximation of p(a_{1:T}) with measurement noise, and a blob of pixels around each position."""

    mean: Tensor  # (T, 2)
    cov: Tensor  # (2T, 2T), float64, covariance of the measurements
    offset: Tensor  # (4T, 1); `smooth` is gain @ y + offset
    gain: Tensor  # (4T, 2T)
    blob: Tensor  # (2, 2), rho^2 I
    blob_precision: Tensor  # (2, 2), (rho^2 I + Sigma_A)^-1
    clutter: float  # white background pixels per unit of area, relative to the pixels of one object

    @classmethod
    def of(cls, dynamics: Dynamics, blob: Tensor, T: int, dtype: torch.dtype, clutter: float = 0.0) -> "Tracks":
        """Makes the approximation for T frames, in ``dtype``."""
        lgssm = dynamics.lgssm()
        answer = response(lgssm, T)  # with its graph, which model and guide share
        with torch.no_grad():
            lgssm = collapse_components(lgssm, dynamics.pi)
            mean, C = start_moments(answer, lgssm.mu, lgssm.Sigma)
            S = C.clone()
            S.diagonal().add_(TRACK_NOISE**2)
            W = cholesky_solve(C, torch.linalg.cholesky_ex(S).L).mT  # E[a | y] = mean + W (y - mean)
            precision = inverse_2x2(blob + lgssm.Sigma_A)
            gain, offset = (with_slopes(x.view(T, 2, -1), precision).flatten(0, 1) for x in (W, mean.unsqueeze(-1)))
            offset = offset - gain @ mean.unsqueeze(-1)
            offset, gain, blob, precision = (x.to(dtype) for x in (offset, gain, blob, precision))
            return cls(mean.unflatten(-1, (T, 2)).to(dtype), S, offset, gain, blob, precision, clutter)

    def smooth(self, y: Tensor) -> Tensor:
        """Returns the blobs (B, T, 4, n) of the smoothed paths E[a | y], from n paths (B, T, 2, n).

        The rows of a blob are its centre, a column and a row, and the product of `blob_precision` with it.
        """
        B, T, _, n = y.shape
        return torch.baddbmm(self.offset, self.gain.expand(B, -1, -1), y.reshape(B, 2 * T, n)).view(B, T, 4, n)

    def log_density(self, pixels: Pixels, blobs: Tensor, penalty: Tensor) -> Tensor:
        """Returns log r (B, T, n, k), the `log_density` of the white pixels, for n = N S blobs (B, T, 4, n)."""
        (B, N), n = penalty.shape, blobs.shape[-1]
        penalty = penalty.unsqueeze(-1).expand(B, N, n // N).reshape(B, 1, 1, n)
        return log_density(pixels.homogeneous, blobs, penalty)

    def log_clutter(self, homogeneous: Tensor, precision: Tensor) -> Tensor | None:
        """Returns log r (..., k) of the background, on the scale of `log_density`; None without clutter."""
        if not self.clutter:
            return None
        normaliser = 0.5 * det_2x2(precision).log() - math.log(2 * math.pi)
        place = homogeneous[..., :2, :]
        left_out = 0.5 * ((precision @ place) * place).sum(-2)
        return math.log(self.clutter) + left_out - normaliser.unsqueeze(-1)

    def likeliest(self, pixels: Pixels, blobs: Tensor, penalty: Tensor, background: Tensor | None, keep: int) -> Tensor:
        """Returns the ``keep`` of the S tracks (B, T, 4, N S) with the highest likelihood of the white pixels.

        Many starts lead to the same tracks with exchanged names. Of those, the earliest counts, so that names are not
        decided by rounding. The tracks keep their order.
        """
        log_r = _by_object(self.log_density(pixels, blobs, penalty), penalty.shape[1], background)
        log_mixture = reduce(torch.logaddexp, log_r.unbind(2))  # (B, T, S, k)
        gain = log_mixture - log_mixture[:, :, :1]  # over the first start: sums stay small, and rounding with them
        likelihood = (gain @ pixels.v.unsqueeze(-1)).sum((1, 3))
        later = LATER_START * torch.arange(likelihood.shape[1], device=likelihood.device)
        best = (likelihood - later).topk(keep, 1).indices.sort(1).values
        blobs = blobs.unflatten(-1, (penalty.shape[1], -1))
        return blobs.take_along_dim(best[:, None, None, None], -1).flatten(-2)


def share(weighed: Tensor, log_r: Tensor, background: Tensor | None = None, n_hypotheses: int = 1) -> Tensor:
    """Assigns white pixels to objects with responsibilities proportional to exp(log_r).

    Args:
        weighed: (..., 3, k), `Pixels.weighed`.
        log_r: (..., N S, k), log-responsibilities for each of S independent hypotheses about all objects.
        background: (..., k), the log-responsibilities of the background, if it may have white pixels.
        n_hypotheses: S.

    Returns:
        The sums (..., 3, N S) over the pixels assigned to each object of their columns, rows and masses, in pixels.
    """
    N = log_r.shape[-2] // n_hypotheses
    r = _by_object(log_r, N, background).softmax(-3)
    return weighed @ (r if background is None else r[..., :N, :, :]).flatten(-3, -2).mT


def centroids(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the centroids (..., 2, n) and the masses (..., 1, n) of `share`'s sums (..., 3, n)."""
    mass = shares[..., 2:, :].clamp(min=LEAST_MASS)
    return shares[..., :2, :] / mass, mass


def log_density(homogeneous: Tensor, blobs: Tensor, penalty: Tensor) -> Tensor:
    """Returns log N(x; centre, precision^-1) (..., n, k) up to terms that depend on the pixel x alone.

    Those terms cancel in the responsibilities.

    Args:
        homogeneous: (..., 3, k), the pixels' x, y and 1.
        blobs: (..., 4, n), from `with_slopes` of the centres and the precision.
        penalty: (..., 1, n), `absent_penalty`: no pixel is assigned to absent objects.
    """
    centre, slope = blobs.split(2, -2)
    constant = torch.addcmul(penalty, centre, slope, value=-0.5).sum(-2, keepdim=True)
    if blobs.shape[-1] < 8:  # many products of three terms take longer than the sums themselves
        x, y, slopes = homogeneous[..., :1, :], homogeneous[..., 1:2, :], slope.mT
        return torch.addcmul(torch.addcmul(constant.mT, slopes[..., :1], x), slopes[..., 1:], y)
    return torch.cat([slope, constant], -2).mT @ homogeneous


def with_slopes(centre: Tensor, precision: Tensor) -> Tensor:
    """Returns blobs (..., 4, n): centres (..., 2, n), and below them the precision (..., 2, 2) times the centres."""
    return torch.cat([centre, precision @ centre], -2)


def absent_penalty(present: Tensor) -> Tensor:
    """Returns a penalty that, added to log r, removes absent objects from the assignment; ``present`` is bool."""
    return -1e30 * (~present).float()


def _by_object(log_r: Tensor, n_objects: int, background: Tensor | None) -> Tensor:
    """Returns log r (..., N S, k) as (..., N, S, k); the background, if there is one, is appended as a last object."""
    log_r = log_r.unflatten(-2, (n_objects, -1))
    if background is None:
        return log_r
    background = background[..., None, None, :].expand(*log_r.shape[:-3], 1, *log_r.shape[-2:])
    return torch.cat([log_r, background], -3)


def shrink(forecast: Tensor, shares: Tensor) -> Tensor:
    """Shrinks the centroids of `share`'s sums towards their forecasts: a mean with weights mass and 1."""
    return (forecast + shares[..., :2, :]) / (1 + shares[..., 2:, :])
