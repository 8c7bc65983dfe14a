"""Other networks for the guides that read states s_t^n: what sees a frame, and which way time runs.

The recursion is Eq (8)'s in both. `ConvolutionalFrontEnd` gives it feature maps to read instead of pixels, so that
an object looks alike wherever it is. `BidirectionalRNN` runs it forward and backward in time, so that s_t^n knows the
whole sequence and not frames 1..t alone: q(a_t | v_{1:T}), as the posterior is. Any head reads either.

Departures from the paper: both.
"""

import torch
from torch import Tensor, nn

from pyro_pixels.guides.inference_rnn import InferenceRNN, StateNetwork


class ConvolutionalFrontEnd(nn.Module):
    """Two convolutions, each of stride 2 and rectified: images (B, T, H, W) to features (B, T, F).

    Args:
        channels: feature maps after the first and the second convolution; F = channels[1] x H/4 x W/4, rounded up.
    """

    def __init__(self, channels: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        first, second = channels
        self.layers = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        frames = self.layers(images.flatten(0, 1).unsqueeze(1))  # (B T, channels, H / 4, W / 4)
        return frames.flatten(1).unflatten(0, images.shape[:2])


class BidirectionalRNN(StateNetwork):
    """The states of two recursions side by side: D is the sum of theirs.

    Under a `StructuredGuide` its queries would not be answered from the seen frames alone, since the states of a seen
    frame depend on what stands in the place of the unseen ones behind it; give that guide an `InferenceRNN`.

    Args:
        forward_rnn: sees frames 1, ..., T.
        backward_rnn: sees frames T, ..., 1; its state at frame t knows of frames t..T.

    Raises:
        ValueError: if the two are for images of different sizes.
    """

    def __init__(self, forward_rnn: InferenceRNN, backward_rnn: InferenceRNN) -> None:
        super().__init__()
        self.height, self.width = forward_rnn.height, forward_rnn.width
        if (backward_rnn.height, backward_rnn.width) != (self.height, self.width):
            raise ValueError(
                f"the networks are for images of {self.height} x {self.width} and {backward_rnn.height} x "
                f"{backward_rnn.width} pixels; make both for the same size"
            )
        self.state_size = forward_rnn.state_size + backward_rnn.state_size
        self.forward_rnn, self.backward_rnn = forward_rnn, backward_rnn

    def forward(self, images: Tensor, n_objects: Tensor) -> Tensor:
        """States s (B, N, T, D). Errors as `InferenceRNN`'s."""
        backward = self.backward_rnn(images.flip(1), n_objects).flip(2)
        return torch.cat([self.forward_rnn(images, n_objects), backward], -1)
