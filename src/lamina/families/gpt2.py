"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, biases everywhere, tanh GELU, tied head."""

from __future__ import annotations

from typing import Any

from lamina.families.family import ACTIVATIONS, Family, Fields, activation_name, need, special_config
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, Turn


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("scale_attn_by_inverse_layer_idx", False)
    fields.must("add_cross_attention", False)
    width, heads = fields.count("n_embd", 768), fields.count("n_head", 12)
    if width % heads:
        raise ValueError(f"{fields.where}: n_embd={width} is not a multiple of n_head={heads}")
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5))
    residual_dropout = fields.number("resid_pdrop", 0.1)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=width // heads,
        scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        bias="all",
        dropout=fields.number("attn_pdrop", 0.1),
    )
    feedforward = FeedForwardSpec(
        hidden=fields.count("n_inner", 4 * width),
        act=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    layer = LayerSpec(
        steps=(
            StepSpec(name="attention", op=attention, pre=norm, dropout=residual_dropout),
            StepSpec(name="feedforward", op=feedforward, pre=norm, dropout=residual_dropout),
        )
    )
    context = fields.count("n_positions", 1024)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 50257)),
        decoder=StackSpec(
            layers=(layer,) * fields.layers("n_layer"),
            position=LearnedPositionSpec(size=context),
            dropout=fields.number("embd_pdrop", 0.1),
            norm=norm,
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True)),
        context=context,
        special=fields.special(50256, 50256),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack = spec.decoder
    need(stack is not None, "decoder", "is None")
    assert stack is not None
    attention, feedforward = (step.op for step in stack.layers[0].steps[:2])
    need(isinstance(attention, AttentionSpec), "decoder.layers.0.steps.0.op", f"is a {type(attention).__name__}")
    need(isinstance(feedforward, FeedForwardSpec), "decoder.layers.0.steps.1.op", f"is a {type(feedforward).__name__}")
    need(isinstance(stack.position, LearnedPositionSpec), "decoder.position", "is not learned")
    need(isinstance(stack.norm, LayerNormSpec), "decoder.norm", "is not a LayerNorm")
    assert isinstance(attention, AttentionSpec) and isinstance(feedforward, FeedForwardSpec)
    assert isinstance(stack.position, LearnedPositionSpec) and isinstance(stack.norm, LayerNormSpec)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2Model" if spec.head is None else "GPT2LMHeadModel"],
        "vocab_size": spec.embedding.vocabulary,
        "n_positions": stack.position.size,
        "n_embd": spec.width,
        "n_layer": len(stack.layers),
        "n_head": attention.heads,
        "n_inner": None if feedforward.hidden == 4 * spec.width else feedforward.hidden,
        "activation_function": "gelu_new" if feedforward.act == "gelu_tanh" else activation_name(feedforward.act),
        "resid_pdrop": stack.layers[0].steps[0].dropout,
        "embd_pdrop": stack.dropout,
        "attn_pdrop": attention.dropout,
        "layer_norm_epsilon": stack.norm.eps,
        "scale_attn_weights": attention.scale is None,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **special_config(spec.special),
    }


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
WEIGHTS = (
    Rule("embedding.weight", "transformer.wte.weight"),
    Rule("decoder.position.weight", "transformer.wpe.weight"),
    *(Rule(f"{L}attention.pre.{p}", f"{H}ln_1.{p}") for p in ("weight", "bias")),
    *(
        Rule(tuple(f"{L}attention.op.{part}.{p}" for part in "qkv"), f"{H}attn.c_attn.{p}", Fused(turned=True))
        for p in ("weight", "bias")
    ),
    Rule(f"{L}attention.op.o.weight", f"{H}attn.c_proj.weight", Turn()),
    Rule(f"{L}attention.op.o.bias", f"{H}attn.c_proj.bias"),
    *(Rule(f"{L}feedforward.pre.{p}", f"{H}ln_2.{p}") for p in ("weight", "bias")),
    Rule(f"{L}feedforward.op.up.weight", f"{H}mlp.c_fc.weight", Turn()),
    Rule(f"{L}feedforward.op.up.bias", f"{H}mlp.c_fc.bias"),
    Rule(f"{L}feedforward.op.down.weight", f"{H}mlp.c_proj.weight", Turn()),
    Rule(f"{L}feedforward.op.down.bias", f"{H}mlp.c_proj.bias"),
    *(Rule(f"decoder.norm.{p}", f"transformer.ln_f.{p}") for p in ("weight", "bias")),
    Rule("head.weight", "lm_head.weight"),
)

SIZES = {
    "gpt2/small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2/medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2/large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2/xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}

GPT2 = Family(
    model_type="gpt2",
    spec=spec,
    config=config,
    weights=WEIGHTS,
    base="transformer.",
    aliases={"lm_head.weight": "transformer.wte.weight"},
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    sizes=SIZES,
)
