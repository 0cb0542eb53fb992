"""Attention with any number of key heads as latent attention (MLA, arXiv:2405.04434), by low rank (TransMLA,
arXiv:2502.07864; MHA2MLA, arXiv:2502.14837).

Keys and values of all heads, as one vector f of 2 G D features, become U c with c = D f of `rank` features (`fitting`).
Where keys turn, a cache can keep only what turns alike for all heads: the best single key (`one_key`), which is the
principal component of TransMLA's rotated heads. What is left of the keys, e, no longer turns: of the score of two
tokens a distance d apart, Re(conj(q) e exp(i w d)), it keeps Re(conj(q) e m) with m the mean of exp(i w d) over pairs
of tokens that are near: the constant in place of the phase that errs least there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, LatentAttentionSpec
from lamina.layers.rotary import table
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.calibration import Calibration, Texts, check_text
from lamina.surgery.fitting import lost, one_key, pairs, principal, root_of
from lamina.surgery.heads import KeyHeads
from lamina.surgery.moments import affine, check_fit
from lamina.surgery.multi_head import MultiHead, written_out
from lamina.surgery.operation import Changed, FittedOperation, Operation, Promise
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights

NEAR = 32
"""The text whose pairs of tokens count as near. SmolLM2-135M with a latent of 320: KL 0.16 nats, 0.23 with the phase of
one place (TransMLA), 0.36 with the mean over 512 tokens."""
UNSEEN = 1e-8
"""What a direction that the text does not show counts, as a part of the mean one."""


@dataclass(frozen=True, kw_only=True)
class LatentOperation(FittedOperation):
    """Latent attention in place of attention: a cache keeps `rank` numbers a token, and a key that turns where one did.

    Exact where `rank` is as many features as keys and values have, or the layer reads, and nothing turns or there is
    one key head. Queries with a bias come from a small vector of their own, which is as large as they are. What
    is exact and does not turn leads back by `multi_head`, but for rounding.
    """

    NAME = "latent"

    rank: int
    text: str | None = None  # the file that it is fitted to; None: the packaged sample
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.rank < 1:
            raise LaminaError(f"rank is {self.rank}; it must be at least 1")

    def fit(self, spec: ModelSpec, weights: Mapping[str, Tensor], texts: Texts) -> Changed:
        found = places(spec, AttentionSpec, self.at)
        check_text(spec, self.text)
        calibration = Calibration(spec, weights, lambda: texts(self.text), [place.path for place in found])
        made: dict[str, Made] = {}
        gone: list[str] = []
        fits: dict[str, float] = {}
        exact = True
        for place in found:
            part = place.part
            check_fit(place)
            for name in ("softcap", "sink"):
                if getattr(part, name):
                    raise UnsupportedError(f"{place.shown}: latent attention has no {name}")
            most = 2 * part.key_heads * part.head_dim
            if self.rank > most:
                raise LaminaError(f"rank={self.rank} at {place.shown}: its keys and values have {most} features")
            exact &= self.rank >= min(whole(part), spec.width + (part.bias != "none"))
            exact &= part.rotary is None or part.key_heads == 1
            made |= _made(place, weights, calibration, self.rank, fits)
            gone += [name for one in "qkv" if (name := place.weight(f"{one}.bias")) in weights]
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            return latent(part, self.rank) if path in chosen and isinstance(part, AttentionSpec) else part

        promise = (
            Promise("exact", "all that keys and values hold is kept")
            if exact
            else Promise("lossy", f"of keys and values {self.rank} features are kept, and one key turns for all heads")
            if any(place.part.rotary is not None for place in found)
            else Promise("lossy", f"of keys and values {self.rank} features are kept")
        )
        new = edited(spec, change)
        undo = self._undo(spec, new, {place.part.key_heads for place in found}) if exact else None
        return Changed(new, Weights(weights, made, gone), promise, undo, fits)

    def _undo(self, old: ModelSpec, new: ModelSpec, key_heads: set[int]) -> tuple[Operation, ...] | None:
        """Multi-head attention again, of each group of equal key heads the first; None where that is another spec."""
        if len(key_heads) > 1:
            return None
        heads = key_heads.pop()
        chosen = {place.path for place in places(old, AttentionSpec, self.at)}

        def grouped(path: str, part: Spec) -> Spec:
            return part.replace(key_heads=heads) if path in chosen and isinstance(part, AttentionSpec) else part

        back = written_out(new, self.at)
        if edited(back, grouped) != old:
            return None
        fewer = () if back == old else (KeyHeads(heads=heads, by="first", at=self.at),)
        return MultiHead(at=self.at), *fewer


def latent(part: AttentionSpec, rank: int) -> LatentAttentionSpec:
    """The latent attention that an attention becomes."""
    turned = 0 if part.rotary is None else part.rotary.width or part.head_dim
    return LatentAttentionSpec(
        heads=part.heads,
        query_rank=part.heads * part.head_dim if part.bias != "none" else None,
        key_rank=rank,
        nope_dim=part.head_dim,
        rope_dim=turned,
        value_dim=part.head_dim,
        rotary=None if part.rotary is None else part.rotary.replace(width=None),
        pattern=part.pattern,
        norm=None,
        scale=part.head_dim**-0.5 if part.scale is None else part.scale,
        bias=part.bias != "none",
        dropout=part.dropout,
    )


def whole(part: AttentionSpec) -> int:
    """The features of keys and values together, but for the key that turns."""
    turned = 0 if part.rotary is None else part.rotary.width or part.head_dim
    return 2 * part.key_heads * part.head_dim - turned


def standstill(part: AttentionSpec, length: int = NEAR) -> Tensor:
    """(P,) complex: the mean of exp(i w d) over all pairs of tokens of a text that see each other, times what phases
    are scaled by in queries and keys."""
    assert part.rotary is not None
    values, scale = table(part.rotary, part.rotary.width or part.head_dim)
    distance = -torch.arange(length, dtype=torch.float64)  # of the key from the query
    share = length + distance
    ahead = part.pattern.looks_ahead()
    if ahead:  # as many pairs the other way round
        share[1:] *= 2
    share = share * scale**2 / share.sum()
    phase = torch.outer(torch.tensor(values, dtype=torch.float64), distance)
    return torch.complex(phase.cos() @ share, 0 * phase.sin() @ share if ahead else phase.sin() @ share)


def _made(
    place: Place[AttentionSpec],
    weights: Mapping[str, Tensor],
    calibration: Calibration,
    rank: int,
    fits: dict[str, float],
) -> dict[str, Made]:
    part = place.part
    heads, size, each = part.key_heads, part.head_dim, part.heads // part.key_heads
    a, b, _ = pairs(part.rotary, size)
    turned = 2 * len(a)

    @lru_cache(maxsize=1)
    def maps() -> dict[str, Tensor]:
        """down: of keys and values (rank + turned, in + 1); k, v: (G, D, rank); q: (G, D + turned, D)."""
        seen = calibration(place.path)
        seen = seen + UNSEEN * seen.diagonal().mean() * torch.eye(len(seen), dtype=seen.dtype)
        key, value, query = (affine(place, weights, one) for one in "kvq")
        query = query.unflatten(0, (heads, each, size))
        read = (query @ seen @ query.mT).sum(dim=1)  # (G, D, D)
        output = weights[place.weight("o.weight")].double().unflatten(1, (heads, each, size))
        use = torch.einsum("wghd,wghe->gde", output, output)
        still, turns = torch.eye(size, dtype=seen.dtype).repeat(heads, 1, 1), seen.new_zeros(heads, turned, size)
        shared, phases = key[:0], 0.0
        all_of_it = _energy(key, seen, read) + _energy(value, seen, use)
        if turned:
            gram = (key @ seen @ key.T).unflatten(0, (heads, size)).unflatten(2, (heads, size))
            down, up = one_key(gram, read, part.rotary)
            down, up = down[:turned].flatten(1), up[..., :turned]
            shared = down @ key
            key = key - up.flatten(0, 1) @ shared
            turns = up.mT
            mean = standstill(part)
            phases = _phases(key, seen, read, mean, a, b)
            still[:, a, a], still[:, a, b] = mean.real, mean.imag  # q conj(m)
            still[:, b, a], still[:, b, b] = -mean.imag, mean.real
        both = torch.cat([key, value])
        root = torch.block_diag(*root_of(still @ read @ still.mT), *root_of(use))
        gram = both @ seen @ both.T
        down, up = principal(gram, root, rank)
        fits[place.shown] = math.sqrt(max(phases + lost(gram, root, down, up)[0], 0.0) / max(all_of_it, 1e-300))
        own = up.unflatten(0, (2, heads, size))
        query_map = torch.cat([still, turns], dim=1)
        return {"down": torch.cat([down @ both, shared]), "k": own[0], "v": own[1], "q": query_map}

    def by_head(_: Tensor, one: str) -> Tensor:
        return maps()[one].repeat_interleave(each, dim=0).flatten(0, 1)

    def queries(x: Tensor) -> Tensor:
        old = x.double().unflatten(0, (heads, each, size))
        return torch.einsum("gnd,ghd...->ghn...", maps()["q"], old).flatten(0, 2)

    def spread(_: Tensor) -> Tensor:
        return torch.block_diag(*maps()["q"].repeat_interleave(each, dim=0))

    names = {one: place.weight(f"{one}.weight") for one in ("q", "k", "v", "kv_down", "q_down")}
    how = f"{rank} features of keys and values"
    functions: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
        "k": (how, names["k"], partial(by_head, one="k")),
        "v": (how, names["v"], partial(by_head, one="v")),
        "kv_down": (how, names["k"], lambda _: maps()["down"][:, :-1]),
        "q": ("turned to the small vector", names["q"], spread if part.bias != "none" else queries),
    }
    made = {names[new]: Made((old,), said, _typed(function)) for new, (said, old, function) in functions.items()}
    if part.bias != "none":
        bias, out = place.weight("q.bias"), place.weight("o.bias")
        made[names["q_down"]] = Made((names["q"],), "the queries", lambda x: x)
        made[place.weight("q_down.bias")] = Made((bias,), "the queries", lambda x: x)
        made[place.weight("kv_down.bias")] = Made((bias,), how, _typed(lambda _: maps()["down"][:, -1]))
        if out not in weights:
            width = calibration.spec.width
            made[out] = Made((bias,), "zeros", lambda x: x.new_zeros(width))
    return made


def _energy(features: Tensor, seen: Tensor, read: Tensor) -> float:
    """E f^T R f over the heads."""
    heads = features.unflatten(0, (len(read), -1))
    return float((heads @ seen @ heads.mT * read).sum())


def _phases(key: Tensor, seen: Tensor, read: Tensor, mean: Tensor, a: Tensor, b: Tensor) -> float:
    """What a constant in place of its phase loses of what no longer turns: E |exp(i w d) - m|^2 = 1 - |m|^2, pair by
    pair, times the energies of keys and queries."""
    heads = key.unflatten(0, (len(read), -1))
    own, used = (one.diagonal(dim1=1, dim2=2) for one in (heads @ seen @ heads.mT, read))
    energy = (own[:, a] + own[:, b]) * (used[:, a] + used[:, b]) / 2
    return float((energy * (1 - mean.abs().square()).clamp(min=0)).sum())


def _typed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Its result in the type of what it is made of."""
    return lambda x: function(x).to(x.dtype).contiguous()
