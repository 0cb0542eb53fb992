"""The linear layer, y = x W^T + b, at the speed of the machine also for the few rows of a decoding step.

torch multiplies one row on one thread, and some tens of rows at a third to two thirds of what the machine can do. For
them a small kernel (rows.c) reads the weight once, with all threads. Without a C compiler, and wherever gradients,
other devices or other dtypes are asked for, torch does it all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.native import library

FEW = {torch.float32: 256, torch.bfloat16: 8, torch.int8: 64}
"""Up to so many rows the kernel is faster than torch's product, which has the machine's instructions for bfloat16."""

NAMES = {torch.float32: "rows_f32", torch.bfloat16: "rows_bf16", torch.int8: "rows_int8"}


class Linear(nn.Linear):
    """torch's linear layer, with `linear` as its product."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # a tensor without values takes torch as long to initialise as one with
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., in) times W (out, in) transposed, times `scale` (out,) where W is int8, plus `bias` (out,)."""
    if _serves(x, weight):
        return _few(x, weight, bias, scale)
    if scale is None:
        return F.linear(x, weight, bias)
    out = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return out if bias is None else out + bias


JOINED = 1 << 22
"""Up to so many weights are copied beside each other for one product of several layers."""


def together(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The results of several linear layers that read the same x (..., in).

    Where they are trained on the CPU they are one product, and so are their gradients: x is read once, its gradient is
    not added up of several, and wide products come nearer to what the machine can do.
    """
    if not _joins(x, layers):
        return [layer(x) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)  # pyright: ignore[reportArgumentType]
    return F.linear(x, torch.cat(weights), bias).split([len(weight) for weight in weights], dim=-1)  # pyright: ignore


def _joins(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    plain = [layer for layer in layers if type(layer) is Linear]  # another class has a forward of its own: LowRank
    if x.numel() <= FEW[torch.float32] * x.shape[-1] or len(plain) < len(layers):
        return False
    weights = [layer.weight for layer in plain]
    if sum(weight.numel() for weight in weights) > JOINED or not all(weight.requires_grad for weight in weights):
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in plain):
        return False
    return len({layer.bias is None for layer in plain}) == 1


def _serves(x: Tensor, weight: Tensor) -> bool:
    if type(x) is not Tensor or x.device.type != "cpu" or x.numel() > FEW.get(weight.dtype, 0) * x.shape[-1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # tracers and counters see torch's own
        return False
    return weight.is_contiguous() and weight.device.type == "cpu" and x.numel() > 0 and kernels() is not None


def _few(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    rows, wide = x.numel() // x.shape[-1], x.to(torch.float32).contiguous()
    added = None if bias is None else bias.detach().to(torch.float32).contiguous()
    factor = None if scale is None else scale.to(torch.float32).contiguous()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    found = kernels()
    assert found is not None
    found[weight.dtype](
        weight.data_ptr(),
        None if factor is None else factor.data_ptr(),
        wide.data_ptr(),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        *weight.shape,
        rows,
        torch.get_num_threads(),
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


@cache
def kernels() -> dict[torch.dtype, Any] | None:
    """The kernels by dtype of the weight; None where there is no C compiler (`lamina doctor` says which)."""
    built = library(Path(__file__).with_name("rows.c"), "-O2")
    if built is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found: dict[torch.dtype, Any] = {}
    for dtype, name in NAMES.items():
        function = getattr(built, name)
        function.argtypes = [pointer] * 5 + [count] * 3 + [ctypes.c_int]
        function.restype = None
        found[dtype] = function
    return found
