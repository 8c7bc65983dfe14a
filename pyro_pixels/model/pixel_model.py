"""The generative model as a Pyro program (Sec 2.1, Fig 2b).

`PixelModel` is the model that is trained. Its sites are ``a`` (B, N, T, 2) and ``v`` (B, T, H, W); the states h and the
components z are integrated out exactly. `PixelModel.joint` is the same model with the sites ``z`` (B, N) and ``h``
(B, N, T, 4) as well. There is one plate, ``sequences``, and one site per symbol; absent objects are masked.

Departures from the paper: none.
"""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_pixels._batch import check_batch, check_objects, counts, most_objects, object_mask
from pyro_pixels._pyro import ExactDensity, announce_parameters, check_pixels, fill_absent, of_objects, without_unseen
from pyro_pixels.lgssm.distributions import StatePath
from pyro_pixels.lgssm.dynamics import Dynamics, select_component
from pyro_pixels.model.likelihoods import BernoulliPixels, PixelLikelihood
from pyro_pixels.model.order import in_order
from pyro_pixels.model.renderer import Renderer


class PixelModel(nn.Module):
    """The generative model p(v, a) = p(v | a) prod_n p(a^n), Eqs (1)-(5) with h and z integrated out.

    Args:
        dynamics: the dynamics, shared by all objects.
        renderer: maps the positions of all objects to pixel logits.
        likelihood: the distribution of pixels given logits; by default the Bernoulli of Eq (2).
    """

    def __init__(self, dynamics: Dynamics, renderer: Renderer, likelihood: PixelLikelihood | None = None) -> None:
        super().__init__()
        self.dynamics, self.renderer = dynamics, renderer
        self.likelihood = BernoulliPixels() if likelihood is None else likelihood

    def forward(
        self, images: Tensor | None, n_objects: Tensor | int | Sequence[int], n_frames: int | None = None
    ) -> Tensor:
        """The Pyro program. Returns v (B, T, H, W).

        Args:
            images: (B, T, H, W), the observed v within [0, 1], or None to sample it. Frames of NaN are unobserved and
                ignored.
            n_objects: (B,) int, the number of objects N of each sequence; may be a list, or one number for all.
            n_frames: T; required if ``images`` is None.

        Raises:
            ValueError: if shapes do not fit each other or the renderer, pixels lie outside [0, 1], or a site is
                conditioned on a value of the wrong shape; also in half precision and under ``torch.jit``.
        """
        announce_parameters("model", self)
        n_objects = counts(n_objects, None if images is None else len(images), next(self.parameters(), None))
        B, N, T = self._sizes(images, n_objects, n_frames)
        present = object_mask(n_objects, N)
        p_a = self.dynamics.positions(T).expand(torch.Size([B, N]))
        with pyro.plate("sequences", B, dim=-1):
            a = pyro.sample("a", of_objects(p_a, present))
            return self._draw(_of_shape("a", a, (B, N, T, 2)), present, images)

    def joint(
        self, images: Tensor | None, n_objects: Tensor | int | Sequence[int], n_frames: int | None = None
    ) -> Tensor:
        """Runs the same model with h and z as sites (Eq 5): z, h, a, v. The arguments are those of `forward`."""
        announce_parameters("model", self)
        n_objects = counts(n_objects, None if images is None else len(images), next(self.parameters(), None))
        B, N, T = self._sizes(images, n_objects, n_frames)
        present = object_mask(n_objects, N)
        lgssm = self.dynamics.lgssm()
        with pyro.plate("sequences", B, dim=-1):
            p_z = dist.Categorical(logits=self.dynamics.log_pi.to(lgssm.mu.dtype)).expand(torch.Size([B, N]))
            z = _of_shape("z", pyro.sample("z", p_z.mask(present).to_event(1)), (B, N))  # type: ignore[attr-defined]
            h = pyro.sample("h", of_objects(StatePath(select_component(lgssm, z), T), present))
            h = fill_absent(_of_shape("h", h, (B, N, T, h.shape[-1])), present).to(lgssm.B.dtype)
            p_a = dist.MultivariateNormal(h @ lgssm.B.mT, lgssm.Sigma_A, validate_args=False).to_event(1)
            a = pyro.sample("a", of_objects(p_a, present))
            return self._draw(_of_shape("a", a, (B, N, T, 2)), present, images)

    def _draw(self, a: Tensor, present: Tensor, images: Tensor | None) -> Tensor:
        """Samples or observes v given positions."""
        logits = self.renderer(*in_order(a, present))
        p_v, obs = self.likelihood(logits), None
        if images is not None:
            p_v, obs = without_unseen(p_v, images)
            obs = obs.to(logits.dtype)
        v = pyro.sample("v", ExactDensity(p_v), obs=obs)
        return _of_shape("v", v, tuple(logits.shape[-4:]))

    def _sizes(self, images: Tensor | None, n_objects: Tensor, n_frames: int | None) -> tuple[int, int, int]:
        """Checks the arguments and returns B, N, T."""
        if images is None:
            check_objects(n_objects)
        else:
            check_batch(images, n_objects, (self.renderer.height, self.renderer.width))
            check_pixels(self.likelihood, images)
            n_frames = images.shape[1] if n_frames is None else n_frames
            if n_frames != images.shape[1]:
                raise ValueError(f"n_frames is {n_frames} but the images have {images.shape[1]}; leave n_frames out")
        if n_frames is None or n_frames < 1:
            raise ValueError(f"n_frames is {n_frames}; without images give the number of frames to sample, at least 1")
        return len(n_objects), most_objects(n_objects), n_frames


def _of_shape(site: str, value: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Returns the value of a site; refuses one, set by `poutine.condition` or `do`, that would only broadcast."""
    if value.shape[-len(wanted) :] != torch.Size(wanted):
        raise ValueError(
            f"site '{site}' was given a value of shape {tuple(value.shape)}; wanted {wanted}, with samples in front"
        )
    return value
