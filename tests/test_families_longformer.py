"""Longformer against transformers where tokens are global, on both ways to compute them, and as a decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LongformerSpec
from lamina.layers.longformer import Longformer
from lamina.marks import AfterToken, BeforeToken, EndBlocks, FirstToken, after_question
from lamina.tokens import HOLE, Tokens, plain
from tests import small
from tests.families import LENGTH, Case, close, row, tokens
from tests.oracle import ON_THE_CPU
from tests.test_families import Cases, cases, quiet, result  # noqa: F401  (two are fixtures)


def marks(*columns: tuple[int, ...], length: int = LENGTH) -> torch.Tensor:
    found = torch.zeros(len(columns), length, dtype=torch.bool)
    for i, some in enumerate(columns):
        found[i, list(some)] = True
    return found


SOME = marks((0, 5, 11), (3,))


@pytest.fixture(params=["longformer", "longformer-wide", "longformer-mlm", "longformer-token"])
def case(request: pytest.FixtureRequest, cases: Cases) -> Case:  # noqa: F811
    return cases(request.param)


@pytest.mark.parametrize("absorbs", [True, False])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
@torch.no_grad()
def test_global_tokens_are_those_of_transformers(case: Case, mask: str, absorbs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Longformer, "absorbs", lambda self, marked: absorbs)
    given = torch.ones_like(case.ids)
    if mask == "right":
        given[1, -4:] = 0
    if mask == "left":
        given[1, :2] = 0
    ids = torch.where(given.bool(), case.ids, case.theirs.config.pad_token_id)  # they count positions by the ids
    theirs = case.theirs(ids, attention_mask=given, global_attention_mask=SOME.long(), output_hidden_states=True)
    for backend in (None, *ON_THE_CPU):
        ours = case.ours(ids, None if mask == "none" else given, marked=SOME, backend=backend)
        for mine, other in ((ours.hidden, theirs.hidden_states[-1]), (result(ours), result(theirs))):
            assert close(mine[given.bool()], other[given.bool()])
    assert not close(case.ours(ids, given).hidden, ours.hidden, 1e-2)


def test_gradients_of_global_tokens_are_those_of_transformers(case: Case):
    from tests.test_families import their_names

    theirs, ours = case.theirs, case.ours.spec.build(seed=0)
    ours.load_state_dict(case.ours.state_dict())
    ours.origin = case.ours.origin
    theirs.zero_grad()
    weight = torch.randn(1, LENGTH, 1, generator=torch.Generator().manual_seed(3))
    (result(theirs(case.ids, global_attention_mask=SOME.long())) * weight).mean().backward()
    (result(ours.eval()(case.ids, marked=SOME)) * weight).mean().backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    moved, asked = their_names(ours, case), 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert close(moved[name], parameter.grad, 1e-4), name
            asked += "global" in name and float(parameter.grad.abs().max()) > 1e-6
    assert asked >= 15  # queries and values with their biases, and the matrices of keys, of three layers
    theirs.zero_grad()


@torch.no_grad()
def test_a_question_is_global_where_nobody_says_otherwise(cases: Cases):  # noqa: F811
    case = cases("longformer-span")
    assert case.ours.spec.marks == BeforeToken(id=95)
    ids = case.ids.clone()
    for i, places in enumerate(((4, 5, 12), (2, 7, 11))):
        ids[i, list(places)] = 95
    theirs, ours = case.theirs(ids), case.ours(ids)  # they mark the question by themselves, and so do we
    assert close(result(ours), result(theirs))
    told = case.ours(ids, marked=marks(range(4), range(2)))  # type: ignore[arg-type]
    assert torch.equal(result(told), result(ours))
    assert not close(case.ours(ids, marked=torch.zeros_like(ids).bool()).hidden, ours.hidden, 1e-2)


@torch.no_grad()
def test_a_choice_is_global_where_nobody_says_otherwise(cases: Cases):  # noqa: F811
    """Four choices for each of two questions are eight rows, each with three separators."""
    case = cases("longformer-choice")
    assert case.ours.spec.marks == AfterToken(id=2)
    ids, mask = tokens(8, 21, seed=6), torch.ones(8, 21, dtype=torch.int64)
    for i, (question, end) in enumerate(zip((3, 3, 3, 3, 6, 6, 6, 6), (12, 20, 9, 17, 20, 18, 10, 14), strict=True)):
        ids[i, [question, question + 1, end]] = 2
        ids[i, end + 1 :], mask[i, end + 1 :] = 1, 0
    theirs = case.theirs(ids.view(2, 4, 21), attention_mask=mask.view(2, 4, 21), output_hidden_states=True)
    ours = case.ours(ids, mask)
    assert ours.logits is not None and close(ours.logits.view(2, 4), theirs.logits)
    assert close(ours.hidden[mask.bool()], theirs.hidden_states[-1][mask.bool()])
    assert not close(case.ours(ids, mask, marked=torch.zeros_like(ids)).logits, ours.logits, 1e-2)


@torch.no_grad()
def test_the_first_token_of_each_document_is_global_in_a_classifier(cases: Cases):  # noqa: F811
    case = cases("longformer-sequence")
    assert case.ours.spec.marks == FirstToken()
    out = case.ours(case.ids)
    first = case.ours(case.ids, marked=marks((0,), (0,)))
    assert torch.equal(out.hidden, first.hidden)
    assert not close(out.hidden, case.ours(case.ids, marked=torch.zeros_like(case.ids).bool()).hidden, 1e-2)


def test_marks_by_rule():
    ids = torch.tensor([[7, 7, 9, 7, 9, 7, 7, 9, 7, 0]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1, 1, 1]])  # they alternate
    position = torch.where(ids > 0, torch.arange(10), HOLE)
    some = Tokens(position, documents)

    def columns(rule: Any, given: Tokens = some) -> list[int]:
        return rule.put(ids, given).marked[0].nonzero()[:, 0].tolist()

    assert columns(FirstToken()) == [0, 4]
    assert columns(BeforeToken(id=9)) == [0, 1]
    assert columns(BeforeToken(id=7)) == [4]
    assert columns(BeforeToken(id=8)) == []

    def follows(id: int) -> list[int]:
        return after_question(id, ids, some)[0].nonzero()[:, 0].tolist()

    assert follows(9) == [3, 5, 6, 7, 8]  # in the other document a 9 comes first
    assert follows(7) == [1, 2, 3, 6, 7, 8]
    assert follows(8) == [1, 2, 3, 5, 6, 7, 8]  # a document without one: all but its first token
    assert columns(AfterToken(id=9)) == [6, 7, 8]  # of the second document all is after its first token and the next
    assert columns(AfterToken(id=7)) == [2, 3, 6, 8]
    assert columns(AfterToken(id=8)) == []
    for hole, expected in ((0, [3, 6, 8, 9]), (1, [3, 6, 8, 9])):  # padding is neither a separator nor behind one
        given = Tokens(torch.where(torch.arange(10) == hole, HOLE, torch.arange(10)), documents)
        assert columns(AfterToken(id=7), given) == expected
    assert columns(EndBlocks(size=2)) == [0, 1, 4, 5, 6, 7, 8]  # documents of 5 and of 4 tokens
    assert columns(EndBlocks(size=1, short=4)) == [0, 4, 5, 6, 7, 8]
    assert columns(EndBlocks(size=3), plain(1, 10)) == [0, 1, 2, 9]
    marked = FirstToken().put(ids, plain(1, 10))
    assert marked.span == (0, 10)
    with pytest.raises(LaminaError, match="size must be 1"):
        EndBlocks(size=0)


@torch.no_grad()
def test_weights_show_the_rows_of_global_tokens(case: Case):
    record = lamina.Record("*.weights")
    case.ours(case.ids, marked=SOME, record=record)
    for weights in record.values.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert bool((weights[0, :, 5] > 0).all()) and bool((weights[0, :, :, 5] > 0).all())
    assert bool((record.values["encoder.layers.0.attention.op.weights"][0, :, 4, 9] == 0).all()) or (
        case.row.name == "longformer-wide"
    )


# What nobody else has: a Longformer that writes


def decoder(marked_layers: int = 2) -> lamina.Model:
    spec = small.decoder([small.WINDOWED[0]] * marked_layers, "learned")
    attention = LongformerSpec(heads=4, head_dim=8, window=3, causal=True)
    from lamina.layers import AttentionSpec
    from lamina.specs import edit

    return small.build(edit(spec, AttentionSpec, lambda path, part: attention))


@torch.no_grad()
def test_a_causal_longformer_decodes_from_a_cache_that_stays_small():
    model, ids = decoder(), small.ids(2, 14)
    given = marks((0, 2, 3), (1,), length=14)
    whole = model(ids, marked=given).hidden
    assert not torch.allclose(whole, model(ids).hidden)
    for chunks in ([14], [5, *[1] * 9], [4, 3, 7]):
        cache, parts, start = model.new_cache("auto", 2), [], 0
        for size in chunks:
            part = slice(start, start + size)
            parts.append(model(ids[:, part], marked=given[:, part], cache=cache).hidden)
            start += size
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    for changed in range(14):  # nothing looks ahead
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 20
        assert torch.equal(model(other, marked=given).hidden[:, :changed], whole[:, :changed])


def test_a_token_that_is_marked_later_is_refused_with_a_cache():
    model, ids = decoder(), small.ids(1, 6)
    cache = model.new_cache("auto", 1)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        with pytest.raises(UnsupportedError, match="mark tokens of the first forward only"):
            model(ids[:, 4:], marked=marks((1,), length=2), cache=cache)


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"window": 0}, {"dropout": 2.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]):
    with pytest.raises(LaminaError, match="must"):
        LongformerSpec(**{"heads": 2, "head_dim": 4, "window": 3, **wrong})


def test_dropout_is_on_the_probabilities_of_both_kinds():
    layer = LongformerSpec(heads=2, head_dim=4, window=2, dropout=0.5).build(8)
    assert layer.train().absorbs(1) is False and layer.eval().absorbs(1) is True and layer.absorbs(4) is False
    assert row("longformer").fields["attention_window"] and len(tokens(1, 2, 3)) == 1
