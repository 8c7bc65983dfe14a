"""Orders of the frames, and forecasts of measurements along them, for `following`."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_pixels.guides.association import Tracks
from pyro_pixels.guides.heads import WhitePixels
from pyro_pixels.lgssm.small_matrices import inverse_2x2

DETECTION_ROUNDS = 10
DETECTION_WIDTH = 16.0  # with clutter, initial factor on the blobs' variance: narrow blobs would miss objects nearby


class Forecasts(NamedTuple):
    """How measurements are forecast from those before them, in S orders of the frames.

    With L the Cholesky factor of the covariance of all measurements in their order, the forecast of the i-th is
    mean_i + sum_{j<i} L_ij L_jj^-1 e_j, where e_j, the innovations, are y_j minus its forecast: a Kalman filter for any
    order of the frames. The last two of four columns are the precision times the first two, as in `with_slopes`.
    """

    mean: Tensor  # (T, S, 1, 4)
    gain: Tensor  # (T, S, 2T, 4), its rows are zero from the i-th frame on
    precision: Tensor  # (T, S, 2, 2), of a pixel around the forecast, whose covariance is L_ii L_ii' + rho^2 I

    @classmethod
    def of(cls, tracks: Tracks, orders: Tensor, dtype: torch.dtype) -> "Forecasts":
        """Makes them in float64 for orders (S, T) of the frames, and returns them in ``dtype``."""
        T = orders.shape[1]
        coordinates = (2 * orders.unsqueeze(-1) + torch.arange(2, device=orders.device)).flatten(1)  # (S, 2T)
        L = torch.linalg.cholesky_ex(tracks.cov[coordinates.unsqueeze(-1), coordinates.unsqueeze(-2)]).L
        frame = torch.arange(T, device=L.device)
        L_ii = L.unflatten(-1, (T, 2)).unflatten(-3, (T, 2))[:, frame, :, frame]  # (T, S, 2, 2)
        precision = inverse_2x2(L_ii @ L_ii.mT + tracks.blob)
        whitened = L.unflatten(-1, (T, 2)).movedim(2, 0) @ inverse_2x2(L_ii)  # (T, S, 2T, 2), L_ij L_jj^-1 for all i
        gain = whitened.unflatten(2, (T, 2)).permute(2, 1, 0, 4, 3).flatten(2, 3)  # (T, S, 2T, 2)
        mean = tracks.mean.to(L.dtype)[orders].transpose(0, 1).unsqueeze(2)  # (T, S, 1, 2)
        mean, gain = (torch.cat([x, x @ precision], -1).to(dtype) for x in (mean, gain))
        return cls(mean, gain, precision.to(dtype))


def frame_orders(white: WhitePixels, n_starts: int) -> Tensor:
    """Returns (S, T) orders of the frames: from S / 2 starts forward and then back, and the same in reversed time.

    Frames that are black in every sequence come last. Starts are spread over the others alone, so that black frames
    before, between or after them change nothing. The first orders start near the middle, where the claims of the
    network agree best with those in the other starting frames.
    """
    half = n_starts // 2
    white_frames = white.v[..., 0].amax(0) > 0  # (T,)
    rank, n = white_frames.cumsum(0) - 1, white_frames.sum()
    from_middle = (2 * torch.arange(half, device=n.device) - half).abs().argsort(stable=True)
    starts = (n * from_middle // half).unsqueeze(1)

    def places(rank: Tensor) -> Tensor:
        return torch.where(rank >= starts, rank - starts, n - 1 - rank)

    order = torch.stack([places(rank), places(n - 1 - rank)], 1).flatten(0, 1)  # (S, T)
    return torch.where(white_frames, order, len(rank)).argsort(dim=1, stable=True)
