"""The Triton kernels: run by Triton's interpreter, and replaced where they cannot be used."""

import copy
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from pyro_pixels import _fused as fused
from pyro_pixels.guides import following, recurrence, structured, untangling
from pyro_pixels.guides.recurrence import _Recurrence, recur_reference
from pyro_pixels.lgssm.sharing import once, sharing
from pyro_pixels.model import drawing
from pyro_pixels.model.renderer import Renderer

CPU = torch.device("cpu")
INTERPRETED = """
from functools import partial
from pathlib import Path
from unittest import mock
import torch
from pyro_pixels._fused import matmul_precision
from pyro_pixels.guides import following, fused_exchanges, fused_following, fused_recurrence, recurrence, untangling
from pyro_pixels.lgssm.dynamics import Dynamics
from pyro_pixels.model import drawing, fused_canvas
FusedRecurrence = fused_recurrence.FusedRecurrence
canvas = partial(fused_canvas.FusedCanvas.apply, drawing.draw)
cpu = torch.device("cpu")
print(recurrence.largest_difference(recurrence._Recurrence, FusedRecurrence, cpu))
print(following.largest_difference(following.follow_reference, fused_following.follow, cpu))
print(drawing.largest_difference(drawing.draw, canvas, cpu))
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
            for a, b in zip(*found):
                print(1e-6 / accuracy * float((a - b).detach().norm() / b.detach().norm()))
# Second derivatives, and none of no sequences.
a, present = torch.randn(1, 2, 3, 2), torch.tensor([[True, True]])
weights = [torch.randn(shape, requires_grad=True) for shape in ((5,), (5, 2), (5,), (5, 2), (5,))]
found = [torch.autograd.functional.hessian(lambda a: draw(a, present, *weights).square().sum(), a, strict=True)
         for draw in (canvas, drawing.draw)]
print(float((found[0] - found[1]).abs().max()))
nothing = torch.zeros(0, 2, 3, 2, requires_grad=True)
canvas(nothing, torch.ones(0, 2, dtype=torch.bool), *weights).sum().backward()
assert nothing.grad.shape == nothing.shape
# Numbers of objects in any memory layout.
dynamics, tracks = Dynamics(), torch.randn(4, 3, 9, 2)
column = torch.tensor([[3, 1], [1, 2], [2, 3], [3, 1]])[:, 0]
for counts in (3, column, torch.tensor(2)):
    wanted = untangling.untangle(dynamics, tracks, counts)
    untangling.choose = lambda *_: fused_exchanges.exchange
    found = untangling.untangle(dynamics, tracks, counts)
    untangling.choose = lambda x, plain, *_: plain
    print(float((wanted.labels != found.labels).sum()), float((wanted.gain - found.gain).abs().max()))
"""


def interpreted(*program):
    """The numbers that a program prints whose kernels are run by Triton's interpreter."""
    triton = pytest.importorskip("triton")
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, (str(tests), str(tests.parent), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with this NumPy; later ones do")
    assert done.returncode == 0, done.stderr
    return [float(x) for x in done.stdout.split()]


def test_triton_computes_what_torch_does():
    found = interpreted("-c", INTERPRETED)
    assert len(found) == 4 + 24 * 4 + 1 + 6
    assert all(x < 1e-5 for x in found), found  # not so for NaN


def test_whole_steps_are_the_same_with_kernels():
    *off, n_kernels = interpreted(str(Path(__file__).parent / "with_kernels.py"))
    assert n_kernels == 4
    assert len(off) == 3
    assert all(x < 1e-5 for x in off), off


def test_kernels_that_cannot_run_are_replaced(monkeypatch):
    """On a CPU there is no Triton, or it cannot compile: one warning, and the plain ones."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, _Recurrence, recurrence._fused, recurrence.largest_difference) is _Recurrence
    plain = following.follow_reference
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, plain, following._fused, following.largest_difference) is plain
    draw = drawing.draw
    with pytest.warns(UserWarning, match="fused kernels are disabled"):
        assert fused.checked(CPU, draw, drawing._fused, drawing.largest_difference) is draw
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
    draw = drawing.draw

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

    def only_large_gains(*args):
        with mock.patch.object(untangling, "LEAST_GAIN", 0.1):
            return plain(*args)

    wrongs = [fewer, only_large_gains]
    wrongs += [
        changed(mean=lambda x: 0 * x + 1),
        changed(P=lambda x: x.tril()),
        changed(log_weight=lambda x: x.flip(0)),
    ]
    wrongs += [changed(allowed=torch.ones_like), changed(allowed=lambda x: x & (x.sum(-1, keepdim=True) == 1))]
    assert untangling.largest_difference(plain, plain, CPU) == 0
    for wrong in wrongs:
        assert untangling.largest_difference(plain, wrong, CPU) > 10 * fused.TOLERANCE


DIFFERENCES = {
    "recurrence": (recurrence.largest_difference, _Recurrence),
    "following": (following.largest_difference, following.follow_reference),
    "drawing": (drawing.largest_difference, drawing.draw),
    "untangling": (untangling.largest_difference, untangling.exchange),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_check_disturbs_nothing_and_depends_on_nothing(name, monkeypatch):
    """Neither random numbers nor settings change, and the caller's defaults do not matter."""
    difference, plain = DIFFERENCES[name]
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeded.append(seed))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded.append(seed))
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    settings = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.no_grad(), sharing(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fused.checked(CPU, plain, lambda: plain, difference) is plain
            assert once("x", lambda: 1, plain) == 1
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    assert settings == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    assert not seeded


def test_a_check_without_memory_is_repeated_later(monkeypatch):
    """Running out of memory says nothing about the kernel."""

    def no_memory(plain, function, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fused.checked(CPU, drawing.draw, lambda: None, no_memory)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 1)])
def test_second_derivatives_are_those_of_the_plain_functions(shape):
    T, N, D = shape
    torch.manual_seed(0)
    from_image, s_0, W = torch.randn(T, 2, 2 * D), torch.randn(N, 2, D), torch.randn(2 * D, 2 * D)

    def square(function, W):
        return function(from_image, s_0, W).square().sum()

    found = [
        torch.autograd.functional.hessian(partial(square, function), W, strict=True)
        for function in (_Recurrence.apply, recur_reference)
    ]
    torch.testing.assert_close(*found)

    root = torch.randn(D, D, dtype=torch.float64)
    C, R, b = root @ root.mT + torch.eye(D), torch.rand(3, D, dtype=torch.float64) + 0.5, torch.randn(3, D, 2).double()

    def loss(solve, R):
        x, log_det = solve(C, R, b, structured.factor_sum(C, R))
        return x.square().sum() + log_det.square().sum()

    by_hand, plain = (
        torch.autograd.functional.hessian(partial(loss, solve), R, strict=True)
        for solve in (structured.solve_sum, structured.solve_sum_reference)
    )
    torch.testing.assert_close(by_hand, plain)


def test_kernels_are_not_used_in_transforms(monkeypatch):
    """Of ``torch.func`` and in forward mode, which autograd functions do not support."""

    def chosen(x):
        on_a_card = mock.Mock(device=torch.device("cuda"), dtype=torch.float32)
        return fused.choose(on_a_card, "plain", lambda: "fused", lambda *_: 0.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "checked", lambda *_: "fused")
    monkeypatch.setattr(fused, "_CHOSEN", {})
    x, seen = torch.zeros(3), []
    assert chosen(x) == "fused"
    torch.func.vmap(lambda x: seen.append(chosen(x)) or x)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(chosen(x))
    assert seen == ["plain", "plain"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(x) == "fused"
    monkeypatch.setattr(fused, "_CHOSEN", {})
    assert chosen(x) == "plain"  # no check can run while recording


def test_renderers_with_other_layers_are_not_replaced(monkeypatch):
    """Subclasses, other modules, parametrisations and hooks: kernels know the weights of plain layers only."""
    monkeypatch.setattr(
        drawing, "choose", lambda *_: lambda a, present, *weights: drawing.draw(a, present, *weights) + 1
    )
    a, present = torch.randn(2, 3, 4, 2), torch.tensor([[True, True, True], [True, False, False]])

    class Own(Renderer):
        def draw(self, a, present):
            return super().draw(a, present) + 2

    plain = Renderer(6, 5, state_size=7)
    with torch.no_grad():
        x = plain.draw(a, present)
        torch.testing.assert_close(drawing.fastest(plain, a)(a, present), x + 1)
        own = Own(6, 5, state_size=7)
        own.load_state_dict(plain.state_dict())
        torch.testing.assert_close(own(a, present), plain.to_v(x + 2).unflatten(-1, (6, 5)))
        hooked, other, parametrised = (copy.deepcopy(plain) for _ in range(3))
        hooked.to_x.register_forward_hook(lambda module, args, y: 2 * y)
        other.to_alpha = torch.nn.Sequential(plain.to_alpha, torch.nn.Tanh())
        torch.nn.utils.parametrizations.weight_norm(parametrised.to_x)
        for renderer in (hooked, other, parametrised):
            torch.testing.assert_close(drawing.fastest(renderer, a)(a, present), renderer.draw(a, present))
        assert not torch.allclose(hooked.draw(a, present), x)
