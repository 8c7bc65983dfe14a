"""Slow, literal references in float64 that share no code with pyro_pixels."""

from typing import NamedTuple

import numpy as np
import torch


class System(NamedTuple):
    """h_1 ~ N(mu, Sigma), h_t = A h_{t-1} + u + N(0, Sigma_H), a_t = B h_t + N(0, Sigma_A), as numpy arrays."""

    A: np.ndarray
    B: np.ndarray
    u: np.ndarray
    Sigma_H: np.ndarray
    Sigma_A: np.ndarray
    mu: np.ndarray
    Sigma: np.ndarray


def random_system(seed, d=4, p=2, *, Sigma_H_rank=None, Sigma_rank=None):
    """A stable, non-Newtonian system; ranks below d give singular covariances, rank 0 a zero matrix."""
    rng = np.random.default_rng(seed)

    def covariance(size, rank):
        root = rng.standard_normal((size, size if rank is None else rank))
        return root @ root.T / size + (0.1 * np.eye(size) if rank is None else 0.0)

    return System(
        A=0.9 * np.linalg.qr(rng.standard_normal((d, d)))[0] + 0.1 * rng.standard_normal((d, d)),
        B=rng.standard_normal((p, d)),
        u=rng.standard_normal(d),
        Sigma_H=covariance(d, Sigma_H_rank),
        Sigma_A=covariance(p, None),
        mu=rng.standard_normal(d),
        Sigma=covariance(d, Sigma_rank),
    )


def joint_moments(system, T):
    """Mean and covariance of the stacked (h_1, .., h_T, a_1, .., a_T)."""
    A, B, u, Sigma_H, Sigma_A, mu, Sigma = (np.asarray(x, np.float64) for x in system)
    d, p = len(mu), len(B)
    mean_h, var_h = [mu], [Sigma]
    for _ in range(T - 1):
        mean_h.append(A @ mean_h[-1] + u)
        var_h.append(A @ var_h[-1] @ A.T + Sigma_H)
    mean = np.zeros(T * (d + p))
    cov = np.zeros((T * (d + p), T * (d + p)))
    for t in range(T):
        h_t, a_t = h_index([t], d), a_index([t], T, d, p)
        mean[h_t] = mean_h[t]
        mean[a_t] = B @ mean_h[t]
        for s in range(T):
            h_s, a_s = h_index([s], d), a_index([s], T, d, p)
            C = np.linalg.matrix_power(A, abs(t - s)) @ var_h[min(t, s)]  # of the later with the earlier
            C = C if t >= s else C.T
            cov[np.ix_(h_t, h_s)] = C
            cov[np.ix_(a_t, h_s)] = B @ C
            cov[np.ix_(h_t, a_s)] = C @ B.T
            cov[np.ix_(a_t, a_s)] = B @ C @ B.T + (Sigma_A if t == s else 0.0)
    return mean, cov


def h_index(steps, d):
    """Places of h_t, t in ``steps``, in the stacked vector of `joint_moments`."""
    return [t * d + i for t in steps for i in range(d)]


def a_index(steps, T, d, p):
    """Places of a_t, t in ``steps``, in the stacked vector of `joint_moments`."""
    return [T * d + t * p + i for t in steps for i in range(p)]


def condition(mean, cov, index, values):
    """Moments of all entries of a Gaussian vector given that those at ``index`` have ``values``."""
    if len(index) == 0:
        return mean, cov
    gain = np.linalg.solve(cov[np.ix_(index, index)], cov[index]).T
    return mean + gain @ (values - mean[index]), cov - gain @ cov[index]


def log_normal(x, mean, cov):
    """log N(x; mean, cov) in nats; 0 for no entries."""
    if len(x) == 0:
        return 0.0
    sign, log_det = np.linalg.slogdet(cov)
    assert sign > 0
    e = x - mean
    return -0.5 * (e @ np.linalg.solve(cov, e) + log_det + len(x) * np.log(2 * np.pi))


def log_likelihood(system, a, observed=None):
    """log density of the observed steps of a (T, p)."""
    mean, cov, index, values = _observed_entries(system, a, observed, len(a))
    return log_normal(values, mean[index], cov[np.ix_(index, index)])


def posterior(system, a, observed=None, n_seen=None):
    """Mean and covariance of the stacked (h, a) given the observed steps among the first ``n_seen`` of a (T, p)."""
    mean, cov, index, values = _observed_entries(system, a, observed, len(a) if n_seen is None else n_seen)
    return condition(mean, cov, index, values)


def _observed_entries(system, a, observed, n_seen):
    T, p = a.shape
    mean, cov = joint_moments(system, T)
    seen = [t for t in range(n_seen) if observed is None or observed[t]]
    values = np.array([a[t, i] for t in seen for i in range(p)])
    return mean, cov, a_index(seen, T, len(system.mu), p), values


def smoothed(system, a, observed=None):
    """Means (T, d) and covariances (T, d, d) of h_t given all observed steps."""
    return _states(*posterior(system, a, observed), len(a), len(system.mu), range(len(a)))


def filtered(system, a, observed=None):
    """Means (T, d) and covariances (T, d, d) of h_t given the observed steps up to t."""
    return _stack_states(system, a, observed, lag=0)


def predicted(system, a, observed=None):
    """Means (T, d) and covariances (T, d, d) of h_t given the observed steps before t."""
    return _stack_states(system, a, observed, lag=1)


def _stack_states(system, a, observed, lag):
    T, d = len(a), len(system.mu)
    parts = [_states(*posterior(system, a, observed, t + 1 - lag), T, d, [t]) for t in range(T)]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([cov for _, cov in parts])


def _states(mean, cov, T, d, steps):
    places = [h_index([t], d) for t in steps]
    return np.stack([mean[i] for i in places]), np.stack([cov[np.ix_(i, i)] for i in places])


def mixture_log_prob(systems, pi, a, observed=None):
    """log sum_k pi_k p(a | k), Eq (10), for a (T, p) and one system a component."""
    return np.logaddexp.reduce(np.log(pi) + [log_likelihood(s, a, observed) for s in systems])


def mixture_posterior(systems, pi, a, observed=None):
    """p(z = k | a), (K,)."""
    log_joint = np.log(pi) + [log_likelihood(s, a, observed) for s in systems]
    return np.exp(log_joint - np.logaddexp.reduce(log_joint))


def relative_error(actual, wanted):
    """Largest absolute error over the largest absolute wanted value; 0 where both are all zero."""
    actual, wanted = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (actual, wanted))
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return np.abs(actual - wanted).max(initial=0.0) / max(np.abs(wanted).max(initial=0.0), 1e-300)


def worst_z_of_mean(draws, mean, cov):
    """Largest deviation of the mean of ``draws`` (n, m) from ``mean``, in its own standard errors."""
    scale = np.sqrt(np.diag(cov) / len(draws))
    return (np.abs(draws.mean(0) - mean) / (scale + 1e-9)).max()


def worst_z_of_covariance(draws, mean, cov):
    """Largest deviation of the covariance of Gaussian ``draws`` about ``mean`` from ``cov``, in standard errors."""
    centred = draws - mean
    variance = np.diag(cov)
    scale = np.sqrt((np.outer(variance, variance) + cov**2) / len(draws))
    return (np.abs(centred.T @ centred / len(draws) - cov) / (scale + 1e-9)).max()


def render(a, theta_x0, W_alpha, b_alpha, W_x, b_x, W_v, b_v):
    """Logits (T, P) of Eq (2): Eq (1)'s iteration over the objects of a (N, T, 2), one frame at a time."""
    logits = []
    for t in range(a.shape[1]):
        x = torch.tanh(theta_x0)
        for n in range(a.shape[0]):
            alpha = torch.sigmoid(W_alpha @ a[n, t] + b_alpha)
            x_hat = torch.tanh(W_x @ a[n, t] + b_x)
            x = (1 - alpha) * x + alpha * x_hat
        logits.append(W_v @ x + b_v)
    return torch.stack(logits)


def inference_states(v, phi_s0, W_beta, b_beta, W_s, b_s):
    """States s (N, T, D) of Eq (8) for images v (T, P) and phi_s0 (N, D); columns of W act on [s_{t-1}, s^{n-1}, v]."""
    s = {}
    for n in range(1, len(phi_s0) + 1):
        s[0, n] = torch.tanh(phi_s0[n - 1])
    for t in range(1, len(v) + 1):
        s[t, 0] = torch.zeros_like(phi_s0[0])
        for n in range(1, len(phi_s0) + 1):
            inputs = torch.cat([s[t - 1, n], s[t, n - 1], v[t - 1]])
            beta = torch.sigmoid(W_beta @ inputs + b_beta)
            s_hat = torch.tanh(W_s @ inputs + b_s)
            s[t, n] = (1 - beta) * s[t, n - 1] + beta * s_hat
    return torch.stack([torch.stack([s[t, n] for t in range(1, len(v) + 1)]) for n in range(1, len(phi_s0) + 1)])


def linear_head(s, W_mu, b_mu, W_sigma, b_sigma):
    """Means and standard deviations (N, T, 2) of Eq (9), state by state."""
    mu, sigma = torch.zeros(*s.shape[:2], 2, dtype=s.dtype), torch.zeros(*s.shape[:2], 2, dtype=s.dtype)
    for n in range(s.shape[0]):
        for t in range(s.shape[1]):
            mu[n, t] = W_mu @ s[n, t] + b_mu
            sigma[n, t] = torch.log1p(torch.exp(W_sigma @ s[n, t] + b_sigma)) + 1e-4
    return mu, sigma


def disks(positions, height, width, radius):
    """Images (T, H, W): a pixel is 1 if its centre lies within ``radius`` of a position (N, T, 2), (column, row)."""
    N, T, _ = positions.shape
    images = np.zeros((T, height, width), np.uint8)
    for t in range(T):
        for row in range(height):
            for column in range(width):
                for n in range(N):
                    if np.hypot(column - positions[n, t, 0], row - positions[n, t, 1]) <= radius:
                        images[t, row, column] = 1
    return images
