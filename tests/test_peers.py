"""Faults that were reproduced in other libraries, each held to be absent here, over every family there is.

Each test says what the other library did on the same small models (transformers 5.23 unless said).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import lamina
from lamina.attend import BACKENDS, Request, blocks
from lamina.attend.plan import plan
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import CapacitySpec, ExpertsSpec, RotarySpec
from lamina.layers.rotary import phases
from lamina.patterns import Causal, Window
from lamina.specs import edit
from lamina.tokens import plain
from tests.families import LENGTH, ROWS, Case, Row, close, row, tokens
from tests.test_families import DECODERS, Cases, cases, quiet, result  # noqa: F401  (two are fixtures)

CACHELESS = ("llama-dynamic", "llama-longrope")
"""Rows whose rotary phases depend on the length of the text."""


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: Cases) -> Case:  # noqa: F811
    return cases(request.param)


every_row = pytest.mark.parametrize("case", ROWS, ids=str, indirect=True)
every_decoder = pytest.mark.parametrize("case", DECODERS, ids=str, indirect=True)


def sides(case: Case) -> list[str]:
    """Prefixes of the arguments of each side that reads ids; the frames that Whisper's encoder reads have none."""
    if not case.two_stacks:
        return [""]
    return ["", "decoder_"] if case.reads == "input_ids" else ["decoder_"]


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


# R4: Switch drops tokens in evaluation too, and lets padding take places: the same text in steps or padded on the left
# gives other logits, by more than their own spread


TIGHT = {"expert_capacity": 2}


def tight(folder: Path) -> tuple[Case, lamina.Model]:
    """A Switch of few places, and ours with the published capacity switched on in evaluation."""
    one = row("switch")
    case = Case(Row("tight", one.model, one.config, one.fields | TIGHT, one.more), folder)
    spec = edit(case.ours.spec, CapacitySpec, lambda path, part: part.replace(evaluation=part.training))
    model = spec.build().eval()
    model.load_state_dict(case.ours.state_dict())
    return case, model


@torch.no_grad()
def test_r4_steps_padding_and_companions_change_nothing_whatever_the_capacity(tmp_path: Path):
    case, _ = tight(tmp_path)
    whole = result(case.run(case.ids))
    cache = case.ours.new_cache(batch=2)
    steps = [result(case.run(part, cache=cache)) for part in case.ids.split(1, dim=1)]
    assert close(torch.cat(steps, dim=1), whole)
    source, mask = case_left(case.sources[:2])
    assert close(result(case.run(case.ids, source={"input_ids": source, "attention_mask": mask})), whole)
    assert close(result(case.run(case.ids[1:], rows=[1])), whole[1:])
    written = lamina.generate(case.ours, case.sources[:2], max_new_tokens=8, min_new_tokens=8)
    for row_, source in zip(written, case.sources[:2], strict=True):
        alone = lamina.generate(case.ours, source[None], max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(alone[0], row_)


@torch.no_grad()
def test_r4_with_the_capacity_switched_on_results_are_those_of_transformers_where_it_binds(tmp_path: Path):
    case, model = tight(tmp_path)
    theirs = result(case.theirs_on(case.ids))
    assert close(result(case.run(case.ids, model=model)), theirs)
    assert not close(result(case.run(case.ids)), theirs, 1e-2)  # it does bind
    record = lamina.Record("*.used", "*.load")
    case.run(case.ids, model=model, record=record)
    used, load = (sum(int(v.sum()) for n, v in record.values.items() if n.endswith(end)) for end in ("used", "load"))
    assert used < load == 2 * (11 + LENGTH)


@torch.no_grad()
def test_r4_transformers_still_does_it(tmp_path: Path):
    case, _ = tight(tmp_path)
    whole = case.theirs_on(case.ids).logits
    kept = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [case.theirs_on(part, past_key_values=kept).logits for part in case.ids.split(1, dim=1)]
    assert not close(torch.cat(steps, dim=1), whole, 1e-2)
    source, mask = case_left(case.sources[:2])
    assert not close(case.theirs(source, mask, decoder_input_ids=case.ids).logits, whole, 1e-2)


@pytest.mark.parametrize(
    "name", [one.name for one in ROWS if "MoeFor" in one.model.replace("NllbMoe", "") or "Mixtral" in one.model]
)
@torch.no_grad()
def test_r4_what_stands_in_padding_takes_no_place(name: str, cases: Cases):  # noqa: F811
    """Where nothing limits an expert transformers is fine; here also where something does, in training."""
    case = cases(name)
    limited = edit(
        case.ours.spec, ExpertsSpec, lambda path, part: part.replace(capacity=CapacitySpec(training=0.7, least=1))
    )
    model = limited.build()
    model.load_state_dict(case.ours.state_dict())
    model.train()
    mask = torch.ones_like(case.ids)
    mask[:, :5] = 0
    padded, alone = model(case.ids, mask), model(case.ids[:, 5:])
    assert close(result(padded)[:, 5:], result(alone))
    assert not close(result(alone), result(case.ours(case.ids[:, 5:])), 1e-3)  # it binds


# R10: Mixtral trained with labels at the defaults has no balance loss, although its coefficient is not 0


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "switch", "nllb-moe"])
def test_r10_balance_losses_are_there_by_default(name: str, cases: Cases):  # noqa: F811
    case = cases(name)
    model = copy.deepcopy(case.ours).train()
    found = {loss for loss in case.run(case.ids, model=model).losses if loss.endswith("balance")}
    sides = {loss.partition(".")[0] for loss in found}
    assert sides == ({"encoder", "decoder"} if case.two_stacks else {"decoder"})
    sum(case.run(case.ids, model=model).losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    routers = [p for n, p in model.named_parameters() if n.endswith("router.weight")]
    assert routers and all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in routers)


def test_r10_no_loss_where_the_coefficient_is_zero(cases: Cases):  # noqa: F811
    case = cases("mixtral-tied")
    assert case.theirs.config.router_aux_loss_coef == 0
    assert case.ours(case.ids).losses == {}


def test_r10_transformers_still_does_it(cases: Cases):  # noqa: F811
    case = cases("mixtral")
    out = case.theirs(case.ids, labels=case.ids)
    assert case.theirs.config.router_aux_loss_coef > 0 and out.aux_loss is None


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
