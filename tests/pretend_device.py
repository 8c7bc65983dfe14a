"""A pretended device: tensors that say they are on it while the CPU does the work.

What a program does with devices can be tested without one. Inside a `PretendDevice`, tensors made or moved there are
`OnDevice`, and whatever mixes them with tensors of the CPU raises, as CUDA does: a value can be looked at only through
`.cpu()`, `float()` and the like. The mode also notes the operations that run on the device, so that a test can tell
which of them wait for it (`waits_for_the_device`) or cannot be part of a recorded CUDA graph (`UNRECORDABLE`).
"""

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

APPLY = BackwardCFunction.apply

WAITS = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "repeat_interleave", "_linalg_check_errors", "linalg_cholesky",
    "linalg_inv", "linalg_lstsq", "_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_matrix_rank", "multinomial",
    "_pack_padded_sequence", "segment_reduce",
}  # fmt: skip
"""Operations that read a result from the device: a size, a check. `multinomial` does in older versions of torch."""

MAGMA = {
    "cholesky_solve", "_cholesky_solve_helper", "cholesky_inverse", "linalg_inv_ex", "_linalg_solve_ex",
    "linalg_solve_ex", "linalg_lu_factor", "linalg_lu_factor_ex", "linalg_lu", "linalg_lu_solve", "lu_unpack",
    "_linalg_det", "_linalg_slogdet", "linalg_qr", "geqrf", "ormqr", "linalg_householder_product",
    "linalg_ldl_factor_ex", "linalg_ldl_solve", "triangular_solve",
}  # fmt: skip
"""Batched linear algebra for which torch goes to MAGMA, always or from some size on; MAGMA allocates memory itself."""

UNRECORDABLE = WAITS | MAGMA

MATRICES = {"cat", "stack", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "gather", "index_add", "index_select"}
"""Operations for which a number on the CPU will not do: not even 0-dimensional tensors of it."""


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; ``inner`` holds its values."""

    inner: torch.Tensor
    device_name: torch.device

    @staticmethod
    def __new__(cls, inner, device):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner, made.device_name = inner, device
        return made

    def __tensor_flatten__(self):
        return ["inner"], self.device_name

    @staticmethod
    def __tensor_unflatten__(inner, device, size, stride):
        return OnDevice(inner["inner"], device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        flat = tree_flatten((args, kwargs))[0]
        device = next(x.device_name for x in flat if isinstance(x, OnDevice))
        _refuse_mixtures(name, args, flat)
        mode = PretendDevice.active
        if mode is not None:
            mode.operations.append(name)
            if name in ("index", "index_put", "index_put_") and any(
                x is not None and x.dtype == torch.bool for x in args[1]
            ):
                mode.operations.append("nonzero")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        out = tree_map(lambda x: OnDevice(x, device) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def _refuse_mixtures(name, args, flat):
    """Raises where tensors of the CPU are among those of the device and torch would not have it."""
    if name in ("copy_", "_to_copy", "detach"):
        return
    if name in ("index", "index_put", "index_put_"):  # indices may be on the CPU
        flat = tree_flatten((args[0], *args[2:]))[0]
        if not isinstance(args[0], OnDevice):
            raise RuntimeError(f"{name}: indices on the device for a tensor on the CPU")
    on_cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
    if name not in MATRICES:
        on_cpu = [x for x in on_cpu if x.dim() > 0]
    if on_cpu:
        raise RuntimeError(f"{name}: a tensor on the CPU, shape {tuple(on_cpu[0].shape)}, among those on the device")


class PretendDevice(TorchFunctionMode):
    """Within it the device exists. ``operations`` are the names of what ran there, ``copies`` of what crossed over."""

    active: "PretendDevice | None" = None

    def __init__(self, name="xpu:0"):
        super().__init__()
        self.device, self.operations, self.copies = torch.device(name), [], []

    def __enter__(self):
        PretendDevice.active = self
        BackwardCFunction.apply = lambda node, *grads: _inside(
            self, node, grads
        )  # torch runs gradients written by hand without the mode
        return super().__enter__()

    def __exit__(self, *reason):
        PretendDevice.active = None
        BackwardCFunction.apply = APPLY
        return super().__exit__(*reason)

    def put(self, module: nn.Module) -> nn.Module:
        """``module.to(device)``, with every parameter and buffer."""
        moved = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, x in held.items():
                    if x is not None and not isinstance(x, OnDevice):
                        if id(x) not in moved:
                            made = OnDevice(x.detach().clone(), self.device)
                            moved[id(x)] = nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made
                        held[name] = moved[id(x)]
        return module

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_device = bool(args) and isinstance(args[0], OnDevice)
        if func == torch.Tensor.device.__get__ and on_device:
            return args[0].device_name
        if func == torch.Tensor.is_cuda.__get__ and on_device:
            return self.device.type == "cuda"
        if func in (torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__repr__) and on_device:
            self.operations.append("_local_scalar_dense")
            return func(args[0].inner, *args[1:], **kwargs)
        if func is torch.nn.functional.one_hot and on_device:  # makes a tensor where torch takes this one to be
            return OnDevice(func(args[0].inner, *args[1:], **kwargs), self.device)
        if func is torch.Tensor.new_tensor and on_device:
            self.copies.append("new_tensor")
            return OnDevice(func(args[0].inner, *args[1:], **kwargs), self.device)
        if func is torch.Tensor.cpu and on_device:
            return self._to_cpu(args[0])
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if "device" in kwargs and kwargs["device"] is not None:
            there = self._is_this(kwargs["device"])
            if there or torch.device(kwargs["device"]).type == "cpu":
                kwargs["device"] = "cpu"
                made = func(*tree_map(_inner, args) if not there else args, **kwargs)
                if there and not isinstance(made, OnDevice):
                    if func in (torch.tensor, torch.as_tensor, torch.asarray):
                        self.copies.append(func.__name__)
                    made = OnDevice(made, self.device)
                return made
        return func(*args, **kwargs)

    def _is_this(self, device):
        device = torch.device(device)
        return device.type == self.device.type and device.index in (None, self.device.index)

    def _to(self, x, *args, **kwargs):
        target = kwargs.pop("device", None)
        kept = []
        for argument in args:
            if isinstance(argument, (str, torch.device)):
                target = argument
            elif isinstance(argument, torch.Tensor):
                target, kwargs["dtype"] = argument.device, argument.dtype
            elif isinstance(argument, torch.dtype):  # whether to wait for a copy does not matter here
                kept.append(argument)
        if target is not None and self._is_this(target) and not isinstance(x, OnDevice):
            self.copies.append("to the device")
            x = _Move.apply(x, self.device)
        elif target is not None and torch.device(target).type == "cpu" and isinstance(x, OnDevice):
            x = self._to_cpu(x)
        return x.to(*kept, **kwargs) if kept or kwargs.get("dtype") is not None else x

    def _to_cpu(self, x):
        self.copies.append("to the CPU")
        self.operations.append("_local_scalar_dense")
        return _Fetch.apply(x)


def _inside(mode, node, grads):
    TorchFunctionMode.__enter__(mode)
    try:
        return APPLY(node, *grads)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device):
        return OnDevice(x.detach().clone(), device)

    @staticmethod
    def backward(ctx, grad):
        return grad.inner, None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.device = x.device_name
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return OnDevice(grad, ctx.device)
