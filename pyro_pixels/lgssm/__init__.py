"""Linear-Gaussian state-space models (Sec 2.1.2): exact inference, in plain torch.

`kalman` filters, smooths and samples; `marginal` gives the joint Gaussian over the positions in all frames.
`distributions` and `dynamics` build Pyro distributions and learnable parameters on them; import these two by name, so
that exact inference does not need Pyro.
"""

from pyro_pixels.lgssm.kalman import (
    LGSSM,
    ConstantVelocity,
    Filtered,
    Gaussians,
    check_observations,
    exact_dtype,
    kalman_filter,
    log_likelihood,
    mixture_moments,
    observation_moments,
    predict,
    reverse,
    rollout,
    rts_smoother,
    sample,
    sample_observations,
    sample_posterior,
    sample_rollout,
    semidefinite_cholesky,
    update,
)
from pyro_pixels.lgssm.marginal import Response, marginal_moments, on_diagonal, response

__all__ = [
    "LGSSM",
    "ConstantVelocity",
    "Filtered",
    "Gaussians",
    "Response",
    "check_observations",
    "exact_dtype",
    "kalman_filter",
    "log_likelihood",
    "marginal_moments",
    "mixture_moments",
    "observation_moments",
    "on_diagonal",
    "predict",
    "response",
    "reverse",
    "rollout",
    "rts_smoother",
    "sample",
    "sample_observations",
    "sample_posterior",
    "sample_rollout",
    "semidefinite_cholesky",
    "update",
]
