"""Faults that were reproduced in other libraries, each held to be absent here, over every family there is.

Each test says what the other library did on the same small models (transformers 5.23 unless said).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lamina
from lamina.attend import BACKENDS, Request, blocks
from lamina.attend.plan import plan
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import RotarySpec
from lamina.layers.rotary import phases
from lamina.patterns import Causal, Window
from lamina.tokens import plain
from tests.families import LENGTH, ROWS, Case, close, row, tokens
from tests.test_families import DECODERS, Cases, cases, quiet, result  # noqa: F401  (two are fixtures)

CACHELESS = ("llama-dynamic", "llama-longrope")
"""Rows whose rotary phases depend on the length of the text."""


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: Cases) -> Case:  # noqa: F811
    return cases(request.param)


every_row = pytest.mark.parametrize("case", ROWS, ids=str, indirect=True)
every_decoder = pytest.mark.parametrize("case", DECODERS, ids=str, indirect=True)


def sides(case: Case) -> list[str]:
    """Prefixes of the arguments of each side."""
    return ["", "decoder_"] if case.two_stacks else [""]


# R2: BLOOM ignores position_ids without a word, T5 and BART have none, and Llama takes an invented keyword


@every_row
@torch.no_grad()
def test_r2_position_ids_are_heeded_by_every_family_on_every_side(case: Case):
    for side in sides(case):
        length = case.sources.shape[1] if case.two_stacks and side == "" else LENGTH
        gaps = torch.arange(length)[None] + 2 * (torch.arange(length) > 4)
        plain_run = result(case.run(case.ids))
        if case.two_stacks and side == "":
            source: Any = {"input_ids": case.sources[:2], "position_ids": gaps}
            moved = result(case.run(case.ids, source=source))
            source["position_ids"] = torch.arange(length)[None]
            same = result(case.run(case.ids, source=source))
        else:
            moved = result(case.run(case.ids, position_ids=gaps))
            same = result(case.run(case.ids, position_ids=torch.arange(length)[None]))
        assert close(same, plain_run)
        assert not close(moved, plain_run, 1e-4), f"{side}position_ids change nothing"


@every_row
def test_r2_an_invented_keyword_is_refused(case: Case):
    with pytest.raises(
        LaminaError, match="unknown argument of a model 'decoder_positions_ids'; did you mean 'decoder_"
    ):
        case.run(case.ids, decoder_positions_ids=torch.arange(LENGTH)[None])
    if case.decoder and case.ours.head is not None:
        with pytest.raises(LaminaError, match="unknown argument of generate 'max_tokens'"):
            lamina.generate(case.ours, case.ids, max_new_tokens=1, max_tokens=3)


# R3: .to(bfloat16) rounds inv_freq; at position 8192 a cosine is then wrong by up to 1.33


@every_row
def test_r3_a_cast_rounds_weights_only(case: Case):
    """No buffer exists that it could round, and phases are those of float32 whatever the weights are."""
    cast = case.ours.spec.build(dtype=torch.bfloat16)
    assert not list(cast.buffers()) and {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    tokens = plain(1, 1, start=8191)
    for _, part in case.ours.spec.walk():
        rotary = getattr(part, "rotary", None)
        if isinstance(rotary, RotarySpec):
            size = getattr(part, "rope_dim", None) or getattr(part, "head_dim")  # noqa: B009
            exact, half = (phases(rotary, size, tokens, dtype, {}) for dtype in (torch.float32, torch.bfloat16))
            for one, other in zip(exact, half, strict=True):
                assert float((one - other.float()).abs().max()) < 2**-7 * max(1.0, float(one.abs().max()))


# R5: BigBird, a short batch between two long ones: transformers goes on dense, and the long one's outputs differ


@torch.no_grad()
def test_r5_a_short_batch_changes_nothing_for_the_next(cases: Cases):  # noqa: F811
    case, short = cases("bigbird"), tokens(2, 5, seed=9)
    first = result(case.theirs_on(case.ids))
    assert not close(result([case.theirs(short), case.theirs(case.ids)][1]), first, 1e-3)
    before = result(case.run(case.ids))
    case.run(short)
    assert torch.equal(result(case.run(case.ids)), before) and close(before, first)


# R18: a window costs as much as none, and a smaller one of Longformer more than a larger one


@pytest.mark.parametrize("window", [128, 512])
def test_r18_what_a_window_leaves_out_is_not_computed(window: int):
    """Scores of a forward at 4,096 tokens: those of the window and of the blocks that its edges cut."""
    long = plain(1, 4096)
    for pattern, width in (
        (Causal() & Window(back=window), window),
        (Window(back=window // 2 + 1, ahead=window // 2), window + 1),
    ):
        pairs = plan(pattern, long, long).pairs
        assert 4096 * width * 0.9 < pairs < 4096 * (width + 256)
        query = torch.zeros(1, 1, 4096, 8)
        assert blocks.suits(Request(query, query, query, long, long, pattern, 1.0))


# R12: output_attentions under SDPA gives a warning and nothing


@every_row
@torch.no_grad()
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_r12_attention_can_be_looked_at_under_every_backend(case: Case, backend: str | None):
    record = lamina.Record("*.weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            case.run(case.ids, backend=backend, record=record)
        except UnsupportedError as refusal:
            if f"attention backend {backend!r} cannot do" in str(refusal):
                return
            raise
    stacks = [stack for stack in (case.ours.encoder, case.ours.decoder) if stack is not None]
    layers = sum(len(stack.layers) * stack.spec.repeat for stack in stacks)
    cross = len(case.ours.decoder.layers) if case.two_stacks and case.ours.decoder is not None else 0
    assert len(record.values) == layers + cross
    for name, weights in record.values.items():
        assert close(weights.sum(-1), torch.ones(weights.shape[:-1])), name


# R13: phases that depend on the length, with a cache: past the trained length keys of two bases are mixed


@pytest.mark.parametrize("case", [one for one in DECODERS if one.name in CACHELESS], ids=str, indirect=True)
@torch.no_grad()
def test_r13_a_cache_that_would_mix_phases_is_refused_and_generation_does_without(case: Case):
    limit = case.ours.cache_limit
    assert limit is not None and limit < LENGTH
    with pytest.raises(UnsupportedError, match="the rotary phases depend on the length"):
        case.ours(case.ids, cache=case.ours.new_cache(batch=2))
    new = min(8, (case.ours.spec.context or 64) - 6)
    written = lamina.generate(case.ours, case.ids[:, :6], max_new_tokens=new, min_new_tokens=new).clone()
    for at in range(6, 6 + new):
        logits = case.ours(written[:, :at]).logits
        assert logits is not None
        logits[:, -1, 96] = -torch.inf  # the end is held back
        assert torch.equal(logits[:, -1].argmax(-1), written[:, at])


@every_decoder
@torch.no_grad()
def test_r13_cached_and_full_agree_past_the_trained_length(case: Case):
    """Nowhere else do phases depend on the length; where positions are learned there is nothing past it."""
    if case.row.name in CACHELESS:
        return
    context = case.ours.spec.context or 64
    learned = getattr(case.ours.decoder and case.ours.decoder.spec.position, "size", None)
    length = min(context + 6, learned or 80)
    ids = tokens(1, length, seed=8)
    whole, cache = result(case.run(ids)), case.ours.new_cache(batch=1)
    parts = [result(case.run(piece, cache=cache)) for piece in ids.split([length - 9, 4, *[1] * 5], dim=1)]
    assert close(torch.cat(parts, dim=1), whole)


# R15: GPT-2 padded on the left, told so by the mask: the last logits are off by 0.4, and BART's and T5's positions too


@every_row
@torch.no_grad()
def test_r15_a_mask_alone_makes_left_padding_as_alone(case: Case):
    ids, mask = case.ids, torch.ones_like(case.ids)
    mask[0, :5] = 0
    padded = result(case.run(ids, mask))
    assert close(padded[:1, 5:], result(case.run(ids[:1, 5:], rows=[0])))
    assert close(padded[1:], result(case.run(ids[1:], rows=[1])))


@torch.no_grad()
def test_r15_transformers_still_does_it(cases: Cases):  # noqa: F811
    """So that this file says what is so: when it fails, transformers has mended it."""
    gpt2 = cases(row("gpt2"))
    mask = torch.ones_like(gpt2.ids)
    mask[0, :5] = 0
    padded, alone = gpt2.theirs(gpt2.ids, attention_mask=mask).logits, gpt2.theirs(gpt2.ids[:1, 5:]).logits
    assert not close(padded[:1, 5:], alone, 1e-2)
    bart = cases(row("bart"))
    source, seen = case_left(bart.sources[:1])
    alone = bart.theirs(bart.sources[:1], decoder_input_ids=bart.ids[:1]).logits
    assert not close(bart.theirs(source, seen, decoder_input_ids=bart.ids[:1]).logits, alone, 1e-2)
    ours = bart.ours(source, seen, decoder_input_ids=bart.ids[:1]).logits
    assert ours is not None and close(ours, alone)


def case_left(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with three of padding on their left."""
    pad = torch.nn.functional.pad
    return pad(ids, (3, 0), value=1), pad(torch.ones_like(ids), (3, 0))
