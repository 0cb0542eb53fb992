"""DeepSeek-V2 and V3: latent attention, and experts beside shared ones (arXiv:2405.04434, arXiv:2412.19437).

V2 takes the softmax scores of the best experts, in its larger models of the best groups alone. V3 takes sigmoid scores,
chosen with a bias that training moves toward balance (`rebalance`). V3's layer that predicts a second token is kept in
files and not used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lamina.errors import CheckpointError
from lamina.families import llama, mixtral
from lamina.families.family import Family, Fields, experts_of, need, the
from lamina.layers import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    GroupLimitSpec,
    LatentAttentionSpec,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    TopKSpec,
    YarnScaling,
)
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.weights.rules import Fused, Rule, pairs


def spec(fields: Fields, *, dense: int, context: int, special: tuple[int, int, None], newer: bool) -> ModelSpec:
    """config.json -> spec. `dense`: the default of first_k_dense_replace; `newer`: V3's own fields."""
    heads, layers = fields.count("num_attention_heads"), fields.layers()
    first = fields.count("first_k_dense_replace", dense, least=0)
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

    found = llama.with_attentions(found, latent)
    if first >= layers or fields.config.get("n_routed_experts", layers) is None:
        return found
    experts = _experts(fields, newer)
    return llama.with_feedforwards(found, lambda one, depth: one if depth < first else experts(one))


def _experts(fields: Fields, newer: bool) -> Callable[[FeedForwardSpec], ExpertsSpec]:
    """From the dense network of a layer to its mixture."""
    fields.must("moe_layer_freq", 1)
    fields.must("scoring_func", "sigmoid" if newer else "softmax")
    if newer:
        fields.must("topk_method", "noaux_tc")
    else:
        fields.must("norm_topk_prob", False)  # transformers' V2 does not look at it
    router = TopKSpec(
        experts=fields.count("n_routed_experts", 256 if newer else 64),
        chosen=fields.count("num_experts_per_tok", 8 if newer else None),
        score="sigmoid" if newer else "softmax",
        normalise=newer and fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5 if newer else 1.0),
        limit=_limit(fields, newer),
        correction=newer,
    )
    hidden = fields.count("moe_intermediate_size", 2048 if newer else 1407)
    shared = hidden * fields.count("n_shared_experts", 1 if newer else 2)
    alpha, each = fields.number("aux_loss_alpha", 0.0), fields.flag("seq_aux", True)
    losses = RouterLossSpec(balance=alpha, choices="mean", each_row=each) if alpha else None

    def experts(one: FeedForwardSpec) -> ExpertsSpec:
        network = one.replace(hidden=hidden, bias=False)
        return ExpertsSpec(router=router, expert=network, shared=one.replace(hidden=shared), losses=losses)

    return experts


def _limit(fields: Fields, newer: bool) -> GroupLimitSpec | None:
    if newer:
        groups, kept = fields.count("n_group", 8), fields.count("topk_group", 4)
        return None if groups == 1 else GroupLimitSpec(groups=groups, kept=kept, best=2)
    if not fields.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy"):
        return None
    return GroupLimitSpec(groups=fields.count("n_group"), kept=fields.count("topk_group"))


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

    dense: list[FeedForwardSpec] = []

    def network(one: Spec, depth: int) -> Spec:
        if isinstance(one, ExpertsSpec):
            return one.expert
        need(depth == len(dense), f"decoder.layers.{depth}", "is dense after one with experts")
        dense.append(the(FeedForwardSpec, one, f"decoder.layers.{depth}.steps.1.op"))
        return one

    simple = llama.with_feedforwards(llama.with_attentions(spec, plain), network)
    said = llama.config(simple, model_type=model_type, name=name)
    stack = the(StackSpec, spec.decoder, "decoder")
    attention = the(LatentAttentionSpec, stack.layers[0].steps[0].op, "decoder.layers.0.steps.0.op")
    found = experts_of(spec)
    bias = dense[0].bias if dense else found is not None and found.shared is not None and found.shared.bias
    if model_type == "deepseek_v3":
        interleaved = the(RotarySpec, attention.rotary, "rotary").interleaved
        said |= {"rope_interleave": interleaved, "num_nextn_predict_layers": 0}
    else:
        said |= {"mlp_bias": bias}
    return (
        said
        | ({} if found is None else _experts_config(found, model_type == "deepseek_v3"))
        | {
            "q_lora_rank": attention.query_rank,
            "kv_lora_rank": attention.key_rank,
            "qk_nope_head_dim": attention.nope_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "v_head_dim": attention.value_dim,
            "attention_bias": attention.bias,
            "first_k_dense_replace": len(dense),
        }
    )


def _experts_config(found: ExpertsSpec, newer: bool) -> dict[str, Any]:
    router, shared = the(TopKSpec, found.router, "router"), the(FeedForwardSpec, found.shared, "shared")
    limit, hidden = router.limit, found.expert.hidden
    groups = {"n_group": 1 if newer else None, "topk_group": 1 if newer else None}
    if limit is not None:
        groups = {"n_group": limit.groups, "topk_group": limit.kept}
    said = {
        "n_routed_experts": router.experts,
        "num_experts_per_tok": router.chosen,
        "routed_scaling_factor": router.scale,
        "moe_intermediate_size": hidden,
        "n_shared_experts": max(1, shared.hidden // hidden),
        **groups,
        **({"norm_topk_prob": router.normalise} if newer else {}),
        "topk_method": "noaux_tc" if newer else "greedy" if limit is None else "group_limited_greedy",
    }
    if found.losses is not None:
        said |= {"aux_loss_alpha": found.losses.balance, "seq_aux": found.losses.each_row}
    return said


L, H = "decoder.layers.{i}.attention.op.", "model.layers.{i}.self_attn."
NAMES = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm"}
WEIGHTS = (
    *(rule for rule in llama.WEIGHTS if not str(rule.ours).startswith(L) or str(rule.ours).startswith(f"{L}o.")),
    *pairs(L, H, NAMES),
    *mixtral.ROUTER,
    Rule(f"{mixtral.L}router.correction", f"{mixtral.H}mlp.gate.e_score_correction_bias"),
    *pairs(
        mixtral.L, f"{mixtral.H}mlp.shared_experts.", {f"shared.{our}": their for our, their in mixtral.SWIGLU.items()}
    ),
)


def of_heads(spec: ModelSpec) -> tuple[Rule, ...]:
    """Keys and values are stored as one matrix, head by head; queries under two names; each expert by itself."""
    stack = the(StackSpec, spec.decoder, "decoder")
    attention = the(LatentAttentionSpec, stack.layers[0].steps[0].op, "decoder.layers.0.steps.0.op")
    query = "q_proj" if attention.query_rank is None else "q_b_proj"
    both = (f"{L}k.weight", f"{L}v.weight")
    queries = Rule(f"{L}q.weight", f"{H}{query}.weight")
    fused = Rule(both, f"{H}kv_b_proj.weight", Fused(groups=attention.heads))
    return queries, fused, *mixtral.experts(spec)


def _family(model_type: str, name: str, sizes: dict[str, Any], *, newer: bool, **defaults: Any) -> Family:
    return Family(
        model_type=model_type,
        spec=partial(spec, newer=newer, **defaults),
        config=partial(config, model_type=model_type, name=name),
        weights=WEIGHTS,
        heads=of_heads,
        base="model.",
        aliases=llama.LLAMA.aliases,
        ignored=(*llama.LLAMA.ignored, *(("model.layers.61.*",) if newer else ())),  # what predicts a second token
        sizes=sizes,
    )


def _yarn(factor: float, scale: float) -> dict[str, Any]:
    said = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "beta_fast": 32}
    return {"rope_scaling": said | {"beta_slow": 1, "mscale": scale, "mscale_all_dim": scale}}


INITIAL = {"initializer_range": 0.006}
"""The papers' (arXiv:2405.04434, section 3.1.2; 2412.19437, section 4.2); the released files have 0.02."""

BALANCED = {"aux_loss_alpha": 0.001, "seq_aux": True}
V2_SIZES = {
    "deepseek-v2/lite": llama.size(
        27, 2048, 16, 16, 10944, 102400, 163840, q_lora_rank=None, first_k_dense_replace=1, moe_intermediate_size=1408,
        num_experts_per_tok=6, **_yarn(40, 0.707), **BALANCED, **INITIAL,
    ),
    "deepseek-v2/236b": llama.size(
        60, 5120, 128, 128, 12288, 102400, 163840, first_k_dense_replace=1, moe_intermediate_size=1536,
        n_routed_experts=160, num_experts_per_tok=6, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0, **_yarn(40, 0.707), **BALANCED, **INITIAL,
    ),
}  # fmt: skip
V3_SIZES = {
    "deepseek-v3/671b": llama.size(61, 7168, 128, 128, 18432, 129280, 163840, **_yarn(40, 1.0), **BALANCED, **INITIAL),
}

V2 = _family("deepseek_v2", "DeepseekV2", V2_SIZES, newer=False, dense=0, context=2048, special=(1, 2, None))
V3 = _family("deepseek_v3", "DeepseekV3", V3_SIZES, newer=True, dense=3, context=4096, special=(0, 1, None))
