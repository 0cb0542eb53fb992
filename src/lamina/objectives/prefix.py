"""Prefix language modelling (T5, arXiv:1910.10683, section 3.2.3): the rest of a text from its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.boundaries import need
from lamina.objectives.loss import IGNORE, Losses
from lamina.objectives.objective import (
    Batch,
    ByIndex,
    Example,
    Examples,
    Objective,
    needs_pair,
    pair_batch,
    vocabulary_losses,
)
from lamina.objectives.stream import Bodies
from lamina.patterns import Prefix

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """-log p of the tokens after a prefix, whose length is drawn: 1 to n - 1 tokens of n, each with equal chance.

    A decoder reads the row with its prefix marked, so that the tokens of the prefix see each other (a pattern with
    `Prefix()`). With `pair` an encoder reads the prefix and a decoder writes the rest, both with an end token.
    """

    NAME = "prefix"

    pair: bool = False  # an encoder and a decoder, as in T5
    z_loss: float = 0.0
    smoothing: float = 0.0

    def check(self) -> None:
        if self.z_loss < 0 or not 0 <= self.smoothing < 1:
            raise LaminaError(f"z_loss={self.z_loss} must not be below 0, smoothing={self.smoothing} within 0 and 1")

    def fits(self, spec: ModelSpec) -> None:
        if self.pair:
            return needs_pair(spec, "a prefix objective with pair")
        if spec.decoder is None or spec.head is None or spec.two_stacks:
            raise UnsupportedError("a prefix objective needs a decoder with a language head, or pair: true")
        if not any(isinstance(one, Prefix) and one.length is None for _, one in spec.decoder.walk()):
            raise UnsupportedError("no attention of this decoder sees a marked prefix: its pattern lacks `| Prefix()`")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        size = length - 1 if self.pair else length + 1
        if size < 2:
            raise LaminaError(f"length={length} has no room for a prefix and a rest")
        end = need(prepared.tokenizer(), "a prefix objective with pair", "eos") if self.pair else None
        bodies = Bodies(prepared.column("text"), prepared.end if self.pair else None)

        def make(index: int, random: np.random.Generator) -> Example:
            tokens = bodies.slice(index * size, (index + 1) * size)
            prefix = int(random.integers(1, size))
            if end is not None:
                return {"source": np.append(tokens[:prefix], end), "target": np.append(tokens[prefix:], end)}
            return {"tokens": tokens, "prefix": np.array(prefix)}

        return ByIndex(bodies.rows(size), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        if self.pair:
            return pair_batch([one["source"] for one in examples], [one["target"] for one in examples])
        tokens = torch.from_numpy(np.stack([one["tokens"] for one in examples]))  # (B, T + 1)
        prefix = torch.from_numpy(np.stack([one["prefix"] for one in examples]))[:, None]
        column = torch.arange(tokens.shape[1] - 1)[None]
        # Token t says what follows it: the last of the prefix is the first that is asked.
        labels = tokens[:, 1:].masked_fill(column < prefix - 1, IGNORE)
        return Batch({"input_ids": tokens[:, :-1], "marked": column < prefix}, {"target": labels})

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        labels = batch.labels["target"]
        return {"target": vocabulary_losses(model, out, labels, z_loss=self.z_loss, smoothing=self.smoothing)}
