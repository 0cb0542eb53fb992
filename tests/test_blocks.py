"""Attention block by block: its plan against the mask, and its numbers against the dense oracle on every combination.

Blocks are a few tokens here, so that texts of forty tokens have many of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lamina.attend import Request, attend, blocks, plan
from lamina.errors import UnsupportedError
from lamina.patterns import (
    BlockTable,
    BlockWindow,
    Causal,
    Everything,
    Global,
    Pattern,
    Prefix,
    RandomBlocks,
    Sinks,
    Window,
    allowed,
    bigbird,
    fixed,
    strided,
)
from lamina.tokens import HOLE, Tokens, plain
from tests.oracle import layout
from tests.test_attend import gradients, leaves

LENGTH = 40
TOLERANCE = {"rtol": 0, "atol": 1e-10}  # float64; numbers near 1
PATTERNS: dict[str, Pattern] = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Causal() & Window(back=7),
    "both ways": Window(back=5, ahead=3),
    "dilated": Window(back=3, ahead=2, dilation=3),
    "dilated causal": Causal() & Window(back=4, dilation=2),
    "sinks and window": Causal() & (Window(back=6) | Sinks(count=2)),
    "window and global tokens": Window(back=4, ahead=3) | Global(),
    "window and global positions": Window(back=4, ahead=3) | Global(positions=(0, 17)),
    "causal window and marks": Causal() & (Window(back=5) | Prefix()),
    "strided, steps": strided(5)[1],
    "strided, merged": strided(5)[0] | strided(5)[1],
    "fixed, stretch": fixed(6, 2)[0],
    "fixed, summaries": fixed(6, 2)[1],
    "fixed, merged": fixed(6, 2)[0] | fixed(6, 2)[1],
    "block table": BlockTable(size=8, table=((0, 1), (1,), (), (0, 2, 3), (4, 1))),
    "bigbird": BlockWindow(size=4, back=2, ahead=1) | Global() | RandomBlocks(size=4, count=2, blocks=10),
    "causal bigbird": bigbird(size=4, random_blocks=2),
}
LAYOUTS = ("plain", "chunk", "left padding", "right padding", "documents", "shuffled", "marked")
MODIFIERS = {
    "none": (),
    "bias": ("bias",),
    "bias of one row": ("bias of one row",),
    "softcap": ("softcap",),
    "sink": ("sink",),
    "all": ("bias", "softcap", "sink"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "QUERIES", 8)
    monkeypatch.setattr(plan, "KEYS", 4)
    monkeypatch.setattr(plan, "AT_ONCE", 20)
    monkeypatch.setattr(blocks, "SCORES", 200)


def tokens(where: str) -> tuple[Tokens, Tokens]:
    return layout(where, length=LENGTH, chunk=13)


def make(
    pattern: Pattern,
    where: str | tuple[Tokens, Tokens],
    heads: int,
    key_heads: int,
    modifiers: tuple[str, ...] = (),
    sizes: tuple[int, int] = (6, 5),
) -> Request:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    queries, keys = tokens(where) if isinstance(where, str) else where
    length, columns = queries.position.shape[1], keys.position.shape[1]
    bias = None
    if "bias" in modifiers or "bias of one row" in modifiers:
        bias = random(2, heads, length, columns) if "bias" in modifiers else random(1, 1, length, columns)
    return Request(
        query=random(2, heads, length, sizes[0]),
        key=random(2, key_heads, columns, sizes[0]),
        value=random(2, key_heads, columns, sizes[1]),
        queries=queries,
        keys=keys,
        pattern=pattern,
        scale=0.7,
        bias=bias,
        softcap=1.5 if "softcap" in modifiers else None,
        sink=random(heads) if "sink" in modifiers else None,
    )


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_equal_the_dense_oracle_forward_and_gradient(pattern: str, where: str, modifiers: str):
    for heads, key_heads in ((4, 2), (3, 3)) if modifiers in ("none", "all") else ((6, 2),):
        one, other = (make(PATTERNS[pattern], where, heads, key_heads, MODIFIERS[modifiers]) for _ in range(2))
        expected, found = attend(one, "dense"), attend(other, "blocks")
        torch.testing.assert_close(found, expected, **TOLERANCE)
        wanted = gradients(expected, one)
        for name, gradient in gradients(found, other).items():
            torch.testing.assert_close(gradient, wanted[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (2, 1, 40, 1), (1, 4, 1, 40), (2, 1, 1, 1)])
def test_a_bias_of_any_shape_that_broadcasts(shape: tuple[int, ...]):
    for where in ("plain", "marked"):
        pattern = PATTERNS["window and global tokens"]
        bias = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        one, other = (replace(make(pattern, where, 4, 2), bias=bias, memo={}) for _ in range(2))
        expected, found = attend(one, "dense"), attend(other, "blocks")
        torch.testing.assert_close(found, expected, **TOLERANCE)
        for a, b in zip(gradients(expected, one).values(), gradients(found, other).values(), strict=True):
            torch.testing.assert_close(b, a, **TOLERANCE)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_is_the_mask(pattern: str, where: str):
    """Every allowed pair lies in a run, none that counts as allowed is hidden, and each query stands in one step."""
    queries, keys = tokens(where)
    found = plan.plan(PATTERNS[pattern], queries, keys)
    rows = sorted(row for part in found.parts for row in part.rows)
    assert rows == [0, 1]
    for part in found.parts:
        mask = allowed(PATTERNS[pattern], part.queries.query(), part.keys.key())[0]
        mask = mask.expand(part.queries.position.shape[1], part.keys.position.shape[1])
        covered = torch.zeros_like(mask)
        for step in part.steps:
            for start, stop, every in step.runs:
                covered[step.start : step.stop, start:stop] = True
                assert not every or mask[step.start : step.stop, start:stop].all()
        assert not (mask & ~covered).any()
        assert [step.start for step in part.steps] == [0, *(step.stop for step in part.steps[:-1])]
        assert part.steps[-1].stop == mask.shape[0]
        for row in part.rows:
            for one, mine, order in ((queries, part.queries, part.query_order), (keys, part.keys, part.key_order)):
                want = one.position[row] if order is None else one.position[row][order]
                assert torch.equal(mine.position[0], want)


def share(pattern: Pattern, queries: Tokens, keys: Tokens | None = None) -> float:
    """What a plan computes, in parts of all pairs."""
    keys = queries if keys is None else keys
    return plan.plan(pattern, queries, keys).pairs / (queries.position.numel() * keys.position.shape[1])


def test_a_plan_asks_for_little_more_than_the_mask():
    """A plan of everything would be right too: these must stay small. 512 tokens, blocks of 8 queries and 4 keys."""
    whole = plain(2, 512)
    assert share(Causal() & Window(back=32), whole) < (32 + 8 + 4) / 512
    assert share(Window(back=17, ahead=16), whole) < (33 + 8 + 8) / 512
    assert share(Causal(), whole) < 0.52
    assert share(Causal() & Window(back=8, dilation=16), whole) < 20 / 512
    assert share(strided(16)[1], whole) < 0.63 / 16  # 32 tokens of a residue: 5 of 8 of their pairs, in blocks of 8
    assert share(fixed(16, 4)[1], whole) < 0.3
    assert share(fixed(16, 4)[0], whole) < 17 / 512
    assert share(Causal() & (Window(back=32) | Sinks(count=4)), whole) < (32 + 8 + 8) / 512
    assert share(bigbird(size=8, random_blocks=2), whole) < (8 + 16 + 16) / 512
    marked = whole.position % 200 == 7  # 3 of 512: their rows are whole, beside everyone's window and 3 keys
    some = Tokens(whole.position, whole.document, marked)
    assert share(Window(back=17, ahead=16) | Global(), some) < (33 + 8 + 8 + 4) / 512 + 3 / 512
    assert share(Window(back=17, ahead=16) | Global(positions=(7, 300)), whole) < (33 + 8 + 8 + 4) / 512 + 2 / 512


def test_padding_and_documents_cost_nothing():
    pattern = Window(back=17, ahead=16)
    position = torch.arange(512).repeat(2, 1)
    whole = share(pattern, plain(2, 512))
    left = torch.where(position < 100, HOLE, position - 100)
    assert share(pattern, Tokens(left, torch.zeros_like(left))) < whole
    for count in (4, 16):  # packed documents of 128 and of 32 tokens
        packed = Tokens(position % (512 // count), position // (512 // count))
        assert share(Everything(), packed) < 1.3 / count
    # Blocks end where padding, a document or a group ends, wherever that is.
    odd = torch.where(position < 101, HOLE, position - 101)
    assert share(Everything(), Tokens(odd, torch.zeros_like(odd))) == 411 / 512
    assert share(Everything(), Tokens(position % 103, position // 103)) == (4 * 103**2 + 100**2) / 512**2
    assert share(pattern | Global(positions=(7, 300)), plain(2, 512)) < 0.09
    ring = Tokens(torch.roll(position, 37, dims=1), torch.zeros_like(position))
    assert share(pattern, Tokens(position, torch.zeros_like(position)), ring) < 1.2 * whole


def test_blocks_are_taken_where_they_save(monkeypatch: pytest.MonkeyPatch):
    taken = []
    monkeypatch.setattr(blocks, "attend", lambda request: taken.append(1) or request.query)
    request = make(PATTERNS["window"], "plain", 4, 2)
    attend(request)
    assert not taken  # too small to be worth a plan
    monkeypatch.setattr(blocks, "LEAST", 1)
    for pattern, yes in (
        ("window", True),
        ("window and global positions", True),
        ("causal bigbird", True),
        ("causal", False),
        ("everything", False),
    ):
        taken.clear()
        attend(make(PATTERNS[pattern], "plain", 4, 2))
        assert bool(taken) is yes, pattern
        taken.clear()
        attend(make(PATTERNS[pattern], "plain", 4, 2, ("softcap",)))  # the fused kernel has none: blocks save memory
        assert taken
    taken.clear()
    attend(make(Window(back=LENGTH - 2, ahead=LENGTH - 2), "plain", 4, 2))
    assert not taken  # nearly all pairs: a mask on the fused kernel is faster
    taken.clear()
    attend(make(PATTERNS["window"], "step", 4, 2))
    assert not taken  # a step of decoding reads every key once


def test_what_blocks_cannot_do_is_refused_by_name():
    request = make(Causal(), "plain", 4, 2)
    table = (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(2, LENGTH, LENGTH, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="'blocks' cannot do relative terms on the values; backend 'dense' can"):
        attend(replace(request, value_table=table), "blocks")
    with pytest.raises(UnsupportedError, match="not on the CPU"):
        attend(replace(request, query=request.query.to("meta")), "blocks")


def test_the_same_probabilities_are_dropped_in_both_passes():
    """With dropout the gradient is that of the function that ran: a step along it changes the sum as it says."""
    request = replace(make(PATTERNS["window and global positions"], "plain", 4, 2), dropout=0.4)

    def run(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(replace(request, value=value, memo={}), "blocks")

    out = run(request.value)
    assert not torch.equal(out, attend(replace(request, dropout=0.0, memo={}), "blocks"))
    (gradient,) = torch.autograd.grad(out.square().sum() / 2, request.value)
    step = torch.randn_like(request.value)
    with torch.no_grad():  # the output is linear in the values, so the sum of squares is a parabola: exact differences
        slope = (run(request.value + step).square().sum() - run(request.value - step).square().sum()) / 4
    torch.testing.assert_close((gradient * step).sum(), slope)
    for name in ("query", "key"):
        leaf = leaves(request)[name]

        def at(moved: Tensor, name: str = name) -> Tensor:
            torch.manual_seed(3)
            return attend(replace(request, **{name: moved}, memo={}), "blocks").square().sum() / 2

        (gradient,) = torch.autograd.grad(at(leaf), leaf)
        step, small = torch.randn_like(leaf), 1e-6
        with torch.no_grad():
            slope = (at(leaf + small * step) - at(leaf - small * step)) / (2 * small)
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_changed_key_reaches_only_those_who_see_it(pattern: str):
    request = make(PATTERNS[pattern], "plain", 4, 2)
    mask = allowed(PATTERNS[pattern], request.queries.query(), request.keys.key()).expand(2, LENGTH, LENGTH)
    with torch.no_grad():
        before = attend(request, "blocks")
        for at in (0, 11, 17, LENGTH - 1):
            key, value = request.key.clone(), request.value.clone()
            key[:, :, at] += 1.0
            value[:, :, at] += 1.0
            changed = (attend(replace(request, key=key, value=value), "blocks") != before).any(dim=3).any(dim=1)
            assert torch.equal(changed, mask[:, :, at]), at
