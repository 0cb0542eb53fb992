"""Feed-forward layers and activations against their formulas, one number at a time."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from lamina.layers import Call, FeedForwardSpec
from lamina.layers.feedforward import ACTIVATIONS, Activation
from lamina.tokens import plain
from tests.small import shake

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "identity": lambda x: x,
    "tanh": math.tanh,
}


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(ACTIVATIONS) == set(typing.get_args(Activation))


@pytest.mark.parametrize("name", FORMULAS)
def test_activations(name: str):
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, rtol=0, atol=1e-14)


def test_both_gelus_differ_by_what_is_published():
    x = torch.linspace(-6, 6, 120001, dtype=torch.float64)
    difference = (ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)).abs()
    assert difference.max().item() == pytest.approx(4.7324e-4, abs=1e-8)
    assert abs(x[difference.argmax()].item()) == pytest.approx(2.699, abs=1e-3)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(name: str, gated: bool, bias: bool):
    module = FeedForwardSpec(hidden=6, act=name, gated=gated, bias=bias, dropout=0.5).build(4).double().eval()
    shake(module)
    names = {"up", "down"} | ({"gate"} if gated else set())
    assert set(module.state_dict()) == {f"{n}.{p}" for n in names for p in (["weight", "bias"] if bias else ["weight"])}
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(layer: torch.nn.Linear, v: list[float]) -> list[float]:
        shift = layer.bias.tolist() if bias else [0.0] * layer.out_features
        return [sum(w * a for w, a in zip(row, v)) + b for row, b in zip(layer.weight.tolist(), shift)]

    out = module(x, Call(tokens=plain(2, 3)))
    for one, found in zip(x.flatten(0, 1).tolist(), out.flatten(0, 1)):
        up = linear(module.up, one)
        if gated:
            hidden = [FORMULAS[name](g) * u for g, u in zip(linear(module.gate, one), up)]
        else:
            hidden = [FORMULAS[name](u) for u in up]
        torch.testing.assert_close(found, torch.tensor(linear(module.down, hidden)).double(), rtol=0, atol=1e-6)


def test_dropout_stands_after_the_activation():
    module = FeedForwardSpec(hidden=4000, act="sigmoid", gated=False, dropout=0.25).build(2)
    shake(module)
    with torch.no_grad():
        module.up.weight.zero_()  # every hidden value is sigmoid(0) = 1/2, or 0 when dropped, or 2/3 when kept
        module.down.weight.zero_()
        module.down.weight[0] = 1
        module.down.weight[1, :1] = 1
    torch.manual_seed(0)
    x, call = torch.randn(1, 1, 2), Call(tokens=plain(1, 1))
    total = module(x, call)[0, 0, 0].item()
    assert total == pytest.approx(2000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5 * 2 / 3) and total != 2000
    assert {round(module(x, call)[0, 0, 1].item(), 4) for _ in range(30)} == {0.0, 0.6667}
    assert module.eval()(x, call)[0, 0, 0].item() == 2000
