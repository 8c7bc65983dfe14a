"""Measures how much each hand-written gradient speeds up a whole step: with and without it, alternating.

Without it, a step uses the plain reference implementation and torch's automatic gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.densities import METHODS, TRACKS, value_and_gradients
from benchmarks.steps import OurStep, make_step, with_objects, without_kernels
from benchmarks.timing import Stopwatch
from pyro_pixels.config import RunConfig
from pyro_pixels.guides import recurrence, structured
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.presets import PRESETS
from pyro_pixels.training.step_runners import WARM_UP

PIECES: dict[str, tuple[Any, str, Any]] = {
    "recur": (recurrence, "_Recurrence", recurrence.recur_reference),
    "solve_sum": (structured, "_SolveSum", structured.solve_sum_reference),
}
"""By name: module and attribute of a hand-written function, and its plain reference."""
HMM = "Pyro's GaussianHMM"
Variants = dict[str, Callable[[], AbstractContextManager[None]]]
"""By name: the context in which a variant of a step is taken."""


class _Plain:
    """Stand-in for an autograd function; its ``apply`` is the reference."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.apply = reference


@contextmanager
def plain(name: str) -> Iterator[None]:
    """Replaces a hand-written function by its reference within the context."""
    module, attribute, reference = PIECES[name]
    by_hand = getattr(module, attribute)
    setattr(module, attribute, _Plain(reference) if hasattr(by_hand, "apply") else reference)
    try:
        yield
    finally:
        setattr(module, attribute, by_hand)


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Returns seconds of a step, N = 3, as it is and without each piece: for the quick preset and the paper's guide.

    Triton kernels, which replace some of the pieces on CUDA, are off. Each variant has its own step, since a recorded
    step cannot change. The last entry is the density of positions alone, beside Pyro's `GaussianHMM`.
    """
    quick = with_objects(PRESETS["quick"], 3)
    paper = with_objects(replace(PRESETS["paper"], guide="recurrent"), 3)
    found = {}
    for name, config, pieces in (
        ("structured, quick", quick, ["recur", "solve_sum"]),
        ("recurrent, paper", paper, ["recur"]),
    ):
        variants: Variants = {"as it is": nullcontext}
        variants |= {f"without {piece}": partial(plain, piece) for piece in pieces}
        with without_kernels():
            found[name] = watch.compare(steps_within(variants, config, watch.device))
    dynamics = Dynamics(PRESETS["quick"].dynamics).to(watch.device)
    a = torch.randn(*TRACKS, 30, 2, device=watch.device)
    dense, hmm = (partial(value_and_gradients, METHODS[name], dynamics, a) for name in ("dense Gaussian", HMM))
    found["p(a) and gradients, T = 30"] = watch.compare({"as it is": dense, HMM: hmm})
    return {"seconds": found}


def steps_within(variants: Variants, config: RunConfig, device: torch.device) -> dict[str, Callable[[], None]]:
    """Returns by name a call that takes a step of its own within the variant's context; recorded already on CUDA."""
    calls = {name: _within(variant, make_step(OurStep, config, device)) for name, variant in variants.items()}
    for call in (call for call in calls.values() for _ in range(WARM_UP + 1) if device.type == "cuda"):
        call()
    return calls


def _within(variant: Callable[[], AbstractContextManager[None]], step: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        with variant():
            step()

    return call
