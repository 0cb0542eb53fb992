"""OPT (arXiv:2205.01068): decoders with learned positions (two rows before the first), ReLU, and a tied head.

The norms stand before each step, or after it as in OPT-350m, whose table of tokens is narrower than the model.
"""

from __future__ import annotations

import math
from typing import Any

from lamina.families.family import (
    ACTIVATIONS,
    Family,
    Fields,
    activation_name,
    in_turn,
    initial_config,
    parts,
    special_config,
    the,
)
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    NormalInitialSpec,
    StackSpec,
    TransformSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Rule, pairs

DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields = fields.over(DEFAULTS)
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    inner = fields.count("word_embed_proj_dim", width)
    if inner != width and fields.headless():
        raise ValueError(
            f"{fields.where}: a bare OPTModel with word_embed_proj_dim={inner} below hidden_size={width}: the matrix"
            " after its last layer is part of the head here; set architectures to OPTForCausalLM, whose head is tied"
        )
    bias, before = fields.flag("enable_bias", True), fields.flag("do_layer_norm_before", True)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=fields.head_dim("hidden_size", "num_attention_heads"),
        bias="all" if bias else "none",
        dropout=fields.number("attention_dropout", 0.0),
    )
    act = fields.choice("activation_function", ACTIVATIONS, "relu")
    feedforward = FeedForwardSpec(hidden=fields.count("ffn_dim"), act=act, gated=False, bias=bias)
    affine = fields.flag("layer_norm_elementwise_affine", True)
    norm = LayerNormSpec(bias=affine, weight=affine)
    pre, after = (norm, None) if before else (None, norm)
    layer = in_turn(attention, feedforward, pre=pre, after=after, dropout=fields.number("dropout", 0.1))
    narrow = None if inner == width else TransformSpec(width=inner, bias=False)
    context, special = fields.count("max_position_embeddings"), fields.special(2, 2, 1)
    head = LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True), transform=narrow)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(
            vocabulary=fields.count("vocab_size"), padding=special.pad, inner=None if inner == width else inner
        ),
        decoder=StackSpec(
            layers=(layer,) * fields.layers(),
            position=LearnedPositionSpec(size=context, offset=2),
            norm=norm if before and not fields.flag("_remove_final_layer_norm", False) else None,
            layer_dropout=fields.number("layerdrop", 0.0),
        ),
        head=None if fields.headless() else head,
        context=context,
        special=special,
        initial=_initial(fields),
    )


def _initial(fields: Fields) -> NormalInitialSpec:
    """As Megatron: what ends in the residual stream is divided by sqrt(2 L) (arXiv:2205.01068, section 2.2)."""
    return fields.initial("init_std", residual=fields.deviation("init_std", 0.02) / math.sqrt(2 * fields.layers()))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    step = stack.layers[0].steps[0]
    norm = the(LayerNormSpec, step.pre or step.after, "decoder.layers.0.steps.0.pre")
    return {
        "model_type": "opt",
        "architectures": ["OPTModel" if spec.head is None else "OPTForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": len(stack.layers),
        "ffn_dim": feedforward.hidden,
        "num_attention_heads": attention.heads,
        "max_position_embeddings": the(LearnedPositionSpec, stack.position, "decoder.position").size,
        "do_layer_norm_before": step.pre is not None,
        "_remove_final_layer_norm": step.pre is not None and stack.norm is None,
        "word_embed_proj_dim": spec.embedding.inner or spec.width,
        "dropout": step.dropout,
        "layerdrop": stack.layer_dropout,
        "attention_dropout": attention.dropout,
        "activation_function": activation_name(feedforward.act),
        "enable_bias": attention.bias == "all",
        "layer_norm_elementwise_affine": norm.weight,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec, "init_std"),
        **special_config(spec.special),
    }


BASE = "model.decoder."
PARTS = {
    **{f"attention.op.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attention.op.o": "self_attn.out_proj",
    "feedforward.op.up": "fc1",
    "feedforward.op.down": "fc2",
    **{f"attention.{side}": "self_attn_layer_norm" for side in ("pre", "after")},
    **{f"feedforward.{side}": "final_layer_norm" for side in ("pre", "after")},
}


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**shape, "ffn_dim": 4 * width, "init_std": 0.006, **more}


OPT = Family(
    model_type="opt",
    spec=spec,
    config=config,
    weights=(
        Rule("embedding.weight", f"{BASE}embed_tokens.weight"),
        Rule("embedding.up.weight", f"{BASE}project_in.weight"),
        Rule("decoder.position.weight", f"{BASE}embed_positions.weight"),
        *pairs("decoder.layers.{i}.", BASE + "layers.{i}.", PARTS),
        *pairs("decoder.", BASE, {"norm": "final_layer_norm"}),
        Rule("head.transform.dense.weight", f"{BASE}project_out.weight"),
        Rule("head.weight", "lm_head.weight"),
    ),
    base="model.",
    aliases={"lm_head.weight": f"{BASE}embed_tokens.weight"},
    ignored=("*decoder.version",),
    # V d + 2050 d + L (12 d^2 + 13 d) + 2 d; 350m: V 512 + 2 (512 d) for the table and its matrices, and no last norm
    sizes={
        "opt/125m": _size(12, 768, 12),
        "opt/350m": _size(24, 1024, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
        "opt/1.3b": _size(24, 2048, 32),
        "opt/2.7b": _size(32, 2560, 32),
        "opt/6.7b": _size(32, 4096, 32),
        "opt/13b": _size(40, 5120, 40),
        "opt/30b": _size(48, 7168, 56),
        "opt/66b": _size(64, 9216, 72),
    },
)
