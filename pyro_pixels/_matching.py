"""Which object of one set of tracks is which of another: the assignment with the smallest mean distance."""

import scipy
import torch
from torch import Tensor


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns the mean distance over time (B, N, N) between object i of ``a`` and object j of ``b``, (B, N, T, 2).

    Frames where either is NaN do not count.
    """
    return (a.unsqueeze(2) - b.unsqueeze(1)).norm(dim=-1).nanmean(-1)


def assign(predicted: Tensor, truth: Tensor, n_objects: Tensor) -> Tensor:
    """Finds the best one-to-one assignment of each sequence, by mean distance over the frames with a true position.

    Args:
        predicted: (B, N, T, 2).
        truth: (B, N, T, 2). A track that is NaN in all frames, in either, fits every other equally well.
        n_objects: (B,).

    Returns:
        The order (B, N) int64: ``predicted[b, order[b, n]]`` belongs to ``truth[b, n]``; absent objects stay in place.
    """
    costs = pairwise_distances(predicted.detach(), truth)
    costs = costs.masked_fill(costs.isnan(), 0.0)
    order = torch.arange(predicted.shape[1]).repeat(len(predicted), 1)
    for b, n in enumerate(n_objects.tolist()):
        rows, columns = scipy.optimize.linear_sum_assignment(costs[b, :n, :n].numpy())
        order[b, torch.from_numpy(columns)] = torch.from_numpy(rows)
    return order


def reorder(a: Tensor, order: Tensor) -> Tensor:
    """Puts the objects of ``a`` (B, N, ...) in the order (B, N) that `assign` returned."""
    return a[torch.arange(len(a)).unsqueeze(1), order]
