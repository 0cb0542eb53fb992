"""BigBird against transformers on texts of many blocks, and that a short text leaves nothing behind (R5)."""

from __future__ import annotations

import pytest
import torch
import transformers

import lamina
from lamina.attend import BACKENDS
from lamina.errors import LaminaError
from lamina.families import family
from lamina.families.family import Fields
from lamina.layers import BigBirdSpec
from lamina.marks import EndBlocks
from tests.families import BIGBIRD, Case, Row, close, tokens
from tests.test_families import Cases, cases, quiet  # noqa: F401  (two are fixtures)

LONG = BIGBIRD | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}


@pytest.fixture
def case(cases: Cases) -> Case:  # noqa: F811
    return cases(Row("bigbird-long", "BigBirdForMaskedLM", "BigBirdConfig", LONG))


@pytest.mark.parametrize("length", [29, 40, 47])  # dense to 28 = (5 + 2) blocks of 4
@torch.no_grad()
def test_many_blocks_are_those_of_transformers(case: Case, length: int):
    ids = tokens(2, length, seed=1)
    theirs = case.theirs_on(ids, output_hidden_states=True)
    for backend in (None, *BACKENDS):
        ours = case.ours(ids, backend=backend)
        assert close(ours.hidden, theirs.hidden_states[-1])
        assert ours.logits is not None and close(ours.logits, theirs.logits)
    mask = torch.ones_like(ids)
    mask[1, -3:] = (
        0  # their pattern is that of the longest row; of a row padded within the last block both are the same
    )
    if (length - 4) // 4 == (length - 1) // 4:
        theirs, ours = case.theirs_on(ids, attention_mask=mask), case.ours(ids, mask)
        assert close(ours.logits[mask.bool()], theirs.logits[mask.bool()])


@torch.no_grad()
def test_r5_a_short_text_leaves_nothing_behind(case: Case):
    """In transformers a batch of at most 28 tokens turns the model dense for good: the same text then differs."""
    long, short = tokens(1, 40, seed=3), tokens(1, 12, seed=4)
    theirs = case.theirs_on(long).logits
    assert not close(theirs, [case.theirs(short), case.theirs(long).logits][1], 1e-3)
    before = case.ours(long).logits
    case.ours(short)
    assert torch.equal(before, case.ours(long).logits)
    ids = torch.cat([long, torch.full((1, 40), 5)])  # beside a longer text, and as one of two packed documents
    ids[1, :12], mask = short[0], torch.ones(2, 40, dtype=torch.int64)
    mask[1, 12:] = 0
    assert close(case.ours(ids, mask).logits[0], before[0])
    assert close(case.ours(ids, mask).logits[1, :12], case.ours(short).logits[0])
    packed = case.ours(torch.cat([long, short], dim=1), document_ids=torch.tensor([[0] * 40 + [1] * 12]))
    assert close(packed.logits[:, :40], before) and close(packed.logits[:, 40:], case.ours(short).logits)


def test_what_is_not_built_is_refused_by_name():
    said = {"model_type": "big_bird", **LONG}
    for kind in ("BigBirdForSequenceClassification", "BigBirdForQuestionAnswering"):
        with pytest.raises(ValueError, match=f"the head of {kind} is not built"):
            family("big_bird").spec(Fields(said | {"architectures": [kind]}))
    with pytest.raises(ValueError, match="known here: BigBird with"):
        family("big_bird").spec(Fields(said | {"architectures": ["BigBirdForCausalLM"]}))
    with pytest.raises(LaminaError, match="size=0 must be"):
        BigBirdSpec(heads=1, head_dim=2, size=0)


def test_published_sizes_are_those_of_transformers():
    for name in ("bigbird/base", "bigbird/large"):
        config = transformers.BigBirdConfig(**family("big_bird").sizes[name])
        with torch.device("meta"):
            theirs = transformers.BigBirdModel(config)
        ours = lamina.spec(name)
        count = sum(p.numel() for p in ours.build(device="meta").parameters())
        assert count == sum(p.numel() for p in theirs.parameters())
        assert ours.marks == EndBlocks(size=64, short=704)
