"""What holds for every memory: no cut, padding, packing or companion changes what a token reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BucketBiasSpec,
    Call,
    InfiniSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    RMSNormSpec,
    RotarySpec,
    ShawSpec,
    TransformerXLSpec,
)
from lamina.model import Model
from lamina.patterns import Causal, Everything, Window
from lamina.report.attention import attention_of
from lamina.specs import edit
from lamina.tokens import Tokens, plain
from tests import small
from tests.layers.memories import MEMORIES, NO_FIXED, OWN, UNBOUNDED, build, spec

TEXT = 20
EXACT = {"rtol": 0, "atol": 1e-11}
SPLITS = ([TEXT], [1] * TEXT, [3] * 6 + [2], [7, 1, 1, 2, 9], [2, 12, 1, 5], [4] * 5)


def read(model: Model, ids: Tensor, split: list[int], kind: str = "auto", **given: Tensor) -> Tensor:
    """Hidden states, read in pieces with a cache."""
    cache, found, start = model.new_cache(kind, ids.shape[0], TEXT + 4), [], 0
    for size in split:
        at = slice(start, start + size)
        found.append(model(ids[:, at], cache=cache, **{name: t[:, at] for name, t in given.items()}).hidden)
        start += size
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_any_pieces_are_the_whole(name: str):
    model, ids = build(name), small.ids(2, TEXT)
    whole = model(ids).hidden
    refused = {"fixed": NO_FIXED[name]} if name in NO_FIXED else {}
    refused |= {"ring": "looks back without limit"} if name in UNBOUNDED else {}
    for kind in ("auto", "growing", "ring", "fixed"):
        if kind in refused:
            with pytest.raises(UnsupportedError, match=refused[kind]):
                model.new_cache(kind, 1, 4)
            continue
        for split in SPLITS:
            torch.testing.assert_close(read(model, ids, split, kind), whole, **EXACT)
    with pytest.raises(UnsupportedError, match="goes by positions, which a sinks cache renumbers"):
        model.new_cache("sinks")


FIELDS: dict[str, dict[str, Any]] = {
    "one key head": {"key_heads": 1},
    "no positions": {"rotary": None},
    "part of the features": {"rotary": RotarySpec(base=100.0, width=2, interleaved=True)},
    "Shaw": {"rotary": None, "relative": ShawSpec(clip=3)},
    "Transformer-XL": {"rotary": None, "relative": TransformerXLSpec(base=100.0)},
    "normed, capped, biased": {"qk_norm": RMSNormSpec(), "softcap": 4.0, "bias": "all", "sink": True, "scale": 0.6},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", MEMORIES)
def test_whatever_attention_it_is_around(name: str, fields: str):
    model, ids = build(name, **FIELDS[fields]), small.ids(2, TEXT)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    whole = model(ids, mask).hidden
    torch.testing.assert_close(whole[1:, 6:], model(ids[1:, 6:]).hidden, rtol=0, atol=1e-6)  # float32 waves
    for split in ([1] * TEXT, [7, 1, 1, 2, 9]):
        found = read(model, ids, split, attention_mask=mask)
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-6)
    with torch.enable_grad():  # keys come twice to a recurrence then
        torch.testing.assert_close(model(ids, mask).hidden.detach()[mask.bool()], whole[mask.bool()], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("score_bias", [AlibiSpec(heads=4), BucketBiasSpec(heads=4, buckets=8, distance=12)])
@pytest.mark.parametrize("name", MEMORIES)
def test_biases_of_the_stack(name: str, score_bias: Any):
    memory, pattern = MEMORIES[name]
    plain = spec(memory, pattern, rotary=None)
    assert plain.decoder is not None
    model = small.build(plain.replace(decoder=plain.decoder.replace(score_bias=score_bias)))
    ids = small.ids(2, TEXT)
    whole = model(ids).hidden
    for split in ([1] * TEXT, [7, 1, 1, 2, 9]):
        torch.testing.assert_close(read(model, ids, split), whole, **EXACT)
    with torch.enable_grad():
        torch.testing.assert_close(model(ids).hidden.detach(), whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_padding_and_companions_change_nothing(name: str, seed: int):
    model, ids = build(name, seed), small.ids(4, TEXT, seed=seed)
    masks = ["0" * 5 + "1" * 15, "1" * 13 + "0" * 7, "01100101110110111101", "0" * 20]
    mask = torch.tensor([[int(one) for one in row] for row in masks])
    for split in SPLITS:
        found = read(model, ids, split, attention_mask=mask)
        for row in range(3):
            keep = mask[row].bool()
            torch.testing.assert_close(found[row, keep], model(ids[row, keep][None]).hidden[0], **EXACT)
        assert torch.isfinite(found).all()
    whole = model(ids, mask).hidden
    for row in range(3):
        keep = mask[row].bool()
        torch.testing.assert_close(whole[row, keep], model(ids[row, keep][None]).hidden[0], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_documents_have_memories_of_their_own(name: str):
    model, ids = build(name), small.ids(3, TEXT)
    documents = torch.tensor([[5] * 8 + [2] * 11 + [9], [3] * 2 + [7] * 12 + [8] * 6, [1, 0] * 7 + [4] * 6])
    for split in SPLITS:
        rows = slice(0, 3 if split == [TEXT] else 2)  # a cache goes on with the last document alone
        found = read(model, ids[rows], split, document_ids=documents[rows])
        for row in range(len(found)):
            for document in documents[row].unique():
                keep = documents[row] == document
                torch.testing.assert_close(found[row, keep], model(ids[row, keep][None]).hidden[0], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_a_document_that_ends_takes_nothing_from_the_next(name: str):
    """Both so long that segments of theirs are pushed out, the second while the cache still holds the first, and in
    turns with it."""
    model, ids = build(name), small.ids(1, 57)
    for documents, splits in (
        ([4] * 26 + [6] * 31, ([57], [22, 35], [22, 20, 15])),
        ([6] * 4 + [4, 6] * 20 + [6] * 13, ([57], [44, 13])),
        ([4, 6] * 24 + [6] * 9, ([48, 9],)),
    ):
        documents = torch.tensor([documents])
        for split in splits:
            found = read(model, ids, split, document_ids=documents)
            for document in (4, 6):
                one = documents[0] == document
                torch.testing.assert_close(found[:, one], model(ids[:, one]).hidden, **EXACT)


STOPPED = [name for name in MEMORIES if not name.startswith("infini") and name != "memorizing beyond a window"]


@pytest.mark.parametrize("name", STOPPED)
def test_no_gradient_leaves_a_segment(name: str):
    """Whether keys and values of what is remembered are made anew, or are those of a cache."""
    model = build(name)
    ids = torch.arange(TEXT)[None]
    model(ids).hidden.sum().backward()  # a table whose rows all have a gradient, but for what is stopped
    table = model.embedding.weight
    assert table.grad is not None and bool((table.grad[:TEXT] != 0).all(1).all())
    for cache in (None, model.new_cache()):
        table.grad = None
        model(ids, cache=cache).hidden[0, -1].sum().backward()
        assert table.grad is not None
        reached = (table.grad[:TEXT] != 0).any(1).nonzero()[:, 0]
        length = MEMORIES[name][0].length
        assert int(reached.min()) >= (TEXT - 1) // length * length


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_positions_may_have_gaps(name: str):
    """Where a segment's last position never comes, the next one still finds it in the memory."""
    model, ids = build(name), small.ids(1, 8)
    positions = torch.tensor([[0, 1, 3, 4, 5, 9, 10, 17]])
    whole = model(ids, position_ids=positions).hidden
    for split in ([1] * 8, [2, 1, 5], [4, 4]):
        torch.testing.assert_close(read(model, ids, split, position_ids=positions), whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_later_tokens_change_no_earlier_bit(name: str):
    model, ids = build(name), small.ids(2, TEXT)
    whole = model(ids).hidden
    for at in (1, 3, 8, 9, 14, TEXT - 1):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % small.VOCABULARY
        found = model(changed).hidden
        assert torch.equal(found[0, :at], whole[0, :at]) and torch.equal(found[1], whole[1])
        assert not torch.equal(found[0, at:], whole[0, at:])


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_the_memory_reaches_beyond_what_layers_see(name: str):
    """A token of the first segment changes the last one's output; without the memory it does not."""
    memory, pattern = MEMORIES[name]
    if name in UNBOUNDED:
        return
    if pattern == Causal():  # of a recurrence: cut to its own segments
        pattern = OWN
    far = spec(memory, pattern, layers=1)
    near = edit(far, MemoryAttentionSpec, lambda path, part: part.attention)
    ids = small.ids(1, 7).expand(6, 7)
    changed = torch.where(torch.eye(6, 7).bool(), (ids + 1) % small.VOCABULARY, ids)[:5]  # one token in each row
    moved = [bool((m(ids[:5]).hidden[:, 6] != m(changed).hidden[:, 6]).any()) for m in map(small.build, (far, near))]
    assert moved == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_rows_change_places_in_every_state(name: str):
    """Beams: after a reorder each row goes on from its parent's memory."""
    model, ids = build(name), small.ids(3, TEXT)
    parents = torch.tensor([2, 0, 0, 1])
    for start in (7, 9, 13):
        cache = model.new_cache("auto", 3)
        model(ids[:, :start], cache=cache)
        cache.reorder(parents)
        for step in range(start, TEXT):
            rows = torch.cat([ids[parents, :start], small.ids(4, TEXT, seed=2)[:, start:]], dim=1)
            found = model(rows[:, step : step + 1], cache=cache).hidden[:, 0]
            torch.testing.assert_close(found, model(rows[:, : step + 1]).hidden[:, -1], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_stops_growing(name: str):
    model = build(name)
    if name in UNBOUNDED:
        return
    cache, sizes = model.new_cache("auto", 1), []
    for token in small.ids(1, 40).split(1, dim=1):
        model(token, cache=cache)
        sizes.append(cache.bytes())
    assert max(sizes[24:]) == max(sizes[:24])
    with pytest.raises(UnsupportedError, match="cannot be trimmed"):
        cache.trim(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_at_zero_changes_no_bit_of_a_trained_model(dtype: torch.dtype):
    """Added by editing the spec; the weights keep their names, and the memory's own are new."""
    trained = small.build(small.decoder(small.WINDOWED), dtype)
    ids = small.ids(2, TEXT)
    for memory in (
        InfiniSpec(length=3, gate="zero"),
        InfiniSpec(length=3, update="delta", gate="zero"),
        MemorizingSpec(length=3, size=6, gate="zero"),
    ):
        wider = edit(
            trained.spec, AttentionSpec, lambda path, part, m=memory: MemoryAttentionSpec(attention=part, memory=m)
        )
        model = wider.build(dtype=dtype).eval()
        missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
        assert not unexpected and all(".memory." in name for name in missing)
        with torch.no_grad():
            for backend in (None, "dense"):
                expected = trained(ids, backend=backend).logits
                assert torch.equal(model(ids, backend=backend).logits, expected)
        model(ids).logits.float().square().sum().backward()
        gate = model.decoder.layers[0]["attention"].op.memory.gate  # pyright: ignore
        assert gate.grad is not None and (gate.grad != 0).all()  # and it learns from the first step


@pytest.mark.parametrize("name", MEMORIES)
def test_training_on_consecutive_pieces(name: str):
    """A cache that was filled without gradients, or detached, is read in training; values are those of the whole."""
    model, ids = build(name).train(), small.ids(2, TEXT)
    with torch.no_grad():
        whole = model(ids).hidden
    for graded in (False, True):
        cache = model.new_cache("auto", 2)
        with torch.set_grad_enabled(graded):
            model(ids[:, :8], cache=cache)
        cache.detach()
        for at in (slice(8, 13), slice(13, TEXT)):
            model.zero_grad()
            found = model(ids[:, at], cache=cache).hidden
            torch.testing.assert_close(found.detach(), whole[:, at], **EXACT)
            found.square().sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
            cache.detach()


@pytest.mark.parametrize("name", [name for name in MEMORIES if name.startswith(("infini", "compressive"))])
def test_parts_of_a_text_on_several_ranks_are_refused(name: str):
    """Where keys of all ranks are gathered there is no state."""

    class Gathered:
        late = False

        def slot(self, path: str) -> Gathered:
            return self

        def find(self, path: str) -> Gathered:
            return self

        def extend(self, key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
            return key, value, tokens

    layer = build(name, layers=1).decoder.layers[0]["attention"].op  # pyright: ignore
    call: Any = Call(tokens=plain(1, 5), cache=Gathered())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="reads a text in order, and this rank has a part of it"):
        layer(torch.zeros(1, 5, 16, dtype=torch.float64), call)


@torch.no_grad()
@pytest.mark.parametrize("name", ["recurrence", "memorizing", "infini"])
def test_a_report_shows_what_its_own_softmax_reads(name: str):
    found = attention_of(build(name), [1, 2, 3, 4, 5], list("abcde"))
    assert found is not None and len(found.weights) == 2 and found.causal


def test_a_memory_needs_what_came_before():
    for pattern in (Everything(), Window(back=2, ahead=1)):
        with pytest.raises(LaminaError, match="looks ahead; use Causal"):
            MemoryAttentionSpec(
                attention=AttentionSpec(heads=2, key_heads=1, head_dim=4, pattern=pattern), memory=InfiniSpec(length=4)
            )


def test_what_a_memory_keeps_is_counted():
    """After 4 tokens, rate 3, two layers: 4 keys and values of 2 heads of 6, one compressed pair, one input of 16."""
    counted = lamina.account(build("compressive, mean"), context=4)
    assert counted.cache_bytes == 2 * 8 * (4 * 2 * 12 + 2 * 12 + 16)
    after_many = lamina.account(build("infini"), context=13)  # 3 near keys, one of a new segment, M and z
    assert after_many.cache_bytes == 2 * 8 * (3 * 2 * 12 + 2 * 12 + 2 * 6 * 7)


@pytest.mark.parametrize("name", MEMORIES)
def test_it_is_read_back_counted_and_verified(name: str):
    model = build(name)
    assert lamina.ModelSpec.from_json(model.spec.to_json()) == model.spec
    counted = lamina.account(model, context=16)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.flops_per_token > 0 and counted.cache_bytes > 0
    report = lamina.verify(model)
    assert report.passed, report
