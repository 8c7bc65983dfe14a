"""Measures where a training step of the quick preset spends its time: seconds within named functions.

For CPUs only, where a function has finished its work when it returns. Parts may be nested.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.steps import OurStep, make_step, with_objects
from benchmarks.timing import Stopwatch
from pyro_pixels.guides import recurrence, structured, tracking_head
from pyro_pixels.model import renderer
from pyro_pixels.presets import PRESETS

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "backward": ((torch.Tensor, "backward"),),
    "tracking head": ((tracking_head.TrackingHead, "forward"),),
    "of it: white pixels": ((tracking_head.TrackingHead, "white_pixels"),),
    "of it: following objects through 8 orders of the frames": ((tracking_head, "follow"),),
    "renderer, forward": ((renderer.Renderer, "forward"),),
    "recurrence, forward": ((recurrence._Recurrence, "forward"),),
    "recurrence, backward": ((recurrence._Recurrence, "backward"),),
    "q: factors, solutions and samples, forward": (
        (structured.ConditionedTracks, "__init__"),
        (structured.ConditionedTracks, "rsample"),
        (structured.ConditionedTracks, "log_prob"),
    ),
    "q: solutions, backward": ((structured._SolveSum, "backward"),),
    "Adam": ((torch.optim.Adam, "step"),),
}


@contextmanager
def timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Adds the duration of each call of a function to the last of ``seconds`` within the context."""
    function, own = getattr(owner, name), vars(owner).get(name)  # own: None if inherited

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[-1] += time.perf_counter() - begun

    setattr(owner, name, staticmethod(call) if isinstance(own, staticmethod) else call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Returns median seconds of a step and of its parts for N = 1, 2, 3, on one thread."""
    if watch.device.type != "cpu":
        raise ValueError("parts of a step are measured only on a CPU; on CUDA a step is one recorded graph")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    try:
        for N in (1, 2, 3):
            step = make_step(OurStep, with_objects(PRESETS["quick"], N), watch.device)
            for part, seconds in seconds_of(step, watch.rounds).items():
                found.setdefault(part, {})[str(N)] = statistics.median(seconds)
    finally:
        torch.set_num_threads(threads)
    return {"seconds": found, "rounds": watch.rounds}


def seconds_of(step: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of every step and of each part within it, after three uncounted steps."""
    for _ in range(3):
        step()
    seconds: dict[str, list[float]] = {"step": [], **{part: [] for part in PARTS}}
    with ExitStack() as patched:
        for part, functions in PARTS.items():
            for owner, name in functions:
                patched.enter_context(timed(owner, name, seconds[part]))
        for _ in range(rounds):
            for times in seconds.values():
                times.append(0.0)
            begun = time.perf_counter()
            step()
            seconds["step"][-1] = time.perf_counter() - begun
    return seconds
