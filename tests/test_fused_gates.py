"""The recursion's elementwise kernels in Triton: run by its interpreter, and replaced where they cannot be used."""

import os
import subprocess
import sys

import pytest
import torch

from pyro_pixels.guides import recurrence
from pyro_pixels.guides.recurrence import PLAIN, Elementwise, Later, largest_difference

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from pyro_pixels.guides import fused_gates, recurrence
fused = recurrence.Elementwise(fused_gates.gate, fused_gates.gate_backward)
print(recurrence.largest_difference(fused, torch.device("cpu")))
recurrence._elementwise = lambda x: fused
torch.manual_seed(0)
N, T, B, D = 3, 5, 2, 6
inputs = [torch.randn(*shape, requires_grad=True) for shape in ((T, B, 2 * D), (N, B, D), (2 * D, 2 * D))]
found = []
for function in (recurrence.recur, recurrence.recur_reference):
    s = function(*inputs)
    found.append([s, *torch.autograd.grad(s.cos().sum(), inputs)])
print(max(float((a - b).abs().max()) for a, b in zip(*found)))
"""


def test_triton_computes_what_torch_does():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 1e-5


def test_kernels_that_cannot_run_are_replaced(monkeypatch):
    """On a CPU there is no Triton, or it cannot compile: one warning, and the plain ones."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="fused kernels are not used"):
        assert recurrence._fused.__wrapped__(CPU) is PLAIN


def test_kernels_that_compute_something_else_are_found_out():
    assert largest_difference(PLAIN, CPU) == 0

    def without_slope(g, slope, grad_gate, later):
        PLAIN.gate_backward(g, torch.ones_like(slope), grad_gate, later)

    def nothing_directly(g, slope, grad_gate, later):
        PLAIN.gate_backward(g, slope, grad_gate, Later(*(x[:0] for x in later)))

    for wrong in (without_slope, nothing_directly):
        assert largest_difference(Elementwise(PLAIN.gate, wrong), CPU) > 0.1
