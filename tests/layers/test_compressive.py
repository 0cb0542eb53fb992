"""Compressive memory against a loop over segments, and its own loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import AttentionSpec, Call, CompressiveSpec, MemoryAttentionSpec, RotarySpec
from lamina.tokens import Tokens, plain
from tests import small
from tests.layers.memories import heads_of, random
from tests.oracle import rope

WIDTH, SIZE = 10, 4


def layers_of(
    by: str, heads: int = 4, key_heads: int = 2, seed: int = 0, rotary: RotarySpec | None = None, **fields: Any
) -> list[Any]:
    attention = AttentionSpec(heads=heads, key_heads=key_heads, head_dim=SIZE, rotary=rotary)
    memory = CompressiveSpec(**({"length": 4, "size": 2, "count": 3, "rate": 2, "by": by} | fields))
    made = [MemoryAttentionSpec(attention=attention, memory=memory).build(WIDTH).double().eval() for _ in range(2)]
    for i, layer in enumerate(made):
        small.shake(layer, seed + i)
    return made


def ours(layers: list[Any], x: Tensor, call: Call) -> Tensor:
    for layer in layers:
        x = x + layer(x, call)
    return x


def shorter(layer: Any, h: Tensor) -> Tensor:
    """(rate, width) -> (width,)."""
    by = layer.memory.spec.by
    if by == "convolution":
        one = layer.memory.compress.convolution
        return one.weight @ h.flatten() + one.bias
    return h.mean(0) if by == "mean" else h.amax(0)


def turned(x: Tensor, positions: Iterable[int]) -> Tensor:
    """(H, T, D) with rotary phases."""
    return rope(x, list(positions), [1.0, 50.0**-0.5], False)


def written_out(layers: list[Any], x: Tensor) -> Tensor:
    """One row (T, width), a segment and a query at a time (arXiv:1911.05507, section 3.1); memories are detached."""
    spec = layers[0].memory.spec
    memories: list[list[tuple[int, Tensor]]] = [[] for _ in layers]  # inputs of a layer, and where they stand
    compressed: list[list[tuple[int, Tensor]]] = [[] for _ in layers]
    out = []
    for start in range(0, len(x), spec.length):
        h = x[start : start + spec.length]
        for layer, memory, older in zip(layers, memories, compressed, strict=True):
            while len(memory) > spec.size:  # evicted, as many at a time as become one
                evicted = memory[: spec.rate]
                older.append((evicted[-1][0], shorter(layer, torch.stack([one for _, one in evicted]))))
                del memory[: spec.rate]
            del older[: -spec.count]
            query, key, value = heads_of(layer, h)
            if layer.spec.rotary is not None:
                query, key = (turned(part, range(start, start + len(h))) for part in (query, key))
            past = older + memory
            if past:
                inputs = torch.stack([one.detach() for _, one in past])
                _, past_key, past_value = heads_of(layer, inputs)
                if layer.spec.rotary is not None:
                    past_key = turned(past_key, [at for at, _ in past])
            rows = []
            for i in range(len(h)):
                result = []
                for n in range(layer.spec.heads):
                    keys, values = key[n, : i + 1], value[n, : i + 1]
                    if past:
                        keys, values = torch.cat([past_key[n], keys]), torch.cat([past_value[n], values])  # pyright: ignore
                    result.append((keys @ query[n, i] * SIZE**-0.5).softmax(0) @ values)
                rows.append(torch.cat(result))
            memory += [(start + i, one.detach()) for i, one in enumerate(h)]
            h = h + torch.stack(rows) @ layer.o.weight.T
        out.append(h)
    return torch.cat(out)


@pytest.mark.parametrize("by", ["mean", "max", "convolution"])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize(("rotary", "near"), [(None, 1e-10), (RotarySpec(base=50.0), 1e-5)])  # float32 phases
def test_a_loop_over_segments(by: str, heads: int, key_heads: int, rotary: RotarySpec | None, near: float):
    for seed, fields in enumerate(({}, {"length": 3, "size": 6, "rate": 3, "count": 1})):
        made = layers_of(by, heads, key_heads, seed, rotary, **fields)
        x = random(2, 19, WIDTH, seed=seed).requires_grad_()
        parameters = [x, *(p for layer in made for n, p in layer.named_parameters() if "compress" not in n)]
        found, expected = ours(made, x, Call(tokens=plain(2, 19))), torch.stack([written_out(made, row) for row in x])
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
        pairs = (torch.autograd.grad(one.square().sum(), parameters) for one in (found, expected))
        for mine, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=10 * near, atol=10 * near * float(theirs.abs().max()))


def most_used_written_out(layers: list[Any], x: Tensor) -> Tensor:
    """One row, a query at a time (arXiv:1911.05507, section 3.1), with the sums of what it gave to memories."""
    spec = layers[0].memory.spec
    out = []
    memories: list[list[list[Any]]] = [[] for _ in layers]  # [position, input, how much it was used], oldest first
    older: list[list[list[Any]]] = [[] for _ in layers]
    for start in range(0, len(x), spec.length):
        h = x[start : start + spec.length]
        for i, layer in enumerate(layers):
            if len(memories[i]) > spec.size:
                pushed, memories[i] = memories[i][: spec.length], memories[i][spec.length :]
                best = sorted(pushed, key=lambda one: -one[2])[: spec.length // spec.rate]
                older[i] = (older[i] + sorted(best, key=lambda one: one[0]))[-spec.count :]
            past = older[i] + memories[i]
            inputs = torch.stack([*(one[1] for one in past), *h])
            query, key, value = heads_of(layer, inputs)
            where = [*(one[0] for one in past), *range(start, start + len(h))]
            if layer.spec.rotary is not None:
                query, key = turned(query, where), turned(key, where)
            rows = []
            for t in range(len(past), len(inputs)):
                shares = [(key[n, : t + 1] @ query[n, t] * SIZE**-0.5).softmax(0) for n in range(layer.spec.heads)]
                rows.append(torch.cat([share @ value[n, : t + 1] for n, share in enumerate(shares)]))
                for at, memory in enumerate(memories[i]):
                    memory[2] += sum(float(share[len(older[i]) + at].detach()) for share in shares)
            memories[i] += [[start + j, one.detach(), 0.0] for j, one in enumerate(h)]
            h = h + torch.stack(rows) @ layer.o.weight.T
        out.append(h)
    return torch.cat(out)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize(("rotary", "near"), [(None, 1e-10), (RotarySpec(base=50.0), 1e-5)])  # float32 phases
def test_the_most_used_are_kept(heads: int, key_heads: int, rotary: RotarySpec | None, near: float):
    shapes = ({"size": 4, "count": 4}, {"length": 3, "size": 6, "rate": 3, "count": 2}, {"size": 8, "count": 2})
    for seed, fields in enumerate(shapes):
        made = layers_of("most-used", heads, key_heads, seed, rotary, **fields)
        x = random(2, 23, WIDTH, seed=seed).requires_grad_()
        parameters = [x, *(p for layer in made for p in layer.parameters())]
        found = ours(made, x, Call(tokens=plain(2, 23)))
        expected = torch.stack([most_used_written_out(made, row) for row in x])
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
        pairs = (torch.autograd.grad(one.square().sum(), parameters) for one in (found, expected))
        for mine, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=10 * near, atol=10 * near * float(theirs.abs().max()))


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_documents_of_a_row_keep_their_own_most_used(mixed: bool):
    """One after the other, and in turns: segments leave when those of their own document begin."""
    made = layers_of("most-used", size=4, count=4)
    x, lengths = random(1, 60, WIDTH, seed=4), (26, 11, 23)
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    expected = torch.cat([most_used_written_out(made, one) for one in x[0].split(lengths)])
    turns = torch.argsort(position, stable=True) if mixed else torch.arange(60)
    found = ours(made, x[:, turns], Call(tokens=Tokens(position[turns][None], document[turns][None])))
    torch.testing.assert_close(found[0], expected[turns], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_among_equals_the_earlier_are_kept():
    """Queries of zero look at all keys alike. Position 12 has 8 to 11 as memories, and two of each segment before."""
    layer, x = layers_of("most-used", size=4, count=4)[0], random(1, 13, WIDTH)
    layer.q.weight.zero_()
    value = heads_of(layer, x[0])[2]
    expected = value[:, [0, 1, 4, 5, 8, 9, 10, 11, 12]].mean(dim=1).flatten() @ layer.o.weight.T
    torch.testing.assert_close(layer(x, Call(tokens=plain(1, 13)))[0, 12], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_places_without_a_token_are_not_kept():
    """Positions 1 and 3 of the first segment leave before anybody has read them: both are kept, and not place 0."""
    layer, x = layers_of("most-used", size=4, count=4)[0], random(1, 3, WIDTH)
    layer.q.weight.zero_()
    expected = heads_of(layer, x[0])[2].mean(dim=1).flatten() @ layer.o.weight.T
    found = layer(x, Call(tokens=Tokens(torch.tensor([[1, 3, 9]]), torch.zeros(1, 3, dtype=torch.int64))))
    torch.testing.assert_close(found[0, 2], expected, rtol=0, atol=1e-12)


def test_only_the_compression_learns_from_its_loss_and_from_nothing_else():
    made = layers_of("convolution")
    for layer in made:
        layer.train()
    names = [(i, name) for i, layer in enumerate(made) for name, _ in layer.named_parameters()]
    parameters = [p for layer in made for p in layer.parameters()]
    for i, layer in enumerate(made):
        layer.memory.path = f"layers.{i}.memory"
    call = Call(tokens=plain(1, 15))
    out = ours(made, random(1, 15, WIDTH), call)
    assert list(call.record.losses) == ["layers.0.memory.reconstruction", "layers.1.memory.reconstruction"]
    moved = lambda loss: {  # noqa: E731
        name
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
        if gradient is not None and bool((gradient != 0).any())
    }
    own = {(i, f"memory.compress.convolution.{leaf}") for i in (0, 1) for leaf in ("weight", "bias")}
    assert moved(sum(call.record.losses.values())) == own
    assert moved(out.square().sum()) == set(names) - own


def test_the_loss_is_what_the_compression_loses():
    """arXiv:1911.05507, algorithm 2, a query at a time: segments of 4, memory of 2, so 4 are evicted at a time."""
    layer = layers_of("convolution", loss=0.5)[0].train()
    x = random(2, 14, WIDTH, seed=3)
    call = Call(tokens=plain(2, 14))
    layer(x, call)
    errors = []
    for row in x:
        query, key, value = heads_of(layer, row)
        for t in range(14):
            start = t // 4 * 4
            old = [j for j in range(start - 6, start - 2) if j >= 0]
            if not old:
                continue
            short = torch.stack([shorter(layer, row[j : j + 2]) for j in old[::2]])
            _, short_key, short_value = heads_of(layer, short)
            for h in range(4):
                full = (key[h, old] @ query[h, t] * SIZE**-0.5).softmax(0) @ value[h, old]
                less = (short_key[h] @ query[h, t] * SIZE**-0.5).softmax(0) @ short_value[h]
                errors.append((full - less).square().mean())
    found = call.record.losses[".reconstruction"]
    torch.testing.assert_close(found, 0.5 * torch.stack(errors).mean(), rtol=1e-10, atol=0)


@torch.no_grad()
def test_a_group_with_gaps_is_compressed_of_what_there_is():
    x, there = random(1, 2, 3, WIDTH), torch.tensor([[[True, False, True], [False, False, False]]])
    kept = x[0, 0, [0, 2]]
    for by in ("mean", "max", "convolution"):
        layer = layers_of(by, length=3, size=3, rate=3)[0]
        x[~there] = float("nan")  # whatever stands there
        found = layer.memory.compress(x, there)[0]
        full = torch.stack([kept[0], torch.zeros(WIDTH, dtype=torch.float64), kept[1]])
        torch.testing.assert_close(found[0], shorter(layer, full if by == "convolution" else kept), rtol=0, atol=1e-12)
        assert torch.isfinite(found[1]).all()


def test_its_loss_falls_when_it_is_trained():
    layer = layers_of("convolution")[0].train()
    x = random(8, 14, WIDTH, seed=5)
    optimiser = torch.optim.Adam(layer.memory.compress.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        call = Call(tokens=plain(8, 14))
        layer(x, call)
        losses.append(call.record.losses[".reconstruction"])
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_in_evaluation_and_without_parameters_there_is_no_loss():
    for by, training in (("convolution", False), ("mean", True), ("max", True)):
        layer, call = layers_of(by)[0].train(training), Call(tokens=plain(1, 14))
        layer(random(1, 14, WIDTH), call)
        assert not call.record.losses


def test_what_cannot_be_is_refused():
    with pytest.raises(LaminaError, match=r"CompressiveSpec.count is 0; it must be at least 1"):
        CompressiveSpec(length=4, size=6, count=0, rate=2)
    with pytest.raises(LaminaError, match=r"CompressiveSpec.size is 5; it must be a multiple of rate=2"):
        CompressiveSpec(length=4, size=5, count=1, rate=2)
    with pytest.raises(LaminaError, match=r"CompressiveSpec.length is 5; it must be a multiple of rate=2"):
        CompressiveSpec(length=5, size=4, count=1, rate=2)
    with pytest.raises(LaminaError, match=r"CompressiveSpec.rate is 1; it must be at least 2"):
        CompressiveSpec(length=4, size=4, count=1, rate=1)
    with pytest.raises(LaminaError, match=r"CompressiveSpec.size is 2; by='most-used' needs a multiple of length=4"):
        CompressiveSpec(length=4, size=2, count=2, rate=2, by="most-used")
    with pytest.raises(LaminaError, match=r"count is 3; by='most-used' needs a multiple of length / rate = 2"):
        CompressiveSpec(length=4, size=4, count=3, rate=2, by="most-used")
