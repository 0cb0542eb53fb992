"""GELU by its tanh formula (arXiv:1606.08415, section 2), at the speed of the memory on the CPU.

torch's kernel takes a vectorised tanh, forward and again backward. gelu.c takes one exponential, to within the same
rounding, in a third of the time. Small tensors, other devices and dtypes, and programs that are traced have torch's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina.native import library

LEAST = 1 << 16
"""Elements below which a call of its own saves nothing."""
NAMES = {torch.float32: "gelu_f32", torch.bfloat16: "gelu_bf16"}


def gelu_tanh(x: Tensor) -> Tensor:
    """x (...) -> x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of the same shape."""
    if not _serves(x):
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return _GeluTanh.apply(x)  # pyright: ignore[reportReturnType]
    return _call(x, None)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _call(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return _call(ctx.saved_tensors[0], upstream[0].contiguous())


def _serves(x: Tensor) -> bool:
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in NAMES or x.numel() < LEAST:
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # tracers and counters see torch's own
        return False
    return kernels() is not None


def _call(x: Tensor, gradient: Tensor | None) -> Tensor:
    """gelu(x), or gradient times its derivative at x."""
    found, x = kernels(), x.contiguous()
    assert found is not None
    out = torch.empty_like(x)
    given = None if gradient is None else gradient.data_ptr()
    found[x.dtype](x.data_ptr(), given, out.data_ptr(), x.numel(), torch.get_num_threads())
    return out


@cache
def kernels() -> dict[torch.dtype, Any] | None:
    """The kernel by dtype; None where there is no C compiler."""
    built = library(Path(__file__).with_name("gelu.c"), "-O3", "-fno-math-errno", "-fno-trapping-math")
    if built is None:
        return None
    found = {dtype: getattr(built, name) for dtype, name in NAMES.items()}
    for function in found.values():
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
        function.restype = None
    return found
