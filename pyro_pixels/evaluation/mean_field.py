"""Inference without a network: Pyro's `AutoNormal` on the site ``a`` of a few sequences, as a yardstick.

A guide answers for every sequence with the same weights. `fit_mean_field` instead gives each a_t^n of some sequences a
mean and a standard deviation of its own and maximises Eq (7) over these alone, the model as it is. For guides of
the same family, prod_{n,t} N(a_t^n; mu, sigma^2), what it gains in the bound is what amortisation costs. A
`StructuredGuide`, whose q is correlated in time, can be ahead of it.

`AutoNormal` on its own has two faults here, which is why it is wrapped in a `Guide`. It knows nothing of masks, so that
an absent object counts with its entropy, which has no upper limit: give it sequences of one N only. And called under
`pyro.infer.SVI` it keeps its parameters in Pyro's global store, where the next one finds them under the same names.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

from pyro_pixels._batch import object_mask
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.base import Guide
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.queries.predict import infer


class MeanFieldGuide(Guide):
    """q(a) = prod_{n,t} N(a_t^n; mu_t^n, sigma_t^n^2) of some given sequences, its parameters those of an `AutoNormal`.

    Args:
        model: whose site ``a`` it stands for.
        images: (B, T, H, W); n_objects: (B,). The guide knows these sequences and no others.
        start: where the means begin; the standard deviations begin at the median of its own.
    """

    images: Tensor
    n_objects: Tensor

    def __init__(self, model: PixelModel, images: Tensor, n_objects: Tensor, start: Guide) -> None:
        super().__init__()
        found = infer(start, images, n_objects)
        present = object_mask(n_objects, found.std.shape[1])
        mean, sigma = found.mean.to(start.dtype), float(found.std[present].median())
        with pyro.settings.context(module_local_params=True), torch.random.fork_rng(devices=[]):
            self.auto = AutoNormal(model, init_loc_fn=init_to_value(values={"a": mean}), init_scale=sigma)
            self.auto(images, n_objects)  # its first call makes the parameters
        self.register_buffer("images", images.to(start.dtype), persistent=False)
        self.register_buffer("n_objects", n_objects, persistent=False)

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """The fitted distribution.

        Raises:
            ValueError: if these are not the sequences that it was made for.
        """
        if not (torch.equal(images, self.images) and torch.equal(n_objects, self.n_objects)):
            raise ValueError(
                f"this guide holds the positions in {len(self.images)} sequences of {self.images.shape[1]} frames, and "
                "got others; ask for those, whole and in one batch, or fit one to these with fit_mean_field"
            )
        return dist.Normal(self.auto.locs.a, self.auto.scales.a).to_event(2)


def fit_mean_field(
    model: PixelModel,
    data: ImageSequences,
    start: Guide,
    *,
    steps: int = 500,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> MeanFieldGuide:
    """The Normals that bring the bound of each of ``data`` highest, by ``steps`` of Adam on all of them at once.

    Args:
        model: stays as it is.
        data: a few sequences; all are worked on at every step.
        start: a guide to begin from. From elsewhere the objects would not be found: the gradient of a pixel reaches no
            further than a blob is wide.
        learning_rate: at first; it falls linearly to a twentieth.
        seed: of the samples; the caller's random state is left as it was.
    """
    device = next(model.parameters()).device
    images, n_objects = data.images.to(device), data.n_objects.to(device)
    guide = MeanFieldGuide(model, images, n_objects, start)
    loss, parameters = Trace_ELBO()(model, guide), list(guide.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(images, n_objects).backward(inputs=parameters)
            optimizer.step()
            decay.step()
    return guide
