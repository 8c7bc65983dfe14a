"""The yardstick: the program that a Pyro user would write straight from the paper, to be compared with pyro_pixels.

Every equation is a line of a loop: Eq (8) is a double loop over t and n with W^beta and W^s applied to the concatenated
[s_{t-1}^n, s_t^{n-1}, v_t], Eq (1) a loop over n, p(a) a `MixtureSameFamily` of Pyro's `GaussianHMM`, the KL weight a
`poutine.scale` around the latent site. Objects that a sequence does not have are masked. It is trained by
``SVI(...).step`` with `Trace_ELBO`, Pyro's Adam, and validation as Pyro has it by default.

It is written with care, not to lose: positions and their density are in float64, because GaussianHMM in float32 is
silently wrong; the chain starts as Eq (4) says; networks are plain modules, and what does not depend on the loop over
time (the renderer) is done for all frames at once. tests/test_benchmarks.py holds its bound and gradients against
pyro_pixels'.
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_pixels.guides.heads import SIGMA_FLOOR, LinearHead
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.model.pixel_model import PixelModel

cholesky_factor = transform_to(constraints.lower_cholesky)


class Dynamics(nn.Module):
    """Eqs (3)-(4), with covariances by their Cholesky factors; in float64."""

    def __init__(self, n_components: int, position_noise_floor: float) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float64))

        self.position_noise_floor = position_noise_floor
        self.log_delta, self.u = zeros(), zeros(4)
        self.log_pi, self.mu, self.root_Sigma = zeros(n_components), zeros(n_components, 4), zeros(n_components, 4, 4)
        self.root_Sigma_H, self.root_Sigma_A = zeros(4, 4), zeros(2, 2)

    def positions(self, T: int) -> dist.MixtureSameFamily:
        """p(a_{1:T}) of Eq (10).

        GaussianHMM's chain makes a transition before its first observation, so the first one, with matrix 0, draws h_1
        from N(mu_k, Sigma_k) whatever h_0 was. Its matrices act from the right.
        """
        K, I = len(self.log_pi), torch.eye(2).to(self.u)
        A = torch.eye(4).to(self.u) + torch.kron(torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to(I), I) * self.log_delta.exp()
        B = torch.cat([I, torch.zeros_like(I)], 1)
        L_A = cholesky_factor(self.root_Sigma_A)
        Sigma_A = L_A @ L_A.T + self.position_noise_floor * I
        L, L_H = cholesky_factor(self.root_Sigma), cholesky_factor(self.root_Sigma_H)
        matrices = torch.cat([torch.zeros_like(L).unsqueeze(1), A.T.expand(K, T - 1, 4, 4)], 1)
        noise = dist.MultivariateNormal(
            torch.cat([self.mu.unsqueeze(1), self.u.expand(K, T - 1, 4)], 1),
            scale_tril=torch.cat([L.unsqueeze(1), L_H.expand(K, T - 1, 4, 4)], 1),
        )
        components = dist.GaussianHMM(
            initial_dist=dist.MultivariateNormal(torch.zeros_like(self.mu), torch.eye(4).to(self.u)),
            transition_matrix=matrices,
            transition_dist=noise,
            observation_matrix=B.T,
            observation_dist=dist.MultivariateNormal(torch.zeros(2).to(self.u), Sigma_A),
            duration=T,
        )
        return dist.MixtureSameFamily(dist.Categorical(logits=self.log_pi), components)


class Generative(nn.Module):
    """The dynamics, and Eqs (1)-(2)."""

    def __init__(self, height: int, width: int, D: int, n_components: int, position_noise_floor: float) -> None:
        super().__init__()
        self.dynamics = Dynamics(n_components, position_noise_floor)
        self.height, self.width = height, width
        self.theta_x0 = nn.Parameter(torch.zeros(D))
        self.alpha, self.x_hat = nn.Linear(2, D), nn.Linear(2, D)
        self.v = nn.Linear(D, height * width)

    def logits(self, a: Tensor, present: Tensor) -> Tensor:
        """(B, T, H, W) from a (B, N, T, 2) and present (B, N)."""
        a = a.to(self.theta_x0.dtype)
        x = self.theta_x0.tanh()
        for n in range(a.shape[1]):
            alpha = self.alpha(a[:, n]).sigmoid() * present[:, n, None, None]
            x_hat = self.x_hat(a[:, n]).tanh()
            x = (1 - alpha) * x + alpha * x_hat
        return self.v(x).unflatten(-1, (self.height, self.width))


class Inference(nn.Module):
    """Eqs (8)-(9)."""

    def __init__(self, n_pixels: int, D: int, max_objects: int) -> None:
        super().__init__()
        self.phi_s0 = nn.Parameter(torch.zeros(max_objects, max_objects, D))  # [N - 1, n - 1]
        self.beta, self.s_hat = nn.Linear(2 * D + n_pixels, D), nn.Linear(2 * D + n_pixels, D)
        self.head = nn.Linear(D, 4)

    def forward(self, images: Tensor, n_objects: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, N, T, 2) of a."""
        v, N = images.flatten(2), int(n_objects.max())
        states = [self.phi_s0[n_objects - 1, n].tanh() for n in range(N)]  # s_{t-1}^n
        every = []
        for t in range(v.shape[1]):
            s = torch.zeros_like(states[0])  # s_t^0
            for n in range(N):
                inputs = torch.cat([states[n], s, v[:, t]], -1)
                beta, s_hat = self.beta(inputs).sigmoid(), self.s_hat(inputs).tanh()
                s = (1 - beta) * s + beta * s_hat
                states[n] = s
            every.append(torch.stack(states, 1))
        mu, rho = self.head(torch.stack(every, 2)).chunk(2, -1)
        return mu, F.softplus(rho) + SIGMA_FLOOR


class LiteralProgram(nn.Module):
    """Model and guide, to be trained with ``SVI(program.model, program.guide, ...)``.

    Args:
        model: of the sizes wanted; the program starts from its values,
        guide: and from this one's, which must have a `LinearHead`.
    """

    def __init__(self, model: PixelModel, guide: RecurrentGuide) -> None:
        super().__init__()
        renderer, config, rnn = model.renderer, model.dynamics.config, guide.rnn
        D = len(renderer.theta_x0)
        self.generative = Generative(
            renderer.height, renderer.width, D, config.n_components, config.position_noise_floor
        )
        self.inference = Inference(rnn.height * rnn.width, rnn.state_size, rnn.max_objects)
        self.load_state_dict(in_literal_names(model, guide))

    def model(self, images: Tensor, n_objects: Tensor, beta: float = 1.0) -> None:
        """The generative program; images (B, T, H, W) float, n_objects (B,), beta the weight of the KL."""
        pyro.module("generative", self.generative)
        present = self._present(n_objects)
        with pyro.plate("sequences", len(images)):
            with poutine.scale(scale=beta):
                p_a = self.generative.dynamics.positions(images.shape[1]).expand(present.shape)
                a = pyro.sample("a", p_a.mask(present).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.generative.logits(a, present)).to_event(3), obs=images)

    def guide(self, images: Tensor, n_objects: Tensor, beta: float = 1.0) -> None:
        """q(a | v). Arguments as in `model`."""
        pyro.module("inference", self.inference)
        mu, sigma = self.inference(images, n_objects)
        q_a = dist.Normal(mu.double(), sigma.double()).to_event(2).mask(self._present(n_objects))
        with pyro.plate("sequences", len(images)), poutine.scale(scale=beta):
            pyro.sample("a", q_a.to_event(1))

    @staticmethod
    def _present(n_objects: Tensor) -> Tensor:
        return torch.arange(int(n_objects.max()), device=n_objects.device) < n_objects.unsqueeze(-1)


def in_literal_names(
    model: PixelModel, guide: RecurrentGuide, read: Callable[[Tensor], Tensor] = torch.detach
) -> dict[str, Tensor]:
    """What ``read`` finds in our parameters (their values, or their gradients), under the literal program's names."""
    if not isinstance(guide.head, LinearHead):
        raise ValueError(f"the guide has a {type(guide.head).__name__}; wanted a LinearHead, the paper's")
    renderer, rnn = model.renderer, guide.rnn
    found = {f"generative.dynamics.{name}": read(p) for name, p in model.dynamics.named_parameters()}
    found["generative.theta_x0"] = read(renderer.theta_x0)
    layers = {
        "generative.alpha": renderer.to_alpha,
        "generative.x_hat": renderer.to_x,
        "generative.v": renderer.to_v,
        "inference.head": guide.head.linear,
    }
    for name, layer in layers.items():
        found |= {f"{name}.weight": read(layer.weight), f"{name}.bias": read(layer.bias)}
    weights = torch.cat([read(rnn.from_states.weight), read(rnn.from_image.weight)], 1).chunk(2)
    for name, weight, bias in zip(("beta", "s_hat"), weights, read(rnn.from_states.bias).chunk(2)):
        found |= {f"inference.{name}.weight": weight, f"inference.{name}.bias": bias}
    return {**found, "inference.phi_s0": read(rnn.phi_s0)}
