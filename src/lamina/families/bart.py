"""BART (arXiv:1910.13461): post-norm encoder and decoder, learned positions after two rows, one table for all.
LED (led.py) and BigBird-Pegasus (bigbird_pegasus.py) are made of the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lamina.families.bert import labels
from lamina.families.family import (
    ACTIVATIONS,
    Family,
    Fields,
    activation_name,
    initial_config,
    need,
    parts,
    special_config,
    the,
)
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

BIAS = "final_logits_bias"


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """Where LED and BigBird-Pegasus differ from BART."""

    model_type: str
    name: str  # of the classes
    base: str  # prefix of what is not a head
    kinds: tuple[str, ...]  # what is on the decoder, as the classes are called
    special: tuple[int, int, int]
    place: Literal["after", "pre"]  # of the norms of a step; the norm of a stack stands at the other end of it
    positions: tuple[str, str]  # the fields that say how many there are on each side
    offset: int  # rows of the position table before position 0: fairseq counts from the id of padding, which is 1
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]  # what its fields have to be, where they are there


def spec(fields: Fields, flavour: Flavour, bias: str = "all") -> ModelSpec:
    """config.json, and the tensors where there are any -> spec; `bias`: which projections have one."""
    for name, value in flavour.only.items():
        fields.must(name, value)
    fields = fields.over(flavour.defaults)
    rows = {side: fields.count(name) for side, name in zip(SIDES, flavour.positions, strict=True)}
    norm = LayerNormSpec()
    special = fields.special(*flavour.special).replace(decoder_start=fields.token("decoder_start_token_id", 2))

    def stack(side: str) -> StackSpec:
        return StackSpec(
            layers=layers(fields, side, flavour.place, bias),
            position=LearnedPositionSpec(size=rows[side], offset=flavour.offset),
            input_norm=norm if flavour.place == "after" else None,
            dropout=fields.number("dropout"),
            norm=norm if flavour.place == "pre" else None,
            layer_dropout=fields.number(f"{side}_layerdrop"),
        )

    encodes, kind = _parts(fields, flavour)
    generates = kind in ("ForConditionalGeneration", "ForCausalLM")
    rate, classifies = fields.number("classifier_dropout"), kind == "ForSequenceClassification"
    label = {"ForQuestionAnswering": LabelHeadSpec(labels=2, task="span")}
    if classifies:
        label[kind] = labels(fields, "sequence", rate)
    head = LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True), bias=fields.filled(BIAS))
    return ModelSpec(
        width=fields.count("d_model"),
        embedding=EmbeddingSpec(
            vocabulary=fields.count("vocab_size"),
            scale="root" if fields.flag("scale_embedding", False) else "none",
            padding=special.pad,
        ),
        encoder=stack("encoder") if encodes else None,
        decoder=stack("decoder"),
        head=head if generates else None,
        pooler=PoolerSpec(token="last", dropout=rate) if classifies else None,
        labels=label.get(kind),
        context=rows["decoder"],
        special=special,
        initial=fields.initial("init_std"),
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
        "vocab_size": 50265,
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
    "extra_pos_embeddings": 2,
}
"""Fields that say what BART is in files of 2020."""


BART_FLAVOUR = Flavour(
    model_type="bart",
    name="Bart",
    base="model.",
    kinds=("ForConditionalGeneration", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "Model"),
    special=(0, 2, 1),
    place="after",
    positions=("max_position_embeddings", "max_position_embeddings"),
    offset=2,
    defaults=DEFAULTS,
    only=OLD,
)


def _parts(fields: Fields, flavour: Flavour) -> tuple[bool, str]:
    """Whether there is an encoder, and what is on the decoder: as the tensors say, else the architecture."""
    name, kinds = flavour.name, flavour.kinds
    said = fields.config.get("architectures") or [f"{name}ForConditionalGeneration"]
    kind = str(said[0]).removeprefix(name)
    if kind not in kinds:
        raise ValueError(f"{fields.where}: architectures is {said}; known here: {name} with {', '.join(kinds)}")
    if fields.names is None:
        return kind != "ForCausalLM", kind
    alone = "ForCausalLM" in kinds and not any(n.startswith(f"{flavour.base}encoder.layers.") for n in fields.names)
    for tensor, one in LABELS.items():
        if f"{tensor}.weight" in fields.names and one in kinds:
            return not alone, one
    if BIAS in fields.names or "lm_head.weight" in fields.names:
        kind = "ForConditionalGeneration"
    return not alone, kind


LABELS = {"qa_outputs": "ForQuestionAnswering", "classification_head.dense": "ForSequenceClassification"}
"""The tensor that only a model with such labels has."""


def config(spec: ModelSpec, flavour: Flavour) -> dict[str, Any]:
    """spec -> config.json."""
    tasks = {None: "Model", "sequence": "ForSequenceClassification", "span": "ForQuestionAnswering"}
    task = None if spec.labels is None else spec.labels.task
    need(tasks.get(task) in flavour.kinds, "labels", f"are of a {task}")
    kind = tasks[task]
    if spec.head is not None:
        kind = "ForCausalLM" if spec.encoder is None else "ForConditionalGeneration"
    said: dict[str, Any] = {
        "model_type": flavour.model_type,
        "architectures": [f"{flavour.name}{kind}"],
        "is_encoder_decoder": spec.encoder is not None,
        "is_decoder": spec.encoder is None,
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "scale_embedding": spec.embedding.scale == "root",
        "dropout": parts(spec)[0].dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec, "init_std"),
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }
    if spec.labels is not None and spec.labels.task == "sequence":
        count = spec.labels.labels
        said |= {"classifier_dropout": spec.labels.dropout, "num_labels": count}
    for side, positions in zip(SIDES, flavour.positions, strict=True):
        stack, told = side_config(spec, side if spec.encoder is not None else "decoder", side)
        said |= told
        said[positions] = the(LearnedPositionSpec, stack.position, f"{side}.position").size
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


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def projections(step: str, called: str, names: Mapping[str, str] = PROJECTIONS) -> dict[str, str]:
    """The names of the projections of an attention, below those of its layer."""
    return {f"{step}.op.{ours}": f"{called}.{theirs}" for ours, theirs in names.items()}


ATTENTION = projections("attention", "self_attn")


def rules(
    side: str,
    place: str,
    base: str = "model.",
    attention: Mapping[str, str] = ATTENTION,
    *,
    cross: str = "encoder_attn",
    dense: str = "",
    norm: str = "final_layer_norm",
) -> tuple[Rule, ...]:
    """The names of the layers of one side, whose norms stand as `layers` has them, and of its positions.

    `cross`, `dense` and `norm`: what cross-attention, the feed-forward and its norm are called (else in NLLB-MoE)."""
    ours, theirs = f"{side}.layers.{{i}}.", f"{base}{side}.layers.{{i}}."
    names = {**attention, f"attention.{place}": "self_attn_layer_norm"}
    if side == "decoder":
        names |= projections("cross", cross) | {f"cross.{place}": f"{cross}_layer_norm"}
    names |= {"feedforward.op.up": f"{dense}fc1", "feedforward.op.down": f"{dense}fc2", f"feedforward.{place}": norm}
    position = Rule(f"{side}.position.weight", f"{base}{side}.embed_positions.weight")
    return (position, *pairs(ours, theirs, names))


def heads(spec: ModelSpec, flavour: Flavour) -> tuple[Rule, ...]:
    """The name of the embedding, which a decoder alone holds under its own, and those of the labels."""
    table = f"{flavour.base}{'decoder.embed_tokens' if spec.encoder is None else 'shared'}.weight"
    spans = spec.labels is not None and spec.labels.task == "span"
    names = {"labels.dense": "qa_outputs" if spans else "classification_head.out_proj"}
    names |= {"pooler.dense": "classification_head.dense"}
    return (Rule("embedding.weight", table), *pairs("", "", names))


def unused(spec: ModelSpec) -> dict[str, Shape]:
    """The bias of the logits that every BART has and that nothing trains. One that is not zero is the head's."""
    bare = spec.encoder is not None and spec.head is not None and not spec.head.bias
    return {BIAS: (1, spec.embedding.vocabulary)} if bare else {}


bart_spec, bart_config = spec, config


def family_of(
    flavour: Flavour,
    sizes: Mapping[str, dict[str, Any]],
    *,
    spec: Callable[[Fields], ModelSpec] | None = None,
    config: Callable[[ModelSpec], dict[str, Any]] | None = None,
    attention: Mapping[str, str] = ATTENTION,
) -> Family:
    """The family of a flavour. `spec` and `config`: where they say more than BART's; `attention`: the names of the
    encoder's projections."""
    place, base, shared = flavour.place, flavour.base, f"{flavour.base}shared.weight"
    norm = "input_norm" if place == "after" else "norm"
    norms = {f"{side}.{norm}": f"{side}.layernorm_embedding" for side in SIDES}
    return Family(
        model_type=flavour.model_type,
        spec=partial(bart_spec, flavour=flavour) if spec is None else spec,
        config=partial(bart_config, flavour=flavour) if config is None else config,
        weights=(
            *rules("encoder", place, base, attention),
            *rules("decoder", place, base),
            *pairs("", base, norms),
            Rule("head.weight", "lm_head.weight"),
            Rule("head.bias", BIAS, OneRow()),
        ),
        heads=partial(heads, flavour=flavour),
        base=base,
        aliases={"lm_head.weight": shared},
        copies={f"{base}{side}.embed_tokens.weight": shared for side in SIDES},
        ignored=(BIAS, *(f"{base}{side}.version" for side in SIDES)),
        zeros=unused,
        sizes=sizes,
    )


BART = family_of(BART_FLAVOUR, {"bart/base": sizes(6, 768, 12), "bart/large": sizes(12, 1024, 16)})
