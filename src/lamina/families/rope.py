"""Rotary positions in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.errors import CheckpointError
from lamina.families.family import Fields, the
from lamina.layers import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RotarySpec,
    YarnScaling,
)
from lamina.layers.rotary import Scaling


def rotary(fields: Fields, size: int, *, group: str | None = None, base: float = 10_000.0) -> RotarySpec:
    """The rotary spec of heads of `size` features. `group`: Gemma 3's layer type, each with its own parameters."""
    said = fields.config.get("rope_parameters")
    if isinstance(said, Mapping) and group is not None and group in said:
        said = said[group]
    said = dict(said) if isinstance(said, Mapping) else {}
    if group != "sliding_attention" and isinstance(fields.config.get("rope_scaling"), Mapping):
        said |= fields.config["rope_scaling"]
    old_base = "rope_local_base_freq" if group == "sliding_attention" else "rope_theta"
    said.setdefault("rope_theta", fields.number(old_base, base))
    said.setdefault("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    part = Fields(said, where=f"{fields.where}: rope_parameters")
    turned = int(size * part.number("partial_rotary_factor"))
    context = fields.count("max_position_embeddings", 2048)
    return RotarySpec(
        base=part.number("rope_theta"), width=None if turned == size else turned, scaling=_scaling(part, context)
    )


def _scaling(fields: Fields, context: int) -> Scaling | None:
    kind = fields.config.get("rope_type", fields.config.get("type", "default"))
    original = fields.count("original_max_position_embeddings", context)
    if kind in ("default", "mrope", None):
        return None
    if kind == "longrope":
        return LongRopeScaling(
            short=_list(fields, "short_factor"),
            long=_list(fields, "long_factor"),
            original=original,
            factor=fields.number("factor", context / original),
            attention=_optional(fields, "attention_factor"),
        )
    factor = fields.number("factor")
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "ntk":
        return NTKScaling(factor=factor)
    if kind == "dynamic":
        return DynamicNTKScaling(factor=factor, original=context)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return Llama3Scaling(factor=factor, low=low, high=high, original=original)
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original=original,
            beta_fast=fields.number("beta_fast", 32.0),
            beta_slow=fields.number("beta_slow", 1.0),
            attention=_optional(fields, "attention_factor"),
            scale=_optional(fields, "mscale"),
            scale_all=_optional(fields, "mscale_all_dim"),
            whole=fields.flag("truncate", True),
        )
    known = "default, linear, dynamic, yarn, longrope, llama3"
    raise CheckpointError(f"{fields.where}: rope_type is {kind!r}; known: {known}")


def rotary_config(spec: RotarySpec | None, size: int) -> dict[str, Any]:
    """The inverse of `rotary`, as transformers 5 writes it."""
    spec = the(RotarySpec, spec, "rotary")
    said: dict[str, Any] = {"rope_theta": spec.base, "rope_type": "default"}
    if spec.width is not None:
        said["partial_rotary_factor"] = spec.width / size
    scaling = spec.scaling
    if scaling is None:
        return said
    if isinstance(scaling, LinearScaling | DynamicNTKScaling):
        kind = "linear" if isinstance(scaling, LinearScaling) else "dynamic"
        return said | {"rope_type": kind, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        said |= {"rope_type": "llama3", "low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    elif isinstance(scaling, YarnScaling):
        said |= {"rope_type": "yarn", "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        optional = {"attention_factor": scaling.attention, "mscale": scaling.scale, "mscale_all_dim": scaling.scale_all}
        said |= {name: value for name, value in optional.items() if value is not None}
        said |= {} if scaling.whole else {"truncate": False}
    elif isinstance(scaling, LongRopeScaling):
        said |= {"rope_type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        said |= {} if scaling.attention is None else {"attention_factor": scaling.attention}
    else:
        raise CheckpointError(f"rotary.scaling is {type(scaling).__name__}; Hugging Face has no word for it")
    return said | {"factor": scaling.factor, "original_max_position_embeddings": scaling.original}


def _optional(fields: Fields, name: str) -> float | None:
    return fields.number(name) if name in fields else None


def _list(fields: Fields, name: str) -> tuple[float, ...]:
    values = fields.config.get(name)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise CheckpointError(f"{fields.where}: {name} must be a list of numbers")
    return tuple(float(value) for value in values)
