"""Amortised guides q(a | v): the contract, and the paper's inference network (Sec 2.2.1, Eqs 8-9).

A guide is a `Guide` with one method, `encode`, which maps images to a distribution over the positions of every object.
The base class makes it a Pyro guide: the plate, the mask of absent objects and the site ``a`` are its business.

`RecurrentGuide` is the paper's: a network with states s_t^n, recurrent over time and over objects (`InferenceRNN`),
and a *head* that reads the mean and scale of a_t^n from s_t^n. `LinearHead` is Eq (9). `AttentionHead` departs from
the paper: its mean is the centroid of the white pixels that s_t^n claims, so that positions are a linear function of
the object's place in the image from the start, and learning need not unfold them (docs/decisions.md).
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_pixels.data import check_batch, most_objects, most_white, object_mask
from pyro_pixels.model import announce_parameters
from pyro_pixels.recurrence import recur
from pyro_pixels.renderer import init_as_paper


class Guide(nn.Module, ABC):
    """q(a | v). Subclasses implement `encode`; everything else in the library needs nothing more."""

    @abstractmethod
    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """The distribution over a: batch shape (B, N), event shape (T, 2), with N = max of ``n_objects``.

        Args:
            images: (B, T, H, W) float in [0, 1]; any T >= 1.
            n_objects: (B,) int. What the distribution says of objects that are not there is ignored.
        """

    def encode_observed(
        self, images: Tensor, n_objects: Tensor, observed: Tensor
    ) -> tuple[dist.TorchDistribution, dist.Categorical] | None:
        """q(a, z | the observed frames) over all T frames from guides that know the dynamics; None from others.

        Without it the queries follow Secs 3.4-3.5: they take `encode`'s means as observations for the model's dynamics,
        which would count the dynamics twice where they are in q already.

        Args:
            images: (B, T, H, W); at frames that are not observed, generated ones, which say nothing of the positions.
            n_objects: (B,).
            observed: bool, broadcastable to (B, N, T), such as (T,) or (B, 1, T); False where nothing is to be learned
                of an object from that frame. An image counts as seen where any object of its sequence is observed.

        Returns:
            The distribution over a, batch (B, N), event (T, 2), with a ``frame_covariance`` (B, N, T, 2, 2), and p(z)
            (B, N).
        """
        return None

    def q(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """What `encode` gives for images of any type, its shape checked.

        Raises:
            ValueError: if the input does not fit together, or the distribution is not over (B, N) tracks (T, 2).
        """
        check_batch(images, n_objects)
        q_a = self.encode(images.to(self.dtype), n_objects)
        batch, event = (len(images), most_objects(n_objects)), (images.shape[1], 2)
        if q_a.batch_shape != batch or q_a.event_shape != event:
            raise ValueError(
                f"{type(self).__name__}.encode gave batch shape {tuple(q_a.batch_shape)} and event shape "
                f"{tuple(q_a.event_shape)}; wanted (B, N) = {batch} and (T, 2) = {event}; "
                "`.to_event(2)` moves the last two dimensions of a distribution into its event"
            )
        return q_a

    @property
    def dtype(self) -> torch.dtype:
        """The type of its parameters."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def forward(self, images: Tensor, n_objects: Tensor, n_frames: int | None = None) -> Tensor:
        """The Pyro guide: samples the site ``a`` (B, N, T, 2). Takes the arguments of the model, as Pyro asks."""
        announce_parameters("guide", self)
        q_a = self.q(images, n_objects)
        with pyro.plate("sequences", len(images), dim=-1):
            return pyro.sample("a", q_a.mask(object_mask(n_objects, q_a.batch_shape[1])).to_event(1))


class StateNetwork(nn.Module):
    """What gives a head its states: called with images and numbers of objects, it returns s (B, N, T, D)."""

    height: int
    width: int
    state_size: int
    """D, for the head."""


class InferenceRNN(StateNetwork):
    """The states s_t^n of Eq (8), recurrent over t and over n.

    The products of W with the images are shared by all objects and done for all t at once; `recur` does the rest.

    Args:
        height, width: of the images.
        state_size: D.
        max_objects: s_0^n is learned separately for every N up to it (footnote 2). Sequences with more objects begin
            with what was learned for ``max_objects``, further objects as the last.
        front_end: maps images (B, T, H, W) to what Eq (8) reads in the place of v, (B, T, P); default the pixels.
    """

    def __init__(
        self, height: int, width: int, state_size: int = 1024, max_objects: int = 3, front_end: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.front_end = nn.Flatten(2) if front_end is None else front_end
        D, P = state_size, self.front_end(torch.zeros(1, 1, height, width)).shape[-1]
        self.height, self.width, self.state_size, self.max_objects = height, width, state_size, max_objects
        # W^beta and W^s, stacked, act on [s_{t-1}^n, s_t^{n-1}, v_t]; split into the states' and the image's columns.
        self.from_states = nn.Linear(2 * D, 2 * D)
        self.from_image = nn.Linear(P, 2 * D, bias=False)
        self.phi_s0 = nn.Parameter(torch.empty(max_objects, max_objects, D))  # [N - 1, n - 1]
        std = (D * (2 * D + P)) ** -0.25  # Sec 3.2: variance 1 / sqrt(number of elements of W^beta, and of W^s)
        nn.init.normal_(self.from_states.weight, std=std)
        nn.init.normal_(self.from_image.weight, std=std)
        nn.init.zeros_(self.from_states.bias)
        nn.init.normal_(self.phi_s0, std=D**-0.25)

    def forward(self, images: Tensor, n_objects: Tensor) -> Tensor:
        """States s (B, N, T, D).

        Raises:
            ValueError: if the images have another size.
        """
        check_batch(images, n_objects, (self.height, self.width))
        return self.advance(self.start(n_objects), images)

    def start(self, n_objects: Tensor) -> Tensor:
        """s_0 (B, N, D), the states before the first frame."""
        last = self.max_objects - 1
        n = torch.arange(most_objects(n_objects), device=n_objects.device).clamp(max=last)
        return self.phi_s0[(n_objects - 1).clamp(max=last)[:, None], n].tanh()

    def advance(self, s: Tensor, images: Tensor) -> Tensor:
        """The states (B, N, T, D) at T more frames (B, T, H, W), from those before them, ``s`` (B, N, D)."""
        from_image = F.linear(self.front_end(images), self.from_image.weight, self.from_states.bias)  # (B, T, 2 D)
        return recur(from_image.transpose(0, 1), s.transpose(0, 1), self.from_states.weight).permute(2, 0, 1, 3)


SIGMA_FLOOR = 1e-4  # latent units


class LinearHead(nn.Module):
    """Eq (9): mu = W s + b, sigma = softplus(W' s + b') + 1e-4.

    The paper does not say how sigma is kept positive. With exp the paper preset is lost within 15 steps: a step of Adam
    moves W' s by about 1e-3 times the sum of all absolute s, and sigma runs to 1e-20 (docs/decisions.md).
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(state_size, 4)
        init_as_paper(self.linear)

    def forward(self, s: Tensor, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, N, T, 2) of a, from s (B, N, T, D)."""
        mu, rho = self.linear(s).chunk(2, -1)
        return mu, F.softplus(rho) + SIGMA_FLOOR


class AttentionHead(nn.Module):
    """The mean is the centroid of the white pixels that object n claims.

    Objects claim pixels in turn, each a share of what the ones before it have left: with c_t^n = sigm(Phi W^omega
    s_t^n), one value a pixel, omega_t^n is proportional to v_t c_t^n prod_{m < n} (1 - c_t^m), and the mean is the
    omega-weighted mean of the pixels' coordinates, each axis in [-1, 1]: latent units are half-widths of the image. Phi
    holds the lowest cosine waves over the image, so that claims vary smoothly from pixel to pixel. At the start
    every claim is one half. The standard deviation is Eq (9)'s.

    Args:
        height, width: of the images.
        state_size: D.
        sigma: starting standard deviation of a, in latent units.
        n_waves: waves along each axis; Phi has n_waves^2 of them.
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
        """Mean and standard deviation (B, N, T, 2) of a, from s (B, N, T, D) and images (B, T, H, W)."""
        white = self.white_pixels(images)
        claim = self.claims(s, white)
        left = F.logsigmoid(-claim).cumsum(1) - F.logsigmoid(-claim)  # log of what the objects before n have left
        omega = (F.logsigmoid(claim) + left + white.v.clamp(min=1e-30).log().unsqueeze(1)).softmax(-1)
        return torch.einsum("bntk,btkc->bntc", omega, white.place), self.to_log_sigma(s).exp()

    def white_pixels(self, images: Tensor) -> "WhitePixels":
        """The white pixels of each frame."""
        v = images.flatten(2)
        v_white, pixel = v.topk(most_white(v))  # (B, T, k): black pixels have no weight anyway
        seen = v_white[..., :1] > 0  # in an empty frame every place is the centre, 0
        return WhitePixels(v_white, self.grid[pixel] * seen.unsqueeze(-1), pixel)

    def claims(self, s: Tensor, white: "WhitePixels") -> Tensor:
        """Phi W^omega s_t^n (B, N, T, k) at each of the white pixels."""
        return torch.einsum("bntw,btkw->bntk", self.to_claim(s), self.Phi[white.index])


class WhitePixels(NamedTuple):
    """The k brightest pixels of each frame, among them all that are not black."""

    v: Tensor  # (B, T, k), their values; 0 where there are fewer
    place: Tensor  # (B, T, k, 2), (column, row), each in [-1, 1]
    index: Tensor  # (B, T, k), counted along the rows of the image

    @property
    def homogeneous(self) -> Tensor:
        """(B, T, k, 3), (column, row, 1)."""
        return F.pad(self.place, (0, 1), value=1.0)

    @property
    def weighed(self) -> Tensor:
        """(B, T, k, 3), v (column, row, 1): their sum holds the moments and the mass of the pixels."""
        return self.v.unsqueeze(-1) * self.homogeneous

    def at(self, frames: Tensor) -> "WhitePixels":
        """Those of some frames."""
        return WhitePixels(*(x[:, frames] for x in self))


class RecurrentGuide(Guide):
    """The paper's guide, Eqs (8)-(9): q(a | v) = prod_{n,t} N(a_t^n; mu(s_t^n), sigma^2(s_t^n)).

    Args:
        rnn: gives s_t^n.
        head: reads mean and standard deviation from s_t^n; default `LinearHead`, the paper's.
    """

    def __init__(self, rnn: StateNetwork, head: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = LinearHead(rnn.state_size) if head is None else head

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        s = self.rnn(images, n_objects)
        mu, sigma = self.head(s, images, n_objects)
        return dist.Normal(mu, sigma, validate_args=False).to_event(2)
