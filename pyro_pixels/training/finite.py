"""Numbers that are none: training stops at the first, and a checkpoint is written only where there are none.

A loss is that of the weights before a step. So the loss of the weights that are to be kept is looked at by itself,
on a few sequences, before they are; what is random in it has random numbers of its own, and training's go on as if
nobody had looked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_pixels.training.states import first_not_finite

GOOD_SEQUENCES = 20  # on which the loss of the weights to be kept is looked at


def what_is_not_finite(
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    given: Sequence[Tensor],
) -> str | None:
    """What is not finite of weights that are to be kept: the name of one, or the loss; None if all is well.

    Args:
        modules: whose weights they are.
        optimizer: what it keeps counts, too.
        loss: called with ``given``, the images first.
    """
    bad = first_not_finite(modules, optimizer)
    if bad is not None:
        return bad
    cuda = [given[0].device] if given[0].device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), _evaluating(*modules.values()):
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
    """Errors that are but the consequence of a number that is none, such as those of a Categorical or of a Cholesky
    factor, become a FloatingPointError that says which number it is."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        bad = first_not_finite(modules)
        if bad is None and not _is_of_numbers(error):
            raise
        raise FloatingPointError(say(bad or "the loss")) from None


def _is_of_numbers(error: Exception) -> bool:
    """Whether an error is what torch says of NaN and infinity in probabilities and matrices."""
    said = str(error)
    return isinstance(error, torch.linalg.LinAlgError) or any(
        words in said for words in ("contains either `inf`, `nan` or element < 0", "invalid multinomial distribution")
    )


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, in which those with running averages leave them alone; then as they were."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
