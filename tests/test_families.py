"""Every family against transformers, on the tiny models of tests/families.py: what holds for one must hold for all."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

import lamina
from lamina.attend import BACKENDS
from lamina.cache import KINDS
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.families import family
from lamina.layers import AlibiSpec, AttentionSpec, BigBirdSpec, ExpertsSpec, LongformerSpec, RotarySpec
from lamina.layers.rotary import phases
from lamina.patterns import Both, Window
from lamina.tokens import plain
from tests.families import (
    COUNTING,
    ENCODERS,
    HEARING,
    LENGTH,
    PAIRS,
    ROWS,
    Case,
    Row,
    again,
    close,
    row,
    same_files,
    shown,
    tokens,
)

DECODERS = [one for one in ROWS if not one.name.startswith(ENCODERS)]
PAIRED = [one for one in DECODERS if one.name.startswith(PAIRS) and not one.name.endswith("-decoder")]
PACKED = [one for one in ROWS if not one.name.startswith(HEARING)]
WRITERS = [one for one in DECODERS if not one.name.endswith("-bare") and one in PACKED]  # HEARING: its own test
SNAPSHOTS = Path(__file__).parent / "snapshots"

Cases = Callable[[str | Row], Case]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Case] = {}

    def case(name: str | Row) -> Case:
        one = row(name) if isinstance(name, str) else name
        return made.setdefault(one.name, Case(one, folder))

    return case


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: Cases) -> Case:
    return cases(request.param)


every_row = pytest.mark.parametrize("case", ROWS, ids=str, indirect=True)
every_decoder = pytest.mark.parametrize("case", DECODERS, ids=str, indirect=True)
every_writer = pytest.mark.parametrize("case", WRITERS, ids=str, indirect=True)


def their_logits(out: Any) -> torch.Tensor | None:
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    return (
        getattr(out, "prediction_logits", None) if hasattr(out, "prediction_logits") else getattr(out, "logits", None)
    )


def their_pair_logits(out: Any) -> torch.Tensor | None:
    """Whether the second sentence is the next one (BERT), or comes second (ALBERT), beside a language head."""
    return getattr(out, "seq_relationship_logits", getattr(out, "sop_logits", None))


def result(out: Any) -> torch.Tensor:
    """What a user of the model looks at: its logits, one result a token where there is one."""
    if not isinstance(out, lamina.Output):
        logits = their_logits(out)
        return out.last_hidden_state if logits is None else logits
    return out.hidden if out.logits is None or out.logits.dim() == 2 else out.logits


def last_hidden(case: Case, out: lamina.Output) -> torch.Tensor:
    """What transformers calls the last hidden state: OPT-350m takes it after the matrix that is part of our head."""
    transform = case.ours.head.transform if case.row.name.startswith("opt") and case.ours.head is not None else None
    return out.hidden if transform is None else transform(out.hidden)


def windows(case: Case) -> list[bool]:
    """Whether each layer has a window; nothing where none has."""
    stack = case.ours.spec.decoder or case.ours.spec.encoder  # that of the ids of a case
    assert stack is not None
    patterns = [part.pattern for _, part in stack.walk() if isinstance(part, AttentionSpec)]
    found = [isinstance(pattern, Both) and isinstance(pattern.second, Window) for pattern in patterns]
    found += [True for _, part in stack.walk() if isinstance(part, LongformerSpec | BigBirdSpec)]
    return found if any(found) else []


# Numbers


@every_row
@torch.no_grad()
@pytest.mark.parametrize("length", [LENGTH, 7])
def test_logits_and_hidden_states_are_those_of_transformers(case: Case, length: int):
    ids = case.ids[:, :length]
    model = copy.deepcopy(case.theirs) if "dynamic" in case.row.name else case.theirs  # its phases remember lengths
    stacks = [stack for stack in ("encoder", "decoder") if getattr(case.ours, stack) is not None]
    asked = any(map(case.row.shows, stacks))
    theirs = case.theirs_on(ids, model, output_hidden_states=True, output_attentions=asked, **case.segments(ids))
    record = lamina.Record("*.input", "*.output", "*.weights")
    ours = case.run(ids, record=record, **case.segments(ids))
    for stack in stacks:
        shows, (hidden, attention, cross) = case.row.shows(stack), shown(theirs, stack)
        layers = len(hidden) - 1
        last = last_hidden(case, ours) if stack == "decoder" or ours.encoder_output is None else ours.encoder_output
        places = ["input", *(f"layers.{i}.output" for i in range(layers - 1))]
        for mine, other in zip([*(record.values[f"{stack}.{place}"] for place in places), last], hidden, strict=True):
            assert close(mine, other)
        kept = {name: value for name, value in record.values.items() if re.match(rf"{stack}[.].*weights$", name)}
        weights = [value for name, value in kept.items() if ".cross." not in name]
        assert len(weights) == layers and len(kept) == layers + len(cross or ())
        for mine, other in zip(weights, attention if shows else (), strict=shows):
            assert close(mine, other)
        for mine, other in zip([kept[name] for name in kept if ".cross." in name], cross or (), strict=True):
            assert close(mine, other)
    logits = their_logits(theirs)
    assert (ours.logits is None) == (logits is None)
    if logits is not None and ours.logits is not None:
        assert close(ours.logits, logits)
    if getattr(theirs, "pooler_output", None) is not None:
        assert ours.pooled is not None and close(ours.pooled, theirs.pooler_output)
    pair = their_pair_logits(theirs)
    if pair is not None:
        assert ours.label_logits is not None and close(ours.label_logits, pair)


@every_row
@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_numbers_or_says_what_it_cannot_do(case: Case, backend: str):
    more = case.segments(case.ids)
    mask = torch.ones_like(case.ids)
    mask[0, :4] = 0
    for given in (None, mask):
        try:
            out = case.run(case.ids, given, backend=backend, **more)
        except UnsupportedError as refusal:
            if backend == "dense" or f"attention backend {backend!r} cannot do" not in str(refusal):
                raise
            continue
        seen = torch.ones_like(mask, dtype=torch.bool) if given is None else given.bool()
        assert close(result(out)[seen], result(case.run(case.ids, given, **more))[seen])


@every_row
@torch.no_grad()
def test_looking_changes_no_bit(case: Case):
    """Reading the attention of one layer leaves all outputs as they are, and does not come back empty."""
    more, record = case.segments(case.ids), lamina.Record("*.layers.1.*attention.op.weights")
    out = case.run(case.ids, record=record, **more)
    assert torch.equal(result(out), result(case.run(case.ids, **more)))
    assert len(record.values) == 1 + case.two_stacks
    for weights in record.values.values():
        assert close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


@every_row
@torch.no_grad()
def test_position_ids_are_heeded(case: Case):
    """Transformers ignores them in some families without a word. There the tokens are put where their positions are,
    with padding between them. Where positions have gaps, its windows count columns and ours count positions, so a model
    with windows gets none."""
    position = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24])
    if windows(case):
        position = torch.arange(LENGTH) + 3 * (not case.row.name.startswith("bigbird"))  # whose blocks count from 0
    more, given = case.segments(case.ids), position.expand(2, -1)
    source = None
    if case.two_stacks and case.reads == "input_ids":
        blocks = any(isinstance(part, BigBirdSpec) for _, part in case.ours.spec.walk())
        read = torch.arange(11) if blocks else position[:11] + 1  # as above
        source = {"input_ids": case.sources[:2], "position_ids": read[None]}
    ours = case.run(case.ids, position_ids=given, source=source, **more)
    stack = case.ours.decoder or case.ours.encoder
    if case.row.model.startswith(COUNTING):
        ids, mask = spread(case.ids, position)
        again(case.theirs)
        if source is None:
            theirs = case.theirs(ids, attention_mask=mask)
        else:
            read, real = spread(source["input_ids"], source["position_ids"][0])
            theirs = case.theirs(read, real, decoder_input_ids=ids, decoder_attention_mask=mask)
        assert close(result(ours), result(theirs)[:, position])
    elif stack is not None and not isinstance(stack.spec.score_bias, AlibiSpec):  # those: tests/test_families_alibi.py
        model = copy.deepcopy(case.theirs) if "dynamic" in case.row.name else case.theirs
        more[f"{'decoder_' if case.two_stacks else ''}position_ids"] = given + case.offset
        theirs = case.theirs_on(case.ids, model, output_hidden_states=True, **more)
        assert close(last_hidden(case, ours), shown(theirs, "decoder")[0][-1])
        more = case.segments(case.ids)
    if not windows(case):  # rotary phases are relative: what all tokens have in common is not seen
        assert not close(ours.hidden, case.run(case.ids, **more).hidden, 1e-3)


def spread(ids: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids each in the column of its position, and the mask of what is between them."""
    wide = torch.full((ids.shape[0], int(position[-1]) + 1), 5)
    mask = torch.zeros_like(wide)
    wide[:, position], mask[:, position] = ids, 1
    return wide, mask


@every_row
def test_gradients_are_those_of_transformers(case: Case):
    ids, weight = case.ids, torch.randn(1, generator=torch.Generator().manual_seed(3))
    theirs, ours = copy.deepcopy(case.theirs), copy.deepcopy(case.ours)
    segments = case.segments(ids)

    def loss(*tensors: torch.Tensor | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        present = [tensor for tensor in tensors if tensor is not None]
        return sum((t * torch.randn(t.shape, generator=generator)).mean() for t in present) * (1 + weight)  # pyright: ignore

    out = case.theirs_on(ids, theirs, **segments)
    loss(
        their_logits(out),
        getattr(out, "last_hidden_state", None),
        getattr(out, "pooler_output", None),
        their_pair_logits(out),
    ).backward()
    mine = case.run(ids, model=ours, **segments)
    beside = mine.label_logits if mine.logits is not mine.label_logits else None
    bare = mine.logits is None
    loss(mine.logits, mine.hidden if bare else None, mine.pooled if bare else None, beside).backward()

    # The weight table moves gradients like weights: write ours under their names, and compare name by name.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    named = revert_weight_conversion(theirs, named)  # matrices of experts are one there, and one each in files
    for old, new in case.ours.origin.family.renamed:
        named = {re.sub(old, new, name): gradient for name, gradient in named.items()}
    moved = their_names(ours, case)
    assert moved.keys() >= named.keys()
    for name, gradient in named.items():
        assert close(moved[name], gradient, 1e-4), name
        idle = ("key.bias", "k_proj.bias", "key_global.bias")
        if case.row.name == "longformer-sequence":  # its last layer is asked by a global token alone
            idle = (*idle, "layer.2.attention.self.query.weight", "layer.2.attention.self.query.bias")
            idle += tuple(name for name in named if "layer.2.attention.self.key." in name or "self.value." in name)
        unused = name.endswith(idle) or ".experts." in name  # no token may have chosen one
        assert float(gradient.abs().max()) > 0 or unused, name


def their_names(model: lamina.Model, case: Case) -> dict[str, torch.Tensor]:
    """Our parameters under the names of transformers."""
    from lamina.weights import rules

    chosen = model.origin.family
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    moves = rules.bind(chosen.rules(model.spec), {name: tuple(p.shape) for name, p in parameters.items()})
    read = rules.saver(moves, lambda name: parameters[name])
    names = [name for move in moves for name in move.theirs]
    return {name.removeprefix(chosen.base) if model.origin.bare else name: read(name) for name in names}


# Padding and packing


LENGTHS = (LENGTH, 5, 9)


@every_row
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(case: Case, side: str):
    """What stands where the mask is 0 does not matter either."""
    ids, total = tokens(len(LENGTHS), LENGTH + 3, seed=2), LENGTH + 3
    mask = torch.zeros_like(ids)
    starts = []
    for i, length in enumerate(LENGTHS):
        starts.append({"left": total - length, "right": 0, "both": 2}[side])
        mask[i, starts[i] : starts[i] + length] = 1
    segments = case.segments(ids)
    padded = case.run(ids, mask, **segments)
    for i, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        real = slice(start, start + length)
        alone = case.run(ids[i : i + 1, real], rows=[i], **{n: t[i : i + 1, real] for n, t in segments.items()})
        assert close(result(padded)[i : i + 1, real], result(alone))
        for one, other in ((padded.pooled, alone.pooled), (padded.label_logits, alone.label_logits)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                one = one[i : i + 1] if one.dim() == 2 else one[i : i + 1, real]
                assert close(one, other)


@pytest.mark.parametrize("case", PAIRED, ids=str, indirect=True)
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("read", ["left", "right", "both"])
def test_padding_of_the_source_changes_nothing(case: Case, side: str, read: str):
    """R15 for pairs: each text is padded on a side of its own, and each row is as alone."""
    texts, sources = [tokens(1, n, seed=n)[0] for n in LENGTHS], [tokens(1, n, seed=30 + n)[0] for n in (4, 11, 1)]
    (ids, mask), (source, seen) = pad(texts, side), pad(sources, read)
    whole = case.run(ids, mask, source={"input_ids": source, "attention_mask": seen})
    for i, (text, one) in enumerate(zip(texts, sources, strict=True)):
        alone = case.run(text[None], source={"input_ids": one[None]})
        assert close(result(whole)[i][mask[i].bool()], result(alone)[0])
        assert whole.encoder_output is not None and alone.encoder_output is not None
        assert close(whole.encoder_output[i][seen[i].bool()], alone.encoder_output[0])


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths in one tensor, three wider than the longest, and the mask of it."""
    total = max(map(len, rows)) + 3
    ids = torch.full((len(rows), total), 5)
    mask = torch.zeros_like(ids)
    for i, one in enumerate(rows):
        start = {"left": total - len(one), "right": 0, "both": 2}[side]
        ids[i, start : start + len(one)], mask[i, start : start + len(one)] = one, 1
    return ids, mask


@pytest.mark.parametrize("case", PACKED, ids=str, indirect=True)
@torch.no_grad()
@pytest.mark.parametrize("told", ["documents", "positions", "both"])
@pytest.mark.parametrize("mask", ["none", "ones", "padded"])
def test_packed_documents_are_as_alone(case: Case, told: str, mask: str):
    ids = case.ids
    cuts, sources = [(0, 6, LENGTH), (0, 3, 7, LENGTH)], [(0, 4, 11), (0, 5, 6, 11)]
    more = packing(cuts, told)
    source = {"input_ids": case.sources[:2], **packing(sources, told)} if case.two_stacks else None
    attention_mask = None if mask == "none" else torch.ones_like(ids)
    last = LENGTH
    if mask == "padded":
        attention_mask, last = torch.ones_like(ids), LENGTH - 2
        attention_mask[:, last:] = 0
    segments = case.segments(ids)
    runs = [result(case.run(ids, attention_mask, source=source, **more, **segments))]
    if case.decoder and case.ours.cache_limit is None and mask != "padded":
        cache = case.ours.new_cache(batch=2)
        runs.append(result(case.run(ids, attention_mask, source=source, cache=cache, **more, **segments)))
        cache, parts = case.ours.new_cache(batch=2), []
        for part in (slice(0, 4), slice(4, 5), slice(5, 10), slice(10, LENGTH)):  # a chunk may hold a border
            so_far = None if attention_mask is None else attention_mask[:, : part.stop]
            chunk = {name: tensor[:, part] for name, tensor in (more | segments).items()}
            parts.append(result(case.run(ids[:, part], so_far, source=source, cache=cache, **chunk)))
        runs.append(torch.cat(parts, dim=1))
    for i, edges in enumerate(cuts):
        for (start, stop), (begin, end) in zip(pairwise(edges), pairwise(sources[i]), strict=True):
            stop = min(stop, last)
            inner = {name: tensor[i : i + 1, start:stop] for name, tensor in segments.items()}
            read = {"input_ids": case.sources[i : i + 1, begin:end]}
            alone = result(case.run(ids[i : i + 1, start:stop], source=read, **inner))
            for run in runs:
                assert close(run[i : i + 1, start:stop], alone)


def packing(cuts: list[tuple[int, ...]], told: str) -> dict[str, Any]:
    """What says that each row holds a document between every two of its cuts: numbers, positions or both."""
    documents = torch.tensor([[n for n, (a, b) in enumerate(pairwise(edges)) for _ in range(a, b)] for edges in cuts])
    positions = torch.tensor([[i for a, b in pairwise(edges) for i in range(b - a)] for edges in cuts])
    both = {"document_ids": documents, "position_ids": positions}
    return {name: tensor for name, tensor in both.items() if told in ("both", f"{name.removesuffix('_ids')}s")}


@every_row
@torch.no_grad()
def test_a_row_of_a_batch_is_as_alone_in_any_order(case: Case):
    ids = tokens(4, 9, seed=6)
    segments = case.segments(ids)
    whole, order = result(case.run(ids, **segments)), [2, 0, 3, 1]
    assert close(result(case.run(ids[order], rows=order, **{n: t[order] for n, t in segments.items()})), whole[order])
    assert close(result(case.run(ids[2:3], rows=[2], **{n: t[2:3] for n, t in segments.items()})), whole[2:3])


@every_row
@torch.no_grad()
def test_a_row_of_nothing_but_padding_is_finite(case: Case):
    mask = torch.ones_like(case.ids)
    mask[1] = 0
    assert bool(torch.isfinite(result(case.run(case.ids, mask, **case.segments(case.ids)))).all())
    if case.two_stacks:
        seen = torch.zeros(2, case.sources.shape[-1], dtype=torch.int64)
        unread = case.run(case.ids, source={case.reads: case.sources[:2], "attention_mask": seen})
        assert bool(torch.isfinite(result(unread)).all())


# Decoding


SPLITS = {"whole": [13], "ones": [1] * 13, "prompt then ones": [6, *[1] * 7], "chunks": [5, 4, 1, 3]}


def decode(case: Case, kind: str, splits: list[int], mask: torch.Tensor | None) -> torch.Tensor:
    ids, start, parts = case.ids, 0, []
    cache = case.ours.new_cache(kind, batch=2, capacity=2 * LENGTH)
    for size in splits:
        part = None if mask is None else mask[:, : start + size]
        parts.append(result(case.run(ids[:, start : start + size], part, cache=cache)))
        start += size
    assert cache.length == start
    return torch.cat(parts, dim=1)


@every_decoder
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_decoding_with_a_cache_is_the_whole_sequence(case: Case, kind: str, padded: bool):
    windowed = all(windows(case)) and bool(windows(case))
    mask = None
    if padded:
        mask = torch.ones_like(case.ids)
        mask[0, :4] = 0
    if kind == "ring" and not windowed:
        with pytest.raises(UnsupportedError, match="looks back without limit"):
            case.ours.new_cache(kind, batch=2)
        return
    if case.ours.cache_limit is not None:
        with pytest.raises(UnsupportedError, match="beyond 9 the rotary phases depend on the length"):
            decode(case, kind, [13], mask)
        return
    whole = result(case.run(case.ids, mask))
    for splits in SPLITS.values():
        got = decode(case, kind, splits, mask)
        if mask is None:
            assert close(got, whole), splits
        else:
            assert close(got[0, 4:], whole[0, 4:]) and close(got[1], whole[1]), splits


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
@torch.no_grad()
def test_up_to_its_limit_a_length_dependent_rotary_model_has_a_cache(cases: Cases, name: str):
    case = cases(name)
    whole = result(case.ours(case.ids[:, :9]))
    cache = case.ours.new_cache(batch=2)
    parts = [result(case.ours(case.ids[:, i : i + 1], cache=cache)) for i in range(9)]
    assert close(torch.cat(parts, dim=1), whole)
    with pytest.raises(UnsupportedError, match="10 tokens: beyond 9"):
        case.ours(case.ids[:, 9:10], cache=cache)


@every_decoder
@torch.no_grad()
def test_what_comes_later_changes_no_bit_of_what_came_before(case: Case):
    before = result(case.run(case.ids))
    for place in (1, 6, LENGTH - 1):
        changed = case.ids.clone()
        changed[:, place] = (changed[:, place] - 3) % 90 + 4
        after = result(case.run(changed))
        if any(isinstance(part, ExpertsSpec) for _, part in case.ours.spec.walk()):
            # An expert's product has other rows beside it then, and may round otherwise; not more than that.
            assert close(after[:, :place], before[:, :place], 1e-6)
        else:
            assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@torch.no_grad()
def test_a_window_of_w_spreads_a_change_to_w_positions(cases: Cases, tmp_path: Path):
    case = Case(
        Row("one", "MistralForCausalLM", "MistralConfig", row("mistral").fields | {"num_hidden_layers": 1}), tmp_path
    )
    changed = case.ids.clone()
    changed[:, 3] = (changed[:, 3] - 3) % 90 + 4
    moved = (result(case.ours(changed)) != result(case.ours(case.ids))).any(dim=2)
    assert moved[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]  # 5 positions, its own among them


# Generation


@every_writer
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
def test_greedy_generation_gives_the_tokens_of_transformers(case: Case, padded: bool):
    new = 12
    ids, begun = case.ids[:, :8], 1 if case.two_stacks else 8  # the columns of what generation continues
    mask = torch.ones_like(ids)
    if padded and case.row.model.startswith(("Bart", "LED", "BigBirdPegasus", "M2M100", "NllbMoe")):
        if not case.two_stacks:
            return  # transformers numbers columns, so what is padded on the left is not what it is alone
        if case.ours.spec.marks is not None:
            return  # its blocks are those of the longest row: tests/test_families_bigbird.py
        mask[0, -3:] = 0
    elif padded:
        mask[0, :3] = 0
    context = case.ours.spec.context or 64
    if begun + new > context:
        new = context - begun
    limited = case.ours.cache_limit is not None
    model = copy.deepcopy(case.theirs)

    def theirs(**more: Any) -> torch.Tensor:
        again(model)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=not limited, **more
        )

    plain_ids = theirs(eos_token_id=None)
    if limited and padded:
        return  # transformers takes the length with its padding
    got = lamina.generate(case.ours, ids, mask, max_new_tokens=new, min_new_tokens=new)
    model.generation_config.eos_token_id = None
    assert torch.equal(got, forbidding(case, ids, mask, new) if 96 in plain_ids[:, begun:] else plain_ids)
    stop = int(plain_ids[0, begun + new // 2])
    ended = theirs(eos_token_id=stop)
    ours = lamina.generate(case.ours, ids, mask, max_new_tokens=new, stop=[stop])
    pad = case.ours.spec.special.pad
    filler = pad if pad is not None else 96
    expected = ended.clone()
    for one in expected:
        after = (one[begun:] == stop).nonzero().flatten()
        if len(after):
            one[begun + int(after[0]) + 1 :] = filler
    if 96 not in ended[:, begun:]:
        assert torch.equal(ours, expected)


def forbidding(case: Case, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    """Transformers' greedy tokens without the end id."""
    again(case.theirs)
    return case.theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=96,
    )


# Files


@every_row
def test_load_then_save_gives_the_same_bytes(case: Case, tmp_path: Path):
    lamina.save(case.ours, tmp_path / "out")
    assert same_files(case.source, tmp_path / "out") == []


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_shards_come_back_with_the_same_bytes(case: Case, dtype: torch.dtype, tmp_path: Path):
    copy.deepcopy(case.theirs).to(dtype).save_pretrained(tmp_path / "in", max_shard_size="9KB")
    assert (tmp_path / "in/model.safetensors.index.json").is_file()
    model = lamina.load(tmp_path / "in")
    assert {p.dtype for p in model.parameters()} == {dtype}
    lamina.save(model, tmp_path / "out")
    assert same_files(tmp_path / "in", tmp_path / "out") == []


@every_row
def test_mixed_precision_comes_back_with_the_same_bytes(case: Case, tmp_path: Path):
    mixed = copy.deepcopy(case.theirs).to(torch.bfloat16)
    for parameter in mixed.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    mixed.save_pretrained(tmp_path / "in")
    lamina.save(lamina.load(tmp_path / "in"), tmp_path / "out")
    assert same_files(tmp_path / "in", tmp_path / "out") == []


@every_row
@torch.no_grad()
def test_what_we_write_anew_opens_in_transformers(case: Case, tmp_path: Path):
    model = copy.deepcopy(case.ours)
    model.origin = None
    lamina.save(model, tmp_path / "out")
    kind = getattr(transformers, case.row.model)
    theirs, info = kind.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation=case.row.kernel, **case.row.more
    )
    assert not any(info.values()), info
    more = case.segments(case.ids) | {"output_hidden_states": True}
    one, other = (case.theirs_on(case.ids, copy.deepcopy(model), **more) for model in (theirs, case.theirs))
    for stack in ("encoder", "decoder"):
        assert close(shown(one, stack)[0][-1], shown(other, stack)[0][-1])
    logits = their_logits(other)
    if logits is not None:
        assert close(their_logits(one), logits)  # pyright: ignore
    assert lamina.load(tmp_path / "out").spec == case.ours.spec


@every_row
@torch.no_grad()
def test_native_files_keep_everything(case: Case, tmp_path: Path):
    lamina.save(case.ours, tmp_path / "out", format="native")
    again = lamina.load(tmp_path / "out")
    assert again.spec == case.ours.spec
    state = again.state_dict()
    assert state.keys() == case.ours.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.ours.state_dict().items())


@every_row
def test_specs_survive_json_and_config(case: Case):
    spec = case.ours.spec
    assert lamina.ModelSpec.from_json(spec.to_json()) == spec
    chosen = case.ours.origin.family
    from lamina.exporting import exportable

    found, config = exportable(spec, chosen)
    assert found is chosen
    json.dumps(config)
    assert lamina.spec(case.source) == spec
    said = json.loads((case.source / "config.json").read_text())
    assert set(said["architectures"]) == set(config["architectures"])


@every_row
def test_parameter_names_are_those_of_the_snapshot(case: Case):
    """Names are a contract: edits, adapters and training runs address parameters by them."""
    text = names(case.ours)
    known = dict(part.split("\n", 1) for part in (SNAPSHOTS / "parameters.txt").read_text().split("# ")[1:])
    assert text == known.get(case.row.name), f"tests/snapshots/parameters.txt would have:\n# {case.row.name}\n{text}"


@every_row
def test_a_model_has_no_state_but_its_parameters(case: Case):
    """So there is nothing that a cast of the model could round: rotary frequencies are never tensors of it."""
    assert list(case.ours.buffers()) == []


@pytest.mark.parametrize("fields", [RotarySpec(), RotarySpec(base=5e5)], ids=["base 1e4", "base 5e5"])
def test_rotary_phases_are_exact_far_out_in_every_dtype(fields: RotarySpec):
    place = 131_071
    for dtype, bound in ((torch.float32, 8e-3), (torch.bfloat16, 12e-3)):  # float32 angles: 131,071 * 2^-24 = 7.8e-3
        cos, _ = phases(fields, 64, plain(1, 1, start=place), dtype, {})
        exact = [math.cos(place * fields.base ** (-2 * i / 64)) for i in range(32)]
        assert (cos[0, 0, 0, :32].double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < bound


def names(model: lamina.Model) -> str:
    """One line a parameter, the layers of a stack taken together."""
    lines: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        line = f"{re.sub(r'layers[.][0-9]+', 'layers.*', name)} {list(parameter.shape)}"
        lines[line] = lines.get(line, 0) + 1
    return "".join(f"{line}{f' x {count}' if count > 1 else ''}\n" for line, count in lines.items())


# What goes wrong must be said


@every_row
def test_an_unknown_argument_is_refused_with_the_nearest_name(case: Case):
    with pytest.raises(
        LaminaError, match="unknown argument of a model 'attention_masks'; did you mean 'attention_mask'"
    ):
        case.ours(attention_masks=torch.ones_like(case.ids))
    wrong = {"attention_mask": (2, 5), "position_ids": (3, LENGTH), "document_ids": (2, 4)}
    if not case.two_stacks:
        for name, shape in wrong.items():
            with pytest.raises(LaminaError, match=f"^{name} has shape"):
                case.ours(case.ids, **{name: torch.ones(shape).long()})
        return
    reads = {case.reads: case.sources[:2], "decoder_input_ids": case.ids}
    hears = (
        case.reads == "input_features"
    )  # a spectrogram has neither positions nor documents: refused, and tested there
    for name, shape in (*(wrong.items() if not hears else [("attention_mask", (2, 5))]),
                        *((f"decoder_{name}", shape) for name, shape in wrong.items())):  # fmt: skip
        with pytest.raises(LaminaError, match=f"^{name} has shape"):
            case.ours(**reads, **{name: torch.ones(shape).long()})


@every_row
def test_missing_unexpected_and_misshaped_tensors_are_refused(case: Case, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(case.source, tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    tensors = load_file(path)
    norm = next(name for name in sorted(tensors) if re.search(r"layers?\b|\bh[.]|blocks", name))
    save_file({n: t for n, t in tensors.items() if n != norm}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing tensor: .*{norm.split('.')[-2]}"):
        lamina.load(tmp_path / "in")
    save_file(tensors | {norm: tensors[norm].repeat(2)[:-1] if tensors[norm].dim() == 1 else tensors[norm][:-1]}, path)
    with pytest.raises(CheckpointError, match="has shape"):
        lamina.load(tmp_path / "in")
    save_file(tensors | {"extra.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="1 unexpected tensor: .*extra.weight"):
        lamina.load(tmp_path / "in")


# Published sizes: FACTS of the checkpoints' own shapes; each integer from the formula and from an independent model


T5_NEWER = {
    "small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184, "xxl": 11_135_332_352
}  # fmt: skip
COUNTS = {
    "albert/base-v2": 11_683_584, "albert/large-v2": 17_683_968, "albert/xlarge-v2": 58_724_864,
    "albert/xxlarge-v2": 222_595_584,
    "bart/base": 139_420_416, "bart/large": 406_291_456,
    "bert/base-uncased": 109_482_240, "bert/base-cased": 108_310_272, "bert/large-uncased": 335_141_888,
    "bert/large-cased": 333_579_264, "roberta/base": 124_645_632, "roberta/large": 355_359_744,
    **{f"{name}/{size}": count for name in ("bloom", "bloomz") for size, count in (
        ("560m", 559_214_592), ("1b1", 1_065_314_304), ("1b7", 1_722_408_960), ("3b", 3_002_557_440),
        ("7b1", 7_069_016_064), ("176b", 176_247_271_424))},
    "bigbird/base": 127_468_800, "bigbird/large": 359_123_968, "bigbird-pegasus/large": 576_891_904,
    "led/base-16384": 161_844_480, "led/large-16384": 459_801_600,
    "longformer/base": 148_659_456, "longformer/large": 434_600_960,
    "falcon/7b": 6_921_720_704, "falcon/40b": 41_303_293_952, "falcon/180b": 178_557_088_768,
    "falcon/rw-1b": 1_311_625_216,
    "mpt/7b": 6_649_286_656, "mpt/7b-8k": 6_649_286_656, "mpt/30b": 29_957_200_896,
    "gpt2/small": 124_439_808, "gpt2/medium": 354_823_168, "gpt2/large": 774_030_080, "gpt2/xl": 1_557_611_200,
    "gpt3/small": 125_226_240, "gpt3/medium": 355_871_744, "gpt3/large": 760_300_032, "gpt3/xl": 1_315_723_264,
    "gpt3/2.7b": 2_651_553_280, "gpt3/6.7b": 6_658_404_352, "gpt3/13b": 12_853_386_240, "gpt3/175b": 174_604_259_328,
    "gpt-j/6b": 6_050_882_784, "gpt-neox/20b": 20_554_567_680,
    "pythia/70m": 70_426_624, "pythia/160m": 162_322_944, "pythia/410m": 405_334_016, "pythia/1b": 1_011_781_632,
    "pythia/1.4b": 1_414_647_808, "pythia/2.8b": 2_775_208_960, "pythia/6.9b": 6_857_302_016,
    "pythia/12b": 11_846_072_320,
    "m2m100/418m": 483_905_536, "m2m100/1.2b": 1_239_470_080,
    "nllb/600m-distilled": 615_073_792, "nllb/1.3b": 1_370_638_336, "nllb/3.3b": 3_344_863_232,
    "opt/125m": 125_239_296, "opt/350m": 331_196_416, "opt/1.3b": 1_315_758_080, "opt/2.7b": 2_651_596_800,
    "opt/6.7b": 6_658_473_984, "opt/13b": 12_853_473_280, "opt/30b": 29_974_540_288, "opt/66b": 65_719_701_504,
    "palm/8b": 8_632_012_800, "palm/62b": 62_495_662_080, "palm/540b": 540_356_474_880,
    "llama/7b": 6_738_415_616, "llama/13b": 13_015_864_320, "llama/33b": 32_528_943_616, "llama/65b": 65_285_660_672,
    "llama2/7b": 6_738_415_616, "llama2/13b": 13_015_864_320, "llama2/70b": 68_976_648_192,
    "llama3/8b": 8_030_261_248, "llama3/70b": 70_553_706_496, "llama3.1/8b": 8_030_261_248,
    "llama3.1/70b": 70_553_706_496, "llama3.1/405b": 405_853_388_800, "llama3.2/1b": 1_235_814_400,
    "llama3.2/3b": 3_212_749_824, "smollm2/135m": 134_515_008,
    "smollm3/3b": 3_075_098_624,
    "mistral/7b": 7_241_732_096, "mistral/7b-v0.3": 7_248_023_552,
    "gemma/2b": 2_506_172_416, "gemma/7b": 8_537_680_896, "gemma2/2b": 2_614_341_888, "gemma2/9b": 9_241_705_984,
    "gemma2/27b": 27_227_128_320, "gemma3/270m": 268_098_176, "gemma3/1b": 999_885_952, "gemma3/4b": 3_880_263_168,
    "gemma3/12b": 11_766_034_176, "gemma3/27b": 27_009_346_304,
    "qwen2.5/0.5b": 494_032_768, "qwen2.5/1.5b": 1_543_714_304, "qwen2.5/3b": 3_085_938_688,
    "qwen2.5/7b": 7_615_616_512, "qwen2.5/14b": 14_770_033_664, "qwen2.5/32b": 32_763_876_352,
    "qwen2.5/72b": 72_706_203_648, "qwen3/0.6b": 596_049_920, "qwen3/1.7b": 1_720_574_976, "qwen3/4b": 4_022_468_096,
    "qwen3/8b": 8_190_735_360, "qwen3/14b": 14_768_307_200, "qwen3/32b": 32_762_123_264,
    "whisper/tiny": 37_760_640, "whisper/base": 72_593_920, "whisper/small": 241_734_912,
    "whisper/medium": 763_857_920, "whisper/tiny.en": 37_760_256, "whisper/base.en": 72_593_408,
    "whisper/small.en": 241_734_144, "whisper/medium.en": 763_856_896, "whisper/large-v2": 1_543_304_960,
    "whisper/large-v3": 1_543_490_560, "whisper/large-v3-turbo": 808_878_080,
    "t5/small": 60_506_624, "t5/base": 222_903_552, "t5/large": 737_668_096, "t5/3b": 2_851_598_336,
    "t5/11b": 11_307_321_344,
    **{f"{name}/{size}": count for name in ("t5-v1.1", "flan-t5") for size, count in T5_NEWER.items()},
    # the same with 250,112 rows instead of 32,128 in each of two tables
    **{f"mt5/{s}": T5_NEWER[s] + 2 * (250_112 - 32_128) * w for s, w in zip(T5_NEWER, (512, 768, 1024, 2048, 4096))},
}  # fmt: skip


def count(spec: lamina.ModelSpec) -> int:
    return sum(parameter.numel() for parameter in spec.build(device="meta").parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_their_published_parameters(name: str):
    spec = lamina.spec(name)
    assert count(spec) == COUNTS[name]
    assert lamina.ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "name, masked, pretraining",
    [
        ("bert/base-uncased", 109_514_298, 110_106_428),
        ("bert/base-cased", 108_340_804, 108_932_934),
        ("bert/large-uncased", 335_174_458, 336_226_108),
        ("bert/large-cased", 333_610_308, 334_661_958),
        ("albert/base-v2", 11_221_680, 11_813_810),
        ("albert/large-v2", 16_795_824, 17_847_474),
        ("albert/xlarge-v2", 54_821_040, 59_021_490),
        ("albert/xxlarge-v2", 206_368_944, 223_158_450),
        ("roberta/base", 124_697_433, None),
        ("roberta/large", 355_412_057, None),
        ("longformer/base", 148_711_257, None),
        ("longformer/large", 434_653_273, None),
    ],
)
def test_heads_of_bert_have_their_published_parameters(name: str, masked: int, pretraining: int | None):
    chosen = family(name.split("/")[0])
    said = {"model_type": chosen.model_type, **chosen.sizes[name]}
    from lamina.families import Fields

    kind = chosen.model_type.capitalize()
    assert count(chosen.spec(Fields(said | {"architectures": [f"{kind}ForMaskedLM"]}))) == masked
    if pretraining is not None:
        assert count(chosen.spec(Fields(said | {"architectures": [f"{kind}ForPreTraining"]}))) == pretraining
