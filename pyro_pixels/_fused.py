"""Triton kernels in the place of plain torch operations: on CUDA, in float32, unless ``PYRO_PIXELS_FUSED=0``.

On a GPU the time of a step is determined by the number of its kernels. `guides.fused_recurrence`,
`guides.fused_following`, `guides.fused_exchanges` and `model.fused_canvas` do in one or two kernels what takes torch
many. On each device a function is compared with the plain one when it is first used; if they differ, or if the kernel
cannot be compiled, the plain one is used, with a warning. Second derivatives, transforms of ``torch.func`` and
forward-mode differentiation are those of the plain one.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyro_pixels.lgssm.sharing import not_sharing

ENABLED = os.environ.get("PYRO_PIXELS_FUSED", "1") != "0"
TOLERANCE = 1e-4  # of results of order 1, in float32

Function = TypeVar("Function")
_CHOSEN: dict[tuple[Any, torch.device], Any] = {}
_CHECKING = threading.RLock()


def choose(
    x: Tensor,
    plain: Function,
    fused: Callable[[], Function],
    difference: Callable[[Function, Function, torch.device], float],
) -> Function:
    """Returns the function to use for tensors such as x, fused or plain.

    Args:
        x: an argument of the function.
        plain: the function in torch operations.
        fused: imports and returns the fused function.
        difference: returns the largest difference of results, of order 1, between the plain function and another.
    """
    if not (ENABLED and x.device.type == "cuda" and x.dtype == torch.float32 and torch.cuda.is_available()):
        return plain
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return plain
    key = plain, x.device
    if key not in _CHOSEN:
        if torch.cuda.is_current_stream_capturing():  # no check can run while recording
            return plain
        with _CHECKING:
            try:
                if key not in _CHOSEN:  # another thread may have been faster
                    _CHOSEN[key] = checked(x.device, plain, fused, difference)
            except torch.OutOfMemoryError:  # next time there may be memory for the check
                return plain
    return _CHOSEN[key]  # type: ignore[no-any-return]


def checked(
    device: torch.device,
    plain: Function,
    fused: Callable[[], Function],
    difference: Callable[[Function, Function, torch.device], float],
) -> Function:
    """Returns the fused function if it agrees with the plain one, else the latter with a warning and the reason."""
    try:
        function = fused()
        with (
            torch.inference_mode(False), torch.autocast(device.type, enabled=False), not_sharing(),
            matmul_precision("highest"),
        ):  # fmt: skip
            off = difference(plain, function, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may raise anything
        why = f"{type(error).__name__}: {error}"
    else:
        if off < TOLERANCE:  # not so for NaN
            return function
        why = f"their results differ by {off:.1g} from those of plain operations"
    message = f"fused kernels are disabled: {why}; plain operations are used, which are as accurate but slower"
    warnings.warn(message, stacklevel=2)
    return plain


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws from N(0, 1) in float32 on the CPU, whatever torch's defaults are, with a generator of one's own."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a Triton kernel, whose first argument is a tensor."""
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device, which need not be the tensors'
        kernel[grid](*args, **options)


def _float32_matmul_precision() -> str | None:
    """Returns torch's older setting; None if torch refuses because its newer one is in use."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def tf32_allowed() -> bool:
    """Returns whether products of float32 matrices on CUDA may be in TF32 or less."""
    older = _float32_matmul_precision()
    return torch.backends.cuda.matmul.fp32_precision == "tf32" if older is None else older != "highest"


@contextmanager
def matmul_precision(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within this context, products of float32 matrices on CUDA are in float32 ("highest") or TF32 ("high")."""
    cuda: Any = torch.backends.cuda.matmul
    mkldnn: Any = getattr(torch.backends.mkldnn, "matmul", None)
    newer = [(part, part.fp32_precision) for part in (cuda, mkldnn) if hasattr(part, "fp32_precision")]
    older = _float32_matmul_precision()
    if older is None:
        cuda.fp32_precision = "ieee" if precision == "highest" else "tf32"
    else:  # this also changes the newer setting, which on CUDA must not contradict it
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for part, value in newer:
            part.fp32_precision = value
