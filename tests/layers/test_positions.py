"""Positions added to the input, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import Draw, LearnedPositionSpec, SinusoidalPositionSpec
from lamina.tokens import HOLE, Tokens, plain


def interleaved(position: int, width: int, base: float) -> list[float]:
    """arXiv:1706.03762, section 3.5."""
    angles = [position / base ** (2 * (i // 2) / width) for i in range(width)]
    return [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]


def halves(position: int, width: int, base: float) -> list[float]:
    """tensor2tensor's get_timing_signal_1d, which fairseq follows."""
    pairs = width // 2
    angles = [position * math.exp(-i * math.log(base) / (pairs - 1)) for i in range(pairs)]
    return [*map(math.sin, angles), *map(math.cos, angles), *[0.0] * (width % 2)]


@pytest.mark.parametrize("order, naive", [("interleaved", interleaved), ("halves", halves)])
@pytest.mark.parametrize("width", [4, 8, 7, 64])
@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_sinusoids(order: str, naive, width: int, base: float):
    positions = [[0, 1, 2, 31, 1000], [5, 4, 3, 2, 511]]
    tokens = Tokens(torch.tensor(positions), torch.zeros(2, 5, dtype=torch.int64))
    found = SinusoidalPositionSpec(order=order, base=base).build(width)(tokens)
    expected = torch.tensor([[naive(p, width, base) for p in row] for row in positions])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # float32 angles up to 1000
    torch.testing.assert_close(found[0, :3], expected[0, :3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_sinusoids_that_count_from_elsewhere(offset: int):
    tokens = Tokens(torch.tensor([[0, 1, 7], [3, 2, 0]]), torch.zeros(2, 3, dtype=torch.int64))
    found = SinusoidalPositionSpec(order="halves", offset=offset).build(9)(tokens)
    expected = torch.tensor([[halves(p + offset, 9, 1e4) for p in row] for row in tokens.position.tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(LaminaError, match="offset >= 0"):
        SinusoidalPositionSpec(offset=-1)


def test_sinusoids_against_marian():
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(20, 16)  # all sines, then all cosines, with the paper's exponent
    theirs.weight = torch.nn.Parameter(theirs.create_weight())
    ours = SinusoidalPositionSpec().build(16)(plain(1, 20))[0]
    torch.testing.assert_close(
        torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1), theirs.weight.detach(), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_read_their_row(offset: int):
    module = LearnedPositionSpec(size=8, offset=offset).build(4)
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    assert module.weight.shape == (8 + offset, 4)
    assert 0.01 < module.weight.std() < 0.03
    position = torch.tensor([[HOLE, HOLE, 0, 1], [4, 5, 6, 7]])
    found = module(Tokens(position, torch.zeros_like(position)))
    for b in range(2):
        for t in range(4):
            # RoBERTa: padding reads row offset - 1; without such a row it reads some row, and nobody sees it.
            row = max(int(position[b, t]) + offset, 0)
            assert torch.equal(found[b, t], module.weight[row])


def test_positions_beyond_the_table_are_refused():
    module = LearnedPositionSpec(size=4, offset=2).build(4)
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    module(plain(1, 4))
    for tokens in (plain(1, 5), Tokens(torch.tensor([[HOLE, 0, 4]]), torch.zeros(1, 3, dtype=torch.int64))):
        with pytest.raises(LaminaError, match="position 4 is beyond this model: it has learned 4 positions"):
            module(tokens)
