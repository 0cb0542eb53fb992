"""T5's buckets and ALiBi's slopes: published vectors, transformers' functions, loops."""

from __future__ import annotations

import math

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import AlibiSpec, BucketBiasSpec, Draw
from lamina.layers.bias import bucket, slopes
from lamina.tokens import HOLE, Tokens, plain

# From the published Mesh TensorFlow code, 32 buckets, distance 128.
DISTANCES = [-200, -128, -127, -100, -64, -33, -32, -20, -16, -15, -9, -8, -7, -1, 0]
DISTANCES += [1, 7, 8, 9, 15, 16, 20, 32, 64, 91, 127, 128, 500]
BOTH_WAYS = [15, 15, 15, 15, 14, 12, 12, 10, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 26, 28, 30, 31, 31, 31, 31]
ONE_WAY = [31, 31, 31, 30, 26, 21, 21, 17, 16, 15, 9, 8, 7, 1, 0] + [0] * 13


def test_published_buckets():
    relative = torch.tensor(DISTANCES)
    assert bucket(relative, 32, 128, True).tolist() == BOTH_WAYS
    assert bucket(relative, 32, 128, False).tolist() == ONE_WAY


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (16, 64), (32, 256), (4, 3), (6, 3)])
def test_buckets_are_transformers(bidirectional: bool, buckets: int, distance: int):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-700, 700)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    assert torch.equal(bucket(relative, buckets, distance, bidirectional), theirs)


def tokens() -> tuple[Tokens, Tokens]:
    position = torch.tensor([[5, 6, 9], [HOLE, 0, 1]])
    keys = torch.tensor([[0, 3, 6, 9, 2], [HOLE, 1, 0, 5, 2]])
    return Tokens(position, torch.zeros_like(position)), Tokens(keys, torch.zeros_like(keys))


def test_a_bucket_bias_reads_its_table():
    module = BucketBiasSpec(heads=3, buckets=8, distance=6, bidirectional=True).build()
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    assert 0.01 < module.weight.std() < 0.03
    queries, keys = tokens()
    found = module(queries, keys, {})
    assert found.shape == (2, 3, 3, 5)
    for b in range(2):
        for i, query in enumerate(queries.position[b].tolist()):
            for j, key in enumerate(keys.position[b].tolist()):
                row = int(bucket(torch.tensor(key - query), 8, 6, True))
                assert torch.equal(found[b, :, i, j], module.weight[row])
    alike = module(plain(2, 3, start=4), plain(2, 7), {})
    assert alike.shape == (1, 3, 3, 7)  # rows that are alike share one
    assert torch.equal(alike[0, :, 1, 0], module.weight[int(bucket(torch.tensor(-5), 8, 6, True))])


def test_a_decoding_step_has_the_bias_of_the_last_row():
    """T5 at one token a step: the offset comes from the position, not from the number of queries."""
    for module in (BucketBiasSpec(heads=2, buckets=8, distance=20).build(), AlibiSpec(heads=2).build()):
        if module.__class__.__name__ == "BucketBias":
            module.initialise(Draw(torch.Generator().manual_seed(0)))
        whole = module(plain(1, 9), plain(1, 9), {})
        assert torch.equal(module(plain(1, 1, start=8), plain(1, 9), {}), whole[:, :, 8:])


def test_alibi_slopes():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    assert slopes(8) == [2.0 ** -(i + 1) for i in range(8)]
    assert slopes(16) == pytest.approx([2.0 ** (-(i + 1) / 2) for i in range(16)])
    assert slopes(12)[:8] == slopes(8)
    assert slopes(12)[8:] == pytest.approx([0.707107, 0.353553, 0.176777, 0.088388], abs=1e-6)
    assert slopes(1) == [2.0**-8] and slopes(2) == [2.0**-4, 2.0**-8]
    for heads in (1, 2, 3, 5, 6, 7, 8, 12, 20, 32, 71, 112):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # at key position 1: the slope
        torch.testing.assert_close(torch.tensor(slopes(heads)), theirs)


def test_alibi_is_minus_the_slope_times_the_distance():
    queries, keys = tokens()
    found = AlibiSpec(heads=3).build()(queries, keys, {})
    for b in range(2):
        for h, slope in enumerate(slopes(3)):
            for i, query in enumerate(queries.position[b].tolist()):
                for j, key in enumerate(keys.position[b].tolist()):
                    assert found[b, h, i, j].item() == pytest.approx(-slope * abs(query - key))


def test_slopes_end_where_bias_max_says():
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (1, 2, 3, 5, 6, 7, 8, 12, 20, 32, 71, 112):
        for most in (8, 3, 16):
            theirs = -build_mpt_alibi_tensor(heads, 2, most)[:, 0, 0]  # one key back: the slope
            torch.testing.assert_close(torch.tensor(slopes(heads, most)), theirs)
    queries, keys = tokens()
    found = AlibiSpec(heads=3, bias_max=3, scale=0.5).build()(queries, keys, {})
    torch.testing.assert_close(found[0, :, 1, 0], -0.5 * 6 * torch.tensor(slopes(3, 3)))


def test_a_rounded_alibi_counts_keys_in_bfloat16():
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    spec = AlibiSpec(heads=12, scale=0.25, rounded=True)
    found = spec.build()(plain(2, 3, start=997), plain(2, 1000), {})
    theirs = build_alibi_tensor(torch.ones(1, 1000, dtype=torch.int64), 12, torch.float32)
    assert torch.equal(found, theirs[None] * 0.25) and found.shape == (1, 12, 1, 1000)
    assert found[0, 0, 0, 996] == found[0, 0, 0, 997] == 0.5 * 996 * 0.25  # 8 bits: multiples of 4 only
    rows = spec.build()(*tokens(), {})
    assert rows.shape == (2, 12, 1, 5)
    assert rows[0, 0, 0].tolist() == [0.125 * place for place in (0, 3, 6, 9, 2)]


def test_a_bias_is_made_once_a_forward():
    for module in (
        BucketBiasSpec(heads=2).build(),
        AlibiSpec(heads=2).build(),
        AlibiSpec(heads=2, rounded=True).build(),
    ):
        memo: dict = {}
        queries, keys = plain(1, 3), plain(1, 5)
        first = module(queries, keys, memo)
        assert module(queries, keys, memo) is first
        assert module(plain(1, 3, start=2), keys, memo) is not first and module(queries, queries, memo).shape[-1] == 3


def test_impossible_tables_are_refused():
    for wrong in (
        lambda: BucketBiasSpec(heads=0),
        lambda: BucketBiasSpec(heads=1, buckets=1),
        lambda: BucketBiasSpec(heads=1, buckets=2, bidirectional=True),
        lambda: BucketBiasSpec(heads=1, buckets=32, distance=16),
    ):
        with pytest.raises(LaminaError, match="BucketBiasSpec"):
            wrong()
    with pytest.raises(LaminaError, match="AlibiSpec"):
        AlibiSpec(heads=0)
    with pytest.raises(LaminaError, match="bias_max=0"):
        AlibiSpec(heads=1, bias_max=0)
    with pytest.raises(LaminaError, match="scale=-1"):
        AlibiSpec(heads=1, scale=-1)
    assert math.isfinite(BucketBiasSpec(heads=1, buckets=4, distance=2, bidirectional=True).distance)
