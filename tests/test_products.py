"""Attention of short texts in training: as exact as the fused kernel at every length, and taken where it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lamina.attend import BACKENDS, Request, attend, products
from lamina.patterns import Causal, Everything, Pattern, Window
from lamina.tokens import plain


def make(
    length: int,
    keys: int | None = None,
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Request:
    """6 query heads over 2 key heads, as projections give them: (B, T, heads, size), turned."""
    generator = torch.Generator().manual_seed(seed)

    def turned(count: int, heads: int, size: int) -> Tensor:
        x = torch.randn(3, count, heads, size, generator=generator, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    keys = length if keys is None else keys
    return Request(
        query=turned(length, 6, 5),
        key=turned(keys, 2, 5),
        value=turned(keys, 2, 7),
        queries=plain(3, length),
        keys=plain(3, keys),
        pattern=pattern or Causal(),
        scale=0.6,
    )


def results(request: Request, backend: str) -> tuple[Tensor, ...]:
    out = attend(request, backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    inputs = (request.query, request.key, request.value)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("scores", [1, 3000, products.SCORES])
@pytest.mark.parametrize(
    "length, keys, pattern",
    [(1, 1, None), (63, 63, None), (65, 65, None), (130, 130, None), (70, 33, Everything()), (129, 200, Everything())],
)
def test_equals_the_formula_at_any_length(
    monkeypatch: pytest.MonkeyPatch, scores: int, length: int, keys: int, pattern: Pattern | None
):
    monkeypatch.setattr(products, "SCORES", scores)
    one, other = make(length, keys, pattern), make(length, keys, pattern)
    for found, expected in zip(results(one, "products"), results(other, "dense"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_fused_kernel(dtype: torch.dtype):
    def errors(backend: str) -> list[float]:
        request = make(200, dtype=dtype)
        exact = replace(
            request,
            **{name: getattr(request, name).detach().double().requires_grad_() for name in ("query", "key", "value")},
        )
        pairs = zip(results(request, backend), results(exact, "dense"), strict=True)
        return [float((found.double() - true).norm() / true.norm()) for found, true in pairs]

    for mine, fused in zip(errors("products"), errors("sdpa"), strict=True):
        assert mine < 2 * fused  # in bfloat16 the probabilities, and their gradients, are rounded once more


def test_gradients_only_where_they_are_asked_for():
    request = make(70)
    still = replace(request, key=request.key.detach())
    out = attend(still, "products")
    out.sum().backward()
    assert still.key.grad is None


def test_it_is_taken_for_short_plain_texts_that_learn():
    request = make(100, dtype=torch.float32)
    first = [name for name, module in BACKENDS.items() if module.refuses(request) is None and module.suits(request)]
    assert first[0] == "products"
    with torch.no_grad():
        assert not products.suits(request)
    assert not products.suits(make(20, dtype=torch.float32))  # too short to gain
    assert not products.suits(make(products.LONGEST + 1, dtype=torch.float32))
    assert not products.suits(make(100, dtype=torch.float16))
    assert products.refuses(make(100, pattern=Causal() & Window(back=3))) == "a mask"
    assert products.refuses(replace(request, dropout=0.1)) == "dropout on the probabilities"
