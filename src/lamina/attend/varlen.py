"""Attention over packed sequences (torch.nn.attention.varlen, which is FlashAttention; arXiv:2307.08691), on CUDA.

Documents are laid end to end without their padding, and the kernel is told where each begins. Example, two rows:

    documents 0 0 0 3 3   positions 0 1 2 0 1       ->  tokens 0 1 2 | 3 4 | 7 8 9
              0 0 0 0 0            -1 -1 0 1 2          ends 0 3 5 8, longest 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.attend.request import Request
from lamina.patterns import Band
from lamina.tokens import Tokens


def refuses(request: Request) -> str | None:
    """What the packed kernel has no way to express, or not for those tokens."""
    if request.query.device.type != "cuda":
        return "tensors that are not on CUDA"
    if reason := _unsupported(request):
        return reason
    if not _there(request.query.device):
        return "a GPU without FlashAttention (compute capability 8.0, and a torch that was built with it)"
    found = packed(request)
    return found if isinstance(found, str) else None


def _there(device: torch.device) -> bool:
    flash = torch.backends.cuda.is_flash_attention_available()
    return not torch.cuda.is_available() or (flash and torch.cuda.get_device_capability(device) >= (8, 0))


def _unsupported(request: Request) -> str | None:
    """What no device and no tokens make up for."""
    modifiers = {
        "relative terms on the values": request.value_table,
        "a bias on the scores": request.bias,
        "a soft-cap on the scores": request.softcap,
        "a learned sink": request.sink,
        "dropout": request.dropout or None,
    }
    for name, there in modifiers.items():
        if there is not None:
            return name
    if request.query.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(request.query.dtype).removeprefix('torch.')} (it has float16 and bfloat16)"
    size, other = request.query.shape[-1], request.value.shape[-1]
    if size != other or size % 8 or size > 256:
        return f"heads of {size} and {other} numbers (it has equal sizes, multiples of 8 up to 256)"
    if request.pattern.band() is None:
        return "a pattern that is not one band of keys around the query"
    return None


def suits(request: Request) -> bool:
    """On CUDA, where there is a mask to be left out."""
    if torch.compiler.is_compiling() or request.query.shape[2] < 2:
        return False
    return request.reach() is None


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the keys of all sequences, one after the other."""

    order: Tensor | None  # (N,): where they lie among the (B * T) tokens; None: as they lie, all of them
    ends: Tensor  # (sequences + 1,) int32: where each begins, and where the last one ends
    longest: int

    def pack(self, x: Tensor) -> Tensor:
        """(B, heads, T, D) -> (N, heads, D)."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: Tensor, batch: int, length: int) -> Tensor:
        """(N, heads, D) -> (B, heads, T, D), zeros where there is no token."""
        if self.order is not None:
            x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, self.order, x)
        return x.unflatten(0, (batch, length)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Packed:
    """The sequences of a request: the documents of which there are queries and keys."""

    queries: Side
    keys: Side


def packed(request: Request) -> Packed | str:
    """The sequences of a request, or why there are none; made once a band and forward."""
    band = request.pattern.band()
    assert band is not None
    name = ("packed", band, id(request.queries), id(request.keys))
    if name not in request.memo:
        # The tokens are kept beside it: an id is only unique while its object lives.
        request.memo[name] = (_packed(request.queries, request.keys, band), request.queries, request.keys)
    return request.memo[name][0]


def attend(request: Request) -> Tensor:
    """The same function as `dense.attend` for every token; what padding asks for is not computed, and zero."""
    found, (behind, ahead) = packed(request), request.pattern.band() or (None, None)
    assert isinstance(found, Packed)
    queries, keys = found.queries, found.keys
    if queries.longest == 0:
        return torch.zeros_like(request.query)
    out = _kernel(
        queries.pack(request.query),
        keys.pack(request.key),
        keys.pack(request.value),
        queries.ends,
        keys.ends,
        queries.longest,
        keys.longest,
        scale=request.scale,
        window_size=(-1 if behind is None else behind, -1 if ahead is None else ahead),
        enable_gqa=request.query.shape[1] != request.key.shape[1],
    )
    return queries.unpack(out, *request.queries.position.shape)


def _kernel(*of: Any, **options: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # it brings torch's compiler along, which takes a second

    out = varlen_attn(*of, **options)
    assert isinstance(out, Tensor)
    return out


UNEVEN = "queries whose positions do not end with those of their keys"
GAPS = "tokens of a document whose positions have gaps or repeat"


def _packed(queries: Tokens, keys: Tokens, band: Band) -> Packed | str:
    """The kernel aligns the last query of a sequence with its last key, and counts from there."""
    behind, _ = band
    free = band == (None, None)
    query, key = queries.span, keys.span
    if query is not None and key is not None:
        if not free and query[1] != key[1]:
            return UNEVEN
        hidden = 0 if behind is None else query[0] - behind - key[0]  # keys that the first query is too far from
        if hidden <= 0:
            return Packed(_evenly(queries), _evenly(keys))
    names, documents = _numbered(queries, keys)
    sides, firsts, lasts = [], [], []
    for tokens, name in zip((queries, keys), names, strict=True):
        position = tokens.position.flatten()
        order = torch.where(position >= 0, position, 0).argsort(stable=True)
        order = order[name[order].argsort(stable=True)]
        order = order[position[order] >= 0]
        sides.append(order)
        at, name = position[order], name[order]
        if not free and bool(((at.diff() != 1) & (name.diff() == 0)).any()):
            return GAPS
        nothing = torch.iinfo(torch.int64).max
        firsts.append(at.new_full((documents,), nothing).scatter_reduce(0, name, at, "amin"))
        lasts.append(at.new_full((documents,), -1).scatter_reduce(0, name, at, "amax"))
    both = (lasts[0] >= 0) & (lasts[1] >= 0)
    if not free and bool((both & (lasts[0] != lasts[1])).any()):
        return UNEVEN
    found = []
    for order, name, tokens in zip(sides, names, (queries, keys), strict=True):
        kept = both[name[order]]
        if tokens is keys and behind is not None:  # keys before all queries' windows: what they hold must not leak
            kept = kept & (keys.position.flatten()[order] >= firsts[0][name[order]] - behind)
        order = order[kept]
        counts = torch.bincount(name[order], minlength=documents)[both]
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        found.append(Side(order, ends, int(counts.max()) if len(counts) else 0))
    return Packed(*found)


def _evenly(tokens: Tokens) -> Side:
    """Rows of one document each, without padding."""
    batch, length = tokens.position.shape
    ends = torch.arange(batch + 1, dtype=torch.int32, device=tokens.position.device) * length
    return Side(None, ends, length)


def _numbered(queries: Tokens, keys: Tokens) -> tuple[list[Tensor], int]:
    """(B * T,) and (B * S,): the number of each token's document, another one in each row; and how many there are."""
    sides = (queries, keys)
    rows = [torch.arange(len(x.document), device=x.document.device)[:, None].expand_as(x.document) for x in sides]
    pairs = torch.cat(
        [torch.stack([row, x.document], dim=-1).flatten(0, 1) for row, x in zip(rows, sides, strict=True)]
    )
    found, names = pairs.unique(dim=0, return_inverse=True)
    return list(names.split([x.document.numel() for x in sides])), len(found)
