"""Attention by torch's fused kernel (torch.nn.functional.scaled_dot_product_attention)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lamina.attend.request import Request, spread


def refuses(request: Request) -> str | None:
    """What the fused kernel has no way to express."""
    if request.softcap is not None:
        return "a soft-cap on the scores"
    if request.sink is not None:
        return "a learned sink"
    if request.value_table is not None:
        return "relative terms on the values"
    return None


def suits(request: Request) -> bool:
    """Always: better ones come before it."""
    return True


def attend(request: Request) -> Tensor:
    """The same function as `dense.attend`; the mask is left out where the spans of the tokens allow it."""
    query, key, value = request.query, request.key, request.value
    heads, length = query.shape[1:3]
    mask, reach = request.bias, request.reach()
    if reach is None or (reach == "causal" and mask is not None):
        mask = request.mask() if mask is None else _biased(request)
        if length > 1 and not request.step:  # a decoding step reads every cached key once and copies none
            key, value = (part.masked_fill(request.blind(), 0.0) for part in (key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if length == 1 and key.shape[1] != heads and (mask is None or mask.shape[1] == 1):
        # One query: the heads that share a key head become the queries of that head, and no key is repeated.
        folded = query.reshape(*key.shape[:2], heads // key.shape[1], query.shape[-1])  # (B, G, H / G, D)
        out = _kernel(folded, key, value, mask, request)
        return out.reshape(*query.shape[:3], value.shape[-1])
    causal = mask is None and reach == "causal" and length > 1
    return _kernel(query, spread(key, heads), spread(value, heads), mask, request, causal)


def _biased(request: Request) -> Tensor:
    """The bias as a float mask. A stack's layers share one; where each has its own, only the last is kept."""
    assert request.bias is not None
    name = ("biased", request.pattern, id(request.queries), id(request.keys))
    mask, bias = request.memo.get(name, (None, None))
    if mask is None or bias is not request.bias:
        mask = request.bias.masked_fill(~request.mask(), float("-inf"))
        request.memo[name] = (mask, request.bias)
    return mask


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, request: Request, causal: bool = False):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=request.dropout, is_causal=causal, scale=request.scale
    )
