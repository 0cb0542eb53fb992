"""How an attention meets its cache: keys turn before they are kept, or after, where the cache renumbers them."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lamina.errors import UnsupportedError
from lamina.layers.call import Call
from lamina.layers.rotary import RotarySpec, phases, rotate
from lamina.patterns import Pattern, Retained
from lamina.tokens import Tokens


def retained(path: str, pattern: Pattern) -> Retained:
    """What a cache has to keep for the layer at `path`. Raises UnsupportedError where tokens see later ones."""
    if pattern.looks_ahead():
        raise UnsupportedError(f"{path}: its tokens see later ones, so it cannot read in pieces with a cache")
    return replace(pattern.retained(), pattern=pattern)


def with_cache(
    path: str, call: Call, query: Tensor, key: Tensor, value: Tensor, rotary: RotarySpec | None, size: int
) -> tuple[Tensor, Tensor, Tensor, Tokens, Tokens]:
    """Queries (B, H, T, D), all keys (B, G, S, D) and values to look at, and whose the queries and the keys are.

    `path` names the layer's slot; without a cache the keys are those of this forward. Rotary phases turn the last
    `size` features of queries and keys.
    """
    slot = None if call.cache is None else call.cache.slot(path)
    queries = keys = call.tokens
    if slot is None or not slot.late:
        query, key = (turn(x, queries, rotary, size, call.memo) for x in (query, key))
    if slot is not None:
        key, value, keys = slot.extend(key, value, call.tokens)
    if slot is not None and slot.late:
        queries = slot.ledger.queries(call.tokens)
        query, key = turn(query, queries, rotary, size, call.memo), turn(key, keys, rotary, size, call.memo)
    return query, key, value, queries, keys


def turn(x: Tensor, tokens: Tokens, rotary: RotarySpec | None, size: int, memo: MutableMapping[Any, Any]) -> Tensor:
    """The last `size` features of x (B, H, T, D) turned by the positions of its tokens."""
    if rotary is None:
        return x
    cos, sin = phases(rotary, size, tokens, x.dtype, memo)
    before = x.shape[-1] - size
    turned = rotate(x[..., before:], cos, sin, rotary.interleaved)
    return turned if before == 0 else torch.cat([x[..., :before], turned], dim=-1)
