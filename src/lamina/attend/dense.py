"""Attention by its formula, with the whole (B, H, T, S) score matrix: serves everything, and is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.attend.request import Request, grouped


def refuses(request: Request) -> str | None:
    """Nothing."""
    return None


def weights(request: Request) -> Tensor:
    """(B, H, T, S) probabilities in the dtype of the query; the softmax itself in float32 or wider."""
    query, key = request.query, request.key
    mask = None if request.reach() == "all" else request.mask()
    if mask is not None:
        key = key.masked_fill(request.blind(), 0.0)
    scores = grouped(query, key.shape[1]) @ key.transpose(-1, -2)  # (B, G, H / G * T, S)
    scores = scores.view(*query.shape[:3], key.shape[2]) * request.scale  # (B, H, T, S)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if request.bias is not None:
        scores = scores + request.bias
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if request.sink is not None:
        sink = request.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    if mask is not None:
        probabilities = probabilities.masked_fill(~mask, 0.0)  # a row that sees nothing was uniform until here
    return probabilities.to(query.dtype)


def suits(request: Request) -> bool:
    """Always: better ones come before it."""
    return True


def attend(request: Request) -> Tensor:
    """softmax(...) v, and the Shaw term on the values where there is one."""
    probabilities = F.dropout(weights(request), request.dropout)
    value = request.value
    if request.reach() != "all":
        value = value.masked_fill(request.blind(), 0.0)
    out = (grouped(probabilities, value.shape[1]) @ value).view(*request.query.shape[:3], value.shape[-1])
    if request.value_table is not None:
        table, bucket = request.value_table
        share = probabilities.new_zeros(*probabilities.shape[:3], table.shape[0])
        share = share.scatter_add(3, bucket[:, None].expand_as(probabilities), probabilities)  # (B, H, T, buckets)
        out = out + share @ table.to(out.dtype)
    return out
