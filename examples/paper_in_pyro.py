"""Chiappa and Paquet, "Unsupervised Separation of Dynamics from Pixels": Eqs (1)-(10) as one Pyro program.

    python examples/paper_in_pyro.py  # one ball to 0.4 px in 2 CPU minutes; other seeds, --paper: docs/paper_in_pyro.md

B sequences, N objects, T frames, P = H W pixels: v (B, T, P), a (B, N, T, 2), x and s (..., D).
"""

import math
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm import trange

from pyro_pixels import CannonballConfig, simulate


class Settings(NamedTuple):  # each comment begins with the paper's value, Secs 3.1-3.2; K = 2, as in the paper
    H: int = 32  # 48
    W: int = 32  # 48
    D: int = 128  # 1024
    delta: float = 0.2  # 0.1
    Sigma_H: float = 1e-6  # 0.001; times I, like the other covariances
    Sigma_A: float = 2e-3  # 1
    Sigma_k: float = 0.1  # 1
    mu_position: float = 0.1  # 1, the standard deviation of the positions in mu_k
    mu_velocity: float = 0.3  # 0, that of the velocities
    W_std: float = 12.0  # 0: as all weights; the std of W^alpha and W^x, so that x can draw all over [-1, 1]^2
    b_v: float = -4.5  # 0; a negative value makes the canvas start dark
    ramps: float = 3.0  # 0; a positive value makes columns of W^beta and W^s start similar for neighbouring pixels
    learn_dynamics: float = 0  # 10,000, the step from which the dynamics are learned
    learn_noise: float = math.inf  # 10,000, the step from which Sigma_H and Sigma_A are
    beta: float = 3.0  # 100, the weight of the KL at the first step
    beta_last: float = 3.0  # 1, the weight at the last step
    rate_phi: float = 2e-3  # 0.001, Adam's learning rate
    rate_theta: float = 6e-3  # 0.001
    rate_u: float = 4e-4  # 0.001, of u and delta
    decay: float = 0.1  # 1, the factor on the rates at the last step
    steps: int = 1_000  # 200,000


PAPER = Settings(48, 48, 1024, 0.1, 1e-3, 1, 1, 1, 0, 0, 0, 0, 10_000, 10_000, 100, 1, 1e-3, 1e-3, 1e-3, 1, 200_000)


def linear(n_in: int, n_out: int, std: float = 0.0) -> nn.Linear:  # W ~ N(0, 1 / sqrt(d)) of d elements, b = 0: Sec 3.2
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=std or layer.weight.numel() ** -0.25)
    nn.init.uniform_(layer.bias, -2 / 3 * std, 2 / 3 * std)
    return layer


class Dynamics(nn.Module):  # T -> p(a_{1:T}) of one object, h and z marginalised out
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.log_delta, self.u = nn.Parameter(torch.tensor(s.delta).log()), nn.Parameter(torch.zeros(4))
        self.root_H = nn.Parameter(torch.eye(4) * math.log(s.Sigma_H) / 2)
        self.root_A, self.log_pi = nn.Parameter(torch.eye(2) * math.log(s.Sigma_A) / 2), nn.Parameter(torch.zeros(2))
        self.mu = nn.Parameter(torch.randn(2, 4) * torch.tensor([s.mu_position] * 2 + [s.mu_velocity] * 2))
        self.root_k = nn.Parameter(torch.eye(4).repeat(2, 1, 1) * math.log(s.Sigma_k) / 2)
        self.double().eval()  # float32 GaussianHMM is silently wrong; in train mode pyro.module warns of frozen weights

    def forward(self, T: int) -> dist.MixtureSameFamily:
        normal, I, zero = dist.MultivariateNormal, torch.eye(4).to(self.u), torch.zeros(4).to(self.u)
        A, B = I + self.log_delta.exp() * torch.ones(2).to(self.u).diag(2), I[:2]  # [I, delta I; 0, I] and [I, 0]
        L_H, L_A, L_k = map(dist.transforms.LowerCholeskyTransform(), (self.root_H, self.root_A, self.root_k))
        A_t, u_t, L_t = A.T.repeat(2, T, 1, 1), self.u.repeat(2, T, 1), L_H.repeat(2, T, 1, 1)  # Eq (3)
        A_t[:, 0], u_t[:, 0], L_t[:, 0] = 0, self.mu, L_k  # Eq (4): the first transition forgets h_0 and draws h_1
        h_0, eta_h, eta_a = normal(zero, I), normal(u_t, scale_tril=L_t), normal(zero[:2], scale_tril=L_A)
        hmm = dist.GaussianHMM(h_0, A_t, eta_h, B.T, eta_a, duration=T)  # Eq (5); its matrices act from the right
        return dist.MixtureSameFamily(dist.Categorical(logits=self.log_pi), hmm)  # Eq (10)


class Renderer(nn.Module):  # positions -> logits of the pixels
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.theta_x0 = nn.Parameter(torch.randn(s.D) * s.D**-0.25)
        self.alpha, self.x_hat, self.v = linear(2, s.D, s.W_std), linear(2, s.D, s.W_std), linear(s.D, s.H * s.W)
        nn.init.constant_(self.v.bias, s.b_v)

    def forward(self, a: Tensor, present: Tensor) -> Tensor:
        a, x = a.to(self.theta_x0.dtype), self.theta_x0.tanh()  # x^0
        for n in range(a.shape[1]):
            alpha = self.alpha(a[:, n]).sigmoid() * present[:, n, None, None]  # Eq (1)
            x_hat = self.x_hat(a[:, n]).tanh()  # Eq (1)
            x = (1 - alpha) * x + alpha * x_hat  # Eq (1)
        return self.v(x)  # Eq (2)


class InferenceNetwork(nn.Module):  # images -> means and standard deviations of the positions
    def __init__(self, s: Settings, N_max: int) -> None:
        super().__init__()
        self.phi_s0 = nn.Parameter(torch.randn(N_max, N_max, s.D) * s.D**-0.25)  # [N - 1, n - 1], footnote 2
        self.beta, self.s_hat = (linear(2 * s.D + s.H * s.W, s.D) for _ in range(2))
        self.mu_sigma = linear(s.D, 4)
        grid = torch.cartesian_prod(torch.linspace(-1, 1, s.H), torch.linspace(-1, 1, s.W)).T  # (2, P)
        for W in (self.beta.weight.data, self.s_hat.weight.data):
            W[:, 2 * s.D :] += s.ramps * W.std() * torch.randn(s.D, 2) @ grid

    def forward(self, v: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
        s, states = [self.phi_s0[N - 1, n].tanh() for n in range(int(N.max()))], []  # s_0^n
        for v_t in v.unbind(1):
            s_n = torch.zeros_like(s[0])  # s_t^0
            for n in range(len(s)):
                inputs = torch.cat([s[n], s_n, v_t], -1)  # [s_{t-1}^n, s_t^{n-1}, v_t]
                beta, s_hat = self.beta(inputs).sigmoid(), self.s_hat(inputs).tanh()  # Eq (8)
                s_n = s[n] = (1 - beta) * s_n + beta * s_hat  # Eq (8)
            states.append(torch.stack(s, 1))
        mu, rho = self.mu_sigma(torch.stack(states, 2)).chunk(2, -1)
        return mu, nn.functional.softplus(rho) + 1e-4


class PaperInPyro(nn.Module):  # p(v, a) and q(a | v) for images v of N objects (B,); beta weighs the KL, Sec 3.2
    def __init__(self, s: Settings, N_max: int) -> None:
        super().__init__()
        self.dynamics, self.renderer, self.network = Dynamics(s), Renderer(s), InferenceNetwork(s, N_max)

    def model(self, v: Tensor, N: Tensor, beta: float = 1.0) -> None:
        pyro.module("dynamics", self.dynamics)
        pyro.module("renderer", self.renderer)
        present = torch.arange(int(N.max()), device=N.device) < N[:, None]  # (B, N)
        with pyro.plate("sequences", len(v)):
            with pyro.poutine.scale(scale=beta):
                p_a = self.dynamics(v.shape[1]).expand(present.shape)  # Eq (10)
                a = pyro.sample("a", p_a.mask(present).to_event(1))
            p_v = dist.Bernoulli(logits=self.renderer(a, present))  # Eq (2)
            pyro.sample("v", p_v.to_event(2), obs=v)

    def guide(self, v: Tensor, N: Tensor, beta: float = 1.0) -> None:
        pyro.module("network", self.network)
        present = torch.arange(int(N.max()), device=N.device) < N[:, None]  # (B, N)
        mu, sigma = self.network(v, N)
        with pyro.plate("sequences", len(v)), pyro.poutine.scale(scale=beta):
            q_a = dist.Normal(mu.double(), sigma.double()).to_event(2)  # Eq (9)
            pyro.sample("a", q_a.mask(present).to_event(1))


def train(program: PaperInPyro, v: Tensor, N: Tensor, s: Settings) -> None:  # maximises Eq (7), estimated as in Eq (6)
    def adam(name: str) -> dict[str, float]:
        lr = s.rate_phi if "network" in name else s.rate_u if name.endswith((".u", "delta")) else s.rate_theta
        return {"lr": lr, "lrd": s.decay ** (1 / s.steps), "clip_norm": math.inf}

    pyro.clear_param_store()
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.ClippedAdam(adam), pyro.infer.Trace_ELBO())
    for step in (bar := trange(s.steps, unit="step")):
        for name, parameter in program.dynamics.named_parameters():
            parameter.requires_grad_(step >= (s.learn_noise if name in ("root_H", "root_A") else s.learn_dynamics))
        batch = torch.randint(len(v), (20,), device=v.device)
        loss = svi.step(v[batch].float(), N[batch], s.beta * (s.beta_last / s.beta) ** (step / s.steps))
        bar.set_postfix_str(f"loss {loss / v[batch, :, 0].numel():.1f} nats a frame", refresh=False)


def to_pixels(a: Tensor, truth: Tensor) -> Tensor:  # a is identified up to an affine map and the order of objects
    a = nn.functional.pad(a, (0, 1), value=1.0)
    a = a @ torch.linalg.lstsq(a.mean(1).flatten(0, 1), truth.mean(1).flatten(0, 1)).solution
    orders = torch.stack([a[:, order] for order in permutations(range(a.shape[1]))])
    return orders[(orders - truth).norm(dim=-1).mean((2, 3)).argmin(0), torch.arange(len(a))]


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--n-objects", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--paper", action="store_const", default=Settings(), const=PAPER, help="the paper's settings")
    for name, x in {"device": "cpu", "seed": 0, "out": Path("runs/paper_in_pyro.png"), **Settings()._asdict()}.items():
        parser.add_argument(f"--{name}", type=type(x), default=SUPPRESS if name in Settings._fields else x, metavar=x)
    args = parser.parse_args()
    for name, value in (given := {k: x for k, x in vars(args).items() if k in Settings._fields}).items():
        if not value > 0 and name != "b_v":
            parser.error(f"--{name} is {value}; wanted a number above 0")
    s = args.paper._replace(**given)
    try:
        pyro.set_rng_seed(args.seed)
        world = CannonballConfig(height=s.H, width=s.W, n_objects=tuple(args.n_objects))
        data, test = simulate(world, 3_000, seed=args.seed), simulate(world, 300, seed=2_000_003)
        program = PaperInPyro(s, max(args.n_objects)).to(args.device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    train(program, data.images.flatten(2).to(args.device), data.n_objects.to(args.device), s)
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained")
    for N in sorted(set(args.n_objects)):
        some = test[test.n_objects == N]
        mu, _ = program.network(some.images.flatten(2).float().to(args.device), some.n_objects.to(args.device))
        a = to_pixels(mu.detach().double().cpu(), some.positions)
        print(f"N = {N}: position error {(a - some.positions).norm(dim=-1).mean():.2f} px")
    for (above, below), v, path, found in zip(axes.T, some.images, some.positions, a):
        above.imshow((torch.linspace(0.3, 1, len(v))[:, None, None] * v).amax(0), cmap="gray")
        below.plot(*path.permute(2, 1, 0), "o", color="0.8")
        below.plot(*found.permute(2, 1, 0), ".-")
    figure.savefig(partial := args.out.with_name(f"{args.out.name}.partial"), format="png")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
