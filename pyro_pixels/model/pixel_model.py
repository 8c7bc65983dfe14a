"""The generative model as a Pyro program (Sec 2.1, Fig 2b).

`PixelModel` is the model that is trained: sites ``a`` (B, N, T, 2) and ``v`` (B, T, H, W), the states h and the
components z summed out exactly. `PixelModel.joint` is the same model with sites ``z`` (B, N) and ``h`` (B, N, T, 4)
as well. One plate, ``sequences``; one site a symbol; objects that a sequence does not have are masked.

Departures from the paper: none.
"""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_pixels._batch import check_batch, check_objects, most_objects, object_mask
from pyro_pixels._pyro import announce_parameters
from pyro_pixels.lgssm.distributions import StatePath
from pyro_pixels.lgssm.dynamics import Dynamics, select_component
from pyro_pixels.model.likelihoods import BernoulliPixels, PixelLikelihood
from pyro_pixels.model.renderer import Renderer


class PixelModel(nn.Module):
    """p(v, a) = p(v | a) prod_n p(a^n), Eqs (1)-(5) with h and z integrated out.

    Args:
        dynamics: of each object, shared by all.
        renderer: draws all objects' positions into an image.
        likelihood: of the pixels given the renderer's logits; default Eq (2)'s Bernoulli.
    """

    def __init__(self, dynamics: Dynamics, renderer: Renderer, likelihood: PixelLikelihood | None = None) -> None:
        super().__init__()
        self.dynamics, self.renderer = dynamics, renderer
        self.likelihood = BernoulliPixels() if likelihood is None else likelihood

    def forward(self, images: Tensor | None, n_objects: Tensor, n_frames: int | None = None) -> Tensor:
        """The Pyro program. Returns v (B, T, H, W).

        Args:
            images: (B, T, H, W), the observed v in {0, 1} (or [0, 1], as the likelihood has it), or None to draw it.
            n_objects: (B,) int, the number of objects N of each sequence.
            n_frames: T; needed where ``images`` is None.

        Raises:
            ValueError: if the shapes do not fit each other or the renderer.
        """
        announce_parameters("model", self)
        B, N, T = self._sizes(images, n_objects, n_frames)
        present = object_mask(n_objects, N)
        with pyro.plate("sequences", B, dim=-1):
            p_a = self.dynamics.positions(T).expand([B, N])
            a = pyro.sample("a", p_a.mask(present).to_event(1))  # type: ignore[attr-defined]
            return self._draw(a, present, images)

    def joint(self, images: Tensor | None, n_objects: Tensor, n_frames: int | None = None) -> Tensor:
        """The same model before h and z are summed out (Eq 5): sites z, h, a, v. Arguments as in `forward`."""
        announce_parameters("model", self)
        B, N, T = self._sizes(images, n_objects, n_frames)
        present = object_mask(n_objects, N)
        lgssm = self.dynamics.lgssm()
        with pyro.plate("sequences", B, dim=-1):
            p_z = dist.Categorical(logits=self.dynamics.log_pi.to(lgssm.mu.dtype)).expand([B, N])
            z = pyro.sample("z", p_z.mask(present).to_event(1))  # type: ignore[attr-defined]
            h = pyro.sample("h", StatePath(select_component(lgssm, z), T).mask(present).to_event(1))
            p_a = dist.MultivariateNormal(h @ lgssm.B.mT, lgssm.Sigma_A).to_event(1)
            a = pyro.sample("a", p_a.mask(present).to_event(1))
            return self._draw(a, present, images)

    def _draw(self, a: Tensor, present: Tensor, images: Tensor | None) -> Tensor:
        logits = self.renderer(a, present)
        obs = None if images is None else images.to(logits.dtype)
        return pyro.sample("v", self.likelihood(logits), obs=obs)

    def _sizes(self, images: Tensor | None, n_objects: Tensor, n_frames: int | None) -> tuple[int, int, int]:
        if images is None:
            check_objects(n_objects)
        else:
            check_batch(images, n_objects, (self.renderer.height, self.renderer.width))
            n_frames = images.shape[1] if n_frames is None else n_frames
            if n_frames != images.shape[1]:
                raise ValueError(f"n_frames is {n_frames} but the images have {images.shape[1]}; leave n_frames out")
        if n_frames is None or n_frames < 1:
            raise ValueError(f"n_frames is {n_frames}; without images say how many frames to draw, at least 1")
        return len(n_objects), most_objects(n_objects), n_frames
