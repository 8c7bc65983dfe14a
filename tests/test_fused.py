"""The Triton kernels: run by Triton's interpreter, and replaced where they cannot be used."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from pyro_pixels import _fused as fused
from pyro_pixels.guides import following, recurrence, untangling
from pyro_pixels.guides.recurrence import _Recurrence, recur_reference
from pyro_pixels.model import drawing, renderer

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from pyro_pixels._fused import matmul_precision
from pyro_pixels.guides import following, fused_exchanges, fused_following, fused_recurrence, recurrence, untangling
from pyro_pixels.model import drawing, fused_canvas, renderer
FusedRecurrence = fused_recurrence.FusedRecurrence
cpu = torch.device("cpu")
print(recurrence.largest_difference(recurrence._Recurrence, FusedRecurrence, cpu))
print(following.largest_difference(following.follow_reference, fused_following.follow, cpu))
print(drawing.largest_difference(renderer.draw, fused_canvas.FusedCanvas.apply, cpu))
print(untangling.largest_difference(untangling.exchange, fused_exchanges.exchange, cpu))
for precision, accuracy, sizes in (("highest", 1e-6, [1]), ("high", 2.0**-11, [1e-6, 1, 1e6])):
    for size in sizes:  # of gradients
        for N, T, B, D in ((1, 1, 1, 3), (1, 4, 2, 6), (2, 1, 3, 5), (3, 5, 2, 6), (4, 2, 1, 257), (2, 3, 40, 130)):
            torch.manual_seed(0)
            shapes = (T, B, 2 * D), (N, B, D), (2 * D, 2 * D)
            inputs = [(torch.randn(shape) * D ** -0.5).requires_grad_() for shape in shapes]
            found = []
            for function in (FusedRecurrence.apply, recurrence.recur_reference):
                with matmul_precision(precision):
                    s = function(*inputs)
                    found.append([s, *torch.autograd.grad(size * (3 * s).cos().sum(), inputs)])
            off = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(*found))
            print(1e-6 * off / accuracy)
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
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, renderer.draw, drawing._fused, drawing.largest_difference) is renderer.draw
    plain = untangling.exchange
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, plain, untangling._fused, untangling.largest_difference) is plain


def test_a_recursion_that_computes_something_else_is_found_out():
    largest_difference = partial(recurrence.largest_difference, _Recurrence)
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

    assert following.largest_difference(plain, plain, CPU) == 0
    for wrong in (no_clutter, no_claims, all_present, other_orders):
        assert following.largest_difference(plain, wrong, CPU) > 10 * fused.TOLERANCE

    def gives_nan(*args):
        return plain(*args) * torch.nan

    with pytest.warns(UserWarning, match="differ by nan from those of plain operations"):
        assert fused.checked(CPU, plain, lambda: gives_nan, following.largest_difference) is plain


def test_a_canvas_drawn_otherwise_is_found_out():
    """Positions, the mask and each weight matter to the comparison."""
    draw = renderer.draw

    def all_present(a, present, *weights):
        return draw(a, torch.ones_like(present), *weights)

    def without(i):
        def wrong(a, present, *weights):
            return draw(a, present, *(w.detach() if i == n else w for n, w in enumerate(weights)))

        return wrong

    def other_order(a, present, *weights):
        return draw(a.flip(1), present.flip(1), *weights)

    assert drawing.largest_difference(draw, draw, CPU) == 0
    for wrong in (all_present, other_order):
        assert drawing.largest_difference(draw, wrong, CPU) > 10 * fused.TOLERANCE
    for i in range(5):
        with pytest.raises(RuntimeError, match="not have been used"):
            drawing.largest_difference(draw, without(i), CPU)


def test_exchanges_made_otherwise_are_found_out():
    """Every exchange, all windows, the cost of long ones, and who is present matter to the comparison."""
    plain = untangling.exchange

    def changed(**attributes):
        def wrong(moves, a, labels, most):
            kept = {name: getattr(moves, name) for name in attributes}
            for name, change in attributes.items():
                setattr(moves, name, change(kept[name]))
            result = plain(moves, a, labels, most)
            for name, value in kept.items():
                setattr(moves, name, value)
            return result

        return wrong

    def fewer(moves, a, labels, most):
        return plain(moves, a, labels, 1)

    wrongs = [fewer]
    wrongs += [
        changed(mean=lambda x: 0 * x + 1),
        changed(P=lambda x: x.tril()),
        changed(log_weight=lambda x: x.flip(0)),
    ]
    wrongs += [changed(allowed=torch.ones_like), changed(allowed=lambda x: x & (x.sum(-1, keepdim=True) == 1))]
    assert untangling.largest_difference(plain, plain, CPU) == 0
    for wrong in wrongs:
        assert untangling.largest_difference(plain, wrong, CPU) > 10 * fused.TOLERANCE
