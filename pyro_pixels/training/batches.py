"""The mini-batches of training (Sec 3.2)."""

import torch
from torch import Tensor

from pyro_pixels._batch import Known
from pyro_pixels.data import ImageSequences
from pyro_pixels.training.schedule import Schedule


class Batches:
    """The mini-batches of a training run, determined by seed and step alone, so that a resumed run draws the same ones.

    Args:
        data: the training sequences.
        schedule: sets the batch size, whether N is the same within a batch, and the number of steps with N = 1 only.
        seed: seeds the order of the sequences.

    Raises:
        ValueError: if the schedule starts with single objects and no sequence has N = 1.
    """

    def __init__(self, data: ImageSequences, schedule: Schedule, seed: int) -> None:
        self.schedule, self.seed, self.n_objects = schedule, seed, data.n_objects
        by_n = [(data.n_objects == n).nonzero().squeeze(1) for n in data.n_objects.unique()]
        single = (data.n_objects == 1).nonzero().squeeze(1)
        if schedule.single_object_steps and not len(single):
            raise ValueError("single_object_steps is set but no sequence has N = 1; set it to 0 or add such sequences")
        self._pools = {True: [single], False: by_n if schedule.one_n_per_batch else [torch.arange(len(data))]}
        self.most_white = data.images.shape[2] * data.images.shape[3]
        """An upper bound on the number of non-black pixels in a frame as the guide sees it (`Known`)."""
        self._epoch: tuple[bool, int] | None = None
        self._order: list[Tensor] = []

    @property
    def fewest(self) -> int:
        """The number of sequences in the smallest batch."""
        used = [False, True] if self.schedule.single_object_steps else [False]
        return min(self.schedule.batch_size, *(len(pool) for alone in used for pool in self._pools[alone]))

    def index(self, step: int) -> Tensor:
        """Returns the indices (B,) of the sequences used in a step.

        An epoch uses every sequence once, except those left over that do not fill a batch.
        """
        alone = step < self.schedule.single_object_steps
        pools, size = self._pools[alone], self.schedule.batch_size
        per_epoch = sum(max(1, len(pool) // size) for pool in pools)
        epoch, place = divmod(step - (0 if alone else self.schedule.single_object_steps), per_epoch)
        if self._epoch != (alone, epoch):
            generator = torch.Generator().manual_seed((self.seed * 2 + alone) * 1_000_003 + epoch)
            shuffled = [pool[torch.randperm(len(pool), generator=generator)] for pool in pools]
            batches = [b for pool in shuffled for b in pool.split(size) if len(b) == min(size, len(pool))]
            order = torch.randperm(len(batches), generator=generator).tolist()
            self._epoch, self._order = (alone, epoch), [batches[i] for i in order]
        return self._order[place]

    def known(self, index: Tensor) -> Known:
        """Returns the sizes that a recorded step may assume for these sequences and every other batch of this kind."""
        n_objects = self.n_objects[index] if self.schedule.one_n_per_batch else self.n_objects
        return Known(int(n_objects.max()), self.most_white)
