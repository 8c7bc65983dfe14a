"""Times the paper's step as `train.py` takes it on CUDA, with products in TF32, with other kernels alternating."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from benchmarks.by_hand import Variants, fused, steps_within
from benchmarks.steps import with_objects
from benchmarks.timing import Stopwatch
from pyro_pixels._fused import matmul_precision
from pyro_pixels.presets import PRESETS


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
    variants: Variants = {"as it is": nullcontext}
    if watch.device.type == "cuda":
        variants |= {"with fused kernels": fused, "with fused kernels and cuBLASLt": fused_cublaslt}
    with matmul_precision("high"):
        return {
            "seconds": {
                f"N = {N}": watch.compare(steps_within(variants, with_objects(config, N), watch.device))
                for N in config.data.n_objects
            }
        }
