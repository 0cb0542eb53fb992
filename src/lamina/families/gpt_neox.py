"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373): attention and feed-forward in parallel, each under its own
norm, or one after the other; rotary positions on a part of each head; q, k and v stored head by head in one matrix."""

from __future__ import annotations

import math
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
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    NormalInitialSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, pairs

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
}


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields = fields.over(DEFAULTS)
    heads, size = fields.count("num_attention_heads"), fields.head_dim("hidden_size", "num_attention_heads")
    base, part = fields.number("rotary_emb_base", 10_000.0), fields.number("rotary_pct", 0.25)
    rate = fields.number("hidden_dropout", 0.0)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=size,
        rotary=rotary(fields.over({"rope_theta": base, "partial_rotary_factor": part}), size),
        bias="all" if fields.flag("attention_bias", True) else "none",
        dropout=fields.number("attention_dropout", 0.0),
    )
    feedforward = FeedForwardSpec(
        hidden=fields.count("intermediate_size"),
        act=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        bias=True,
    )
    norm = LayerNormSpec(eps=fields.number("layer_norm_eps", 1e-5))
    if fields.flag("use_parallel_residual", True):
        layer = in_parallel(attention, feedforward, own=norm, dropout=rate)
    else:
        layer = in_turn(attention, feedforward, pre=norm, dropout=rate)
    tied = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        width=fields.count("hidden_size"),
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size")),
        decoder=StackSpec(layers=(layer,) * fields.layers(), dropout=rate, norm=norm),
        head=None if fields.headless() else LanguageHeadSpec(tied=tied),
        context=fields.count("max_position_embeddings"),
        special=fields.special(0, 2),
        initial=_initial(fields),
    )


def _initial(fields: Fields) -> NormalInitialSpec:
    """What ends in the residual stream has 2 / (L sqrt(d)), the rest "small init", sqrt(2 / (5 d)), which `_size` says
    (arXiv:2204.06745, section 2.1.3, which names the feed-forward's; its code, init_functions.py, does so in attention
    too). transformers has 0.02 everywhere, and the released files say so."""
    layers, width = fields.layers(), fields.count("hidden_size")
    return fields.initial(residual=2 / (layers * math.sqrt(width)))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXModel" if spec.head is None else "GPTNeoXForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": attention.heads,
        "intermediate_size": feedforward.hidden,
        "hidden_act": activation_name(feedforward.act),
        "attention_dropout": attention.dropout,
        "hidden_dropout": stack.dropout,
        "attention_bias": attention.bias == "all",
        "use_parallel_residual": len(stack.layers[0].steps) == 1,
        "max_position_embeddings": spec.context,
        "layer_norm_eps": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rotary_config(attention.rotary, attention.head_dim)},
        "tie_word_embeddings": spec.head is not None and spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }


IN_TURN, IN_PARALLEL = "decoder.layers.{i}.", "decoder.layers.{i}.parallel.op.branches."
THEIRS = "gpt_neox.layers.{i}."
PARTS = {
    "attention.pre": "input_layernorm",
    "attention.op.o": "attention.dense",
    "feedforward.pre": "post_attention_layernorm",
    "feedforward.op.up": "mlp.dense_h_to_4h",
    "feedforward.op.down": "mlp.dense_4h_to_h",
}


def fused(spec: ModelSpec) -> tuple[Rule, ...]:
    """q, k and v, one head after the other."""
    _, attention, _ = parts(spec)
    one, op = {QKV: "attention.query_key_value"}, Fused(groups=attention.heads)
    return pairs(IN_TURN, THEIRS, one, op) + pairs(IN_PARALLEL, THEIRS, one, op)


def _size(layers: int, width: int, heads: int, vocabulary: int = 50304, **more: Any) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    small = {"initializer_range": math.sqrt(2 / (5 * width))}
    return {**shape, "intermediate_size": 4 * width, "vocab_size": vocabulary, "eos_token_id": 0, **small, **more}


GPT_NEOX = Family(
    model_type="gpt_neox",
    spec=spec,
    config=config,
    weights=(
        Rule("embedding.weight", "gpt_neox.embed_in.weight"),
        *pairs(IN_TURN, THEIRS, PARTS),
        *pairs(IN_PARALLEL, THEIRS, PARTS),
        *pairs("", "", {"decoder.norm": "gpt_neox.final_layer_norm"}),
        Rule("head.weight", "embed_out.weight"),
    ),
    heads=fused,
    base="gpt_neox.",
    aliases={"embed_out.weight": "gpt_neox.embed_in.weight"},
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    renamed=((r"^lm_head\.", "embed_out."),),  # transformers 5 says lm_head in memory and writes embed_out
    # 2 V d + L (12 d^2 + 13 d) + 2 d, V padded to a multiple of the devices of each run (Pythia, table 1 and its code)
    sizes={
        "gpt-neox/20b": _size(44, 6144, 64, 50432),
        "pythia/70m": _size(6, 512, 8),
        "pythia/160m": _size(12, 768, 12),
        "pythia/410m": _size(24, 1024, 16),
        "pythia/1b": _size(16, 2048, 8),
        "pythia/1.4b": _size(24, 2048, 16),
        "pythia/2.8b": _size(32, 2560, 32),
        "pythia/6.9b": _size(32, 4096, 32, 50432),
        "pythia/12b": _size(36, 5120, 40, 50688),
    },
)
