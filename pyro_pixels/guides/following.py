"""Following objects through the frames in several orders: stages 1 and 2 of `TrackingHead`."""

from typing import Any

import torch
from torch import Tensor

from pyro_pixels._fused import choose
from pyro_pixels._fused import normal as draw
from pyro_pixels.guides.association import (
    Pixels,
    Tracks,
    absent_penalty,
    centroids,
    log_density,
    share,
    with_slopes,
)
from pyro_pixels.guides.forecasts import DETECTION_ROUNDS, DETECTION_WIDTH, Forecasts


def follow(tracks: Tracks, pixels: Pixels, claim: Tensor, penalty: Tensor, orders: Tensor) -> Tensor:
    """Detects the objects in the first frame of S orders of the frames, and follows them along each order.

    An object with few pixels in a frame is taken to be near its forecast.

    Args:
        tracks: the prior over paths.
        pixels: the white pixels.
        claim: (B, S, N, k), the network's claims on the pixels in the first frame of each order.
        penalty: (B, N), `absent_penalty`.
        orders: (S, T), each a permutation of the frames.

    Returns:
        The measurements (B, T, 2, N S).
    """
    forecasts = Forecasts.of(tracks, orders, claim.dtype)
    function: Any = choose(claim, follow_reference, _fused, largest_difference)
    return function(forecasts, tracks, pixels, claim, penalty, orders)  # type: ignore[no-any-return]


def follow_reference(
    forecasts: Forecasts, tracks: Tracks, pixels: Pixels, claim: Tensor, penalty: Tensor, orders: Tensor
) -> Tensor:
    """Computes `follow` in torch operations, some 400 for 30 frames."""
    (B, S, N, k), T = claim.shape, orders.shape[1]
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
    precision = forecasts.precision.unsqueeze(2).expand(T, S, B, 2, 2).reshape(T, S * B, 2, 2)
    e, paths = claim.new_zeros(S, B * N, 2 * T), claim.new_empty(T, S, B * N, 4)  # innovations; blobs of the forecasts
    innovations = e.view(S * B, N, T, 2).permute(2, 0, 3, 1).unbind()
    for i, blobs in enumerate(paths.view(T, S * B, N, 4).mT.unbind()):
        torch.baddbmm(forecasts.mean[i], e, forecasts.gain[i], out=paths[i])
        if i > 0:
            log_r = log_density(homogeneous[i], blobs, penalty)
            background = tracks.log_clutter(homogeneous[i], precision[i])
        place, mass = share(weighed[i], log_r, background).split((2, 1), -2)
        torch.div(torch.addcmul(place, mass, blobs[:, :2], value=-1), 1 + mass, out=innovations[i])
    y = paths[..., :2].view(T, S, B, N, 2) + e.view(S, B, N, T, 2).permute(3, 0, 1, 2, 4)
    y = y.take_along_dim(orders.argsort(1).mT[:, :, None, None, None], 0)
    return y.permute(2, 0, 4, 3, 1).flatten(-2)


def _fused() -> Any:
    from pyro_pixels.guides import fused_following  # imports Triton

    return fused_following.follow


def largest_difference(plain: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of measurements, of order 1, between a function and the plain one."""
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    differences = []
    for N, k, B, S, T, clutter in (
        (2, 5, 3, 2, 4, 0.0),
        (3, 41, 2, 4, 30, 0.0),
        (1, 9, 1, 2, 5, 0.3),
        (5, 20, 2, 2, 7, 0.1),
    ):
        arguments = _random_arguments(N, k, B, S, T, clutter, generator, device)
        wanted, found = (each(*arguments) for each in (plain, function))
        there = (arguments[4] == 0).repeat_interleave(S, 1).view(B, 1, 1, N * S)
        differences.append(torch.where(there, found - wanted, 0.0).abs().max())
    return float(torch.stack(differences).max())  # NaN if any is


def _random_arguments(
    N: int, k: int, B: int, S: int, T: int, clutter: float, generator: torch.Generator, device: torch.device
) -> tuple[Forecasts, Tracks, Pixels, Tensor, Tensor, Tensor]:
    """Returns arguments of `follow_reference` in float32; the first sequence has one object."""

    def normal(*shape: int) -> Tensor:
        return draw(generator, *shape).to(device)

    kind: Any = {"dtype": torch.float32, "device": device}
    root, blob = 0.1 * normal(2 * T, 2 * T), torch.tensor([[0.02, 0.004], [0.004, 0.03]], **kind)
    cov = (root @ root.mT + 0.1 * torch.eye(2 * T, **kind)).double()
    unused = normal(1)
    tracks = Tracks(0.1 * normal(T, 2), cov, unused, unused, blob, torch.linalg.inv(blob), clutter)
    homogeneous = torch.cat([0.3 * normal(B, T, 2, k), torch.ones(B, T, 1, k, **kind)], 2)
    v = normal(B, T, k).sigmoid()
    penalty = absent_penalty(
        torch.arange(N, device=device) < torch.arange(1, B + 1, device=device).clamp(max=N)[:, None]
    )
    orders = torch.stack([torch.randperm(T, generator=generator, device="cpu") for _ in range(S)]).to(device)
    claim = normal(B, S, N, k) + penalty[:, None, :, None]
    pixels = Pixels(v, homogeneous, v.unsqueeze(2) * homogeneous)
    return Forecasts.of(tracks, orders, torch.float32), tracks, pixels, claim, penalty, orders
