"""Denoising (BART, arXiv:1910.13461, section 2.2; fairseq's denoising_dataset.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import LaminaError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.boundaries import full_stops, need, word_starts
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
from lamina.objectives.stream import Bodies, ends_of

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """The encoder reads a damaged text, the decoder writes the whole one.

    In this order: sentences are permuted, spans of words become one mask each, tokens are inserted, the text is
    rotated. What stands around a text, <s> and </s>, is never touched. The defaults are the paper's; fairseq's own are
    not.
    """

    NAME = "denoising"

    mask: float = 0.3  # of the words that are in spans
    span: float = 3.0  # lambda of the Poisson distribution of a span's words; one of 0 words is a mask put in
    random: float = 0.0  # of the masks that are any token instead
    permute: float = 1.0  # of the sentences that change places
    insert: float = 0.0  # of the tokens: so many more are put in
    rotate: float = 0.0  # of the texts that begin anywhere
    stops: tuple[str, ...] = (".",)  # tokens that end a sentence
    smoothing: float = 0.0

    def check(self) -> None:
        for name in ("mask", "random", "permute", "insert", "rotate", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise LaminaError(f"{name} is {getattr(self, name)}; it must lie within 0 and 1")
        if self.span <= 0:
            raise LaminaError(f"span is {self.span}; it must be above 0")

    def fits(self, spec: ModelSpec) -> None:
        needs_pair(spec, "denoising")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        words = prepared.tokenizer()
        begin, end = need(words, "denoising", "bos", "cls"), need(words, "denoising", "eos", "sep")
        mask, vocabulary = need(words, "denoising", "mask"), words.vocabulary
        begins, stops = word_starts(words), full_stops(words, self.stops)
        room = length - 2
        size = int(room / (1 + self.insert))
        if size < 1:
            raise LaminaError(f"length={length} has no room for a token between <s> and </s>")
        bodies = Bodies(prepared.column("text"), prepared.end)

        def make(index: int, random: np.random.Generator) -> Example:
            def masks(count: int) -> np.ndarray:
                return np.where(random.random(count) < self.random, random.integers(vocabulary, size=count), mask)

            text = bodies.slice(index * size, (index + 1) * size)
            source = permuted(text, stops[text], self.permute, random) if self.permute else text
            if self.mask:
                starts = begins[source]
                starts[0] = True
                source = infilled(source, starts, self.mask, self.span, masks, random)
            if self.insert:
                more = min(math.ceil(len(source) * self.insert), room - len(source))
                source = inserted(source, masks(more), random)
            if random.random() < self.rotate:
                source = np.roll(source, -int(random.integers(len(source))))
            ends = [np.array([begin]), np.array([end])]
            return {
                "source": np.concatenate([ends[0], source, ends[1]]),
                "target": np.concatenate([ends[0], text, ends[1]]),
            }

        return ByIndex(bodies.rows(size), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return pair_batch([one["source"] for one in examples], [one["target"] for one in examples])

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        return {"target": vocabulary_losses(model, out, batch.labels["target"], smoothing=self.smoothing)}


def permuted(tokens: np.ndarray, stops: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """The sentences in another order: `share` of them change places among each other. One step a sentence."""
    ends = ends_of(stops)
    order = np.arange(len(ends))
    moved = random.permutation(len(ends))[: math.ceil(len(ends) * share)]
    order[moved] = moved[random.permutation(len(moved))]
    sentences = np.split(tokens, ends)  # the last holds what ends nowhere, and stays
    return np.concatenate([*(sentences[number] for number in order), sentences[-1]])


def infilled(
    tokens: np.ndarray,
    starts: np.ndarray,
    share: float,
    mean: float,
    masks: Callable[[int], np.ndarray],
    random: np.random.Generator,
) -> np.ndarray:
    """Spans of words become one mask each, until `share` of the words are in them; spans of no word become masks in any
    places, as far as there is room for them: the row never grows.

    starts: (T,) bool, where words begin. masks: makes so many. Spans begin at words that are drawn without replacement
    and may run into each other.
    """
    first = np.flatnonzero(starts)
    lengths = span_lengths(math.ceil(len(first) * share), mean, random)
    some = lengths[lengths > 0]
    chosen = random.permutation(len(first))[: len(some)]
    read = tokens.copy()
    read[first[chosen]] = masks(len(chosen))
    bounds = np.append(first, len(tokens))
    stops = bounds[np.minimum(chosen + some, len(first))]
    # +1 after the first token of each span, -1 after its last: what lies above 0 is covered.
    steps = np.bincount(first[chosen] + 1, minlength=len(tokens) + 1) - np.bincount(stops, minlength=len(tokens) + 1)
    read = read[np.cumsum(steps)[: len(tokens)] <= 0]
    return inserted(read, masks(min(len(lengths) - len(some), len(tokens) - len(read))), random)


def span_lengths(words: int, mean: float, random: np.random.Generator) -> np.ndarray:
    """Poisson lengths whose sum is `words`: drawn until they reach it, the last one trimmed."""
    drawn = np.zeros(0, np.int64)
    while drawn.sum() < words:
        drawn = np.concatenate([drawn, random.poisson(mean, size=max(words, 1))])
    total = np.cumsum(drawn)
    count = int(np.searchsorted(total, words)) + 1 if words else 0
    drawn = drawn[:count]
    if count:
        drawn[-1] -= total[count - 1] - words
    return drawn


def inserted(tokens: np.ndarray, more: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`tokens` with `more` in places that are drawn without replacement."""
    if not len(more):
        return tokens
    out = np.empty(len(tokens) + len(more), np.int64)
    new = np.zeros(len(out), bool)
    new[random.permutation(len(out))[: len(more)]] = True
    out[new], out[~new] = more, tokens
    return out
