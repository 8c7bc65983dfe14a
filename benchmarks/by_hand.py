"""What each gradient that is written by hand gains on a whole step: with and without, in turn.

Without, a step runs through the plain reference that stands beside each, and torch's own gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.steps import OurStep, make_step, with_objects
from benchmarks.timing import Stopwatch
from pyro_pixels.guides import recurrence, structured
from pyro_pixels.lgssm import distributions
from pyro_pixels.presets import PRESETS

PIECES: dict[str, tuple[Any, str, Any]] = {
    "recur": (recurrence, "_Recurrence", recurrence.recur_reference),
    "log_normal": (distributions, "_LogNormal", distributions.log_normal_reference),
    "solve_sum": (structured, "_SolveSum", structured.solve_sum_reference),
}
"""What is written by hand, where it is looked up, and its plain reference."""


class _Plain:
    """Stands for an autograd function whose ``apply`` is the reference."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.apply = reference


@contextmanager
def plain(name: str) -> Iterator[None]:
    """Within it the reference takes the place of what is written by hand."""
    module, attribute, reference = PIECES[name]
    by_hand = getattr(module, attribute)
    setattr(module, attribute, _Plain(reference) if hasattr(by_hand, "apply") else reference)
    try:
        yield
    finally:
        setattr(module, attribute, by_hand)


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Seconds of a step, N = 3, as it is and without each piece: the quick preset's, and the paper's guide's."""
    quick = with_objects(PRESETS["quick"], 3)
    paper = with_objects(replace(PRESETS["paper"], guide="recurrent"), 3)
    found = {}
    for name, config, pieces in (
        ("structured, quick", quick, ["recur", "log_normal", "solve_sum"]),
        ("recurrent, paper", paper, ["recur", "log_normal"]),
    ):
        step = make_step(OurStep, config, watch.device)

        def without(piece: str, step: Callable[[], None] = step) -> None:
            with plain(piece):
                step()

        calls: dict[str, Callable[[], object]] = {"as it is": step}
        calls |= {f"without {piece}": (lambda piece=piece: without(piece)) for piece in pieces}
        found[name] = watch.compare(calls)
    return {"seconds": found}
