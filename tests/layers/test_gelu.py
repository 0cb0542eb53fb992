"""The kernel of GELU's tanh formula: the formula in float64, its derivative, and where it steps aside."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lamina.layers import gelu as module
from lamina.layers.gelu import LEAST, gelu_tanh, kernels

EPSILON = {torch.float32: 2e-7, torch.bfloat16: 2**-8}


def formula(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("over", [0, 1, 63, 16384 + 7])
def test_equals_the_formula_and_its_derivative(dtype: torch.dtype, threads: int, over: int):
    torch.manual_seed(over)
    x = (torch.randn(LEAST + over, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    assert module._serves(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = gelu_tanh(x)
        (found,) = torch.autograd.grad(y, x, upstream)
        with torch.no_grad():
            assert torch.equal(gelu_tanh(x), y)
    finally:
        torch.set_num_threads(before)
    wide = x.detach().double().requires_grad_()
    expected = formula(wide)
    (slope,) = torch.autograd.grad(expected, wide, upstream.double())
    bound = EPSILON[dtype] * (1 + wide.detach().abs())
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert bool(((found.double() - slope).abs() <= 2 * bound * (1 + upstream.double().abs())).all())


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler on this machine")
def test_a_value_does_not_depend_on_its_place():
    values = torch.linspace(-9, 9, 1009)  # a prime, so that each value stands at every place of a vector
    for dtype in EPSILON:
        y = gelu_tanh(values.repeat(LEAST // 1009 + 1).to(dtype))
        assert torch.equal(y, y[:1009].repeat(LEAST // 1009 + 1))


@pytest.mark.skipif(kernels() is None, reason="there is no C compiler on this machine")
def test_the_ends_of_the_line():
    x = torch.zeros(LEAST)
    x[:6] = torch.tensor([30.0, -30.0, 1e30, -0.0, math.nan, math.inf])
    y = gelu_tanh(x)
    assert y[:4].tolist() == [30.0, pytest.approx(0, abs=1e-30), pytest.approx(1e30), 0.0]
    assert math.isnan(y[4]) and y[5] == math.inf and not y[6:].any()


def test_strided_input_and_gradient():
    x = torch.randn(300, 400, requires_grad=True)
    turned = gelu_tanh(x.t())
    plain = F.gelu(x.t(), approximate="tanh")
    with torch.no_grad():
        assert torch.equal(gelu_tanh(x.t()), turned)
        every_other = torch.randn(300, 800)[:, ::2]  # unlike a turned one, it has holes between its elements
        assert torch.equal(gelu_tanh(every_other), gelu_tanh(every_other.contiguous()))
    upstream = torch.randn(300, 400).t()
    torch.testing.assert_close(turned, plain, rtol=0, atol=2e-6)
    one, other = (torch.autograd.grad(y, x, upstream)[0] for y in (turned, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("x", [torch.randn(LEAST - 1), torch.randn(LEAST).double(), torch.randn(LEAST).half()])
def test_the_rest_is_torch_s(x: torch.Tensor):
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    kernels.cache_clear()
    try:
        x = torch.randn(LEAST)
        assert kernels() is None and torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    finally:
        monkeypatch.undo()
        kernels.cache_clear()
