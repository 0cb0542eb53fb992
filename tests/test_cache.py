"""Caches: decoding in any chunks equals the whole sequence, and each row equals itself alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lamina.attend import Request, attend
from lamina.cache import KINDS, Cache, ExpiringLedger, MemorySlot
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, Call, RotarySpec
from lamina.model import Model
from lamina.patterns import (
    BlockTable,
    Causal,
    Everything,
    Global,
    Pattern,
    Prefix,
    Retained,
    Sinks,
    Window,
    bigbird,
    fixed,
)
from lamina.tokens import Tokens, plain
from tests import small
from tests.oracle import attention, rope

LENGTH = 14
TOLERANCE = {"rtol": 0, "atol": 1e-12}  # float64; hidden states near 1
CHUNKS = {
    "one": [LENGTH],
    "tokens": [1] * LENGTH,
    "prompt and tokens": [5] + [1] * 9,
    "prompt of the window": [small.WINDOW] + [1] * 10,
    "short prompt": [2, 1, 1, 5, 5],
    "long prompt": [9, 1, 4],
    "speculative": [3, 4, 1, 4, 2],
}
SCHEMES = [name for name in small.SCHEMES if name != "sinusoidal"]


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, bool], Model]:
    return {
        (scheme, windowed): small.build(small.decoder(small.WINDOWED if windowed else small.MIXED, scheme))
        for scheme in small.SCHEMES
        for windowed in (False, True)
    }


def cache_for(model: Model, kind: str, batch: int) -> Cache:
    capacity = {"fixed": LENGTH + 3, "sinks": LENGTH + 4}.get(kind)
    return model.new_cache(kind, batch, capacity)


def run(model: Model, cache: Cache, chunks: Sequence[int], ids: Tensor, **given: Tensor | None) -> Tensor:
    """Hidden states of all tokens, read in chunks."""
    found, start = [], 0
    with torch.no_grad():
        for size in chunks:
            part = {name: None if t is None else t[:, start : start + size] for name, t in given.items()}
            found.append(model(ids[:, start : start + size], cache=cache, **part).hidden)
            start += size
    return torch.cat(found, dim=1)


def alone(model: Model, ids: Tensor, keep: Tensor) -> Tensor:
    """The hidden states of the kept tokens of one row, read at once, without padding and without a cache."""
    with torch.no_grad():
        return model(ids[keep][None]).hidden[0]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_chunks_equal_the_whole(models: dict, kind: str, chunks: str):
    ids = small.ids(2, LENGTH)
    for scheme in SCHEMES if kind in ("auto", "sinks") else ("rotary",):
        if kind == "sinks" and scheme == "learned":
            continue  # positions of the input are not renumbered
        model = models[scheme, kind == "ring"]
        cache = cache_for(model, kind, 2)
        found = run(model, cache, CHUNKS[chunks], ids)
        for row in range(2):
            expected = alone(model, ids[row], torch.ones(LENGTH, dtype=torch.bool))
            torch.testing.assert_close(found[row], expected, **TOLERANCE, msg=lambda m, s=scheme: f"{s}: {m}")
        assert cache.length == LENGTH


MASKS = {
    "left": [[0] * 5 + [1] * 9, [1] * 14, [0] + [1] * 13],
    "right": [[1] * 9 + [0] * 5, [1] * 14, [1] * 13 + [0]],
    "ragged": [
        [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1],
        [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1],
        [0] * 6 + [1] * 8,
    ],
    "a row without tokens": [[0] * 14, [1] * 14, [0] * 13 + [1]],
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["rotary", "learned", "alibi"])
def test_padding_changes_nothing(models: dict, kind: str, padding: str, scheme: str):
    if kind == "sinks" and scheme == "learned":
        return  # positions of the input are not renumbered
    ids, mask = small.ids(3, LENGTH), torch.tensor(MASKS[padding])
    model = models[scheme, kind == "ring"]
    for chunks in ("one", "tokens", "speculative"):
        found = run(model, cache_for(model, kind, 3), CHUNKS[chunks], ids, attention_mask=mask)
        for row in range(3):
            keep = mask[row].bool()
            torch.testing.assert_close(found[row][keep], alone(model, ids[row], keep), **TOLERANCE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sinks"])
@pytest.mark.parametrize("given", ["document_ids", "position_ids", "both"])
def test_documents_do_not_see_each_other(models: dict, kind: str, given: str):
    ids = small.ids(2, LENGTH)
    lengths = [[3, 7, 4], [8, 1, 5]]
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths]) + 4
    positions = torch.tensor([[t for n in row for t in range(n)] for row in lengths])
    arguments = {"document_ids": {"document_ids": documents}, "position_ids": {"position_ids": positions}}
    arguments["both"] = arguments["document_ids"] | arguments["position_ids"]
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 2] = 0
    # With positions given, a token of padding counts; alone it does not.
    for scheme, with_mask in (("rotary", False), ("buckets", given == "document_ids")):
        model = models[scheme, kind == "ring"]
        masked = mask if with_mask else torch.ones_like(mask)
        more = {"attention_mask": mask} if with_mask else {}
        for chunks in ("one", "tokens", "speculative"):
            found = run(model, cache_for(model, kind, 2), CHUNKS[chunks], ids, **arguments[given], **more)
            for row in range(2):
                for document in documents[row].unique():
                    keep = (documents[row] == document) & masked[row].bool()
                    torch.testing.assert_close(found[row][keep], alone(model, ids[row], keep), **TOLERANCE)


def test_marks_are_kept_by_every_cache():
    """Marked tokens are seen by all later ones beyond the window, also when they come in another forward."""
    pattern = Causal() & (Window(back=2) | Prefix())
    model = small.build(small.decoder([pattern, pattern]))
    ids, marked = small.ids(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    marked[0, 1], marked[1, 3], marked[1, 9] = True, True, True
    with torch.no_grad():
        expected = model(ids, marked=marked).hidden
        assert not torch.allclose(expected, model(ids).hidden)
    for kind in ("auto", "growing", "fixed"):
        for chunks in CHUNKS.values():
            found = run(model, cache_for(model, kind, 2), chunks, ids, marked=marked)
            torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("prompt", range(1, 12))
def test_a_ring_of_every_prompt_wraps_three_times_and_does_not_grow(models: dict, prompt: int):
    model, total = models["rotary", True], prompt + 3 * small.WINDOW + 1
    ids, cache = small.ids(1, total), models["rotary", True].new_cache("ring", 1)
    found = run(model, cache, [prompt, *[1] * (total - prompt)], ids)
    torch.testing.assert_close(found[0], alone(model, ids[0], torch.ones(total, dtype=torch.bool)), **TOLERANCE)
    per_key = 2 * 8 * 8 * 2  # two key heads of eight float64, keys and values
    # One spare place a layer takes what is not kept.
    assert cache.bytes() == per_key * ((small.WINDOW + 1) + (2 + 1))


def test_auto_is_a_ring_exactly_where_the_pattern_forgets():
    def bytes_after(pattern, kind: str) -> int:
        model = small.build(small.decoder([pattern]))
        cache = model.new_cache(kind, 1)
        run(model, cache, [1] * 200, small.ids(1, 200))
        return cache.bytes()

    per_key = 2 * 8 * 8 * 2
    window = Causal() & Window(back=small.WINDOW)
    assert bytes_after(window, "auto") == bytes_after(window, "ring") == per_key * (small.WINDOW + 1)
    assert bytes_after(Causal(), "auto") >= per_key * 200
    for kept in (Causal(), Causal() & (Window(back=3) | Prefix())):
        with pytest.raises(UnsupportedError, match="looks back without limit"):
            small.build(small.decoder([kept])).new_cache("ring", 1)
    assert bytes_after(window, "growing") >= per_key * 200


FORGETFUL: dict[str, tuple[Pattern, int]] = {
    "sinks and window": (Causal() & (Window(back=3) | Sinks(count=2)), 5),
    "window and marks": (Causal() & (Window(back=3) | Prefix()), 3 + 2),
    "dilated": (Causal() & (Window(back=2, dilation=3) | Sinks(count=1)), 5),
    "summaries": (fixed(7, 1)[1], 30),  # of 200 tokens each seventh, and the newest
    "blocks": (bigbird(size=3, random_blocks=0), 3 + 6),
    "random blocks": (bigbird(size=4, random_blocks=1, seed=2, limit=50), 59),  # after token 98
    "table": (Causal() & BlockTable(size=4, table=((0,), (0, 1), (2,), *((i,) for i in range(3, 50)))), 8),
    "global positions": (Causal() & (Window(back=3) | Global(positions=(0, 2))), 5),
}
"""Patterns, and how many keys a later query can see at most (two tokens are marked)."""


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_cache_keeps_what_can_still_be_seen_and_no_more(name: str):
    pattern, most = FORGETFUL[name]
    model = small.build(small.decoder([pattern, pattern]))
    total = 200
    ids, marked = small.ids(2, total), torch.zeros(2, total, dtype=torch.bool)
    marked[:, 1], marked[:, 7] = True, True
    with torch.no_grad():
        expected = model(ids, marked=marked).hidden
    for chunks in ([1] * total, [50, *[1] * 100, 30, 20], [total]):
        cache = model.new_cache("auto", 2)
        assert [type(ledger) for ledger in cache.ledgers.values()] == [ExpiringLedger]
        found = run(model, cache, chunks, ids, marked=marked)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        (ledger,) = cache.ledgers.values()
        assert isinstance(ledger, ExpiringLedger)
        # The newest token has a place too, some room is to spare, and so is the place for what is not kept.
        assert ledger.room <= max(16, (most + 1) * 5 // 4)
        assert cache.bytes() == 2 * 2 * (ledger.room + 1) * 2 * 8 * 8 * 2


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", ["sinks and window", "blocks", "summaries"])
def test_a_cache_that_forgets_knows_padding_and_documents(name: str, padding: str):
    pattern, _ = FORGETFUL[name]
    model, ids, mask = (
        small.build(small.decoder([pattern, pattern])),
        small.ids(3, LENGTH),
        torch.tensor(MASKS[padding]),
    )
    documents = torch.tensor([[0] * 6 + [1] * 8, [0] * 14, [0] * 2 + [1] * 5 + [2] * 7])
    for given in ({}, {"document_ids": documents}):
        for chunks in ("one", "tokens", "speculative"):
            cache = model.new_cache("auto", 3)
            found = run(model, cache, CHUNKS[chunks], ids, attention_mask=mask, **given)
            for row in range(3):
                for document in documents[row].unique() if given else [None]:
                    keep = mask[row].bool() & (True if document is None else documents[row] == document)
                    torch.testing.assert_close(found[row][keep], alone(model, ids[row], keep), **TOLERANCE)


def test_rows_of_a_cache_that_forgets_can_be_chosen():
    pattern, _ = FORGETFUL["sinks and window"]
    model, ids = small.build(small.decoder([pattern])), small.ids(2, LENGTH)
    cache, order = model.new_cache("auto", 2), torch.tensor([1, 1, 0])
    run(model, cache, [4, 1, 1], ids[:, :6])
    cache.reorder(order)
    found = run(model, cache, [1, 3, 1], ids[order, 6:11])
    with torch.no_grad():
        expected = model(ids).hidden[order, 6:11]
    torch.testing.assert_close(found, expected, **TOLERANCE)
    with pytest.raises(UnsupportedError, match="a cache that forgets overwrites old keys"):
        cache.trim(3)


def test_bytes_are_what_is_allocated(models: dict):
    model = models["rotary", False]
    per_key = 3 * 2 * 8 * 8 * 2  # three layers
    cache = model.new_cache("fixed", 2, 10)
    assert cache.bytes() == 0
    run(model, cache, [3], small.ids(2, 3))
    assert cache.bytes() == 2 * 10 * per_key
    growing = model.new_cache("growing", 1)
    run(model, growing, [1] * 65, small.ids(1, 65))
    assert 65 * per_key <= growing.bytes() <= 2 * 65 * per_key
    before = growing.slots["decoder.layers.0.attention.op"].key.data_ptr()
    run(model, growing, [1], small.ids(1, 1))
    assert growing.slots["decoder.layers.0.attention.op"].key.data_ptr() == before  # a step copies nothing


def test_a_fixed_cache_refuses_to_overflow(models: dict):
    model = models["rotary", False]
    cache = model.new_cache("fixed", 1, 6)
    ids = small.ids(1, 8)
    first = run(model, cache, [4], ids[:, :4])
    with pytest.raises(LaminaError, match="room for 6 tokens: 4 are in, 3 more came"):
        model(ids[:, 4:7], cache=cache)
    rest = run(model, cache, [2], ids[:, 4:6])  # what was refused left no trace
    expected = alone(model, ids[0], torch.arange(8) < 6)
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[0], expected, **TOLERANCE)
    for kind, capacity in (("fixed", None), ("fixed", 0), ("sinks", -1)):
        with pytest.raises(LaminaError, match="capacity"):
            model.new_cache(kind, 1, capacity)


@pytest.mark.parametrize("kind", KINDS)
def test_reorder_moves_every_state(models: dict, kind: str):
    model = models["rotary", kind == "ring"]
    ids, mask = small.ids(3, LENGTH), torch.tensor(MASKS["left"])
    index = torch.tensor([2, 0, 0, 1])
    cache = cache_for(model, kind, 3)
    run(model, cache, [6, 1], ids[:, :7], attention_mask=mask[:, :7])
    cache.reorder(index)
    assert cache.batch == 4
    new = small.ids(4, 7, seed=5)
    found = run(model, cache, [1, 3, 1, 2], new)
    for row, source in enumerate(index.tolist()):
        whole = torch.cat([ids[source, :7][mask[source, :7].bool()], new[row]])
        torch.testing.assert_close(found[row], alone(model, whole, torch.ones_like(whole).bool())[-7:], **TOLERANCE)


@pytest.mark.parametrize("kind", ["auto", "growing", "fixed"])
def test_trim_forgets_the_last_tokens(kind: str):
    model = small.build(small.decoder([Causal(), Causal() & Window(back=20)] if kind != "auto" else [Causal()]))
    ids, wrong = small.ids(2, LENGTH), small.ids(2, 5, seed=3)
    cache = cache_for(model, kind, 2)
    found = [run(model, cache, [4, 1], ids[:, :5])]
    run(model, cache, [2, 3], wrong)
    cache.trim(5)
    assert cache.length == 5
    found.append(run(model, cache, [1, 4], ids[:, 5:10]))
    run(model, cache, [1], wrong[:, :1])
    cache.trim(10)
    cache.trim(10)
    found.append(run(model, cache, [4], ids[:, 10:]))
    for row in range(2):
        expected = alone(model, ids[row], torch.ones(LENGTH, dtype=torch.bool))
        torch.testing.assert_close(torch.cat(found, dim=1)[row], expected, **TOLERANCE)
    for length in (-1, LENGTH + 1):
        with pytest.raises(LaminaError, match=f"cannot be trimmed to {length}"):
            cache.trim(length)
    cache.trim(0)
    torch.testing.assert_close(run(model, cache, [3], ids[:, :3]), torch.cat(found, dim=1)[:, :3], **TOLERANCE)


def test_what_was_trimmed_is_seen_by_nobody():
    """A causal pattern would hide it anyway; others would not."""
    for kind in ("growing", "fixed"):
        cache = Cache(kind, 1, 8 if kind == "fixed" else None)
        cache.add("", Everything().retained())
        with torch.no_grad():
            for start, stop in ((0, 6), (2, 4)):
                if start:
                    cache.trim(start)
                tokens = plain(1, stop - start, start=start)
                _, _, seen = cache.slot("").extend(
                    torch.zeros(1, 1, 2 if start else 6, 1), torch.zeros(1, 1, 2 if start else 6, 1), tokens
                )
                cache.advance(tokens)
        assert sorted(p for p in seen.position[0].tolist() if p >= 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["growing", "fixed", "ring"])
def test_reorder_moves_marks(kind: str):
    pattern = Window(back=9) & Prefix() & Causal()  # nothing but marked tokens is seen
    model = small.build(small.decoder([pattern]))
    ids, index = small.ids(2, 6), torch.tensor([1, 0])
    marked = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    cache = model.new_cache(kind, 2, 8 if kind == "fixed" else None)
    run(model, cache, [4], ids[:, :4], marked=marked[:, :4])
    cache.reorder(index)
    found = run(model, cache, [1, 1], ids[index, 4:], marked=marked[index, 4:])
    with torch.no_grad():
        expected = model(ids, marked=marked).hidden[index, 4:]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("kind, said", [("auto", "a ring cache"), ("sinks", "a sinks cache")])
def test_what_overwrites_cannot_be_trimmed_and_stays_whole(models: dict, kind: str, said: str):
    model, ids = models["rotary", False], small.ids(1, LENGTH)
    cache = cache_for(model, kind, 1)
    first = run(model, cache, [8], ids[:, :8])
    with pytest.raises(UnsupportedError, match=said):
        cache.trim(4)
    rest = run(model, cache, [6], ids[:, 8:])
    expected = alone(model, ids[0], torch.ones(LENGTH, dtype=torch.bool))
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[0], expected, **TOLERANCE)


def test_padding_cannot_be_trimmed(models: dict):
    model = models["rotary", False]
    cache = model.new_cache("growing", 3)
    run(model, cache, [LENGTH], small.ids(3, LENGTH), attention_mask=torch.tensor(MASKS["left"]))
    with pytest.raises(UnsupportedError, match="padding"):
        cache.trim(3)


def naive_sinks(layer: AttentionSpec, module, x: Tensor, chunks: list[int], first: int, recent: int) -> Tensor:
    """One row (T, width): keys recomputed for every chunk from the tokens that are kept, at renumbered positions."""
    assert isinstance(layer.rotary, RotarySpec)
    frequency = [layer.rotary.base ** (-2 * i / layer.head_dim) for i in range(layer.head_dim // 2)]
    split = lambda t, h: t.view(-1, h, layer.head_dim).transpose(0, 1)  # noqa: E731
    kept, found, start = list[int](), [], 0
    for size in chunks:
        new = list(range(start, start + size))
        seen = kept + new
        numbers = list(range(len(seen)))
        query = rope(split(module.q(x[new]), layer.heads), numbers[-size:], frequency)
        key = rope(split(module.k(x[seen]), layer.key_heads), numbers, frequency)
        value = split(module.v(x[seen]), layer.key_heads)
        request = Request(
            query=query[None],
            key=key[None],
            value=value[None],
            queries=plain(1, size, start=len(kept)),
            keys=plain(1, len(seen)),
            pattern=layer.pattern,
            scale=layer.head_dim**-0.5,
        )
        found.append(module.o(attention(request)[0].transpose(0, 1).flatten(1)))
        start += size
        kept = [t for t in seen if t < first or t >= start - recent]
    return torch.cat(found)


@pytest.mark.parametrize("chunks", [[1] * 30, [3] + [1] * 27, [12] + [1] * 18, [2, 7, 1, 1, 9, 10], [30]])
@pytest.mark.parametrize("capacity", [5, 8])
@pytest.mark.parametrize("pattern", [Causal(), Causal() & Window(back=3)])
def test_sinks_equal_recomputation_at_renumbered_positions(chunks: list[int], capacity: int, pattern):
    spec = small.attention(pattern=pattern, rotary=RotarySpec(base=50.0))
    module = spec.build(16).double()
    small.shake(module)
    x = torch.randn(1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cache = Cache("sinks", 1, capacity)
    cache.add("", spec.pattern.retained())
    found, start = [], 0
    with torch.no_grad():
        for size in chunks:
            tokens = plain(1, size, start=start)
            found.append(module(x[:, start : start + size], Call(tokens=tokens, cache=cache))[0])
            cache.advance(tokens)
            start += size
            slot = cache.slot("")
            assert slot.key.shape[2] <= capacity  # never more than it may hold
        expected = naive_sinks(spec, module, x[0], chunks, 4, capacity - 4)
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=5e-6)  # phases are float32
    assert cache.bytes() == 2 * 2 * 8 * 8 * capacity


def test_sinks_beside_padding_equal_sinks_alone():
    model = small.build(small.decoder([Causal(), Causal()]))
    ids, mask = small.ids(3, 40), torch.tensor([[*row, *[1] * 26] for row in MASKS["ragged"]])
    together = run(model, cache := model.new_cache("sinks", 3, 9), [1] * 40, ids, attention_mask=mask)
    assert all(slot.key.shape[2] == 9 for slot in cache.slots.values())
    for row in range(3):
        keep = mask[row].bool()
        one = run(model, model.new_cache("sinks", 1, 9), [1] * int(keep.sum()), ids[row][keep][None])
        torch.testing.assert_close(together[row][keep], one[0], **TOLERANCE)


def test_sinks_refuse_what_renumbering_would_lose(models: dict):
    model, ids = models["rotary", False], small.ids(2, 4)
    documents = torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]])
    for given in (
        {"document_ids": documents},
        {"marked": torch.ones(2, 4)},
        {"position_ids": torch.tensor([[0, 1, 0, 1]])},
    ):
        with pytest.raises(UnsupportedError, match="one plain document a row"):
            model(ids, cache=model.new_cache("sinks", 2), **given)
    cache = model.new_cache("sinks", 2)
    model(ids, cache=cache, document_ids=documents[1:])
    with pytest.raises(UnsupportedError, match="one plain document a row"):
        model(ids, cache=cache, document_ids=documents[1:] + 1)
    padded = model.new_cache("sinks", 2)  # documents of padding are of no consequence
    model(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), cache=padded, document_ids=documents)


@pytest.mark.parametrize("kind", ["auto", "growing", "ring", "sinks"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_flow_through_a_cache(models: dict, kind: str, frozen: bool):
    """Truncated backpropagation through the chunks of a document; `frozen`: only queries learn, and keys are reused."""
    model = small.build(small.decoder(small.WINDOWED if kind == "ring" else small.MIXED))
    names = [n for n, _ in model.named_parameters() if not frozen or n.endswith("op.q.weight")]
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_()
    ids = small.ids(2, LENGTH)
    weight = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [model.get_parameter(name) for name in names]
    expected = torch.autograd.grad((model(ids).hidden * weight).sum(), leaves)
    for chunks in ([4, 1, 1, 8], [1] * LENGTH):
        cache, found, start = cache_for(model, kind, 2), [], 0
        for size in chunks:
            found.append(model(ids[:, start : start + size], cache=cache).hidden)
            start += size
        loss = (torch.cat(found, dim=1) * weight).sum()
        for name, gradient, want in zip(names, torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_cache_knows_nothing_of_another(models: dict, kind: str):
    model, ids = models["rotary", kind == "ring"], small.ids(2, LENGTH)
    first = run(model, cache_for(model, kind, 2), CHUNKS["speculative"], ids)
    other = cache_for(model, kind, 2)
    run(model, other, [7], small.ids(2, 7, seed=9))
    again = cache_for(model, kind, 2)
    start, found = 0, []
    for size in CHUNKS["speculative"]:  # between two forwards of one, a forward of the other
        found.append(run(model, again, [size], ids[:, start : start + size]))
        run(model, other, [1], small.ids(2, 1, seed=size)) if other.length < LENGTH else None
        start += size
    assert torch.equal(torch.cat(found, dim=1), first)
    with torch.no_grad():
        model(ids)
    assert torch.equal(run(model, cache_for(model, kind, 2), CHUNKS["speculative"], ids), first)


@pytest.mark.parametrize("kind", KINDS)
def test_what_padding_computes_is_not_kept(models: dict, kind: str):
    """Ids of padding whose vectors are NaN: a weight of zero in a later step would not stop them."""
    model = small.build(small.decoder(small.WINDOWED if kind == "ring" else small.MIXED))
    ids, mask = small.ids(3, LENGTH, vocabulary=small.VOCABULARY - 1), torch.tensor(MASKS["ragged"])
    with torch.no_grad():
        clean = [
            run(model, cache_for(model, kind, 3), CHUNKS[c], ids, attention_mask=mask)
            for c in ("tokens", "speculative")
        ]
        model.embedding.weight[-1] = float("nan")
    ids[mask == 0] = small.VOCABULARY - 1
    for chunks, expected in zip(("tokens", "speculative"), clean):
        found = run(model, cache_for(model, kind, 3), CHUNKS[chunks], ids, attention_mask=mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_random_chunks_masks_and_windows(kind: str):
    rng = random.Random(1)
    for trial in range(6):
        windows = [rng.randrange(1, 6) for _ in range(2)]
        patterns = [Causal() & Window(back=w) for w in windows]
        patterns = patterns if kind == "ring" else [patterns[0], Causal()]
        model = small.build(small.decoder(patterns), seed=trial)
        chunks = []
        while sum(chunks) < LENGTH:
            chunks.append(min(rng.randrange(1, 6), LENGTH - sum(chunks)))
        ids = small.ids(2, LENGTH, seed=trial)
        mask = torch.tensor([[int(rng.random() < 0.7) for _ in range(LENGTH)] for _ in range(2)])
        found = run(model, cache_for(model, kind, 2), chunks, ids, attention_mask=mask)
        for row in range(2):
            keep = mask[row].bool()
            torch.testing.assert_close(found[row][keep], alone(model, ids[row], keep), **TOLERANCE)


def test_inference_mode_and_out_of_it(models: dict):
    ids = small.ids(2, LENGTH)
    for kind in ("auto", "growing", "ring"):
        model = models["rotary", kind == "ring"]
        cache = model.new_cache(kind, 2)
        found = []
        for t in range(LENGTH):
            with torch.inference_mode() if t % 3 else torch.no_grad():
                found.append(model(ids[:, t : t + 1], cache=cache).hidden.clone())
        for row in range(2):
            expected = alone(model, ids[row], torch.ones(LENGTH, dtype=torch.bool))
            torch.testing.assert_close(torch.cat(found, dim=1)[row].clone(), expected, **TOLERANCE)


def test_a_slot_hands_out_keys_whose_tokens_it_names():
    """Whatever the order: the key of each token that is named lies in its column, and holes are told."""
    for kind in ("growing", "fixed", "ring"):
        cache = Cache(kind, 1, 12 if kind == "fixed" else None)
        cache.add("", (Causal() & Window(back=3)).retained() if kind == "ring" else Causal().retained())
        with torch.no_grad():
            for start, stop in ((0, 1), (1, 5), (5, 6), (6, 8)):
                tokens = plain(1, stop - start, start=start)
                key = torch.arange(start, stop, dtype=torch.float32)[None, None, :, None]
                keys, values, seen = cache.slot("").extend(key, -key, tokens)
                real = seen.position[0] >= 0
                assert torch.equal(keys[0, 0, :, 0][real], seen.position[0][real].float())
                assert torch.equal(values[0, 0, :, 0][real], -seen.position[0][real].float())
                wanted = range(max(0, start - 2), stop) if kind == "ring" else range(stop)
                assert set(wanted) <= set(seen.position[0][real].tolist())
                assert len(seen.position[0][real].unique()) == int(real.sum()) or kind == "ring"


def test_layers_that_keep_the_same_tokens_share_a_ledger(models: dict):
    cache = models["rotary", False].new_cache("auto", 1)  # window, all, window
    ledgers = [slot.ledger for slot in cache.slots.values()]
    assert ledgers[0] is ledgers[2] and ledgers[0] is not ledgers[1]


def test_what_cannot_be_cached_is_refused(models: dict):
    model = models["rotary", False]
    with pytest.raises(UnsupportedError, match="did you mean 'growing'"):
        model.new_cache("grownig")
    with pytest.raises(LaminaError, match="3 rows; the cache was made for 2"):
        model(small.ids(3, 2), cache=model.new_cache("auto", 2))
    spec = small.decoder([Everything()])
    encoder = small.build(spec.replace(encoder=spec.decoder, decoder=None))
    with pytest.raises(UnsupportedError, match="only decoders have a cache"):
        encoder.new_cache()
    with pytest.raises(UnsupportedError, match="only decoders have a cache"):
        encoder(small.ids(1, 2), cache=model.new_cache())


@pytest.mark.parametrize("inference", [True, False])
def test_rows_that_begin_alike_move_only_where_they_differ(inference: bool):
    """Columns: two that all rows share, then two of each row's own; a promise of two alike moves the others alone."""
    with torch.inference_mode(inference), torch.no_grad():
        cache = Cache("growing", 3)
        cache.add("", Causal().retained())
        slot = cache.slot("")
        key = torch.tensor([[7.0, 8.0, 1.0, 2.0], [7.0, 8.0, 3.0, 4.0], [7.0, 8.0, 5.0, 6.0]])[:, None, :, None]
        tokens = plain(3, 4)
        slot.extend(key, -key, tokens)
        cache.advance(tokens)
        cache.reorder(torch.tensor([0, 1, 2]), alike=2)
        assert slot.key is not None and slot.value is not None
        before = slot.key  # held, so that nothing new can lie where it did
        for index, expected in (([2, 0, 0], [5.0, 1.0, 1.0]), ([1, 1, 0], [1.0, 1.0, 5.0])):
            cache.reorder(torch.tensor(index), alike=2)
            assert slot.key[:, 0, :4, 0].tolist() == [[7.0, 8.0, one, one + 1] for one in expected]
            assert torch.equal(slot.key[:, :, :4], -slot.value[:, :, :4])
        assert (
            slot.key.data_ptr() == before.data_ptr()
        ) == inference  # in place where no gradient can want the old values
        cache.reorder(torch.tensor([2, 2, 1, 0]))
        assert slot.key[:, 0, :4, 0].tolist() == [[7.0, 8.0, one, one + 1] for one in (5.0, 5.0, 1.0, 1.0)]
        assert torch.equal(slot.key[:, :, :4], -slot.value[:, :, :4])
        new = plain(4, 1, start=4)
        keys, _, seen = slot.extend(torch.ones(4, 1, 1, 1), torch.ones(4, 1, 1, 1), new)
        assert keys.shape == (4, 1, 5, 1) and seen.span == (0, 5)


def test_the_memory_of_beams_stays_where_it_is_and_follows_texts_that_change_places():
    """Two texts. Three beams of each share its row; once beams cross over, each row has a text of its own."""
    cache = Cache("growing", 2)
    cache.add("cross", Retained(None, of="memory"))
    key = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    slot = cache.slot("cross")
    assert isinstance(slot, MemorySlot) and slot.kept(None) is None
    slot.extend(key, -key, plain(2, 1))
    cache.memory = key[:, 0]
    for index in ([0, 0, 0, 1, 1, 1], [2, 0, 0, 3, 5, 4]):
        cache.reorder(torch.tensor(index))
        assert slot.key is not None and slot.key.flatten().tolist() == [1.0, 2.0] and cache.batch == 6
    cache.trim(0)
    assert slot.kept(None) is not None
    cache.reorder(torch.tensor([3, 0, 5]))
    kept = slot.kept(None)
    assert kept is not None
    assert kept[0].flatten().tolist() == [2.0, 1.0, 2.0] and kept[1].flatten().tolist() == [-2.0, -1.0, -2.0]
    assert cache.memory.flatten().tolist() == [2.0, 1.0, 2.0] and kept[2].position.shape == (3, 1)
    cache.reorder(torch.tensor([1]))
    assert slot.key is not None and slot.key.flatten().tolist() == [1.0]


def test_attention_never_needs_order():
    """Shuffled keys with their tokens give the same: slots may keep them as they like."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 2, 7, 4).double(), torch.randn(1, 2, 7, 4).double()
    queries, keys = plain(1, 3, start=4), plain(1, 7)
    order = torch.randperm(7)
    for pattern in (Causal(), Causal() & Window(back=3)):
        expected = attend(Request(q, k, v, queries, keys, pattern, 1.0))
        shuffled = Tokens(keys.position[:, order], keys.document[:, order])
        found = attend(Request(q, k[:, :, order], v[:, :, order], queries, shuffled, pattern, 1.0))
        torch.testing.assert_close(found, expected, **TOLERANCE)
