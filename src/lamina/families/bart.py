"""BART (arXiv:1910.13461): post-norm encoder and decoder, learned positions after two rows, one table for all."""

from __future__ import annotations

from typing import Any

from lamina.families.bert import labels
from lamina.families.family import ACTIVATIONS, Family, Fields, activation_name, need, parts, special_config, the
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
    PoolerSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything
from lamina.weights.rules import OneRow, Rule, Shape, pairs

OFFSET = 2  # rows of the position table before position 0: fairseq counts from the id of padding, which is 1
BIAS = "final_logits_bias"
KINDS = ("ForConditionalGeneration", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "Model")


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the tensors where there are any -> spec."""
    for name, value in OLD.items():
        fields.must(name, value)
    fields = fields.over(DEFAULTS)
    positions, norm = fields.count("max_position_embeddings"), LayerNormSpec()
    special = fields.special(0, 2, 1).replace(decoder_start=fields.token("decoder_start_token_id", 2))

    def stack(side: str) -> StackSpec:
        return StackSpec(
            layers=layers(fields, side, "after"),
            position=LearnedPositionSpec(size=positions, offset=OFFSET),
            input_norm=norm,
            dropout=fields.number("dropout"),
            layer_dropout=fields.number(f"{side}_layerdrop"),
        )

    encodes, kind = _parts(fields)
    generates = kind in ("ForConditionalGeneration", "ForCausalLM")
    rate, classifies = fields.number("classifier_dropout"), kind == "ForSequenceClassification"
    label = {"ForQuestionAnswering": LabelHeadSpec(labels=2, task="span")}
    if classifies:
        label[kind] = labels(fields, "sequence", rate)
    head = LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True), bias=fields.filled(BIAS))
    return ModelSpec(
        width=fields.count("d_model"),
        embedding=EmbeddingSpec(
            vocabulary=fields.count("vocab_size", 50265),
            scale="root" if fields.flag("scale_embedding", False) else "none",
            padding=special.pad,
        ),
        encoder=stack("encoder") if encodes else None,
        decoder=stack("decoder"),
        head=head if generates else None,
        pooler=PoolerSpec(token="last", dropout=rate) if classifies else None,
        labels=label.get(kind),
        context=positions,
        special=special,
    )


def layers(fields: Fields, side: str, place: str, bias: str = "all") -> tuple[LayerSpec, ...]:
    """The layers of one side, of Whisper too, with a LayerNorm before each step (`place` "pre") or after it ("after").

    Every field has to be there: the families have different defaults.
    """
    width, heads, decoder = fields.count("d_model"), fields.count(f"{side}_attention_heads"), side == "decoder"
    if width % heads:
        raise ValueError(f"{fields.where}: d_model={width} is not a multiple of {side}_attention_heads={heads}")
    shape: dict[str, Any] = {"heads": heads, "key_heads": heads, "head_dim": width // heads, "bias": bias}
    shape |= {"dropout": fields.number("attention_dropout")}
    ops = {
        "attention": AttentionSpec(**shape, pattern=Causal() if decoder else Everything()),
        "cross": CrossAttentionSpec(**shape) if decoder else None,
        "feedforward": FeedForwardSpec(
            hidden=fields.count(f"{side}_ffn_dim"),
            act=fields.choice("activation_function", ACTIVATIONS),
            gated=False,
            bias=True,
            dropout=fields.number("activation_dropout"),
        ),
    }
    around: dict[str, Any] = {place: LayerNormSpec(), "dropout": fields.number("dropout")}
    steps = tuple(StepSpec(name=name, op=op, **around) for name, op in ops.items() if op)
    return (LayerSpec(steps=steps),) * fields.layers(f"{side}_layers")


def sizes(layers: int, width: int, heads: int) -> dict[str, Any]:
    """A published size, as configurations have it."""
    one = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    return {"d_model": width} | {f"{side}_{name}": value for side in SIDES for name, value in one.items()}


SIDES = ("encoder", "decoder")
RATES = {"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
DEFAULTS = (
    sizes(12, 1024, 16)
    | RATES
    | {
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "dropout": 0.1,
        "classifier_dropout": 0.0,
    }
)
OLD: dict[str, Any] = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": OFFSET,
}
"""Fields that say what BART is in files of 2020."""


def _parts(fields: Fields) -> tuple[bool, str]:
    """Whether there is an encoder, and what is on the decoder: as the tensors say, else the architecture."""
    said = fields.config.get("architectures") or ["BartForConditionalGeneration"]
    kind = str(said[0]).removeprefix("Bart")
    if kind not in KINDS:
        raise ValueError(f"{fields.where}: architectures is {said}; known here: Bart with {', '.join(KINDS)}")
    if fields.names is None:
        return kind != "ForCausalLM", kind
    encodes = any(name.startswith("model.encoder.layers.") for name in fields.names)
    for name, one in (("qa_outputs.weight", KINDS[3]), ("classification_head.dense.weight", KINDS[2])):
        if name in fields.names:
            return encodes, one
    if BIAS in fields.names or "lm_head.weight" in fields.names:
        kind = "ForConditionalGeneration"
    return encodes, kind


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    tasks = {None: "Model", "sequence": "ForSequenceClassification", "span": "ForQuestionAnswering"}
    task = None if spec.labels is None else spec.labels.task
    need(task in tasks, "labels", f"are of a {task}")
    kind = tasks[task]
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
        "dropout": parts(spec)[0].dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }
    if spec.labels is not None and spec.labels.task == "sequence":
        count = spec.labels.labels
        said |= {"classifier_dropout": spec.labels.dropout, "num_labels": count}
    for side in SIDES:
        stack, told = side_config(spec, side if spec.encoder is not None else "decoder", side)
        said |= told
        said["max_position_embeddings"] = the(LearnedPositionSpec, stack.position, f"{side}.position").size
    return said


def side_config(spec: ModelSpec, side: str, called: str) -> tuple[StackSpec, dict[str, Any]]:
    """The stack of one side, and what config.json says of its layers as of the side `called`."""
    stack, attention, feedforward = parts(spec, side)
    return stack, {
        f"{called}_layers": len(stack.layers),
        f"{called}_attention_heads": attention.heads,
        f"{called}_ffn_dim": feedforward.hidden,
        "activation_function": activation_name(feedforward.act),
        "attention_dropout": attention.dropout,
        "activation_dropout": feedforward.dropout,
        f"{called}_layerdrop": stack.layer_dropout,
    }


def rules(
    side: str, place: str, cross: str = "encoder_attn", dense: str = "", norm: str = "final_layer_norm"
) -> tuple[Rule, ...]:
    """The names of the layers of one side, whose norms stand as `layers` has them, and of its positions.

    `cross`, `dense` and `norm`: what cross-attention, the feed-forward and its norm are called (else in NLLB-MoE)."""
    ours, theirs = f"{side}.layers.{{i}}.", f"model.{side}.layers.{{i}}."
    steps = (("attention", "self_attn"), ("cross", cross))[: 1 if side == "encoder" else 2]
    projections = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
    names = {f"{step}.op.{p}": f"{called}.{t}" for step, called in steps for p, t in projections}
    names |= {f"{step}.{place}": f"{called}_layer_norm" for step, called in steps}
    names |= {"feedforward.op.up": f"{dense}fc1", "feedforward.op.down": f"{dense}fc2", f"feedforward.{place}": norm}
    position = Rule(f"{side}.position.weight", f"model.{side}.embed_positions.weight")
    return (position, *pairs(ours, theirs, names))


WEIGHTS = (
    *(rule for side in SIDES for rule in rules(side, "after")),
    *(rule for side in SIDES for rule in pairs(f"{side}.", f"model.{side}.", {"input_norm": "layernorm_embedding"})),
    Rule("head.weight", "lm_head.weight"),
    Rule("head.bias", BIAS, OneRow()),
)


def heads(spec: ModelSpec) -> tuple[Rule, ...]:
    """The name of the embedding, which a decoder alone holds under its own, and those of the labels."""
    table = f"model.{'decoder.embed_tokens' if spec.encoder is None else 'shared'}.weight"
    spans = spec.labels is not None and spec.labels.task == "span"
    names = {"labels.dense": "qa_outputs" if spans else "classification_head.out_proj"}
    names |= {"pooler.dense": "classification_head.dense"}
    return (Rule("embedding.weight", table), *pairs("", "", names))


def unused(spec: ModelSpec) -> dict[str, Shape]:
    """The bias of the logits that every BART has and that nothing trains. One that is not zero is the head's."""
    bare = spec.encoder is not None and spec.head is not None and not spec.head.bias
    return {BIAS: (1, spec.embedding.vocabulary)} if bare else {}


BART = Family(
    model_type="bart",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    heads=heads,
    base="model.",
    aliases={"lm_head.weight": "model.shared.weight"},
    copies={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in SIDES},
    ignored=(BIAS, "model.encoder.version", "model.decoder.version"),
    zeros=unused,
    sizes={"bart/base": sizes(6, 768, 12), "bart/large": sizes(12, 1024, 16)},
)
