"""Warnings, before the first step, about what may go wrong when a model learns from given sequences, with remedies.

The checks use only images and numbers of objects.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.pixel_evidence import PixelEvidence, components

FRAMES = 1_500  # frames that are checked
STILL = 0.6  # share of white pixels that is more than that of objects at rest
SMALLEST = 2  # size of the smallest objects, in pixels


def count_components(white: NDArray[np.bool_], least: int = SMALLEST) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the number of components of at least ``least`` pixels in each frame (F, H, W), and the sizes of all."""
    frame, sizes = components(white)
    large = sizes >= least
    return np.bincount(frame[large], minlength=len(white)), sizes[large]


def number_of_objects(counts: NDArray[np.int64]) -> int:
    """Returns N of a sequence from the number of components in each of its frames; objects that touch count as one."""
    return int(np.quantile(counts, 0.75, method="nearest"))


def still_share(white: NDArray[np.bool_], seen: NDArray[np.bool_]) -> float:
    """Returns the share of the white pixels (n, T, H, W) that are white in four of five frames of their sequence."""
    long = seen.sum(1) >= 6
    white = white[long] & seen[long, :, None, None]
    always = white.sum(1) > 0.8 * seen[long].sum(1)[:, None, None]
    return float((white & always[:, None]).sum() / max(1, white.sum()))


def check_film(data: ImageSequences) -> list[str]:
    """Returns warnings, one line each, with the finding and the option that helps; empty if there are none."""
    warnings: list[str] = []
    n, (H, W) = len(data), data.size
    rows = np.unique(np.linspace(0, n - 1, max(1, min(n, FRAMES // data.images.shape[1]))).round().astype(int))
    part = data[torch.from_numpy(rows)]
    evidence = PixelEvidence()
    evidence.estimate(part.images, part.n_objects)
    weights = evidence(part.images.float().nan_to_num()).numpy()
    white, seen = weights > 0.5, part.seen.numpy()
    brightness = float(part.images.float()[part.seen].mean())
    if brightness > 0.5:
        warnings.append(
            f"images are mostly white (mean {brightness:.2f}): objects are taken to be bright; "
            "invert the film (prepare.py --invert, or --no-invert if it was inverted)"
        )
    if not bool((data.n_objects == 1).any()):
        warnings.append(
            "no sequence has N = 1: nothing shows one object alone, so learning begins with several, which is harder; "
            "add films of a single object if you can"
        )
    still = still_share(white, seen)
    if still > STILL:
        warnings.append(
            f"{still:.0%} of the white pixels hardly change over time: they are a still background, or nothing moves; "
            "subtract it (prepare.py --background median), and check which side is bright (--invert or --no-invert)"
        )
    frames, counts = white[seen], np.repeat(part.n_objects.numpy(), seen.sum(1))
    found, sizes = count_components(frames)
    if not len(sizes):
        return [*warnings, "no frame shows an object of 2 or more pixels; lower the threshold (prepare.py --threshold)"]
    middle = float(np.median(sizes))
    if middle < SMALLEST * 2:
        warnings.append(f"objects cover {middle:.0f} pixels: prepare the film at a larger size (prepare.py --size)")
    if middle > H * W / 4:
        warnings.append(f"objects cover {middle / H / W:.0%} of the image: raise the threshold, or crop less")
    empty = float((found == 0).mean())
    if empty > 0.02:
        warnings.append(f"{empty:.0%} of the frames show no object: cut them off, or give fewer frames (--frames)")
    more, fewer = float((found > counts).mean()), float((found < counts - 1).mean())
    others = evidence.statistics.others
    if more > 0.2:
        warnings.append(
            f"{more:.0%} of the frames show more objects than n_objects: objects come and go, or the background "
            "shows (prepare.py --n-objects, --threshold, --background median, or --background local where it moves)"
            + ("; the rest is modelled as clutter" if others else "")
        )
    elif others:
        warnings.append(
            f"{others * H * W:.0f} pixels per frame belong to none of the objects. "
            "They are modelled; blurred objects and uneven light can be removed (prepare.py --background local)"
        )
    if fewer > 0.2:
        warnings.append(
            f"{fewer:.0%} of the frames show fewer objects than n_objects (prepare.py --n-objects, --threshold)"
        )
    edge = frames[:, [0, -1]].any((1, 2)) | frames[:, :, [0, -1]].any((1, 2))
    if float(edge.mean()) > 0.2:
        warnings.append(
            f"objects touch the edge in {float(edge.mean()):.0%} of the frames: objects cannot be tracked outside the "
            "image; crop wider, or cut where objects enter and leave (prepare.py --crop, --frames)"
        )
    return warnings + _motion(weights, part)


def _motion(weights: NDArray[np.float32], data: ImageSequences) -> list[str]:
    """Returns warnings about jumps of single objects and about frames that are not in temporal order."""
    warnings = []
    y, x = np.mgrid[: data.size[0], : data.size[1]]
    alone = (data.n_objects == 1).numpy()
    mass = weights[alone].sum((2, 3))
    if alone.any() and (mass > 1).any():
        with np.errstate(invalid="ignore", divide="ignore"):
            place = np.stack([(weights[alone] * a).sum((2, 3)) / mass for a in (x, y)], -1)
        step = np.linalg.norm(np.diff(place, axis=1), axis=-1)[(mass[:, 1:] > 1) & (mass[:, :-1] > 1)]
        jumps = float((step > max(data.size) / 4).mean()) if len(step) else 0.0
        if jumps > 0.02:
            warnings.append(
                f"{jumps:.0%} of the steps of single objects are longer than a quarter of the image: "
                "frames are missing, or too far apart in time"
            )
    if weights.shape[1] >= 6:
        near = float(np.abs(np.diff(weights, axis=1)).mean())
        far = float(np.abs(weights[:, 3:] - weights[:, :-3]).mean())
        if near > 0.97 * far and far > 1e-4:
            warnings.append(
                "neighbouring frames differ as much as frames three apart: the frames are not in temporal order, "
                "or the frame rate is too low for the motion"
            )
    return warnings
