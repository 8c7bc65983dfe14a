"""The Triton kernels: run by Triton's interpreter, and replaced where they cannot be used."""

import os
import subprocess
import sys

import pytest
import torch

from pyro_pixels.guides import following, fused, recurrence
from pyro_pixels.guides.recurrence import _Recurrence, recur_reference

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from pyro_pixels.guides import following, fused_following, fused_recurrence, recurrence
FusedRecurrence = fused_recurrence.FusedRecurrence
print(recurrence.largest_difference(FusedRecurrence, torch.device("cpu")))
print(following.largest_difference(fused_following.follow, torch.device("cpu")))
for N, T, B, D in ((1, 1, 1, 3), (1, 4, 2, 6), (2, 1, 3, 5), (3, 5, 2, 6), (4, 2, 1, 1025)):
    torch.manual_seed(0)
    scale = D ** -0.5
    inputs = [(torch.randn(shape) * scale).requires_grad_() for shape in ((T, B, 2 * D), (N, B, D), (2 * D, 2 * D))]
    found = []
    for function in (FusedRecurrence.apply, recurrence.recur_reference):
        s = function(*inputs)
        found.append([s, *torch.autograd.grad((3 * s).cos().sum(), inputs)])
    print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found)))
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
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, _Recurrence, recurrence._fused, recurrence.largest_difference) is _Recurrence
    plain = following.follow_reference
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, plain, following._fused, following.largest_difference) is plain


def test_a_recursion_that_computes_something_else_is_found_out():
    largest_difference = recurrence.largest_difference
    assert largest_difference(_Recurrence, CPU) == 0

    class ForgetsTheGradientOfImages(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch.enable_grad():
                ctx.inputs = [x.detach().requires_grad_() for x in inputs]
                ctx.states = recur_reference(*ctx.inputs)
            return ctx.states.detach()

        @staticmethod
        def backward(ctx, grad_s):
            from_image, s_0, W = torch.autograd.grad(ctx.states, ctx.inputs, grad_s)
            return 0.9 * from_image, s_0, W

    assert largest_difference(ForgetsTheGradientOfImages, CPU) > 0.01

    class GivesNaN(ForgetsTheGradientOfImages):
        @staticmethod
        def backward(ctx, grad_s):
            return tuple(torch.full_like(x, torch.nan) for x in ctx.inputs)

    assert not largest_difference(GivesNaN, CPU) < 1e-4


def test_tracks_that_are_followed_otherwise_are_found_out():
    """Each argument matters to the comparison, and NaN is not taken for agreement."""
    plain = following.follow_reference

    def no_clutter(forecasts, tracks, *rest):
        return plain(forecasts, tracks._replace(clutter=0.0), *rest)

    def no_claims(forecasts, tracks, pixels, claim, *rest):
        return plain(forecasts, tracks, pixels, 0 * claim, *rest)

    def all_present(*args):
        return plain(*args[:4], torch.zeros_like(args[4]), args[5])

    def other_orders(*args):
        return plain(*args[:5], args[5].flip(0))

    assert following.largest_difference(plain, CPU) == 0
    for wrong in (no_clutter, no_claims, all_present, other_orders):
        assert following.largest_difference(wrong, CPU) > 10 * fused.TOLERANCE

    def gives_nan(*args):
        return plain(*args) * torch.nan

    with pytest.warns(UserWarning, match="differ by nan from those of plain operations"):
        assert fused.checked(CPU, plain, lambda: gives_nan, following.largest_difference) is plain
