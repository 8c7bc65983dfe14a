"""One training step - forward, backward, optimiser - in one process, in several, or as a CUDA graph.

A step consists of thousands of small kernels, so on a GPU an ordinary Pyro program is limited by Python overhead.
`CapturedSteps` runs a few ordinary steps, then records one as a CUDA graph and replays it. The only requirement is that
model and guide do not wait for the device. If one does, the recording fails, and training continues with ordinary steps
after a warning with the reason. tests/pretend_device.py lists the operations that cannot be recorded, and its pretended
device finds them on a CPU.
"""

import contextlib
import gc
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
import torch.distributed as processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_pixels._batch import Known, knowing
from pyro_pixels.lgssm.sharing import computing_beside
from pyro_pixels.training.elbo import AnnealedELBO

WARM_UP = 3  # ordinary steps before a recording, which load libraries and create the optimiser's state


class Batch(NamedTuple):
    """The data and the seed of a training step."""

    images: Tensor  # (n, T, H, W), all sequences, on the device
    n_objects: Tensor  # (n,), on the device
    index: Tensor  # (B,), the sequences of the batch, on the CPU
    known: Known  # sizes, for any batch of this kind
    seed: int  # for this step
    tracks: Tensor | None = None  # (n, N, T, 2), on the device, for objectives that learn from tracks


class Steps:
    """Ordinary steps that maximise the weighted bound per sequence.

    Args:
        elbo: the objective; `set` changes its ``kl_weight``.
        loss: the module ``elbo(model, guide)``.
        learning_rate: Adam's learning rate, before the factor of each group.
        factors: maps factors on the learning rate to their groups of parameters.
        clip_norm: the largest gradient norm; larger gradients are scaled down to it.
        parts: the number of parts that a batch is processed in, one after the other, with their gradients added up:
            less memory, more time. Each part has its own seed, so its samples do not depend on the process.
    """

    def __init__(
        self,
        elbo: AnnealedELBO,
        loss: nn.Module,
        learning_rate: float,
        factors: dict[float, list[nn.Parameter]],
        *,
        clip_norm: float | None = None,
        parts: int = 1,
    ) -> None:
        self.elbo, self.loss, self.clip_norm, self.parts = elbo, loss, clip_norm, parts
        self.parameters = [p for group in factors.values() for p in group]
        self.optimizer = torch.optim.Adam(
            [{"params": group, "factor": factor} for factor, group in factors.items()],
            lr=learning_rate,
            fused=True,
            **self._adam_options(),
        )
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.parameters[0].device)
        """(2,), sums over steps of the mean log p(v | a) and the mean KL over a batch, in nats per sequence."""

    def _adam_options(self) -> dict[str, Any]:
        return {}

    def set(self, kl_weight: float, learning_rate: float) -> None:
        """Sets the KL weight and the learning rate of the next steps."""
        self.elbo.kl_weight = kl_weight
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]

    def take(self, batch: Batch) -> None:
        """Takes one step."""
        self.optimizer.zero_grad()
        for i, index in enumerate(self._split(batch.index)):
            self._add_gradient(self.loss, batch, i, index)
        self._move()

    def _split(self, index: Tensor) -> Sequence[Tensor]:
        """Returns the parts of a batch, nearly equal in size; single sequences if there are fewer of them than parts.

        `torch.chunk` may return fewer parts than asked for, which would leave a process without one.
        """
        return index.tensor_split(min(self.parts, len(index)))

    def parts_that_fit(self, batch: Batch, free: float) -> int:
        """Returns the fewest parts with which a step fits in ``free`` bytes, estimated from 1 and from 2 sequences."""
        needs = []
        for n in (1, 2):
            self.optimizer.zero_grad()
            before = self._memory_in_use()
            with knowing(batch.known):
                self._add_gradient(self.loss, batch, 0, batch.index[:n])
            needs.append(self._memory_in_use(peak=True) - before)
        self.optimizer.zero_grad()
        each = max(1.0, needs[1] - needs[0])
        at_once = int((free - (needs[0] - each)) // each)
        return -(-len(batch.index) // max(1, at_once))

    def _memory_in_use(self, *, peak: bool = False) -> float:
        """Returns the bytes that torch has allocated on the device, or with ``peak`` the most since the last call."""
        device = self.totals.device
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context to take steps in: a separate CUDA stream, or none."""
        return contextlib.nullcontext()

    def read_totals(self) -> Tensor:
        """Returns `totals` (2,) on the CPU, summed over all processes, after waiting for the steps to finish."""
        return self.totals.cpu()

    def seed(self, seed: int) -> None:
        """Seeds the random numbers of steps on a CUDA device; on a CPU the caller seeds them."""

    def random_state(self) -> Tensor | None:
        """Returns the state of these steps' own random generator, or None if they have none."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Restores a `random_state`."""

    def _add_gradient(self, loss: nn.Module, batch: Batch, part: int, index: Tensor, weight: float = 1.0) -> None:
        """Adds the gradient of a part's share of the mean loss over the batch, times ``weight``."""
        self._seed(batch, part)
        chosen, n = index.to(batch.images.device, non_blocking=True), len(batch.index)
        given = [x.index_select(0, chosen) for x in (batch.images, batch.n_objects, batch.tracks) if x is not None]
        value = loss(*given)
        if not value.requires_grad:
            raise ValueError(
                "the loss depends on no parameter that is trained in this step; change learn_from or requires_grad"
            )
        (value * (weight / n)).backward()
        terms = self.elbo.terms
        assert terms is not None
        self.totals += torch.stack([terms.log_likelihood.sum(), terms.kl.sum()]) / n

    def _seed(self, batch: Batch, part: int) -> None:
        if self.parts > 1:
            torch.manual_seed((batch.seed * 1_009 + part) % 2**63)

    def _move(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()

    def _learning(self) -> frozenset[int]:
        """Returns the indices of the parameters that are not frozen."""
        return frozenset(i for i, p in enumerate(self.parameters) if p.requires_grad)


class DistributedSteps(Steps):
    """Steps whose parts are shared among the processes of a `torchrun`, with gradients averaged by PyTorch.

    ``parts`` must be a multiple of the number of processes. The results are those of `Steps` with as many parts.
    """

    _wrapped: tuple[frozenset[int], DistributedDataParallel] | None = None

    def take(self, batch: Batch) -> None:
        rank, world, loss = processes.get_rank(), processes.get_world_size(), self._shared_loss()
        mine = list(enumerate(self._split(batch.index)))[rank::world]
        self.optimizer.zero_grad()
        for i, index in mine:
            last = i == mine[-1][0]
            with contextlib.nullcontext() if last else loss.no_sync():
                self._add_gradient(loss, batch, i, index, weight=world)  # the processes' gradients are averaged
        self._move()

    def read_totals(self) -> Tensor:
        totals = self.totals.clone()
        processes.all_reduce(totals)
        return totals.cpu()

    def _shared_loss(self) -> DistributedDataParallel:
        """Returns the loss wrapped for the parameters that are trained now; another set needs a new wrapper."""
        learning = self._learning()
        if self._wrapped is None or self._wrapped[0] != learning:
            self._wrapped = learning, DistributedDataParallel(self.loss, find_unused_parameters=True)
        return self._wrapped[1]


class CapturedSteps(Steps):
    """Steps on a CUDA device; each kind of step is recorded as a CUDA graph once and replayed from then on.

    Quantities that change from step to step (the sequences, the KL weight, the learning rate) are read from tensors
    that are written before each replay. Changes of the program (which parameters are trained, the number of sequences,
    the largest N) need a new recording. So do new tensors of all sequences, because a recording reads the memory of the
    tensors it was made with, and keeps them alive.

    These steps have their own random state. A failed recording makes the generator state it used unusable, along with
    all other recordings made with that state, so no two trainings share one.
    """

    refused: str | None = None
    """The reason why steps are not recorded; None while they are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stream, self._beside = (torch.cuda.Stream(self.totals.device) for _ in range(2))
        self._memory = torch.cuda.graph_pool_handle()  # shared by all recordings, as no two are replayed at once
        self._taken: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._random = self._generator().clone_state()

    def _adam_options(self) -> dict[str, Any]:
        return {"capturable": True}

    def _generator(self) -> torch.Generator:
        """Returns the device's default generator, which draws all random numbers of a step."""
        return torch.cuda.default_generators[self.totals.device.index]

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self.totals.device))
        generator = self._generator()
        others = generator.graphsafe_get_state()
        generator.graphsafe_set_state(self._random)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            generator.graphsafe_set_state(others)

    def read_totals(self) -> Tensor:
        torch.cuda.current_stream(self.totals.device).wait_stream(self._stream)
        return super().read_totals()

    def seed(self, seed: int) -> None:
        self._random.manual_seed(seed)

    def random_state(self) -> Tensor:
        return self._random.get_state()

    def set_random_state(self, state: Tensor) -> None:
        self._random.set_state(state)

    def _seed(self, batch: Batch, part: int) -> None:
        """Does nothing: a recording cannot be seeded, and its random numbers continue from the previous step."""

    def set(self, kl_weight: float, learning_rate: float) -> None:
        device = self.totals.device
        if not isinstance(self.elbo.kl_weight, Tensor):
            self.elbo.kl_weight = torch.zeros((), device=device)
        self.elbo.kl_weight.fill_(kl_weight)
        for group in self.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.zeros((), device=device)
            group["lr"].fill_(learning_rate * group["factor"])

    def take(self, batch: Batch) -> None:
        settings = tuple(getattr(self.elbo, name) for name in self.elbo.settings)
        held = tuple(id(x) for x in (batch.images, batch.n_objects, batch.tracks))
        kind = (len(batch.index), batch.known, self._learning(), settings, held)
        if self.refused is None and kind not in self._recorded and self._taken.get(kind, 0) >= WARM_UP:
            self._record(kind, batch)
        if kind in self._recorded:
            graph, recorded = self._recorded[kind]
            recorded.index.copy_(batch.index, non_blocking=True)
            graph.replay()
            return
        self._taken[kind] = self._taken.get(kind, 0) + 1
        self._take_as_recorded(batch)

    def _take_as_recorded(self, batch: Batch) -> None:
        """Takes an ordinary step that reads nothing from the device, without Pyro's validation of every value."""
        with knowing(batch.known), pyro.validation_enabled(False), computing_beside(self._beside):
            super().take(batch)

    def _record(self, kind: Hashable, batch: Batch) -> None:
        graph, batch = torch.cuda.CUDAGraph(), batch._replace(index=batch.index.to(self.totals.device))
        kept = self._generator().clone_state()
        torch.cuda.synchronize(self.totals.device)
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
                self._take_as_recorded(batch)
        except Exception as error:  # model, guide or driver can raise anything
            self.refused = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            self._recorded[kind] = graph, batch
            return
        self._recover(graph, kept)
        warnings.warn(
            f"steps are not recorded as a CUDA graph but run one by one, which is slower: {self.refused}",
            stacklevel=3,
        )

    def _recover(self, graph: torch.cuda.CUDAGraph, kept: torch.Generator) -> None:
        """Cleans up after a failed recording: restores the random state, frees its memory and drops all recordings.

        Otherwise the generator would stay in its recording state and refuse to draw.
        """
        self._generator().graphsafe_set_state(kept.graphsafe_get_state())
        self._random = kept
        self._beside = torch.cuda.Stream(self.totals.device)
        self._recorded.clear()  # earlier recordings hold the lost random state
        self.optimizer.zero_grad()
        self.elbo.terms = None
        graph.reset()
        device = self.totals.device
        with contextlib.suppress(RuntimeError, AttributeError):  # if torch has already done so itself
            torch._C._cuda_endAllocateToPool(device.index, self._memory)  # type: ignore[attr-defined]
            torch._C._cuda_releasePool(device.index, self._memory)  # type: ignore[attr-defined]
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def steps_for(device: torch.device, n_processes: int) -> type[Steps]:
    """Returns the class of steps for a device and a number of processes."""
    if n_processes > 1:
        return DistributedSteps
    return CapturedSteps if device.type == "cuda" else Steps
