"""Span corruption (T5, arXiv:1910.10683, section 3.1.4; random_spans_noise_mask of its preprocessors.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import LaminaError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.boundaries import need
from lamina.objectives.loss import Losses
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

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """The encoder reads a text in which spans are one sentinel each; the decoder writes the spans, each after its
    sentinel.

    A B C D E F with the spans C D and F: A B <0> E <1> </s>, and <0> C D <1> F </s>. A row begins with what is not
    masked and ends with a span. Its text is as long as lets the encoder read exactly `length` tokens; documents follow
    each other in it.
    """

    NAME = "span_corruption"

    rate: float = 0.15  # of the tokens that are in spans
    span: float = 3.0  # tokens of one, on average
    sentinel: str = "<extra_id_{}>"  # names of the sentinels; the first has the highest id in T5
    z_loss: float = 0.0  # 1e-4 in T5
    smoothing: float = 0.0

    def check(self) -> None:
        if not 0 < self.rate < 1 or self.span < 1:
            raise LaminaError(f"rate={self.rate} must lie between 0 and 1, span={self.span} be at least 1")
        if self.z_loss < 0 or not 0 <= self.smoothing < 1:
            raise LaminaError(f"z_loss={self.z_loss} must not be below 0, smoothing={self.smoothing} within 0 and 1")

    def fits(self, spec: ModelSpec) -> None:
        needs_pair(spec, "span corruption")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        words = prepared.tokenizer()
        size = self.text(length)
        noise, spans = self.counts(size)
        sentinels = self.sentinels(words.tokens, spans, words.name)
        end = need(words, "span corruption", "eos")
        bodies = Bodies(prepared.column("text"), prepared.end)

        def make(index: int, random: np.random.Generator) -> Example:
            tokens = bodies.slice(index * size, (index + 1) * size)
            return corrupted(tokens, noise_spans(size, noise, spans, random), sentinels, end)

        return ByIndex(bodies.rows(size), make)

    def counts(self, tokens: int) -> tuple[int, int]:
        """(tokens in spans, spans) of a text; halves are rounded to even."""
        noise = min(max(round(tokens * self.rate), 1), tokens - 1)
        return noise, min(max(round(noise / self.span), 1), noise, tokens - noise)

    def text(self, length: int) -> int:
        """Tokens of the longest text of which the encoder reads at most `length`, the end token too."""
        size = 1
        while True:
            noise, spans = self.counts(size + 1)
            if size + 1 - noise + spans + 1 > length:
                break
            size += 1
        if size < 2:
            raise LaminaError(f"length={length} has no room for a token, a sentinel and an end: 3 is the least")
        return size

    def sentinels(self, tokens: dict[str, int], count: int, name: str) -> np.ndarray:
        """(count,): ids by name. Raises LaminaError naming the first that the tokenizer lacks."""
        names = [self.sentinel.format(number) for number in range(count)]
        missing = [one for one in names if one not in tokens]
        if missing:
            raise LaminaError(
                f"{name}: has no token {missing[0]!r}; rows of this length need {count:,} sentinels: train a tokenizer"
                " with them, or name others by objective.sentinel"
            )
        return np.array([tokens[one] for one in names], np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return pair_batch([one["source"] for one in examples], [one["target"] for one in examples])

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        labels = batch.labels["target"]
        return {"target": vocabulary_losses(model, out, labels, z_loss=self.z_loss, smoothing=self.smoothing)}


def composition(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """(parts,): positive numbers that add up to `total`, each such row with equal chance."""
    cuts = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def noise_spans(tokens: int, noise: int, spans: int, random: np.random.Generator) -> np.ndarray:
    """(tokens,) bool: true in spans. Stretches outside and inside of them take turns, the first of them outside."""
    lengths = np.empty(2 * spans, np.int64)
    lengths[1::2] = composition(noise, spans, random)
    lengths[::2] = composition(tokens - noise, spans, random)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupted(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int) -> Example:
    """Source and target of a text (T,) whose spans are `noise` (T,) bool."""
    return {
        "source": np.append(_without(tokens, noise, sentinels), end),
        "target": np.append(_without(tokens, ~noise, sentinels), end),
    }


def _without(tokens: np.ndarray, gone: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Each stretch that is gone becomes the next sentinel."""
    begins = gone & ~np.concatenate([[False], gone[:-1]])
    number = np.cumsum(begins) - 1
    return np.where(begins, sentinels[np.maximum(number, 0)], tokens)[begins | ~gone]
