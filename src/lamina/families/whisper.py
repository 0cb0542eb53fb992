"""Whisper (arXiv:2212.04356): a pre-norm encoder over the frames of a spectrogram, and a decoder that writes what is
said. Keys have no bias; the encoder's positions are sinusoids that the file stores."""

from __future__ import annotations

from typing import Any

from lamina.families import bart
from lamina.families.family import Family, Fields, initial_config, special_config, the
from lamina.layers import (
    ConvolutionStemSpec,
    EmbeddingSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Rule, pairs

KINDS = ("ForConditionalGeneration", "Model")


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    for name in ("scale_embedding", "apply_spec_augment"):
        fields.must(name, False)
    said = fields.config.get("architectures") or ["WhisperForConditionalGeneration"]
    kind = str(said[0]).removeprefix("Whisper")
    if kind not in KINDS:
        raise ValueError(f"{fields.where}: architectures is {said}; known here: Whisper with {', '.join(KINDS)}")
    fields = fields.over(DEFAULTS)
    special, context = fields.special(50256, 50256, 50256), fields.count("max_target_positions")

    def stack(side: str, rows: int) -> StackSpec:
        return StackSpec(
            layers=bart.layers(fields, side, "pre", bias="qvo"),
            position=LearnedPositionSpec(size=rows),
            dropout=fields.number("dropout"),
            layer_dropout=fields.number(f"{side}_layerdrop"),
            norm=LayerNormSpec(),
        )

    return ModelSpec(
        width=fields.count("d_model"),
        stem=ConvolutionStemSpec(bins=fields.count("num_mel_bins")),
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size"), padding=special.pad),
        encoder=stack("encoder", fields.count("max_source_positions")),
        decoder=stack("decoder", context),
        head=LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)) if kind == KINDS[0] else None,
        context=context,
        special=special.replace(decoder_start=fields.token("decoder_start_token_id", 50257)),
        initial=fields.initial("init_std"),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stem, said = the(ConvolutionStemSpec, spec.stem, "stem"), {}
    for side, rows in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        stack, told = bart.side_config(spec, side, side)
        said |= told | {"dropout": stack.dropout}
        said[rows] = the(LearnedPositionSpec, stack.position, f"{side}.position").size
    return {
        "model_type": "whisper",
        "architectures": [f"Whisper{KINDS[spec.head is None]}"],
        "is_encoder_decoder": True,
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "num_mel_bins": stem.bins,
        **said,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec, "init_std"),
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }


WEIGHTS = (
    Rule("embedding.weight", "model.decoder.embed_tokens.weight"),
    *pairs("stem.convolutions.", "model.encoder.", {"0": "conv1", "1": "conv2"}),
    *(rule for side in bart.SIDES for rule in bart.rules(side, "pre")),
    *(rule for side in bart.SIDES for rule in pairs(f"{side}.", f"model.{side}.", {"norm": "layer_norm"})),
    Rule("head.weight", "proj_out.weight"),
)
DEFAULTS = (
    bart.sizes(4, 384, 6)
    | bart.RATES
    | {
        "vocab_size": 51865,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "activation_function": "gelu",
        "dropout": 0.0,
    }
)
ENGLISH = {"vocab_size": 51864, "decoder_start_token_id": 50257}
OTHERS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50257) | {"decoder_start_token_id": 50258}
SHAPES = {"tiny": (4, 384, 6), "base": (6, 512, 8), "small": (12, 768, 12), "medium": (24, 1024, 16)}
LARGE, THIRD = bart.sizes(32, 1280, 20) | OTHERS, {"vocab_size": 51866, "num_mel_bins": 128}

WHISPER = Family(
    model_type="whisper",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    base="model.",
    aliases={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    sizes={
        **{f"whisper/{name}": bart.sizes(*shape) | OTHERS for name, shape in SHAPES.items()},
        **{f"whisper/{name}.en": bart.sizes(*shape) | ENGLISH for name, shape in SHAPES.items()},
        "whisper/large-v2": LARGE,
        "whisper/large-v3": LARGE | THIRD,
        "whisper/large-v3-turbo": LARGE | THIRD | {"decoder_layers": 4},
    },
)
