"""Heads against their formulas."""

from __future__ import annotations

import pytest
import torch

from lamina.layers import LabelHeadSpec, LanguageHeadSpec, LayerNormSpec, PoolerSpec, TransformSpec
from tests.small import shake


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("transform", [None, TransformSpec(act="gelu", norm=LayerNormSpec(eps=1e-12))])
def test_logits(tied: bool, bias: bool, scale: float, softcap: float | None, transform: TransformSpec | None):
    spec = LanguageHeadSpec(tied=tied, bias=bias, scale=scale, softcap=softcap, transform=transform)
    head = spec.build(4, 9).double()
    with torch.no_grad():
        head.initialise(torch.Generator().manual_seed(0))
    if bias:
        assert torch.equal(head.bias, torch.zeros(9, dtype=torch.float64))
    shake(head)
    x, table = random(2, 3, 4), random(9, 4) * 2
    h = x
    if transform is not None:
        h = h @ head.transform.dense.weight.T + head.transform.dense.bias
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-12).sqrt()
        h = h * head.transform.norm.weight + head.transform.norm.bias
    logits = (scale * h) @ (table if tied else head.weight).T
    logits = logits + (head.bias if bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(head(x, table), logits, rtol=0, atol=1e-12)


def test_pooler_and_labels():
    pooler, labels = PoolerSpec(dropout=0.5).build(4).double(), LabelHeadSpec(labels=3, dropout=0.5).build(4).double()
    shake(pooler)
    shake(labels)
    x = random(5, 4)
    expected = torch.tanh(x @ pooler.dense.weight.T + pooler.dense.bias)
    torch.testing.assert_close(pooler.eval()(x), expected)
    torch.testing.assert_close(labels.eval()(x), x @ labels.dense.weight.T + labels.dense.bias)
    ones = torch.ones(1, 4, dtype=torch.float64)
    for module in (pooler, labels):  # before the dense layer: all dropped leaves its bias
        module.train()
        module.spec = module.spec.replace(dropout=1.0)
        bias = module.dense.bias
        assert torch.equal(module(ones)[0], torch.tanh(bias) if module is pooler else bias)


def test_an_untied_head_has_its_own_values():
    head = LanguageHeadSpec(tied=False).build(64, 50)
    head.initialise(torch.Generator().manual_seed(0))
    assert 0.015 < head.weight.std() < 0.025
