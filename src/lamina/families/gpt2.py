"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, biases everywhere, tanh GELU, tied head.

GPT-3 (arXiv:2005.14165) has this shape, and no published weights.
"""

from __future__ import annotations

import math
from typing import Any

from lamina.families.family import (
    ACTIVATIONS,
    QKV,
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
)
from lamina.model import ModelSpec
from lamina.weights.rules import Fused, Rule, Turn, pairs


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("scale_attn_by_inverse_layer_idx", False)
    fields.must("add_cross_attention", False)
    fields = fields.over({"n_embd": 768, "n_head": 12})
    width, heads = fields.count("n_embd"), fields.count("n_head")
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5))
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=fields.head_dim("n_embd", "n_head"),
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
    layer = in_turn(attention, feedforward, pre=norm, dropout=fields.number("resid_pdrop", 0.1))
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
        initial=_initial(fields),
    )


def _initial(fields: Fields) -> NormalInitialSpec:
    """The paper's section 2.3 divides what ends in the residual stream by the root of the 2 L additions to it. The
    positions are those of the released code, which shows no such division; transformers has 0.02 for them."""
    std = fields.deviation("initializer_range", 0.02)
    return fields.initial(residual=std / math.sqrt(2 * fields.layers("n_layer")), position=0.01)


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2Model" if spec.head is None else "GPT2LMHeadModel"],
        "vocab_size": spec.embedding.vocabulary,
        "n_positions": the(LearnedPositionSpec, stack.position, "decoder.position").size,
        "n_embd": spec.width,
        "n_layer": len(stack.layers),
        "n_head": attention.heads,
        "n_inner": None if feedforward.hidden == 4 * spec.width else feedforward.hidden,
        "activation_function": "gelu_new" if feedforward.act == "gelu_tanh" else activation_name(feedforward.act),
        "resid_pdrop": stack.layers[0].steps[0].dropout,
        "embd_pdrop": stack.dropout,
        "attn_pdrop": attention.dropout,
        "layer_norm_epsilon": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "scale_attn_weights": attention.scale is None,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }


L, H = "decoder.layers.{i}.", "transformer.h.{i}."
FEED = {"feedforward.op.up": "mlp.c_fc", "feedforward.op.down": "mlp.c_proj"}
WEIGHTS = (
    Rule("embedding.weight", "transformer.wte.weight"),
    Rule("decoder.position.weight", "transformer.wpe.weight"),
    *pairs(L, H, {QKV: "attn.c_attn"}, Fused(turned=True)),
    *pairs(L, H, {"attention.op.o": "attn.c_proj", **FEED}, Turn()),
    *pairs(L, H, {"attention.pre": "ln_1", "feedforward.pre": "ln_2"}),
    *pairs("", "", {"decoder.norm": "transformer.ln_f"}),
    Rule("head.weight", "lm_head.weight"),
)

# V d + P d + L (12 d^2 + 13 d) + 2 d, V = 50257, P = 1024 (2048 in GPT-3)
GPT3 = {"n_positions": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES = {
    "gpt2/small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2/medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2/large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2/xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    # GPT-3 (arXiv:2005.14165, table 2.1). The table prints 24 heads of 128 for XL and a width of 5,140 for 13B, which
    # contradict its own columns; 16 heads and 5,120 give the counts of its table of compute (1.3B, 12.85B).
    "gpt3/small": {"n_layer": 12, "n_embd": 768, "n_head": 12, **GPT3},
    "gpt3/medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, **GPT3},
    "gpt3/large": {"n_layer": 24, "n_embd": 1536, "n_head": 16, **GPT3},
    "gpt3/xl": {"n_layer": 24, "n_embd": 2048, "n_head": 16, **GPT3},
    "gpt3/2.7b": {"n_layer": 32, "n_embd": 2560, "n_head": 32, **GPT3},
    "gpt3/6.7b": {"n_layer": 32, "n_embd": 4096, "n_head": 32, **GPT3},
    "gpt3/13b": {"n_layer": 40, "n_embd": 5120, "n_head": 40, **GPT3},
    "gpt3/175b": {"n_layer": 96, "n_embd": 12288, "n_head": 96, **GPT3},
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
    notes={
        "gpt3": "all layers are dense here: the paper alternates them with locally banded ones, and publishes neither"
        " the width of the band nor the dropout (0 here)"
    },
)
