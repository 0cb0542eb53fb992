"""T5 (arXiv:1910.10683), T5 1.1 and Flan-T5, and mT5 (arXiv:2010.11934): encoder and decoder with bucketed biases.

Version 1.0 has ReLU and one table for both ends, with d^-0.5 before the logits; 1.1 has GEGLU and a head of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from lamina.families.family import ACTIVATIONS, Family, Fields, activation_name, parts, special_config, the
from lamina.layers import (
    AttentionSpec,
    BucketBiasSpec,
    CrossAttentionSpec,
    EmbeddingSpec,
    FanInInitialSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything
from lamina.weights.rules import Rule


@dataclass(frozen=True)
class Flavour:
    """Where mT5 differs from T5."""

    model_type: str
    name: str  # of the classes
    projection: str  # default of feed_forward_proj
    scales: bool  # a tied head has d^-0.5 before it


T5_FLAVOUR = Flavour("t5", "T5", "relu", scales=True)
MT5_FLAVOUR = Flavour("mt5", "MT5", "gated-gelu", scales=False)

PROJECTIONS = {name: (act, False) for name, act in ACTIVATIONS.items()}
PROJECTIONS |= {f"gated-{name}": (act, True) for name, act in ACTIVATIONS.items()}
PROJECTIONS["gated-gelu"] = ("gelu_tanh", True)  # the code that trained 1.1 has the tanh form
"""feed_forward_proj -> activation, and whether it is gated."""


def spec(fields: Fields, flavour: Flavour) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields.must("is_decoder", False)
    width, heads = fields.count("d_model", 512), fields.count("num_heads", 8)
    act, gated = fields.choice("feed_forward_proj", PROJECTIONS, flavour.projection)
    fields.must("is_gated_act", gated)
    fields.must("dense_act_fn", *(name for name, one in ACTIVATIONS.items() if one == act))
    rate = fields.number("dropout_rate", 0.1)
    norm = RMSNormSpec(eps=fields.number("layer_norm_epsilon", 1e-6))
    shape = {"heads": heads, "key_heads": heads, "head_dim": fields.count("d_kv", 64), "scale": 1.0, "dropout": rate}
    feedforward = FeedForwardSpec(hidden=fields.count("d_ff", 2048), act=act, gated=gated, dropout=rate)

    def stack(layers: int, decoder: bool) -> StackSpec:
        attention = AttentionSpec(**shape, pattern=Causal() if decoder else Everything())
        ops = {"attention": attention, "cross": CrossAttentionSpec(**shape) if decoder else None}
        steps = (*ops.items(), ("feedforward", feedforward))
        layer = LayerSpec(steps=tuple(StepSpec(name=n, op=op, pre=norm, dropout=rate) for n, op in steps if op))
        bias = BucketBiasSpec(
            heads=heads,
            buckets=fields.count("relative_attention_num_buckets", 32),
            distance=fields.count("relative_attention_max_distance", 128),
            bidirectional=not decoder,
        )
        return StackSpec(layers=(layer,) * layers, norm=norm, dropout=rate, output_dropout=rate, score_bias=bias)

    layers = fields.layers("num_layers")
    decodes, headed = _parts(fields, flavour)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 32128)),
        encoder=stack(layers, decoder=False),
        decoder=stack(fields.layers("num_decoder_layers", layers), decoder=True) if decodes else None,
        head=_head(fields, flavour, width) if headed else None,
        context=fields.count("n_positions") if "n_positions" in fields else None,  # trained at; it can read more
        special=fields.special(None, 1, 0).replace(decoder_start=fields.token("decoder_start_token_id", 0)),
        initial=_initial(fields, width),
    )


def _initial(fields: Fields, width: int) -> FanInInitialSpec:
    """As Mesh TensorFlow: a head of its own by its inputs (1.0 in transformers), norms at 1 whatever the factor. Its
    code cuts the networks and that head at twice the deviation and the biases are uniform; here they are normal, with
    transformers' d^-0.5."""
    factor = fields.deviation("initializer_factor", 1.0)
    return FanInInitialSpec(factor=factor, embedding=factor, relative=factor * width**-0.5)


def _parts(fields: Fields, flavour: Flavour) -> tuple[bool, bool]:
    """Whether there is a decoder, and a head on it: as the tensors say, else the architecture."""
    kinds = ("ForConditionalGeneration", "Model", "EncoderModel")
    said = fields.config.get("architectures") or [flavour.name + kinds[0]]
    kind = str(said[0]).removeprefix(flavour.name)
    if kind not in kinds:
        raise ValueError(f"{fields.where}: architectures is {said}; known here: {flavour.name} with {', '.join(kinds)}")
    if fields.names is None:
        return kind != "EncoderModel", kind == kinds[0]
    decodes = any(name.startswith("decoder.block.") for name in fields.names)
    return decodes, decodes and (kind == kinds[0] or "lm_head.weight" in fields.names)


def _head(fields: Fields, flavour: Flavour, width: int) -> LanguageHeadSpec:
    """Published files of 1.1 say tie_word_embeddings=false and hold the head. Those that transformers 5 writes always
    say true, hold the head where it is not the embedding, and say scale_decoder_outputs beside it."""
    tied = fields.flag("tie_word_embeddings", True)
    scaled = flavour.scales and fields.flag("scale_decoder_outputs", tied)
    if fields.names is not None:
        tied = "lm_head.weight" not in fields.names or (tied and scaled)
    return LanguageHeadSpec(tied=tied, scale=width**-0.5 if scaled else 1.0)


def config(spec: ModelSpec, flavour: Flavour) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec, "encoder")
    bias = the(BucketBiasSpec, stack.score_bias, "encoder.score_bias")
    tanh = "gelu" if feedforward.gated else "gelu_new"
    act = tanh if feedforward.act == "gelu_tanh" else activation_name(feedforward.act)
    kind = "EncoderModel" if spec.decoder is None else "Model" if spec.head is None else "ForConditionalGeneration"
    return {
        "model_type": flavour.model_type,
        "architectures": [flavour.name + kind],
        "is_encoder_decoder": spec.decoder is not None,
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "d_kv": attention.head_dim,
        "d_ff": feedforward.hidden,
        "num_layers": len(stack.layers),
        "num_decoder_layers": len(stack.layers if spec.decoder is None else spec.decoder.layers),
        "num_heads": attention.heads,
        **({} if spec.context is None else {"n_positions": spec.context}),
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.distance,
        "feed_forward_proj": f"gated-{act}" if feedforward.gated else act,
        "dropout_rate": stack.dropout,
        "layer_norm_epsilon": the(RMSNormSpec, stack.norm, "encoder.norm").eps,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **({"scale_decoder_outputs": spec.head is None or spec.head.scale != 1.0} if flavour.scales else {}),
        **({"initializer_factor": spec.initial.factor} if isinstance(spec.initial, FanInInitialSpec) else {}),
        **special_config(spec.special),
        "decoder_start_token_id": spec.special.decoder_start,
    }


def _layers(stack: str, steps: tuple[tuple[str, str], ...], network: str) -> tuple[Rule, ...]:
    """`steps`: our name, and what the file calls the attention; after them the feed-forward, called `network`."""
    ours, theirs = f"{stack}.layers.{{i}}.", f"{stack}.block.{{i}}.layer."
    pairs = [(f"{n}.op.{p}", f"{at}.{called}.{p}") for at, (n, called) in enumerate(steps) for p in "qkvo"]
    pairs += [(f"{n}.pre", f"{at}.layer_norm") for at, (n, _) in enumerate((*steps, ("feedforward", "")))]
    pairs += [(f"feedforward.op.{n}", f"{len(steps)}.{network}.{t}") for n, t in (("gate", "wi_0"), ("down", "wo"))]
    return (
        *(Rule(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in pairs),
        Rule(f"{stack}.score_bias.weight", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Rule(f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"),
    )


PLACES = {"encoder": 1, "decoder": 2}
"""Which of a layer's steps is the feed-forward."""


def weights(network: str) -> tuple[Rule, ...]:
    """The table, where the file calls the feed-forward `network`."""
    return (
        Rule("embedding.weight", "shared.weight"),
        *_layers("encoder", (("attention", "SelfAttention"),), network),
        *_layers("decoder", (("attention", "SelfAttention"), ("cross", "EncDecAttention")), network),
        Rule("head.weight", "lm_head.weight"),
    )


def inner(spec: ModelSpec) -> str:
    """The name of the matrix that a gate multiplies, or that stands alone."""
    gated = spec.encoder is not None and any(
        isinstance(part, FeedForwardSpec) and part.gated for _, part in spec.encoder.walk()
    )
    return "wi_1" if gated else "wi"


def up(spec: ModelSpec, network: str = "DenseReluDense") -> tuple[Rule, ...]:
    """The rules for that matrix."""
    return tuple(
        Rule(
            f"{stack}.layers.{{i}}.feedforward.op.up.weight",
            f"{stack}.block.{{i}}.layer.{at}.{network}.{inner(spec)}.weight",
        )
        for stack, at in PLACES.items()
    )


ALIASES = {"lm_head.weight": "shared.weight"}
COPIES = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in PLACES}


def _family(flavour: Flavour, sizes: dict[str, dict[str, Any]]) -> Family:
    return Family(
        model_type=flavour.model_type,
        spec=partial(spec, flavour=flavour),
        config=partial(config, flavour=flavour),
        weights=weights("DenseReluDense"),
        heads=up,
        aliases=ALIASES,
        copies=COPIES,
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),  # 1.0's, never read
        sizes=sizes,
    )


def size(layers: int, width: int, head_dim: int, heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    shape = {"num_layers": layers, "d_model": width, "d_kv": head_dim, "num_heads": heads, "d_ff": hidden}
    return {**shape, "n_positions": 512, **more}


NEWER = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SHAPES = {
    "small": (8, 512, 64, 6, 1024),
    "base": (12, 768, 64, 12, 2048),
    "large": (24, 1024, 64, 16, 2816),
    "xl": (24, 2048, 64, 32, 5120),
    "xxl": (24, 4096, 64, 64, 10240),
}

T5 = _family(
    T5_FLAVOUR,
    {
        "t5/small": size(6, 512, 64, 8, 2048),
        "t5/base": size(12, 768, 64, 12, 3072),
        "t5/large": size(24, 1024, 64, 16, 4096),
        "t5/3b": size(24, 1024, 128, 32, 16384),
        "t5/11b": size(24, 1024, 128, 128, 65536),
        **{f"{name}/{of}": size(*s, **NEWER) for name in ("t5-v1.1", "flan-t5") for of, s in SHAPES.items()},
    },
)
MT5 = _family(MT5_FLAVOUR, {f"mt5/{of}": size(*s, vocab_size=250112, **NEWER) for of, s in SHAPES.items()})
