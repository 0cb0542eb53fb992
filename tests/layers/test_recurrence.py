"""Segment recurrence against a loop over segments that keeps hidden states, detached: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import AttentionSpec, Call, MemoryAttentionSpec, Record, RecurrenceSpec, TransformerXLSpec
from lamina.patterns import Causal, Prefix, Window
from lamina.tokens import plain
from tests import small
from tests.layers.memories import MEMORIES, build, heads_of, random

WIDTH, SIZE = 10, 4


def layers_of(length: int, size: int, heads: int, key_heads: int, seed: int) -> list[Any]:
    attention = AttentionSpec(
        heads=heads, key_heads=key_heads, head_dim=SIZE, relative=TransformerXLSpec(base=50.0), pattern=Causal()
    )
    spec = MemoryAttentionSpec(attention=attention, memory=RecurrenceSpec(length=length, size=size))
    made = [spec.build(WIDTH).double() for _ in range(2)]
    for i, layer in enumerate(made):
        small.shake(layer, seed + i)
    return made


def ours(layers: list[Any], x: Tensor) -> Tensor:
    call = Call(tokens=plain(x.shape[0], x.shape[1]))
    for layer in layers:
        x = x + layer(x, call)
    return x


def waves(distance: int) -> Tensor:
    """r of a distance: sines, then cosines (arXiv:1901.02860, section 3.3)."""
    angle = distance / 50.0 ** (torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    return torch.cat([angle.sin(), angle.cos()])


def written_out(layers: list[Any], x: Tensor) -> Tensor:
    """One row (T, width), a segment, a head and a query at a time; inputs are kept, detached, and projected anew."""
    spec = layers[0].memory.spec
    memories: list[list[tuple[int, Tensor]]] = [[] for _ in layers]
    out = []
    for start in range(0, len(x), spec.length):
        h = x[start : start + spec.length]
        for layer, memory in zip(layers, memories, strict=True):
            query, key, value = heads_of(layer, h)
            own = [(start + j, key[:, j], value[:, j]) for j in range(len(h))]
            kept = []
            for at, one in memory:
                _, old_key, old_value = heads_of(layer, one[None])
                kept.append((at, old_key[:, 0], old_value[:, 0]))
            rows = []
            for i in range(len(h)):
                seen = [one for one in kept if one[0] >= start - spec.size] + own[: i + 1]
                result = []
                for n in range(layer.spec.heads):
                    projected = layer.relative.project.weight.unflatten(0, (-1, SIZE))[n]
                    scores = [
                        (query[n, i] + layer.relative.content[n]) @ k[n]
                        + (query[n, i] + layer.relative.position[n]) @ (projected @ waves(start + i - at))
                        for at, k, _ in seen
                    ]
                    share = (torch.stack(scores) * SIZE**-0.5).softmax(0)
                    result.append(share @ torch.stack([v[n] for _, _, v in seen]))
                rows.append(torch.cat(result))
            memory += [(start + j, one.detach()) for j, one in enumerate(h)]
            h = h + torch.stack(rows) @ layer.o.weight.T
        out.append(h)
    return torch.cat(out)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize(("length", "size"), [(4, 6), (3, 2), (5, 5)])
def test_a_loop_over_segments(length: int, size: int, heads: int, key_heads: int):
    made = layers_of(length, size, heads, key_heads, seed=length)
    x = random(2, 11, WIDTH, seed=size).requires_grad_()
    target = random(2, 11, WIDTH, seed=9)
    parameters = [x, *(p for layer in made for p in layer.parameters())]
    found = (ours(made, x) - target).square().sum()
    expected = sum((written_out(made, x[row]) - target[row]).square().sum() for row in range(2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # float32 waves
    for mine, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
def test_without_gradients_it_is_the_same():
    made, x = layers_of(4, 6, 4, 2, 0), random(1, 11, WIDTH)
    found = ours(made, x)
    with torch.enable_grad():
        torch.testing.assert_close(ours(made, x.requires_grad_()).detach(), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["recurrence", "compressive, mean", "compressive, most used"])
def test_pieces_have_the_gradient_of_the_whole(name: str):
    """Truncated backpropagation over consecutive windows, cut between segments, is one backward over the text."""
    model, ids, length = build(name).train(), small.ids(2, 24), MEMORIES[name][0].length
    model(ids).hidden.square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    cache = model.new_cache("auto", 2)
    for part in ids.split([length, 2 * length, 24 - 3 * length], dim=1):
        model(part, cache=cache).hidden.square().sum().backward()
        cache.detach()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for mine, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert name != "recurrence" or len(cache.slots) == 4  # keys and values of two layers, and their inputs


@torch.no_grad()
def test_a_text_within_one_segment_is_read_as_before():
    attention = AttentionSpec(heads=4, key_heads=2, head_dim=4, pattern=Causal() & Window(back=5))
    layer: Any = MemoryAttentionSpec(attention=attention, memory=RecurrenceSpec(length=9, size=3)).build(WIDTH)
    before: Any = attention.build(WIDTH)
    before.load_state_dict(layer.state_dict())
    x, call = random(2, 9, WIDTH).float(), Call(tokens=plain(2, 9))
    assert torch.equal(layer(x, call), before(x, call))


@pytest.mark.parametrize("graded", [False, True])
def test_it_records_what_a_segment_reads(graded: bool):
    model, record = build("recurrence"), Record("*.weights")
    with torch.set_grad_enabled(graded):
        model(small.ids(1, 8), record=record)
    seen = next(iter(record.values.values()))[0, 0] > 0
    assert ["".join(".x"[bool(one)] for one in row) for row in seen] == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xxxxxx..",
        "..xxxxx.",
        "..xxxxxx",
    ]


def test_what_cannot_be_is_refused():
    with pytest.raises(LaminaError, match=r"RecurrenceSpec.size is 0; it must be at least 1"):
        RecurrenceSpec(length=4, size=0)
    with pytest.raises(LaminaError, match=r"cannot be beside marked tokens \(Prefix\)"):
        MemoryAttentionSpec(
            attention=AttentionSpec(heads=2, key_heads=1, head_dim=4, pattern=Causal() & Prefix()),
            memory=RecurrenceSpec(length=4, size=6),
        ).build(8)
