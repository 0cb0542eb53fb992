"""Falcon (arXiv:2311.16867): parallel blocks, one fused matrix for queries, keys and values, in three published forms.

7B: one key head and one norm for both branches. 40B and 180B: grouped key heads, a norm for each branch (Falcon 2 11B:
one for both). Falcon-RW (arXiv:2306.01116): one step after the other, biases, ALiBi instead of rotary positions.
"""

from __future__ import annotations

from typing import Any

from lamina.families.family import (
    ACTIVATIONS,
    QKV,
    Family,
    Fields,
    activation_name,
    in_parallel,
    in_turn,
    initial_config,
    parts,
    special_config,
    the,
)
from lamina.families.rope import rotary, rotary_config
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, pairs


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("apply_residual_connection_post_layernorm", False)
    grouped, alibi = fields.flag("new_decoder_architecture", False), fields.flag("alibi", False)
    parallel = fields.flag("parallel_attn", True)
    if grouped:
        fields.must("parallel_attn", True)
    norms = fields.count("num_ln_in_parallel_attn", 2 if grouped else 1)
    fields.must("num_ln_in_parallel_attn", *((1, 2) if grouped else (1,)))
    fields = fields.over({"hidden_size": 4544, "num_attention_heads": 71})
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    size = fields.head_dim("hidden_size", "num_attention_heads")
    many = not grouped and not fields.flag("multi_query", True)
    if many:
        fields.must("num_kv_heads", heads)
    turned = None if alibi else rotary(fields, size)
    if turned is not None and turned.width is not None:
        raise ValueError(f"{fields.where}: partial_rotary_factor is not 1; Falcon turns the whole of each head")
    bias, rate = fields.flag("bias", False), fields.number("attention_dropout", 0.0)
    attention = AttentionSpec(
        heads=heads,
        key_heads=fields.count("num_kv_heads", heads) if grouped else heads if many else 1,
        head_dim=size,
        rotary=turned,
        bias="all" if bias else "none",
        dropout=rate if alibi else 0.0,  # with rotary positions the published code drops no probability
    )
    feedforward = FeedForwardSpec(
        hidden=fields.count("ffn_hidden_size", 4 * width),
        act=fields.choice("activation", ACTIVATIONS, "gelu"),
        gated=False,
        bias=bias,
    )
    norm, dropout = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5)), fields.number("hidden_dropout", 0.0)
    if parallel:
        shared, own = (None, norm) if norms == 2 else (norm, None)
        layer = in_parallel(attention, feedforward, shared=shared, own=own, sum_dropout=dropout)
    else:
        layer = in_turn(attention, feedforward, pre=norm, dropout=dropout)
        layer = LayerSpec(steps=(layer.steps[0].replace(dropout=rate), layer.steps[1]))
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 65024)),
        decoder=StackSpec(
            layers=(layer,) * fields.layers(),
            norm=norm,
            score_bias=AlibiSpec(heads=heads, scale=size**-0.5, rounded=True) if alibi else None,
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)),
        context=fields.count("max_position_embeddings", 2048),
        special=fields.special(11, 11),
        initial=fields.initial(),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    steps = stack.layers[0].steps
    parallel = len(steps) == 1
    own = parallel and steps[0].pre is None
    one, many = attention.key_heads == 1, attention.key_heads == attention.heads
    said = {
        "model_type": "falcon",
        "architectures": ["FalconModel" if spec.head is None else "FalconForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": attention.heads,
        "num_kv_heads": attention.key_heads,
        "new_decoder_architecture": own or not (one or many),
        "num_ln_in_parallel_attn": 2 if own else 1,
        "multi_query": one,
        "parallel_attn": parallel,
        "alibi": stack.score_bias is not None,
        "bias": feedforward.bias,
        "ffn_hidden_size": feedforward.hidden,
        "activation": activation_name(feedforward.act),
        "max_position_embeddings": spec.context or 2048,
        "layer_norm_epsilon": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "hidden_dropout": steps[-1].dropout,
        "attention_dropout": attention.dropout if parallel else steps[0].dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }
    if attention.rotary is not None:
        said["rope_parameters"] = rotary_config(attention.rotary, attention.head_dim)
    return said


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
BRANCHES = f"{L}parallel.op.branches."
PARTS = {
    "attention.op.o": "self_attention.dense",
    "feedforward.op.up": "mlp.dense_h_to_4h",
    "feedforward.op.down": "mlp.dense_4h_to_h",
}
WEIGHTS = (
    Rule("embedding.weight", "transformer.word_embeddings.weight"),
    *pairs(L, H, PARTS),
    *pairs(BRANCHES, H, PARTS),
    *pairs(L, H, {"attention.pre": "input_layernorm", "feedforward.pre": "post_attention_layernorm"}),
    *pairs(L, H, {"parallel.pre": "input_layernorm"}),
    *pairs(BRANCHES, H, {"attention.pre": "ln_attn", "feedforward.pre": "ln_mlp"}),
    *pairs("", "", {"decoder.norm": "transformer.ln_f"}),
    Rule("head.weight", "lm_head.weight"),
)


def fused(spec: ModelSpec) -> tuple[Rule, ...]:
    """The queries of a key head, then it and its values: with one key head q k v, with all q0 k0 v0 q1 k1 v1."""
    one, op = {QKV: "self_attention.query_key_value"}, Fused(groups=parts(spec)[1].key_heads)
    return pairs(L, H, one, op) + pairs(BRANCHES, H, one, op)


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **more}


GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 8}
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
RW |= {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 50304}

FALCON = Family(
    model_type="falcon",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    heads=fused,
    base="transformer.",
    aliases={"lm_head.weight": "transformer.word_embeddings.weight"},
    sizes={
        "falcon/7b": _size(32, 4544, 71),
        "falcon/40b": _size(60, 8192, 128, **GROUPED),
        "falcon/180b": _size(80, 14848, 232, **GROUPED),
        "falcon/rw-1b": _size(24, 2048, 32, **RW),
    },
)
