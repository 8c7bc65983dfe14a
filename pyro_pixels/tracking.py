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
from pyro_pixels.data import object_mask
from pyro_pixels.dynamics import Dynamics, collapse_components
from pyro_pixels.guides import AttentionHead, WhitePixels

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
        absent = ~object_mask(n_objects, N).unsqueeze(-1)  # (B, N, 1)
        orders = frame_orders(white, self.n_starts)
        start = orders[:, 0]
        claim = self.claims(s[:, :, start], white.at(start)).transpose(1, 2)  # (B, S, N, k)
        claim = CLAIM_BOUND * torch.tanh(claim / CLAIM_BOUND)
        with torch.no_grad():
            l, nobody = self._associate(white, claim, absent, orders)  # (B, T, N, k), (B, T, k)
        times = torch.bincount(start, minlength=images.shape[1])  # a frame in which several tracks start counts once
        l = l.index_add(1, start, claim / times[start, None, None])
        y, mass = share(white.v, white.place, l, absent.unsqueeze(1), nobody)
        R = self.to_log_sigma(s).exp().square() * (1 + 1 / mass.transpose(1, 2))
        return y.transpose(1, 2), R.sqrt()

    def _associate(
        self, white: WhitePixels, claim: Tensor, absent: Tensor, orders: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """l (B, T, N, k) around the paths that are kept, up to a constant for each pixel, and that of nobody."""
        if claim.shape[2] == 1 and not self.clutter:
            return torch.zeros_like(white.v).unsqueeze(2), None  # one object has all the pixels
        tracks = Tracks.of(self.dynamics, self.blob, white.v.shape[1], claim.dtype, self.clutter)
        nobody = tracks.log_clutter(white.place, tracks.blob_precision)  # (B, T, k)
        path = tracks.smooth(follow(tracks, white, claim, absent, orders))  # (B, S, N, T, 2)
        for keep, n_sweeps in ((2, FIRST_SWEEPS), (1, LAST_SWEEPS)):
            for _ in range(n_sweeps):
                l = tracks.log_density(white.place, path)  # (B, T, S, N, k)
                y, mass = share(white.v.unsqueeze(2), white.place, l, absent[:, None, None], _per_track(nobody))
                path = tracks.smooth(_towards(path, y.permute(0, 2, 3, 1, 4), mass.permute(0, 2, 3, 1, 4)))
            path = tracks.likeliest(white, path, absent, keep)
        return tracks.log_density(white.place, path).squeeze(2), nobody


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
        W, precision = torch.linalg.solve(S, C), torch.linalg.inv(blob + lgssm.Sigma_A)
        return cls(mean.unflatten(-1, (T, 2)).to(dtype), S, W.to(dtype), blob, precision.to(dtype), clutter)

    def smooth(self, y: Tensor) -> Tensor:
        """E[a | y] (..., T, 2)."""
        return self.mean + ((y - self.mean).flatten(-2) @ self.W).unflatten(-1, self.mean.shape)

    def log_density(self, place: Tensor, path: Tensor) -> Tensor:
        """`log_density` (B, T, S, N, k) of pixels at (B, T, k, 2) around paths (B, S, N, T, 2)."""
        centre = path.permute(0, 3, 1, 2, 4)  # (B, T, S, N, 2)
        return log_density(place, centre.flatten(2, 3), self.blob_precision).unflatten(2, centre.shape[2:4])

    def log_clutter(self, place: Tensor, precision: Tensor) -> Tensor | None:
        """l (..., k) of nobody beside those that `log_density` gives; None where there is no clutter."""
        if not self.clutter:
            return None
        normaliser = 0.5 * torch.linalg.slogdet(precision).logabsdet - math.log(2 * math.pi)
        left_out = 0.5 * ((place @ precision) * place).sum(-1)
        return math.log(self.clutter) + left_out - normaliser.unsqueeze(-1)

    def likeliest(self, white: WhitePixels, path: Tensor, absent: Tensor, keep: int) -> Tensor:
        """Those ``keep`` of the S paths (B, S, N, T, 2) of a sequence under which its white pixels are likeliest."""
        l = self.log_density(white.place, path).masked_fill(absent[:, None, None], -torch.inf)
        nobody = _per_track(self.log_clutter(white.place, self.blob_precision))
        likelihood = torch.einsum("btk,btsk->bs", white.v, _with(nobody, l).logsumexp(3))
        best = likelihood.topk(keep, 1).indices
        return path[torch.arange(len(path), device=path.device).unsqueeze(1), best]


def follow(tracks: Tracks, white: WhitePixels, claim: Tensor, absent: Tensor, orders: Tensor) -> Tensor:
    """Centroids (B, S, N, T, 2) of shares by forecasts, along S orders of the frames.

    With L the Cholesky factor of the covariance of all measurements in their order, the forecast of the i-th is
    mean_i + sum_{j<i} L_ij e_j, where e_j = L_jj^-1 (y_j - its forecast) are the innovations: Kalman's filter for any
    order. What is hardly seen is taken to be near its forecast.

    Args:
        claim: (B, S, N, k), of the pixels in the first frame of each order.
        absent: (B, N, 1) bool.
        orders: (S, T), each a permutation of the frames.
    """
    (B, S, N, _), T, dtype = claim.shape, orders.shape[1], claim.dtype
    coordinates = (2 * orders.unsqueeze(-1) + torch.arange(2, device=orders.device)).flatten(1)  # (S, 2T)
    L = torch.linalg.cholesky_ex(tracks.cov[coordinates.unsqueeze(-1), coordinates.unsqueeze(-2)]).L
    frame = torch.arange(T, device=L.device)
    L_ii = L.unflatten(-1, (T, 2)).unflatten(-3, (T, 2))[:, frame, :, frame].transpose(0, 1)  # (S, T, 2, 2)
    precision = torch.linalg.inv(L_ii @ L_ii.mT + tracks.blob).to(dtype)
    whiten, L_T = torch.linalg.inv(L_ii).mT.to(dtype), L.mT.to(dtype)
    mean = tracks.mean[orders]  # (S, T, 2)
    v, place = (x[:, orders.mT].transpose(0, 1).contiguous() for x in (white.v, white.place))  # (T, B, S, k, ...)
    absent = absent.unsqueeze(1)

    l, nobody = claim, None
    for narrow in torch.linspace(0, 1, DETECTION_ROUNDS).tolist():
        y, _ = share(v[0], place[0], l, absent, nobody)
        blob_precision = tracks.blob_precision * (DETECTION_WIDTH ** (narrow - 1) if tracks.clutter else 1.0)
        l, nobody = log_density(place[0], y, blob_precision), tracks.log_clutter(place[0], blob_precision)
    e = claim.new_zeros(B, S, N, 2 * T)
    ys = []
    for i in range(T):
        now = slice(2 * i, 2 * i + 2)
        forecast = mean[:, None, i] + torch.einsum("bsnj,sjc->bsnc", e[..., : 2 * i], L_T[:, : 2 * i, now])
        if i > 0:
            l = log_density(place[i], forecast, precision[:, i])
            nobody = tracks.log_clutter(place[i], precision[:, i])
        y = _towards(forecast, *share(v[i], place[i], l, absent, nobody))
        e[..., now] = torch.einsum("bsnc,scd->bsnd", y - forecast, whiten[:, i])
        ys.append(y)
    in_time = orders.argsort(1)[None, :, None, :, None].expand(B, S, N, T, 2)
    return torch.stack(ys, 3).gather(3, in_time)


def share(v: Tensor, place: Tensor, l: Tensor, absent: Tensor, nobody: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """White pixels shared among the objects in proportion to exp(l): the centroid and the mass of each share.

    Args:
        v: (..., k), the pixels' values; place: (..., k, 2), which may lack the last batch dimensions of ``l``.
        l: (..., N, k).
        absent: (..., N, 1) bool, for objects that get nothing.
        nobody: (..., k), l of the background, if it has white pixels of its own.

    Returns:
        (..., N, 2) and (..., N, 1); the mass is in pixels, and at least 1e-4.
    """
    among = _with(nobody, l.masked_fill(absent, -torch.inf)).softmax(-2)
    shares = v.unsqueeze(-2) * among[..., : l.shape[-2], :]
    mass = shares.sum(-1, keepdim=True).clamp(min=1e-4)
    batch = place.dim() - 2
    moment = shares.flatten(batch, -2) @ place
    return moment.unflatten(batch, shares.shape[batch:-1]) / mass, mass


def log_density(place: Tensor, centre: Tensor, precision: Tensor) -> Tensor:
    """log N(x; centre, precision^-1) (..., N, k) but for what depends on x alone, which no share depends on.

    Args:
        place: (..., k, 2); centre: (..., N, 2); precision: (2, 2), or a batch of them.
    """
    weighed = centre @ precision
    return weighed @ place.mT - 0.5 * (weighed * centre).sum(-1, keepdim=True)


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


def _with(nobody: Tensor | None, l: Tensor) -> Tensor:
    """l (..., N + 1, k) with the background as a last object, if there is one."""
    return l if nobody is None else torch.cat([l, nobody.unsqueeze(-2).expand(*l.shape[:-2], 1, l.shape[-1])], -2)


def _per_track(nobody: Tensor | None) -> Tensor | None:
    """(B, T, 1, k) of (B, T, k), for tracks that lie before the objects."""
    return None if nobody is None else nobody.unsqueeze(2)


def _towards(expected: Tensor, y: Tensor, mass: Tensor) -> Tensor:
    """y where it was seen, what was expected where it was not, between them in the ratio mass : 1."""
    return torch.lerp(expected, y, mass / (1 + mass))
