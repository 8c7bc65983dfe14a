"""Identities corrected by the dynamics: parts of two objects' tracks are exchanged according to p(a) of Eq (10).

A guide without dynamics, such as the paper's, may swap two objects halfway (the paper's Fig 5b). Swapped tracks do not
follow the dynamics, so p(a) detects swaps without pixels or labels. A move exchanges two objects i, j over frames
s, ..., e - 1:

    a_t^i <-> a_t^j   for s <= t < e

With e = T it exchanges tails. Every move is its own inverse.

- `untangle` makes the best move, repeatedly, as long as log p(a) grows. It is meant for the means of any guide.
- `resample_labels` makes Metropolis-Hastings moves whose target is p(a | v), or p(a) if no images are given. Moves
  are proposed with the locally balanced probabilities of Zanella (Informed proposals for local MCMC in discrete spaces,
  2020). Applied to draws of q(a | v), they never increase the KL divergence of their distribution from p(a | v).

All T (T + 1) / 2 moves of all pairs are scored at once. log p(a^n | z = k) is quadratic in a^n, so with d = a^j - a^i,
P_k the precision matrix of p(a | z = k) and e = a^i - E[a | z = k] the exchange over a window w adds

    2 sum_{t in w} (P_k e)_t' d_t + sum_{t, t' in w} d_t' P_k[t, t'] d_t'

to e' P_k e: differences of cumulative sums, O(T^2) for all windows together.

Departures from the paper: these moves are not in the paper. They do not change the posterior of the model.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_pixels._batch import counts, most_objects, object_mask
from pyro_pixels._convert import as_batch
from pyro_pixels._fused import choose, normal
from pyro_pixels._pyro import check_pixels, without_unseen
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig
from pyro_pixels.lgssm.marginal import marginal_moments
from pyro_pixels.lgssm.sharing import once
from pyro_pixels.lgssm.small_matrices import cholesky_inverse

MOST_EXCHANGES = 30
LEAST_GAIN = 1e-6  # nats
MOST_FRAMES_FUSED = 64  # more do not fit into the registers of `fused_exchanges`
SHORTEST_FIRST = 1e-7  # nats per frame: p(a) is the same whether a tail or the head before it is exchanged; this cost
# prefers the shorter one, so that most frames keep their labels


class ImageModel(Protocol):
    """The parts of a `PixelModel` that `resample_labels` and `refine` use; guides do not import the model."""

    @property
    def dynamics(self) -> Dynamics:
        """The dynamics, which define p(a)."""
        ...

    @property
    def renderer(self) -> Callable[..., Tensor]:
        """Maps positions and the mask of present objects to logits of the pixels."""
        ...

    @property
    def likelihood(self) -> Callable[[Tensor], Any]:
        """Maps logits to p(v | a)."""
        ...


class Untangled(NamedTuple):
    """Tracks whose objects were renamed frame by frame."""

    a: Tensor  # (B, N, T, 2)
    labels: Tensor  # (B, N, T) int64: a[b, n, t] was given as object labels[b, n, t] of frame t
    gain: Tensor  # (B,), increase of log p(a) in nats

    def rename(self, x: Tensor) -> Tensor:
        """Returns other values of each object and frame (B, N, T, ...), such as standard deviations, renamed alike."""
        return renamed(x, self.labels)


def renamed(x: Tensor, labels: Tensor) -> Tensor:
    """Returns x (B, N, T, ...) with the values of object ``labels[b, n, t]`` of frame t as those of object n."""
    index = labels.reshape(*labels.shape, *(1,) * (x.dim() - 3)).expand_as(x)
    return x.gather(1, index)


class _Moves:
    """All exchanges of tracks a (B, N, T, 2), and the change of sum_n log p(a^n) that each makes."""

    cost, least = SHORTEST_FIRST, LEAST_GAIN

    def __init__(self, dynamics: Dynamics, n_objects: Tensor, N: int, T: int, windows: bool, slack: float) -> None:
        self.n_objects, self.N, self.T, self.windows = n_objects, N, T, windows
        make = partial(_precisions, dynamics, T, slack)
        self.mean, self.P, self.log_weight = make() if slack else once("precisions", make, dynamics, T)
        self.device = self.P.device
        self.i, self.j = pairs_of(N, self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """The number of frames of each move (T, T)."""
        t = torch.arange(self.T, device=self.device)
        return t + 1 - t[:, None]

    @cached_property
    def allowed(self) -> Tensor:
        """Which moves there are (B, pairs, T, T)."""
        allowed = (self.lengths > 0) & (self.lengths < self.T)  # exchanging all frames changes nothing
        if not self.windows:
            allowed = allowed & (torch.arange(self.T, device=self.device) == self.T - 1)
        present = object_mask(self.n_objects, self.N)
        return allowed & (present[:, self.i] & present[:, self.j])[..., None, None]

    def gains(self, a: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns gains (b, pairs, T, T), at [..., s, e] of exchanging frames s to e, inclusive; -inf for no move.

        ``a`` (b, N, T, 2) are the tracks of the sequences ``rows``, by default all.
        """
        K, T = len(self.mean), self.T
        a = a.to(self.P.dtype)
        e = a.flatten(2).unsqueeze(2) - self.mean  # (B, N, K, 2 T)
        Pe = torch.einsum("kxy,bnky->bnkx", self.P, e)
        distance = (e * Pe).sum(-1)  # (B, N, K)
        d = a[:, self.j] - a[:, self.i]  # (B, pairs, T, 2)
        both = torch.einsum("bqti,ktiuj,bquj->bqktu", d, self.P.view(K, T, 2, T, 2), d)
        both = F.pad(both.cumsum(-1).cumsum(-2), (1, 0, 1, 0))  # [..., s, e] sums over t < s, t' < e
        corner = both.diagonal(dim1=-2, dim2=-1)
        window = corner[..., None, 1:] + corner[..., :-1, None] - both[..., :-1, 1:] - both.mT[..., :-1, 1:]
        changed = []
        for n, sign in ((self.i, 1.0), (self.j, -1.0)):
            one = F.pad(torch.einsum("bqkti,bqti->bqkt", Pe[:, n].unflatten(-1, (T, 2)), d).cumsum(-1), (1, 0))
            along = one[..., None, 1:] - one[..., :-1, None]  # (B, pairs, K, T, T)
            changed.append(self._log_p(distance[:, n][..., None, None] + 2 * sign * along + window, -3))
        now = self._log_p(distance, -1)
        gain = changed[0] + changed[1] - (now[:, self.i] + now[:, self.j])[..., None, None]
        return torch.where(self.allowed[rows], gain, -torch.inf)

    def _log_p(self, distance: Tensor, dim: int) -> Tensor:
        """Returns log p of tracks, up to a constant, from e' P_k e."""
        weight = self.log_weight.reshape(-1, *(1,) * (-dim - 1))
        return (weight - 0.5 * distance).logsumexp(dim)

    def apply(self, labels: Tensor, move: Tensor, where: Tensor) -> Tensor:
        """Returns labels (B, N, T) after each ``move`` (B,), an index into flattened gains, ``where`` (B,) is True."""
        T = self.T
        pair, window = move // (T * T), move % (T * T)
        t = torch.arange(T, device=move.device)
        inside = (t >= (window // T)[:, None]) & (t <= (window % T)[:, None]) & where[:, None]  # (B, T)
        return exchanged(labels, self.i[pair], self.j[pair], inside)


def _precisions(dynamics: Dynamics, T: int, slack: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean (K, 2 T) and precision matrix (K, 2 T, 2 T) of p(a | z = k), and log p(z = k, a) where a is the mean
    (K,), up to a constant."""
    lgssm = dynamics.lgssm()
    lgssm = lgssm._replace(Sigma_A=lgssm.Sigma_A + slack * torch.eye(2, device=lgssm.Sigma_A.device))
    mean, C = marginal_moments(lgssm, T)
    L = torch.linalg.cholesky_ex(C).L
    log_pi = dynamics.log_pi.to(C.dtype).log_softmax(-1)
    return mean, cholesky_inverse(L), log_pi - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def own_names(a: Tensor) -> Tensor:
    """Returns labels (B, N, T) under which every object of tracks (B, N, T, 2) keeps its name."""
    B, N, T = a.shape[:3]
    return torch.arange(N, device=a.device).view(1, N, 1).repeat(B, 1, T)


def exchanged(labels: Tensor, i: Tensor, j: Tensor, where: Tensor) -> Tensor:
    """Returns labels (B, N, T) with objects i and j (B,) exchanged in the frames ``where`` (B, T) is True."""
    rows = torch.arange(len(labels), device=labels.device)
    x, y = labels[rows, i], labels[rows, j]
    labels = labels.clone()
    labels[rows, i], labels[rows, j] = torch.where(where, y, x), torch.where(where, x, y)
    return labels


@lru_cache
def pairs_of(N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the first and second object of each pair; cached, so that recorded steps copy nothing to the device."""
    i, j = torch.tensor(list(itertools.combinations(range(N), 2)), device=device).reshape(-1, 2).unbind(1)
    return i, j


@torch.no_grad()
def untangle(
    dynamics: Dynamics,
    a: Tensor,
    n_objects: Tensor | int | Sequence[int],
    *,
    windows: bool = True,
    slack: float = 0.0,
    most: int = MOST_EXCHANGES,
) -> Untangled:
    """Returns tracks with objects renamed so that log p(a) grows: the best exchange is made until none gains.

    The result is a local optimum, not the best of all labellings. Only the tracks and the dynamics are used.

    Args:
        dynamics: the dynamics of the model.
        a: (B, N, T, 2), in latent units, such as `infer(...).mean`; absent objects are last.
        n_objects: (B,), a list, or one number for all sequences.
        windows: False exchanges only tails.
        slack: added to the diagonal of Sigma_A when moves are scored, for tracks that are noisier than the model's.
        most: the largest number of exchanges per sequence.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    n_objects, B, N, T = checked_tracks(a, n_objects)
    labels, gain = own_names(a), torch.zeros(B, dtype=kalman.exact_dtype(a.device), device=a.device)
    if N > 1 and T > 1:
        moves = _Moves(dynamics, n_objects, N, T, windows, slack)
        fastest = choose(a, exchange, _fused, largest_difference) if T <= MOST_FRAMES_FUSED else exchange
        labels, gain = fastest(moves, a.nan_to_num(), labels, most)
    return Untangled(renamed(a, labels), labels, gain)


def exchange(moves: _Moves, a: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Returns labels after up to ``most`` exchanges of tracks a (B, N, T, 2) in each sequence, and their gains (B,)."""
    gain, rows = moves.P.new_zeros(len(a)), torch.arange(len(a), device=a.device)
    for _ in range(most):
        gains = moves.gains(renamed(a[rows], labels[rows]), rows)
        move = (gains - SHORTEST_FIRST * moves.lengths).flatten(1).argmax(1)
        best = gains.flatten(1).gather(1, move[:, None]).squeeze(1)
        better = best > LEAST_GAIN
        if a.device.type == "cpu":  # elsewhere nothing waits for the results, so that the loop can be recorded
            rows, move, best, better = (x[better] for x in (rows, move, best, better))
            if not len(rows):
                break
        labels[rows] = moves.apply(labels[rows], move, better)
        gain[rows] += torch.where(better, best, 0.0)
    return labels, gain


def _fused() -> Any:
    from pyro_pixels.guides import fused_exchanges  # imports Triton

    return fused_exchanges.exchange


@torch.no_grad()
def largest_difference(plain: Any, function: Any, device: torch.device) -> float:
    """Returns the largest difference of labels and gains, of order 1e4 in float64, between two `exchange`."""
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    differences = []
    for N, T, windows in ((2, 5, True), (3, 31, True), (4, 33, False)):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            dynamics = Dynamics(DynamicsConfig(delta=0.2, state_noise=1e-4, position_noise=1e-2)).float()
        dynamics.mu.copy_(normal(generator, 2, 4))
        dynamics.log_pi.copy_(normal(generator, 2))
        dynamics.to(device)
        start, velocity, noise = (normal(generator, 6, N, n, 2) for n in (1, 1, T))
        a = start + velocity * torch.linspace(-1, 1, T, device="cpu").view(T, 1) + 0.05 * noise
        a = a * torch.logspace(0, -5, 6, device="cpu").view(6, 1, 1, 1)  # so that gains have all sizes
        t, first = torch.arange(T, device="cpu"), torch.zeros(6, dtype=torch.int64, device="cpu")
        swapped = ((t >= 1) & (t < T // 2)) ^ (t >= T // 3)
        labels = exchanged(own_names(a), first, first + 1, swapped.expand(6, T))
        a, n_objects = renamed(a, labels).to(device), torch.tensor([1, N, N, 2, N, N], device=device)
        moves = _Moves(dynamics, n_objects, N, T, windows, 0.0)
        (wanted, gain), (found, gain_found) = (each(moves, a, own_names(a), 5) for each in (plain, function))
        differences += [(wanted != found).double().mean(), 1e4 * ((gain_found - gain) / (1 + gain.abs())).abs().max()]
    return float(torch.stack(differences).max())  # NaN if any is


@torch.no_grad()
def resample_labels(
    model: ImageModel,
    a: Tensor,
    n_objects: Tensor | int | Sequence[int],
    images: Tensor | None = None,
    *,
    n_moves: int = 20,
    windows: bool = True,
    seed: int = 0,
) -> Untangled:
    """Returns draws with objects renamed by Metropolis-Hastings moves that leave p(a | v) invariant.

    A move is proposed with probability proportional to r / (1 + r), r the factor by which it changes p(a), among all
    windows of all pairs, and accepted with probability min(1, p(v | a') Z(a) / (p(v | a) Z(a'))), Z the sum of these
    weights. Renaming changes p(v | a) only as far as the order matters in which the renderer draws.

    Args:
        model: gives the dynamics and, if there are images, the renderer and the likelihood.
        a: (B, N, T, 2), such as one draw of q(a | v) for each sequence; absent objects are last.
        n_objects: (B,), a list, or one number for all sequences.
        images: (B, T, H, W) in [0, 1] or uint8, NaN in unobserved frames; with None the target is p(a).
        n_moves: proposals per sequence.
        windows: False exchanges only tails.
        seed: seeds the moves; the caller's random state is not changed.

    Returns:
        `Untangled`; its ``gain``, in log p(a), may be negative.

    Raises:
        ValueError: if the shapes do not fit each other, or pixels are outside [0, 1].
    """
    n_objects, B, N, T = checked_tracks(a, n_objects)
    images = None if images is None else images_of_tracks(model, images, n_objects, T)
    labels = own_names(a)
    gain = torch.zeros(B, dtype=kalman.exact_dtype(a.device), device=a.device)
    several = n_objects > 1
    if N < 2 or T < 2:
        return Untangled(a, labels, gain)
    moves, generator = _Moves(model.dynamics, n_objects, N, T, windows, 0.0), torch.Generator().manual_seed(seed)
    present = object_mask(n_objects, N)

    def log_p_v(labels: Tensor) -> Tensor:
        if images is None:
            return gain.new_zeros(B)
        logits = model.renderer(renamed(a, labels), present)
        p_v, seen = without_unseen(model.likelihood(logits), images)
        return p_v.log_prob(seen.to(logits.dtype)).to(gain.dtype)

    rows = torch.arange(B, device=a.device)
    log_r = moves.gains(renamed(a, labels)).flatten(1)
    seen = log_p_v(labels)
    for _ in range(n_moves):
        log_weights = F.logsigmoid(log_r)  # of r / (1 + r); -inf where there is no move
        chances = torch.where(several[:, None], log_weights - log_weights.amax(1, keepdim=True), 0.0).exp().cpu()
        move = torch.multinomial(chances, 1, generator=generator).squeeze(1).to(a.device)
        proposed = moves.apply(labels, move, several)
        log_r_then = moves.gains(renamed(a, proposed)).flatten(1)
        seen_then = log_p_v(proposed)
        log_Z, log_Z_then = log_weights.logsumexp(1), F.logsigmoid(log_r_then).logsumexp(1)
        log_accept = seen_then - seen + log_Z - log_Z_then
        drawn = torch.rand(B, generator=generator, dtype=log_accept.dtype).to(a.device)
        accepted = several & (drawn.log() < log_accept)
        labels = torch.where(accepted[:, None, None], proposed, labels)
        gain = torch.where(accepted, gain + log_r[rows, move], gain)
        log_r, seen = torch.where(accepted[:, None], log_r_then, log_r), torch.where(accepted, seen_then, seen)
    return Untangled(renamed(a, labels), labels, gain)


def checked_tracks(a: Tensor, n_objects: Tensor | int | Sequence[int]) -> tuple[Tensor, int, int, int]:
    """Returns n_objects (B,), B, N, T of tracks, or raises a ValueError if their shape does not fit ``n_objects``."""
    n_objects = counts(n_objects, len(a) if a.dim() else None, a)
    if a.dim() != 4 or a.shape[-1] != 2 or n_objects.shape != a.shape[:1]:
        raise ValueError(
            f"tracks have shape {tuple(a.shape)} and n_objects {tuple(n_objects.shape)}; wanted (B, N, T, 2) and (B,)"
        )
    if len(n_objects) and most_objects(n_objects) > a.shape[1]:
        raise ValueError(f"n_objects contains {most_objects(n_objects)}, but the tracks have only {a.shape[1]} objects")
    return n_objects, a.shape[0], a.shape[1], a.shape[2]


def images_of_tracks(model: ImageModel, images: Any, n_objects: Tensor, n_frames: int) -> Tensor:
    """Returns the images (B, T, H, W) of tracks with ``n_objects`` (B,), as a tensor.

    Raises:
        ValueError: if there are other numbers of sequences or frames, or as in `check_pixels`.
    """
    images, _ = as_batch(images, n_objects)
    if images.dim() != 4 or images.shape[:2] != (len(n_objects), n_frames):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; wanted (B, T, H, W) with B, T = {len(n_objects)}, {n_frames}"
        )
    check_pixels(model.likelihood, images)
    return images
