"""Slow references, in loops over single tokens, against which the fast code is proved. Never optimised."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from lamina.attend import Request
from lamina.patterns import (
    BlockTable,
    BlockWindow,
    Both,
    Causal,
    Either,
    Everything,
    Global,
    Pattern,
    Prefix,
    RandomBlocks,
    SegmentWindow,
    Sinks,
    Strided,
    Summary,
    Window,
    Without,
)
from lamina.tokens import HOLE, Tokens, plain


def sees(pattern: Pattern, query: int, key: int, marked: bool = False, asker: bool = False) -> bool:
    """Whether the token at position `query` sees the one at `key`, as the docstrings of the patterns say it; `marked`
    is the key's mark, `asker` the query's."""
    match pattern:
        case Everything():
            return True
        case Causal():
            return key <= query
        case Window(back=back, ahead=ahead, dilation=dilation):
            steps, rest = divmod(query - key, dilation)
            return rest == 0 and steps < back and (ahead is None or steps >= -ahead)
        case Prefix(length=None):
            return marked
        case Prefix(length=length):
            return key in range(length)
        case Sinks(count=count):
            return key in range(count)
        case Global(positions=()):
            return marked or asker
        case Global(positions=positions):
            return query in positions or key in positions
        case Strided(stride=stride):
            return (query - key) % stride == 0
        case Summary(stride=stride, count=count):
            return key % stride in range(stride - count, stride)
        case BlockWindow(size=size, back=back, ahead=ahead):
            return key // size in range(query // size - back + 1, query // size + ahead + 1)
        case BlockTable(size=size, table=table):
            return query // size in range(len(table)) and key // size in table[query // size]
        case RandomBlocks(size=size):
            block = query // size
            ends = [end for end in (pattern.blocks, pattern.limit) if end is not None]
            if block < 0 or any(block >= end for end in ends):
                return False
            drawn = pattern.rows(block + 1)[block]
            among = range(block if pattern.blocks is None else pattern.blocks)
            assert len(set(drawn)) == len(drawn) == min(pattern.count, len(among)) and set(drawn) <= set(among)
            return key // size in drawn
        case SegmentWindow(length=length, back=back, gap=gap):
            before = next(at for at in range(query, query - length, -1) if at % length == 0) - key
            return before <= back and (gap is None or before > gap)
        case Without(first=first, second=second):
            return sees(first, query, key, marked, asker) and not sees(second, query, key, marked, asker)
        case Both(first=first, second=second):
            return sees(first, query, key, marked, asker) and sees(second, query, key, marked, asker)
        case Either(first=first, second=second):
            return sees(first, query, key, marked, asker) or sees(second, query, key, marked, asker)
    raise NotImplementedError(type(pattern).__name__)


def mask(pattern: Pattern, queries: Tokens, keys: Tokens) -> Tensor:
    """(B, T, S), one pair at a time."""
    batch, length = queries.position.shape
    found = torch.zeros(batch, length, keys.position.shape[1], dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(keys.position.shape[1]):
                key = int(keys.position[b, j])
                same = bool(queries.document[b, i] == keys.document[b, j])
                marked = keys.marked is not None and bool(keys.marked[b, j])
                asker = queries.marked is not None and bool(queries.marked[b, i])
                query = int(queries.position[b, i])
                found[b, i, j] = key != HOLE and same and sees(pattern, query, key, marked, asker)
    return found


def attention(request: Request) -> Tensor:
    """(B, H, T, value size), one row of scores at a time, without dropout; differentiable."""
    batch, heads, length, _ = request.query.shape
    groups, columns, size = request.value.shape[1:]
    allowed = mask(request.pattern, request.queries, request.keys)
    bias = None if request.bias is None else request.bias.expand(batch, heads, length, columns)
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(length):
                seen = [j for j in range(columns) if allowed[b, i, j]]
                if not seen:
                    rows.append(torch.zeros(size, dtype=request.query.dtype))
                    continue
                z = request.key[b, g, seen] @ request.query[b, h, i] * request.scale
                z = z if bias is None else z + bias[b, h, i, seen]
                z = z if request.softcap is None else request.softcap * torch.tanh(z / request.softcap)
                total = z.exp().sum() if request.sink is None else z.exp().sum() + request.sink[h].exp()
                value = request.value[b, g, seen]
                if request.value_table is not None:
                    table, bucket = request.value_table
                    value = value + table[bucket[b, i, seen]]
                rows.append((z.exp() / total) @ value)
    return torch.stack(rows).view(batch, heads, length, size)


def rope(x: Tensor, positions: list[int], frequency: list[float], interleaved: bool = False) -> Tensor:
    """x (H, T, D) with its first 2 len(frequency) features turned, one pair of one token at a time."""
    out, half = x.clone(), len(frequency)
    for t, position in enumerate(positions):
        for i, f in enumerate(frequency):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            cos, sin = math.cos(position * f), math.sin(position * f)
            out[:, t, a] = x[:, t, a] * cos - x[:, t, b] * sin
            out[:, t, b] = x[:, t, a] * sin + x[:, t, b] * cos
    return out


ON_THE_CPU = ("blocks", "sdpa", "dense")
"""The backends that serve the CPU with gradients too; `flex` and `varlen` have tests of their own."""

LAYOUTS = ("plain", "chunk", "step", "left padding", "right padding", "documents", "shuffled", "fixed", "marked")


def layout(name: str, seed: int = 0, length: int = 6, chunk: int = 3) -> tuple[Tokens, Tokens]:
    """Queries and keys of two rows, as forwards and caches hand them over."""
    rng = random.Random(seed)
    whole = plain(2, length)
    if name == "plain":
        return whole, whole
    if name in ("chunk", "step"):  # the last tokens, with a cache that holds them all: bottom-right
        new = chunk if name == "chunk" else 1
        return plain(2, new, start=length - new), whole
    position = torch.arange(length).repeat(2, 1)
    document = torch.zeros_like(position)
    if name == "left padding":
        position[1] = torch.tensor([HOLE] * 2 + list(range(length - 2)))
    elif name == "right padding":
        position[0, -2:] = HOLE
    elif name == "documents":
        for b, first in enumerate((length // 2, 2)):
            position[b] = torch.tensor([*range(first), *range(length - first)])
            document[b, first:] = 3
    elif name == "shuffled":  # a ring after some turns, with a hole; queries at its largest positions
        order = list(range(length))
        for b in range(2):
            rng.shuffle(order)
            position[b] = torch.tensor(order) + 2
            position[b, rng.randrange(length)] = HOLE
        keys = Tokens(position, document)
        late = torch.tensor([[length, length + 1], [length - 1, HOLE]])
        return Tokens(late, torch.zeros_like(late)), keys
    elif name == "fixed":  # keys with empty places after them, so that their span is not known, that of queries is
        position[:, 4:] = HOLE
        return plain(2, 2, start=2), Tokens(position, document)
    elif name == "marked":
        marked = torch.tensor([[j in (0, 1, 4) for j in range(length)], [j < 3 for j in range(length)]])
        tokens = Tokens(position, document, marked)
        return tokens, tokens
    tokens = Tokens(position, document)
    return tokens, tokens
