"""Falcon (arXiv:2311.16867): parallel blocks, one fused matrix for queries, keys and values, in three published forms.

7B: one key head and one norm for both branches. 40B and 180B: grouped key heads, a norm for each branch (Falcon 2 11B:
one for both). Falcon-RW (arXiv:2306.01116): one step after the other, biases, ALiBi instead of rotary positions.
"""

from __future__ import annotations

from typing import Any

from lamina.families.family import ACTIVATIONS, Family, Fields, activation_name, need, special_config
from lamina.families.rope import rotary, rotary_config
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BranchSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    StackSpec,
    StepSpec,
    SumSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("apply_residual_connection_post_layernorm", False)
    grouped, alibi = fields.flag("new_decoder_architecture", False), fields.flag("alibi", False)
    parallel = fields.flag("parallel_attn", True)
    if grouped:
        fields.must("parallel_attn", True)
    norms = fields.count("num_ln_in_parallel_attn", 2 if grouped else 1)
    fields.must("num_ln_in_parallel_attn", *((1, 2) if grouped else (1,)))
    width, heads = fields.count("hidden_size", 4544), fields.count("num_attention_heads", 71)
    if width % heads:
        raise ValueError(f"{fields.where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    many = not grouped and not fields.flag("multi_query", True)
    if many:
        fields.must("num_kv_heads", heads)
    turned = None if alibi else rotary(fields, width // heads)
    if turned is not None and turned.width is not None:
        raise ValueError(f"{fields.where}: partial_rotary_factor is not 1; Falcon turns the whole of each head")
    bias, rate = fields.flag("bias", False), fields.number("attention_dropout", 0.0)
    attention = AttentionSpec(
        heads=heads,
        key_heads=fields.count("num_kv_heads", heads) if grouped else heads if many else 1,
        head_dim=width // heads,
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
    own = norm if norms == 2 else None
    both = SumSpec(
        branches=(
            BranchSpec(name="attention", op=attention, pre=own),
            BranchSpec(name="feedforward", op=feedforward, pre=own),
        )
    )
    steps = (
        StepSpec(name="attention", op=attention, pre=norm, dropout=rate),
        StepSpec(name="feedforward", op=feedforward, pre=norm, dropout=dropout),
    )
    if parallel:
        steps = (StepSpec(name="parallel", op=both, pre=None if own else norm, dropout=dropout),)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 65024)),
        decoder=StackSpec(
            layers=(LayerSpec(steps=steps),) * fields.layers(),
            norm=norm,
            score_bias=AlibiSpec(heads=heads, scale=(width // heads) ** -0.5, rounded=True) if alibi else None,
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)),
        context=fields.count("max_position_embeddings", 2048),
        special=fields.special(11, 11),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack = spec.decoder
    need(stack is not None, "decoder", "is None")
    assert stack is not None
    steps = stack.layers[0].steps
    parts = steps[0].op.branches if isinstance(steps[0].op, SumSpec) else steps
    need(len(parts) == 2, "decoder.layers.0", "is not attention, feedforward")
    attention, feedforward = parts[0].op, parts[1].op
    need(isinstance(attention, AttentionSpec), "decoder.layers.0", f"has a {type(attention).__name__} first")
    need(isinstance(feedforward, FeedForwardSpec), "decoder.layers.0", f"has a {type(feedforward).__name__} second")
    need(isinstance(stack.norm, LayerNormSpec), "decoder.norm", "is not a LayerNorm")
    assert isinstance(attention, AttentionSpec) and isinstance(feedforward, FeedForwardSpec)
    assert isinstance(stack.norm, LayerNormSpec)
    parallel, own = len(steps) == 1, len(steps) == 1 and parts[0].pre is not None
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
        "layer_norm_epsilon": stack.norm.eps,
        "hidden_dropout": steps[-1].dropout,
        "attention_dropout": attention.dropout if parallel else steps[0].dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **special_config(spec.special),
    }
    if attention.rotary is not None:
        said["rope_parameters"] = rotary_config(attention.rotary, attention.head_dim)
    return said


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
BRANCHES = f"{L}parallel.op.branches."
PAIRS = (
    (f"{L}attention.pre", f"{H}input_layernorm"),
    (f"{L}feedforward.pre", f"{H}post_attention_layernorm"),
    (f"{L}parallel.pre", f"{H}input_layernorm"),
    (f"{BRANCHES}attention.pre", f"{H}ln_attn"),
    (f"{BRANCHES}feedforward.pre", f"{H}ln_mlp"),
    *((f"{place}attention.op.o", f"{H}self_attention.dense") for place in (L, BRANCHES)),
    *((f"{place}feedforward.op.up", f"{H}mlp.dense_h_to_4h") for place in (L, BRANCHES)),
    *((f"{place}feedforward.op.down", f"{H}mlp.dense_4h_to_h") for place in (L, BRANCHES)),
    ("decoder.norm", "transformer.ln_f"),
)
WEIGHTS = (
    Rule("embedding.weight", "transformer.word_embeddings.weight"),
    *(Rule(f"{ours}.{p}", f"{theirs}.{p}") for ours, theirs in PAIRS for p in ("weight", "bias")),
    Rule("head.weight", "lm_head.weight"),
)


def fused(spec: ModelSpec) -> tuple[Rule, ...]:
    """The queries of a key head, then it and its values: with one key head q k v, with all q0 k0 v0 q1 k1 v1."""
    attention = next(part for _, part in spec.walk() if isinstance(part, AttentionSpec))
    return tuple(
        Rule(
            tuple(f"{place}attention.op.{part}.{p}" for part in "qkv"),
            f"{H}self_attention.query_key_value.{p}",
            Fused(groups=attention.key_heads),
        )
        for place in (L, BRANCHES)
        for p in ("weight", "bias")
    )


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
