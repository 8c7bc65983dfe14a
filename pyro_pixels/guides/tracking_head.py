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

import torch
from torch import Tensor

from pyro_pixels._batch import object_mask
from pyro_pixels.guides.association import Pixels, Tracks, absent_penalty, centroids, share, shrink
from pyro_pixels.guides.following import follow
from pyro_pixels.guides.forecasts import frame_orders
from pyro_pixels.guides.heads import AttentionHead
from pyro_pixels.lgssm.dynamics import Dynamics

CLAIM_BOUND = 3.0  # largest claim of the network, in nats; it weighs about as much as a distance of 3 pixels
FIRST_SWEEPS, LAST_SWEEPS = 3, 8  # sweeps of all tracks, and of the two that are kept


class TrackingHead(AttentionHead):
    """Measurements y_t^n and standard deviations sqrt(R_t^n) by soft assignment of pixels to objects.

    Args:
        dynamics: the dynamics of the model; positions are in the units of `AttentionHead`.
        height: H of the images.
        width: W of the images.
        state_size: D.
        rho: standard deviation of an object's pixels around its position, in pixels; R / 2 for a disk of radius R.
        clutter: probability that a background pixel is white; the film's estimate (`FilmStatistics.others`) is added.
            If both are 0, every white pixel belongs to an object.
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
        self, tracks: Tracks, pixels: Pixels, claim: Tensor, penalty: Tensor, orders: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns log r (B, T, N, k) around the chosen paths, up to a constant per pixel, and the background's."""
        background = tracks.log_clutter(pixels.homogeneous, tracks.blob_precision)  # (B, T, k)
        blobs = tracks.smooth(follow(tracks, pixels, claim, penalty, orders))  # (B, T, 4, N S)
        for keep, n_sweeps in ((2, FIRST_SWEEPS), (1, LAST_SWEEPS)):
            S = blobs.shape[-1] // penalty.shape[1]
            for _ in range(n_sweeps):
                shares = share(pixels.weighed, tracks.log_density(pixels, blobs, penalty), background, S)
                blobs = tracks.smooth(shrink(blobs[:, :, :2], shares))
            blobs = tracks.likeliest(pixels, blobs, penalty, background, keep)
        return tracks.log_density(pixels, blobs, penalty), background
