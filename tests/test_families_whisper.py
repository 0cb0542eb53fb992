"""Whisper: what its configuration says, and what it cannot say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.errors import CheckpointError, LaminaError
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, CrossAttentionSpec, FeedForwardSpec, SinusoidalPositionSpec
from lamina.model import ModelSpec
from tests.families import Case, row


def read(**said: Any) -> ModelSpec:
    return family("whisper").spec(Fields(said))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"apply_spec_augment": True}, "apply_spec_augment is True"),
        ({"architectures": ["WhisperForAudioClassification"]}, "known here: Whisper with ForConditionalGeneration"),
        ({"decoder_attention_heads": 7}, "d_model=384 is not a multiple of decoder_attention_heads=7"),
        ({"num_mel_bins": 0}, "num_mel_bins is 0"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(said: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read(**said)


def test_each_field_reaches_its_part():
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 3, "encoder_ffn_dim": 5, "decoder_ffn_dim": 7}
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "max_source_positions": 9, "max_target_positions": 11}
    ids = {"pad_token_id": 2, "decoder_start_token_id": 4, "eos_token_id": 6, "vocab_size": 50}
    spec = read(**rates, **heads, **sizes, **ids, d_model=24, num_mel_bins=13)
    assert spec.stem is not None and spec.encoder is not None and spec.decoder is not None and spec.head is not None
    assert (spec.stem.bins, spec.stem.strides, spec.stem.kernel, spec.stem.act) == (13, (1, 2), 3, "gelu")
    assert (spec.context, spec.special.decoder_start, spec.special.end, spec.embedding.padding) == (11, 4, (6,), 2)
    for stack, layers, heads, hidden, size in ((spec.encoder, 1, 2, 5, 9), (spec.decoder, 2, 3, 7, 11)):
        assert (len(stack.layers), stack.dropout, stack.position.size) == (layers, 0.1, size)  # pyright: ignore
        assert stack.norm is not None and all(step.dropout == 0.1 and step.pre for step in stack.layers[0].steps)
        for _, part in stack.walk():
            if isinstance(part, AttentionSpec | CrossAttentionSpec):
                assert (part.heads, part.head_dim, part.bias, part.dropout) == (heads, 24 // heads, "qvo", 0.2)
            if isinstance(part, FeedForwardSpec):
                assert (part.hidden, part.act, part.dropout) == (hidden, "gelu", 0.3)
    assert family("whisper").spec(Fields(family("whisper").config(spec))) == spec
    assert read(architectures=["WhisperModel"]).head is None
    untied = read(tie_word_embeddings=False)
    assert untied.head is not None and not untied.head.tied
    assert family("whisper").spec(Fields(family("whisper").config(untied))) == untied


def test_what_it_has_no_word_for_is_refused():
    spec = read()
    assert spec.encoder is not None
    moving = spec.encoder.replace(position=SinusoidalPositionSpec())
    for wrong, message in (({"stem": None}, "stem is None"), ({"encoder": moving}, "encoder.position is a Sinus")):
        with pytest.raises(CheckpointError, match=message):
            family("whisper").config(spec.replace(**wrong))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(row("whisper"), tmp_path_factory.mktemp("whisper"))


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("held", [{}, {"suppress_tokens": [7, 78, 86], "begin_suppress_tokens": [3, 50256]}])
def test_what_is_written_is_what_transformers_writes(case: Case, beams: int, held: dict[str, list[int]]):
    """By transformers' plain loop; its own of Whisper cuts long recordings and falls back to sampling."""
    features, start = case.sources[:2], torch.tensor([[1, 9], [1, 9]])
    model = copy.deepcopy(case.theirs)
    more = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 96}
    theirs = transformers.GenerationMixin.generate(
        model, input_features=features, decoder_input_ids=start, early_stopping=beams > 1, **more, **held
    )
    ours = copy.deepcopy(case.ours)
    ours.origin.generation = {**ours.origin.generation, "eos_token_id": 96, "pad_token_id": 0, **held}
    got = lamina.generate(
        ours,
        input_features=features,
        decoder_input_ids=start,
        max_new_tokens=12,
        beams=beams,
        early_stopping=beams > 1,
    )
    assert torch.equal(got, theirs)
    free = lamina.generate(case.ours, input_features=features, decoder_input_ids=start, max_new_tokens=12, beams=beams)
    assert not held or not torch.equal(got, free)  # they were wanted
    if held:
        assert not torch.isin(got[:, 2:], torch.tensor(held["suppress_tokens"])).any()


@torch.no_grad()
def test_frames_that_are_padded_change_nothing_of_what_is_written(case: Case):
    features, mask = case.sources.clone(), torch.ones(4, 22, dtype=torch.int64)
    for i, length in enumerate((22, 13, 8, 3)):
        mask[i, length:] = 0
    got = lamina.generate(case.ours, input_features=features, attention_mask=mask, max_new_tokens=8)
    for i, length in enumerate((22, 13, 8, 3)):
        alone = lamina.generate(case.ours, input_features=features[i : i + 1, :, :length], max_new_tokens=8)
        assert torch.equal(got[i : i + 1, : alone.shape[1]], alone)


def test_what_generation_cannot_read_is_refused(case: Case):
    with pytest.raises(LaminaError, match="input_features is missing"):
        lamina.generate(case.ours, max_new_tokens=2)
    with pytest.raises(LaminaError, match="input_ids is for models without a stem"):
        lamina.generate(case.ours, case.ids, max_new_tokens=2)
    ours = copy.deepcopy(case.ours)
    for wrong in ([-1], "all", ["5"]):
        ours.origin.generation = {"suppress_tokens": wrong}
        with pytest.raises(LaminaError, match="suppress_tokens is .* it must be a list"):
            lamina.generate(ours, input_features=case.sources, max_new_tokens=2)
