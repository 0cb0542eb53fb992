"""Patterns against a loop over single tokens: the mask, what is known without it, and what a cache may forget."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec
from lamina.patterns import (
    FOREVER,
    BlockTable,
    BlockWindow,
    Both,
    Causal,
    Either,
    Everything,
    Global,
    Pattern,
    Prefix,
    RandomBlocks,
    Retained,
    SegmentWindow,
    Sinks,
    Strided,
    Summary,
    Window,
    Without,
    allowed,
    bigbird,
    fixed,
    strided,
)
from lamina.patterns.pattern import extent
from lamina.tokens import HOLE, Tokens, join, plain
from tests.oracle import layout, mask, sees

PATTERNS = {
    "everything": Everything(),
    "causal": Causal(),
    "mistral": Causal() & Window(back=3),
    "back 1": Window(back=1, ahead=0),
    "longformer": Window(back=4, ahead=3),
    "uneven": Window(back=2, ahead=4),
    "one-sided": Window(back=3),
    "prefix 3": Prefix(length=3),
    "prefix-LM": Prefix() | Causal(),
    "prefix-LM 4": Prefix(length=4) | Causal(),
    "streaming": Causal() & (Window(back=3) | Sinks(count=2)),
    "sinks": Sinks(count=2),
    "two windows": Window(back=5, ahead=1) & Window(back=2, ahead=3),
    "either causal": Causal() | (Causal() & Window(back=5)),
    "sinks in a window": (Window(back=4) | Sinks(count=1)) & (Window(back=2) | Sinks(count=3)),
    "either window": Window(back=2, ahead=0) | Window(back=4, ahead=2),
    "global": (Window(back=3, ahead=2) | Prefix()) & Causal(),
    "deep": (Causal() & Prefix(length=5)) | (Window(back=2) & (Sinks(count=1) | Causal())),
    "dilated": Window(back=3, ahead=2, dilation=3),
    "dilated causal": Causal() & Window(back=2, dilation=2),
    "global tokens": Window(back=3, ahead=2) | Global(),
    "global positions": Window(back=2, ahead=1) | Global(positions=(0, 5)),
    "causal global": Causal() & (Window(back=2) | Global(positions=(1,))),
    "strided": strided(3)[0] | strided(3)[1],
    "strides alone": strided(3)[1],
    "fixed": fixed(4, 1)[0] | fixed(4, 1)[1],
    "fixed summaries": fixed(3, 2)[1],
    "fixed stretch": fixed(4, 2)[0],
    "block window": BlockWindow(size=3, back=2, ahead=1),
    "block table": BlockTable(size=3, table=((0, 2), (), (1,))),
    "causal block table": Causal() & BlockTable(size=2, table=((0,), (0, 1), (1, 2, 3), (0, 3))),
    "bigbird": bigbird(size=2, random_blocks=1, seed=3),
    "bigbird to a limit": bigbird(size=1, random_blocks=2, seed=3, limit=4),
    "random blocks": RandomBlocks(size=2, count=2, blocks=4),
    "segments": Causal() & SegmentWindow(length=3, back=4),
    "segments, none before": Causal() & SegmentWindow(length=4, back=0),
    "earlier segments": SegmentWindow(length=3, back=2, gap=0),
    "older segments": SegmentWindow(length=2, back=5, gap=2),
    "segments to come": SegmentWindow(length=3, back=-1, gap=-5),
    "segments and what is near": (Causal() & Window(back=2)) | SegmentWindow(length=4, back=6, gap=0),
    "beyond a window": Without(first=SegmentWindow(length=3, back=6, gap=0), second=Causal() & Window(back=4)),
    "bigbird encoder": BlockWindow(size=2, back=2, ahead=1) | Global() | RandomBlocks(size=2, count=1, blocks=6),
}


@pytest.fixture(params=PATTERNS, scope="module")
def pattern(request: pytest.FixtureRequest) -> Pattern:
    return PATTERNS[request.param]


def scattered(rng: random.Random, batch: int, length: int) -> Tokens:
    """Tokens in any order: offsets, holes, documents, marks."""
    pick = lambda options: torch.tensor([[rng.choice(options) for _ in range(length)] for _ in range(batch)])  # noqa: E731
    return Tokens(pick([HOLE, *range(9)]), pick([0, 0, 1]), pick([False, True]) if rng.random() < 0.7 else None)


def test_the_mask_equals_a_loop_over_pairs(pattern: Pattern):
    rng = random.Random(0)
    for _ in range(12):
        queries, keys = scattered(rng, 2, 7), scattered(rng, 2, 9)
        found = allowed(pattern, queries.query(), keys.key()).expand(2, 7, 9)
        assert torch.equal(found, mask(pattern, queries, keys))


def test_the_mask_of_one_pair_is_its_entry_in_the_whole(pattern: Pattern):
    tokens = scattered(random.Random(1), 1, 6)
    whole = allowed(pattern, tokens.query(), tokens.key()).expand(1, 6, 6)
    for i, j in itertools.product(range(6), repeat=2):
        one = [
            Tokens(
                tokens.position[0, at], tokens.document[0, at], None if tokens.marked is None else tokens.marked[0, at]
            )
            for at in (i, j)
        ]
        assert allowed(pattern, one[0], one[1]) == whole[0, i, j]


def test_reach_agrees_with_the_mask_on_every_pair_of_spans(pattern: Pattern):
    spans = [(start, stop) for start in range(7) for stop in range(start + 1, 8)]
    for query, key in itertools.product(spans, repeat=2):
        queries, keys = (plain(1, stop - start, start=start) for start, stop in (query, key))
        whole = mask(pattern, queries, keys)[0]
        match pattern.reach(query, key):
            case "all":
                assert whole.all(), (query, key)
            case "causal":
                assert whole.shape[0] == whole.shape[1] and torch.equal(whole, torch.ones_like(whole).tril()), (
                    query,
                    key,
                )
            case other:
                assert other is None


def test_reach_knows_what_it_can():
    """A reach of None is always right, and slow: these must stay fast."""
    assert Everything().reach((0, 5), (3, 9)) == "all"
    assert Causal().reach((0, 5), (0, 5)) == Causal().reach((3, 5), (3, 5)) == "causal"
    assert Causal().reach((5, 6), (0, 6)) == Causal().reach((5, 9), (0, 6)) == "all"
    assert (Causal() & Window(back=5)).reach((0, 5), (0, 5)) == "causal"
    assert (Causal() & Window(back=4)).reach((0, 5), (0, 5)) is None
    assert (Causal() & Window(back=6)).reach((5, 6), (0, 6)) == "all"
    assert Window(back=6, ahead=5).reach((0, 6), (0, 6)) == "all"
    assert Window(back=6, ahead=4).reach((0, 6), (0, 6)) is None
    assert Window(back=5, ahead=5).reach((0, 6), (0, 6)) is None
    assert Prefix(length=6).reach((0, 6), (0, 6)) == Sinks(count=6).reach((0, 6), (0, 6)) == "all"
    assert (Prefix(length=6) | Causal()).reach((0, 6), (0, 6)) == "all"
    assert (Causal() | Prefix(length=6)).reach((0, 6), (0, 6)) == "all"
    assert (Prefix() | Causal()).reach((0, 6), (0, 6)) is None


def test_what_a_cache_may_forget_is_seen_by_no_later_query(pattern: Pattern):
    kept = pattern.retained()
    for query in range(20):
        for key in range(query + 1):
            for marked in (False, True):
                if sees(pattern, query, key, marked):
                    recent = kept.recent is None or query - key < kept.recent
                    assert recent or key < kept.first, (query, key, kept)


def test_a_key_lasts_until_its_last_query(pattern: Pattern):
    """For each key, up to position 40 of the queries: never too short, and not too long where windows alone decide."""
    keys = plain(1, 20)
    for marks in (None, torch.arange(20)[None] % 3 == 1):
        lasts = pattern.lasts(Tokens(keys.position, keys.document, marks))
        if lasts is None:
            continue
        for key, last in enumerate(lasts[0].tolist()):
            marked = marks is not None and bool(marks[0, key])
            seeing = [query for query in range(key, 40) if sees(pattern, query, key, marked)]
            assert not seeing or seeing[-1] <= last, (key, seeing[-1], last)


def test_lasts_is_no_more_than_it_needs_to_be():
    keys = plain(1, 6)
    marked = Tokens(keys.position, keys.document, keys.position == 2)

    def lasts(pattern: Pattern, tokens: Tokens = keys) -> list[int]:
        found = pattern.lasts(tokens)
        assert found is not None
        return [-2 if one == FOREVER else one for one in found[0].tolist()]

    assert lasts(Window(back=3)) == lasts(Causal() & Window(back=3, ahead=1)) == [2, 3, 4, 5, 6, 7]
    assert lasts(Window(back=2, dilation=4)) == [4, 5, 6, 7, 8, 9]
    assert lasts(Window(back=2) | Sinks(count=2)) == [-2, -2, 3, 4, 5, 6]
    assert lasts(Window(back=3) & Window(back=2)) == lasts(Window(back=2) & Window(back=3)) == [1, 2, 3, 4, 5, 6]
    assert lasts(Causal() & (Window(back=1) | Prefix()), marked) == [0, 1, -2, 3, 4, 5]
    assert lasts(Window(back=1) | Global(positions=(1, 4))) == [4, -2, 4, 4, -2, 5]
    assert lasts(BlockWindow(size=2, back=2)) == [3, 3, 5, 5, 7, 7]
    assert lasts(Summary(stride=3, count=1)) == [-1, -1, -2, -1, -1, -2]
    assert lasts(SegmentWindow(length=3, back=2)) == [2, 5, 5, 5, 8, 8]
    assert lasts(SegmentWindow(length=3, back=2, gap=1)) == [-1, 5, -1, -1, 8, -1]
    assert lasts(Prefix(length=1)) == [-2, -1, -1, -1, -1, -1]
    assert lasts(BlockTable(size=2, table=((0,), (0,), (2,)))) == [3, 3, -1, -1, 5, 5]
    assert lasts(RandomBlocks(size=3, count=9, limit=2)) == [5, 5, 5, -1, -1, -1]  # block 1 draws block 0, and no more
    assert RandomBlocks(size=3, count=9).lasts(keys) is None
    for forever in (Everything(), Causal(), Strided(stride=3), Causal() | Window(back=2), Window(back=2) | Global()):
        assert forever.lasts(marked) is None


def test_retained_is_no_more_than_it_needs_to_be():
    assert Causal().retained() == Everything().retained() == Prefix().retained() == Retained(None)
    assert Window(back=3).retained() == (Causal() & Window(back=3)).retained() == Retained(3)
    assert (Window(back=3) & Causal()).retained() == Retained(3)
    assert (
        (Window(back=3) | Sinks(count=2)).retained() == (Sinks(count=2) | Window(back=3)).retained() == Retained(3, 2)
    )
    assert (Window(back=5) & Window(back=2)).retained() == (Window(back=2) & Window(back=5)).retained() == Retained(2)
    streaming = Window(back=2) | Sinks(count=9)
    assert (streaming & Window(back=3)).retained() == (Window(back=3) & streaming).retained() == Retained(3)
    assert (Prefix(length=4) | Causal()).retained().recent is None
    assert (Causal() | Window(back=3)).retained().recent is None
    assert (
        SegmentWindow(length=3, back=2).retained() == SegmentWindow(length=3, back=2, gap=0).retained() == Retained(5)
    )
    assert Prefix(length=4).retained() == Sinks(count=4).retained() == Retained(0, 4)


def test_what_no_backend_could_mean_is_refused():
    for wrong in (
        lambda: Window(back=0),
        lambda: Window(back=1, ahead=-1),
        lambda: Sinks(count=0),
        lambda: Prefix(length=0),
        lambda: Window(back=1, dilation=0),
        lambda: Global(positions=(0, -1)),
        lambda: Strided(stride=0),
        lambda: Summary(stride=3, count=0),
        lambda: Summary(stride=3, count=4),
        lambda: BlockWindow(size=0, back=1),
        lambda: BlockWindow(size=1, back=0),
        lambda: BlockWindow(size=1, back=1, ahead=-1),
        lambda: SegmentWindow(length=0, back=1),
        lambda: SegmentWindow(length=1, back=-1),
        lambda: SegmentWindow(length=1, back=2, gap=2),
        lambda: SegmentWindow(length=0, back=2, gap=1),
        lambda: RandomBlocks(size=1, count=0),
        lambda: RandomBlocks(size=1, count=1, blocks=0),
        lambda: RandomBlocks(size=1, count=1, limit=0),
    ):
        with pytest.raises(LaminaError, match="must (be|lie)|or more"):
            wrong()


def test_operators_make_specs():
    assert Causal() & Window(back=2) == Both(first=Causal(), second=Window(back=2))
    assert Causal() | Prefix() == Either(first=Causal(), second=Prefix())
    with pytest.raises(LaminaError, match="block numbers"):
        BlockTable(size=2, table=((0, -1),))
    for pattern in PATTERNS.values():
        assert Pattern.from_json(pattern.to_json()) == pattern


def test_joining_tokens():
    first, second = plain(2, 3), plain(2, 2, start=3)
    whole = join(first, second)
    assert whole.span == (0, 5) and whole.position.tolist() == [[0, 1, 2, 3, 4]] * 2 and whole.marked is None
    assert join(first, plain(2, 2, start=4)).span is None
    marks = Tokens(second.position, second.document, torch.ones(2, 2, dtype=torch.bool))
    assert join(first, marks).span is None
    assert join(first, marks).marked.tolist() == [[False] * 3 + [True] * 2] * 2
    assert join(marks, first).marked.tolist() == [[True] * 2 + [False] * 3] * 2
    rows = join(first, marks).select(torch.tensor([1]))
    assert rows.position.shape == rows.marked.shape == (1, 5)
    assert first.select(torch.tensor([1])).span == (0, 3)
    assert Tokens(torch.tensor([[HOLE, 0, 1]]), torch.zeros(1, 3)).real.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("pattern", "ahead"),
    [
        (Everything(), True),
        (Causal(), False),
        (Window(back=3), True),
        (Window(back=3, ahead=2), True),
        (Window(back=3, ahead=0), False),
        (Causal() & Window(back=3), False),
        (Causal() | Window(back=3, ahead=1), True),
        (Prefix(length=2) | Causal(), False),
        (Causal() & (Window(back=3) | Sinks(count=2)), False),
        (SegmentWindow(length=3, back=2), True),
        (SegmentWindow(length=3, back=2, gap=0), False),
        (SegmentWindow(length=3, back=2, gap=-1), True),
        (Without(first=Causal(), second=Window(back=2)), False),
    ],
)
def test_what_looks_ahead_has_no_cache(pattern: Pattern, ahead: bool) -> None:
    assert pattern.looks_ahead() is ahead
    layer = AttentionSpec(heads=2, key_heads=1, head_dim=4, pattern=pattern).build(8)
    if ahead:
        with pytest.raises(UnsupportedError, match="see later ones"):
            layer.retained()
    else:
        assert layer.retained() == pattern.retained()


def test_random_blocks_are_drawn_once_and_differ_by_their_seed():
    drawn = [RandomBlocks(size=2, count=2, seed=seed).rows(12) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][:2] == ((), (0,)) and RandomBlocks(size=2, count=2).rows(20)[:12] == drawn[0]
    assert len(RandomBlocks(size=2, count=2, blocks=6).rows(2)) == 6


def test_what_either_of_two_patterns_says_of_blocks():
    """Cost only, never the mask: a block that one of the two sees whole needs none, and neighbours stay together."""
    near, far = extent((100, 104)), extent((90, 94))
    whole, some = Causal() & Window(back=50), Causal() & Window(back=8)
    assert whole.over(near, far)[1] and not some.over(near, far)[1]
    for pattern in (whole | some, some | whole):
        assert [bool(answer) for answer in pattern.over(near, far)] == [True, True]
    assert [bool(answer) for answer in (some | some).over(near, far)] == [bool(some.over(near, far)[0]), False]
    dilated, tokens = Window(back=4, dilation=3), plain(1, 12)
    groups = dilated.groups(tokens)
    assert groups is not None and groups.tolist() == [[0, 1, 2] * 4]
    assert (dilated & Causal()).groups(tokens) is not None
    for pattern in (dilated | Sinks(count=1), Sinks(count=1) | dilated):
        assert pattern.groups(tokens) is None


def test_tokens_that_are_read_together():
    """Cost only: sums of stretches, global tokens and marked ones lie together, the others beside them."""
    tokens = plain(1, 8)
    marked = Tokens(tokens.position, tokens.document, torch.tensor([[True] + [False] * 6 + [True]]))
    for pattern, given, groups in (
        (Summary(stride=4, count=1), tokens, [0, 0, 0, 1] * 2),
        (Strided(stride=4), tokens, [0, 1, 2, 3] * 2),
        (Global(positions=(2, 5)), tokens, [1, 1, 0, 1, 1, 0, 1, 1]),
        (Global(), marked, [0, 1, 1, 1, 1, 1, 1, 0]),
        (Prefix(), marked, [0, 1, 1, 1, 1, 1, 1, 0]),
    ):
        found = pattern.groups(given)
        assert found is not None and found.expand(1, 8).tolist() == [groups]
    for pattern in (Causal(), Prefix(length=3), Window(back=4), Sinks(count=2), Strided(stride=4)):
        assert pattern.groups(tokens, False) is None


@pytest.mark.parametrize(
    "pattern, query, keys",
    [
        (strided(4)[0], 10, [7, 8, 9, 10]),
        (strided(4)[1], 10, [2, 6, 10]),
        (fixed(4, 1)[0], 10, [8, 9, 10]),
        (fixed(4, 1)[1], 10, [3, 7]),
        (bigbird(size=4, random_blocks=0), 30, [0, 1, 2, 3, *range(24, 31)]),
    ],
    ids=["strided", "strides", "fixed", "sums", "bigbird"],
)
def test_published_patterns_by_hand(pattern: Pattern, query: int, keys: list[int]):
    """arXiv:1904.10509, section 4.3; arXiv:2007.14062, section 2, made causal."""
    tokens = plain(1, 40)
    seen = allowed(pattern, tokens.query(), tokens.key())[0, query]
    assert seen.nonzero()[:, 0].tolist() == keys


def test_what_a_compiled_kernel_calls_is_the_mask(pattern: Pattern):
    """`drawn` looks at no value: here it is called for one pair at a time, under vmap, which allows no look."""
    predicate, at = pattern.drawn(12, torch.device("cpu")), torch.arange(12)

    def pair(row: int, query: Tokens, i: torch.Tensor, key: Tokens, j: torch.Tensor) -> torch.Tensor:
        one, other = (
            Tokens(x.position[row, at], x.document[row, at], None if x.marked is None else x.marked[row, at])
            for x, at in ((query, i), (key, j))
        )
        return allowed(predicate, one, other)

    for where in ("plain", "marked", "left padding"):
        queries, keys = layout(where, length=12)
        every = torch.vmap(torch.vmap(pair, in_dims=(None,) * 4 + (0,)), in_dims=(None, None, 0, None, None))
        for row in range(2):
            with TransformGetItemToIndex():  # with which torch calls a mask_mod
                assert torch.equal(every(row, queries, at, keys, at), mask(pattern, queries, keys)[row]), where


def test_a_band_is_the_mask(pattern: Pattern):
    """Where a pattern says that it is a band around the query, it is one, with those ends."""
    band = pattern.band()
    if band is None:
        return
    behind, ahead = band
    for query, key in itertools.product(range(14), range(14)):
        near = (behind is None or key >= query - behind) and (ahead is None or key <= query + ahead)
        assert near == sees(pattern, query, key)


def test_which_patterns_are_bands():
    bands = {name: pattern.band() for name, pattern in PATTERNS.items() if pattern.band() is not None}
    assert bands == {
        "everything": (None, None),
        "causal": (None, 0),
        "mistral": (2, 0),
        "back 1": (0, 0),
        "longformer": (3, 3),
        "uneven": (1, 4),
        "one-sided": (2, None),
        "two windows": (1, 1),
    }
