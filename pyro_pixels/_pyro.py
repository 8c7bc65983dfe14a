"""Pyro's parameter and sample messages: announcement of parameters, checks of precision, masks and types."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops.provenance import detach_provenance
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from pyro_pixels._batch import check_values
from pyro_pixels.lgssm.kalman import check_precision, exact_dtype

_KNOWN: ContextVar[bool] = ContextVar("parameters_known", default=False)


@contextmanager
def parameters_known() -> Iterator[None]:
    """A context without announcements of parameters, for trainers that get them from a module; it saves time."""
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def announce_parameters(prefix: str, module: nn.Module) -> None:
    """Announces the parameters of a program to Pyro, so that ``pyro.infer.SVI`` trains them.

    `pyro.module` would register them in the global parameter store, where models of the same name share values. Here
    the store receives only names, which `pyro.optim` needs; parameters shared by model and guide have the model's name.

    Raises:
        ValueError: in half precision, under autocast, or in ``torch.jit`` tracing, none of which are supported, or if
            a handler gives a parameter another value.
    """
    _check_precision(prefix, module)
    if am_i_wrapped() and not _KNOWN.get():
        names = pyro.get_param_store()._param_to_name
        for name, parameter in module.named_parameters(prefix):
            known = names.get(parameter)
            if known is None or (known != name and prefix == "model"):
                names[_WeakKey(parameter, names)] = name  # type: ignore[index]
            alias = parameter.detach()
            alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # SVI reads it from param sites
            answer = effectful(lambda *_, value=alias, **__: value, type="param")(
                name, alias, constraint=constraints.real, event_dim=alias.dim(), name=name
            )
            if answer is not alias and not torch.equal(detach_provenance(answer), alias):
                raise ValueError(
                    f"a handler such as poutine.lift or poutine.substitute replaces '{name}', which would have no "
                    f"effect; copy the {prefix} and change the copy"
                )


def _check_precision(prefix: str, module: nn.Module) -> None:
    if torch._C._get_tracing_state() is not None or _called_from("pyro.ops.jit"):
        raise ValueError("torch.jit is not supported; use Trace_ELBO instead of JitTrace_ELBO")
    check_precision_of(prefix, module)


def check_precision_of(prefix: str, module: nn.Module) -> None:
    """Raises the ValueErrors of `kalman.check_precision` for a model or a guide, whose first parameter counts."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        check_precision(f"the {prefix}'s weights", parameter)


def _called_from(module: str) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def check_encoded(what: str, q_a: Any, batch: tuple[int, int], event: tuple[int, int]) -> None:
    """Raises ValueError unless ``q_a``, which ``what`` returned, is a distribution over positions of these shapes."""
    if not isinstance(q_a, torch.distributions.Distribution):
        raise ValueError(
            f"{what} returned a {type(q_a).__name__}; wanted a distribution, such as dist.Normal(mean, std).to_event(2)"
        )
    if q_a.batch_shape != batch or q_a.event_shape != event:
        raise ValueError(
            f"{what} returned batch shape {tuple(q_a.batch_shape)} and event shape {tuple(q_a.event_shape)}; wanted "
            f"(B, N) = {batch} and (T, 2) = {event}; `.to_event(2)` moves the last two dimensions of a distribution "
            "into its event"
        )


def without_unseen(p_v: Any, images: Tensor) -> tuple[Any, Tensor]:
    """Returns p(v) and v (B, T, H, W) with NaN frames masked out; integer images unchanged.

    Args:
        p_v: the distribution returned by a likelihood, with event shape (T, H, W).
        images: images of any type.

    Raises:
        ValueError: if there are NaN frames and the pixels are not independent.
    """
    if not images.is_floating_point():
        return p_v, images
    if _of_pixels(p_v) is None and not bool(images.isnan().any()):
        return p_v, images
    seen = ~images.isnan()
    return of_pixels(p_v).mask(seen).to_event(3), images.nan_to_num()  # a NaN would make the gradient NaN


def check_pixels(likelihood: Callable[[Tensor], Any], images: Tensor) -> None:
    """Raises ValueError if pixels lie outside [0, 1] (`check_values`), unless the likelihood expects such pixels.

    One's own likelihood may be for other images. Whether it is takes time, and is found out only where it matters.

    Args:
        likelihood: maps logits (..., T, H, W) to p(v | a).
        images: (B, T, H, W).
    """
    try:
        check_values(images)
    except ValueError:
        try:
            brightest = likelihood(torch.full(images.shape, 100.0, device=images.device)).mean
        except NotImplementedError:  # a distribution without a mean
            brightest = torch.ones(())
        if not bool((brightest > 1.01).any()):
            raise


def of_pixels(p_v: Any) -> Any:
    """Returns the distribution of each pixel, with event shape (), given one over images of independent pixels.

    Raises:
        ValueError: if the distribution does not show that they are independent.
    """
    pixels = _of_pixels(p_v)
    if pixels is None:
        raise ValueError(
            f"the likelihood is a {type(p_v).__name__} over images, which cannot be split into pixels; wanted a "
            "distribution of single pixels with `.to_event(3)`"
        )
    return pixels


def _of_pixels(p_v: Any) -> Any:
    """Returns the distribution of each pixel, or None if it cannot be read off ``p_v``."""
    while isinstance(p_v, torch.distributions.Independent):
        p_v = p_v.base_dist
    if p_v.event_shape and isinstance(p_v, torch.distributions.TransformedDistribution):
        base = _of_pixels(p_v.base_dist)
        p_v = p_v if base is None else dist.TransformedDistribution(base, p_v.transforms)
    return None if p_v.event_shape else p_v


def of_objects(p: Any, present: Tensor) -> "ExactDensity":
    """Returns p(a^1, ..., a^N) given p(a^n) with batch shape (B, N): absent objects are masked, and may be NaN."""
    if not isinstance(p, TorchDistributionMixin):
        raise ValueError(f"{type(p).__name__} is a distribution of torch; wanted one of pyro.distributions")
    mask = present.reshape(*present.shape, *(1 for _ in p.event_shape))
    return ExactDensity(p.mask(present).to_event(1), mask)


def fill_absent(x: Tensor, present: Tensor) -> Tensor:
    """Returns values (B, N, T, ...) with 0 for NaN in the slots of absent objects."""
    return x.masked_fill(x.isnan() & ~present[..., None, None], 0)


class _WeakKey:
    """A dict key that stands for a parameter without keeping it alive, and is removed along with it."""

    def __init__(self, parameter: Tensor, names: dict[Any, str]) -> None:
        self._hash = hash(parameter)
        self._ref = weakref.ref(parameter, lambda _: names.pop(self, None))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _WeakKey):
            return other is self or (self._ref() is not None and self._ref() is other._ref())
        return self._ref() is other


class ExactDensity(TorchDistribution):
    """A distribution with log-probabilities in `kalman.exact_dtype`, so that those of all sites have the same type.

    Objectives that combine log-probabilities of several sites, such as ``TraceEnum_ELBO``, require this. Given values
    may be NaN where ``mask``, bool and broadcastable to values, is False; the distribution must ignore them there.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, distribution: TorchDistribution, mask: Tensor | None = None) -> None:
        self._distribution, self._mask = distribution, mask
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._mask is not None and torch.is_grad_enabled() and not value.requires_grad:  # given, not a draw
            value = torch.where(self._mask, value, 0)  # a masked NaN would make the gradient NaN
        log_p = self._distribution.log_prob(value)
        return log_p.to(exact_dtype(log_p.device))

    def expand(self, batch_shape: Any, _instance: None = None) -> "ExactDensity":
        return ExactDensity(self._distribution.expand(torch.Size(batch_shape)), self._mask)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._distribution.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._distribution.rsample(sample_shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self._distribution.has_rsample

    @property
    def support(self) -> Any:  # type: ignore[override]
        return self._distribution.support

    @property
    def base_dist(self) -> Any:
        return self._distribution.base_dist  # type: ignore[attr-defined]

    @property
    def mean(self) -> Tensor:
        return self._distribution.mean

    @property
    def variance(self) -> Tensor:
        return self._distribution.variance
