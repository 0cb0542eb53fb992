"""The stem of a speech encoder equals sums written out, and a row that is padded is as alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    ConvolutionStemSpec,
    CrossAttentionSpec,
    LayerSpec,
    LearnedPositionSpec,
    RMSNormSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Everything
from tests import small

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def naive(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """(bins, frames) -> (width, T): each place looks at as many frames on either side, and at zeros beyond the ends."""
    half = weight.shape[2] // 2
    places = []
    for at in range(0, x.shape[1], stride):
        total = bias.clone()
        for k in range(-half, half + 1):
            if 0 <= at + k < x.shape[1]:
                total = total + weight[:, :, k + half] @ x[:, at + k]
        places.append(total)
    return torch.stack(places, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"strides": (2, 3, 1), "kernel": 5, "act": "relu"}, {"kernel": 1}], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 7, 12])
def test_it_is_convolutions_one_after_the_other(fields: dict, frames: int):
    spec = ConvolutionStemSpec(bins=4, **fields)
    stem = spec.build(6).double()
    small.shake(stem)
    features = torch.randn(3, 4, frames, dtype=torch.float64)
    act = torch.relu if fields.get("act") == "relu" else lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))
    rows = []
    for x in features:
        for convolution, stride in zip(stem.convolutions, spec.strides, strict=True):
            x = act(naive(x, convolution.weight, convolution.bias, stride))
        rows.append(x.T)
    got, mask = stem(features)
    assert mask is None and got.shape[1] == stem.length(frames)
    torch.testing.assert_close(got, torch.stack(rows), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (3, 1)])
def test_padding_on_the_right_changes_nothing(strides: tuple[int, ...]):
    stem = ConvolutionStemSpec(bins=4, strides=strides).build(6).double()
    small.shake(stem)
    features, lengths = torch.randn(4, 4, 11, dtype=torch.float64), (11, 7, 2, 1)
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    got, seen = stem(features, mask)
    assert seen is not None and seen.sum(dim=1).tolist() == [stem.length(length) for length in lengths]
    for i, length in enumerate(lengths):
        alone, _ = stem(features[i : i + 1, :, :length])
        torch.testing.assert_close(got[i : i + 1, : alone.shape[1]], alone, **CLOSE)
    assert stem(features, torch.ones(4, 11))[1] is None


def heard(**fields: object) -> ModelSpec:
    """A tiny model that reads 5 bins a frame, and writes."""
    decoder = small.decoder([Causal()])
    stack = decoder.decoder
    assert stack is not None
    cross = StepSpec(name="cross", op=CrossAttentionSpec(heads=2, key_heads=2, head_dim=4), pre=RMSNormSpec())
    reads = StepSpec(name="attention", op=small.attention(pattern=Everything()), pre=RMSNormSpec())
    encoder = StackSpec(layers=(LayerSpec(steps=(reads,)),), position=LearnedPositionSpec(size=8), **fields)
    first, second = stack.layers[0].steps
    written = stack.replace(layers=(LayerSpec(steps=(first, cross, second)),))
    return decoder.replace(stem=ConvolutionStemSpec(bins=5), encoder=encoder, decoder=written)


@pytest.fixture(scope="module")
def model() -> Model:
    return small.build(heard())


@torch.no_grad()
def test_a_model_reads_features_whole_padded_and_from_its_memory(model: Model):
    ids, features = small.ids(3, 6), torch.randn(3, 5, 13, dtype=torch.float64)
    lengths = (13, 8, 3)
    mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
    whole = model(input_features=features, attention_mask=mask, decoder_input_ids=ids)
    for i, length in enumerate(lengths):
        alone = model(input_features=features[i : i + 1, :, :length], decoder_input_ids=ids[i : i + 1])
        torch.testing.assert_close(whole.logits[i : i + 1], alone.logits, **CLOSE)
    memory = model.encode(input_features=features, attention_mask=mask)
    torch.testing.assert_close(memory, whole.encoder_output, **CLOSE)
    given = model(encoder_output=memory, attention_mask=mask[:, ::2], decoder_input_ids=ids)
    torch.testing.assert_close(given.logits, whole.logits, **CLOSE)
    cache = model.new_cache(batch=3)
    parts = [
        model(input_features=features, attention_mask=mask, decoder_input_ids=part, cache=cache).logits
        for part in ids.split(2, dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **CLOSE)
    for another in (features[:, :, :9], features.flip(0)):
        with pytest.raises(LaminaError, match="input_features is not the source that this cache holds"):
            model(input_features=another, decoder_input_ids=ids[:, :1], cache=cache)
    held = model.new_cache(
        batch=3
    )  # has seen what the encoder made of a source, and of the source knows the size alone
    model(encoder_output=memory, decoder_input_ids=ids[:, :1], cache=held)
    with pytest.raises(LaminaError, match="input_features is not the source that this cache holds"):
        model(input_features=features[:, :, :9], decoder_input_ids=ids[:, :1], cache=held)
    with pytest.raises(LaminaError, match="input_features is not the source that this cache holds"):
        model(input_features=features[0], decoder_input_ids=ids[:, :1], cache=held)
    model(input_features=features, decoder_input_ids=ids[:, :1], cache=held)


@torch.no_grad()
def test_an_encoder_by_itself_hears_too():
    both = heard(input_width=6)
    alone = ModelSpec(width=16, embedding=both.embedding, stem=both.stem, encoder=both.encoder)
    one, other = small.build(alone), small.build(both)
    assert one.stem.convolutions[1].weight.shape == (6, 6, 3)  # brought to the width of the model after it
    assert one.embedding.weight.shape == other.embedding.weight.shape == (40, 16)
    other.load_state_dict(one.state_dict(), strict=False)
    features = torch.randn(2, 5, 13, dtype=torch.float64)
    torch.testing.assert_close(one(input_features=features).hidden, other.encode(input_features=features), **CLOSE)
    with pytest.raises(UnsupportedError, match="marked is not for input_features"):
        one(input_features=features, marked=torch.ones(2, 7))
    with pytest.raises(UnsupportedError, match="an encoder reads its whole input at once"):
        one(input_features=features, cache=other.new_cache(batch=2))
    with pytest.raises(LaminaError, match="input_features is missing"):
        one()


def test_what_cannot_be_read_is_refused(model: Model):
    features, ids = torch.randn(2, 5, 13, dtype=torch.float64), small.ids(2, 4)

    def refused(match: str, kind: type[Exception] = LaminaError, **given: Tensor) -> None:
        with pytest.raises(kind, match=match):
            model(**{"decoder_input_ids": ids, **given})

    refused(r"input_features has shape \(2, 13, 5\); expected .* with 5 bins", input_features=features.mT)
    refused("at least one frame", input_features=features[:, :, :0])
    refused("input_features has shape", input_features=features[0])
    refused(r"attention_mask has shape \(2, 7\); input_features has \(2, 13\)", input_features=features,
            attention_mask=torch.ones(2, 7))  # fmt: skip
    left = torch.ones(2, 13)
    left[1, :2] = 0
    refused("padded on the right only", input_features=features, attention_mask=left)
    for name in ("position_ids", "document_ids"):
        refused(f"{name} is not for input_features", UnsupportedError, input_features=features,
                **{name: torch.zeros(2, 7).long()})  # fmt: skip
    refused("input_ids is for models without a stem", UnsupportedError, input_ids=ids)
    memory = model.encode(input_features=features)
    refused(r"of \(2, 6\) tokens, input_features of \(2, 7\)", input_features=features, encoder_output=memory[:, :6])
    refused("needs input_features or encoder_output")
    refused("position 8 is beyond", input_features=torch.randn(2, 5, 17, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="for models with a stem"):
        small.build(small.decoder([Causal()]))(input_features=features)
    with pytest.raises(LaminaError, match="stem is for an encoder"):
        small.decoder([Causal()]).replace(stem=ConvolutionStemSpec(bins=5))
    for wrong in ({"bins": 0}, {"strides": ()}, {"strides": (1, 0)}, {"kernel": 4}):
        with pytest.raises(LaminaError, match="the kernel odd"):
            ConvolutionStemSpec(**{"bins": 5, **wrong})


def test_a_fresh_stem_has_values_from_the_seed():
    one, other = (heard().build(seed=seed).stem for seed in (1, 2))
    for convolution, different in zip(one.convolutions, other.convolutions, strict=True):
        assert not convolution.bias.any() and 0.01 < float(convolution.weight.detach().std()) < 0.03
        assert not torch.equal(convolution.weight, different.weight)


def test_its_cost_is_that_of_the_frames_that_it_has_positions_for():
    found = lamina.account(heard(), context=3)
    stem = next(row for row in found.rows if row.name == "stem")
    assert stem.parameters == 3 * 5 * 16 + 16 + 3 * 16 * 16 + 16
    assert stem.flops == 2 * (16 * 3 * 5 * 16 + 8 * 3 * 16 * 16)  # 16 frames, then 8
    assert "5 bins a frame" in stem.what
