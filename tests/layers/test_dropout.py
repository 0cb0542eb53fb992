"""Dropout of activations and of branches: expectation, determinism, both ends."""

from __future__ import annotations

import pytest
import torch

from lamina.layers.dropout import drop_branch, dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(rate: float):
    torch.manual_seed(0)
    x = torch.full((200_000,), 3.0)
    out = dropout(x, rate, True)
    assert out.unique().tolist() == pytest.approx([0.0, 3 / (1 - rate)])
    share = (out == 0).float().mean().item()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / 200_000) ** 0.5
    assert abs(out.mean().item() - 3) < 5 * 3 * (rate / (1 - rate) / 200_000) ** 0.5


@pytest.mark.parametrize("drop", [dropout, drop_branch])
def test_both_ends_and_evaluation(drop):
    x = torch.randn(4, 3, 2, requires_grad=True)
    assert drop(x, 0.5, False) is x and drop(x, 1.0, False) is x and drop(x, 0.0, True) is x
    out = drop(x, 1.0, True)
    assert torch.equal(out, torch.zeros_like(x))  # and no NaN from 1 / 0
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))
    torch.manual_seed(0)
    first = drop(x, 0.5, True)
    torch.manual_seed(0)
    assert torch.equal(drop(x, 0.5, True), first)


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_stochastic_depth_drops_whole_rows(rate: float):
    torch.manual_seed(0)
    x = torch.rand(20_000, 2, 3) + 1
    out = drop_branch(x, rate, True)
    dropped = (out == 0).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1))
    kept = ~dropped.all(1)
    torch.testing.assert_close(out[kept], x[kept] / (1 - rate))
    assert abs(1 - kept.float().mean().item() - rate) < 5 * (rate * (1 - rate) / 20_000) ** 0.5
    assert drop_branch(x.bfloat16(), rate, True).dtype == torch.bfloat16
