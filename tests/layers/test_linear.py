"""The few-row kernel equals the product in float64, and steps aside where it cannot serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lamina.layers import linear as module
from lamina.layers.linear import FEW, Linear, kernels, linear

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler on this machine")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17, 33, 256])
@pytest.mark.parametrize(("out", "wide"), [(1, 1), (7, 31), (100, 33), (33, 64), (300, 577), (13, 1040)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_float64(rows: int, out: int, wide: int, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, wide).to(dtype), torch.randn(out, wide).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert module._serves(x, weight) == (rows <= FEW[dtype])
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = linear(x, weight, bias)
        torch.set_num_threads(before)
        assert found.dtype == dtype and found.shape == (rows, out)
        assert (found.double() - expected).abs().max() <= BOUND[dtype] * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 3, 8, 40, FEW[torch.int8] + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_have_their_scale(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, 45)[1:].to(dtype), torch.randint(-127, 128, (20, 45), dtype=torch.int8)
    scale, bias = torch.rand(20), torch.randn(20)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    found = linear(x, weight, bias.to(dtype), scale)
    assert found.shape == (1, rows, 20) and found.dtype == dtype
    assert (found.double() - expected).abs().max() < BOUND[dtype] * 3 * expected.abs().max()


@pytest.mark.parametrize("rows", [8, 32])
def test_long_sums_are_as_exact_as_torch_s(rows: int) -> None:
    """Of all positive terms, so that what one running sum in float32 loses shows."""
    torch.manual_seed(2)
    x, weight = torch.rand(rows, 40_000), torch.rand(24, 40_000)
    expected = F.linear(x.double(), weight.double())
    assert ((linear(x, weight).double() - expected) / expected).abs().max() < 1e-6


def test_strided_and_batched_input() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(2, 48, 3).transpose(1, 2), torch.randn(11, 48)
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)
    turned = torch.randn(48, 11).t()
    assert not module._serves(x, turned)
    assert torch.allclose(linear(x, turned), F.linear(x, turned), atol=1e-5)


def test_gradients_are_torch_s() -> None:
    layer, plain = Linear(9, 5), torch.nn.Linear(9, 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 9, requires_grad=True)
    assert torch.equal(layer(x), plain(x)) and bool(layer.bias.abs().min() > 0)
    layer(x).sum().backward()
    mine, x.grad = x.grad, None
    plain(x).sum().backward()
    assert torch.equal(mine, x.grad) and torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_torch_s(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 8).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    values, scale = torch.randint(-127, 128, (4, 8), dtype=torch.int8), torch.rand(4)
    assert torch.equal(linear(x, values, None, scale), F.linear(x, values.to(dtype)) * scale.to(dtype))


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    kernels.cache_clear()
    try:
        assert kernels() is None
        with torch.no_grad():
            x, weight = torch.randn(1, 40), torch.randn(6, 40)
            assert torch.equal(linear(x, weight), F.linear(x, weight))
        monkeypatch.delenv("CC")
        kernels.cache_clear()
        built = kernels()
        assert built is None or len(list(tmp_path.glob("rows-*.so"))) == 1
    finally:
        monkeypatch.undo()
        kernels.cache_clear()
