"""MPT (MosaicML 2023, llm-foundry): pre-norm decoder without a single bias, ALiBi, exact GELU, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.families.family import QKV, Family, Fields, in_turn, initial_config, parts, special_config, the
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, pairs


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec. transformers passes over most of what is refused here, and gives other numbers."""
    for name, only in (("no_bias", True), ("expansion_ratio", 4), ("logit_scale", 1.0), ("embedding_fraction", 1.0)):
        fields.must(name, only)
    for name in ("emb_pdrop", "resid_pdrop"):
        fields.must(name, 0.0)
    fields.must("norm_type", "low_precision_layernorm", "layernorm")
    inner = fields.config.get("attn_config") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{fields.where}: attn_config is {inner!r}; it must be an object")
    part = Fields(inner, where=f"{fields.where}: attn_config")
    part.must("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id", "rope"):
        part.must(name, False)
    part.must("clip_qkv", 0)
    fields = fields.over({"d_model": 2048, "n_heads": 16})
    width, heads = fields.count("d_model"), fields.count("n_heads")
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5), bias=False)
    rate, alibi = part.number("attn_pdrop", 0.0), part.flag("alibi", True)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=fields.head_dim("d_model", "n_heads"),
        scale=part.number("softmax_scale") if "softmax_scale" in part else None,
        dropout=rate,
    )
    feedforward = FeedForwardSpec(hidden=4 * width, act="gelu", gated=False)
    layer = in_turn(attention, feedforward, pre=norm, dropout=rate)
    context = fields.count("max_seq_len", 2048)
    learned = not alibi and fields.flag("learned_pos_emb", True)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 50368)),
        decoder=StackSpec(
            layers=(layer,) * fields.layers("n_layers"),
            position=LearnedPositionSpec(size=context) if learned else None,
            norm=norm,
            score_bias=AlibiSpec(heads=heads, bias_max=part.number("alibi_bias_max", 8.0)) if alibi else None,
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)),
        context=context,
        special=fields.special(),
        initial=fields.initial(),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, _ = parts(spec)
    alibi, rate = stack.score_bias, attention.dropout
    inner: dict[str, Any] = {"alibi": alibi is not None, "attn_pdrop": int(rate) if rate.is_integer() else rate}
    inner["softmax_scale"] = attention.scale
    if isinstance(alibi, AlibiSpec):
        most = alibi.bias_max
        inner["alibi_bias_max"] = int(most) if most.is_integer() else most
    return {
        "model_type": "mpt",
        "architectures": ["MptModel" if spec.head is None else "MptForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "d_model": spec.width,
        "n_layers": len(stack.layers),
        "n_heads": attention.heads,
        "max_seq_len": spec.context or 2048,
        "learned_pos_emb": stack.position is not None,
        "layer_norm_epsilon": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "attn_config": inner,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }


L, H = "decoder.layers.{i}.", "transformer.blocks.{i}."
PARTS = {
    "attention.pre": "norm_1",
    "attention.op.o": "attn.out_proj",
    "feedforward.pre": "norm_2",
    "feedforward.op.up": "ffn.up_proj",
    "feedforward.op.down": "ffn.down_proj",
}
WEIGHTS = (
    Rule("embedding.weight", "transformer.wte.weight"),
    Rule("decoder.position.weight", "transformer.wpe.weight"),
    *pairs(L, H, {QKV: "attn.Wqkv"}, Fused()),
    *pairs(L, H, PARTS),
    Rule("decoder.norm.weight", "transformer.norm_f.weight"),
    Rule("head.weight", "lm_head.weight"),
)


def _size(layers: int, width: int, heads: int, context: int) -> dict[str, Any]:
    return {"n_layers": layers, "d_model": width, "n_heads": heads, "max_seq_len": context, "vocab_size": 50432}


MPT = Family(
    model_type="mpt",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    base="transformer.",
    aliases={"lm_head.weight": "transformer.wte.weight"},
    sizes={
        "mpt/7b": _size(32, 4096, 32, 2048),
        "mpt/7b-8k": _size(32, 4096, 32, 8192),
        "mpt/30b": _size(48, 7168, 64, 8192),
    },
)
