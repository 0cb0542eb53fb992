"""Losses against transformers' own, on tiny random models: the mean that it makes of our labels is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.objectives import (
    IGNORE,
    MaskedLM,
    SequenceClassification,
    SequenceToSequence,
    SpanCorruption,
    TokenClassification,
)
from lamina.objectives.objective import Batch, documented_batch
from tests.families import VOCABULARY, Case, row, tokens


def labels(shape: tuple[int, ...], count: int, seed: int, ignored: bool = True) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    found = torch.randint(count, shape, generator=random)
    return found.masked_fill(torch.rand(shape, generator=random) < 0.5, IGNORE) if ignored else found


def padded(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask: row i has lost i tokens at its end."""
    ids = tokens(batch, length, seed)
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None]).long()
    return ids, mask


def mean(total: Any, kind: str) -> float:
    return total.kinds[kind].total.item() / total.kinds[kind].asked


@pytest.mark.parametrize("seed", [1, 2])
def test_bert_with_next_sentence_prediction(tmp_path: Path, seed: int):
    case = Case(row("bert-pretraining"), tmp_path)
    ids, mask = padded(4, 11, seed)
    segments, asked, other = (
        labels((4, 11), 2, seed, False),
        labels((4, 11), VOCABULARY, seed),
        labels((4,), 2, seed, False),
    )
    asked = asked.masked_fill(mask == 0, IGNORE)
    theirs = case.theirs(
        input_ids=ids, attention_mask=mask, token_type_ids=segments, labels=asked, next_sentence_label=other
    )
    batch = Batch(
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments},
        {"masked": asked, "next_sentence": other},
    )
    total = MaskedLM(next_sentence=True).total(case.ours, batch)
    assert batch.asked == {kind: one.asked for kind, one in total.kinds.items()}
    assert mean(total, "masked") + mean(total, "next_sentence") == pytest.approx(theirs.loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "roberta-mlm-untied"])
def test_masked_language_models(tmp_path: Path, name: str):
    case = Case(row(name), tmp_path)
    ids, asked = case.ids, labels(tuple(case.ids.shape), VOCABULARY, 3)
    theirs = case.theirs(input_ids=ids, labels=asked)
    total = MaskedLM().total(case.ours, Batch({"input_ids": ids}, {"masked": asked}))
    assert mean(total, "masked") == pytest.approx(theirs.loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "bart", "bart-biased"])
@pytest.mark.parametrize("objective", [SpanCorruption(), SequenceToSequence()])
def test_pairs(tmp_path: Path, name: str, objective: Any):
    """transformers shifts the labels itself: so must we, and with the same start."""
    case = Case(row(name), tmp_path)
    sources, targets = tokens(3, 11, 4), tokens(3, 9, 5)
    targets = [one[: 9 - 2 * i].numpy() for i, one in enumerate(targets)]
    read = [one[: 11 - i].numpy() for i, one in enumerate(sources)]
    batch = documented_batch(read, targets, *([one * 0 for one in side] for side in (read, targets)))
    theirs = case.theirs(
        input_ids=batch.inputs["input_ids"],
        attention_mask=batch.inputs["attention_mask"],
        labels=batch.labels["target"],
    )
    total = objective.total(case.ours, batch)
    assert mean(total, "target") == pytest.approx(theirs.loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-sequence"])
def test_sequence_classes(tmp_path: Path, name: str):
    case = Case(row(name), tmp_path)
    ids, mask = padded(4, 11, 6)
    asked = labels((4,), case.theirs.config.num_labels, 6, False)
    theirs = case.theirs(input_ids=ids, attention_mask=mask, labels=asked)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, {"class": asked})
    total = SequenceClassification().total(case.ours, batch)
    assert mean(total, "class") == pytest.approx(theirs.loss.item(), abs=1e-5)


def test_token_classes(tmp_path: Path):
    case = Case(row("bert-token"), tmp_path)
    ids, mask = padded(4, 11, 7)
    asked = labels((4, 11), 5, 7).masked_fill(mask == 0, IGNORE)
    theirs = case.theirs(input_ids=ids, attention_mask=mask, labels=asked)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, {"class": asked})
    total = TokenClassification().total(case.ours, batch)
    assert mean(total, "class") == pytest.approx(theirs.loss.item(), abs=1e-5)
