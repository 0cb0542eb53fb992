"""Masked language modelling (BERT, arXiv:1810.04805, section 3.1; its create_pretraining_data.py), with next-sentence
prediction or without (RoBERTa, arXiv:1907.11692, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.boundaries import full_stops, need, special, word_starts
from lamina.objectives.loss import IGNORE, Losses, label_cross_entropy
from lamina.objectives.next_sentence import Segments
from lamina.objectives.objective import (
    Batch,
    ByIndex,
    Example,
    Examples,
    Objective,
    inputs_of,
    needs_encoder,
    padded,
    vocabulary_losses,
)
from lamina.objectives.stream import Bodies, cut, fill

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """-log p of chosen tokens, from what stands on both sides of them. Of the chosen 80 % are masked, 10 % stay, 10 %
    become any token. They are chosen anew each time.

    Without `next_sentence` a row is [CLS], whole sentences that follow each other, across documents too, and [SEP].
    With it a row is [CLS] A [SEP] B [SEP], where B follows A or, in somewhat more than half of the rows, comes from
    another document; which of the two is asked of the pooled first token (label 1: another), and is as much of the
    loss.
    """

    NAME = "masked"

    rate: float = 0.15  # of the tokens of a row, [CLS] and [SEP] counted too, that are chosen
    most: int | None = None  # at most so many of a row: 20 in BERT's rows of 128
    whole_words: bool = False  # all pieces of a word or none
    next_sentence: bool = False  # BERT; not RoBERTa
    short: float = 0.1  # share of pairs that are shorter than there is room for
    stops: tuple[str, ...] = (".", "!", "?")  # tokens that end a sentence

    def check(self) -> None:
        if not 0 < self.rate < 1 or not 0 <= self.short <= 1 or (self.most is not None and self.most < 1):
            raise LaminaError(
                f"rate={self.rate} must lie between 0 and 1, short={self.short} within them, most={self.most} be 1 or"
                " more, or null"
            )

    def fits(self, spec: ModelSpec) -> None:
        needs_encoder(spec, "a masked objective")
        if not self.next_sentence:
            return
        assert spec.encoder is not None
        if spec.pooler is None or spec.labels is None or spec.labels.task != "next_sentence" or spec.labels.labels != 2:
            raise UnsupportedError("next_sentence needs a pooler and a label head for it, as in BertForPreTraining")
        if spec.encoder.segment is None or spec.encoder.segment.count < 2:
            raise UnsupportedError("next_sentence needs two segments, and this encoder has none")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        words = prepared.tokenizer()
        mask, cls, sep = (need(words, "a masked objective", *r) for r in (("mask",), ("cls", "bos"), ("sep", "eos")))
        free = ~special(words)
        begins = word_starts(words) if self.whole_words else None
        stops = full_stops(words, self.stops)
        least = 5 if self.next_sentence else 3
        if length < least:
            raise LaminaError(f"length={length} has no room for a masked row; {least} is the least")

        def masked(tokens: np.ndarray, random: np.random.Generator) -> Example:
            count = max(1, round(self.rate * len(tokens)))
            count = count if self.most is None else min(count, self.most)
            candidates = np.flatnonzero(free[tokens])
            if begins is None:
                chosen = random.permutation(candidates)[:count]
            else:
                chosen = whole_words(candidates, begins[tokens], count, random)
            read, labels = tokens.copy(), np.full(len(tokens), IGNORE)
            labels[chosen] = tokens[chosen]
            read[chosen] = replaced(tokens[chosen], mask, words.vocabulary, random)
            return {"input_ids": read, "labels": labels}

        column = prepared.column("text")
        if self.next_sentence:
            bodies = Bodies(column, prepared.end)
            pairs = Segments(bodies, bodies.sentence_ends(stops), length - 3, self.short)

            def paired(index: int, random: np.random.Generator) -> Example:
                first, second, other = pairs.pair(index, random)
                tokens = np.concatenate([[cls], first, [sep], second, [sep]])
                segments = (np.arange(len(tokens)) >= len(first) + 2).astype(np.int64)
                return masked(tokens, random) | {"segments": segments, "other": np.array(int(other))}

            return ByIndex(len(pairs), paired)
        bodies = Bodies(column, None)  # the end of a document is read too: RoBERTa's extra separator
        ends = cut(bodies.sentence_ends(stops), length - 2)
        firsts = fill([ends], length - 2)
        places = np.concatenate([[0], ends])[firsts]

        def packed(index: int, random: np.random.Generator) -> Example:
            body = bodies.slice(int(places[index]), int(places[index + 1]))
            body = body[:-1] if len(body) > 1 and body[-1] == sep else body
            return masked(np.concatenate([[cls], body, [sep]]), random)

        return ByIndex(len(places) - 1, packed)

    def collate(self, examples: Sequence[Example]) -> Batch:
        inputs = inputs_of([one["input_ids"] for one in examples])
        labels = {"masked": padded([one["labels"] for one in examples], IGNORE)}
        if self.next_sentence:
            inputs["token_type_ids"] = padded([one["segments"] for one in examples], 0)
            labels["next_sentence"] = torch.tensor([int(one["other"]) for one in examples])
        return Batch(inputs, labels)

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        found = {"masked": vocabulary_losses(model, out, batch.labels["masked"])}
        if self.next_sentence:
            assert out.label_logits is not None
            found["next_sentence"] = label_cross_entropy(out.label_logits, batch.labels["next_sentence"])
        return found


def replaced(tokens: np.ndarray, mask: int, vocabulary: int, random: np.random.Generator) -> np.ndarray:
    """What chosen tokens are read as: the mask in 80 %, themselves in 10 %, in 10 % any token, which may be the
    same."""
    draw = random.random(len(tokens))
    anything = random.integers(vocabulary, size=len(tokens))
    return np.where(draw < 0.8, mask, np.where(draw < 0.9, tokens, anything))


def whole_words(candidates: np.ndarray, begins: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Places of whole words in any order, at most `count` in all; a word that is too long is passed over.

    candidates: places that may be chosen, in order. begins: (T,) bool, where words begin. One step a word.
    """
    apart = np.diff(candidates, prepend=-2) > 1  # what follows a special token begins a word too
    word = np.cumsum(begins[candidates] | apart) - 1
    sizes = np.bincount(word)
    firsts = np.cumsum(sizes) - sizes
    kept: list[np.ndarray] = []
    for one in random.permutation(len(sizes)):
        if sizes[one] <= count:
            kept.append(candidates[firsts[one] : firsts[one] + sizes[one]])
            count -= int(sizes[one])
        if count == 0:
            break
    return np.concatenate(kept) if kept else candidates[:0]
