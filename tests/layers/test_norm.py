"""Norms against their formulas and against transformers, in every dtype that decides an order of operations."""

from __future__ import annotations

import math

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import Draw, LayerNormSpec, RMSNormSpec
from tests.small import shake

NUMBERS = torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_published_vectors():
    # (x - 2.5) / sqrt(1.25 + 1e-5) and x / sqrt(7.5 + 1e-6), worked by hand
    layer = LayerNormSpec(eps=1e-5).build(4)(NUMBERS)
    rms = RMSNormSpec(eps=1e-6).build(4)(NUMBERS)
    torch.testing.assert_close(layer, torch.tensor([-1.3416355, -0.4472118, 0.4472118, 1.3416355]))
    torch.testing.assert_close(rms, torch.tensor([0.3651483, 0.7302967, 1.0954452, 1.4605935]))


def naive_layer(x: list[float], weight: list[float], bias: list[float] | None, eps: float) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    out = [w * (v - mean) / math.sqrt(variance + eps) for v, w in zip(x, weight)]
    return out if bias is None else [o + b for o, b in zip(out, bias)]


def naive_rms(x: list[float], weight: list[float], eps: float, plus_one: bool) -> list[float]:
    square = sum(v * v for v in x) / len(x)
    return [v / math.sqrt(square + eps) * (w + plus_one) for v, w in zip(x, weight)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("size", [1.0, 1e-3])  # where eps shows
def test_the_formulas(dtype: torch.dtype, tolerance: float, size: float):
    x = (torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size).to(dtype)
    for eps in (1e-5, 1e-12):
        for bias in (True, False):
            layer = LayerNormSpec(eps=eps, bias=bias).build(5).to(dtype)
            shake(layer)
            assert (layer.bias is None) != bias
            for one, out in zip(x.flatten(0, 1), layer(x).flatten(0, 1)):
                shift = layer.bias.tolist() if bias else None
                expected = torch.tensor(naive_layer(one.tolist(), layer.weight.tolist(), shift, eps), dtype=dtype)
                torch.testing.assert_close(out, expected, rtol=tolerance * 10, atol=tolerance)
        plain = LayerNormSpec(eps=eps, bias=False, weight=False).build(5)
        assert list(plain.parameters()) == []
        for one, out in zip(x.flatten(0, 1), plain(x).flatten(0, 1)):
            expected = torch.tensor(naive_layer(one.tolist(), [1.0] * 5, None, eps), dtype=dtype)
            torch.testing.assert_close(out, expected, rtol=tolerance * 10, atol=tolerance)
        for plus_one in (True, False):
            for wide in (True, False):
                rms = RMSNormSpec(eps=eps, plus_one=plus_one, wide_product=wide).build(5).to(dtype)
                shake(rms)
                for one, out in zip(x.flatten(0, 1), rms(x).flatten(0, 1)):
                    expected = torch.tensor(naive_rms(one.tolist(), rms.weight.tolist(), eps, plus_one), dtype=dtype)
                    torch.testing.assert_close(out, expected, rtol=tolerance * 10, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_order_of_cast_and_product_is_transformers(dtype: torch.dtype):
    """LLaMA casts, then multiplies; Gemma multiplies by 1 + weight in float32, then casts."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = {
        LlamaRMSNorm: RMSNormSpec(eps=1e-5),
        GemmaRMSNorm: RMSNormSpec(eps=1e-5, plus_one=True, wide_product=True),
    }
    outs = []
    for kind, spec in ours.items():
        norm, theirs = spec.build(64).to(dtype), kind(64, eps=1e-5).to(dtype)
        shake(norm)
        theirs.load_state_dict(norm.state_dict())
        out = norm(x)
        assert out.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(out, theirs(x), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(out, theirs(x))
            other = spec.replace(wide_product=not spec.wide_product).build(64).to(dtype)
            other.load_state_dict(norm.state_dict())
            assert not torch.equal(other(x), out)  # the other order is another function
        outs.append(out)


def test_a_bias_without_a_weight_is_refused():
    with pytest.raises(LaminaError, match="weight=False needs bias=False"):
        LayerNormSpec(weight=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_a_weight_nothing_is_multiplied(dtype: torch.dtype):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for wide in (True, False):
        norm = RMSNormSpec(eps=0.1, weight=False, wide_product=wide).build(8).to(dtype)
        assert list(norm.parameters()) == []
        norm.initialise(Draw(torch.Generator()))
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
        assert norm(x).dtype == dtype
        torch.testing.assert_close(norm(x), exact.to(dtype))
    with pytest.raises(LaminaError, match="1 [+] weight needs a weight"):
        RMSNormSpec(plus_one=True, weight=False)


def test_large_values_do_not_overflow_in_float16():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    assert torch.equal(RMSNormSpec().build(4).half()(x), torch.ones(1, 4, dtype=torch.float16))


def test_gradients():
    for spec in (LayerNormSpec(), RMSNormSpec(plus_one=True, wide_product=True), RMSNormSpec()):
        norm = spec.build(5).double()
        shake(norm)
        x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
        assert torch.autograd.gradcheck(norm, (x,))


def test_initial_values():
    generator = torch.Generator().manual_seed(0)
    for spec, start in ((LayerNormSpec(), 1.0), (RMSNormSpec(), 1.0), (RMSNormSpec(plus_one=True), 0.0)):
        norm = spec.build(4)
        assert torch.equal(norm.weight, torch.full((4,), start))
        shake(norm)
        norm.initialise(Draw(generator))
        assert torch.equal(norm.weight, torch.full((4,), start))
        if spec == LayerNormSpec():
            assert torch.equal(norm.bias, torch.zeros(4))
        torch.testing.assert_close(norm(NUMBERS).square().mean(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
