"""The base class of amortised guides q(a | v) (Sec 2.2.1).

A guide is a `Guide` with one method, `encode`, which maps images to a distribution over the positions of every object.
The base class turns it into a Pyro guide: it owns the plate, the mask of absent objects and the site ``a``.

`RecurrentGuide` is the paper's guide: a network with states s_t^n, recurrent over time and over objects
(`InferenceRNN`), and a *head* that maps s_t^n to the mean and scale of a_t^n. `LinearHead` is Eq (9). `AttentionHead`
departs from the paper: its mean is the centroid of the white pixels that s_t^n claims, so that positions are a linear
function of the object's place in the image from the start (docs/decisions.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_pixels._batch import check_batch, counts, most_objects, object_mask, require_images
from pyro_pixels._pyro import announce_parameters, check_encoded, check_precision_of, of_objects
from pyro_pixels.guides.pixel_evidence import FilmStatistics, PixelEvidence


class Guide(nn.Module, ABC):
    """The base class of guides q(a | v); a subclass only has to implement `encode`.

    `encode` receives the images as `see` returns them: unchanged, or, after `fit` (or `look_at`) has found noise, a
    background or clutter in the film, as the weights of `PixelEvidence`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pixel_evidence = PixelEvidence()

    @abstractmethod
    def encode(self, images: Tensor, n_objects: Tensor) -> dist.TorchDistribution:
        """Returns q(a | v): batch shape (B, N) with N the largest of ``n_objects``, event shape (T, 2).

        Args:
            images: (B, T, H, W) float in [0, 1]; any T >= 1.
            n_objects: (B,) int; the distribution of absent objects is ignored.
        """

    def encode_observed(
        self, images: Tensor, n_objects: Tensor, observed: Tensor
    ) -> tuple[dist.TorchDistribution, dist.Categorical] | None:
        """Returns q(a, z | observed frames) over all T frames if the guide contains the dynamics, else None.

        If it returns None, the queries follow Secs 3.4-3.5 and treat the means of `encode` as observations of the
        model's dynamics. For guides that contain the dynamics, this would count the dynamics twice.

        Args:
            images: (B, T, H, W); unobserved frames are generated ones and carry no information on the positions.
            n_objects: (B,).
            observed: bool, broadcastable to (B, N, T), such as (T,) or (B, 1, T); False where a frame is to be ignored
                for an object. An image counts as observed if any object of its sequence is observed in it.

        Returns:
            The distribution over a, with batch shape (B, N), event shape (T, 2) and a ``frame_covariance``
            (B, N, T, 2, 2), and p(z) with batch shape (B, N).
        """
        return None

    def q(self, images: Tensor, n_objects: Tensor | int | Sequence[int]) -> dist.TorchDistribution:
        """Returns `encode` of images of any type, and checks shapes and pixels.

        Args:
            images: (B, T, H, W) in [0, 1]; frames of NaN are unobserved.
            n_objects: (B,), or one number for all sequences.

        Raises:
            ValueError: if the arguments do not fit together, pixels are outside [0, 1], or `encode` returns no
                distribution of these shapes.
        """
        require_images(images)
        n_objects = counts(n_objects, len(images), images)
        check_batch(images, n_objects, values=True)
        q_a = self.encode(self.see(images), n_objects)
        batch, event = (len(images), most_objects(n_objects)), (images.shape[1], 2)
        check_encoded(f"{type(self).__name__}.encode", q_a, batch, event)
        return q_a

    def q_observed(self, images: Tensor, n_objects: Tensor, observed: Tensor) -> dist.TorchDistribution:
        """Returns `q` for a query in which some frames are not ``observed``, bool, (T,) or (B, N or 1, T).

        Unobserved ``images`` are generated ones, which recurrent networks need as input; positions inferred in them
        are not used.
        """
        return self.q(images, n_objects)

    def look_at(self, images: Tensor, n_objects: Tensor) -> FilmStatistics:
        """Estimates noise, background and clutter of a film (n, T, H, W) for `see` to remove; `fit` calls it."""
        return self.pixel_evidence.estimate(images, n_objects)

    def see(self, images: Tensor) -> Tensor:
        """Returns the input of `encode` for images of any type: floats in [0, 1], black where frames are NaN (unseen).

        Raises:
            ValueError: in half precision, or under autocast.
        """
        check_precision_of("guide", self)
        if images.is_floating_point():
            images = images.nan_to_num()
        return self.pixel_evidence(images.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the guide's parameters."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def forward(self, images: Tensor, n_objects: Tensor | int | Sequence[int], n_frames: int | None = None) -> Tensor:
        """Runs the Pyro guide, which samples the site ``a`` (B, N, T, 2); the arguments are those of the model."""
        announce_parameters("guide", self)
        return sample_positions(self.q(images, n_objects), counts(n_objects, len(images), images))


def sample_positions(q_a: dist.TorchDistribution, n_objects: Tensor) -> Tensor:
    """Samples the site ``a`` (B, N, T, 2) in a plate of B sequences; absent objects are masked."""
    with pyro.plate("sequences", len(n_objects), dim=-1):
        return pyro.sample("a", of_objects(q_a, object_mask(n_objects, q_a.batch_shape[1])))
