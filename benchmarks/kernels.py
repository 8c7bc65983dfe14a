"""Times steps on CUDA as `train.py` takes them, and without each thing that makes them fast, alternating."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

from benchmarks.by_hand import Variants, steps_within
from benchmarks.steps import with_objects, without_kernels
from benchmarks.timing import Stopwatch
from pyro_pixels._fused import matmul_precision
from pyro_pixels.presets import PRESETS
from pyro_pixels.training import step_runners


@contextmanager
def float32() -> Iterator[None]:
    """Uses float32 for all products within the context."""
    with matmul_precision("highest"):
        yield


@contextmanager
def one_stream() -> Iterator[None]:
    """Computes p(a) before and after the networks instead of beside them within the context."""
    with mock.patch.object(step_runners, "computing_beside", return_value=nullcontext()):
        yield


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Returns seconds of a step, by preset and N, and by variant: the paper's guide and the quick preset."""
    paper, quick = replace(PRESETS["paper"], guide="recurrent"), PRESETS["quick"]
    variants: Variants = {"as it is": nullcontext}
    cuda = watch.device.type == "cuda"
    if cuda:
        variants |= {"without Triton kernels": without_kernels, "in float32": float32, "on one stream": one_stream}
    with matmul_precision("high"):
        return {
            "seconds": {
                f"{name}, N = {N}": watch.compare(
                    steps_within(variants, with_objects(config, N), watch.device), in_a_row=20 if cuda else 1
                )
                for name, config in (("paper", paper), ("quick", quick))
                for N in config.data.n_objects
            }
        }
