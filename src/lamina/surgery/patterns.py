"""Other patterns of attention over the same weights: windows, with sinks or with global tokens beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import AttentionSpec
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything, Global, Pattern, Sinks, Window
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import EVERYWHERE, edited, places
from lamina.surgery.weights import Made, Weights


@dataclass(frozen=True, kw_only=True)
class WindowOperation(Operation):
    """A token sees the last `back` tokens, itself among them; of a bidirectional one as many ahead.

    sinks: so many first tokens are always seen (arXiv:2309.17453). global_positions: tokens that see all that the
    old pattern lets them, and that all see (arXiv:2004.05150, section 3.1).
    """

    NAME = "window"

    back: int
    sinks: int = 0
    global_positions: tuple[int, ...] = ()
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.back < 1 or self.sinks < 0:
            raise LaminaError(f"back={self.back} must be at least 1, and sinks={self.sinks} at least 0")

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = places(spec, AttentionSpec, self.at)
        chosen = {place.path: self._pattern(place.shown, place.part.pattern) for place in found}

        def change(path: str, part: Spec) -> Spec:
            return part.replace(pattern=chosen[path]) if path in chosen else part

        why = f"the same for texts of up to {self.back} tokens"
        undo = (Restore(spec=spec.to_json()),)
        return Changed(edited(spec, change), weights, Promise("bounded", why, bits=False), undo)

    def _pattern(self, path: str, old: Pattern) -> Pattern:
        if isinstance(old, Causal):
            local: Pattern = Window(back=self.back)
        elif isinstance(old, Everything):
            local = Window(back=self.back, ahead=self.back - 1)
        else:
            raise LaminaError(
                f"{path} has the pattern {type(old).__name__}; a window takes the place of Causal or Everything"
            )
        if self.sinks:
            local = local | Sinks(count=self.sinks)
        if self.global_positions:
            local = local | Global(positions=self.global_positions)
        return Causal() & local if isinstance(old, Causal) else local


@dataclass(frozen=True, kw_only=True)
class Restore(Operation):
    """The spec as it was, where an operation left its weights alone but for what it added: weights that the spec has no
    place for go, and of those that grew at their ends the part stays that was there."""

    NAME = "restore"

    spec: str  # as JSON

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        old = ModelSpec.from_json(self.spec)
        now, then = (dict(one.build(device="meta").named_parameters()) for one in (spec, old))
        absent = [name for name in then if name not in weights and name not in now]  # others are new, now and then
        if absent:
            raise LaminaError(f"the spec to restore asks for {absent[0]}, which this model does not have")
        made = {
            name: Made((name,), "the part that was there", partial(_part, shape=tuple(then[name].shape)))
            for name in weights
            if name in then and name in now and now[name].shape != then[name].shape
        }
        gone = [name for name in weights if name not in then]
        if made or gone:
            why = "what was new goes with what it learned"
            return Changed(old, Weights(weights, made, gone), Promise("lossy", why))
        return Changed(old, weights, Promise("exact", "the model before", bits=True), (Restore(spec=spec.to_json()),))


def _part(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x[tuple(slice(size) for size in shape)].contiguous()
