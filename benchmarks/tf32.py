"""Times the paper's step as `train.py` takes it on CUDA, with products in TF32, with other kernels alternating."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from benchmarks.by_hand import fused, within
from benchmarks.steps import OurStep, make_step, with_objects
from benchmarks.timing import Stopwatch
from pyro_pixels.presets import PRESETS
from pyro_pixels.training.step_runners import WARM_UP


@contextmanager
def tf32() -> Iterator[None]:
    """Within this context, products of float32 matrices on CUDA are rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fused_cublaslt() -> Iterator[None]:
    """Uses Triton kernels and cuBLASLt for all products within the context."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        with fused():
            yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Returns seconds of the paper preset's step with the paper's guide for each N, by N and variant."""
    config = replace(PRESETS["paper"], guide="recurrent")
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {"as it is": nullcontext}
    if watch.device.type == "cuda":
        variants |= {"with fused kernels": fused, "with fused kernels and cuBLASLt": fused_cublaslt}
    found = {}
    with tf32():
        for N in config.data.n_objects:
            steps = {name: make_step(OurStep, with_objects(config, N), watch.device) for name in variants}
            calls = {name: within(variants[name], step) for name, step in steps.items()}
            for call in calls.values():
                for _ in range(WARM_UP + 1 if watch.device.type == "cuda" else 0):  # recorded before it is timed
                    call()
            found[f"N = {N}"] = watch.compare(calls)
    return {"seconds": found}
