"""Mean-field inference without a network: Pyro's `AutoNormal` on the site ``a`` of a few sequences.

An amortised guide uses the same weights for every sequence. `fit_mean_field` instead gives each a_t^n of a few
sequences its own mean and standard deviation and maximises Eq (7) over these alone, with the model held fixed. Compared
with a guide of the same family, prod_{n,t} N(a_t^n; mu, sigma^2), its gain in the ELBO is the amortisation gap. A
`StructuredGuide`, whose q is correlated in time, can have a higher ELBO.

`AutoNormal` is wrapped in a `Guide` because it has two problems here. It ignores masks, so that an absent object adds
its entropy, which is unbounded: use sequences with one N only. And under `pyro.infer.SVI` it keeps its parameters in
Pyro's global parameter store, where a second guide would find them under the same names.
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
    """The mean-field guide q(a) = prod_{n,t} N(a_t^n; mu_t^n, sigma_t^n^2) of given sequences, as an `AutoNormal`.

    Args:
        model: the model whose site ``a`` the guide approximates.
        images: (B, T, H, W); the guide is defined for these sequences only.
        n_objects: (B,).
        start: a guide that provides the starting values of the means; standard deviations start at its median.
    """

    images: Tensor
    n_objects: Tensor

    def __init__(self, model: PixelModel, images: Tensor, n_objects: Tensor, start: Guide) -> None:
        super().__init__()
        found = infer(start, images, n_objects, model=model)
        present = object_mask(n_objects, found.std.shape[1])
        mean, sigma = found.mean.to(start.dtype), float(found.std[present].median())
        with pyro.settings.context(module_local_params=True), torch.random.fork_rng(devices=[]):
            self.auto = AutoNormal(model, init_loc_fn=init_to_value(values={"a": mean}), init_scale=sigma)
            self.auto(images, n_objects)  # the first call creates the parameters
        self.register_buffer("images", self.see(images), persistent=False)  # as `encode` receives them
        self.register_buffer("n_objects", n_objects, persistent=False)

    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """Returns the fitted distribution.

        Raises:
            ValueError: if these are not the sequences that the guide was made for.
        """
        if not (torch.equal(images, self.images) and torch.equal(n_objects, self.n_objects)):
            raise ValueError(
                f"this guide holds the positions in {len(self.images)} sequences of {self.images.shape[1]} frames, but "
                "got others; use those, all in one batch, or fit a guide to these with fit_mean_field"
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
    """Maximises the ELBO of each sequence over its own means and standard deviations with Adam.

    Args:
        model: the model, which is not changed.
        data: a few sequences; every step uses all of them.
        start: a guide for the starting values. Without one the objects would not be found, because the gradient of a
            pixel reaches no further than the width of a blob.
        steps: the number of steps.
        learning_rate: the first step size; it falls linearly to a twentieth.
        seed: seeds the samples; the caller's random state is not changed.
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
