"""What the heads of an attention hold and what reads them, on a text: second moments of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import UnsupportedError
from lamina.layers import AttentionSpec, CrossAttentionSpec
from lamina.surgery.calibration import Calibration
from lamina.surgery.places import Place

Attending = AttentionSpec | CrossAttentionSpec


@dataclass(frozen=True)
class Moments:
    """In float64, G key heads of D features; biases count."""

    key: Tensor  # (G, D, G, D)
    value: Tensor  # (G, D, G, D)
    query: Tensor  # (G, D, D), of all queries that read a key head
    output: Tensor  # (G, D, D), of the columns of o that read its values


def moments(place: Place[Any], weights: Mapping[str, Tensor], calibration: Calibration) -> Moments:
    """Those of one attention, which is what reads its heads, too."""
    part = place.part
    own = calibration(place.path)
    read = own if isinstance(part, AttentionSpec) else calibration(f"{place.path}.memory")
    size = (part.key_heads, part.head_dim)
    key, value = (
        (w @ read @ w.T).unflatten(0, size).unflatten(2, size) for w in (affine(place, weights, one) for one in "kv")
    )
    query = affine(place, weights, "q").unflatten(0, (part.key_heads, -1, part.head_dim))
    output = weights[place.weight("o.weight")].double().unflatten(1, (part.key_heads, -1, part.head_dim))
    return Moments(key, value, (query @ own @ query.mT).sum(dim=1), torch.einsum("wghd,wghe->gde", output, output))


def check_fit(place: Place[Any], normed: bool = False) -> None:
    """Raise UnsupportedError where scores are no product of what the projections give; `normed`: or of its norms."""
    if place.part.relative is not None:
        raise UnsupportedError(f"{place.shown}: its relative lies between its projections and its scores")
    if place.part.qk_norm is not None and not normed:
        raise UnsupportedError(
            f"{place.shown}: its qk_norm lies between its projections and its scores: a normed key is no linear map"
            " of a small vector"
        )


def affine(place: Place[Any], weights: Mapping[str, Tensor], part: str) -> Tensor:
    """(out, in + 1): weight and bias."""
    weight, bias = weights[place.weight(f"{part}.weight")].double(), place.weight(f"{part}.bias")
    column = weights[bias].double()[:, None] if bias in weights else weight.new_zeros(len(weight), 1)
    return torch.cat([weight, column], dim=1)


def named(place: Place[Any], weights: Mapping[str, Tensor], parts: str) -> list[str]:
    """The names of the weights and biases of these projections, as far as there are any."""
    names = [place.weight(f"{part}.{kind}") for part in parts for kind in ("weight", "bias")]
    return [name for name in names if name in weights]
