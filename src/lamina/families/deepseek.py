"""DeepSeek-V2 and V3: LLaMA's blocks with latent attention (arXiv:2405.04434, arXiv:2412.19437).

Read and written where every layer is dense. The published models are mixtures of experts from layer 1 or 3 on, which
are refused by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lamina.errors import CheckpointError
from lamina.families import llama
from lamina.families.family import Family, Fields, the
from lamina.layers import AttentionSpec, FeedForwardSpec, LatentAttentionSpec, RotarySpec, StackSpec, YarnScaling
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.weights.rules import Fused, Rule, pairs


def spec(fields: Fields, *, dense: int, context: int, special: tuple[int, int, None], newer: bool) -> ModelSpec:
    """config.json -> spec. `dense`: the default of first_k_dense_replace; `newer`: V3's own fields."""
    heads, layers = fields.count("num_attention_heads"), fields.layers()
    first = fields.count("first_k_dense_replace", dense, least=0)
    if first < layers and fields.config.get("n_routed_experts", layers) is not None:
        raise CheckpointError(
            f"{fields.where}: first_k_dense_replace is {first} of {layers} layers, the others have n_routed_experts:"
            " a mixture of experts is not built yet, only models without experts are read"
        )
    fields.must("num_key_value_heads", heads)
    if newer:
        fields.must("mlp_bias", False)
    size = fields.count("qk_rope_head_dim", 64)
    found = llama.spec(
        Fields({**fields.config, "head_dim": size}, fields.names, fields.where, fields.read), context=context
    )
    interleaved = fields.flag("rope_interleave", True) if newer else True
    rank = fields.config.get("q_lora_rank", 1536)

    def latent(one: AttentionSpec, depth: int) -> Spec:
        assert one.rotary is not None
        _check_rotary(fields, one.rotary)
        return LatentAttentionSpec(
            heads=heads,
            query_rank=None if rank is None else fields.count("q_lora_rank", 1536),
            key_rank=fields.count("kv_lora_rank", 512),
            nope_dim=fields.count("qk_nope_head_dim", 128),
            rope_dim=size,
            value_dim=fields.count("v_head_dim", 128),
            rotary=one.rotary.replace(interleaved=interleaved),
            pattern=one.pattern,
            bias=one.bias == "all",
            dropout=one.dropout,
        )

    return llama.with_attentions(found, latent)


def _check_rotary(fields: Fields, rotary: RotarySpec) -> None:
    """Transformers turns the whole of the shared part, and sharpens the scores with any scaling that has
    `mscale_all_dim`; here YaRN has it alone."""
    if rotary.width is not None:
        raise CheckpointError(f"{fields.where}: partial_rotary_factor is not 1; qk_rope_head_dim says what turns here")
    said = {**(fields.config.get("rope_parameters") or {}), **(fields.config.get("rope_scaling") or {})}
    if not isinstance(rotary.scaling, YarnScaling | None) and said.get("mscale_all_dim"):
        kind = said.get("rope_type", said.get("type"))
        raise CheckpointError(
            f"{fields.where}: mscale_all_dim stands beside rope_type {kind!r}; only 'yarn' has it here"
        )


def config(spec: ModelSpec, *, model_type: str, name: str) -> dict[str, Any]:
    """spec -> config.json."""

    def plain(one: Spec, depth: int) -> Spec:
        one = the(LatentAttentionSpec, one, f"decoder.layers.{depth}.steps.0.op")
        bias = "all" if one.bias else "none"
        return AttentionSpec(
            heads=one.heads,
            key_heads=one.heads,
            head_dim=one.rope_dim,
            pattern=one.pattern,
            rotary=one.rotary,
            bias=bias,
            dropout=one.dropout,
        )

    said = llama.config(llama.with_attentions(spec, plain), model_type=model_type, name=name)
    stack = the(StackSpec, spec.decoder, "decoder")
    attention, feedforward = (step.op for step in stack.layers[0].steps)
    attention = the(LatentAttentionSpec, attention, "decoder.layers.0.steps.0.op")
    feedforward = the(FeedForwardSpec, feedforward, "decoder.layers.0.steps.1.op")
    if model_type == "deepseek_v3":
        interleaved = the(RotarySpec, attention.rotary, "rotary").interleaved
        said |= {"rope_interleave": interleaved, "num_nextn_predict_layers": 0}
    else:
        said |= {"mlp_bias": feedforward.bias}
    return said | {
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.key_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "attention_bias": attention.bias,
        "first_k_dense_replace": said["num_hidden_layers"],
    }


L, H = "decoder.layers.{i}.attention.op.", "model.layers.{i}.self_attn."
NAMES = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm"}
WEIGHTS = (
    *(rule for rule in llama.WEIGHTS if not str(rule.ours).startswith(L) or str(rule.ours).startswith(f"{L}o.")),
    *pairs(L, H, NAMES),
)


def of_heads(spec: ModelSpec) -> tuple[Rule, ...]:
    """Keys and values are stored as one matrix, head by head; queries under two names."""
    stack = the(StackSpec, spec.decoder, "decoder")
    attention = the(LatentAttentionSpec, stack.layers[0].steps[0].op, "decoder.layers.0.steps.0.op")
    query = "q_proj" if attention.query_rank is None else "q_b_proj"
    both = (f"{L}k.weight", f"{L}v.weight")
    return Rule(f"{L}q.weight", f"{H}{query}.weight"), Rule(both, f"{H}kv_b_proj.weight", Fused(groups=attention.heads))


def _family(model_type: str, name: str, *, newer: bool, **defaults: Any) -> Family:
    return Family(
        model_type=model_type,
        spec=partial(spec, newer=newer, **defaults),
        config=partial(config, model_type=model_type, name=name),
        weights=WEIGHTS,
        heads=of_heads,
        base="model.",
        aliases=llama.LLAMA.aliases,
        ignored=llama.LLAMA.ignored,
    )


V2 = _family("deepseek_v2", "DeepseekV2", newer=False, dense=0, context=2048, special=(1, 2, None))
V3 = _family("deepseek_v3", "DeepseekV3", newer=True, dense=3, context=4096, special=(0, 1, None))
