"""The recursion of Eq (8) as it is written there, cell by cell: the reference for the fast ones."""

import torch
from torch import Tensor


def recur_reference(from_image: Tensor, s_0: Tensor, W: Tensor) -> Tensor:
    """Computes the states of `recurrence.recur`, from the same arguments, with gradients by autograd."""
    (T, _, _), (N, _, D) = from_image.shape, s_0.shape
    states, nobody = [], torch.zeros_like(s_0[0])
    for n in range(N):
        s, row = s_0[n], []
        for t in range(T):
            before = states[n - 1][t] if n > 0 else nobody
            beta, s_hat = (from_image[t] + torch.cat([s, before], -1) @ W.mT).split(D, -1)
            s = torch.lerp(before, s_hat.tanh(), beta.sigmoid())
            row.append(s)
        states.append(row)
    return torch.stack([torch.stack(row) for row in states])
