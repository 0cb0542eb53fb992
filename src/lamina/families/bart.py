"""BART (arXiv:1910.13461): post-norm encoder and decoder, learned positions after two rows, one table for all."""

from __future__ import annotations

from typing import Any

from lamina.families.family import ACTIVATIONS, Family, Fields, activation_name, parts, special_config, the
from lamina.layers import (
    AttentionSpec,
    CrossAttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything
from lamina.weights.rules import OneRow, Rule, Shape

OFFSET = 2  # rows of the position table before position 0: fairseq counts from the id of padding, which is 1
BIAS = "final_logits_bias"
KINDS = ("ForConditionalGeneration", "ForCausalLM", "ForQuestionAnswering", "Model")


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the tensors where there are any -> spec."""
    for name, value in OLD.items():
        fields.must(name, value)
    width, positions = fields.count("d_model", 1024), fields.count("max_position_embeddings", 1024)
    rate, norm = fields.number("dropout", 0.1), LayerNormSpec()
    special = fields.special(0, 2, 1).replace(decoder_start=fields.token("decoder_start_token_id", 2))

    def stack(side: str) -> StackSpec:
        heads, decoder = fields.count(f"{side}_attention_heads", 16), side == "decoder"
        if width % heads:
            raise ValueError(f"{fields.where}: d_model={width} is not a multiple of {side}_attention_heads={heads}")
        shape = {"heads": heads, "key_heads": heads, "head_dim": width // heads, "bias": "all"}
        shape |= {"dropout": fields.number("attention_dropout", 0.0)}
        ops = {
            "attention": AttentionSpec(**shape, pattern=Causal() if decoder else Everything()),
            "cross": CrossAttentionSpec(**shape) if decoder else None,
            "feedforward": FeedForwardSpec(
                hidden=fields.count(f"{side}_ffn_dim", 4096),
                act=fields.choice("activation_function", ACTIVATIONS, "gelu"),
                gated=False,
                bias=True,
                dropout=fields.number("activation_dropout", 0.0),
            ),
        }
        steps = tuple(StepSpec(name=name, op=op, after=norm, dropout=rate) for name, op in ops.items() if op)
        return StackSpec(
            layers=(LayerSpec(steps=steps),) * fields.layers(f"{side}_layers", 12),
            position=LearnedPositionSpec(size=positions, offset=OFFSET),
            input_norm=norm,
            dropout=rate,
        )

    encodes, kind = _parts(fields)
    generates = kind in ("ForConditionalGeneration", "ForCausalLM")
    head = LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True), bias=fields.filled(BIAS))
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(
            vocabulary=fields.count("vocab_size", 50265),
            scale="root" if fields.flag("scale_embedding", False) else "none",
            padding=special.pad,
        ),
        encoder=stack("encoder") if encodes else None,
        decoder=stack("decoder"),
        head=head if generates else None,
        labels=LabelHeadSpec(labels=2, task="span") if kind == "ForQuestionAnswering" else None,
        context=positions,
        special=special,
    )


OLD: dict[str, Any] = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": OFFSET,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
"""Fields that say what BART is in files of 2020, or that it leaves out whole layers in training, which is not built."""


def _parts(fields: Fields) -> tuple[bool, str]:
    """Whether there is an encoder, and what is on the decoder: as the tensors say, else the architecture."""
    said = fields.config.get("architectures") or ["BartForConditionalGeneration"]
    kind = str(said[0]).removeprefix("Bart")
    if kind not in KINDS:
        raise ValueError(f"{fields.where}: architectures is {said}; known here: Bart with {', '.join(KINDS)}")
    if fields.names is None:
        return kind != "ForCausalLM", kind
    encodes = any(name.startswith("model.encoder.layers.") for name in fields.names)
    if "qa_outputs.weight" in fields.names:
        return encodes, "ForQuestionAnswering"
    if BIAS in fields.names or "lm_head.weight" in fields.names:
        kind = "ForConditionalGeneration"
    return encodes, kind


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    decoder = parts(spec)
    kind = "ForQuestionAnswering" if spec.labels is not None else "Model"
    if spec.head is not None:
        kind = "ForCausalLM" if spec.encoder is None else "ForConditionalGeneration"
    said: dict[str, Any] = {
        "model_type": "bart",
        "architectures": [f"Bart{kind}"],
        "is_encoder_decoder": spec.encoder is not None,
        "is_decoder": spec.encoder is None,
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "scale_embedding": spec.embedding.scale == "root",
        "dropout": decoder[0].dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }
    for side, found in (("encoder", parts(spec, "encoder") if spec.encoder else decoder), ("decoder", decoder)):
        stack, attention, feedforward = found
        said |= {
            f"{side}_layers": len(stack.layers),
            f"{side}_attention_heads": attention.heads,
            f"{side}_ffn_dim": feedforward.hidden,
            "max_position_embeddings": the(LearnedPositionSpec, stack.position, f"{side}.position").size,
            "activation_function": activation_name(feedforward.act),
            "attention_dropout": attention.dropout,
            "activation_dropout": feedforward.dropout,
        }
    return said


def _stack(side: str) -> tuple[Rule, ...]:
    ours, theirs = f"{side}.layers.{{i}}.", f"model.{side}.layers.{{i}}."
    steps = (("attention", "self_attn"), ("cross", "encoder_attn"))[: 1 if side == "encoder" else 2]
    projections = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
    pairs = [(f"{ours}{n}.op.{p}", f"{theirs}{called}.{t}") for n, called in steps for p, t in projections]
    pairs += [(f"{ours}{n}.after", f"{theirs}{called}_layer_norm") for n, called in steps]
    pairs += [
        (f"{ours}feedforward.op.up", f"{theirs}fc1"),
        (f"{ours}feedforward.op.down", f"{theirs}fc2"),
        (f"{ours}feedforward.after", f"{theirs}final_layer_norm"),
        (f"{side}.input_norm", f"model.{side}.layernorm_embedding"),
    ]
    return (
        Rule(f"{side}.position.weight", f"model.{side}.embed_positions.weight"),
        *(Rule(f"{a}.{p}", f"{b}.{p}") for a, b in pairs for p in ("weight", "bias")),
    )


WEIGHTS = (
    *_stack("encoder"),
    *_stack("decoder"),
    Rule("head.weight", "lm_head.weight"),
    Rule("head.bias", BIAS, OneRow()),
    *(Rule(f"labels.dense.{p}", f"qa_outputs.{p}") for p in ("weight", "bias")),
)


def table(spec: ModelSpec) -> tuple[Rule, ...]:
    """The name of the embedding: a decoder alone holds it under its own."""
    return (Rule("embedding.weight", f"model.{'decoder.embed_tokens' if spec.encoder is None else 'shared'}.weight"),)


def unused(spec: ModelSpec) -> dict[str, Shape]:
    """The bias of the logits that every BART has and that nothing trains. One that is not zero is the head's."""
    bare = spec.encoder is not None and spec.head is not None and not spec.head.bias
    return {BIAS: (1, spec.embedding.vocabulary)} if bare else {}


def _size(layers: int, width: int, heads: int) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {"d_model": width} | {
        f"{side}_{name}": value
        for side in sides
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }


BART = Family(
    model_type="bart",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    heads=table,
    base="model.",
    aliases={"lm_head.weight": "model.shared.weight"},
    copies={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
    ignored=(BIAS, "model.encoder.version", "model.decoder.version"),
    zeros=unused,
    sizes={"bart/base": _size(6, 768, 12), "bart/large": _size(12, 1024, 16)},
)
