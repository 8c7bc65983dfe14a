"""Which pixels show an object: weights from a likelihood ratio of object against background.

Guides read images as weights: a white pixel is evidence for an object, a black one is not (Secs 2.2.1 and 3.1, where
images are binary). In a film from a camera the background has structure and every pixel is noisy, so brightness no
longer measures evidence. `PixelEvidence` estimates the following from a film, once, before training:

- the background, the median of every still pixel over all frames of all sequences. It is subtracted unless the number
  of connected components then agrees worse with the known numbers of objects;
- the noise: after smoothing with a 3 x 3 kernel, background pixels form a bulk with a centre and a spread, the
  empirical null of Efron (Large-Scale Inference, 2010). The local false discovery rate gives the probability that a
  pixel above it shows an object;
- things fainter than the objects, such as neighbours out of focus: where frames show more connected components than
  objects, only pixels above the height at which the numbers agree count;
- clutter, single white pixels that belong to no object: the share of white pixels among those whose neighbours are all
  black, and from it the probability of an object at a white pixel, given its number of white neighbours;
- others, the remains of things that are none of the objects: the share of the pixels in components beyond the N
  heaviest of a frame. It does not change the images; a `TrackingHead` adds it to the density of its background.

The weight of a pixel is the product of these probabilities and of its brightness relative to an object's. If a film
has no noise, no background and no clutter, the images reach the guide unchanged, bit for bit.

Not in the paper, whose images have no noise, background or clutter.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy  # its modules are loaded at their first use
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_pixels._batch import check_values

FRAMES = 2_000  # the largest number of frames that the estimates use
FRAMES_LEAST = 30  # in fewer frames a slow object looks like background
Z_STEP, Z_BINS = 0.25, 80  # the grid of P(object), in standard deviations of the smoothed noise
Z_LEAST = 2.0  # pixels below this height are explained by noise
WORSE = 0.1  # objects per frame; smaller differences between errors in counts are ignored
COUNTED = 2**19  # approximate number of pixels of the frames in which components are counted
OTHERS_LEAST = 1.0  # pixels per frame; fewer are remains of noise
CLUTTER_LEAST = 0.05  # white background pixels per frame; fewer are ignored
BACKGROUND_LEAST = 0.02  # grey value; a darker background counts as black
SPREAD_LEAST = 1e-4  # grey value; noise with a smaller spread is ignored
STILL_MOST = 0.75  # largest share of exactly black pixels under noise clipped at 0, with or without the background
OBJECT_LEAST = 0.5  # a pixel with a smaller probability counts as background
Floats = NDArray[Any]  # float32 or float64
WITHIN_FRAMES = np.zeros((3, 3, 3), bool)
WITHIN_FRAMES[1] = True  # 8 neighbours in the same frame, none in other frames
KERNEL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])


class FilmStatistics(NamedTuple):
    """The estimates of `PixelEvidence` from a film, in grey values from 0 to 1."""

    has_background: bool
    """Whether the background is subtracted."""
    noise: float
    """Standard deviation of the background's pixels; 0 if they are constant."""
    clutter: float
    """Share of the background's pixels that are white."""
    contrast: float
    """The brightness of an object above the background."""
    others: float = 0.0
    """Share of the pixels that show things other than the objects."""


class PixelEvidence(nn.Module):
    """Images (B, T, H, W) -> weights of the same shape in [0, 1]; the images themselves until `estimate` finds noise.

    The estimates are kept in buffers, which checkpoints contain only if `estimate` has found something.
    """

    background: Tensor  # (H, W)
    scalars: Tensor  # (5,): noise, clutter, contrast, the null's centre and spread
    others: Tensor  # ()
    by_height: Tensor  # (Z_BINS,), P(object) by the height of the smoothed pixel above the null
    by_neighbours: Tensor  # (9,), P(object) of a white pixel by its number of white neighbours
    kernel: Tensor  # (3, 3)
    may_have: ClassVar[dict[str, tuple[int | None, ...]]] = {
        "background": (None, None), "scalars": (5,), "by_height": (Z_BINS,), "by_neighbours": (9,), "others": ()
    }  # fmt: skip
    """The optional buffers of a checkpoint and their shapes (`states.check_weights`); None is any size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.from_numpy(KERNEL).float(), persistent=False)
        self._reset()

    def _reset(self) -> None:
        self._shown: FilmStatistics | None = None
        for name, size in (
            ("background", (0, 0)),
            ("scalars", (5,)),
            ("by_height", (Z_BINS,)),
            ("by_neighbours", (9,)),
        ):
            self.register_buffer(name, torch.ones(size), persistent=False)
        self.register_buffer("others", torch.zeros(()), persistent=False)

    @property
    def active(self) -> bool:
        """Whether `estimate` has found anything."""
        return self._shown is not None

    @property
    def statistics(self) -> FilmStatistics:
        """The estimates; all zeros with a contrast of 1 if nothing has been found."""
        return FilmStatistics(False, 0.0, 0.0, 1.0) if self._shown is None else self._shown

    def forward(self, images: Tensor) -> Tensor:
        found = self._shown
        if found is None:
            return images
        excess = images - self.background.to(images) if found.has_background else images
        weights = (excess / found.contrast).clamp(0, 1)
        if found.noise:
            centre, spread = self.scalars.to(images.dtype)[3:].unbind()
            smooth = _convolved(excess, self.kernel.to(images))
            bins = ((smooth - centre) / (spread * Z_STEP)).clamp(0, Z_BINS - 1).nan_to_num().long()
            weights = weights * self.by_height.to(images.dtype)[bins]
        if found.clutter:
            white = (weights > 0.5).to(images.dtype)
            neighbours = _convolved(white, images.new_ones(3, 3)) - white
            weights = weights * self.by_neighbours.to(images.dtype)[neighbours.round().clamp(0, 8).long()]
        return weights

    @torch.no_grad()
    def estimate(self, images: Tensor, n_objects: Tensor) -> FilmStatistics:
        """Makes the estimates from images (n, T, H, W) with ``n_objects`` (n,), and keeps them.

        Returns:
            The `statistics`.

        Raises:
            ValueError: if pixels are outside [0, 1].
        """
        check_values(images)
        device = self.background.device
        self._reset()
        frames, counts = _some_frames(images, n_objects)
        if len(frames) < FRAMES_LEAST:
            self.to(device)
            return self.statistics
        background = _background(frames)
        plain, without = _evidence(frames), None
        # The background is subtracted unless the remaining components then agree worse with the numbers of objects.
        if background.max() > BACKGROUND_LEAST:
            without = _evidence(frames - background)
            if _count_error(without, counts) > _count_error(plain, counts) + WORSE:
                without = None
        has_background, found = without is not None, without or plain
        found = _without_fainter(found, counts)
        (centre, spread, noise), contrast = found.null, found.contrast
        clutter, by_neighbours = _clutter(found.weights > 0.5, counts)
        if not (has_background or noise or clutter):
            contrast = 1.0  # images stay as they are
        self.background = torch.from_numpy(background if has_background else np.zeros_like(background))
        self.by_height = torch.from_numpy(found.table).float()
        self.by_neighbours = torch.from_numpy(by_neighbours).float()
        self.scalars = torch.tensor([noise, clutter, contrast, centre, spread])
        self._persist()
        few = _few(frames)
        weights = self(torch.from_numpy(frames[few]).unsqueeze(0)).squeeze(0).numpy()
        self.others = torch.tensor(_others(weights, counts[few]))
        if has_background or noise or clutter or float(self.others):
            self._persist()
        else:
            self._reset()
        self.to(device)
        return self.statistics

    def _persist(self) -> None:
        """Makes the buffers part of the state, and copies their numbers, so that reading them needs no device."""
        noise, clutter, contrast, _, _ = self.scalars.tolist()
        self._shown = FilmStatistics(bool(self.background.any()), noise, clutter, contrast, float(self.others))
        for name in self.may_have:
            self.register_buffer(name, getattr(self, name), persistent=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Takes over the estimates, and, from a state without any, that there are none."""
        mine = {name: state_dict[prefix + name].clone() for name in self.may_have if prefix + name in state_dict}
        device = self.background.device
        self._reset()
        if mine:
            mine.setdefault("others", self.others)  # absent in files of earlier versions
            missing += [prefix + name for name in self.may_have if name not in mine]
        if len(mine) == len(self.may_have):
            for name, x in mine.items():
                setattr(self, name, x)
            self._persist()
        self.to(device)


class _Null(NamedTuple):
    centre: float
    spread: float
    noise: float


class _Evidence(NamedTuple):
    """The evidence in frames whose background, if any, is subtracted."""

    table: Floats  # (Z_BINS,), P(object) by the height of the smoothed image above the null
    null: _Null
    contrast: float
    bins: NDArray[np.int64]  # (F, H, W), of the smoothed image's height above the null
    weights: Floats  # (F, H, W)


def _some_frames(images: Tensor, n_objects: Tensor) -> tuple[Floats, NDArray[np.int64]]:
    """Returns at most FRAMES frames (F, H, W), evenly spaced over all sequences, and the numbers of objects in them."""
    n, T = images.shape[:2]
    each = np.unique(np.linspace(0, n * T - 1, min(n * T, FRAMES)).round().astype(np.int64))
    frames = images.flatten(0, 1)[torch.from_numpy(each).to(images.device)].float().cpu().numpy()
    counts = n_objects.cpu().numpy()[each // T]
    seen = np.isfinite(frames).all((1, 2))
    return frames[seen], counts[seen].astype(np.int64)


def _background(frames: Floats) -> Floats:
    """Returns the median of every pixel, limited so that objects that often pass it do not become background."""
    low, middle = np.quantile(frames, (0.05, 0.5), axis=0)
    wide = float(np.median(middle - low))  # typical depth of the noise below the median
    return np.minimum(middle, low + wide).astype(np.float32)


def _smoothed(x: Floats) -> Floats:
    return scipy.ndimage.convolve(x, KERNEL[None].astype(np.float32), mode="constant")


def _bins(smooth: Floats, null: _Null) -> NDArray[np.int64]:
    return np.clip((smooth - null.centre) / (null.spread * Z_STEP), 0, Z_BINS - 1).astype(np.int64)


def _evidence(excess: Floats) -> _Evidence:
    """Returns the empirical null of the smoothed pixels, and P(object) from the local false discovery rate."""
    smooth, top, table = _smoothed(excess), float(excess.max()), np.ones(Z_BINS)
    low, centre, high = (float(q) for q in np.quantile(smooth[:: max(1, len(smooth) // 500)], (0.3, 0.5, 0.7)))
    spread = max(centre - low, high - centre) / float(scipy.special.ndtri(0.7))
    still = bool(((excess == 0) | (excess == 1)).all()) or float((excess == 0).mean()) > STILL_MOST
    if still or spread < SPREAD_LEAST:
        bright = excess[excess > 0.5 * top] if top > 0 else excess[:0]
        contrast = float(np.quantile(bright, 0.9)) if bright.size else 1.0
        bins = np.zeros(excess.shape, np.int64)
        return _Evidence(table, _Null(0.0, 0.0, 0.0), contrast, bins, np.clip(excess / contrast, 0, 1))
    null = _Null(centre, spread, spread / float(np.sqrt((KERNEL**2).sum())))
    bins = _bins(smooth, null)
    observed = np.bincount(bins.ravel(), minlength=Z_BINS).astype(float)
    z = np.arange(Z_BINS + 1) * Z_STEP
    expected = np.diff(scipy.special.ndtr(z)) * smooth.size
    table -= np.divide(expected, observed, out=np.zeros(Z_BINS), where=observed > 0)
    table[z[:-1] < Z_LEAST] = 0.0
    table = np.maximum.accumulate(np.clip(table, 0, 1))
    table[table < OBJECT_LEAST] = 0.0
    there = excess[table[bins] > 0]
    contrast = float(np.quantile(there, 0.9)) if there.size else 1.0
    return _Evidence(table, null, contrast, bins, np.clip(excess / contrast, 0, 1) * table[bins])


def _few(frames: Floats) -> slice:
    """Returns a slice of evenly spaced frames (F, H, W), with about `COUNTED` pixels in all."""
    return slice(None, None, max(1, frames.size // COUNTED))


def _without_fainter(found: _Evidence, counts: NDArray[np.int64]) -> _Evidence:
    """Returns the evidence with P(object) = 0 below the height at which components no longer outnumber the objects.

    Heights are compared by the surplus components per frame plus the objects that they miss and the lowest height
    shows. The lowest height within `WORSE` of the best is taken, as it keeps most of the objects' rims.
    """
    if not found.null.noise:
        return found
    few = _few(found.weights)
    shown, wanted = np.where(found.weights[few] > 0, found.bins[few], -1), counts[few]
    lowest = int((found.table > 0).argmax())
    heights = np.arange(lowest, Z_BINS, 2)
    blobs = np.stack([count_blobs(shown >= z) for z in heights]) - wanted  # (heights, F)
    missing = -np.minimum(blobs, 0).mean(1)
    worse = np.maximum(blobs, 0).mean(1) + np.maximum(missing - missing[0], 0)
    chosen = heights[(worse <= worse.min() + WORSE).argmax()]
    table = np.where(np.arange(Z_BINS) < chosen, 0.0, found.table)
    return found._replace(table=table, weights=np.where(found.bins < chosen, 0, found.weights))


def _count_error(found: _Evidence, counts: NDArray[np.int64]) -> float:
    """Returns the mean absolute difference between the numbers of connected components and of objects in a frame."""
    return float(np.abs(count_blobs(found.weights > 0.5) - counts).mean())


def _clutter(white: NDArray[np.bool_], counts: NDArray[np.int64]) -> tuple[float, Floats]:
    """Returns the share of white background pixels, and P(object) of white pixels by number of white neighbours."""
    all_objects = np.ones(9)
    kernel = np.ones((1, 3, 3), np.int8)
    neighbours = scipy.ndimage.convolve(white.astype(np.int8), kernel, mode="constant") - white
    alone = neighbours == 0
    rate = float(white[alone].mean()) if alone.any() else 0.0
    if rate * white[0].size < CLUTTER_LEAST:
        return 0.0, all_objects
    blobs = count_blobs(white)
    if (np.minimum(blobs, counts)).sum() < 0.5 * counts.sum():  # single pixels may be the objects
        return 0.0, all_objects
    observed = np.bincount(neighbours[white], minlength=9).astype(float)
    k = np.arange(9)
    binomial = scipy.special.comb(8, k) * rate**k * (1 - rate) ** (8 - k)  # probabilities of k white neighbours
    expected = rate * binomial * white.size
    table = 1 - np.divide(expected, observed, out=np.zeros(9), where=observed > 0)
    table = np.maximum.accumulate(np.clip(table, 0, 1))
    table[table < OBJECT_LEAST] = 0.0
    table[4:] = 1.0
    return rate, table


def _others(weights: Floats, counts: NDArray[np.int64]) -> float:
    """Returns the share of the pixels in components beyond the N heaviest; 0 if noise explains so few."""
    frame, mass = components(weights > 0, weights)
    order = np.lexsort((-mass, frame))
    frame, mass = frame[order], mass[order]
    rank = np.arange(len(frame)) - np.searchsorted(frame, frame)
    share = float(mass[rank >= counts[frame]].sum()) / weights.size
    return share if share * weights[0].size >= OTHERS_LEAST else 0.0


def components(white: NDArray[np.bool_], weights: Floats | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Returns the frame and the size of each connected component (8 neighbours) of white pixels.

    Args:
        white: (F, H, W).
        weights: (F, H, W), the contribution of each pixel to a size; 1 by default.
    """
    labels, n = scipy.ndimage.label(white, WITHIN_FRAMES)
    sizes = np.bincount(labels.ravel(), None if weights is None else weights.ravel(), n + 1)[1:]
    return np.array([s[0].start for s in scipy.ndimage.find_objects(labels)], np.int64), sizes


def count_blobs(white: NDArray[np.bool_], least: int = 2) -> NDArray[np.int64]:
    """Returns the number of `components` of at least ``least`` pixels in each frame (F, H, W)."""
    frame, sizes = components(white)
    return np.bincount(frame[sizes >= least], minlength=len(white))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Returns x (B, T, H, W) convolved with a kernel (3, 3), with zeros outside."""
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel[None, None], padding=1).squeeze(1).unflatten(0, x.shape[:2])
