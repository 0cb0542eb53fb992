"""A linear layer with a low-rank change beside it, against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.layers.linear import Linear
from lamina.layers.lowrank import LowRank, merged


def made(rate: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = True) -> LowRank:
    torch.manual_seed(0)
    base = Linear(7, 5, bias=bias)
    return LowRank(base, torch.randn(3, 7).to(dtype), torch.randn(5, 3).to(dtype), 0.7, rate)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 300])  # fewer and more than the kernel of few rows takes
def test_it_is_the_formula(bias: bool, rows: int):
    layer = made(bias=bias)
    x = torch.randn(rows, 7)
    wanted = x @ layer.weight.T + 0.7 * (x @ layer.lora_a.T) @ layer.lora_b.T
    wanted = wanted if layer.bias is None else wanted + layer.bias
    torch.testing.assert_close(layer(x), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), wanted)
    assert [name for name, _ in layer.named_parameters()] == ["weight", *["bias"] * bias, "lora_a", "lora_b"]


def test_dropout_is_of_what_a_reads_and_of_nothing_else():
    layer = made(rate=0.5)
    x = torch.randn(6, 7)
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5)
    wanted = F.linear(x, layer.weight, layer.bias) + 0.7 * (kept @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, layer.eval()(x))


def test_factors_of_another_dtype_are_multiplied_in_it():
    layer = made(dtype=torch.float64)
    x = torch.randn(4, 7)
    change = 0.7 * (x.double() @ layer.lora_a.T) @ layer.lora_b.T
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + change.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merging_rounds_once(dtype: torch.dtype):
    layer = made()
    weight = layer.weight.detach().to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = weight.to(wide) + 0.7 * (layer.lora_b.to(wide) @ layer.lora_a.to(wide))
    assert torch.equal(merged(weight, layer.lora_a, layer.lora_b, 0.7), wanted.to(dtype).detach())


def test_the_layer_it_was_made_of_comes_back():
    base = nn.Linear(7, 5)
    layer = LowRank(base, torch.ones(2, 7), torch.ones(5, 2), 1.0, 0.0).eval()
    layer.weight = nn.Parameter(layer.weight * 2)  # as `model.to` may do
    assert layer.detached() is base and base.weight is layer.weight and not base.training
