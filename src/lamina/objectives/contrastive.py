"""Sentence embeddings from pairs of texts (Sentence-BERT, arXiv:1908.10084, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Record, mean_of
from lamina.model import Model, ModelSpec
from lamina.objectives.loss import IGNORE, Losses, label_cross_entropy
from lamina.objectives.objective import (
    Batch,
    ByIndex,
    Example,
    Examples,
    Objective,
    Total,
    auxiliary,
    correct,
    forward,
    mask_of,
    padded,
)
from lamina.objectives.rows import Longer, Texts, kept

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """-log p of the second text of each pair among those of the batch, p ~ exp(cosine / temperature) (arXiv:1705.00652,
    section 4.4): the others are what it is not. `scores`: the square of cosine - score instead, for pairs with a score.

    A text's vector is the mean over its tokens, as in `lamina.embed`. The texts that a pair is told apart from are
    those of the same forward: with more micro-batches or ranks they are fewer, and the loss is another one.
    """

    NAME = "contrastive"

    temperature: float = 0.05  # 0.05 in SimCSE and in sentence-transformers, whose scale is 20
    symmetric: bool = False  # also the first text among the first ones
    scores: bool = False  # the data has a score, -1 to 1, for each pair
    longer: Longer = "refuse"  # texts that are longer than a row

    def check(self) -> None:
        if self.temperature <= 0:
            raise LaminaError(f"temperature is {self.temperature}; it must be above 0")

    def fits(self, spec: ModelSpec) -> None:
        if spec.encoder is None or not spec.reads_ids:
            raise UnsupportedError("a contrastive objective needs an encoder that reads ids")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        first, second = Texts(prepared, "first", length), Texts(prepared, "second", length)
        read, scores = kept(self.longer, first, second), prepared.scores
        if self.scores and (scores is None or not -1 <= scores.min() <= scores.max() <= 1):
            found = "no scores" if scores is None else f"scores from {scores.min():g} to {scores.max():g}"
            raise LaminaError(f"{prepared.directory}: has {found}; scores within -1 and 1 are needed, as cosines are")

        def make(index: int, random: np.random.Generator) -> Example:
            document = int(read[index])
            found = {"first": first.row(document), "second": second.row(document)}
            return found if scores is None else found | {"score": scores[document]}

        return ByIndex(len(read), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        rows = [
            one[name] for name in ("first", "second") for one in examples
        ]  # (2 B,): all first ones, all second ones
        mask = mask_of(rows)
        ids = padded(rows, 0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if self.scores:
            return Batch(inputs, {"score": torch.tensor(np.array([one["score"] for one in examples], np.float32))})
        return Batch(inputs, {"pair": torch.arange(len(examples))})

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        mask, more = batch.inputs["attention_mask"], None
        if model.spec.two_stacks:  # the encoder alone: Sentence-T5, arXiv:2108.08877, section 3
            hidden = model.encode(batch.inputs["input_ids"], mask, record=record)
        else:
            out = forward(model, batch, record)
            hidden, more = out.hidden, auxiliary(out)
        first, second = F.normalize(mean_of(hidden, mask).float(), dim=-1).chunk(2)  # (B, width) each
        if self.scores:
            return Total({"score": self._scored((first * second).sum(-1), batch.labels["score"])}, more)
        cosine, labels = first @ second.T, batch.labels["pair"]
        losses = label_cross_entropy(cosine / self.temperature, labels)
        kinds = {"pair": Losses(losses.total, losses.nats, losses.asked, more={"accuracy": correct(cosine, labels)})}
        if self.symmetric:
            back = label_cross_entropy(cosine.T / self.temperature, labels)
            both = (losses.total + back.total) / 2, (losses.nats + back.nats) / 2
            kinds["pair"] = Losses(*both, losses.asked, more=kinds["pair"].more)
        return Total(kinds, more)

    def _scored(self, cosine: Tensor, scores: Tensor) -> Losses:
        asked = scores != IGNORE
        total = (cosine - scores)[asked].square().sum()
        return Losses(total, total.detach(), int(asked.sum()))
