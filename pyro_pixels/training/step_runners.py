"""One step of training - forward, backward, optimiser - in one process, in several, or as a CUDA graph.

On a GPU an ordinary Pyro program waits for Python: a step is thousands of small kernels. `CapturedSteps` lets Pyro run
a few steps as they are, then records one as a CUDA graph and replays it. Nothing is asked of model or guide but that
they do not wait for the device; where one does, the recording fails, and steps go on as before, with a warning that
says why. What a recording cannot hold is listed in tests/pretend_device.py, whose pretended device shows it on a CPU.
"""

import contextlib
import gc
import warnings
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
import torch.distributed as processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_pixels._batch import Known, knowing
from pyro_pixels.training.elbo import AnnealedELBO

WARM_UP = 3  # steps before a recording: libraries are loaded, and the optimiser's state is made


class Batch(NamedTuple):
    """What a step learns from."""

    images: Tensor  # (n, T, H, W), all sequences, on the device
    n_objects: Tensor  # (n,), on the device
    index: Tensor  # (B,), which of them, on the CPU
    known: Known  # of any batch of this kind
    seed: int  # of this step
    tracks: Tensor | None = None  # (n, N, T, 2), on the device, for objectives that learn from tracks


class Steps:
    """Steps that maximise the weighed bound per sequence, as Python runs them.

    Args:
        elbo: its ``kl_weight`` counts.
        loss: the module ``elbo(model, guide)``.
        learning_rate: Adam's, before the factor of its group.
        factors: (factor on the learning rate, parameters) for each group of parameters.
        clip_norm: gradients of a larger norm are scaled down to it.
        parts: a batch is gone through in so many parts, one after the other, whose gradients add up: less memory, more
            time. Each part draws its samples from a seed of its own, so that it matters not which process draws them.
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
        """Sums over steps of the mean log p(v | a) and KL of a batch's sequences, in nats."""

    def _adam_options(self) -> dict[str, Any]:
        return {}

    def set(self, kl_weight: float, learning_rate: float) -> None:
        """What the next steps use."""
        self.elbo.kl_weight = kl_weight
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]

    def take(self, batch: Batch) -> None:
        """One step."""
        self.optimizer.zero_grad()
        for i, index in enumerate(batch.index.chunk(self.parts)):
            self._add_gradient(self.loss, batch, i, index)
        self._move()

    def parts_that_fit(self, batch: Batch, free: float) -> int:
        """The fewest parts with which a step would need at most ``free`` bytes, from the needs of 1 and 2 sequences."""
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
        """Bytes that torch has in use on the device, now, or at the most since this was last asked."""
        device = self.totals.device
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Where steps are taken: in the midst of everything else, or beside it."""
        return contextlib.nullcontext()

    def read_totals(self) -> Tensor:
        """`totals` (2,) on the CPU, of all processes; waits for the steps to be done."""
        return self.totals.cpu()

    def seed(self, seed: int) -> None:
        """Where the random numbers of the device's steps begin; those of a CPU are its caller's business."""

    def random_state(self) -> Tensor | None:
        """Where the random numbers of the device's steps have come to, if they are its own."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Puts back a `random_state`."""

    def _add_gradient(self, loss: nn.Module, batch: Batch, part: int, index: Tensor, weight: float = 1.0) -> None:
        """Adds the gradient of a part's share of the mean loss of the batch's sequences, times ``weight``."""
        self._seed(batch, part)
        chosen, n = index.to(batch.images.device, non_blocking=True), len(batch.index)
        given = [x.index_select(0, chosen) for x in (batch.images, batch.n_objects, batch.tracks) if x is not None]
        (loss(*given) * (weight / n)).backward()
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
        """Which parameters learn now."""
        return frozenset(i for i, p in enumerate(self.parameters) if p.requires_grad)


class DistributedSteps(Steps):
    """Steps whose parts are shared among the processes of a `torchrun`, the gradients averaged by PyTorch's own engine.

    ``parts`` must be a multiple of the number of processes. The numbers are those of `Steps` with as many parts.
    """

    _wrapped: tuple[frozenset[int], DistributedDataParallel] | None = None

    def take(self, batch: Batch) -> None:
        rank, world, loss = processes.get_rank(), processes.get_world_size(), self._shared_loss()
        mine = list(enumerate(batch.index.chunk(self.parts)))[rank::world]
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
        """It expects the same parameters to learn always, so that it is made anew when others do."""
        learning = self._learning()
        if self._wrapped is None or self._wrapped[0] != learning:
            self._wrapped = learning, DistributedDataParallel(self.loss, find_unused_parameters=True)
        return self._wrapped[1]


class CapturedSteps(Steps):
    """Steps on a CUDA device, each kind of which is recorded as a CUDA graph once and replayed from then on.

    What changes from step to step - the sequences, the KL weight, the learning rate - is read from tensors that are
    written to before a replay. What changes the program - which parameters learn, the number of sequences, the largest
    N - asks for a recording of its own, and so do other tensors that hold all sequences: a recording reads the memory
    of those it was made with, and keeps them.

    The random numbers are these steps' own. A failed recording leaves the state of the generator that it was made with
    unusable, and every other recording with it that was made with the same state; so no two trainings share one.
    """

    refused: str | None = None
    """Why steps are not recorded; None while they are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stream = torch.cuda.Stream(self.totals.device)
        self._memory = torch.cuda.graph_pool_handle()  # of all recordings: no two are replayed at once
        self._taken: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._random = self._generator().clone_state()

    def _adam_options(self) -> dict[str, Any]:
        return {"capturable": True}

    def _generator(self) -> torch.Generator:
        """The device's default generator, which draws all numbers of a step."""
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
        """Nothing: a recording has no seeds, its random numbers go on where the last ones ended."""

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
        """A plain step that reads nothing from the device: without Pyro's validation, which looks at every value."""
        with knowing(batch.known), pyro.validation_enabled(False):
            super().take(batch)

    def _record(self, kind: Hashable, batch: Batch) -> None:
        graph, batch = torch.cuda.CUDAGraph(), batch._replace(index=batch.index.to(self.totals.device))
        kept = self._generator().clone_state()
        torch.cuda.synchronize(self.totals.device)
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
                self._take_as_recorded(batch)
        except Exception as error:  # whatever model, guide or driver object to
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
        """After a failed recording: random numbers as before it, its memory free, and none replayed from now on.

        The generator would otherwise stay in the state of a recording, in which it refuses to draw.
        """
        self._generator().graphsafe_set_state(kept.graphsafe_get_state())
        self._random = kept
        self._recorded.clear()  # what was recorded before holds the state that is lost
        self.optimizer.zero_grad()
        self.elbo.terms = None
        graph.reset()
        device = self.totals.device
        with contextlib.suppress(RuntimeError, AttributeError):  # where torch has not done so itself
            torch._C._cuda_endAllocateToPool(device.index, self._memory)  # type: ignore[attr-defined]
            torch._C._cuda_releasePool(device.index, self._memory)  # type: ignore[attr-defined]
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def steps_for(device: torch.device, n_processes: int) -> type[Steps]:
    """How steps are taken on a device by so many processes."""
    if n_processes > 1:
        return DistributedSteps
    return CapturedSteps if device.type == "cuda" else Steps
