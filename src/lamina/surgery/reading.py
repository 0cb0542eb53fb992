"""The way a stack reads: a decoder in both directions (LLM2Vec, arXiv:2404.05961, section 2.1), an encoder causally."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BigBirdSpec,
    CrossAttentionSpec,
    DifferentialSpec,
    LatentAttentionSpec,
    LongformerSpec,
    MemoryAttentionSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import BlockWindow, Both, Causal, Either, Everything, Global, Pattern, Sinks, Window
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import edited
from lamina.surgery.weights import Weights, moved

Direction = Literal["causal", "bidirectional"]
READS = AttentionSpec | LatentAttentionSpec | DifferentialSpec
"""Attentions whose pattern is a field."""


@dataclass(frozen=True, kw_only=True)
class Reading(Operation):
    """A decoder becomes an encoder, each token of which sees the later ones too, or an encoder a decoder.

    A window of `back` tokens becomes one of as many ahead, and back. What decodes keeps its head; `head` "drop" leaves
    the scores of an encoder away, whose states are what is wanted.
    """

    NAME = "reading"

    to: Direction
    head: Literal["keep", "drop"] = "keep"

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        old, new = ("decoder", "encoder") if self.to == "bidirectional" else ("encoder", "decoder")
        stack: StackSpec | None = getattr(spec, old)
        if spec.two_stacks or stack is None or spec.stem is not None:
            raise UnsupportedError(f"reading {self.to} is for {old}s by themselves")
        drop = self.head == "drop"
        if drop and spec.head is None:
            raise LaminaError("head: drop, and this model has no language head")
        kept = {"head": None} if drop else {}
        changed = spec.replace(**{old: None, new: read(stack, self.to)}, **kept)
        renamed = {name: f"{new}{name.removeprefix(old)}" for name in weights if name.startswith(f"{old}.")}
        made = {now: moved(was) for was, now in renamed.items()}
        gone = [*renamed, *(name for name in weights if drop and name.startswith("head."))]
        back = Reading(to="causal" if self.to == "bidirectional" else "bidirectional")
        returns = not drop and read(read(stack, self.to), back.to) == stack
        why = "the same for a text of one token: all others see more" if new == "encoder" else "tokens see less"
        return Changed(changed, Weights(weights, made, gone), Promise("lossy", why), (back,) if returns else None)


def read(stack: StackSpec, to: Direction) -> StackSpec:
    """The stack with every pattern in that direction. Raises UnsupportedError naming what has none."""
    _check(stack, to)

    def change(path: str, part: Spec) -> Spec:
        if not isinstance(part, READS):
            return part
        return part.replace(pattern=both_ways(part.pattern) if to == "bidirectional" else causal(part.pattern))

    return edited(stack, change)


def both_ways(pattern: Pattern) -> Pattern:
    """What a causal pattern is where tokens also see the later ones: as far ahead as back."""
    match pattern:
        case Causal():
            return Everything()
        case Both(first=Causal(), second=other) | Both(first=other, second=Causal()):
            return both_ways(other)
        case Both(first=first, second=second):
            return both_ways(first) & both_ways(second)
        case Either(first=first, second=second):
            return both_ways(first) | both_ways(second)
        case Window(back=back):
            return pattern.replace(ahead=back - 1)
        case BlockWindow(back=back):
            return pattern.replace(ahead=back)
        case Everything() | Sinks() | Global():
            return pattern
    raise UnsupportedError(f"the pattern {type(pattern).__name__} has no counterpart ahead")


def causal(pattern: Pattern) -> Pattern:
    """What a pattern is where no token sees a later one."""
    if not pattern.looks_ahead():
        return pattern
    match pattern:
        case Everything():
            return Causal()
        case Window():
            return Causal() & pattern.replace(ahead=None)
    return Causal() & pattern


def _check(stack: StackSpec, to: Direction) -> None:
    """Raise UnsupportedError naming a part that reads one way only."""
    if stack.recurrence is not None:
        raise UnsupportedError("a stack with memory tokens reads segment by segment, which is causal")
    for path, part in stack.walk():
        if isinstance(part, MemoryAttentionSpec | CrossAttentionSpec | LongformerSpec | BigBirdSpec):
            raise UnsupportedError(f"layers with {type(part).__name__} ({path}) read as they do")
    if to == "bidirectional" and isinstance(stack.score_bias, AlibiSpec) and stack.score_bias.rounded:
        raise UnsupportedError("score_bias.rounded goes by the place of the key alone, and so would favour late ones")
