"""Alternative networks for the states s_t^n: a convolutional front end, and a bidirectional recursion.

Both use the recursion of Eq (8). `ConvolutionalFrontEnd` replaces the pixels by feature maps, so that an object looks
the same wherever it is. `BidirectionalRNN` runs forward and backward in time, so that s_t^n depends on the whole
sequence instead of on frames 1..t alone: q(a_t | v_{1:T}), like the posterior. Both work with any head.

Departures from the paper: both networks.
"""

import torch
from torch import Tensor, nn

from pyro_pixels.guides.inference_rnn import InferenceRNN, StateNetwork


class ConvolutionalFrontEnd(nn.Module):
    """Two convolutions with stride 2 and ReLUs that map images (B, T, H, W) to features (B, T, F).

    Args:
        channels: the numbers of feature maps after the first and the second convolution; F = channels[1] x H/4 x W/4
            with H/4 and W/4 rounded up.
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
        """Returns the features (B, T, F) of images (B, T, H, W)."""
        frames = self.layers(images.flatten(0, 1).unsqueeze(1))  # (B T, channels, H / 4, W / 4)
        return frames.flatten(1).unflatten(0, images.shape[:2])


class BidirectionalRNN(StateNetwork):
    """Two recursions in opposite directions with concatenated states; D is the sum of their sizes.

    Do not use it in a `StructuredGuide`: the states of an observed frame depend on all later frames, including images
    that are filled in for unobserved frames, so queries would depend on more than the observed frames.

    Args:
        forward_rnn: runs over frames 1, ..., T.
        backward_rnn: runs over frames T, ..., 1; its state at frame t depends on frames t..T.

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
        """Returns the states s (B, N, T, D); the errors are those of `InferenceRNN`."""
        backward = self.backward_rnn(images.flip(1), n_objects).flip(2)
        return torch.cat([self.forward_rnn(images, n_objects), backward], -1)
