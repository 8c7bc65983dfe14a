"""Times p(a) of Eq (10) and its gradient by several methods, with their errors against a brute-force value.

A method added to `METHODS` is measured with the others.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Stopwatch
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Components, Dynamics, block_components, dense_components, hmm_components
from pyro_pixels.presets import PRESETS

FRAMES = (30, 100, 200, 500, 1000)
TRACKS = (20, 3)  # B, N

Density = Callable[[Dynamics, Tensor], Tensor]
"""(dynamics, a (B, N, T, 2)) -> log p(a) (B, N)."""


def mixture(components: Components, dynamics: Dynamics, a: Tensor) -> Tensor:
    """Returns log p(a) from the mixture that the model samples from, given a representation of its components."""
    dynamics.components = components
    return dynamics.positions(a.shape[-2]).log_prob(a)


def kalman_loop(dynamics: Dynamics, a: Tensor) -> Tensor:
    """Returns log p(a) from a Kalman filter for each component, a loop over frames."""
    log_likelihood = kalman.log_likelihood(dynamics.lgssm(), a.unsqueeze(-3))
    return (log_likelihood + dynamics.log_pi.to(log_likelihood.dtype).log_softmax(-1)).logsumexp(-1)


METHODS: dict[str, Density] = {
    "dense Gaussian": partial(mixture, dense_components),
    "blocks of frames": partial(mixture, block_components),
    "Pyro's GaussianHMM": partial(mixture, hmm_components),
    "Kalman loop": kalman_loop,
}


def brute_force(dynamics: Dynamics, a: Tensor) -> Tensor:
    """Returns log p(a) from torch's MultivariateNormal on the stacked positions.

    The covariance is computed entry by entry, Cov(a_t, a_s) = B A^{t-s} Var(h_s) B' + [t = s] Sigma_A for t >= s,
    and shares nothing with `lgssm.marginal_moments`, which the dense method uses.
    """
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = dynamics.lgssm()
    T, K = a.shape[-2], len(mu)
    powers, means, variances = [torch.eye(4).to(A)], [mu], [Sigma]
    for _ in range(T - 1):
        powers.append(A @ powers[-1])
        means.append(means[-1] @ A.mT + u)
        variances.append(A @ variances[-1] @ A.mT + Sigma_H)
    mean = (torch.stack(means, 1) @ B.mT).flatten(1)  # (K, 2T)
    after = B @ torch.stack(powers)  # (T, 2, 4), B A^j
    cov = mean.new_zeros(K, T, 2, T, 2)
    for s in range(T):
        cov[:, s:, :, s] = torch.einsum("tij,kjl,ml->ktim", after[: T - s], variances[s], B)
    cov = cov.reshape(K, 2 * T, 2 * T).tril()
    cov = cov + cov.tril(-1).mT + torch.kron(torch.eye(T).to(A), Sigma_A)
    each = torch.distributions.MultivariateNormal(mean, cov).log_prob(a.to(A.dtype).flatten(-2).unsqueeze(-2))
    return (each + dynamics.log_pi.to(A.dtype).log_softmax(-1)).logsumexp(-1)


def value_and_gradients(density: Density, dynamics: Dynamics, a: Tensor) -> list[Tensor]:
    """Returns log p(a), and the gradients of its sum with respect to a and every parameter of the dynamics."""
    a = a.detach().requires_grad_()
    value = density(dynamics, a)
    return [value.detach(), *torch.autograd.grad(value.sum(), [a, *dynamics.parameters()])]


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Returns the largest absolute error divided by the largest absolute wanted value."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


def measure(
    watch: Stopwatch, *, frames: tuple[int, ...] = FRAMES, methods: dict[str, Density] = METHODS
) -> dict[str, Any]:
    """Returns times of each method for each T, and the relative errors of its value and of its worst gradient."""
    dynamics = Dynamics(PRESETS["quick"].dynamics).to(watch.device)
    found: dict[str, Any] = {"seconds": {}, "value_error": {}, "gradient_error": {}}
    for T in frames:
        lgssm, z = dynamics.lgssm(), torch.randint(2, TRACKS, device=watch.device)
        start = lgssm._replace(mu=lgssm.mu[z], Sigma=lgssm.Sigma[z])
        a = kalman.sample(start, T)[1].detach()
        wanted = value_and_gradients(brute_force, copy.deepcopy(dynamics), a)
        calls = {name: partial(value_and_gradients, how, copy.deepcopy(dynamics), a) for name, how in methods.items()}
        errors = {name: [relative_error(*pair) for pair in zip(call(), wanted)] for name, call in calls.items()}
        found["value_error"][T] = {name: error[0] for name, error in errors.items()}
        found["gradient_error"][T] = {name: max(error[1:]) for name, error in errors.items()}
        found["seconds"][T] = watch.compare(calls)
    return found
