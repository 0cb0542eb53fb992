"""DiffLlama: LLaMA with differential attention (arXiv:2410.05258), as transformers has it.

Its `num_attention_heads` counts maps, so a head of ours is two of its own: h and h + half. The norm of the heads has no
weight, and `lambda_std_dev`, which only says how training began, is not kept in the spec.
"""

from __future__ import annotations

from typing import Any

from lamina.errors import CheckpointError
from lamina.families import llama
from lamina.families.family import Family, Fields, the
from lamina.layers import AttentionSpec, DifferentialSpec, RMSNormSpec
from lamina.layers.differential import start_at
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.weights.rules import Rule


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("attention_dropout", 0)
    fields.must("mlp_bias", False)
    norm = RMSNormSpec(eps=fields.number("rms_norm_eps", 1e-5), weight=False)

    def differential(one: AttentionSpec, depth: int) -> Spec:
        if one.heads % one.key_heads or one.key_heads % 2:
            raise CheckpointError(f"{fields.where}: num_key_value_heads is {one.key_heads}; it must be even")
        return DifferentialSpec(
            heads=one.heads // 2,
            key_heads=one.key_heads // 2,
            head_dim=one.head_dim,
            start=start_at(depth),
            pattern=one.pattern,
            rotary=one.rotary,
            norm=norm,
            bias=one.bias == "all",
        )

    return llama.with_attentions(llama.spec(fields.over({"rms_norm_eps": 1e-5})), differential)


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""

    def plain(one: Spec, depth: int) -> Spec:
        one = the(DifferentialSpec, one, f"decoder.layers.{depth}.steps.0.op")
        heads, key_heads, bias = 2 * one.heads, 2 * one.key_heads, "all" if one.bias else "none"
        return AttentionSpec(
            heads=heads, key_heads=key_heads, head_dim=one.head_dim, pattern=one.pattern, rotary=one.rotary, bias=bias
        )

    said = llama.config(llama.with_attentions(spec, plain), model_type="diffllama", name="DiffLlama")
    return said | {"attention_bias": spec.decoder.layers[0].steps[0].op.bias}  # pyright: ignore


L, H = "decoder.layers.{i}.attention.op.", "model.layers.{i}.self_attn."
LAMBDAS = {"a1": "lambda_q1", "b1": "lambda_k1", "a2": "lambda_q2", "b2": "lambda_k2"}

DIFFLLAMA = Family(
    model_type="diffllama",
    spec=spec,
    config=config,
    weights=llama.WEIGHTS + tuple(Rule(f"{L}{ours}", f"{H}{theirs}") for ours, theirs in LAMBDAS.items()),
    base="model.",
    aliases=llama.LLAMA.aliases,
    ignored=llama.LLAMA.ignored,
)
