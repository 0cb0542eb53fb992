"""Embeddings: lookup, scale, padding, tying."""

from __future__ import annotations

import math

import pytest
import torch

from lamina.layers import Draw, EmbeddingSpec, LanguageHeadSpec, SegmentSpec
from tests import small


def test_a_lookup_is_a_product_with_one_hot_rows():
    module = EmbeddingSpec(vocabulary=7).build(5).double()
    small.shake(module)
    ids = small.ids(2, 4, vocabulary=7)
    one_hot = torch.nn.functional.one_hot(ids, 7).double()
    torch.testing.assert_close(module(ids), one_hot @ module.weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("width", [3072, 2048, 50])
def test_the_scale_is_rounded_or_not(width: int):
    ids = small.ids(1, 4, vocabulary=9)
    for dtype in (torch.bfloat16, torch.float32):
        plain = EmbeddingSpec(vocabulary=9).build(width).to(dtype)
        small.shake(plain)
        for scale in ("root", "rounded_root"):
            module = EmbeddingSpec(vocabulary=9, scale=scale).build(width).to(dtype)
            module.load_state_dict(plain.state_dict())
            factor = torch.tensor(math.sqrt(width), dtype=torch.float64)
            factor = factor.to(dtype).double() if scale == "rounded_root" else factor
            expected = (plain(ids).double() * factor).to(dtype)
            assert module(ids).dtype == dtype
            if dtype == torch.bfloat16:
                assert torch.equal(module(ids), expected)
            else:
                torch.testing.assert_close(module(ids), expected, rtol=2e-7, atol=0)
    assert torch.tensor(math.sqrt(3072), dtype=torch.bfloat16).item() == 55.5  # what Gemma's files were trained with


def test_the_row_of_padding_learns_nothing():
    module = EmbeddingSpec(vocabulary=6, padding=2).build(4)
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    assert torch.equal(module.weight[2], torch.zeros(4)) and 0.005 < module.weight.std() < 0.04
    ids = torch.tensor([[2, 1, 2, 5]])
    module(ids).square().sum().backward()
    assert module.weight.grad[2].abs().sum() == 0
    small.shake(module)
    module.weight.grad = None
    module(ids).square().sum().backward()
    assert module.weight.grad[2].abs().sum() == 0 and (module.weight.grad[[1, 5]].abs().sum(1) > 0).all()
    assert module.weight.grad[[0, 3, 4]].abs().sum() == 0


def test_a_tied_gradient_is_the_sum_of_both_sides():
    spec = small.decoder(small.MIXED)
    tied, free = small.build(spec), small.build(spec.replace(head=LanguageHeadSpec(tied=False)))
    free.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight.detach()})
    assert "head.weight" not in tied.state_dict()
    ids = small.ids(2, 6)
    for model in (tied, free):
        model(ids).logits.square().sum().backward()
    torch.testing.assert_close(tied.embedding.weight.grad, free.embedding.weight.grad + free.head.weight.grad)


def test_segments():
    module = SegmentSpec(count=2).build(4)
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    assert torch.equal(module(torch.tensor([[1, 0]])), module.weight[torch.tensor([[1, 0]])])
    assert 0 < module.weight.std() < 0.06
