"""Rotary positions for longer texts: scalings and other bases (arXiv:2309.00071); and in place of positions that are
added to the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, DifferentialSpec, LatentAttentionSpec, RotarySpec
from lamina.layers.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    YarnScaling,
)
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.patterns import Restore
from lamina.surgery.places import EVERYWHERE, Place, StackName, edited, places, stack_of
from lamina.surgery.weights import Weights

Turning = AttentionSpec | DifferentialSpec | LatentAttentionSpec


@dataclass(frozen=True, kw_only=True)
class RopeOperation(Operation):
    """Other frequencies for the rotary positions that are there, and the context that they are for.

    scaling: {kind: linear, ntk, dynamic, yarn, longrope or llama3, ...}, in place of what there is; None: that stays.
    NTK-aware scaling is another base, and is written as one. base: a new one; None: that stays. context: tokens that
    the model is to read; None: `factor` times what it was trained on, for "dynamic", whose frequencies grow with the
    text, and for a new base alone what it was.
    """

    NAME = "rope"

    scaling: LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | LongRopeScaling | Llama3Scaling | None = (
        None
    )
    base: float | None = None
    context: int | None = None
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.scaling is None and self.base is None:
            raise LaminaError("say scaling, base or both")
        if self.scaling is not None and self.scaling.factor < 1:
            raise LaminaError(f"scaling.factor is {self.scaling.factor}; it must be at least 1")
        if self.context is not None and self.context < 1:
            raise LaminaError(f"context is {self.context}; it must be at least 1")

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = [one for one in _turning(spec, self.at) if one[1].rotary is not None]
        if not found:
            raise LaminaError("no attention here has rotary positions (RotarySpec)")
        self._check_original(spec, [rotary for _, part in found if (rotary := part.rotary) is not None])
        chosen = {path for path, _ in found}

        def change(path: str, part: Spec) -> Spec:
            if path not in chosen or not isinstance(part, Turning) or part.rotary is None:
                return part
            return part.replace(rotary=self._new(part.rotary, _size(part)))

        new = edited(spec, change).replace(context=self._context(spec.context))
        return Changed(new, weights, self._promise(), (Restore(spec=spec.to_json()),))

    def _new(self, old: RotarySpec, size: int) -> RotarySpec:
        base = old.base if self.base is None else self.base
        if isinstance(self.scaling, NTKScaling):
            width = old.width or size
            if width < 4:
                raise UnsupportedError(f"NTK scaling is for heads that turn 4 features or more; these turn {width}")
            return old.replace(base=base * self.scaling.factor ** (width / (width - 2)), scaling=None)
        return old.replace(base=base, scaling=old.scaling if self.scaling is None else self.scaling)

    def _check_original(self, spec: ModelSpec, old: list[RotarySpec]) -> None:
        """`original` is what the model was trained on before a scaling: no more than it reads now."""
        original = getattr(self.scaling, "original", None)
        plain = all(rotary.scaling is None for rotary in old)
        if original is not None and spec.context is not None and plain and original > spec.context:
            raise LaminaError(
                f"scaling.original is {original}, and this model was trained on texts of {spec.context} tokens"
            )

    def _context(self, old: int | None) -> int | None:
        if self.context is not None or self.scaling is None or isinstance(self.scaling, DynamicNTKScaling):
            return old if self.context is None else self.context
        trained = getattr(self.scaling, "original", old)
        return None if trained is None else round(self.scaling.factor * trained)

    def _promise(self) -> Promise:
        scaling = self.scaling
        if self.base is not None or scaling is None:
            return Promise("lossy", "all pairs but the first turn at another speed")
        if scaling.factor == 1 and isinstance(scaling, LinearScaling | NTKScaling):
            return Promise("exact", "a factor of 1 changes no frequency", bits=True)
        if isinstance(scaling, DynamicNTKScaling):
            return Promise("bounded", f"the same for texts of up to {scaling.original} tokens")
        if isinstance(scaling, LongRopeScaling) and set(scaling.short) == {1.0} and scaling.attention == 1.0:
            return Promise("bounded", f"the same for texts of up to {scaling.original} tokens")
        kept = {
            LinearScaling: "every pair turns slower",
            NTKScaling: "all pairs but the first turn slower",
            YarnScaling: "slow pairs turn slower, and all scores are scaled",
            LongRopeScaling: "pairs turn slower, or all scores are scaled, below the original context too",
            Llama3Scaling: "slow pairs turn slower",
        }
        return Promise("lossy", kept[type(scaling)])


@dataclass(frozen=True, kw_only=True)
class RotaryPositions(Operation):
    """Rotary positions in the self-attention of a stack, in place of positions that are added to its input.

    The table of learned positions goes, and what the layers knew of it with it: training has to teach them anew. A text
    of one token is read as it was by a model whose first position is zero, since position 0 turns nothing.
    """

    NAME = "rotary"

    base: float = 10_000.0
    stack: StackName | None = None  # None: the only one

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        path, stack = stack_of(spec, self.stack)
        if stack.position is None:
            raise LaminaError(f"{path} adds no positions to its input (position is None)")
        rotary, inside = RotarySpec(base=self.base), f"{path}.layers."
        chosen = {place.path for place in places(spec, Spec) if place.path.startswith(inside) and _reads_itself(place)}

        def change(where: str, part: Spec) -> Spec:
            if where not in chosen:
                return part
            if not isinstance(part, AttentionSpec) or part.rotary is not None or part.relative is not None:
                raise UnsupportedError(
                    f"{where}: rotary positions are for an AttentionSpec without positions of its own"
                )
            return part.replace(rotary=rotary)

        new = edited(spec, change)
        new = new.replace(**{path: stack_of(new, path)[1].replace(position=None)})
        gone = [name for name in weights if name == f"{path}.position.weight"]
        what = "the table of positions goes" if gone else "positions are no longer added to the input"
        return Changed(new, Weights(weights, {}, gone), Promise("lossy", f"{what}; attention turns by them instead"))


def _reads_itself(place: Place[Spec]) -> bool:
    """Whether it is self-attention of the text, and not of neighbours that were found."""
    return hasattr(place.part, "pattern") and ".op.encoder." not in place.path


def _turning(spec: ModelSpec, at: tuple[str, ...]) -> list[tuple[str, Turning]]:
    return [
        (place.path, place.part) for place in places(spec, (AttentionSpec, DifferentialSpec, LatentAttentionSpec), at)
    ]


def _size(part: Turning) -> int:
    """Features of a head that may turn."""
    return part.rope_dim if isinstance(part, LatentAttentionSpec) else part.head_dim
