"""A step compiled ahead of time: a package of code on disk, bound to the weights of a live model.

`build` exports a module and rewrites its few-row linears and attentions as multiply-and-sum, of which inductor makes
vectorised dot products over the row-major weights. Nothing is packed or copied, so the package holds code only (a few
MB) and any process binds it to the memory of its own parameters.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FEW = 4
"""Up to so many rows a linear is written as dot products; beyond, as inductor's matrix product."""

OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,  # code only: 6 MB instead of 540
    "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add in one instruction
}


def settle(x: Tensor) -> Tensor:
    """A value that is stored before it is used; else inductor computes a norm anew for every row of the next weight."""
    import torch._inductor.inductor_prims  # registers the operator

    return torch.ops._inductor_test.realize(x)


def dots(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x W^T (* scale) (+ bias) for few rows x (..., in) and W (out, in), summed in float32 in one pass over W."""
    wide = settle(x.reshape(-1, x.shape[-1]).float())
    matrix = weight.float()
    rows = torch.stack([(matrix * row).sum(-1) for row in wide])
    rows = rows if scale is None else rows * scale
    rows = rows if bias is None else rows + bias.float()
    return settle(rows.to(x.dtype).view(*x.shape[:-1], weight.shape[0]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.numel() <= FEW * x.shape[-1]:
        return dots(x, weight, None, bias)
    product = torch.ops.aten.mm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's fused attention for few queries, as sums; key heads are shared and never repeated. A mask has one row."""
    assert not is_causal and dropout_p == 0.0
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query_wide = query.reshape(batch, groups, -1, length, size).float() * (size**-0.5 if scale is None else scale)
    scores = (settle(query_wide).unsqueeze(-2) * key[:, :, None, None].float()).sum(-1)  # (B, G, H / G, T, S)
    if attn_mask is not None:
        mask = attn_mask.expand(batch, attn_mask.shape[1], length, key.shape[2])
        shared = attn_mask.shape[1] == 1
        mask = mask[:, :, None] if shared else mask.reshape(batch, groups, -1, length, key.shape[2])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        blind = scores.amax(-1, keepdim=True) == -torch.inf  # a row that may see nothing gives zeros, here as elsewhere
        scores = scores.masked_fill(blind, 0.0)
    shares = scores.softmax(-1)
    shares = settle(shares if attn_mask is None else shares.masked_fill(blind, 0.0))
    out = (shares.unsqueeze(-1) * value[:, :, None, None].float()).sum(-2)
    return settle(out.to(query.dtype).reshape(batch, heads, length, value.shape[-1]))


REWRITTEN: dict[Any, Any] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}


def build(module: nn.Module, arguments: tuple[Tensor, ...], path: Path, threads: int) -> None:
    """Write the package of `module` for tensors shaped like `arguments`, which it may change in place.

    It is made aside and moved into place, so that neither a kill nor a second builder leaves a broken one.
    """
    import torch._inductor

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as scratch, warnings.catch_warnings():
        # torch 2.13's exporter and compiler warn of their own use of what they deprecate.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        program = torch.export.export(module, arguments, strict=False).run_decompositions(REWRITTEN)
        made = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(Path(scratch) / "step.pt2"),
            inductor_configs={**OPTIONS, "cpp.threads": threads},
        )
        os.replace(made, path)


class Step:
    """A loaded package, bound to a live module: called with the tensors it was exported for."""

    def __init__(self, path: Path, module: nn.Module) -> None:
        import torch._inductor

        self.module = module
        self.package = torch._inductor.aoti_load_package(str(path))
        self.names: Iterable[str] = self.package.get_constant_fqns()  # pyright: ignore[reportAttributeAccessIssue]
        self.run = self.package.loader.run  # pyright: ignore[reportAttributeAccessIssue]
        self.held: dict[str, Tensor] = {}
        self.bind()

    def bind(self) -> None:
        """Point the code to the module's tensors, if they are not those of the last call: nothing is copied."""
        own = dict(self.module.named_parameters(remove_duplicate=False))
        own |= dict(self.module.named_buffers(remove_duplicate=False))
        same = self.held and all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in self.held.items())
        if not same:
            self.held = {name: own[name].detach().contiguous() for name in self.names}
            self.package.load_constants(self.held, check_full_update=True, user_managed=True)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        return self.run(list(tensors))
