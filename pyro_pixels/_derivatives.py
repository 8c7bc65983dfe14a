"""Second derivatives of functions whose gradient is written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    reference: Callable[..., Any], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of a plain function in a way that can be differentiated again.

    For the backward pass of an autograd function that is run with ``create_graph=True``: torch's
    ``once_differentiable`` would let some callers take second derivatives for zero.

    Args:
        reference: computes the same function in differentiable operations.
        inputs: its inputs, as saved for the backward pass.
        grad_outputs: the gradients of its outputs; None for those without.

    Returns:
        A gradient for each input; None for those that need none.
    """
    with torch.enable_grad():
        outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and y.requires_grad]
        wanted = [x for x in inputs if x.requires_grad]
        if not given or not wanted:
            return (None,) * len(inputs)
        ys, gs = zip(*given)
        found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
