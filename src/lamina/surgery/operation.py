"""What an operation is: data that says a change, a function that makes it, and a promise of what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lamina.errors import LaminaError
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.calibration import Texts, random_texts

Kept = Literal["exact", "bounded", "lossy"]
"""exact: the same function, but for rounding. bounded: the same where a stated condition holds, or within a stated
bound. lossy: another function, which the verdict measures."""


@dataclass(frozen=True)
class Promise:
    """What an operation keeps."""

    kept: Kept
    why: str  # in words: "the same for texts of up to 512 tokens"
    bits: bool = False  # exact to the bit, so that not even rounding differs


@dataclass(frozen=True)
class Changed:
    """A model after an operation: its spec, and its weights, none of which has been made yet."""

    spec: ModelSpec
    weights: Mapping[str, Tensor]  # names that the spec asks for and that are not here are new
    promise: Promise
    undo: tuple[Operation, ...] | None = None  # what leads back, where the way back is exact
    fits: dict[str, float] = field(default_factory=dict)  # what a fit lost, by place, from when its weights are made
    texts: Texts | None = None  # how it reads a text, where that is other ids than before


@dataclass(frozen=True)
class Other:
    """Another model, of which an operation takes weights. None of them is read before it is asked for."""

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    same_tokens: bool | None = None  # as those of the model that is operated on; None: one of them has no tokenizer


Others = Callable[[str], Other]
"""Opens a SOURCE."""


@dataclass(frozen=True)
class Outside:
    """What operations may ask for beside the model."""

    others: Others | None = None  # None: other models cannot be opened
    texts: Texts | None = None  # None: random ids, in place of any text


@dataclass(frozen=True, kw_only=True)
class Operation(Spec):
    """Base of all operations: a frozen set of fields, called `NAME` in a plan."""

    NAME = ""

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        """The model after it. Nothing is read here: whether it can be done is seen from the spec alone.

        Raises LaminaError or UnsupportedError, naming the field, where it cannot be done to this model.
        """
        raise NotImplementedError

    def change_with(self, spec: ModelSpec, weights: Mapping[str, Tensor], outside: Outside) -> Changed:
        """`change`, with what lies outside the model; most operations need nothing of it."""
        return self.change(spec, weights)


@dataclass(frozen=True, kw_only=True)
class Joining(Operation):
    """Base of operations that take weights of other models too."""

    def sources(self) -> tuple[str, ...]:
        """The SOURCEs of those models."""
        raise NotImplementedError

    def join(self, spec: ModelSpec, weights: Mapping[str, Tensor], others: Others) -> Changed:
        """`change`, with the other models."""
        raise NotImplementedError

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        return self.change_with(spec, weights, Outside())

    def change_with(self, spec: ModelSpec, weights: Mapping[str, Tensor], outside: Outside) -> Changed:
        if outside.others is None and self.sources():
            raise LaminaError(f"{self.sources()[0]} is to be opened, and this plan is applied where nothing opens it")
        return self.join(spec, weights, outside.others or _closed)


def _closed(source: str) -> Other:
    raise AssertionError(f"{source} is none of the operation's sources")


@dataclass(frozen=True, kw_only=True)
class FittedOperation(Operation):
    """Base of operations that can fit weights to a text, which the old model reads when the first one is made."""

    def fit(self, spec: ModelSpec, weights: Mapping[str, Tensor], texts: Texts) -> Changed:
        """As `change`; `texts` is not called here."""
        raise NotImplementedError

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        return self.change_with(spec, weights, Outside())

    def change_with(self, spec: ModelSpec, weights: Mapping[str, Tensor], outside: Outside) -> Changed:
        return self.fit(spec, weights, outside.texts or random_texts(spec))
