"""Sequence-to-sequence, classification and contrastive rows, and what packing and padding change: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.objectives import (
    IGNORE,
    Batch,
    Contrastive,
    Objective,
    SequenceClassification,
    SequenceToSequence,
    TokenClassification,
)
from tests.objectives.made import SIZES, bart, bert, prepared, random_of, t5, texts
from tests.tiny import BART, BERT, GPT2, T5, spec

SMALL_T5 = T5 | {"vocab_size": 170, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SMALL_BART = BART | {"vocab_size": 68, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SMALL_BART |= {"decoder_start_token_id": 2}
CLASSES = BERT | {"vocab_size": 68, "architectures": ["BertForSequenceClassification"], "num_labels": 3}
CLASSES |= {"max_position_embeddings": 80}
TOKENS = CLASSES | {"architectures": ["BertForTokenClassification"], "num_labels": 4}
EMBEDDING = CLASSES | {"architectures": ["BertModel"]}


def model_of(config: dict[str, Any]) -> lamina.Model:
    """In float64, evaluation, and with weights that make every token matter."""
    made = spec(config).build(dtype=torch.float64, seed=3).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return made


def batch_of(objective: Objective, rows: Any, chosen: range | None = None) -> Any:
    return objective.collate([rows.example(i, random_of(i)) for i in chosen or range(len(rows))])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_packing_pairs_changes_no_loss(tmp_path: Path, name: str):
    words, config = {"t5": (t5(), SMALL_T5), "bart": (bart(), SMALL_BART)}[name]
    sources, targets = texts(words, (5, 17, 2, 12, 7, 9), 1), texts(words, (9, 3, 20, 1, 14, 2), 2)
    documents = [{"source": a, "target": b} for a, b in zip(sources, targets, strict=True)]
    data = prepared(tmp_path, words, documents, kind="pairs")
    before = [words.bos] if name == "bart" else []
    plain, packed = SequenceToSequence(), SequenceToSequence(packed=True)
    rows, full = plain.examples(data, 40), packed.examples(data, 40)
    assert len(rows) == 6 and 1 < len(full) < 6
    for i in range(6):
        one = rows.example(i, random_of(0))
        assert one["source"].tolist() == [*before, *sources[i], words.eos]
        assert one["target"].tolist() == [*before, *targets[i], words.eos]
    one, other = batch_of(plain, rows), batch_of(packed, full)
    assert one.asked == other.asked == {"target": sum(len(b) + 1 + len(before) for b in targets)}
    assert one.tokens == other.tokens and max(other.inputs["input_ids"].shape[1], other.labels["target"].shape[1]) <= 40
    model = model_of(config)
    start = model.spec.special.decoder_start
    total, expected = packed.total(model, other).kinds["target"].total, torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(plain.total(model, one).kinds["target"].total, total)
    for i in range(6):  # each pair by itself, by the formula
        row = rows.example(i, random_of(0))
        target = row["target"].tolist()
        logits = model(
            torch.tensor(row["source"])[None], decoder_input_ids=torch.tensor([[start, *target[:-1]]])
        ).logits
        assert logits is not None
        for place, token in enumerate(target):
            expected = expected - logits[0, place].log_softmax(-1)[token]
    torch.testing.assert_close(total, expected)


def test_pairs_that_are_too_long(tmp_path: Path):
    words = t5()
    sources, targets = texts(words, (5, 17, 2), 1), texts(words, (9, 3, 20), 2)
    documents = [{"source": a, "target": b} for a, b in zip(sources, targets, strict=True)]
    data = prepared(tmp_path, words, documents, kind="pairs")
    with pytest.raises(LaminaError, match=r"2 documents .* 10 that fit .* document 2 of 'target' with 20"):
        SequenceToSequence().examples(data, 11)
    for packed in (False, True):
        skipped = SequenceToSequence(longer="skip", packed=packed).examples(data, 11)
        assert len(skipped) == 1
        cut = SequenceToSequence(longer="cut", packed=packed)
        rows = cut.examples(data, 11)
        assert len(rows) == 3
        one = rows.example(2, random_of(0))
        assert one["target"].tolist() == [*targets[2][:10], words.eos] and len(one["source"]) == 3
    with pytest.raises(LaminaError, match="every document is longer than a row of 3 tokens"):
        SequenceToSequence(longer="skip").examples(data, 3)


def test_classes_of_texts(tmp_path: Path):
    words = bert()
    documents, labels = texts(words), [0, 2, 1, 1, 0, 2, 2, 0]
    data = prepared(
        tmp_path, words, [{"text": one} for one in documents], labels, kind="classification", labels=("a", "b", "c")
    )
    objective = SequenceClassification()
    rows = objective.examples(data, 70)
    batch = batch_of(objective, rows)
    assert batch.labels["class"].tolist() == labels and batch.tokens == sum(SIZES) + 16
    model = model_of(CLASSES)
    found = objective.total(model, batch).kinds["class"]
    expected, right = torch.zeros(()), 0
    for one, label in zip(documents, labels, strict=True):
        logits = model(torch.tensor([[words.cls, *one, words.sep]])).logits
        assert logits is not None
        expected = expected - logits[0].float().log_softmax(-1)[label]
        right += int(logits[0].argmax()) == label
    torch.testing.assert_close(found.total.float(), expected)
    assert float(found.more["accuracy"]) == right and found.asked == 8
    few = model_of(CLASSES | {"num_labels": 2})
    with pytest.raises(LaminaError, match="the data has label 2; the model's head has labels 0 to 1"):
        objective.total(few, batch)
    with pytest.raises(LaminaError, match="text has no labels; sequence classes need them"):
        objective.examples(prepared(tmp_path / "plain", words, [{"text": [7]}]), 70)


def test_classes_of_tokens(tmp_path: Path):
    words = bert()
    documents, random = texts(words), random_of(1)
    labels = [np.where(random.random(len(one)) < 0.3, IGNORE, random.integers(4, size=len(one))) for one in documents]
    data = prepared(
        tmp_path,
        words,
        [{"tokens": a, "labels": b} for a, b in zip(documents, labels, strict=True)],
        kind="token-classification",
        labels=("a", "b", "c", "d"),
    )
    objective = TokenClassification(longer="cut")
    rows = objective.examples(data, 25)
    batch = batch_of(objective, rows)
    model = model_of(TOKENS)
    found = objective.total(model, batch).kinds["class"]
    expected, count = torch.zeros(()), 0
    for one, asked in zip(documents, labels, strict=True):
        logits = model(torch.tensor([[words.cls, *one[:23], words.sep]])).logits
        assert logits is not None
        for place, label in enumerate(asked[:23]):
            if label != IGNORE:
                expected = expected - logits[0, place + 1].float().log_softmax(-1)[label]
                count += 1
    torch.testing.assert_close(found.total.float(), expected)
    assert found.asked == count == batch.asked["class"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_is_the_loop(tmp_path: Path, symmetric: bool):
    words = bert()
    first, second = texts(words, SIZES, 1), texts(words, SIZES[::-1], 2)
    documents = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    data = prepared(tmp_path, words, documents, [0.5] * 8, kind="contrastive")
    objective = Contrastive(temperature=0.1, symmetric=symmetric)
    batch = batch_of(objective, objective.examples(data, 70))
    model = model_of(EMBEDDING)
    found = objective.total(model, batch).kinds["pair"]

    class Ids:  # lamina.embed reads ids as texts that are their own tokens
        def encode(self, text: str) -> list[int]:
            return [words.cls or 0, *map(int, text.split()), words.sep or 0]

    texts_ = [[" ".join(map(str, one)) for one in side] for side in (first, second)]
    a, b = (lamina.embed(model, side, Ids()) for side in texts_)
    expected, right = torch.zeros(()), 0
    for i in range(8):
        cosine = torch.stack([(a[i] * b[j]).sum() for j in range(8)])
        right += int(cosine.argmax()) == i
        one = -(cosine / 0.1).log_softmax(0)[i]
        back = -(torch.stack([(a[j] * b[i]).sum() for j in range(8)]) / 0.1).log_softmax(0)[i]
        expected = expected + ((one + back) / 2 if symmetric else one)
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-5)
    assert found.asked == 8 and float(found.more["accuracy"]) == right


def test_scores_are_cosines(tmp_path: Path):
    words, scores = t5(), [0.5, -1.0, 1.0, 0.25]
    first, second = texts(words, (5, 9, 2, 7), 1), texts(words, (3, 8, 4, 1), 2)
    documents = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    data = prepared(tmp_path / "a", words, documents, scores, kind="contrastive")
    objective = Contrastive(scores=True)
    batch = batch_of(objective, objective.examples(data, 70))
    model = model_of(SMALL_T5)
    found = objective.total(model, batch).kinds["score"]
    expected = 0.0
    for a, b, score in zip(first, second, scores, strict=True):
        one, other = (model.encode(torch.tensor([[*side, words.eos]]))[0].mean(0) for side in (a, b))
        expected += (torch.cosine_similarity(one, other, dim=0).item() - score) ** 2
    assert found.total.item() == pytest.approx(expected, rel=1e-5) and batch.asked == {"score": 4}
    nothing = Batch(batch.inputs, {"score": torch.full((4,), float(IGNORE))})
    assert nothing.asked == {"score": 0} and objective.total(model, nothing).kinds["score"].total.item() == 0
    with pytest.raises(LaminaError, match="has scores from 0 to 5; scores within -1 and 1"):
        objective.examples(prepared(tmp_path / "b", words, documents, [0, 5, 1, 2], kind="contrastive"), 70)


def test_models_that_do_not_fit():
    for objective, right, wrong, why in (
        (SequenceToSequence(), SMALL_BART, GPT2, "an objective of pairs needs an encoder"),
        (SequenceClassification(), CLASSES, TOKENS, "needs a label head for sequences"),
        (TokenClassification(), TOKENS, CLASSES, "needs a label head for tokens"),
        (Contrastive(), EMBEDDING, GPT2, "needs an encoder that reads ids"),
    ):
        objective.fits(spec(right))
        with pytest.raises(UnsupportedError, match=why):
            objective.fits(spec(wrong))
    no_start = spec(SMALL_T5)
    with pytest.raises(UnsupportedError, match=r"needs special\.decoder_start"):
        SequenceToSequence().fits(no_start.replace(special=no_start.special.replace(decoder_start=None)))
