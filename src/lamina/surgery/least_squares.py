"""Fewer key heads that lose least on a text: each is a linear map of those beside it, and what reads it maps back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor

from lamina.layers import AttentionSpec, LayerNormSpec
from lamina.surgery.calibration import Calibration
from lamina.surgery.fitting import lost, one_key, one_normed_key, root_of
from lamina.surgery.moments import Attending, check_fit, moments, named
from lamina.surgery.places import Place
from lamina.surgery.weights import Made


def least_squares(
    place: Place[Attending],
    weights: Mapping[str, Tensor],
    calibration: Calibration,
    heads: int,
    fits: dict[str, float],
) -> dict[str, Made]:
    """The projections of an attention with `heads` key heads, each the best one on a text for those beside it."""
    part = place.part
    check_fit(place, normed=True)
    norm = part.qk_norm
    rotary = part.rotary if isinstance(part, AttentionSpec) else None

    @lru_cache(maxsize=1)
    def maps() -> dict[str, Tensor]:
        """Of k and v (heads, D, s, D), of q and o (G, D, D): what becomes of the features of each old head."""
        seen = moments(place, weights, calibration)
        size = part.key_heads // heads
        spans = [slice(start, start + size) for start in range(0, part.key_heads, size)]
        key = [
            one_key(seen.key[span][:, :, span], seen.query[span], rotary)
            if norm is None
            else one_normed_key(seen.key[span][:, :, span], centred=isinstance(norm, LayerNormSpec))
            for span in spans
        ]
        value = [one_key(seen.value[span][:, :, span], seen.output[span], None) for span in spans]
        fits[place.shown] = _error(
            (gram[span][:, :, span].flatten(2).flatten(0, 1), read[span], *maps)
            for gram, read, found in ((seen.key, seen.query, key), (seen.value, seen.output, value))
            for span, maps in zip(spans, found, strict=True)
        )
        down = [torch.stack([one for one, _ in found]) for found in (key, value)]
        up = [torch.cat([one for _, one in found]) for found in (key, value)]
        return dict(zip("kvqo", (*down, *up), strict=True))

    def joined(x: Tensor, one: str) -> Tensor:
        old = x.double().unflatten(0, (heads, -1, part.head_dim))
        return torch.einsum("gnsd,gsd...->gn...", maps()[one], old).flatten(0, 1).to(x.dtype)

    def queries(x: Tensor) -> Tensor:
        old = x.double().unflatten(0, (part.key_heads, -1, part.head_dim))
        return torch.einsum("gdn,ghd...->ghn...", maps()["q"], old).flatten(0, 2).to(x.dtype)

    def outputs(x: Tensor) -> Tensor:
        old = x.double().unflatten(1, (part.key_heads, -1, part.head_dim))
        return torch.einsum("gdn,wghd->wghn", maps()["o"], old).flatten(1).to(x.dtype)

    how, turned = f"least squares of {part.key_heads // heads} heads", "turned to the new key heads"
    made = {name: Made((name,), how, partial(joined, one=one)) for one in "kv" for name in named(place, weights, one)}
    if norm is None:
        made |= {name: Made((name,), turned, queries) for name in named(place, weights, "q")}
    made[place.weight("o.weight")] = Made((place.weight("o.weight"),), turned, outputs)
    return made


def _error(fits: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
    """Of several (gram, what reads it, down, up): the root of what is lost by all that there is."""
    found = [
        lost(gram, torch.block_diag(*root_of(read)), down.flatten(1), up.flatten(0, 1)) for gram, read, down, up in fits
    ]
    return math.sqrt(max(sum(one for one, _ in found), 0.0) / max(sum(all for _, all in found), 1e-300))
