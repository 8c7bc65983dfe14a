"""Times a training step, from batch selection to update, of pyro_pixels and of examples/paper_in_pyro.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from benchmarks.paper_weights import paper_program
from benchmarks.timing import MatrixProduct, Stopwatch, product_flops
from pyro_pixels import _fused as kernels
from pyro_pixels._batch import Known, most_white
from pyro_pixels._fused import matmul_precision
from pyro_pixels.config import RunConfig
from pyro_pixels.data import ImageSequences
from pyro_pixels.guides.recurrent import RecurrentGuide
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import Run, build
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.training.step_runners import Batch, CapturedSteps, Steps
from pyro_pixels.worlds.base import simulate

KL_WEIGHT = 2.0  # not 1, so that the cost of weighting is included
LITERAL, OURS, STRUCTURED, PRODUCT = "literal Pyro", "pyro_pixels", "pyro_pixels, quick preset", "matrix product"


class Step(ABC):
    """Training steps of a program; each call takes one."""

    def __init__(self, data: ImageSequences, batch_size: int, device: torch.device) -> None:
        self._images, self._n_objects = data.images.to(device), data.n_objects.to(device)
        self._batch_size, self._device = batch_size, device
        self._generator = torch.Generator().manual_seed(0)

    def _index(self) -> Tensor:
        return torch.randperm(len(self._images), generator=self._generator)[: self._batch_size]

    @abstractmethod
    def __call__(self) -> None: ...


class OurStep(Step):
    """A step of `pyro_pixels.fit` with one learning rate for all parameters; on CUDA a recorded graph."""

    def __init__(self, run: Run, data: ImageSequences, device: torch.device) -> None:
        super().__init__(data, run.config.schedule.batch_size, device)
        elbo, self._learning_rate = AnnealedELBO(), run.config.schedule.learning_rate
        loss = elbo(run.model, run.guide)
        kind = CapturedSteps if device.type == "cuda" else Steps
        parts = run.config.schedule.parts
        self._steps = kind(elbo, loss, self._learning_rate, {1.0: list(loss.parameters())}, parts=parts)
        self._known = Known(int(data.n_objects.max()), most_white(data.images.flatten(2)))

    def __call__(self) -> None:
        with pyro.validation_enabled(False), self._steps.stream():
            self._steps.set(KL_WEIGHT, self._learning_rate)
            self._steps.take(Batch(self._images, self._n_objects, self._index(), self._known, seed=0))


class LiteralStep(Step):
    """``SVI.step`` of examples/paper_in_pyro.py. Parameters are in Pyro's global store, so use one at a time."""

    def __init__(self, run: Run, data: ImageSequences, device: torch.device) -> None:
        super().__init__(data, run.config.schedule.batch_size, device)
        assert isinstance(run.guide, RecurrentGuide)
        pyro.clear_param_store()
        program = paper_program(run.model, run.guide).to(device)
        adam = pyro.optim.Adam({"lr": run.config.schedule.learning_rate})  # type: ignore[attr-defined]
        self._svi = SVI(program.model, program.guide, adam, loss=Trace_ELBO())

    def __call__(self) -> None:
        with pyro.validation_enabled(True):
            index = self._index().to(self._device)
            self._svi.step(self._images[index].flatten(2).float(), self._n_objects[index], KL_WEIGHT)


def make_step(kind: type[OurStep] | type[LiteralStep], config: RunConfig, device: torch.device) -> Step:
    """Returns a step on simulated sequences of a configuration."""
    run = build(config)
    run.model.to(device)
    run.guide.to(device)
    return kind(run, simulate(config.data, 3 * config.schedule.batch_size, seed=0), device)


def programs(preset: str, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Returns, by name, a function that makes each of the steps compared, at the sizes of a preset.

    All but `STRUCTURED` have the paper's guide, with the renderer's state size. A batch mixes N = 1, 2, 3 or has one N.
    """
    config = replace(PRESETS[preset], guide="recurrent", guide_state_size=None)
    found = {
        LITERAL: partial(make_step, LiteralStep, config, device),
        OURS: partial(make_step, OurStep, config, device),
    }
    alone = {OURS: config} | ({STRUCTURED: PRESETS[preset]} if preset == "quick" else {})
    for name, of in alone.items():
        for N in config.data.n_objects:
            found[f"{name}, N = {N}"] = partial(make_step, OurStep, with_objects(of, N), device)
    return found


def with_objects(config: RunConfig, N: int) -> RunConfig:
    """Returns the configuration with N objects in every sequence."""
    return replace(config, data=replace(config.data, n_objects=(N,)))


@contextmanager
def without_kernels() -> Iterator[None]:
    """Uses torch operations instead of Triton kernels within the context."""
    before, kernels.ENABLED = kernels.ENABLED, False
    try:
        yield
    finally:
        kernels.ENABLED = before


def measure(watch: Stopwatch, preset: str) -> dict[str, Any]:
    """Returns times and operations of each step at the sizes of a preset, and of a matrix product.

    On CUDA all of them may use TF32, as in `train.py`.
    """
    calls: dict[str, Callable[[], object]] = {name: make() for name, make in programs(preset, watch.device).items()}
    calls[PRODUCT] = MatrixProduct(watch.device)
    precision = matmul_precision("high") if watch.device.type == "cuda" else nullcontext()
    config = PRESETS[preset]
    sizes = {
        "H": config.data.height, "W": config.data.width, "T": config.data.n_frames,
        "B": config.schedule.batch_size, "D": config.state_size,
    }  # fmt: skip
    with precision:
        with without_kernels():  # whose products torch does not count
            flops = {name: product_flops(call) for name, call in calls.items()}
        return {"sizes": sizes, "flops": flops, "seconds": watch.compare(calls)}
