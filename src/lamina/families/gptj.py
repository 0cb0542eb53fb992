"""GPT-J (Wang and Komatsuzaki 2021): attention and feed-forward in parallel under one norm, interleaved rotary
positions on the first features of each head, an untied head with a bias."""

from __future__ import annotations

from typing import Any

from lamina.families.family import (
    ACTIVATIONS,
    Family,
    Fields,
    activation_name,
    in_parallel,
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
    RotarySpec,
    StackSpec,
    SumSpec,
)
from lamina.model import ModelSpec
from lamina.weights.rules import Rule, pairs

DEFAULTS = {"vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields = fields.over(DEFAULTS)
    fields.must("add_cross_attention", False)
    if "rotary_dim" not in fields:  # null: the library that defines the field takes the width of the model and fails
        raise ValueError(f"{fields.where}: rotary_dim is null; it must say how many features of a head turn")
    width, heads, size = fields.count("n_embd"), fields.count("n_head"), fields.head_dim("n_embd", "n_head")
    turned = fields.count("rotary_dim")
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=size,
        rotary=RotarySpec(width=None if turned == size else turned, interleaved=True),
        dropout=fields.number("attn_pdrop", 0.0),
    )
    feedforward = FeedForwardSpec(
        hidden=fields.count("n_inner", 4 * width),
        act=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    norm = LayerNormSpec(eps=fields.number("layer_norm_epsilon", 1e-5))
    layer = in_parallel(attention, feedforward, shared=norm, dropout=fields.number("resid_pdrop", 0.0))
    tied = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size")),
        decoder=StackSpec(
            layers=(layer,) * fields.layers("n_layer"), dropout=fields.number("embd_pdrop", 0.0), norm=norm
        ),
        head=None if fields.headless() else LanguageHeadSpec(tied=tied, bias=True),
        context=fields.count("n_positions"),
        special=fields.special(50256, 50256),
        initial=fields.initial(),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    branches = the(SumSpec, stack.layers[0].steps[0].op, "decoder.layers.0.steps.0.op").branches
    rotary = the(RotarySpec, attention.rotary, "decoder.layers.0.steps.0.op.branches.0.op.rotary")
    return {
        "model_type": "gptj",
        "architectures": ["GPTJModel" if spec.head is None else "GPTJForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "n_positions": spec.context,
        "n_embd": spec.width,
        "n_layer": len(stack.layers),
        "n_head": attention.heads,
        "rotary_dim": rotary.width or attention.head_dim,
        "n_inner": None if feedforward.hidden == 4 * spec.width else feedforward.hidden,
        "activation_function": "gelu_new" if feedforward.act == "gelu_tanh" else activation_name(feedforward.act),
        "resid_pdrop": branches[0].dropout,
        "embd_pdrop": stack.dropout,
        "attn_pdrop": attention.dropout,
        "layer_norm_epsilon": the(LayerNormSpec, stack.norm, "decoder.norm").eps,
        "tie_word_embeddings": spec.head is not None and spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }


PARTS = {
    "pre": "ln_1",
    **{f"op.branches.attention.op.{part}": f"attn.{part}_proj" for part in "qkv"},
    "op.branches.attention.op.o": "attn.out_proj",
    "op.branches.feedforward.op.up": "mlp.fc_in",
    "op.branches.feedforward.op.down": "mlp.fc_out",
}

GPTJ = Family(
    model_type="gptj",
    spec=spec,
    config=config,
    weights=(
        Rule("embedding.weight", "transformer.wte.weight"),
        *pairs("decoder.layers.{i}.parallel.", "transformer.h.{i}.", PARTS),
        *pairs("", "", {"decoder.norm": "transformer.ln_f", "head": "lm_head"}),
    ),
    base="transformer.",
    aliases={"lm_head.weight": "transformer.wte.weight"},
    ignored=("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions"),
    # V d + L (12 d^2 + 7 d) + 2 d + V d + V: attention without biases 4 d^2, feed-forward 8 d^2 + 5 d, one norm 2 d
    sizes={"gpt-j/6b": {**DEFAULTS}},
)
