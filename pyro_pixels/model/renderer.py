"""The neural renderer, which maps the positions of all objects to one image (Sec 2.1.1, Eqs 1-2).

Starting from an empty canvas x^0 = tanh(theta_x0), the objects are drawn one after another: each writes its
contribution where its attention mask alpha is open. The last canvas is decoded into pixel logits.

Departures from the paper: none by default; `input_scale` and `background_logit` change the starting values. An absent
object (when N varies within a batch) leaves the canvas exactly as it was.
"""

import torch
from torch import Tensor, nn

from pyro_pixels._init import init_as_paper
from pyro_pixels.model.drawing import fastest


class Renderer(nn.Module):
    """The renderer of Eqs (1)-(2), up to the logits of the Bernoulli.

    Args:
        height: H, in pixels.
        width: W, in pixels.
        state_size: D, the length of the canvas x.
        background_logit: starting value of b^v; 0 in the paper, a grey image. About -4 starts from black.
        input_scale: if given, W^alpha and W^x start from N(0, input_scale^2) and their biases from a uniform
            distribution on +-2/3 input_scale, so that from the start the units of x switch sharply, at places spread
            over the whole canvas, for positions within [-1, 1]. None starts as the paper does, where all units switch
            slowly and at the origin.
    """

    def __init__(
        self, height: int, width: int, state_size: int = 1024, *, background_logit: float = 0.0,
        input_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.height, self.width = height, width
        self.theta_x0 = nn.Parameter(torch.empty(state_size))
        self.to_alpha = nn.Linear(2, state_size)  # W^alpha, b^alpha
        self.to_x = nn.Linear(2, state_size)  # W^x, b^x
        self.to_v = nn.Linear(state_size, height * width)  # W^v, b^v
        nn.init.normal_(self.theta_x0, std=state_size**-0.25)
        for layer in (self.to_alpha, self.to_x, self.to_v):
            init_as_paper(layer)
        if input_scale is not None:
            for layer in (self.to_alpha, self.to_x):
                nn.init.normal_(layer.weight, std=input_scale)
                nn.init.uniform_(layer.bias, -2 / 3 * input_scale, 2 / 3 * input_scale)
        nn.init.constant_(self.to_v.bias, background_logit)

    def forward(self, a: Tensor, present: Tensor) -> Tensor:
        """Renders positions.

        Args:
            a: positions (..., N, T, 2), cast to the type of the weights; those of absent objects may be NaN.
            present: (..., N) bool, False for absent objects; broadcasts against the batch shape of ``a``.

        Returns:
            Logits of the pixels (..., T, H, W).
        """
        a = torch.where(present[..., None, None], a.to(self.theta_x0.dtype), 0.0)  # 0 * NaN would be NaN
        draw = self.draw if type(self).draw is not Renderer.draw else fastest(self, a)
        return self.to_v(draw(a, present)).unflatten(-1, (self.height, self.width))

    def draw(self, a: Tensor, present: Tensor) -> Tensor:
        """Returns the last canvas x (..., T, D) of Eq (1), from positions that are all finite."""
        x = self.theta_x0.tanh()
        for n in range(a.shape[-3]):
            alpha = torch.sigmoid(self.to_alpha(a[..., n, :, :])) * present[..., n, None, None]
            x = torch.lerp(x, torch.tanh(self.to_x(a[..., n, :, :])), alpha)
        return x
