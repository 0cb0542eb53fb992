"""A folder that brings its own code: what no architecture of transformers says, run by a module that travels with it.

config.json holds the spec itself, and beside it the fields that transformers, its continuous batching and vLLM's
transformers backend ask for; the module (remote/modeling_lamina.txt) builds what the spec says. Here the code is
written and never run: the spec is read, and fields that contradict it are refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from importlib.resources import files
from typing import Any

from lamina.errors import CheckpointError, LaminaError
from lamina.families.family import Family, Fields, initial_config, need, special_config, the
from lamina.layers import (
    AttentionSpec,
    BranchSpec,
    EmbeddingSpec,
    ExpertsSpec,
    FanInInitialSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    LinearScaling,
    Llama3Scaling,
    NormalInitialSpec,
    NTKScaling,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    StepSpec,
    SumSpec,
    TopKSpec,
    YarnScaling,
)
from lamina.layers.rotary import table
from lamina.model import ModelSpec, SpecialTokens
from lamina.patterns import Both, Causal, Either, Pattern, Sinks, Window
from lamina.specs import Spec
from lamina.weights.rules import Rule, Stacked

ONLY: dict[type[Spec], dict[str, Any]] = {  # what the module says, and the one value of fields that it has no word for
    ModelSpec: {"encoder": None, "pooler": None, "labels": None, "stem": None, "marks": None},
    EmbeddingSpec: {"inner": None},
    StackSpec: {
        "segment": None,
        "score_bias": None,
        "input_width": None,
        "recurrence": None,
        "repeat": 1,
        "output_dropout": 0.0,
        "layer_dropout": 0.0,
    },
    LayerSpec: {},
    StepSpec: {"drop_branch": 0.0},
    SumSpec: {},
    BranchSpec: {},
    AttentionSpec: {"relative": None},
    FeedForwardSpec: {},
    ExpertsSpec: {"capacity": None, "masked": 0.0},
    TopKSpec: {"limit": None, "jitter": 0.0, "drawn": False, "noise": False},
    RouterLossSpec: {},
    RMSNormSpec: {},
    LayerNormSpec: {},
    RotarySpec: {},
    LinearScaling: {},
    NTKScaling: {},
    YarnScaling: {},
    Llama3Scaling: {},
    LearnedPositionSpec: {},
    LanguageHeadSpec: {"transform": None},
    SpecialTokens: {},
    NormalInitialSpec: {},
    FanInInitialSpec: {},
}
CODE = ("configuration_lamina.py", "modeling_lamina.py")
OWN = ("vocab_size", "architectures", "auto_map", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that may be changed in config.json; the others follow from the spec."""
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "decoder.position.weight": "model.embed_positions.weight",
    "head.weight": "lm_head.weight",
    "head.bias": "lm_head.bias",
}


def spec(fields: Fields) -> ModelSpec:
    """config.json -> spec. Raises CheckpointError for a field that the spec contradicts."""
    try:
        found = ModelSpec.from_dict(fields.config.get("spec"))
    except LaminaError as error:
        raise CheckpointError(f"{fields.where}: {error}") from None
    follows = config(found)
    for name, value in follows.items():
        if name in fields.config and name not in OWN and fields.config[name] != value:
            said, right = (repr(one) if len(repr(one)) <= 60 else "another one" for one in (fields.config[name], value))
            raise CheckpointError(f"{fields.where}: {name} is {said}; by the spec beside it, it is {right}")
    tokens = fields.special(*(follows[f"{name}_token_id"] for name in ("bos", "eos", "pad")))
    return found.replace(
        embedding=found.embedding.replace(vocabulary=fields.count("vocab_size")),
        special=tokens.replace(decoder_start=found.special.decoder_start),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json. Raises CheckpointError naming the part that the module has no word for."""
    attentions = _said(spec)
    stack, first = the(StackSpec, spec.decoder, "decoder"), attentions[0]
    windows = [window_of(one.pattern, f"decoder.layers.{i}") for i, one in enumerate(attentions)]
    widths = Counter(width for width, sinks in windows if width is not None and not sinks)
    common = max(widths, key=lambda width: (widths[width], width)) if widths else None
    kinds = ["sliding_attention" if one == (common, 0) and common else "full_attention" for one in windows]
    rotaries = list(dict.fromkeys((one.rotary, one.head_dim) for one in attentions if one.rotary is not None))
    caps = {one.softcap for one in attentions}
    mixtures = [part for _, part in spec.walk() if isinstance(part, ExpertsSpec)]
    inside = {id(part) for one in mixtures for part in (one.expert, one.shared)}
    dense = [part.hidden for _, part in spec.walk() if isinstance(part, FeedForwardSpec) and id(part) not in inside]
    said: dict[str, Any] = {
        "model_type": "lamina",
        "architectures": ["LaminaModel" if spec.head is None else "LaminaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lamina.LaminaConfig",
            "AutoModel": "modeling_lamina.LaminaModel",
            "AutoModelForCausalLM": "modeling_lamina.LaminaForCausalLM",
        },
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": max(dense or [one.expert.hidden for one in mixtures] or [spec.width]),
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": _key_heads(attentions),
        "head_dim": first.head_dim,
        "max_position_embeddings": spec.context or 2048,
        "layer_types": kinds,
        "sliding_window": common,
        "attn_logit_softcapping": caps.pop() if len(caps) == 1 else None,
        "final_logit_softcapping": None if spec.head is None else spec.head.softcap,
        "logit_scale": 1.0 if spec.head is None else spec.head.scale,
        "tie_word_embeddings": spec.head is not None and spec.head.tied,
        "rotary_tables": [_table(rotary, size) for rotary, size in rotaries if rotary is not None],
        "rotary_of_layer": [
            None if one.rotary is None else rotaries.index((one.rotary, one.head_dim)) for one in attentions
        ],
        "spec": spec.to_dict(),
        **initial_config(spec),
        **special_config(spec.special),
    }
    if mixtures:
        router = the(TopKSpec, mixtures[0].router, "router")
        said |= {"num_experts": router.experts, "num_experts_per_tok": router.chosen}
        said |= {"moe_intermediate_size": mixtures[0].expert.hidden}
    return said


def window_of(pattern: Pattern, path: str) -> tuple[int | None, int]:
    """The width of a causal window, None without one, and how many first tokens are seen from beyond it."""
    if pattern == Causal():
        return None, 0
    local = pattern.second if isinstance(pattern, Both) and pattern.first == Causal() else None
    sinks = 0
    if isinstance(local, Either) and isinstance(local.second, Sinks):
        local, sinks = local.first, local.second.count
    if not isinstance(local, Window) or local.dilation != 1 or local.ahead is not None:
        need(False, f"{path}: the pattern", "is neither causal nor a causal window, with or without sinks")
    assert isinstance(local, Window)
    return local.back, sinks


def _said(spec: ModelSpec) -> list[AttentionSpec]:
    """The attention of each layer, of a spec that the module can say."""
    stack = the(StackSpec, spec.decoder, "decoder")
    for path, part in spec.walk():
        if isinstance(part, Pattern):
            continue
        allowed = ONLY.get(type(part))
        need(allowed is not None, path, f"is a {type(part).__name__}")
        for name, only in (allowed or {}).items():
            value = getattr(part, name)
            what = f"is a {type(value).__name__}" if isinstance(value, Spec) else f"is {value!r}, not {only!r}"
            need(value == only, f"{path}.{name}".removeprefix("."), what)
    found = []
    for i, layer in enumerate(stack.layers):
        inside = [part for _, part in layer.walk() if isinstance(part, AttentionSpec)]
        need(len(inside) == 1, f"decoder.layers.{i}", f"has {len(inside)} attentions, not one")
        found += inside
    need(bool(found), "decoder.layers", "is empty")
    need(stack.position is None or isinstance(stack.position, LearnedPositionSpec), "decoder.position", "is computed")
    return found


def _key_heads(attentions: list[AttentionSpec]) -> int:
    """The number that an engine with one number for all layers keeps: what each layer's can be copied to."""
    shared = math.lcm(*(one.key_heads for one in attentions))
    return shared if all(one.heads % shared == 0 for one in attentions) else attentions[0].key_heads


def _table(rotary: RotarySpec, size: int) -> dict[str, Any]:
    frequencies, scale = table(rotary, rotary.width or size)
    return {"frequencies": list(frequencies), "scale": scale, "interleaved": rotary.interleaved}


def _rules(spec: ModelSpec) -> tuple[Rule, ...]:
    """Names of the spec, below "model.", with projections called as everywhere; experts one by one."""
    rules: dict[str, Rule] = {}
    for ours, weight in spec.build(device="meta").named_parameters():
        theirs = OUTSIDE.get(ours) or f"model.{ours.removeprefix('decoder.')}"
        parts = theirs.split(".")
        if parts[-1] in ("weight", "bias") and parts[-2] in PROJECTIONS:
            theirs = ".".join([*parts[:-2], f"{parts[-2]}_proj", parts[-1]])
        theirs = re.sub(r"\.sink$", ".sinks", theirs)
        if ".op.experts." in ours:
            names = tuple(theirs.replace(".op.experts.", f".op.experts.{e}.") for e in range(len(weight)))
            rules[ours] = Rule(ours, names, Stacked())
            continue
        ours, theirs = (re.sub(r"layers\.\d+\.", "layers.{i}.", name, count=1) for name in (ours, theirs))
        rules[ours] = Rule(ours, theirs)
    return tuple(rules.values())


def code(spec: ModelSpec) -> dict[str, bytes]:
    """The files that run the folder in transformers."""
    folder = files("lamina.families").joinpath("remote")
    return {name: folder.joinpath(name.replace(".py", ".txt")).read_bytes() for name in CODE}


LAMINA = Family(
    model_type="lamina",
    spec=spec,
    config=config,
    heads=_rules,
    base="model.",
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    code=code,
)
