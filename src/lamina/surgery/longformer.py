"""Longformer's recipe: an encoder that sees everything becomes one of windows and global tokens, over longer texts
(arXiv:2004.05150, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, LearnedPositionSpec, LongformerSpec, StackSpec
from lamina.marks import AfterToken, BeforeToken, FirstToken
from lamina.model import ModelSpec
from lamina.patterns import Everything
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.patterns import Restore
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights

PLAIN = ("rotary", "relative", "scale", "softcap", "qk_norm", "sink")
"""Fields of an attention that Longformer's has none of."""


@dataclass(frozen=True, kw_only=True)
class LongformerOperation(Operation):
    """A token sees `window` tokens on each side and the marked ones; those have projections of their own, which begin
    as copies. With `context`, learned positions are tiled to so many: position p begins as p modulo the old number.

    Where the caller marks no tokens, it is what the published models mark: the first one to classify a sequence, the
    question to answer it, the choice among choices.
    """

    NAME = "longformer"

    window: int  # on each side: 256 in the published models, whose files say 512
    context: int | None = None  # 4096 there; None: positions stay
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.window < 1 or (self.context is not None and self.context < 1):
            raise LaminaError(f"window={self.window} and context={self.context} must be at least 1")

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = places(spec, AttentionSpec, self.at)
        chosen: dict[str, LongformerSpec] = {}
        made: dict[str, Made] = {}
        for place in found:
            chosen[place.path] = self._sparse(spec, place)
            for part in "qkv":
                for kind in ("weight", "bias"):
                    name = place.weight(f"{part}.{kind}")
                    if name in weights:
                        made[place.weight(f"global_{part}.{kind}")] = Made((name,), "a copy", _same)
        tiled: dict[str, LearnedPositionSpec] = {}
        for stack in places(spec, StackSpec):
            position = stack.part.position
            inside = any(place.path.startswith(f"{stack.path}.") for place in found)
            if self.context is not None and inside:
                if not isinstance(position, LearnedPositionSpec) or position.size > self.context:
                    what = "has no learned positions" if position is None else f"has {position}"
                    raise LaminaError(f"context={self.context}: {stack.path} {what}; it can only get more of them")
                path = f"{stack.path}.position"
                tiled[path] = position.replace(size=self.context)
                tile = partial(_tiled, old=position, size=self.context)
                made[f"{path}.weight"] = Made((f"{path}.weight",), f"tiled to {self.context} positions", tile)

        def change(path: str, part: Spec) -> Spec:
            return chosen.get(path) or tiled.get(path) or part

        new = edited(spec, change).replace(marks=spec.marks or marks(spec))
        if self.context is not None and not spec.two_stacks:
            new = new.replace(context=self.context)
        why = f"the same for texts of up to {self.window + 1} tokens"
        undo = (Restore(spec=spec.to_json()),)
        return Changed(new, Weights(weights, made), Promise("bounded", why), undo)

    def _sparse(self, spec: ModelSpec, place: Place[AttentionSpec]) -> LongformerSpec:
        part = place.part
        if not isinstance(part.pattern, Everything):
            kind = type(part.pattern).__name__
            raise LaminaError(f"{place.shown} has the pattern {kind}; Longformer takes the place of Everything")
        for name in PLAIN:
            if getattr(part, name) not in (None, False):
                raise UnsupportedError(f"{place.shown}: Longformer's attention has no {name}")
        if part.key_heads != part.heads or part.bias not in ("all", "none"):
            raise UnsupportedError(
                f"{place.shown}: Longformer's attention has as many key heads as heads, and biases on all or none;"
                f" this has {part.key_heads} of {part.heads}, and bias {part.bias!r}"
            )
        stack = next(one for one in places(spec, StackSpec) if place.path.startswith(f"{one.path}."))
        if stack.part.score_bias is not None:
            raise UnsupportedError(f"{place.shown}: Longformer's attention does not read {stack.path}.score_bias")
        return LongformerSpec(
            heads=part.heads,
            head_dim=part.head_dim,
            window=self.window,
            bias=part.bias == "all",
            dropout=part.dropout,
        )


def marks(spec: ModelSpec) -> FirstToken | BeforeToken | AfterToken | None:
    """Which tokens are global where the caller does not say it."""
    task = None if spec.labels is None else spec.labels.task
    if task == "sequence":
        return FirstToken()
    rule = {"span": BeforeToken, "choice": AfterToken}.get(task or "")
    return None if rule is None or not spec.special.end else rule(id=spec.special.end[0])


def _same(x: Tensor) -> Tensor:
    return x.clone()


def _tiled(x: Tensor, old: LearnedPositionSpec, size: int) -> Tensor:
    """Rows before position 0 stay; the others begin anew after the last one."""
    row = torch.arange(size) % old.size + old.offset
    return torch.cat([x[: old.offset], x[row]])
