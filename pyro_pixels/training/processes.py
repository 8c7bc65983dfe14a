"""The processes of a `torchrun` that share one training."""

import torch.distributed as distributed


def n_processes() -> int:
    """How many processes share the training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the process that writes the files of a run."""
    return n_processes() == 1 or distributed.get_rank() == 0
