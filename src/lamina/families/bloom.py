"""BLOOM (arXiv:2211.05100, section 3.2): ALiBi, a norm after the embedding, biases everywhere, tanh GELU, tied head."""

from __future__ import annotations

from typing import Any

from lamina.families.family import Family, Fields, need, special_config
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec. `slow_but_exact` and `pretraining_tp` say in which order to sum, and change nothing here."""
    fields.must("apply_residual_connection_post_layernorm", False)
    said = fields.config  # files of 2022 have other names for the sizes
    fields = fields.over({"n_head": said.get("num_attention_heads"), "n_layer": said.get("num_hidden_layers")})
    width = fields.count("n_embed" if "n_embed" in fields else "hidden_size", 64)
    heads = fields.count("n_head", 8)
    if width % heads:
        raise ValueError(f"{fields.where}: hidden_size={width} is not a multiple of n_head={heads}")
    fields.must("n_inner", 4 * width)
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5))
    dropout = fields.number("hidden_dropout", 0.0)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=width // heads,
        bias="all",
        dropout=fields.number("attention_dropout", 0.0),
    )
    feedforward = FeedForwardSpec(hidden=4 * width, act="gelu_tanh", gated=False, bias=True)
    layer = LayerSpec(
        steps=(
            StepSpec(name="attention", op=attention, pre=norm, dropout=dropout),
            StepSpec(name="feedforward", op=feedforward, pre=norm, dropout=dropout),
        )
    )
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
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack = spec.decoder
    need(stack is not None and len(stack.layers[0].steps) == 2, "decoder.layers.0", "is not attention, feedforward")
    assert stack is not None
    attention = stack.layers[0].steps[0].op
    need(isinstance(attention, AttentionSpec), "decoder.layers.0.steps.0.op", f"is a {type(attention).__name__}")
    need(isinstance(stack.norm, LayerNormSpec), "decoder.norm", "is not a LayerNorm")
    assert isinstance(attention, AttentionSpec) and isinstance(stack.norm, LayerNormSpec)
    said = {
        "model_type": "bloom",
        "architectures": ["BloomModel" if spec.head is None else "BloomForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "n_layer": len(stack.layers),
        "n_head": attention.heads,
        "layer_norm_epsilon": stack.norm.eps,
        "hidden_dropout": stack.layers[0].steps[0].dropout,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **special_config(spec.special),
    }
    return said if spec.context is None else said | {"seq_length": spec.context}


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
PAIRS = (
    ("decoder.input_norm", "transformer.word_embeddings_layernorm"),
    (f"{L}attention.pre", f"{H}input_layernorm"),
    (f"{L}attention.op.o", f"{H}self_attention.dense"),
    (f"{L}feedforward.pre", f"{H}post_attention_layernorm"),
    (f"{L}feedforward.op.up", f"{H}mlp.dense_h_to_4h"),
    (f"{L}feedforward.op.down", f"{H}mlp.dense_4h_to_h"),
    ("decoder.norm", "transformer.ln_f"),
)
WEIGHTS = (
    Rule("embedding.weight", "transformer.word_embeddings.weight"),
    *(Rule(f"{ours}.{p}", f"{theirs}.{p}") for ours, theirs in PAIRS for p in ("weight", "bias")),
    Rule("head.weight", "lm_head.weight"),
)


def fused(spec: ModelSpec) -> tuple[Rule, ...]:
    """q, k and v of the first head, then of the second, ..."""
    heads = next(part.heads for _, part in spec.walk() if isinstance(part, AttentionSpec))
    whole = f"{H}self_attention.query_key_value"
    return tuple(
        Rule(tuple(f"{L}attention.op.{part}.{p}" for part in "qkv"), f"{whole}.{p}", Fused(groups=heads))
        for p in ("weight", "bias")
    )


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
