"""Latent attention (MLA, arXiv:2405.04434, section 2.1) as multi-head attention: the way back of `latent`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import UnsupportedError
from lamina.layers import AttentionSpec, LatentAttentionSpec
from lamina.layers.latent import scale_of
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights


@dataclass(frozen=True, kw_only=True)
class MultiHead(Operation):
    """Keys and values of each head for themselves, in place of the small vector that they come from.

    The map to that vector and the one from it are one matrix, W_UK,h W_DKV, and each head has a copy of the key that
    turns, before its other features. Where values are narrower than that, or wider, zeros fill up what lacks. A cache
    keeps 2 H D numbers a token where it kept key_rank + rope_dim.
    """

    NAME = "multi_head"

    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in places(spec, LatentAttentionSpec, self.at):
            if place.part.norm is not None:
                raise UnsupportedError(
                    f"{place.shown}: a norm stands between the maps to the small vector and from it, which so are no"
                    " one matrix"
                )
            made |= _made(place, weights)
            gone += [name for name in weights if name.startswith((place.weight("kv_down."), place.weight("q_down.")))]
        promise = Promise("exact", "the maps to the small vector and from it are multiplied out")
        return Changed(written_out(spec, self.at), Weights(weights, made, gone), promise)


def written_out(spec: ModelSpec, at: tuple[str, ...] = EVERYWHERE) -> ModelSpec:
    """The spec with multi-head attention in place of latent attention."""
    chosen = {place.path for place in places(spec, LatentAttentionSpec, at)}

    def change(path: str, part: Spec) -> Spec:
        return multi_head(part) if path in chosen and isinstance(part, LatentAttentionSpec) else part

    return edited(spec, change)


def multi_head(part: LatentAttentionSpec) -> AttentionSpec:
    """The multi-head attention that a latent one is."""
    size, rotary, scale = _size(part), part.rotary, scale_of(part)
    if rotary is not None:
        turned = rotary.width or part.rope_dim
        rotary = rotary.replace(width=None if turned == size else turned)
    return AttentionSpec(
        heads=part.heads,
        key_heads=part.heads,
        head_dim=size,
        pattern=part.pattern,
        rotary=rotary,
        scale=None if scale == size**-0.5 else scale,
        bias="all" if part.bias else "none",
        dropout=part.dropout,
    )


def _size(part: LatentAttentionSpec) -> int:
    return max(part.nope_dim + part.rope_dim, part.value_dim)


def _made(place: Place[LatentAttentionSpec], weights: Mapping[str, Tensor]) -> dict[str, Made]:
    part, size = place.part, _size(place.part)
    nope, rank = part.nope_dim, part.key_rank
    q, k, v, o = (place.weight(f"{one}.weight") for one in "qkvo")
    down, q_down = place.weight("kv_down.weight"), place.weight("q_down.weight")

    def queries(x: Tensor, *small: Tensor) -> Tensor:
        """(H (nope + rope), ...) -> (H D, ...), what turns first."""
        heads = (x @ small[0] if small else x).unflatten(0, (part.heads, -1))
        return _filled(torch.cat([heads[:, nope:], heads[:, :nope]], dim=1), size)

    def keys(up: Tensor, small: Tensor) -> Tensor:
        own = (up @ small[:rank]).unflatten(0, (part.heads, -1))
        return _filled(torch.cat([small[rank:].expand(part.heads, *small[rank:].shape), own], dim=1), size)

    def values(up: Tensor, small: Tensor) -> Tensor:
        return _filled((up @ small[:rank]).unflatten(0, (part.heads, -1)), size)

    def outputs(x: Tensor) -> Tensor:
        return _filled(x.T.unflatten(0, (part.heads, -1)), size).T

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(part.heads * size)

    how = "multiplied out"
    through = [] if part.query_rank is None else [q_down]
    made = {
        q: Made((q, *through), how, _wide(queries)),
        k: Made((k, down), how, _wide(keys)),
        v: Made((v, down), how, _wide(values)),
    }
    if size != part.value_dim:
        made[o] = Made((o,), "zeros where there are no values", _wide(outputs))
    if part.bias:
        bias, own = place.weight("kv_down.bias"), place.weight("q_down.bias")
        made |= {
            place.weight("q.bias"): Made((q, own), how, _wide(queries)) if through else Made((q,), "zeros", nothing),
            place.weight("k.bias"): Made((k, bias), how, _wide(keys)),
            place.weight("v.bias"): Made((v, bias), how, _wide(values)),
        }
    return made


def _filled(heads: Tensor, size: int) -> Tensor:
    """(H, d, ...) -> (H size, ...), zeros behind the features of each head."""
    behind = (0, 0) * (heads.dim() - 2) + (0, size - heads.shape[1])
    return F.pad(heads, behind).flatten(0, 1)


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` in float64, its result in the type of what it is made of first."""
    return lambda first, *more: function(first.double(), *(x.double() for x in more)).to(first.dtype).contiguous()
