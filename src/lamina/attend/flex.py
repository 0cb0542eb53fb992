"""Attention by FlexAttention (torch.nn.attention.flex_attention; arXiv:2412.05496): any pattern, in tiles, on CUDA.

The kernel is compiled when it is first used. On the CPU the same function runs eagerly, with the whole score matrix and
forward only: to be compared with, not to be fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lamina.attend.request import Request
from lamina.attend.tiles import tiled

LEAST = 2**16
"""Pairs of tokens below which a mask on the fused kernel costs less than planning tiles."""
KINDS = 256
"""Kernels that may be compiled before it is an error: one, or two where lengths vary, for each kind of layer."""


def refuses(request: Request) -> str | None:
    """What FlexAttention has no way to express, or not on that device."""
    device = request.query.device.type
    if request.value_table is not None:
        return "relative terms on the values"
    if request.dropout:
        return "dropout"
    if device == "cpu":
        return "gradients on the CPU" if _differentiable(request) else None
    if device != "cuda":
        return "tensors that are neither on the CPU nor on CUDA"
    if request.query.dtype == torch.float64:
        return "float64 on CUDA"
    if min(request.query.shape[-1], request.value.shape[-1]) < 16:
        return "heads of fewer than 16 numbers on CUDA"
    return None


def _differentiable(request: Request) -> bool:
    parts = (request.query, request.key, request.value, request.bias, request.sink)
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


def suits(request: Request) -> bool:
    """On CUDA, where there is a mask to leave out, or what the fused kernel cannot do or needs a mask for."""
    if request.query.device.type != "cuda" or torch.compiler.is_compiling() or request.query.shape[2] < 2:
        return False
    if request.query.shape[2] * request.key.shape[2] < LEAST:
        return False
    modified = any(part is not None for part in (request.bias, request.softcap, request.sink))
    return modified or request.reach() is None


def attend(request: Request) -> Tensor:
    """The same function as `dense.attend`."""
    query, key, value = request.query, request.key, request.value
    if not torch.is_grad_enabled():
        query, key, value = query.detach(), key.detach(), value.detach()  # on the CPU torch asks the tensors alone
    found = tiled(request)
    if found.blind is not None:
        key, value = key.masked_fill(found.blind, 0.0), value.masked_fill(found.blind, 0.0)
    kernel = _kernel if request.query.device.type == "cuda" else _eager
    of_score, normaliser = _of_score(request.bias, request.softcap), request.sink is not None
    out, lse = kernel(query, key, value, of_score, found.mask, request.scale, normaliser)
    if request.sink is None or lse is None:
        return out
    # A sink of logit s beside keys of log-sum-exp l leaves them e^l / (e^l + e^s) of the probability.
    share = torch.sigmoid(lse - request.sink.to(lse.dtype)[:, None])  # (B, H, T)
    return out * share[..., None].to(out.dtype)


def _of_score(bias: Tensor | None, softcap: float | None) -> Callable[..., Tensor] | None:
    """What becomes of the scaled score of one pair, by its row, head, query and key."""
    if bias is None and softcap is None:
        return None
    rows, heads, queries, keys = (False,) * 4 if bias is None else (size > 1 for size in bias.shape)

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[row if rows else 0, head if heads else 0, query if queries else 0, key if keys else 0]
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return score_mod


def _kernel(*of: Any) -> tuple[Tensor, Tensor | None]:
    # Scales, soft-caps and windows are constants of a kernel; lengths become variables when they first change.
    with torch._dynamo.config.patch(specialize_float=True, specialize_int=True, recompile_limit=KINDS):
        return _compiled()(*of)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_flex, fullgraph=True)  # or an error: never the slow form in silence


def _eager(*of: Any) -> tuple[Tensor, Tensor | None]:
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        return _flex(*of)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    mask: BlockMask,
    scale: float,
    normaliser: bool,
) -> tuple[Tensor, Tensor | None]:
    """(B, H, T, value size), and where it is asked for the log-sum-exp of the scores (B, H, T)."""
    # Lengths are those of the tensors: as numbers in the mask they would be constants of the kernel too.
    mask = BlockMask(
        (query.shape[2], key.shape[2]),
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
        mask.BLOCK_SIZE,
        mask.mask_mod,
    )
    out, found = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=normaliser),
    )
    return out, found.lse
