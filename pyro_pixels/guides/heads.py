"""Heads, the parts of a guide that map states s to the mean and scale of a (Eq 9)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_pixels._batch import most_white
from pyro_pixels._init import init_as_paper

SIGMA_FLOOR = 1e-4  # latent units


class LinearHead(nn.Module):
    """The linear head of Eq (9): mu = W s + b, sigma = softplus(W' s + b') + 1e-4.

    The paper does not say how sigma is kept positive. With exp, training with the paper preset collapses within 15
    steps: a step of Adam moves W' s by about 1e-3 times the sum of abs(s), so sigma falls to 1e-20 (docs/decisions.md).
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(state_size, 4)
        init_as_paper(self.linear)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of a, each (B, N, T, 2), from s (B, N, T, D)."""
        mu, rho = self.linear(s).chunk(2, -1)
        return mu, F.softplus(rho) + SIGMA_FLOOR


class AttentionHead(nn.Module):
    """A head whose mean is the centroid of the white pixels that an object claims.

    Objects claim pixels in turn, each a fraction of what the objects before it have left (stick breaking): with one
    value per pixel c_t^n = sigm(Phi W^omega s_t^n), the weights omega_t^n are proportional to
    v_t c_t^n prod_{m < n} (1 - c_t^m). The mean is the omega-weighted mean of the pixels' coordinates, which run
    from -1 to 1 along each axis, so that latent units are half-widths of the image. Phi holds the lowest cosine waves
    over the image, which makes claims vary smoothly from pixel to pixel. At first every claim is one half. The
    standard deviation is that of Eq (9).

    Args:
        height: H of the images.
        width: W of the images.
        state_size: D.
        sigma: starting value of the standard deviation of a, in latent units.
        n_waves: the number of waves along each axis; Phi has n_waves^2 of them.
    """

    grid: Tensor  # (H W, 2)
    Phi: Tensor  # (H W, n_waves^2)

    def __init__(self, height: int, width: int, state_size: int, *, sigma: float = 0.05, n_waves: int = 8) -> None:
        super().__init__()
        self.to_log_sigma = nn.Linear(state_size, 2)
        self.to_claim = nn.Linear(state_size, n_waves**2)  # W^omega
        for layer in (self.to_log_sigma, self.to_claim):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.to_log_sigma.bias, math.log(sigma))
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)  # (H, W, 2): column, row
        waves = torch.arange(n_waves) * torch.pi / 2
        row_waves, column_waves = ((waves * (x[:, None] + 1)).cos() for x in (rows, columns))
        Phi = (row_waves[:, None, :, None] * column_waves[:, None, :]).flatten(2)  # (H, W, n_waves^2)
        self.register_buffer("grid", grid.flatten(0, 1), persistent=False)
        self.register_buffer("Phi", Phi.flatten(0, 1), persistent=False)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of a, each (B, N, T, 2), from s (B, N, T, D) and the images."""
        white = self.white_pixels(images)
        claim = self.claims(s, white)
        left = F.logsigmoid(-claim).cumsum(1) - F.logsigmoid(-claim)  # log of the fraction left by objects before n
        omega = (F.logsigmoid(claim) + left + white.v.clamp(min=1e-30).log().unsqueeze(1)).softmax(-1)
        return torch.einsum("bntk,btkc->bntc", omega, white.place), self.to_log_sigma(s).exp()

    def white_pixels(self, images: Tensor) -> "WhitePixels":
        """Returns the white pixels of each frame."""
        v = images.flatten(2)
        v_white, pixel = v.topk(most_white(v))  # (B, T, k): black pixels have no weight
        seen = v_white[..., :1] > 0  # in a black frame all places are set to the centre, 0
        return WhitePixels(v_white, self.grid[pixel] * seen.unsqueeze(-1), pixel)

    def claims(self, s: Tensor, white: "WhitePixels") -> Tensor:
        """Returns the logits of the claims, Phi W^omega s_t^n (B, N, T, k), at each of the white pixels."""
        return torch.einsum("bntw,btkw->bntk", self.to_claim(s), self.Phi[white.index])


class WhitePixels(NamedTuple):
    """The k brightest pixels of each frame, which include all that are not black."""

    v: Tensor  # (B, T, k), their values; 0 for padding
    place: Tensor  # (B, T, k, 2), (column, row), each in [-1, 1]
    index: Tensor  # (B, T, k), index into the flattened image

    def homogeneous(self) -> Tensor:
        """Returns the homogeneous coordinates as rows: column, row and 1, (B, T, 3, k)."""
        return torch.cat([self.place.mT, torch.ones_like(self.v).unsqueeze(-2)], -2)

    def at(self, frames: Tensor) -> "WhitePixels":
        """Returns the white pixels of the given frames only."""
        return WhitePixels(*(x[:, frames] for x in self))
