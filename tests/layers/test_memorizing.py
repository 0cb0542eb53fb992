"""Memorizing attention against a loop over queries and keys, and what its approximate search finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import AttentionSpec, Call, MemorizingSpec, MemoryAttentionSpec
from lamina.layers import memorizing as module
from lamina.layers.memorizing import nearest, nearest_clustered
from lamina.patterns import Causal, Window
from lamina.tokens import plain
from tests import small
from tests.layers.memories import heads_of, random, soft

WIDTH = 10


def layer_of(gate: str = "sigmoid", heads: int = 4, key_heads: int = 2, seed: int = 0, **fields: Any) -> Any:
    attention = AttentionSpec(heads=heads, key_heads=key_heads, head_dim=5, pattern=Causal() & Window(back=3))
    memory = MemorizingSpec(**({"length": 4, "size": 6, "count": 3, "gate": gate} | fields))
    layer = MemoryAttentionSpec(attention=attention, memory=memory).build(WIDTH).double()
    small.shake(layer, seed)
    return layer


def written_out(layer: Any, x: Tensor) -> Tensor:
    """(T, width) -> (T, width) (arXiv:2203.08913, section 3.1)."""
    query, key, value = heads_of(layer, x)
    spec, length = layer.memory.spec, len(x)
    gate = layer.memory.gate.tanh() if spec.gate == "zero" else layer.memory.gate.sigmoid()
    rows = []
    for t in range(length):
        start = t // spec.length * spec.length
        stored = [j for j in range(max(start - spec.size, 0), start) if j <= t - 3]  # 3: what the window sees
        out = []
        for h in range(layer.spec.heads):
            near = slice(max(t - 2, 0), t + 1)
            local = soft(query[h, t], key[h, near], value[h, near], 5**-0.5)
            if stored:
                asked, keys = F.normalize(query[h, t], dim=0), F.normalize(key[h, stored].detach(), dim=1)
                scores = keys @ asked
                best = sorted(range(len(stored)), key=lambda j: -float(scores[j].detach()))[: spec.count]
                share = (scores[best] * layer.memory.sharpness[h]).softmax(0)
                local = local + gate[h] * (share @ value[h, stored].detach()[best] - local)
            out.append(local)
        rows.append(torch.cat(out))
    return torch.stack(rows) @ layer.o.weight.T


@torch.no_grad()
@pytest.mark.parametrize("gate", ["sigmoid", "zero"])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
def test_the_paper_written_out(gate: str, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch):
    for seed, scores in enumerate((1 << 24, 200)):  # in one chunk of queries, and in several
        monkeypatch.setattr(module, "SCORES", scores)
        layer = layer_of(gate, heads, key_heads, seed)
        x = random(2, 19, WIDTH, seed=seed)
        found = layer(x, Call(tokens=plain(2, 19)))
        for row in range(2):
            torch.testing.assert_close(found[row], written_out(layer, x[row]), rtol=0, atol=1e-11)


def test_the_memory_gives_no_gradient_and_its_readers_get_theirs():
    layer, x = layer_of(seed=3), random(1, 14, WIDTH)
    found = torch.autograd.grad(layer(x, Call(tokens=plain(1, 14)))[0].square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(written_out(layer, x[0]).square().sum(), list(layer.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_search_is_exact():
    query, key = random(2, 6, 7, 5), random(2, 3, 11, 5, seed=1)
    mask = random(2, 1, 7, 11, seed=2) > 0
    mask[0, 0, 3] = False
    found = nearest(query, key, mask, 4)
    for b in range(2):
        for h in range(6):
            for t in range(7):
                allowed = [j for j in range(11) if mask[b, 0, t, j]]
                best = sorted(allowed, key=lambda j: -float(query[b, h, t] @ key[b, h // 2, j]))[:4]
                assert found[b, h, t].tolist() == best + [-1] * (4 - len(best))


def test_all_clusters_find_what_the_exact_search_finds():
    query, key = random(2, 4, 5, 6), F.normalize(random(2, 2, 30, 6, seed=1), dim=-1)
    mask = random(2, 1, 5, 30, seed=2) > -1
    found = nearest_clustered(query, key, mask, 8, 7, 7)
    assert torch.equal(found.sort(dim=-1).values, nearest(query, key, mask, 8).sort(dim=-1).values)


def test_what_an_approximate_search_finds():
    """Keys that lie in clusters, as those of a trained model do: 4 of 16 clusters hold 9 of 10 of the nearest 32."""
    centre = random(24, 16, seed=4)
    of = torch.randint(24, (2048,), generator=torch.Generator().manual_seed(5))
    key = F.normalize(centre[of] + 0.5 * random(2048, 16, seed=6), dim=-1)[None, None]
    query = F.normalize(centre[of[:64]] + 0.5 * random(64, 16, seed=7), dim=-1)[None, None]
    mask = torch.ones(1, 1, 64, 2048, dtype=torch.bool)
    exact = nearest(query, key, mask, 32)[0, 0]

    def recall(probes: int) -> float:
        found = nearest_clustered(query, key, mask, 32, 16, probes)[0, 0]
        assert all(len(set(row)) == 32 for row in found.tolist())
        return sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)) / exact.numel()

    assert recall(4) > 0.9 and recall(1) < recall(4) and recall(16) == 1.0


@torch.no_grad()
def test_where_a_search_finds_nothing_the_local_attention_stands(monkeypatch: pytest.MonkeyPatch):
    layer, x, call = layer_of(), random(1, 19, WIDTH), Call(tokens=plain(1, 19))
    monkeypatch.setattr(module, "nearest", lambda query, key, mask, count: torch.full((*query.shape[:3], count), -1))
    found = layer(x, call)
    layer.memory.gate.fill_(-float("inf"))
    torch.testing.assert_close(found, layer(x, call), rtol=0, atol=1e-12)


def test_an_approximate_layer_with_all_clusters_is_the_exact_one():
    x, call = random(1, 19, WIDTH), Call(tokens=plain(1, 19))
    exact, approximate = layer_of(), layer_of(clusters=4, probes=4)
    torch.testing.assert_close(approximate(x, call), exact(x, call), rtol=0, atol=1e-12)


def test_what_cannot_be_is_refused():
    with pytest.raises(LaminaError, match=r"MemorizingSpec.count is 0; it must be at least 1"):
        MemorizingSpec(length=4, size=6, count=0)
    with pytest.raises(LaminaError, match="sees every earlier key and leaves nothing"):
        MemoryAttentionSpec(
            attention=AttentionSpec(heads=2, key_heads=1, head_dim=4), memory=MemorizingSpec(length=4, size=6)
        ).build(8)
