"""Infini-attention against the paper's recurrence, a segment and a token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import AttentionSpec, Call, InfiniSpec, MemoryAttentionSpec
from lamina.layers.infini import phi
from lamina.patterns import BlockWindow, Causal
from lamina.tokens import plain
from tests import small
from tests.layers.memories import heads_of, random, soft

WIDTH = 10


def layer_of(update: str, gate: str, heads: int, key_heads: int, seed: int) -> Any:
    attention = AttentionSpec(
        heads=heads, key_heads=key_heads, head_dim=5, pattern=Causal() & BlockWindow(size=4, back=1)
    )
    memory = InfiniSpec(length=4, update=update, gate=gate)  # pyright: ignore[reportArgumentType]
    layer = MemoryAttentionSpec(attention=attention, memory=memory).build(WIDTH).double()
    small.shake(layer, seed)
    return layer


def written_out(layer: Any, x: Tensor) -> Tensor:
    """(T, width) -> (T, width) (arXiv:2404.07143, equations 3 to 10)."""
    query, key, value = heads_of(layer, x)
    spec, length = layer.memory.spec, len(x)
    gate = layer.memory.gate.tanh() if spec.gate == "zero" else layer.memory.gate.sigmoid()
    elu = lambda t: torch.nn.functional.elu(t) + 1  # noqa: E731
    out = torch.zeros(length, layer.spec.heads, layer.spec.head_dim, dtype=x.dtype)
    for h in range(layer.spec.heads):
        matrix, total = torch.zeros(5, 5, dtype=x.dtype), torch.zeros(5, dtype=x.dtype)
        for start in range(0, length, 4):
            stop = min(start + 4, length)
            for t in range(start, stop):
                local = soft(query[h, t], key[h, start : t + 1], value[h, start : t + 1], 5**-0.5)
                asked = elu(query[h, t])
                out[t, h] = local if start == 0 else local + gate[h] * (asked @ matrix / (asked @ total) - local)
            keys, values = elu(key[h, start:stop]), value[h, start:stop]
            if spec.update == "delta" and start:
                values = values - (keys @ matrix) / (keys @ total)[:, None]
            matrix, total = matrix + keys.T @ values, total + keys.sum(0)
    return out.flatten(1) @ layer.o.weight.T


@torch.no_grad()
@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("gate", ["sigmoid", "zero"])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
def test_the_paper_written_out(update: str, gate: str, heads: int, key_heads: int):
    for seed, length in enumerate((17, 8, 3)):
        layer = layer_of(update, gate, heads, key_heads, seed)
        x = random(2, length, WIDTH, seed=seed)
        found = layer(x, Call(tokens=plain(2, length)))
        for row in range(2):
            torch.testing.assert_close(found[row], written_out(layer, x[row]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_gradients_flow_through_the_memory(update: str):
    layer, x = layer_of(update, "sigmoid", 4, 2, 1), random(1, 11, WIDTH)
    found = torch.autograd.grad(layer(x, Call(tokens=plain(1, 11)))[0].square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(written_out(layer, x[0]).square().sum(), list(layer.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_phi_keeps_what_a_sum_with_one_would_lose():
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(phi(x).double(), torch.where(x > 0, x + 1, x.double().exp()), rtol=1e-6, atol=0)


def test_the_state_is_float32_and_of_one_size_whatever_the_length():
    layer = layer_of("linear", "sigmoid", 4, 2, 0).bfloat16()
    before = layer.memory._before
    seen: list[Tensor] = []
    layer.memory._before = lambda *given: seen.extend(found := before(*given)) or found
    layer(random(1, 9, WIDTH).bfloat16(), Call(tokens=plain(1, 9)))
    assert [part.dtype for part in seen] == [torch.float32] * 2 and seen[0].shape == (1, 2, 3, 5, 5)


def test_a_segment_has_a_length():
    with pytest.raises(LaminaError, match=r"InfiniSpec.length is 0; it must be at least 1"):
        InfiniSpec(length=0)
