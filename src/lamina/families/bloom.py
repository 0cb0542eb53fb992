"""BLOOM (arXiv:2211.05100, section 3.2): ALiBi, a norm after the embedding, biases everywhere, tanh GELU, tied head."""

from __future__ import annotations

from typing import Any

from lamina.families.family import QKV, Family, Fields, in_turn, initial_config, parts, special_config, the
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, pairs


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec. `slow_but_exact` and `pretraining_tp` say in which order to sum, and change nothing here."""
    fields.must("apply_residual_connection_post_layernorm", False)
    said = fields.config  # files of 2022 have other names for the sizes
    old = {"n_head": said.get("num_attention_heads", 8), "n_layer": said.get("num_hidden_layers")}
    fields = fields.over({"hidden_size": 64} | old)
    name = "n_embed" if "n_embed" in fields else "hidden_size"
    width, heads = fields.count(name), fields.count("n_head")
    fields.must("n_inner", 4 * width)
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5))
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=fields.head_dim(name, "n_head"),
        bias="all",
        dropout=fields.number("attention_dropout", 0.0),
    )
    feedforward = FeedForwardSpec(hidden=4 * width, act="gelu_tanh", gated=False, bias=True)
    layer = in_turn(attention, feedforward, pre=norm, dropout=fields.number("hidden_dropout", 0.0))
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 250880)),
        decoder=StackSpec(
            layers=(layer,) * fields.layers("n_layer"),
            input_norm=norm,
            norm=norm,
            score_bias=AlibiSpec(heads=heads),
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)),
        context=fields.count("seq_length") if "seq_length" in fields else None,
        special=fields.special(1, 2),
        initial=fields.initial(),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, _ = parts(spec)
    said = {
        "model_type": "bloom",
        "architectures": ["BloomModel" if spec.head is None else "BloomForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "n_layer": len(stack.layers),
        "n_head": attention.heads,
        "layer_norm_epsilon": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "hidden_dropout": stack.layers[0].steps[0].dropout,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }
    return said if spec.context is None else said | {"seq_length": spec.context}


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
PARTS = {
    "attention.pre": "input_layernorm",
    "attention.op.o": "self_attention.dense",
    "feedforward.pre": "post_attention_layernorm",
    "feedforward.op.up": "mlp.dense_h_to_4h",
    "feedforward.op.down": "mlp.dense_4h_to_h",
}
ENDS = {"input_norm": "word_embeddings_layernorm", "norm": "ln_f"}
WEIGHTS = (
    Rule("embedding.weight", "transformer.word_embeddings.weight"),
    *pairs(L, H, PARTS),
    *pairs("decoder.", "transformer.", ENDS),
    Rule("head.weight", "lm_head.weight"),
)


def fused(spec: ModelSpec) -> tuple[Rule, ...]:
    """q, k and v of the first head, then of the second, ..."""
    return pairs(L, H, {QKV: "self_attention.query_key_value"}, Fused(groups=parts(spec)[1].heads))


def _sizes(name: str) -> dict[str, dict[str, Any]]:
    sizes = {
        "560m": (24, 1024, 16),
        "1b1": (24, 1536, 16),
        "1b7": (24, 2048, 16),
        "3b": (30, 2560, 32),
        "7b1": (30, 4096, 32),
        "176b": (70, 14336, 112),
    }
    return {
        f"{name}/{size}": {"n_layer": layers, "hidden_size": width, "n_head": heads, "seq_length": 2048}
        for size, (layers, width, heads) in sizes.items()
    }


BLOOM = Family(
    model_type="bloom",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    heads=fused,
    base="transformer.",
    aliases={"lm_head.weight": "transformer.word_embeddings.weight"},
    sizes=_sizes("bloom") | _sizes("bloomz"),  # BLOOMZ (arXiv:2211.01786) is BLOOM after tuning on tasks
)
