"""LED: global tokens and windows in an encoder whose decoder reads all of it, texts of many windows, and generation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.exporting import exportable
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, CrossAttentionSpec, FeedForwardSpec, LongformerSpec
from lamina.layers.longformer import Longformer
from lamina.specs import edit
from tests import small, tiny
from tests.families import Case, close, same_files, tokens
from tests.oracle import ON_THE_CPU
from tests.test_families import Cases, cases, quiet, result, their_names  # noqa: F401  (two are fixtures)
from tests.test_families_longformer import marks

LONG = 45  # tokens of a source: eleven windows of 4
MARKS = marks((0, 17, 40), (0,), (3, 29), length=LONG)


@pytest.fixture(params=["led", "led-biased", "led-wide", "led-bare", "led-span-bare"])
def case(request: pytest.FixtureRequest, cases: Cases) -> Case:  # noqa: F811
    return cases(request.param)


def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(3, LONG) sources, their mask with padding on the right, and (3, 7) ids of the decoder."""
    mask = torch.ones(3, LONG, dtype=torch.int64)
    mask[1, 26:], mask[2, 39:] = 0, 0
    return torch.where(mask.bool(), tokens(3, LONG, seed=41), 1), mask, tokens(3, 7, seed=42)


@pytest.mark.parametrize("absorbs", [True, False])
@torch.no_grad()
def test_global_tokens_are_those_of_transformers(case: Case, absorbs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Longformer, "absorbs", lambda self, marked: absorbs)
    source, mask, text = texts()
    theirs = case.theirs(
        source,
        attention_mask=mask,
        global_attention_mask=MARKS.long(),
        decoder_input_ids=text,
        output_hidden_states=True,
    )
    for backend in (None, *ON_THE_CPU):
        record = lamina.Record("encoder.layers.*.output")
        ours = case.ours(source, mask, decoder_input_ids=text, marked=MARKS, backend=backend, record=record)
        for i, hidden in enumerate(theirs.encoder_hidden_states[1:]):
            assert close(record.values[f"encoder.layers.{i}.output"][mask.bool()], hidden[mask.bool()])
        assert close(ours.hidden, theirs.decoder_hidden_states[-1]) and close(result(ours), result(theirs))
    without = case.ours(source, mask, decoder_input_ids=text)
    assert not close(without.hidden, ours.hidden, 1e-2)  # nobody but the caller marks a token
    assert close(result(without), result(case.theirs(source, attention_mask=mask, decoder_input_ids=text)))


@torch.no_grad()
def test_windows_and_the_projections_of_global_tokens_bite(cases: Cases):  # noqa: F811
    """With a window less, or with the projections of tokens that are not global, the numbers would be others."""
    case, (source, mask, text) = cases("led"), texts()
    state = case.ours.state_dict()
    whole = case.ours(source, mask, decoder_input_ids=text, marked=MARKS).hidden
    for change in (
        lambda path, part: part.replace(window=part.window + 1),
        lambda path, part: part.replace(window=max(part.window - 1, 1)),
    ):
        other = edit(case.ours.spec, LongformerSpec, change).build()
        other.load_state_dict(state)
        assert not close(other.eval()(source, mask, decoder_input_ids=text, marked=MARKS).hidden, whole, 1e-3)
    other = case.ours.spec.build()
    other.load_state_dict({name: state[name.replace("global_", "")] for name in state})
    assert not close(other.eval()(source, mask, decoder_input_ids=text, marked=MARKS).hidden, whole, 1e-2)


def test_gradients_of_global_tokens_are_those_of_transformers(case: Case):
    theirs, ours = copy.deepcopy(case.theirs), copy.deepcopy(case.ours)
    source, mask, text = texts()
    weight = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(3))
    out = theirs(source, attention_mask=mask, global_attention_mask=MARKS.long(), decoder_input_ids=text)
    (result(out) * weight).mean().backward()
    (result(ours(source, mask, decoder_input_ids=text, marked=MARKS)) * weight).mean().backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    moved, asked = their_names(ours, case), 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert close(moved[name], parameter.grad, 1e-4), name
            asked += "global" in name and float(parameter.grad.abs().max()) > 1e-7
    assert asked >= 15  # queries and values with their biases, and the matrices of keys, of three layers


@torch.no_grad()
def test_padding_packing_and_caches_change_nothing_where_tokens_are_global(case: Case):
    source, text = tokens(1, 31, seed=8), tokens(1, 9, seed=9)
    chosen = marks((0, 13, 30), length=31)
    alone = case.ours(source, decoder_input_ids=text, marked=chosen)
    for left, right in ((0, 5), (5, 0), (2, 3)):  # padding that says it is global too
        wide = torch.nn.functional.pad(source, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(source), (left, right))
        given = torch.nn.functional.pad(chosen, (left, right), value=True)
        out = case.ours(wide, mask, decoder_input_ids=text, marked=given)
        assert close(result(out), result(alone))
        assert out.encoder_output is not None and alone.encoder_output is not None
        assert close(out.encoder_output[mask.bool()], alone.encoder_output[0])

    second, more = tokens(1, 14, seed=10), tokens(1, 4, seed=11)
    other = case.ours(second, decoder_input_ids=more, marked=marks((2,), length=14))
    packed = case.ours(
        torch.cat([source, second], dim=1),
        document_ids=torch.tensor([[0] * 31 + [1] * 14]),
        decoder_input_ids=torch.cat([text, more], dim=1),
        decoder_document_ids=torch.tensor([[0] * 9 + [1] * 4]),
        marked=torch.cat([chosen, marks((2,), length=14)], dim=1),
    )
    assert close(result(packed), torch.cat([result(alone), result(other)], dim=1))

    for sizes in ([9], [1] * 9, [4, 3, 2]):
        cache, parts = case.ours.new_cache(), []
        for part in text.split(sizes, dim=1):
            given = {"input_ids": source, "marked": chosen} if not parts else {}
            parts.append(result(case.ours(**given, decoder_input_ids=part, cache=cache)))
        assert close(torch.cat(parts, dim=1), result(alone))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["led", "led-biased"])
def test_what_is_written_of_marked_sources_is_that_of_transformers(cases: Cases, name: str, beams: int):  # noqa: F811
    case, (source, mask, _) = cases(name), texts()
    settings: dict[str, Any] = {"max_new_tokens": 14, "min_new_tokens": 4}
    theirs = case.theirs.generate(
        source,
        attention_mask=mask,
        global_attention_mask=MARKS.long(),
        num_beams=beams,
        do_sample=False,
        **settings,
    )
    for cache in ("auto", None):
        ours = lamina.generate(case.ours, source, mask, marked=MARKS, beams=beams, cache=cache, **settings)
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, lamina.generate(case.ours, source, mask, beams=beams, **settings))


def test_marks_of_a_model_of_one_stack_are_refused_where_it_writes():
    model = small.build(small.decoder(list(small.WINDOWED)))
    ids = small.ids(1, 4)
    with pytest.raises(UnsupportedError, match="marked is for the source of an encoder-decoder"):
        lamina.generate(model, ids, marked=ids > 0, max_new_tokens=1)


@torch.no_grad()
def test_a_source_may_be_longer_than_what_is_written():
    """The decoder's positions limit what is written; the encoder's what is read."""
    model = tiny.model(tiny.LED)
    assert model.spec.context == 12 and model.spec.source_context == 90
    assert tiny.spec(tiny.BART).source_context == 64 and tiny.spec(tiny.GPT2).source_context == 64
    assert tiny.spec(tiny.T5).source_context == tiny.spec(tiny.T5).context
    text = "a dog that ran over the hill and the mat"
    assert len(tiny.tokenizer().encode(text)) > 12
    assert lamina.embed(model, [text], tiny.tokenizer()).shape == (1, 32)
    with pytest.raises(LaminaError, match="this model reads 90: split it"):
        lamina.embed(model, [text * 5], tiny.tokenizer())
    ids = torch.full((1, 90), 97)
    with pytest.warns(UserWarning, match="the context of 12 is full"):
        assert lamina.generate(model, ids, max_new_tokens=20, min_new_tokens=20).shape == (1, 12)
    with pytest.raises(LaminaError, match="it has learned 90 positions"):
        lamina.generate(model, torch.full((1, 91), 97), max_new_tokens=2)


@torch.no_grad()
def test_a_head_of_its_own_is_written_so_that_transformers_opens_it(cases: Cases, tmp_path: Path):  # noqa: F811
    spec = cases("led").ours.spec
    assert spec.head is not None
    model = spec.replace(head=spec.head.replace(tied=False)).build(seed=3).eval()
    lamina.save(model, tmp_path / "out")
    kind = transformers.LEDForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)  # pyright: ignore
    assert not any(info.values()), info
    source, mask, text = texts()
    ours = model(source, mask, decoder_input_ids=text, marked=MARKS).logits
    other = theirs(source, attention_mask=mask, decoder_input_ids=text, global_attention_mask=MARKS.long()).logits
    assert ours is not None and close(ours, other)
    again = lamina.load(tmp_path / "out")
    assert again.spec == model.spec
    lamina.save(again, tmp_path / "again")
    assert same_files(tmp_path / "out", tmp_path / "again") == []


def test_each_field_reaches_its_part():
    said = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "pad_token_id": 7}
    said |= {"encoder_layers": 2, "decoder_layers": 1, "attention_window": [6, 10]}
    spec = family("led").spec(Fields({"model_type": "led", **said}))
    assert spec.embedding.padding == 7 and spec.marks is None and spec.context == 1024
    assert spec.encoder is not None and spec.decoder is not None
    for stack, rows in ((spec.encoder, 16384), (spec.decoder, 1024)):
        assert stack.dropout == 0.2 and stack.position is not None
        assert stack.position.size == rows and stack.position.offset == 0  # pyright: ignore
        inner = [p for _, p in stack.walk() if isinstance(p, AttentionSpec | CrossAttentionSpec | LongformerSpec)]
        assert {part.dropout for part in inner} == {0.3}
        assert {part.dropout for _, part in stack.walk() if isinstance(part, FeedForwardSpec)} == {0.4}
    assert [part.window for _, part in spec.walk() if isinstance(part, LongformerSpec)] == [3, 5]
    theirs = transformers.LEDConfig()
    usual = family("led").spec(Fields({"model_type": "led"}))
    assert len(usual.encoder.layers) == theirs.encoder_layers and usual.width == theirs.d_model  # pyright: ignore
    assert {part.window for _, part in usual.walk() if isinstance(part, LongformerSpec)} == {256}
    assert usual.embedding.vocabulary == theirs.vocab_size and usual.special.decoder_start == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"attention_window": 7}, "attention_window is 7; it must be an even number"),
        ({"attention_window": [4, 4]}, "or one for each of 12 layers"),
        ({"architectures": ["LEDForSequenceClassification"]}, "known here: LED with ForConditionalGeneration, ForQ"),
        ({"architectures": ["LEDForCausalLM"]}, "known here: LED with ForConditionalGeneration"),
    ],
)
def test_what_is_not_built_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("led").spec(Fields({"model_type": "led", **fields}))


def test_the_labels_of_old_files_are_not_taken_for_those_of_bart():
    """LEDForSequenceClassification is gone from transformers, so nothing could say that its numbers are right."""
    names = frozenset({"classification_head.dense.weight", "led.shared.weight"})
    assert family("led").spec(Fields({"model_type": "led"}, names)).labels is None  # and its tensors are unexpected


def test_what_the_layout_cannot_say_is_refused_by_name(cases: Cases, tmp_path: Path):  # noqa: F811
    case = cases("led")
    spec = case.ours.spec
    for changed, message in (
        (spec.replace(embedding=spec.embedding.replace(scale="root")), "embedding.scale is not 'none'"),
        (spec.replace(encoder=None), "encoder is None"),
        (edit(spec, LongformerSpec, lambda path, part: part.replace(causal=True)), "lacks biases or is causal"),
        (spec.replace(head=None, labels=None, pooler=None, marks=None), None),
    ):
        if message is None:
            assert exportable(changed, case.ours.origin.family)[1]["architectures"] == ["LEDModel"]
            continue
        with pytest.raises(CheckpointError, match=message):
            family("led").config(changed)  # pyright: ignore
    said = json.loads((case.source / "config.json").read_text())
    assert said["attention_window"] == [4, 8, 4] and family("led").config(spec)["attention_window"] == [4, 8, 4]  # pyright: ignore
