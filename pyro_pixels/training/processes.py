"""The processes of a `torchrun` that share one training."""

import torch.distributed as distributed


def n_processes() -> int:
    """Returns the number of processes that share the training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Tells whether this process writes the files of a run."""
    return n_processes() == 1 or distributed.get_rank() == 0
