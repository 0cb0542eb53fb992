"""NLLB-MoE (arXiv:2207.04672): M2M-100 whose every so many-th feed-forward network is one of many, two for each token.

The balance loss is the paper's: of first choices, by layer. The z-loss, whose coefficient the files have, is in no loss
of transformers. `expert_capacity` is of the whole batch and holds in training; in evaluation nothing is dropped here,
whatever `moe_eval_capacity_token_fraction` is: at 1.0, as published, that is the same (`CapacitySpec(evaluation=...)`
is what asks for less). A second choice by chance ("random", "sampling") is for training alone, too.
"""

from __future__ import annotations

from typing import Any

from lamina.families import bart, m2m100
from lamina.families.family import Family, Fields, experts_of, need, stacked, the, with_experts
from lamina.layers import CapacitySpec, ExpertsSpec, RouterLossSpec, StackSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import edit
from lamina.weights.rules import Rule, pairs

NAMED = "NllbMoe"
POLICIES = ("all", "random", "sampling")
KEPT = 0.5
"""What `CapacitySpec.second` is under "random": a second choice of probability p is kept with probability 2 p."""


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec."""
    fields.must("router_dtype", "float32")
    fields.must("router_ignore_padding_tokens", False)  # True lets padding take places
    fields.number("moe_eval_capacity_token_fraction", 1.0)
    policy = fields.choice("second_expert_policy", dict(zip(POLICIES, POLICIES, strict=True)), "all")
    dense = m2m100.spec(fields, NAMED)
    balance, z = fields.number("router_aux_loss_coef", 0.001), fields.number("router_z_loss_coef", 0.001)
    more = {
        "router": TopKSpec(
            experts=fields.count("num_experts", 128, least=2),
            bias=fields.flag("router_bias", False),
            drawn=policy == "sampling",
        ),
        "capacity": CapacitySpec(
            training=fields.count("expert_capacity", 64),
            places=True,
            group="batch",
            second=KEPT if policy == "random" else None,
            certain_first=fields.flag("batch_prioritized_routing", False),
            normalise=not fields.flag("normalize_router_prob_before_dropping", False),
        ),
        "losses": RouterLossSpec(balance=balance, choices="first", z=z) if balance or z else None,
        "masked": fields.number("moe_token_dropout", 0.2),
    }
    for side in bart.SIDES:
        stack = the(StackSpec, getattr(dense, side), side)
        sparse = _sparse(len(stack.layers), fields.count(f"{side}_sparse_step", 4, least=0))
        layers = (
            with_experts(layer, **more) if there else layer for layer, there in zip(stack.layers, sparse, strict=True)
        )
        dense = dense.replace(**{side: stack.replace(layers=tuple(layers))})
    return dense


def _sparse(layers: int, step: int) -> list[bool]:
    """Which layers have experts: of 12 with a step of 4: 3, 7, 11."""
    return [step > 0 and (depth + 1) % step == 0 for depth in range(layers)]


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    found = the(ExpertsSpec, experts_of(spec), "experts")
    router = the(TopKSpec, found.router, "router")
    capacity = the(CapacitySpec, found.capacity, "capacity")
    said = m2m100.config(edit(spec, ExpertsSpec, lambda path, one: one.expert), NAMED)
    losses = found.losses or RouterLossSpec()
    return said | {
        "model_type": "nllb-moe",
        "num_experts": router.experts,
        "router_bias": router.bias,
        "router_aux_loss_coef": losses.balance,
        "router_z_loss_coef": losses.z,
        "expert_capacity": int(capacity.training),
        "second_expert_policy": POLICIES[2 if router.drawn else capacity.second is not None],
        "batch_prioritized_routing": capacity.certain_first,
        "normalize_router_prob_before_dropping": not capacity.normalise,
        "moe_token_dropout": found.masked,
        **{f"{side}_sparse_step": _step(spec, side) for side in bart.SIDES},
    }


def _step(spec: ModelSpec, side: str) -> int:
    stack = the(StackSpec, getattr(spec, side), side)
    there = [isinstance(layer.steps[-1].op, ExpertsSpec) for layer in stack.layers]
    found = [step for step in range(len(there) + 1) if _sparse(len(there), step) == there]
    need(bool(found), f"{side}.layers", f"have experts in places that no {side}_sparse_step gives")
    return found[0]


def experts(spec: ModelSpec) -> tuple[Rule, ...]:
    """The names of routers, and of experts, which a file holds as one of each."""
    found: tuple[Rule, ...] = ()
    for side in bart.SIDES:
        ours, theirs = f"{side}.layers.{{i}}.feedforward.op.", f"model.{side}.layers.{{i}}.ffn."
        names = {"up": "fc1", "down": "fc2"}
        found += stacked(spec, f"{ours}experts.", f"{theirs}experts.expert_{{e}}.", names)
        found += pairs(ours, theirs, {"router": "router.classifier"})
    return found


def layers_of(side: str) -> tuple[Rule, ...]:
    """The names of the layers of one side, but for their experts."""
    return bart.rules(side, "pre", cross="cross_attention", dense="ffn.", norm="ff_layer_norm")


NLLB_MOE = Family(
    model_type="nllb-moe",
    spec=spec,
    config=config,
    weights=(
        *m2m100.ENDS,
        *(rule for side in bart.SIDES for rule in layers_of(side)),
    ),
    heads=experts,
    base="model.",
    aliases=m2m100.ALIASES,
    copies=m2m100.COPIES,
    ignored=m2m100.IGNORED,
    sizes={"nllb-moe/54b": m2m100.size(24, 2048, 8192) | m2m100.NLLB},
)
