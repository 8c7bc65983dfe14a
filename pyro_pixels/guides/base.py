"""Amortised guides q(a | v): the contract, and the paper's inference network (Sec 2.2.1, Eqs 8-9).

A guide is a `Guide` with one method, `encode`, which maps images to a distribution over the positions of every object.
The base class makes it a Pyro guide: the plate, the mask of absent objects and the site ``a`` are its business.

`RecurrentGuide` is the paper's: a network with states s_t^n, recurrent over time and over objects (`InferenceRNN`),
and a *head* that reads the mean and scale of a_t^n from s_t^n. `LinearHead` is Eq (9). `AttentionHead` departs from
the paper: its mean is the centroid of the white pixels that s_t^n claims, so that positions are a linear function of
the object's place in the image from the start, and learning need not unfold them (docs/decisions.md).
"""

from abc import ABC, abstractmethod

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_pixels._batch import check_batch, most_objects, object_mask
from pyro_pixels._pyro import announce_parameters


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
