"""Which pixel is whose: the network names the objects where tracks start, the dynamics tell them apart from there on.

Two objects that cross are told apart not by where they are but by where they come from (the failure of Fig 5b is to do
the former). So claims of the network count only in the few frames in which tracks start; from there each object is
followed by p(a) of the model's own dynamics, its components merged into one Gaussian. With l_t^n(x) what is known of
object n says of a white pixel x at frame t, every pixel is shared among the objects,

    r_t^n(x) proportional, over n, to exp(l_t^n(x)),   y_t^n = centroid of the white pixels weighed by r_t^n

in four stages:

1. Detect. In a starting frame l is the network's claim, then the log density of a blob around y, a few times over.
2. Follow. Along an order of all frames that begins with a starting frame, l is the log density of x under the forecast
   from the frames already passed. A Gaussian can be forecast in any order: some tracks go forward in time first, some
   backward.
3. Sweep. Paths are smoothed, E[a | y]; l becomes the log density around them, and so on: EM for moving blobs.
4. Choose. Of the tracks with different starts, those under which the white pixels are likeliest are kept, two after a
   few sweeps and one at the end: a start in which two objects hide each other loses to one in which they do not.

Where the background has white pixels of its own (salt-and-pepper noise), `clutter` says how many, and pixels are shared
among the objects and the background: what is far from every object is nobody's, as in probabilistic data association.

The result is y_t^n and R_t^n = sigma_t^n^2 (1 + 1 / mass of the share). This is no part of the paper, whose network has
to find such a rule by itself. Nothing of it is differentiated but sigma, and the shares in the starting frames through
the claims.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels import lgssm as exact
from pyro_pixels._batch import object_mask
from pyro_pixels.guides.heads import AttentionHead, WhitePixels
from pyro_pixels.lgssm.dynamics import Dynamics, collapse_components

CLAIM_BOUND = 3.0  # nats: what the network may say against the dynamics, about a distance of 3 pixels
TRACK_NOISE = 0.02  # standard deviation of y while following and sweeping, latent units
DETECTION_ROUNDS = 10
DETECTION_WIDTH = 16.0  # in clutter blobs begin with so many times their variance: narrow ones see no object nearby
FIRST_SWEEPS, LAST_SWEEPS = 3, 8  # of all tracks, and of the two that are kept then


class TrackingHead(AttentionHead):
    """Measurements y_t^n and the square roots of their variances R_t^n by soft assignment of pixels to objects.

    Args:
        dynamics: of the model; positions are in the units of `AttentionHead`.
        height, width: of the images.
        state_size: D.
        rho: spread of an object's pixels around its position, a standard deviation in pixels; R / 2 for a disk.
        sigma, n_waves: as in `AttentionHead`.
        clutter: probability that a pixel which belongs to no object is white; 0: every white pixel is some object's.
        n_starts: S, how many tracks are followed from different starting frames, half of them forward in time; even.

    Raises:
        ValueError: if ``n_starts`` is not even, or below 2, or ``clutter`` not in [0, 1).
    """

    blob: Tensor  # (2, 2), rho^2 I in latent units

    def __init__(
        self,
        dynamics: Dynamics,
        height: int,
        width: int,
        state_size: int,
        *,
        rho: float = 1.0,
        clutter: float = 0.0,
        sigma: float = 0.05,
        n_waves: int = 8,
        n_starts: int = 8,
    ) -> None:
        super().__init__(height, width, state_size, sigma=sigma, n_waves=n_waves)
        if n_starts < 2 or n_starts % 2:
            raise ValueError(f"n_starts is {n_starts}; wanted an even number, at least 2: tracks go both ways in time")
        if not 0 <= clutter < 1:
            raise ValueError(f"clutter is {clutter}; wanted a probability below 1, 0 for a background that is black")
        self.dynamics, self.n_starts = dynamics, n_starts
        per_object = 4 * math.pi * rho**2  # pixels of a disk of radius 2 rho
        self.clutter = clutter * height * width / 4 / per_object  # a unit of area: of the 4 of [-1, 1]^2
        rho_latent = rho / torch.tensor([(width - 1) / 2, (height - 1) / 2])
        self.register_buffer("blob", torch.diag(rho_latent.square()), persistent=False)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """y and the square root of R, (B, N, T, 2), from s (B, N, T, D), images (B, T, H, W) and n_objects (B,)."""
        N, white = s.shape[1], self.white_pixels(images)
        absent = ~object_mask(n_objects, N)  # (B, N)
        orders = frame_orders(white, self.n_starts)
        start = orders[:, 0]
        claim = self.claims(s[:, :, start], white.at(start)).transpose(1, 2).unsqueeze(3)  # (B, S, N, 1, k)
        claim = CLAIM_BOUND * torch.tanh(claim / CLAIM_BOUND) + _nothing(absent)[:, None, :, None, None]
        with torch.no_grad():
            l, nobody = self._associate(white, claim, absent, orders)  # (B, T, N, 1, k), (B, T, k)
        same = (start.unsqueeze(1) == start).sum(1)  # a frame in which several tracks start counts once
        l = l.index_add(1, start, claim / same[:, None, None, None])
        y, mass = (x.squeeze(3).transpose(1, 2) for x in share(white.weighed, l, nobody))
        return y, (self.to_log_sigma(s).exp().square() * (1 + 1 / mass)).sqrt()

    def _associate(
        self, white: WhitePixels, claim: Tensor, absent: Tensor, orders: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """l (B, T, N, 1, k) around the paths that are kept, up to a constant for each pixel, and that of nobody."""
        if claim.shape[2] == 1 and not self.clutter:
            return torch.zeros_like(white.v)[:, :, None, None], None  # one object has all the pixels
        tracks = Tracks.of(self.dynamics, self.blob, white.v.shape[1], claim.dtype, self.clutter)
        nobody = tracks.log_clutter(white.place, tracks.blob_precision)  # (B, T, k)
        path = tracks.smooth(follow(tracks, white, claim, absent, orders))  # (B, N, S, T, 2)
        for keep, n_sweeps in ((2, FIRST_SWEEPS), (1, LAST_SWEEPS)):
            for _ in range(n_sweeps):
                y, mass = share(white.weighed, tracks.log_density(white, path, absent), nobody)  # (B, T, N, S, ...)
                path = tracks.smooth(_towards(path, y.movedim(1, 3), mass.movedim(1, 3)))
            path = tracks.likeliest(white, path, absent, nobody, keep)
        return tracks.log_density(white, path, absent), nobody


class Tracks(NamedTuple):
    """p(a_{1:T}) of one object as one Gaussian that is measured with noise, and a blob around each position."""

    mean: Tensor  # (T, 2)
    cov: Tensor  # (2T, 2T), float64, of the measurements
    W: Tensor  # (2T, 2T), E[a | y] = mean + (y - mean) W
    blob: Tensor  # (2, 2), rho^2 I
    blob_precision: Tensor  # (2, 2), (rho^2 I + Sigma_A)^-1
    clutter: float  # white pixels of nobody in a unit of area, for each pixel of an object

    @classmethod
    def of(cls, dynamics: Dynamics, blob: Tensor, T: int, dtype: torch.dtype, clutter: float = 0.0) -> "Tracks":
        lgssm = collapse_components(dynamics.lgssm(), dynamics.pi)
        mean, C = exact.marginal_moments(lgssm, T)
        S = C + TRACK_NOISE**2 * torch.eye(2 * T, dtype=C.dtype, device=C.device)
        W = torch.cholesky_solve(C, torch.linalg.cholesky_ex(S).L)
        precision = torch.linalg.inv_ex(blob + lgssm.Sigma_A).inverse
        return cls(mean.unflatten(-1, (T, 2)).to(dtype), S, W.to(dtype), blob, precision.to(dtype), clutter)

    def smooth(self, y: Tensor) -> Tensor:
        """E[a | y] (..., T, 2)."""
        return self.mean + ((y - self.mean).flatten(-2) @ self.W).unflatten(-1, self.mean.shape)

    def log_density(self, white: WhitePixels, path: Tensor, absent: Tensor) -> Tensor:
        """`log_density` (B, T, N, S, k) of white pixels around paths (B, N, S, T, 2)."""
        return log_density(white.homogeneous, path.movedim(3, 1), self.blob_precision, absent.unsqueeze(1))

    def log_clutter(self, place: Tensor, precision: Tensor) -> Tensor | None:
        """l (..., k) of nobody beside those that `log_density` gives; None where there is no clutter."""
        if not self.clutter:
            return None
        normaliser = 0.5 * torch.linalg.slogdet(precision).logabsdet - math.log(2 * math.pi)
        left_out = 0.5 * ((place @ precision) * place).sum(-1)
        return math.log(self.clutter) + left_out - normaliser.unsqueeze(-1)

    def likeliest(self, white: WhitePixels, path: Tensor, absent: Tensor, nobody: Tensor | None, keep: int) -> Tensor:
        """Those ``keep`` of the S paths (B, N, S, T, 2) of a sequence under which its white pixels are likeliest."""
        l = _with(nobody, self.log_density(white, path, absent))
        likelihood = torch.einsum("btk,btsk->bs", white.v, l.logsumexp(2))
        best = likelihood.topk(keep, 1).indices
        return path.take_along_dim(best[:, None, :, None, None], 2)


def follow(tracks: Tracks, white: WhitePixels, claim: Tensor, absent: Tensor, orders: Tensor) -> Tensor:
    """Centroids (B, N, S, T, 2) of shares by forecasts, along S orders of the frames.

    With L the Cholesky factor of the covariance of all measurements in their order, the forecast of the i-th is
    mean_i + sum_{j<i} L_ij e_j, where e_j = L_jj^-1 (y_j - its forecast) are the innovations: Kalman's filter for any
    order. What is hardly seen is taken to be near its forecast.

    Args:
        claim: (B, S, N, 1, k), of the pixels in the first frame of each order.
        absent: (B, N) bool.
        orders: (S, T), each a permutation of the frames.
    """
    (B, S, N, _, _), T, dtype = claim.shape, orders.shape[1], claim.dtype
    coordinates = (2 * orders.unsqueeze(-1) + torch.arange(2, device=orders.device)).flatten(1)  # (S, 2T)
    L = torch.linalg.cholesky_ex(tracks.cov[coordinates.unsqueeze(-1), coordinates.unsqueeze(-2)]).L
    frame = torch.arange(T, device=L.device)
    L_ii = L.unflatten(-1, (T, 2)).unflatten(-3, (T, 2))[:, frame, :, frame]  # (T, S, 2, 2)
    precision = torch.linalg.inv_ex(L_ii @ L_ii.mT + tracks.blob).inverse.to(dtype)
    whiten, L_T = torch.linalg.inv_ex(L_ii).inverse.mT.to(dtype), L.mT.to(dtype)
    mean = tracks.mean[orders].transpose(0, 1).unsqueeze(2)  # (T, S, 1, 2)
    pixels, homogeneous = (
        x[:, orders.mT].permute(1, 2, 0, 3, 4).contiguous() for x in (white.weighed, white.homogeneous)
    )

    l, nobody = claim.transpose(0, 1), None  # from here on the orders come first
    for narrow in torch.linspace(0, 1, DETECTION_ROUNDS).tolist():
        y, _ = share(pixels[0], l, nobody)  # (S, B, N, 1, 2)
        blob_precision = tracks.blob_precision * (DETECTION_WIDTH ** (narrow - 1) if tracks.clutter else 1.0)
        l = log_density(homogeneous[0], y, blob_precision, absent)
        nobody = tracks.log_clutter(homogeneous[0, ..., :2], blob_precision)
    e = claim.new_zeros(S, B * N, 2 * T)
    ys = []
    for i in range(T):
        now = slice(2 * i, 2 * i + 2)
        forecast = (mean[i] + e[..., : 2 * i] @ L_T[:, : 2 * i, now]).view(S, B, N, 1, 2)
        if i > 0:
            l = log_density(homogeneous[i], forecast, precision[i, :, None, None, None], absent)
            nobody = tracks.log_clutter(homogeneous[i, ..., :2], precision[i, :, None])
        y = _towards(forecast, *share(pixels[i], l, nobody))
        e[..., now] = (y - forecast).view(S, B * N, 2) @ whiten[i]
        ys.append(y)
    in_time = orders.argsort(1)[:, None, None, :, None]
    return torch.cat(ys, 3).take_along_dim(in_time, 3).permute(1, 2, 0, 3, 4)


def share(weighed: Tensor, l: Tensor, nobody: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """White pixels shared among the objects in proportion to exp(l): the centroid and the mass of each share.

    Args:
        weighed: (..., k, 3), `WhitePixels.weighed`.
        l: (..., N, S, k), of S tracks of every object, between which nothing is shared.
        nobody: (..., k), l of the background, if it has white pixels of its own.

    Returns:
        (..., N, S, 2) and (..., N, S, 1); the mass is in pixels, and at least 1e-4.
    """
    N, S = l.shape[-3:-1]
    r = _with(nobody, l).softmax(-3)[..., :N, :, :]
    moment = (r.flatten(-3, -2) @ weighed).unflatten(-2, (N, S))  # of x, y, 1
    mass = moment[..., 2:].clamp(min=1e-4)
    return moment[..., :2] / mass, mass


def log_density(homogeneous: Tensor, centre: Tensor, precision: Tensor, absent: Tensor) -> Tensor:
    """log N(x; centre, precision^-1) (..., N, S, k) but for what depends on x alone, which no share depends on.

    Args:
        homogeneous: (..., k, 3), the pixels' (x, y, 1).
        centre: (..., N, S, 2), of S tracks of every object; precision: (2, 2), or (..., N, S, 2, 2) with ones.
        absent: (..., N) bool, objects that are to get nothing.
    """
    slope = centre[..., :1] * precision[..., 0, :] + centre[..., 1:] * precision[..., 1, :]
    constant = -0.5 * (slope * centre).sum(-1, keepdim=True) + _nothing(absent)[..., None, None]
    plane = torch.cat([slope, constant], -1)
    return (plane.flatten(-3, -2) @ homogeneous.mT).unflatten(-2, centre.shape[-3:-1])


def frame_orders(white: WhitePixels, n_starts: int) -> Tensor:
    """(S, T) orders of the frames: from S / 2 frames forward and then back, and the same in reversed time.

    Frames that are black in every sequence come last, so that no track starts there.
    """
    T = white.v.shape[1]
    frames = torch.arange(T, device=white.v.device)
    starts = [T * i // (n_starts // 2) for i in range(n_starts // 2)]
    forward = torch.stack([torch.cat([frames[t:], frames[:t].flip(0)]) for t in starts])
    orders = torch.cat([forward, T - 1 - forward])
    black = white.v[..., 0].amax(0) == 0
    return orders.gather(1, black[orders].int().argsort(dim=1, stable=True))


def _nothing(absent: Tensor) -> Tensor:
    """What, added to l, leaves an absent object without a share."""
    return -1e30 * absent.float()


def _with(nobody: Tensor | None, l: Tensor) -> Tensor:
    """l (..., N + 1, S, k) with the background as a last object, if there is one."""
    if nobody is None:
        return l
    background = nobody[..., None, None, :].expand(*l.shape[:-3], 1, *l.shape[-2:])
    return torch.cat([l, background], -3)


def _towards(expected: Tensor, y: Tensor, mass: Tensor) -> Tensor:
    """y where it was seen, what was expected where it was not, between them in the ratio mass : 1."""
    return torch.lerp(expected, y, mass / (1 + mass))
