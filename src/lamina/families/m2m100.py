"""M2M-100 (arXiv:2010.11125) and the dense models of NLLB-200 (arXiv:2207.04672): BART with norms before each step and
after each stack, and fairseq's sinusoids, which count from one beyond the id of padding."""

from __future__ import annotations

from typing import Any

from lamina.errors import CheckpointError
from lamina.families import bart
from lamina.families.family import Family, Fields, initial_config, special_config, the
from lamina.layers import EmbeddingSpec, LanguageHeadSpec, LayerNormSpec, SinusoidalPositionSpec, StackSpec
from lamina.model import ModelSpec
from lamina.weights.rules import Rule, pairs

KINDS = ("ForConditionalGeneration", "Model")


def spec(fields: Fields, named: str = "M2M100") -> ModelSpec:
    """config.json -> spec. `named`: how the names of the classes of transformers begin."""
    said = fields.config.get("architectures") or [f"{named}{KINDS[0]}"]
    kind = str(said[0]).removeprefix(named)
    if kind not in KINDS:
        raise CheckpointError(f"{fields.where}: architectures is {said}; known here: {named} with {', '.join(KINDS)}")
    fields = fields.over(DEFAULTS)
    special = fields.special(0, 2, 1)
    if special.pad is None:
        raise CheckpointError(f"{fields.where}: pad_token_id is null; positions count from it")
    position = SinusoidalPositionSpec(order="halves", offset=special.pad + 1)

    def stack(side: str) -> StackSpec:
        return StackSpec(
            layers=bart.layers(fields, side, "pre"),
            position=position,
            dropout=fields.number("dropout"),
            layer_dropout=fields.number(f"{side}_layerdrop"),
            norm=LayerNormSpec(),
        )

    return ModelSpec(
        width=fields.count("d_model"),
        embedding=EmbeddingSpec(
            vocabulary=fields.count("vocab_size"),
            scale="root" if fields.flag("scale_embedding", True) else "none",
            padding=special.pad,
        ),
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        head=LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)) if kind == KINDS[0] else None,
        context=fields.count("max_position_embeddings"),
        special=special.replace(decoder_start=fields.token("decoder_start_token_id", 2)),
        initial=fields.initial("init_std"),
    )


DEFAULTS = (
    bart.sizes(12, 1024, 16)
    | bart.RATES
    | {
        "vocab_size": 128112,
        "max_position_embeddings": 1024,
        "activation_function": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "encoder_layerdrop": 0.05,
        "decoder_layerdrop": 0.05,
    }
)


def config(spec: ModelSpec, named: str = "M2M100") -> dict[str, Any]:
    """spec -> config.json."""
    said: dict[str, Any] = {}
    for side in bart.SIDES:
        stack, told = bart.side_config(spec, side, side)
        said |= told | {"dropout": stack.dropout}
        the(SinusoidalPositionSpec, stack.position, f"{side}.position")
    return {
        "model_type": "m2m_100",
        "architectures": [f"{named}{KINDS[spec.head is None]}"],
        "is_encoder_decoder": True,
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "max_position_embeddings": spec.context,
        "scale_embedding": spec.embedding.scale == "root",
        **said,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec, "init_std"),
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }


ENDS = (
    Rule("embedding.weight", "model.shared.weight"),
    *(rule for side in bart.SIDES for rule in pairs(f"{side}.", f"model.{side}.", {"norm": "layer_norm"})),
    Rule("head.weight", "lm_head.weight"),
)
"""The names of what stands around the layers."""
ALIASES = {"lm_head.weight": "model.shared.weight"}
COPIES = {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in bart.SIDES}
IGNORED = tuple(f"model.{side}.{name}" for side in bart.SIDES for name in ("embed_positions.weights", "version"))
"""Sinusoids that files of before 2023 hold, and a number of fairseq's."""
NLLB = {"vocab_size": 256206, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def size(layers: int, width: int, hidden: int) -> dict[str, Any]:
    """A published size; all have 16 heads."""
    return bart.sizes(layers, width, 16) | {f"{side}_ffn_dim": hidden for side in bart.SIDES}


M2M100 = Family(
    model_type="m2m_100",
    spec=spec,
    config=config,
    weights=(*ENDS, *(rule for side in bart.SIDES for rule in bart.rules(side, "pre"))),
    base="model.",
    aliases=ALIASES,
    copies=COPIES,
    ignored=IGNORED,
    sizes={
        "m2m100/418m": size(12, 1024, 4096),
        "m2m100/1.2b": size(24, 1024, 8192),
        "nllb/600m-distilled": size(12, 1024, 4096) | NLLB,
        "nllb/1.3b": size(24, 1024, 8192) | NLLB,
        "nllb/3.3b": size(24, 2048, 8192) | NLLB,
    },
)
