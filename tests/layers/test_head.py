"""Heads against their formulas."""

from __future__ import annotations

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import (
    Call,
    Draw,
    FeedForwardSpec,
    LabelHeadSpec,
    LabelStepSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    PoolerSpec,
    TransformSpec,
)
from lamina.tokens import plain
from tests.small import shake

CALL = Call(tokens=plain(2, 3))


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
        head.initialise(Draw(torch.Generator().manual_seed(0)))
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
    torch.testing.assert_close(labels.eval()(x, CALL), x @ labels.dense.weight.T + labels.dense.bias)
    ones = torch.ones(1, 4, dtype=torch.float64)
    for module in (pooler, labels):  # before the dense layer: all dropped leaves its bias
        module.train()
        module.spec = module.spec.replace(dropout=1.0)
        bias = module.dense.bias
        out = module(ones) if module is pooler else module(ones, CALL)
        assert torch.equal(out[0], torch.tanh(bias) if module is pooler else bias)
    other = PoolerSpec(act="relu").build(4).double()
    other.load_state_dict(pooler.state_dict())
    torch.testing.assert_close(other.eval()(x), (x @ pooler.dense.weight.T + pooler.dense.bias).clamp(min=0))


def test_labels_after_a_feed_forward_step():
    step = LabelStepSpec(
        feedforward=FeedForwardSpec(hidden=7, act="relu", gated=False, bias=True), norm=LayerNormSpec()
    )
    labels = LabelHeadSpec(labels=2, task="span", step=step).build(4).double().eval()
    shake(labels)
    x, (up, down, norm) = random(2, 3, 4), (labels.step.feedforward.up, labels.step.feedforward.down, labels.step.norm)
    h = x + (x @ up.weight.T + up.bias).clamp(min=0) @ down.weight.T + down.bias
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    scores = (h * norm.weight + norm.bias) @ labels.dense.weight.T + labels.dense.bias
    torch.testing.assert_close(labels(x, CALL), scores, rtol=0, atol=1e-12)
    answers = torch.tensor([[True, False, True], [True, True, True]])
    lowered = scores - 1e6 * torch.tensor([[0, 1, 0], [0, 0, 0]])[:, :, None]
    torch.testing.assert_close(labels(x, CALL, answers), lowered, rtol=0, atol=1e-9)
    labels.train()
    labels.step.spec = labels.step.spec.replace(dropout=1.0)  # all that is added is dropped
    kept = torch.nn.functional.layer_norm(x, (4,), norm.weight, norm.bias)
    expected = kept @ labels.dense.weight.T + labels.dense.bias
    torch.testing.assert_close(labels(x, CALL), expected, rtol=0, atol=1e-12)


def test_what_goes_into_a_step_is_dropped_and_not_what_it_is_added_to():
    step = LabelStepSpec(
        feedforward=FeedForwardSpec(hidden=500, act="identity", gated=False), norm=LayerNormSpec(), dropout=0.5
    )
    part = step.build(300).double().train()
    with torch.no_grad():
        part.feedforward.up.weight.zero_()[:300].copy_(torch.eye(300))
        part.feedforward.down.weight.zero_()[:, :300].copy_(torch.eye(300))
    part.norm = torch.nn.Identity()
    torch.manual_seed(0)
    share = (part(torch.ones(1, 300, dtype=torch.float64), CALL) - 1).unique(return_counts=True)
    assert share[0].tolist() == [0.0, 4.0]  # doubled by each of two dropouts, or lost in one of them
    assert 40 < share[1][1] < 110  # a quarter of 300


def test_labels_that_make_no_sense_are_refused():
    with pytest.raises(LaminaError, match="after=3 is for answers"):
        LabelHeadSpec(labels=2, after=3)
    with pytest.raises(LaminaError, match="dropout=1.5 must lie"):
        LabelStepSpec(feedforward=FeedForwardSpec(hidden=3), norm=LayerNormSpec(), dropout=1.5)


def test_an_untied_head_has_its_own_values():
    head = LanguageHeadSpec(tied=False).build(64, 50)
    head.initialise(Draw(torch.Generator().manual_seed(0)))
    assert 0.015 < head.weight.std() < 0.025
