"""What holds for every model, whatever it is made of: causality, locality, padding, packing, names."""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import LabelHeadSpec, LanguageHeadSpec, PoolerSpec, Record
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Everything, Pattern, Prefix, Sinks, Window
from tests import small

LENGTH = 12


def changed(ids: torch.Tensor, t: int) -> torch.Tensor:
    other = ids.clone()
    other[:, t] = (other[:, t] + 1) % small.VOCABULARY
    return other


@pytest.mark.parametrize("scheme", small.SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_sees_a_later_one(scheme: str, dtype: torch.dtype):
    """Bit for bit, with every backend: a rounding difference would be a leak too."""
    model, ids = small.build(small.decoder(small.MIXED, scheme), dtype), small.ids(2, LENGTH)
    with torch.no_grad():
        for backend in ("sdpa", "dense") if scheme != "shaw" else ("dense",):
            expected = model(ids, backend=backend).logits
            for t in range(LENGTH):
                found = model(changed(ids, t), backend=backend).logits
                assert torch.equal(found[:, :t], expected[:, :t])
                assert not torch.equal(found[:, t], expected[:, t])


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_change_spreads_exactly_as_far_as_the_windows_reach(window: int, layers: int):
    """L layers with a window of W (itself included) see L (W - 1) + 1 tokens."""
    model, ids = small.build(small.decoder([Causal() & Window(back=window)] * layers)), small.ids(1, LENGTH)
    with torch.no_grad():
        expected = model(ids).hidden
        for t in range(LENGTH):
            moved = (model(changed(ids, t)).hidden != expected).any(-1)[0]
            assert moved.nonzero().flatten().tolist() == list(range(t, min(t + layers * (window - 1) + 1, LENGTH)))


@pytest.mark.parametrize(
    "pattern, reaches",
    [
        (Window(back=2, ahead=3), lambda q, k: q - 1 <= k <= q + 3),
        (Prefix(length=3) | Causal(), lambda q, k: k <= q or k < 3),
        (Causal() & (Window(back=2) | Sinks(count=2)), lambda q, k: k <= q and (k > q - 2 or k < 2)),
        (Everything(), lambda q, k: True),
    ],
)
def test_one_layer_sees_what_its_pattern_says(pattern: Pattern, reaches):
    model, ids = small.build(small.decoder([pattern])), small.ids(1, LENGTH)
    with torch.no_grad():
        expected = model(ids).hidden
        for t in range(LENGTH):
            moved = (model(changed(ids, t)).hidden != expected).any(-1)[0].tolist()
            assert moved == [reaches(q, t) or q == t for q in range(LENGTH)]


@pytest.mark.parametrize("scheme", small.SCHEMES)
@pytest.mark.parametrize("patterns", [small.MIXED, [Everything()] * 2, [Window(back=3, ahead=2)] * 2], ids=str)
def test_rows_padded_packed_and_alone_agree(scheme: str, patterns: list[Pattern]):
    model = small.build(small.decoder(patterns, scheme))
    texts = [small.ids(n, seed=n) for n in (5, 9, 3)]
    tolerance = {"rtol": 0, "atol": 1e-12 if scheme != "sinusoidal" else 1e-6}
    with torch.no_grad():
        alone = [model(text[None]).hidden[0] for text in texts]
        for side in ("left", "right"):
            pad = [(9 - len(t), 0) if side == "left" else (0, 9 - len(t)) for t in texts]
            ids = torch.stack([torch.nn.functional.pad(t, p, value=7) for t, p in zip(texts, pad)])
            mask = torch.stack([torch.nn.functional.pad(torch.ones_like(t), p) for t, p in zip(texts, pad)])
            out = model(ids, mask)
            assert out.hidden.isfinite().all()
            for row, expected in enumerate(alone):
                torch.testing.assert_close(out.hidden[row][mask[row].bool()], expected, **tolerance)
            order = torch.tensor([2, 0, 1])
            torch.testing.assert_close(model(ids[order], mask[order]).hidden, out.hidden[order], **tolerance)
        packed = torch.cat(texts)[None]
        documents = torch.cat([torch.full_like(t, d) for d, t in enumerate(texts)])[None]
        positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
        for given in ({"document_ids": documents}, {"position_ids": positions}):
            for mask in (None, torch.ones_like(packed)):
                out = model(packed, mask, **given)
                torch.testing.assert_close(out.hidden[0], torch.cat(alone), **tolerance)


def test_a_row_of_padding_only_is_finite_and_has_no_gradient():
    for scheme in small.SCHEMES:
        model, ids = small.build(small.decoder(small.MIXED, scheme)), small.ids(2, 5)
        out = model(ids, torch.tensor([[0] * 5, [1] * 5])).hidden
        assert out.isfinite().all()
        model.zero_grad()
        out[1].square().sum().backward()
        with_padding = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(ids[1:]).hidden.square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in with_padding:
                torch.testing.assert_close(with_padding[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_moving_all_positions_changes_nothing_where_they_are_relative():
    ids = small.ids(2, LENGTH)
    for scheme in ("rotary", "interleaved", "buckets", "alibi", "shaw", "transformer-xl"):
        model = small.build(small.decoder(small.MIXED, scheme))
        with torch.no_grad():
            moved = model(ids, position_ids=torch.arange(LENGTH)[None] + 40).hidden
            torch.testing.assert_close(moved, model(ids).hidden, rtol=0, atol=1e-4)
            gaps = model(ids, position_ids=torch.arange(LENGTH)[None] * 2).hidden
            assert not torch.allclose(gaps, moved)


def classifier(tokens: bool) -> Model:
    spec = small.decoder([Everything()] * 2)
    head = LabelHeadSpec(labels=3, task="token" if tokens else "sequence")
    pooler = None if tokens else PoolerSpec()
    return small.build(spec.replace(encoder=spec.decoder, decoder=None, head=None, pooler=pooler, labels=head))


def test_classifiers():
    ids, mask = small.ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    model = classifier(tokens=False)
    out = model(ids, mask)
    assert out.logits is out.label_logits and out.logits.shape == (2, 3)
    first = out.hidden[torch.arange(2), torch.tensor([2, 0])]  # the first real token, not the first column
    pooled = torch.tanh(first @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    torch.testing.assert_close(out.pooled, pooled)
    torch.testing.assert_close(out.logits, pooled @ model.labels.dense.weight.T + model.labels.dense.bias)
    model = classifier(tokens=True)
    out = model(ids, mask)
    assert out.pooled is None
    torch.testing.assert_close(out.logits, out.hidden @ model.labels.dense.weight.T + model.labels.dense.bias)


def test_a_language_head_and_labels_beside_it():
    spec = small.decoder([Everything()])
    model = small.build(spec.replace(pooler=PoolerSpec(), labels=LabelHeadSpec(labels=2)))
    out = model(small.ids(2, 4))
    assert out.logits.shape == (2, 4, small.VOCABULARY) and out.label_logits.shape == (2, 2)
    torch.testing.assert_close(out.logits, out.hidden @ model.embedding.weight.T)
    bare = small.build(spec.replace(head=None))(small.ids(2, 4))
    assert bare.logits is None and bare.hidden.shape == (2, 4, 16)


def test_only_the_last_logits():
    model, ids = small.build(small.decoder(small.MIXED)), small.ids(2, 6)
    whole = model(ids)
    for kept in (0, 1, 3, 6):
        out = model(ids, keep_logits=kept)
        assert out.logits.shape == (2, kept, small.VOCABULARY)
        torch.testing.assert_close(out.logits, whole.logits[:, 6 - kept :])
        assert torch.equal(out.hidden, whole.hidden)


@pytest.mark.parametrize(
    "wrong, near", [("attention_maks", "attention_mask"), ("position_id", "position_ids"), ("caches", "cache")]
)
def test_an_unknown_keyword_names_the_nearest(wrong: str, near: str):
    model = small.build(small.decoder([Causal()]))
    with pytest.raises(LaminaError, match=f"'{wrong}'; did you mean '{near}'"):
        model(small.ids(1, 3), **{wrong: None})


def test_what_is_no_input_is_refused():
    model = small.build(small.decoder([Causal()]))
    with pytest.raises(LaminaError, match=r"input_ids has shape \(3,\); expected \(batch, length\)"):
        model(small.ids(3))
    with pytest.raises(LaminaError, match="attention_mask has shape"):
        model(small.ids(1, 3), torch.ones(1, 4))
    spec = model.spec
    with pytest.raises(LaminaError, match="an encoder or a decoder"):
        spec.replace(decoder=None)
    with pytest.raises(LaminaError, match="did you mean 'dense'"):
        model(small.ids(1, 3), backend="dens")


def test_parameters_are_named_by_their_place_in_the_spec():
    model = small.build(small.decoder([Causal()], bias="all").replace(head=LanguageHeadSpec(tied=False, bias=True)))
    names = {name for name, _ in model.named_parameters()}
    attention = {f"decoder.layers.0.attention.op.{p}.{w}" for p, w in itertools.product("qkvo", ("weight", "bias"))}
    others = {f"decoder.layers.0.feedforward.op.{p}.weight" for p in ("gate", "up", "down")}
    norms = {f"decoder.layers.0.{step}.pre.weight" for step in ("attention", "feedforward")} | {"decoder.norm.weight"}
    assert names == attention | others | norms | {"embedding.weight", "head.weight", "head.bias"}
    assert model.decoder.layers[0]["attention"].op.path == "decoder.layers.0.attention.op"


def test_building_from_a_seed():
    spec = small.decoder(small.MIXED, "learned")
    one, same, other = spec.build(seed=3), spec.build(seed=3), spec.build(seed=4)
    assert one.training and all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert all(p.is_meta for p in spec.build(device="meta").parameters())
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in spec.build(dtype=torch.bfloat16).parameters())
    wide = ModelSpec.from_json(small.decoder([Causal()], vocabulary=4000, bias="all").to_json()).build()
    for name, parameter in wide.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter))
        elif "norm" in name or "pre" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert abs(parameter.std().item() - 0.02) < 5 * 0.02 / (2 * parameter.numel()) ** 0.5, name


def test_dropout_is_off_in_evaluation_and_on_in_training():
    spec = small.decoder(small.MIXED, dropout=0.5)
    model, ids = small.build(spec), small.ids(2, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_losses_and_records_belong_to_one_forward():
    model, ids = small.build(small.decoder(small.MIXED)), small.ids(1, 4)
    record = Record("*.output")
    model(ids, record=record)
    first = dict(record.values)
    assert len(first) == 3 and model(ids).losses == {}
    model(small.ids(1, 4, seed=8))
    assert all(record.values[name] is value for name, value in first.items())
