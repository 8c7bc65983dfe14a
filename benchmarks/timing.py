"""Times alternating calls, so that other load on the machine affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

FEWEST_ROUNDS = 3

Times = list[float]
"""Seconds, one value per round."""


@dataclass(frozen=True)
class Stopwatch:
    """Where and how long to measure."""

    device: torch.device
    rounds: int = 15
    """How many times each call is timed."""
    seconds: float = 12.0
    """Time limit of a comparison, in seconds; at least `FEWEST_ROUNDS` rounds (or ``rounds``, if fewer) are run."""

    def compare(self, calls: Mapping[str, Callable[[], object]], in_a_row: int = 1) -> dict[str, Times]:
        """Returns seconds of each call; calls alternate (A B A B ...), after one untimed round.

        With ``in_a_row``, each is called so many times before the device is waited for, as in a training.
        """
        for call in calls.values():
            self.time(call)
        times: dict[str, Times] = {name: [] for name in calls}
        stop = time.perf_counter() + self.seconds
        for i in range(self.rounds):
            if i >= FEWEST_ROUNDS and time.perf_counter() > stop:
                break
            for name, call in calls.items():
                times[name].append(self.time(call, in_a_row))
        return times

    def time(self, call: Callable[[], object], n: int = 1) -> float:
        """Returns seconds per call of n calls, until the device has finished all of their work."""
        self._wait()
        start = time.perf_counter()
        for _ in range(n):
            call()
        self._wait()
        return (time.perf_counter() - start) / n

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


class MatrixProduct:
    """A float32 product of two square matrices, to measure the throughput that the machine can reach."""

    def __init__(self, device: torch.device) -> None:
        size = 1536 if device.type == "cpu" else 8192  # a smaller product would not keep a GPU busy
        self._X = torch.randn(size, size, device=device)
        self._out = torch.empty_like(self._X)

    def __call__(self) -> None:
        torch.mm(self._X, self._X, out=self._out)


def product_flops(call: Callable[[], object]) -> int:
    """Returns the floating-point operations of all matrix products in a call, its backward pass included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """Returns the lower and the upper quartile."""
    low, high = np.percentile(times, (25, 75))
    return float(low), float(high)


def mean_over(each: Iterable[Times]) -> Times:
    """Returns the mean of several calls in each round."""
    return [statistics.fmean(times) for times in zip(*each)]


def ratio(times: Times, reference: Times) -> float:
    """Returns how many times as long the reference takes: the median over rounds."""
    return statistics.median(r / t for t, r in zip(times, reference))


def exponent(sizes: Sequence[float], times: Sequence[Times]) -> float:
    """Returns p where time grows as size^p: least squares in logarithms over the upper half of the sizes."""
    half = (len(sizes) - 1) // 2
    medians = [statistics.median(t) for t in times]
    return float(np.polyfit(np.log(sizes[half:]), np.log(medians[half:]), 1)[0])
