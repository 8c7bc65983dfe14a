"""Detection of NaN and infinity: training stops at the first, and they never reach a checkpoint.

The loss of a training step belongs to the weights before that step. So before weights are saved, their own loss is
evaluated on a few sequences. This uses separate random numbers and does not change those of training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_pixels.training.modes import evaluating
from pyro_pixels.training.states import first_not_finite

GOOD_SEQUENCES = 20  # on which the loss is evaluated before weights are saved


def what_is_not_finite(
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    given: Sequence[Tensor],
) -> str | None:
    """Returns the name of a value that is not finite, or "the loss"; None if weights and loss are all finite.

    Args:
        modules: the modules whose weights are to be saved.
        optimizer: its state is checked, too.
        loss: called with ``given``.
        given: the arguments of ``loss``, the images first.
    """
    bad = first_not_finite(modules, optimizer)
    if bad is not None:
        return bad
    cuda = [given[0].device] if given[0].device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), evaluating(*modules.values()):
        torch.manual_seed(0)
        try:
            value = float(loss(*given))
        except (RuntimeError, ValueError) as error:  # such as a Categorical of NaN
            if not _is_of_numbers(error):
                raise
            return "the loss"
    return None if math.isfinite(value) else "the loss"


@contextmanager
def saying_what_is_not_finite(modules: Mapping[str, nn.Module], say: Callable[[str], str]) -> Iterator[None]:
    """Turns errors caused by NaN or infinity, such as those of a Categorical or a Cholesky factor, into a
    FloatingPointError with the message ``say(name of the value)``."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        bad = first_not_finite(modules)
        if bad is None and not _is_of_numbers(error):
            raise
        raise FloatingPointError(say(bad or "the loss")) from None


def _is_of_numbers(error: Exception) -> bool:
    """Tells whether an error is one that torch raises for NaN and infinity in probabilities and matrices."""
    said = str(error)
    return isinstance(error, torch.linalg.LinAlgError) or any(
        words in said for words in ("contains either `inf`, `nan` or element < 0", "invalid multinomial distribution")
    )
