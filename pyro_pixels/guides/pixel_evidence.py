"""Which pixels show an object: weights from a likelihood ratio of object against background.

Guides read images as weights: a white pixel speaks for an object, a black one for none (Secs 2.2.1 and 3.1, where
images are binary). In a film from a camera the background has structure and every pixel has noise, and brightness
is no measure of evidence any more. `PixelEvidence` estimates from a film, once, before training:

- the background, the median of every still pixel over all frames of all sequences, and whether to subtract it: only
  where the number of connected components then agrees better with the known numbers of objects;
- the noise: smoothed with a 3 x 3 kernel, the background is a bulk with a centre and a spread, the empirical null of
  Efron (Large-Scale Inference, 2010), and the local false discovery rate says how likely a pixel above it is object;
- fainter things than objects, such as neighbours out of focus: where frames show more connected components than
  objects, pixels count from the height on at which the numbers agree;
- clutter, single white pixels of nobody: the share of white pixels among those whose neighbours are all black, and with
  it the probability that a white pixel with so many white neighbours belongs to an object;
- others, what is left of things that are none of the objects: the share of the pixels in components beyond the N
  heaviest of a frame. Images are not changed by it; a `TrackingHead` takes it for the density of its background.

The weight of a pixel is the product of these probabilities and of its brightness relative to an object's. Where a film
has no noise, no background and no clutter nothing is done, and images reach the guide as they are, to the bit.

Not in the paper, whose images have none of the three.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy  # whose modules are loaded where they are first used
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

FRAMES = 2_000  # that the estimates are made from
FRAMES_LEAST = 30  # in fewer an object that is slow looks like background
Z_STEP, Z_BINS = 0.25, 80  # the grid on which the probability of an object is kept, in standard deviations of the noise
Z_LEAST = 2.0  # below it the noise explains a pixel
WORSE = 0.1  # objects a frame
COUNTED = 2**19  # pixels, about so many, of frames whose components are counted at every height
OTHERS_LEAST = 1.0  # pixels in a frame; fewer are left over from noise
CLUTTER_LEAST = 0.05  # white pixels of nobody in a frame; fewer are not looked for
BACKGROUND_LEAST = 0.02  # grey value; a background below it is black
SPREAD_LEAST = 1e-4  # grey value
STILL_MOST = 0.75  # share of pixels that noise, cut at 0, leaves exactly black, subtracted backgrounds included
OBJECT_LEAST = 0.5  # probability below which a pixel is background
Floats = NDArray[Any]  # float32 or float64
WITHIN_FRAMES = np.zeros((3, 3, 3), bool)
WITHIN_FRAMES[1] = True  # what is next to each other: 8 neighbours in a frame, none in other frames
KERNEL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])


class FilmStatistics(NamedTuple):
    """What `PixelEvidence` found in a film, in grey values from 0 to 1."""

    has_background: bool
    """Whether the background is subtracted."""
    noise: float
    """Standard deviation of the background's pixels; 0 if they do not move."""
    clutter: float
    """Share of the background's pixels that are white."""
    contrast: float
    """How much brighter than the background an object is."""
    others: float = 0.0
    """Share of the pixels that show things that are none of the objects."""


class PixelEvidence(nn.Module):
    """Images (B, T, H, W) -> weights of the same shape in [0, 1]; the images themselves until `estimate` found noise.

    What was found is kept in buffers, and goes into checkpoints only where there is something to keep.
    """

    background: Tensor  # (H, W)
    scalars: Tensor  # (5,): noise, clutter, contrast, the null's centre and spread
    others: Tensor  # ()
    by_height: Tensor  # (Z_BINS,), P(object) by how far the smoothed pixel is above the null
    by_neighbours: Tensor  # (9,), P(object) of a white pixel by its number of white neighbours
    kernel: Tensor  # (3, 3)
    may_have: ClassVar[dict[str, tuple[int | None, ...]]] = {
        "background": (None, None), "scalars": (5,), "by_height": (Z_BINS,), "by_neighbours": (9,), "others": ()
    }  # fmt: skip
    """What a checkpoint may have of it but need not, and the shapes (`states.check_weights`); None is any size."""

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
        """Whether images are changed."""
        return self._shown is not None

    @property
    def statistics(self) -> FilmStatistics:
        """What was found; all zeros, and a contrast of 1, where images are left alone."""
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
        """Looks at images (n, T, H, W) with ``n_objects`` (n,), and keeps what it finds.

        Returns:
            What was found, in words of the film.
        """
        device = self.background.device
        self._reset()
        frames, counts = _some_frames(images, n_objects)
        if len(frames) < FRAMES_LEAST:
            self.to(device)
            return self.statistics
        background = _background(frames)
        plain, without = _evidence(frames), None
        # A background is one if what is left without it looks more like the objects that are known to be there.
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
        """Makes the buffers part of the state, and their numbers known without asking the device."""
        noise, clutter, contrast, _, _ = self.scalars.tolist()
        self._shown = FilmStatistics(bool(self.background.any()), noise, clutter, contrast, float(self.others))
        for name in self.may_have:
            self.register_buffer(name, getattr(self, name), persistent=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        mine = {name: state_dict.get(prefix + name) for name in self.may_have}
        device = self.background.device
        self._reset()
        if mine["others"] is None:  # of a version that did not look for them
            mine["others"] = self.others
        if all(x is not None for x in mine.values()):
            for name, x in mine.items():
                setattr(self, name, x)
            self._persist()
        self.to(device)


class _Null(NamedTuple):
    centre: float
    spread: float
    noise: float


class _Evidence(NamedTuple):
    """What is made of frames without their background."""

    table: Floats  # (Z_BINS,), P(object) by the height of the smoothed image above the null
    null: _Null
    contrast: float
    bins: NDArray[np.int64]  # (F, H, W), of the smoothed image's height above the null
    weights: Floats  # (F, H, W)


def _some_frames(images: Tensor, n_objects: Tensor) -> tuple[Floats, NDArray[np.int64]]:
    """At most FRAMES frames (F, H, W), evenly from all sequences, and how many objects each shows."""
    n, T = images.shape[:2]
    each = np.unique(np.linspace(0, n * T - 1, min(n * T, FRAMES)).round().astype(np.int64))
    frames = images.flatten(0, 1)[torch.from_numpy(each).to(images.device)].float().cpu().numpy()
    counts = n_objects.cpu().numpy()[each // T]
    seen = np.isfinite(frames).all((1, 2))
    return frames[seen], counts[seen].astype(np.int64)


def _background(frames: Floats) -> Floats:
    """The median of every pixel, where it is still: an object that passes often makes no background."""
    low, middle = np.quantile(frames, (0.05, 0.5), axis=0)
    wide = float(np.median(middle - low))  # as far as noise goes below the median
    return np.minimum(middle, low + wide).astype(np.float32)


def _smoothed(x: Floats) -> Floats:
    return scipy.ndimage.convolve(x, KERNEL[None].astype(np.float32), mode="constant")


def _bins(smooth: Floats, null: _Null) -> NDArray[np.int64]:
    return np.clip((smooth - null.centre) / (null.spread * Z_STEP), 0, Z_BINS - 1).astype(np.int64)


def _evidence(excess: Floats) -> _Evidence:
    """The empirical null of the smoothed pixels, and P(object) by the local false discovery rate above it."""
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
    """Some of the frames (F, H, W), evenly, of `COUNTED` pixels in all."""
    return slice(None, None, max(1, frames.size // COUNTED))


def _without_fainter(found: _Evidence, counts: NDArray[np.int64]) -> _Evidence:
    """The evidence with P(object) = 0 below the height from which on there are not more components than objects.

    Heights are compared by surplus components a frame, and by objects that the lowest height shows and they do not. Of
    those that are as good as the best, within `WORSE`, the lowest is taken, which leaves most of the objects' rims.
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
    """How far the number of connected components of the object pixels is from that of the objects, mean over frames."""
    return float(np.abs(count_blobs(found.weights > 0.5) - counts).mean())


def _clutter(white: NDArray[np.bool_], counts: NDArray[np.int64]) -> tuple[float, Floats]:
    """The share of white pixels of nobody, and P(object) of a white pixel by its number of white neighbours."""
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
    binomial = scipy.special.comb(8, k) * rate**k * (1 - rate) ** (8 - k)  # of the numbers of neighbours
    expected = rate * binomial * white.size
    table = 1 - np.divide(expected, observed, out=np.zeros(9), where=observed > 0)
    table = np.maximum.accumulate(np.clip(table, 0, 1))
    table[table < OBJECT_LEAST] = 0.0
    table[4:] = 1.0
    return rate, table


def _others(weights: Floats, counts: NDArray[np.int64]) -> float:
    """The share of the pixels in components beyond those of the objects, the heaviest; 0 for what noise leaves over."""
    frame, mass = components(weights > 0, weights)
    order = np.lexsort((-mass, frame))
    frame, mass = frame[order], mass[order]
    rank = np.arange(len(frame)) - np.searchsorted(frame, frame)
    share = float(mass[rank >= counts[frame]].sum()) / weights.size
    return share if share * weights[0].size >= OTHERS_LEAST else 0.0


def components(white: NDArray[np.bool_], weights: Floats | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The connected components of the white pixels of frames (F, H, W), 8 neighbours: the frame of each, and its size.

    Args:
        white: (F, H, W).
        weights: (F, H, W), what a pixel adds to a size; default 1.
    """
    labels, n = scipy.ndimage.label(white, WITHIN_FRAMES)
    sizes = np.bincount(labels.ravel(), None if weights is None else weights.ravel(), n + 1)[1:]
    return np.array([s[0].start for s in scipy.ndimage.find_objects(labels)], np.int64), sizes


def count_blobs(white: NDArray[np.bool_], least: int = 2) -> NDArray[np.int64]:
    """How many `components` of at least so many pixels each frame (F, H, W) has."""
    frame, sizes = components(white)
    return np.bincount(frame[sizes >= least], minlength=len(white))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """x (B, T, H, W) with a kernel (3, 3), zeros outside."""
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel[None, None], padding=1).squeeze(1).unflatten(0, x.shape[:2])
