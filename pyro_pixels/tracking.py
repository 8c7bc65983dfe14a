"""Which pixel is whose: claims made where the dynamics expect each object.

Two objects that cross are told apart not by where they are but by where they come from (the failure of Fig 5b is to do
the former). `TrackingHead` therefore runs a Kalman filter with the model's own dynamics along the sequence: each white
pixel is shared among the objects by how well their forecasts explain it, and the centroid of its share is what an
object is taken to have been measured at,

    r_t^n(x) proportional, over n, to exp(claim_t^n(x)) N(x; B m_{t|t-1}^n, B P_{t|t-1}^n B' + Sigma_A + rho^2 I)
    y_t^n = centroid of the white pixels weighed by r_t^n,   R_t^n = sigma_t^n^2 (1 + 1 / mass of the share)

and the filter moves on with y_t^n, by its gain times mass / (1 + mass), so that an object that nobody sees keeps its
course. The claims are the network's, linear in s_t^n; they alone decide in the first frame, when all forecasts are the
same, and that is where what the network learns matters most.

This is no part of the paper, whose network has to find such a rule by itself. The filter's recursion is not
differentiated; gradients reach the claims and sigma.
"""

import torch
from torch import Tensor

from pyro_pixels import lgssm as exact
from pyro_pixels.data import object_mask
from pyro_pixels.dynamics import Dynamics, collapse_components
from pyro_pixels.guides import AttentionHead, WhitePixels

CLAIM_BOUND = 3.0  # nats: what the network may say against the forecasts, about a distance of 3 pixels


class TrackingHead(AttentionHead):
    """Measurements y_t^n and the square roots of their variances R_t^n by soft assignment of pixels to objects.

    Args:
        dynamics: of the model; positions are in the units of `AttentionHead`.
        height, width: of the images.
        state_size: D.
        rho: spread of an object's pixels around its position, a standard deviation in pixels.
        sigma, n_waves: as in `AttentionHead`.
    """

    blob: Tensor  # (2, 2), rho^2 I in latent units

    def __init__(
        self,
        dynamics: Dynamics,
        height: int,
        width: int,
        state_size: int,
        *,
        rho: float = 1.2,
        sigma: float = 0.05,
        n_waves: int = 8,
    ) -> None:
        super().__init__(height, width, state_size, sigma=sigma, n_waves=n_waves)
        self.dynamics = dynamics
        rho_latent = rho / torch.tensor([(width - 1) / 2, (height - 1) / 2])
        self.register_buffer("blob", torch.diag(rho_latent.square()), persistent=False)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """y and the square root of R, (B, N, T, 2), from s (B, N, T, D), images (B, T, H, W) and n_objects (B,)."""
        white, claim = self.claims(s, images)
        present = object_mask(n_objects, s.shape[1])
        claim = CLAIM_BOUND * torch.tanh(claim / CLAIM_BOUND)
        claim = claim.masked_fill(~present[..., None, None], -1e9)
        sigma = self.to_log_sigma(s).exp()
        with torch.no_grad():
            gate = self._gates(white, claim)
        y, mass = share(white.v.unsqueeze(1), white.place.unsqueeze(1), claim + gate)
        return y, sigma * (1 + 1 / mass).sqrt()

    def _gates(self, white: WhitePixels, claim: Tensor) -> Tensor:
        """log N(x; forecast) (B, N, T, k), up to a constant, of the white pixels under every object's forecast."""
        B, N, T, _ = claim.shape
        lgssm = collapse_components(self.dynamics.lgssm(), self.dynamics.pi)
        # Covariances and gains do not depend on the images: one filter serves every sequence and object.
        spread = exact.kalman_filter(lgssm, torch.zeros(T, 2)).predicted_cov
        expected = lgssm.B @ spread @ lgssm.B.mT + lgssm.Sigma_A
        gain = torch.linalg.solve(expected, lgssm.B @ spread).mT.to(claim.dtype)  # (T, 4, 2)
        precision = torch.linalg.inv(expected + self.blob).to(claim.dtype)  # (T, 2, 2)
        A, u, mean = (x.to(claim.dtype) for x in (lgssm.A, lgssm.u, lgssm.mu))
        h = mean.expand(B, N, -1)
        gates = []
        for t in range(T):
            if t > 0:
                h = h @ A.mT + u
            offset = white.place[:, None, t] - h[:, :, None, :2]  # (B, N, k, 2)
            gates.append(-0.5 * ((offset @ precision[t]) * offset).sum(-1))
            y, mass = share(white.v[:, None, t], white.place[:, None, t], claim[:, :, t] + gates[-1])
            h = h + mass / (1 + mass) * ((y - h[..., :2]) @ gain[t].mT)
        return torch.stack(gates, 2)


def share(v: Tensor, place: Tensor, log_claim: Tensor) -> tuple[Tensor, Tensor]:
    """White pixels shared among the objects in proportion to exp(log_claim).

    Args:
        v: (B, 1, ..., k), the pixels' values; place: (B, 1, ..., k, 2); log_claim: (B, N, ..., k).

    Returns:
        The centroid (B, N, ..., 2) of each object's share, and its mass (B, N, ..., 1) in pixels, at least 1e-4.
    """
    shares = v * log_claim.softmax(1)
    mass = shares.sum(-1, keepdim=True).clamp(min=1e-4)
    return (shares.unsqueeze(-2) @ place).squeeze(-2) / mass, mass
