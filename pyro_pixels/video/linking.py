"""Linking: which tracks of overlapping sequences show the same object of a film.

A long film is cut into sequences that overlap in time, and a crowded one also into windows, which may overlap in space.
Objects of different sequences are the same particle if they are near each other in the frames that both show, or if one
begins, soon after the other has ended, where that would be if it had moved on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

WITHIN = 2.0  # the largest mean distance between two tracks of one particle, in pixels of the sequences
GAP = 5  # the largest number of frames from a particle's last frame to the first of a track that continues it
RECENT = 4  # frames at the end of a track that tell its velocity
Floats, Indices = NDArray[np.float64], NDArray[np.int64]


class Links(NamedTuple):
    """The particles of all films, and the best estimate of each in each frame."""

    particles: NDArray[np.int64]
    """(n, N), the particle that each object of each sequence is, counted over all films; -1 for absent objects."""
    best: NDArray[np.bool_]
    """(n, N, T), whether no other sequence has an estimate of that particle in that frame with a smaller variance."""


class _Particles:
    """The particles of one film: their tracks (P, F, 2) so far, NaN where there is no estimate."""

    def __init__(self, n_frames: int) -> None:
        self.tracks = np.zeros((0, n_frames, 2))
        self.variances = np.zeros((0, n_frames))
        self.objects = np.zeros((0, n_frames), np.int64)  # whose estimate it is
        self.last = np.zeros(0, np.int64)  # frame
        self.count = 0

    def _make_room(self) -> None:
        """Doubles the number of rows."""
        more = max(64, len(self.last))
        for name, empty in (("tracks", np.nan), ("variances", np.inf), ("objects", -1), ("last", -1)):
            x = getattr(self, name)
            setattr(self, name, np.concatenate([x, np.full((more, *x.shape[1:]), empty, x.dtype)]))

    def match(self, tracks: Floats, frames: slice, within: float) -> list[int]:
        """Returns the particle of each track (N, L, 2) of one sequence: those so far, or else new ones."""
        last, found = self.last[: self.count], np.full(len(tracks), -1)
        shared = np.flatnonzero(last >= frames.start)
        _assign(found, shared, _mean_distances(tracks, self.tracks[shared, frames]), within)
        ended = np.flatnonzero((last >= max(0, frames.start - GAP)) & (last < frames.start))
        apart = np.linalg.norm(tracks[:, :1] - self._forecasts(ended, frames.start), axis=-1)
        _assign(found, ended, apart, within)  # what shared frames tell comes first
        new = found < 0
        found[new] = self.count + np.arange(new.sum())
        self.count += int(new.sum())
        while self.count > len(self.last):
            self._make_room()
        return found.tolist()

    def _forecasts(self, particles: Indices, frame: int) -> Floats:
        """Returns the positions (P, 2) of particles that go on at their recent velocity until a frame."""
        last = self.last[particles]
        frames = last[:, None] - np.arange(RECENT)
        steps = np.diff(self.tracks[particles[:, None], np.maximum(0, frames)], axis=1)
        together = (np.isfinite(steps[..., 0]) & (frames[:, 1:] >= 0)).cumprod(1, dtype=bool)  # without a gap
        velocity = -np.where(together[..., None], steps, 0).sum(1) / np.maximum(1, together.sum(1))[:, None]
        return self.tracks[particles, last] + velocity * (frame - last)[:, None]

    def add(self, particle: int, track: Floats, variance: Floats, frames: slice, which: int) -> None:
        """Takes over the estimates of a track (L, 2) where no other has a smaller variance; NaN are no estimates."""
        better = (variance < self.variances[particle, frames]) & np.isfinite(track).all(-1)
        self.tracks[particle, frames][better] = track[better]
        self.variances[particle, frames][better] = variance[better]
        self.objects[particle, frames][better] = which
        if better.any():
            self.last[particle] = max(self.last[particle], frames.start + int(np.flatnonzero(better)[-1]))


def _assign(found: Indices, particles: Indices, apart: Floats, within: float) -> None:
    """Gives the tracks that have none in ``found`` (N,) the nearest particles, one to one, by distances (N, P)."""
    left = np.flatnonzero(found < 0)
    apart = np.nan_to_num(apart[left], nan=np.inf)
    rows, columns = linear_sum_assignment(np.minimum(apart, within))
    near = apart[rows, columns] < within
    found[left[rows[near]]] = particles[columns[near]]


def _mean_distances(tracks: Floats, others: Floats) -> Floats:
    """Returns the mean distances (N, P) of tracks (N, L, 2) and (P, L, 2) in shared frames, inf if there are none."""
    apart = np.linalg.norm(tracks[:, None] - others, axis=-1)
    shared = np.isfinite(apart)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(shared, apart, 0).sum(-1) / shared.sum(-1)
    return np.where(shared.any(-1), mean, np.inf)


def link_tracks(
    positions: ArrayLike,
    variances: ArrayLike,
    n_objects: ArrayLike,
    starts: Sequence[tuple[int, int]],
    lengths: ArrayLike,
    *,
    within: float = WITHIN,
) -> Links:
    """Links the tracks of sequences that share frames of a film.

    Sequences are taken in the order of their first frames. The objects of each are matched to the particles so far, one
    to one, so that the sum of their mean distances over shared frames is smallest; those that are left, to particles
    that ended up to `GAP` frames before, by the distance of the object's first position from where the particle's
    velocity leads. Pairs that are ``within`` apart or farther are not matched. An object without a match is a new
    particle. Estimates do not count where position or variance is not finite.

    Args:
        positions: (n, N, T, 2), in one system of coordinates for all sequences of a film.
        variances: (n, N, T), of each position, the sum over both axes.
        n_objects: (n,).
        starts: the film of each sequence, and the frame in it at which the sequence begins.
        lengths: (n,), the number of frames of each sequence that belong to the film.
        within: in the units of the positions.

    Raises:
        ValueError: if shapes do not fit each other, or numbers are out of range.
    """
    a, S = np.asarray(positions, np.float64), np.asarray(variances, np.float64)
    N, L = np.asarray(n_objects, np.int64), np.asarray(lengths, np.int64)
    _check(a, S, N, L, starts)
    particles, best, total = np.full(a.shape[:2], -1), np.zeros(a.shape[:3], bool), 0
    rows_of: dict[int, list[int]] = {}
    for b in sorted(range(len(a)), key=lambda b: starts[b]):
        rows_of.setdefault(starts[b][0], []).append(b)
    for rows in rows_of.values():
        frames = {b: slice(starts[b][1], starts[b][1] + int(L[b])) for b in rows}
        film = _Particles(max(f.stop for f in frames.values()))
        for b in rows:
            tracks = a[b, : N[b], : L[b]]
            found = film.match(tracks, frames[b], within)
            for i, p in enumerate(found):
                film.add(p, tracks[i], S[b, i, : L[b]], frames[b], b * a.shape[1] + i)
            particles[b, : N[b]] = found
        for b in rows:
            of_row = b * a.shape[1] + np.arange(N[b])
            best[b, : N[b], : L[b]] = film.objects[particles[b, : N[b]], frames[b]] == of_row[:, None]
            particles[b, : N[b]] += total
        total += film.count
    return Links(particles, best)


def _check(a: Floats, S: Floats, N: Indices, L: Indices, starts: Sequence[tuple[int, int]]) -> None:
    if a.ndim != 4 or a.shape[-1] != 2 or S.shape != a.shape[:3]:
        raise ValueError(f"positions have shape {a.shape}, variances {S.shape}; wanted (n, N, T, 2) and (n, N, T)")
    n, most, T = S.shape
    for name, x in (("n_objects", N), ("starts", starts), ("lengths", L)):
        if len(x) != n:
            raise ValueError(f"{name} has length {len(x)} for positions of {n} sequences")
    for name, x, top in (("n_objects", N, most), ("lengths", L, T)):
        if n and not (x.min() >= 0 and x.max() <= top):
            raise ValueError(f"{name} has values from {x.min()} to {x.max()}; wanted 0 to {top}, as in the positions")
    if any(frame < 0 for _, frame in starts):
        raise ValueError(f"starts has the frame {min(frame for _, frame in starts)}; wanted 0 or later")
