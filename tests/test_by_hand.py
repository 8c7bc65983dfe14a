"""What is written by hand beside its plain reference: values and gradients, and a whole step without each."""

import copy

import pytest
import torch
from test_census import small

from benchmarks.by_hand import PIECES, plain
from pyro_pixels.guides.recurrence import recur, recur_reference
from pyro_pixels.guides.structured import factor_sum, solve_sum, solve_sum_reference
from pyro_pixels.runs import build
from pyro_pixels.training.elbo import AnnealedELBO
from pyro_pixels.worlds.base import simulate


def same(function, reference, *inputs):
    """Values and gradients along a random direction, in float64."""
    found = []
    for each in (function, reference):
        x = [i.detach().clone().requires_grad_() for i in inputs]
        out = each(*x)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(9)
        gradients = torch.autograd.grad(sum((o * torch.randn_like(o)).sum() for o in out), x)
        found.append((*out, *gradients))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def spd(*shape):
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("N, T", [(1, 1), (1, 4), (3, 5)])
def test_recurrence(N, T):
    torch.manual_seed(0)
    shapes = ((T, 2, 6), (N, 2, 3), (6, 6))
    same(recur, recur_reference, *(torch.randn(*shape, dtype=torch.float64) for shape in shapes))


def test_solve_sum():
    torch.manual_seed(0)
    C, R, b = spd(6), torch.rand(5, 3, 6, dtype=torch.float64) + 0.1, torch.randn(5, 3, 6, 4, dtype=torch.float64)
    symmetric = lambda C: (C + C.mT) / 2  # noqa: E731
    same(
        lambda C, R, b: solve_sum(symmetric(C), R, b, factor_sum(symmetric(C), R)),
        lambda C, R, b: solve_sum_reference(symmetric(C), R, b, None), C, R, b,
    )  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_a_step_without_it_has_the_same_gradient(piece):
    config = small("structured")
    run, data = build(config), simulate(config.data, 6, seed=0)
    gradients = []
    for without in (False, True):
        model = copy.deepcopy(run)
        loss = AnnealedELBO(2.0)(model.model, model.guide)
        torch.manual_seed(1)
        if without:
            with plain(piece):
                loss(data.images, data.n_objects).backward()
        else:
            loss(data.images, data.n_objects).backward()
        gradients.append([p.grad for p in loss.parameters()])
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=1e-4)
