"""Tables of positions and of tokens: their rows in a few plain lines, and what the model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError
from lamina.layers import neighbour_encoder
from lamina.surgery import apply, build, compare, read_plan, retrofit
from tests import small, tiny
from tests.surgery.test_operations import ids_of, operated, run, works

ROBERTA = tiny.BERT | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "max_position_embeddings": 34}
ROBERTA |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
LEARNED = {"gpt2": tiny.GPT2, "bert": tiny.BERT, "roberta": ROBERTA, "bart": tiny.BART}


@pytest.mark.parametrize("shape", LEARNED)
def test_tiled_positions(shape: str, tmp_path: Path):
    """Texts of the old length are read as they were; position old + i is position i, rows before 0 stay."""
    base = tiny.model(LEARNED[shape], scale=2.0)
    small.shake(base)
    stack = base.spec.encoder or base.spec.decoder
    old, offset = stack.position.size, stack.position.offset
    size = 2 * old + 5
    plan = read_plan([{"op": "positions", "size": size}])
    done = apply(plan, base.spec, {name: one.detach() for name, one in base.named_parameters()})
    assert done.kept == "bounded" and f"{old} tokens" in done.promises[0].why
    model, new = build(done.spec, done.weights)
    assert not new and model.spec.context == size == model.spec.source_context
    ids = ids_of(base, length=old)
    assert torch.equal(run(model, ids), run(base, ids))
    for side in ("encoder", "decoder"):
        if getattr(base, side) is None:
            continue
        before, after = (getattr(one, side).position.weight.detach() for one in (base, model))
        for row in range(size + offset):
            source = row if row < offset else offset + (row - offset) % old
            assert torch.equal(after[row], before[source])
    run(model, ids_of(base, length=size))
    with pytest.raises(LaminaError, match="beyond this model"):
        run(model, ids_of(base, length=size + 1))
    back = apply(done.undo, done.spec, done.weights)
    assert back.spec == base.spec and all(torch.equal(back.weights[name], one) for name, one in base.named_parameters())
    if shape in ("gpt2", "bart"):
        works(model, ids_of(base), tmp_path)


@pytest.mark.parametrize("shape", ["gpt2", "roberta"])
def test_interpolated_positions(shape: str):
    base = tiny.model(LEARNED[shape])
    side = "decoder" if base.decoder is not None else "encoder"
    before = getattr(base, side).position.weight.detach().numpy()
    offset = getattr(base.spec, side).position.offset
    for size in (77, 19, 1):
        model, _ = operated(base, {"op": "positions", "size": size, "by": "interpolate"})
        after = getattr(model, side).position.weight.detach().numpy()
        np.testing.assert_array_equal(after[:offset], before[:offset])
        at = np.linspace(0, len(before) - offset - 1, size)
        for column in range(32):
            expected = np.interp(at, np.arange(len(before) - offset), before[offset:, column])
            np.testing.assert_allclose(after[offset:, column], expected, rtol=1e-5, atol=1e-6)
    same, _ = operated(base, {"op": "positions", "size": len(before) - offset, "by": "interpolate"})
    assert torch.equal(run(same, ids_of(base)), run(base, ids_of(base)))


def test_a_longer_model_opens_in_transformers(tmp_path: Path):
    base = tiny.model(ROBERTA, scale=2.0)
    model, _ = operated(base, {"op": "positions", "size": 70})
    lamina.save(model, tmp_path / "longer")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "longer").eval()
    ids = ids_of(base, length=60).clamp(min=3)
    with torch.no_grad():
        torch.testing.assert_close(run(model, ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_one_of_two_stacks_and_fewer():
    base = tiny.model(tiny.LED)
    model, _ = operated(base, {"op": "positions", "size": 100, "stack": "encoder"})
    assert (model.spec.source_context, model.spec.context) == (100, 12)
    fewer, _ = operated(base, {"op": "positions", "size": 7, "stack": "decoder"})
    assert fewer.decoder.position.weight.shape[0] == 7 + base.spec.decoder.position.offset
    assert fewer.spec.context == 7 and fewer.spec.source_context == 90
    for context in (12, None):  # the stacks had different lengths
        spec = base.spec.replace(context=context)
        assert apply(read_plan([{"op": "positions", "size": 100}]), spec, dict(base.named_parameters())).undo is None


SHAPES = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, "bert": tiny.BERT, "t5": tiny.T5, "bart": tiny.BART}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("new", ["zero", "mean", "normal"])
def test_more_tokens(shape: str, new: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=2.0)
    small.shake(base)
    old = base.spec.embedding.vocabulary
    ids = ids_of(base)
    plan = {"op": "vocabulary", "size": old + 3, "multiple": 8, "new": new, "seed": 5}
    done = apply(read_plan([plan]), base.spec, {name: one.detach() for name, one in base.named_parameters()})
    model, fresh = build(done.spec, done.weights)
    size = model.spec.embedding.vocabulary
    assert not fresh and size % 8 == 0 and old + 3 <= size < old + 11
    before, after = run(base, ids), run(model, ids)
    torch.testing.assert_close(after[..., :old], before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert torch.equal(model.embedding.weight[:old], base.embedding.weight)
    if new == "zero":
        assert not after[..., old:].any()
    if new == "mean":
        expected = before.mean(-1, keepdim=True).expand_as(after[..., old:])
        torch.testing.assert_close(after[..., old:], expected, rtol=0, atol=1e-5 * float(before.abs().max()))
    if new == "normal":
        rows = model.embedding.weight[old:].detach()
        assert len(torch.unique(rows, dim=0)) == size - old
    back = apply(done.undo, done.spec, done.weights)
    assert back.spec == base.spec and all(torch.equal(back.weights[name], one) for name, one in base.named_parameters())
    more = torch.where(torch.arange(ids.shape[1]) % 5 == 3, size - 1, ids)  # new tokens can be read
    assert run(model, more).isfinite().all()
    if new == "mean":
        verdict = compare(base, model, [ids[0].tolist()])
        assert verdict.found.startswith("exact") and verdict.agreement == 1
        if shape in ("bert", "t5"):
            works(model, ids, tmp_path)


def test_drawn_rows_have_the_deviation_of_their_feature():
    base = tiny.model(tiny.GPT2)
    scale = torch.arange(1.0, 33.0)
    with torch.no_grad():
        base.embedding.weight.mul_(scale).add_(scale * 3)
    model, _ = operated(base, {"op": "vocabulary", "size": 263 + 4000, "new": "normal"})
    rows, old = model.embedding.weight[263:].detach(), base.embedding.weight.detach()
    torch.testing.assert_close(rows.mean(0), old.mean(0), rtol=0.05, atol=0)
    torch.testing.assert_close(rows.std(0), old.std(0), rtol=0.1, atol=0)
    again, _ = operated(base, {"op": "vocabulary", "size": 263 + 4000, "new": "normal"})
    other, _ = operated(base, {"op": "vocabulary", "size": 263 + 4000, "new": "normal", "seed": 1})
    assert torch.equal(again.embedding.weight, model.embedding.weight)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_neighbours_have_the_same_tokens():
    base = tiny.model(tiny.GPT2)
    encoder = neighbour_encoder(32, 263, width=16, heads=2, head_dim=8, hidden=24, layers=1)
    fitted, _ = build(*retrofit(base.spec, dict(base.named_parameters()), layers=(1,), chunk=4, encoder=encoder))
    small.shake(fitted)
    model, _ = operated(fitted, {"op": "vocabulary", "multiple": 64})
    assert model.spec.retrieval.encoder.embedding.vocabulary == 320 == model.spec.embedding.vocabulary
    ids, found = ids_of(base), small.ids(2, 4, 2, 8, vocabulary=263)
    expected = fitted(ids, neighbours=found).logits
    torch.testing.assert_close(model(ids, neighbours=found).logits[..., :263], expected, rtol=0, atol=1e-4)


def test_fewer_tokens():
    base = tiny.model(tiny.LLAMA, scale=2.0)
    model, _ = operated(base, {"op": "vocabulary", "size": 260})
    ids = small.ids(2, 9, vocabulary=260)
    torch.testing.assert_close(run(model, ids), run(base, ids)[..., :260], rtol=0, atol=1e-6)
    assert compare(base, model, [ids[0].tolist()]).found.startswith("exact")
    with pytest.raises(LaminaError, match="fewer tokens than the old one, 260, and the text has one that is gone"):
        compare(base, model, [[1, 261]])
    with pytest.raises(LaminaError, match=r"257 tokens leave out 257, which is special.end"):
        operated(base, {"op": "vocabulary", "size": 257})


@pytest.mark.parametrize("shape", ["gpt2", "bert", "t5"])
def test_a_head_of_its_own_and_back(shape: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    model, new = operated(base, {"op": "head", "tied": False})
    ids = ids_of(base)
    assert not new and torch.equal(run(model, ids), run(base, ids))
    table = base.embedding.weight.detach().clone()
    with torch.no_grad():
        model.embedding.weight[3].add_(1.0)
    assert torch.equal(model.head.weight, table)  # no longer one tensor
    base = tiny.model(SHAPES[shape], scale=1.0)
    again, _ = operated(base, {"op": "head", "tied": False}, {"op": "head", "tied": True})
    assert again.spec == base.spec and torch.equal(run(again, ids), run(base, ids))
    works(operated(base, {"op": "head", "tied": False})[0], ids, tmp_path)


def test_a_head_that_is_tied_reads_the_table():
    base = tiny.model(tiny.LLAMA)
    done = apply(read_plan([{"op": "head", "tied": True}]), base.spec, dict(base.named_parameters()))
    assert done.kept == "bounded" and done.undo is None
    model, _ = build(done.spec, done.weights)
    hidden = model(ids_of(base)).hidden
    torch.testing.assert_close(run(model, ids_of(base)), (hidden @ base.embedding.weight.T).detach())


@pytest.mark.parametrize(
    ("config", "plan", "said"),
    [
        (tiny.LLAMA, {"op": "positions", "size": 90}, "no learned positions .* in encoder or decoder"),
        (tiny.T5, {"op": "positions", "size": 90, "stack": "decoder"}, "no learned positions .* in decoder"),
        (tiny.GPT2, {"op": "positions", "size": 0}, "size is 0; it must be at least 1"),
        (tiny.GPT2, {"op": "vocabulary", "multiple": 0}, "must be at least 1"),
        (tiny.GPT2, {"op": "head", "tied": True}, "tied is true, and so the head is already"),
        (tiny.LLAMA, {"op": "head", "tied": False}, "tied is false, and so the head is already"),
        (tiny.BERT | {"architectures": ["BertModel"]}, {"op": "head", "tied": False}, "no head over its vocabulary"),
    ],
)
def test_what_cannot_be_done(config: dict[str, Any], plan: dict[str, Any], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(config), plan)
