"""A head that tracks objects by soft data association of pixels, with the model's dynamics.

When two objects cross, they can be told apart not by where they are but by where they come from (the failure in Fig 5b
is to use the former). The network's claims therefore count only in the few frames in which tracks start. From there,
each object is followed with p(a) of the model's own dynamics, with its components merged into one Gaussian. Every white
pixel x of frame t is assigned to the objects n with responsibilities r, and measurements y are the weighted centroids,

    r_t^n(x) = softmax_n(log r_t^n(x)),   y_t^n = centroid of the white pixels with weights r_t^n

where the unnormalised log-responsibilities (`log_r`) come from four stages:

1. Detect. In a starting frame log r is the network's claim, then the log density of a blob around y, iterated.
2. Follow. Along an order of all frames that begins with a starting frame, log r is the log density of x under the
   forecast from the frames visited so far. A Gaussian can be forecast in any order: half of the tracks go forward in
   time first, half backward.
3. Sweep. Paths are smoothed, E[a | y], and log r becomes the log density around them; repeated, this is EM for a
   mixture of moving blobs.
4. Choose. Among tracks with different starting frames, those with the highest likelihood of the white pixels are kept,
   two after a few sweeps and one at the end: a start in which one object hides another loses to one in which none does.

If the background also has white pixels (salt-and-pepper noise), `clutter` is their rate, and the background takes part
in the assignment: pixels far from every object are assigned to it, as in probabilistic data association.

The head returns y_t^n and R_t^n = sigma_t^n^2 (1 + 1 / mass), with the mass of the pixels assigned to the object. None
of this is in the paper, whose network has to learn data association by itself. Gradients flow only through sigma, and
through the claims in the starting frames.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels._batch import object_mask
from pyro_pixels.guides.heads import AttentionHead, WhitePixels
from pyro_pixels.lgssm.dynamics import Dynamics, collapse_components
from pyro_pixels.lgssm.marginal import response, start_moments
from pyro_pixels.lgssm.small_matrices import cholesky_solve, det_2x2, inverse_2x2

CLAIM_BOUND = 3.0  # largest claim of the network, in nats; it weighs about as much as a distance of 3 pixels
TRACK_NOISE = 0.02  # standard deviation of y in stages 2 and 3, in latent units
DETECTION_ROUNDS = 10
DETECTION_WIDTH = 16.0  # with clutter, initial factor on the blobs' variance: narrow blobs would miss objects nearby
FIRST_SWEEPS, LAST_SWEEPS = 3, 8  # sweeps of all tracks, and of the two that are kept


class TrackingHead(AttentionHead):
    """Measurements y_t^n and standard deviations sqrt(R_t^n) by soft assignment of pixels to objects.

    Args:
        dynamics: the dynamics of the model; positions are in the units of `AttentionHead`.
        height: H of the images.
        width: W of the images.
        state_size: D.
        rho: standard deviation of an object's pixels around its position, in pixels; R / 2 for a disk of radius R.
        clutter: probability that a background pixel is white; with 0 every white pixel belongs to an object.
        sigma: as in `AttentionHead`.
        n_waves: as in `AttentionHead`.
        n_starts: S, the number of tracks from different starting frames, half of them forward in time; even.

    Raises:
        ValueError: if ``n_starts`` is odd or below 2, or ``clutter`` is not in [0, 1).
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
            raise ValueError(f"n_starts is {n_starts}; wanted an even number, at least 2, for both directions of time")
        if not 0 <= clutter < 1:
            raise ValueError(f"clutter is {clutter}; wanted a probability below 1, 0 for a black background")
        self.dynamics, self.n_starts = dynamics, n_starts
        self.clutter = clutter
        per_object = 4 * math.pi * rho**2  # pixels of a disk of radius 2 rho
        self.pixel_density = height * width / 4 / per_object  # pixels per unit of area; [-1, 1]^2 has 4
        rho_latent = rho / torch.tensor([(width - 1) / 2, (height - 1) / 2])
        self.register_buffer("blob", torch.diag(rho_latent.square()), persistent=False)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor, others: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns y and sqrt(R), each (B, N, T, 2).

        Args:
            s: states (B, N, T, D).
            images: (B, T, H, W).
            n_objects: (B,).
            others: probability that a pixel shows something other than the objects, added to `clutter`
                (`FilmStatistics.others`).
        """
        clutter = (self.clutter + others) * self.pixel_density
        N, white = s.shape[1], self.white_pixels(images)
        pixels = Pixels.of(white)
        penalty = absent_penalty(object_mask(n_objects, N))  # (B, N)
        orders = frame_orders(white, self.n_starts)
        start = orders[:, 0]
        claim = self.claims(s.index_select(2, start), white.at(start)).transpose(1, 2)  # (B, S, N, k)
        claim = CLAIM_BOUND * torch.tanh(claim / CLAIM_BOUND) + penalty[:, None, :, None]
        log_r, background = torch.zeros_like(pixels.v).unsqueeze(2), None  # a single object owns all pixels
        if N > 1 or clutter:
            tracks = Tracks.of(self.dynamics, self.blob, pixels.v.shape[1], claim.dtype, clutter)
            with torch.no_grad():
                log_r, background = self._associate(tracks, pixels, claim, penalty, orders)
        same = (start.unsqueeze(1) == start).sum(1)  # a frame in which several tracks start counts once
        log_r = log_r.index_add(1, start, claim / same[:, None, None])
        y, mass = centroids(share(pixels.weighed, log_r, background))  # (B, T, 2, N), (B, T, 1, N)
        y, mass = y.permute(0, 3, 1, 2), mass.permute(0, 3, 1, 2)
        return y, (self.to_log_sigma(s).exp().square() * (1 + 1 / mass)).sqrt()

    def _associate(
        self, tracks: "Tracks", pixels: "Pixels", claim: Tensor, penalty: Tensor, orders: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns log r (B, T, N, k) around the chosen paths, up to a constant per pixel, and the background's."""
        background = tracks.log_clutter(pixels.homogeneous, tracks.blob_precision)  # (B, T, k)
        blobs = tracks.smooth(follow(tracks, pixels, claim, penalty, orders))  # (B, T, 4, N S)
        for keep, n_sweeps in ((2, FIRST_SWEEPS), (1, LAST_SWEEPS)):
            S = blobs.shape[-1] // penalty.shape[1]
            for _ in range(n_sweeps):
                shares = share(pixels.weighed, tracks.log_density(pixels, blobs, penalty), background, S)
                blobs = tracks.smooth(_shrink(blobs[:, :, :2], shares))
            blobs = tracks.likeliest(pixels, blobs, penalty, background, keep)
        return tracks.log_density(pixels, blobs, penalty), background


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
        """Returns the ``keep`` of the S tracks (B, T, 4, N S) with the highest likelihood of the white pixels."""
        log_r = _by_object(self.log_density(pixels, blobs, penalty), penalty.shape[1], background)
        log_mixture = reduce(torch.logaddexp, log_r.unbind(2))  # (B, T, S, k)
        likelihood = (log_mixture @ pixels.v.unsqueeze(-1)).sum((1, 3))
        best = likelihood.topk(keep, 1).indices
        blobs = blobs.unflatten(-1, (penalty.shape[1], -1))
        return blobs.take_along_dim(best[:, None, None, None], -1).flatten(-2)


def follow(tracks: Tracks, pixels: Pixels, claim: Tensor, penalty: Tensor, orders: Tensor) -> Tensor:
    """Follows the objects along S orders of the frames and returns the measurements (B, T, 2, N S).

    With L the Cholesky factor of the covariance of all measurements in their order, the forecast of the i-th is
    mean_i + sum_{j<i} L_ij L_jj^-1 e_j, where e_j, the innovations, are y_j minus its forecast: a Kalman filter for any
    order of the frames. An object with few pixels in a frame is taken to be near its forecast.

    Args:
        tracks: the prior over paths.
        pixels: the white pixels.
        claim: (B, S, N, k), the network's claims on the pixels in the first frame of each order.
        penalty: (B, N), `absent_penalty`.
        orders: (S, T), each a permutation of the frames.
    """
    (B, S, N, k), T, dtype = claim.shape, orders.shape[1], claim.dtype
    coordinates = (2 * orders.unsqueeze(-1) + torch.arange(2, device=orders.device)).flatten(1)  # (S, 2T)
    L = torch.linalg.cholesky_ex(tracks.cov[coordinates.unsqueeze(-1), coordinates.unsqueeze(-2)]).L
    frame = torch.arange(T, device=L.device)
    L_ii = L.unflatten(-1, (T, 2)).unflatten(-3, (T, 2))[:, frame, :, frame]  # (T, S, 2, 2)
    precision = inverse_2x2(L_ii @ L_ii.mT + tracks.blob)
    whitened = L.unflatten(-1, (T, 2)).movedim(2, 0) @ inverse_2x2(L_ii)  # (T, S, 2T, 2), L_ij L_jj^-1 for all i
    gain = whitened.unflatten(2, (T, 2)).permute(2, 1, 0, 4, 3).flatten(2, 3)  # (T, S, 2T, 2)
    mean = tracks.mean.to(L.dtype)[orders].transpose(0, 1).unsqueeze(2)  # (T, S, 1, 2)
    forecasts, means = (torch.cat([x, x @ precision], -1).to(dtype).unbind() for x in (gain, mean))
    weighed, homogeneous = (
        x.transpose(0, 1).contiguous().index_select(0, orders.mT.flatten()).view(T, S * B, 3, k)
        for x in (pixels.weighed, pixels.homogeneous)
    )
    penalty = penalty.repeat(S, 1).unsqueeze(1)  # (S B, 1, N); from here on S is the first dimension
    log_r, background = claim.transpose(0, 1).reshape(S * B, N, k), None
    for narrow in (i / (DETECTION_ROUNDS - 1) for i in range(DETECTION_ROUNDS)):  # from wide to narrow blobs
        y, _ = centroids(share(weighed[0], log_r, background))  # (S B, 2, N)
        blob_precision = tracks.blob_precision * (DETECTION_WIDTH ** (narrow - 1) if tracks.clutter else 1.0)
        log_r = log_density(homogeneous[0], with_slopes(y, blob_precision), penalty)
        if narrow >= 0.5:  # earlier, objects own all pixels: one far from every blob would be lost to the background
            background = tracks.log_clutter(homogeneous[0], blob_precision)
    precision = precision.to(dtype).unsqueeze(2).expand(T, S, B, 2, 2).reshape(T, S * B, 2, 2)
    e, ys = claim.new_zeros(S, B * N, 2 * T), []
    innovations = e.view(S * B, N, T, 2).permute(2, 0, 3, 1).unbind()
    for i in range(T):
        blobs = torch.baddbmm(means[i], e, forecasts[i]).view(S * B, N, 4).mT
        if i > 0:
            log_r = log_density(homogeneous[i], blobs, penalty)
            background = tracks.log_clutter(homogeneous[i], precision[i])
        forecast = blobs[:, :2]
        ys.append(_shrink(forecast, share(weighed[i], log_r, background)))
        torch.sub(ys[-1], forecast, out=innovations[i])
    y = torch.stack(ys).view(T, S, B, 2, N).take_along_dim(orders.argsort(1).mT[:, :, None, None, None], 0)
    return y.permute(2, 0, 3, 4, 1).flatten(-2)


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
    """Returns the centroids (..., 2, n) and the masses (..., 1, n), at least 1e-4, of `share`'s sums (..., 3, n)."""
    mass = shares[..., 2:, :].clamp(min=1e-4)
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


def frame_orders(white: WhitePixels, n_starts: int) -> Tensor:
    """Returns (S, T) orders of the frames: from S / 2 starts forward and then back, and the same in reversed time.

    Frames that are black in every sequence come last, so that no track starts there.
    """
    T = white.v.shape[1]
    frames = torch.arange(T, device=white.v.device)
    starts = [T * i // (n_starts // 2) for i in range(n_starts // 2)]
    forward = torch.stack([torch.cat([frames[t:], frames[:t].flip(0)]) for t in starts])
    orders = torch.cat([forward, T - 1 - forward])
    black = white.v[..., 0].amax(0) == 0
    return orders.gather(1, black[orders].int().argsort(dim=1, stable=True))


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


def _shrink(forecast: Tensor, shares: Tensor) -> Tensor:
    """Shrinks the centroids of `share`'s sums towards their forecasts: a mean with weights mass and 1."""
    return (forecast + shares[..., :2, :]) / (1 + shares[..., 2:, :].clamp(min=1e-4))
