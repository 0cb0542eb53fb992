"""Fewer or more key heads: MHA to GQA or MQA and back (arXiv:2305.13245, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, CrossAttentionSpec, StackSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.calibration import Calibration, Texts, check_text
from lamina.surgery.least_squares import least_squares
from lamina.surgery.moments import Attending, named
from lamina.surgery.operation import Changed, FittedOperation, Operation, Promise
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights, in_float32


@dataclass(frozen=True, kw_only=True)
class KeyHeads(FittedOperation):
    """Attention with `heads` key heads.

    Fewer: each new head stands for several old ones. "mean": of those beside each other, as published. "first": the
    first of them. "similar": the mean of those that are most alike, for which query heads change places first, which
    changes nothing. "least_squares": the linear maps of those beside each other that lose least of scores and values on
    a text, with the inverse maps in q and o (`fitting`). More: each old head is copied, which changes nothing.
    """

    NAME = "key_heads"

    heads: int
    by: Literal["mean", "first", "similar", "least_squares"] = "mean"
    text: str | None = None  # the file that "least_squares" fits to; None: the packaged sample
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.heads < 1:
            raise LaminaError(f"heads is {self.heads}; it must be at least 1")
        if self.text is not None and self.by != "least_squares":
            raise LaminaError(f"text is for by: least_squares, and not for by: {self.by}")

    def fit(self, spec: ModelSpec, weights: Mapping[str, Tensor], texts: Texts) -> Changed:
        found = places(spec, (AttentionSpec, CrossAttentionSpec), self.at)
        made: dict[str, Made] = {}
        if self.by == "least_squares":
            check_text(spec, self.text)
        calibration = Calibration(spec, weights, lambda: texts(self.text), [place.path for place in found])
        fits: dict[str, float] = {}
        for place in found:
            _check(place, self.heads)
            if self.by == "least_squares" and place.part.key_heads > self.heads:
                made |= least_squares(place, weights, calibration, self.heads, fits)
            elif self.by == "similar" and place.part.key_heads > self.heads:
                made |= self._regrouped(spec, place, weights)
            else:
                made |= self._beside(place, weights)
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            return part.replace(key_heads=self.heads) if path in chosen else part

        before = {place.part.key_heads for place in found}
        fewer = any(count > self.heads for count in before)
        promise = (
            Promise("lossy", "each key head stands for several that may differ")
            if fewer
            else Promise("exact", "each key head is a copy of the one that its queries read", bits=True)
        )
        undo = None if fewer or len(before) > 1 else (KeyHeads(heads=before.pop(), by="first", at=self.at),)
        return Changed(edited(spec, change), Weights(weights, made), promise, undo, fits)

    def _beside(self, place: Place[Attending], weights: Mapping[str, Tensor]) -> dict[str, Made]:
        old, new = place.part.key_heads, self.heads
        if old == new:
            return {}
        if old > new:
            how = f"{self.by} of {old // new} heads"
            function = in_float32(partial(_pooled, count=new, size=old // new, first=self.by == "first"))
        else:
            how, function = f"each head {new // old} times", partial(_spread, count=old, times=new // old)
        return {name: Made((name,), how, function) for name in named(place, weights, "kv")}

    def _regrouped(self, spec: ModelSpec, place: Place[Attending], weights: Mapping[str, Tensor]) -> dict[str, Made]:
        part = place.part
        _check_moves(spec, place)
        size, each = part.key_heads // self.heads, part.heads // part.key_heads

        @lru_cache(maxsize=1)
        def order() -> Tensor:
            """Key heads (G,), those that are alike beside each other."""
            parts = [weights[place.weight(f"{one}.weight")].float() for one in "kv"]
            flat = [F.normalize(one.unflatten(0, (part.key_heads, -1)).flatten(1), dim=1) for one in parts]
            return alike(sum(one @ one.T for one in flat) / 2, size)  # pyright: ignore[reportArgumentType]

        def keys(x: Tensor) -> Tensor:
            return _pooled(_taken(x, order(), part.key_heads, 0), count=self.heads, size=size, first=False)

        def queries(x: Tensor, dim: int) -> Tensor:
            heads = (order()[:, None] * each + torch.arange(each)).flatten()
            return _taken(x, heads, part.heads, dim)

        how = f"mean of {size} heads that are alike"
        made = {name: Made((name,), how, in_float32(keys)) for name in named(place, weights, "kv")}
        moved = "query heads beside those that are alike"
        made |= {name: Made((name,), moved, partial(queries, dim=0)) for name in named(place, weights, "q")}
        made[place.weight("o.weight")] = Made((place.weight("o.weight"),), moved, partial(queries, dim=1))
        return made


@dataclass(frozen=True, kw_only=True)
class OrderHeads(Operation):
    """Query heads in another order, or only some of them: `keep` says which, by number, key heads going with theirs.

    A whole group of query heads may go with its key head; of the others each group keeps as many.
    """

    NAME = "heads"

    keep: tuple[int, ...]
    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = places(spec, (AttentionSpec, CrossAttentionSpec), self.at)
        made: dict[str, Made] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for place in found:
            groups = self._groups(place)
            _check_moves(spec, place)
            sizes[place.path] = len(self.keep), len(groups)
            changes: list[tuple[str, Callable[[Tensor], Tensor]]] = []
            query = partial(_taken, heads=torch.tensor(self.keep), count=place.part.heads)
            key = partial(_taken, heads=torch.tensor(groups), count=place.part.key_heads)
            changes += [(name, partial(query, dim=0)) for name in named(place, weights, "q")]
            changes += [(name, partial(key, dim=0)) for name in named(place, weights, "kv")]
            changes += [(place.weight("o.weight"), partial(query, dim=1))]
            if place.weight("sink") in weights:
                changes += [(place.weight("sink"), partial(query, dim=0))]
            made |= {name: Made((name,), "heads chosen", function) for name, function in changes}

        def change(path: str, part: Spec) -> Spec:
            if path not in sizes:
                return part
            return part.replace(heads=sizes[path][0], key_heads=sizes[path][1])

        whole = all(sorted(self.keep) == list(range(place.part.heads)) for place in found)
        promise = Promise("exact", "all heads are there, in another order") if whole else Promise("lossy", "heads go")
        back = tuple(self.keep.index(i) for i in range(len(self.keep))) if whole else ()
        undo = (OrderHeads(keep=back, at=self.at),) if whole else None
        return Changed(edited(spec, change), Weights(weights, made), promise, undo)

    def _groups(self, place: Place[Attending]) -> list[int]:
        """The key heads, in their new order. Raises LaminaError where `keep` tears them apart."""
        heads, each = place.part.heads, place.part.heads // place.part.key_heads
        if not self.keep or len(set(self.keep)) < len(self.keep) or not 0 <= min(self.keep) <= max(self.keep) < heads:
            raise LaminaError(f"{place.shown}: keep={list(self.keep)} must name heads from 0 to {heads - 1}, each once")
        groups = list(dict.fromkeys(head // each for head in self.keep))
        width = len(self.keep) // len(groups)
        expected = [group for group in groups for _ in range(width)]
        if [head // each for head in self.keep] != expected:
            raise LaminaError(
                f"{place.shown}: keep={list(self.keep)} must hold equally many of the {each} query heads of each key"
                " head, beside each other"
            )
        return groups


def alike(similarity: Tensor, size: int) -> Tensor:
    """(G, G), how alike heads are -> (G,), their order in groups of `size`: the pair that is most alike begins a group,
    and what is most alike to all in it joins, until it is full."""
    left, order = list(range(len(similarity))), []
    while left:
        inner = similarity[left][:, left].clone().fill_diagonal_(-torch.inf)
        first = left[int(inner.max(dim=1).values.argmax())] if size > 1 and len(left) > 1 else left[0]
        group = [first]
        left.remove(first)
        while len(group) < size:
            nearest = max(left, key=lambda one: float(similarity[group, one].sum()))
            group.append(nearest)
            left.remove(nearest)
        order += group
    return torch.tensor(order)


def _check(place: Place[Attending], new: int) -> None:
    heads, old = place.part.heads, place.part.key_heads
    if heads % new or max(old, new) % min(old, new):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and max(old, n) % min(old, n) == 0]
        raise LaminaError(
            f"heads={new} does not fit {place.shown} of {heads} query and {old} key heads; {fitting} would"
        )


def _check_moves(spec: ModelSpec, place: Place[Attending]) -> None:
    """Raise UnsupportedError where something beside the projections belongs to single heads."""
    if isinstance(place.part, AttentionSpec) and place.part.relative is not None:
        raise UnsupportedError(f"{place.shown}: its relative terms belong to its heads, which cannot change places")
    stack = next(one for one in places(spec, StackSpec) if place.path.startswith(f"{one.path}."))
    if stack.part.score_bias is not None:
        raise UnsupportedError(
            f"{place.shown}: {stack.path}.score_bias belongs to its heads, which cannot change places"
        )


def _pooled(x: Tensor, count: int, size: int, first: bool) -> Tensor:
    heads = x.unflatten(0, (count, size, -1))
    return (heads[:, 0] if first else heads.mean(dim=1)).flatten(0, 1)


def _spread(x: Tensor, count: int, times: int) -> Tensor:
    return x.unflatten(0, (count, -1)).repeat_interleave(times, dim=0).flatten(0, 1)


def _taken(x: Tensor, heads: Tensor, count: int, dim: int) -> Tensor:
    """Heads of x along `dim`, where `count` of them lie."""
    return x.unflatten(dim, (count, -1)).index_select(dim, heads.to(x.device)).flatten(dim, dim + 1)
