"""Rows for more tokens or fewer, and heads that share the table of tokens or have a matrix of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import EmbeddingSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import edited, places
from lamina.surgery.weights import Made, Weights, own_generator


@dataclass(frozen=True, kw_only=True)
class VocabularyOperation(Operation):
    """Tables of `size` tokens, rounded up to a multiple: of the input, of the head and its bias, of neighbours.

    Rows of old tokens stay to the bit, and their scores within rounding. new: what other rows are. "zero": a new
    token's score is 0, before a softcap too. "mean" of all old rows: its score is the mean of the old ones, so that it
    gets less probability than an old one does on average. "normal": drawn around that mean, each feature with the
    deviation that it has in the table.
    """

    NAME = "vocabulary"

    size: int | None = None  # None: as many as there are
    multiple: int = 1
    new: Literal["zero", "mean", "normal"] = "mean"
    seed: int = 0

    def check(self) -> None:
        if self.multiple < 1 or (self.size is not None and self.size < 1):
            raise LaminaError(f"size={self.size} and multiple={self.multiple} must be at least 1")

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        old = spec.embedding.vocabulary
        size = -(-(self.size or old) // self.multiple) * self.multiple
        beyond = [(what, number) for what, number in token_ids(spec) if number >= size]
        if beyond:
            what, number = beyond[0]
            raise LaminaError(f"{size} tokens leave out {number}, which is {what}")
        made: dict[str, Made] = {}
        for name in tables(spec, weights) if size != old else ():
            if size < old:
                made[name] = Made((name,), f"the first {size} rows", partial(_first, size=size))
            else:
                how = f"{size - old} rows more: {self.new}"
                rows = partial(_more, size=size, new=self.new, seed=self.seed, name=name)
                made[name] = Made((name,), how, rows)
        scores = {"zero": "0", "mean": "the mean of theirs", "normal": "a random one"}[self.new]
        if size == old:
            promise = Promise("exact", "there are as many rows already", bits=True)
        elif size > old:
            promise = Promise("bounded", f"old tokens keep their scores; the score of a new one is {scores}")
        else:
            promise = Promise("lossy", f"{old - size} tokens go; the others keep their scores")
        undo = None if size < old else (VocabularyOperation(size=old),)
        return Changed(with_vocabulary(spec, size), Weights(weights, made), promise, undo)


@dataclass(frozen=True, kw_only=True)
class TieHead(Operation):
    """A head that multiplies with the table of tokens (arXiv:1608.05859), or with a copy of it that is its own."""

    NAME = "head"

    tied: bool

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        head = spec.head
        if head is None:
            raise LaminaError("this model has no head over its vocabulary")
        if head.tied == self.tied:
            raise LaminaError(f"tied is {str(self.tied).lower()}, and so the head is already")
        new, table, own = spec.replace(head=head.replace(tied=self.tied)), "embedding.weight", "head.weight"
        if not self.tied:
            made = {own: Made((table,), "copy of the table of tokens", torch.clone)}
            promise = Promise("exact", "the head has a copy of the table", bits=True)
            return Changed(new, Weights(weights, made), promise, (TieHead(tied=True),))
        shapes = {name: tuple(one.shape) for name, one in spec.build(device="meta").named_parameters()}
        if shapes[table] != shapes[own]:
            raise LaminaError(f"the table of tokens is {shapes[table]} and the head {shapes[own]}: they cannot be one")
        promise = Promise("bounded", "the same where the head's matrix equals the table of tokens")
        return Changed(new, Weights(weights, {}, [own]), promise)


def tables(spec: ModelSpec, weights: Mapping[str, Tensor]) -> list[str]:
    """The weights that have a row or an entry for each token of the model."""
    old = spec.embedding.vocabulary
    names = [place.weight("weight") for place in places(spec, EmbeddingSpec) if place.part.vocabulary == old]
    return [name for name in (*names, "head.weight", "head.bias") if name in weights]


def with_vocabulary(spec: ModelSpec, size: int) -> ModelSpec:
    """The spec with so many tokens in all those tables."""
    old = spec.embedding.vocabulary

    def change(path: str, part: Spec) -> Spec:
        return part.replace(vocabulary=size) if isinstance(part, EmbeddingSpec) and part.vocabulary == old else part

    return edited(spec, change)


def token_ids(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """(the field, the id) of every token that a spec names."""
    special = spec.special
    named: list[tuple[str, int | None]] = [
        ("special.start", special.start),
        *(("special.end", one) for one in special.end),
        ("special.pad", special.pad),
        ("special.decoder_start", special.decoder_start),
        ("embedding.padding", spec.embedding.padding),
        ("labels.after", None if spec.labels is None else spec.labels.after),
        ("marks.id", getattr(spec.marks, "id", None)),
    ]
    yield from ((name, number) for name, number in named if number is not None and number >= 0)


def _first(x: Tensor, size: int) -> Tensor:
    return x[:size].clone()


def _more(x: Tensor, size: int, new: str, seed: int, name: str) -> Tensor:
    """x (V, ...) with rows up to `size`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.new_zeros(size - len(x), *x.shape[1:], dtype=wide)
    if new != "zero":
        rows += x.mean(dim=0, dtype=wide)
    if new == "normal":
        drawn = torch.randn(rows.shape, generator=own_generator(name, seed), dtype=torch.float32)
        rows += drawn.to(rows) * x.to(wide).std(dim=0, correction=0)
    return torch.cat([x, rows.to(x.dtype)])
