"""Several linear layers as one product: the same numbers and gradients, and only where that is what was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lamina.layers.linear import Linear, together


def layers(*sizes: int, bias: bool = True) -> list[Linear]:
    torch.manual_seed(3)
    return [Linear(7, size, bias=bias).double() for size in sizes]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The outputs of every product from now on."""
    products: list[int] = []
    product = torch.nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        products.append(len(weight))
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return products


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_each_layer_with_its_gradients(monkeypatch: pytest.MonkeyPatch, bias: bool):
    mine, plain = layers(6, 3, 5, bias=bias), [nn.Linear(7, size, bias=bias).double() for size in (6, 3, 5)]
    for one, other in zip(mine, plain, strict=True):
        other.load_state_dict(one.state_dict())
    x = torch.randn(3, 101, 7, dtype=torch.float64)
    products = counted(monkeypatch)
    inputs, results = [], []
    for group in (mine, plain):
        read = x.clone().requires_grad_()
        outs = together(read, group) if group is mine else [layer(read) for layer in group]
        sum((out * (n + 1)).square().sum() for n, out in enumerate(outs)).backward()  # pyright: ignore
        inputs.append(read.grad)
        results.append(outs)
    assert products == [14, 6, 3, 5]
    for one, other in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(inputs[0], inputs[1])
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one.weight.grad, other.weight.grad)
        if bias:
            torch.testing.assert_close(one.bias.grad, other.bias.grad)


class Another(Linear):
    """A layer with a forward of its own."""


def hooked(group: list[Linear]) -> list[Any]:
    group[1].register_forward_hook(lambda *given: None)
    return [*group]


def frozen(group: list[Linear]) -> list[Any]:
    group[1].weight.requires_grad_(False)
    return [*group]


def other(group: list[Linear]) -> list[Any]:
    made = Another(7, 3).double()
    return [group[0], made, group[2]]


def mixed(group: list[Linear]) -> list[Any]:
    return [group[0], Linear(7, 3, bias=False).double(), group[2]]


@pytest.mark.parametrize("change", [hooked, frozen, other, mixed])
def test_layers_that_are_more_than_a_product_are_left_alone(monkeypatch: pytest.MonkeyPatch, change: Any):
    group = change(layers(6, 3, 5))
    products = counted(monkeypatch)
    together(torch.randn(303, 7, dtype=torch.float64, requires_grad=True), group)
    assert products == [6, 3, 5]


def test_few_rows_and_rows_without_gradients_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    group = layers(6, 3)
    products = counted(monkeypatch)
    together(torch.randn(256, 7, dtype=torch.float64), group)
    with torch.no_grad():
        together(torch.randn(303, 7, dtype=torch.float64), group)
    assert products == [6, 3, 6, 3]
