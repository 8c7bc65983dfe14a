"""The inference network (Eq 8), recurrent over time and over objects."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_pixels._batch import check_batch, most_objects
from pyro_pixels.guides.recurrence import recur


class StateNetwork(nn.Module):
    """The base class of networks that map images and numbers of objects to states s (B, N, T, D) for a head."""

    height: int
    width: int
    state_size: int
    """D, the length of a state."""


class InferenceRNN(StateNetwork):
    """The states s_t^n of Eq (8), recurrent over t and over n.

    The products of W with the images are shared by all objects and computed for all t at once; `recur` does the rest.

    Args:
        height: H of the images.
        width: W of the images.
        state_size: D.
        max_objects: s_0^n is learned separately for every N up to this number (footnote 2). Sequences with more objects
            start from the s_0 of ``max_objects``, and additional objects from that of the last object.
        front_end: maps images (B, T, H, W) to features (B, T, P) that replace v in Eq (8); by default the pixels.
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
        """Returns the states s (B, N, T, D).

        Raises:
            ValueError: if the images have another size.
        """
        check_batch(images, n_objects, (self.height, self.width))
        return self.advance(self.start(n_objects), images)

    def start(self, n_objects: Tensor) -> Tensor:
        """Returns s_0 (B, N, D), the states before the first frame."""
        last = self.max_objects - 1
        n = torch.arange(most_objects(n_objects), device=n_objects.device).clamp(max=last)
        return self.phi_s0[(n_objects - 1).clamp(max=last)[:, None], n].tanh()

    def advance(self, s: Tensor, images: Tensor) -> Tensor:
        """Returns the states (B, N, T, D) in T more frames (B, T, H, W) from the states ``s`` (B, N, D) before them."""
        from_image = F.linear(self.front_end(images), self.from_image.weight, self.from_states.bias)  # (B, T, 2 D)
        return recur(from_image.transpose(0, 1), s.transpose(0, 1), self.from_states.weight).permute(2, 0, 1, 3)
