"""Switch Transformer (arXiv:2101.03961): T5 whose every second feed-forward network is one of many, as released.

The released models differ from the paper's table 9: ReLU and wider networks in base and large, 30 heads in C. Balance
and z-losses are the paper's, by layer; what transformers calls `expert_capacity` holds in training, and in evaluation
nothing is dropped (`CapacitySpec(evaluation=...)` is what asks for it).
"""

from __future__ import annotations

import math
from typing import Any

from lamina.errors import CheckpointError
from lamina.families import t5
from lamina.families.family import Family, Fields, experts_of, need, stacked, the, with_experts
from lamina.layers import CapacitySpec, ExpertsSpec, FanInInitialSpec, RouterLossSpec, StackSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import edit
from lamina.weights.rules import Rule

FLAVOUR = t5.Flavour("switch_transformers", "SwitchTransformers", "relu", scales=True)


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields = fields.over({"num_layers": 12, "num_decoder_layers": 12, "d_model": 768, "num_heads": 12})
    fields.must("router_dtype", "float32")
    fields.must("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
    said: dict[str, Any] = {**fields.config, "feed_forward_proj": fields.config.get("dense_act_fn", "relu")}
    said.pop("dense_act_fn", None)
    dense = t5.spec(Fields(said, fields.names, fields.where, fields.read), FLAVOUR)
    router = TopKSpec(
        experts=fields.count("num_experts", 8),
        chosen=1,
        normalise=False,
        bias=fields.flag("router_bias", False),
        jitter=fields.number("router_jitter_noise", 0.01),
    )
    balance, z = fields.number("router_aux_loss_coef", 0.001), fields.number("router_z_loss_coef", 0.001)
    more = {
        "router": router,
        "capacity": CapacitySpec(training=fields.count("expert_capacity", 64), places=True),
        "losses": RouterLossSpec(balance=balance, z=z) if balance or z else None,
    }
    for side in t5.PLACES:
        stack = getattr(dense, side)
        if stack is not None:
            count = fields.count(f"num_sparse_{side}_layers", 3, least=0)
            if count > len(stack.layers):
                raise CheckpointError(
                    f"{fields.where}: num_sparse_{side}_layers is {count}; the {side} has {len(stack.layers)} layers"
                )
            sparse = _sparse(len(stack.layers), count)
            pairs = zip(stack.layers, sparse, strict=True)
            layers = (with_experts(layer, **more) if there else layer for layer, there in pairs)
            dense = dense.replace(**{side: stack.replace(layers=tuple(layers))})
    return dense.replace(initial=_initial(fields, dense.width))


def _initial(fields: Fields, width: int) -> FanInInitialSpec:
    """Matrices, routers too, are drawn from a truncated normal distribution, and published sizes have a tenth of T5's
    variance (section 2.4); what is looked up is as in T5. transformers' routers have the factor itself."""
    factor = fields.deviation("initializer_factor", 1.0)
    return FanInInitialSpec(factor=factor, relative=width**-0.5, truncated=True)


def _sparse(layers: int, count: int) -> list[bool]:
    """Which layers have experts, as transformers reads the number of them: of 12 layers 6: 1, 3, ..., 11."""
    step = layers // count if count else layers
    return [step == 1 or depth % step == 1 for depth in range(layers)]


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    found = the(ExpertsSpec, experts_of(spec), "experts")
    router = the(TopKSpec, found.router, "router")
    capacity = the(CapacitySpec, found.capacity, "capacity")
    said = t5.config(edit(spec, ExpertsSpec, lambda path, one: one.expert), FLAVOUR)
    said.pop("scale_decoder_outputs")
    losses = found.losses or RouterLossSpec()
    return said | {
        "dense_act_fn": said.pop("feed_forward_proj"),
        "num_experts": router.experts,
        "router_bias": router.bias,
        "router_jitter_noise": router.jitter,
        "router_aux_loss_coef": losses.balance,
        "router_z_loss_coef": losses.z,
        "expert_capacity": int(capacity.training),
        **{f"num_sparse_{side}_layers": _count(spec, side) for side in t5.PLACES},
    }


def _count(spec: ModelSpec, side: str) -> int:
    """What transformers has to read to put experts where they are; without a decoder, what the encoder has."""
    stack = the(StackSpec, getattr(spec, side) or spec.encoder, side)
    there = [isinstance(layer.steps[-1].op, ExpertsSpec) for layer in stack.layers]
    found = [count for count in range(len(there) + 1) if _sparse(len(there), count) == there]
    need(bool(found), f"{side}.layers", "have experts in places that no num_sparse_layers gives")
    return found[-1]


def experts(spec: ModelSpec) -> tuple[Rule, ...]:
    """The names of the experts, and of the matrix that has two names."""
    names = {"gate": "wi_0", "up": t5.inner(spec), "down": "wo"}
    found = t5.up(spec, "mlp")
    for side, at in t5.PLACES.items():
        ours, theirs = f"{side}.layers.{{i}}.feedforward.op.", f"{side}.block.{{i}}.layer.{at}.mlp."
        found += stacked(spec, f"{ours}experts.", f"{theirs}experts.expert_{{e}}.", names)
        found += tuple(Rule(f"{ours}router.{kind}", f"{theirs}router.classifier.{kind}") for kind in ("weight", "bias"))
    return found


def _size(shape: tuple[int, int, int, int, int], count: int, **more: Any) -> dict[str, Any]:
    """`shape` as T5's; every second layer has experts."""
    half = {f"num_sparse_{side}_layers": shape[0] // 2 for side in t5.PLACES}
    more = {"initializer_factor": math.sqrt(0.1), **more}
    return t5.size(*shape, num_decoder_layers=shape[0], num_experts=count, **half) | more


BASE, LARGE, XXL, C = (
    (12, 768, 64, 12, 3072),
    (24, 1024, 64, 16, 4096),
    (24, 4096, 64, 64, 10240),
    (15, 2080, 64, 30, 6144),
)

SWITCH = Family(
    model_type="switch_transformers",
    spec=spec,
    config=config,
    weights=t5.weights("mlp"),
    heads=experts,
    aliases=t5.ALIASES,
    copies=t5.COPIES,
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    sizes={
        **{f"switch/base-{count}": _size(BASE, count) for count in (8, 16, 32, 64, 128, 256)},
        "switch/large-128": _size(LARGE, 128),
        "switch/xxl-128": _size(XXL, 128, dense_act_fn="gated-gelu", tie_word_embeddings=False),
        "switch/c-2048": _size(
            C, 2048, num_sparse_encoder_layers=15, num_sparse_decoder_layers=15, tie_word_embeddings=False
        ),
    },
)
