"""Mixtral (arXiv:2401.04088), Qwen2-MoE (2407.10671) and Qwen3-MoE (2505.09388): LLaMA's blocks with experts.

Their balance loss is that of transformers, over the layers of the model together and all choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.errors import CheckpointError
from lamina.families import llama
from lamina.families.family import Family, Fields, experts_of, stacked, the
from lamina.layers import ExpertsSpec, FeedForwardSpec, RouterLossSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.weights.rules import Rule, pairs


def losses(coefficient: float) -> RouterLossSpec | None:
    """`router_aux_loss_coef`, as transformers means it."""
    return RouterLossSpec(balance=coefficient, pooled=True) if coefficient else None


def coefficient(spec: ExpertsSpec) -> float:
    """The inverse."""
    return 0.0 if spec.losses is None else spec.losses.balance


def _mixtral(fields: Fields) -> ModelSpec:
    fields = fields.over({"rms_norm_eps": 1e-5, "rope_theta": 1e6})
    fields.must("router_jitter_noise", 0)  # there it multiplies what the experts see, too
    router = TopKSpec(experts=fields.count("num_local_experts", 8), chosen=fields.count("num_experts_per_tok", 2))
    balance = losses(fields.number("router_aux_loss_coef", 0.001))
    dense = llama.spec(fields, windows=llama.every_layer, key_heads=8, context=131072)
    return llama.with_feedforwards(dense, lambda one, depth: ExpertsSpec(router=router, expert=one, losses=balance))


def _mixtral_config(spec: ModelSpec) -> dict[str, Any]:
    found = the(ExpertsSpec, experts_of(spec), "experts")
    router = the(TopKSpec, found.router, "router")
    dense = llama.with_feedforwards(spec, lambda one, depth: the(ExpertsSpec, one, f"decoder.layers.{depth}").expert)
    return llama.config(dense, model_type="mixtral", name="Mixtral") | {
        "sliding_window": llama.windows_of(spec)[0],
        "num_local_experts": router.experts,
        "num_experts_per_tok": router.chosen,
        "router_aux_loss_coef": coefficient(found),
    }


def _sparse(fields: Fields, layers: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`th, but for `mlp_only_layers`."""
    step, dense = fields.count("decoder_sparse_step", 1), fields.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(one) is not int for one in dense):
        raise CheckpointError(f"{fields.where}: mlp_only_layers is {dense!r}; it must list numbers of layers")
    return [(depth + 1) % step == 0 and depth not in dense for depth in range(layers)]


def _qwen(fields: Fields, shared: bool, experts: int, chosen: int, hidden: int, **more: Any) -> ModelSpec:
    """The last three are what the configuration may leave out."""
    newer = "num_local_experts" in fields and "num_experts" not in fields  # transformers 5 renames it in Qwen3-MoE
    router = TopKSpec(
        experts=fields.count("num_local_experts" if newer else "num_experts", experts),
        chosen=fields.count("num_experts_per_tok", chosen),
        normalise=fields.flag("norm_topk_prob", False),
    )
    sparse, balance = _sparse(fields, fields.layers()), losses(fields.number("router_aux_loss_coef", 0.001))
    size = fields.count("moe_intermediate_size", hidden)
    common = fields.count("shared_expert_intermediate_size", 5632) if shared else None

    def layer(one: FeedForwardSpec, depth: int) -> Spec:
        if not sparse[depth]:
            return one
        return ExpertsSpec(
            router=router,
            expert=one.replace(hidden=size),
            shared=None if common is None else one.replace(hidden=common),
            shared_gate=shared,
            losses=balance,
        )

    return llama.with_feedforwards(llama.spec(fields, special=(None, None, None), context=32768, **more), layer)


def _qwen_config(spec: ModelSpec, model_type: str, name: str, windows: Callable[[ModelSpec], dict[str, Any]]) -> Any:
    found = the(ExpertsSpec, experts_of(spec), "experts")
    router, dense = the(TopKSpec, found.router, "router"), []

    def plain(one: Spec, depth: int) -> Spec:
        if isinstance(one, ExpertsSpec):
            return one.expert
        dense.append((depth, the(FeedForwardSpec, one, f"decoder.layers.{depth}.steps.1.op").hidden))
        return one

    said = llama.config(llama.with_feedforwards(spec, plain), model_type=model_type, name=name) | windows(spec)
    return said | {
        "intermediate_size": dense[0][1] if dense else found.expert.hidden,
        "moe_intermediate_size": found.expert.hidden,
        "num_experts": router.experts,
        "num_experts_per_tok": router.chosen,
        "norm_topk_prob": router.normalise,
        "router_aux_loss_coef": coefficient(found),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [depth for depth, _ in dense],
    }


def _qwen2(fields: Fields) -> ModelSpec:
    bias = fields.flag("qkv_bias", True)
    return _qwen(fields, True, 60, 4, 1408, qkv_bias=bias, windows=_below)


def _below(fields: Fields, layers: int) -> list[int | None]:
    """Qwen2-MoE: `layer_types` where present; else every second layer below `max_window_layers`, if at all."""
    used = fields.flag("use_sliding_window", False)
    window = fields.count("sliding_window", 4096) if used else None
    types = fields.config.get("layer_types")
    if types is not None:
        return llama.layer_windows(fields, types, layers, window)
    first = fields.count("max_window_layers", 28, least=0)
    return [window if depth % 2 == 0 and depth < first else None for depth in range(layers)]


def _qwen2_config(spec: ModelSpec) -> dict[str, Any]:
    said = _qwen_config(spec, "qwen2_moe", "Qwen2Moe", llama.type_config)
    shared = the(FeedForwardSpec, the(ExpertsSpec, experts_of(spec), "experts").shared, "shared")
    attention = spec.decoder.layers[0].steps[0].op  # pyright: ignore
    said.pop("head_dim")  # heads share the width evenly
    return said | {"shared_expert_intermediate_size": shared.hidden, "qkv_bias": attention.bias == "qkv"}  # pyright: ignore


def _qwen3(fields: Fields) -> ModelSpec:
    return _qwen(fields, False, 128, 8, 768, qk_norm=True, key_heads=4, windows=_all_or_none)


def _all_or_none(fields: Fields, layers: int) -> list[int | None]:
    """Qwen3-MoE: one window for all layers, if it is used."""
    used = fields.flag("use_sliding_window", False) and fields.config.get("sliding_window", 4096) is not None
    return [fields.count("sliding_window", 4096) if used else None] * layers


def _qwen3_config(spec: ModelSpec) -> dict[str, Any]:
    attention, window = spec.decoder.layers[0].steps[0].op, llama.windows_of(spec)[0]  # pyright: ignore
    windows = {"sliding_window": window, "use_sliding_window": window is not None}
    said = _qwen_config(spec, "qwen3_moe", "Qwen3Moe", lambda spec: windows)
    return said | {"attention_bias": attention.bias == "all"}  # pyright: ignore


L, H = "decoder.layers.{i}.feedforward.op.", "model.layers.{i}."
SWIGLU = {part: f"{part}_proj" for part in ("gate", "up", "down")}


def _mixtral_experts(spec: ModelSpec) -> tuple[Rule, ...]:
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return stacked(spec, f"{L}experts.", f"{H}block_sparse_moe.experts.{{e}}.", names)


def experts(spec: ModelSpec) -> tuple[Rule, ...]:
    """The experts of Qwen and DeepSeek."""
    return stacked(spec, f"{L}experts.", f"{H}mlp.experts.{{e}}.", SWIGLU)


def _family(model_type: str, **fields: Any) -> Family:
    return Family(
        model_type=model_type, base="model.", aliases=llama.LLAMA.aliases, ignored=llama.LLAMA.ignored, **fields
    )


MISTRAL = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2}
LARGER = MISTRAL | {"router_aux_loss_coef": 0.001}

MIXTRAL = _family(
    "mixtral",
    spec=_mixtral,
    config=_mixtral_config,
    weights=(*llama.WEIGHTS, Rule(f"{L}router.weight", f"{H}block_sparse_moe.gate.weight")),
    heads=_mixtral_experts,
    sizes={
        "mixtral/8x7b": llama.size(32, 4096, 32, 8, 14336, 32000, 32768, router_aux_loss_coef=0.02, **MISTRAL),
        "mixtral/8x22b": llama.size(56, 6144, 48, 8, 16384, 32000, 65536, **LARGER),
        "mixtral/8x22b-v0.3": llama.size(56, 6144, 48, 8, 16384, 32768, 65536, **LARGER),
    },
)

ROUTER = (Rule(f"{L}router.weight", f"{H}mlp.gate.weight"),)
SHARED = (
    *pairs(L, H, {f"shared.{ours}": f"mlp.shared_expert.{theirs}" for ours, theirs in SWIGLU.items()}),
    Rule(f"{L}shared_gate.weight", f"{H}mlp.shared_expert_gate.weight"),
)


def _experts(count: int, chosen: int, hidden: int, **more: Any) -> dict[str, Any]:
    said = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": hidden}
    return llama.Q25 | said | more


QWEN2_MOE = _family(
    "qwen2_moe",
    spec=_qwen2,
    config=_qwen2_config,
    weights=(*llama.WEIGHTS, *ROUTER, *SHARED),
    heads=experts,
    sizes={
        "qwen1.5-moe/a2.7b": llama.size(
            24, 2048, 16, 16, 5632, 151936, 8192, **_experts(60, 4, 1408, shared_expert_intermediate_size=5632)
        ),
        "qwen2-moe/57b-a14b": llama.size(
            28, 3584, 28, 4, 18944, 151936, 131072, **_experts(64, 8, 2560, shared_expert_intermediate_size=20480)
        ),
    },
)

QWEN3_MOE = _family(
    "qwen3_moe",
    spec=_qwen3,
    config=_qwen3_config,
    weights=(*llama.WEIGHTS, *llama.QK_NORM, *ROUTER),
    heads=experts,
    sizes={
        "qwen3-moe/30b-a3b": llama.size(
            48, 2048, 32, 4, 6144, 151936, 40960, **_experts(128, 8, 768, head_dim=128, norm_topk_prob=True)
        ),
        "qwen3-moe/235b-a22b": llama.size(
            94, 4096, 64, 4, 12288, 151936, 40960, **_experts(128, 8, 1536, head_dim=128, norm_topk_prob=True)
        ),
    },
)
