"""Masked language modelling and next-sentence prediction against BERT's own procedure, written out step by step."""

from __future__ import annotations

import random as python
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lamina.errors import LaminaError, UnsupportedError
from lamina.objectives import IGNORE, MaskedLM
from lamina.objectives.boundaries import full_stops
from lamina.objectives.masked import replaced, whole_words
from lamina.objectives.next_sentence import Segments, shortened
from lamina.objectives.stream import Bodies
from tests.objectives.made import bart, bert, prepared, random_of, t5, texts
from tests.objectives.test_stream import sentences
from tests.tiny import BERT, GPT2, spec

PRETRAINING = BERT | {"architectures": ["BertForPreTraining"], "vocab_size": 68, "max_position_embeddings": 64}


def data_of(path: Path, sizes: tuple[int, ...] = (60, 200, 33, 90)):
    words = bert()
    documents = texts(words, sizes)
    return prepared(path, words, [{"text": one} for one in documents]), words, documents


def test_80_10_10():
    """Of 200,000 chosen tokens; a share of p is within 4 sqrt(p (1 - p) / n)."""
    count = 200_000
    tokens = np.full(count, 7)
    read = replaced(tokens, 4, 68, random_of(0))
    shares = {
        "masked": ((read == 4).mean(), 0.8 + 0.1 / 68),
        "kept": ((read == 7).mean(), 0.1 + 0.1 / 68),
        "other": (((read != 4) & (read != 7)).mean(), 0.1 * 66 / 68),
    }
    for share, expected in shares.values():
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    others = np.bincount(read, minlength=68)
    others = np.delete(others, [4, 7])
    mean = others.mean()
    assert ((others - mean) ** 2 / mean).sum() < 106  # 99.9 % at 65 degrees of freedom
    # transformers chooses each token with a probability, and then does the same.
    words = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "x": 5})
    collator = transformers.DataCollatorForLanguageModeling(words, seed=0)
    batch = collator([{"input_ids": [2, *[5] * 20_000, 3]}])
    chosen = batch["labels"] != -100
    assert abs(float(chosen.float().mean()) - 0.15) < 0.01
    assert abs(float((batch["input_ids"][chosen] == 4).float().mean()) - shares["masked"][0]) < 0.03


@pytest.mark.parametrize("rate, most, length", [(0.15, None, 32), (0.15, 3, 32), (0.5, None, 10), (0.01, None, 9)])
def test_how_many_are_chosen(tmp_path: Path, rate: float, most: int | None, length: int):
    data, words, documents = data_of(tmp_path)
    objective = MaskedLM(rate=rate, most=most)
    rows = objective.examples(data, length)
    stop_ids = {words.tokens["."], words.tokens["!"]}
    ends, at = set(), 0
    for one in documents:
        stops = [0 if token in stop_ids else 1 for token in one.tolist()]
        ends |= {at + end for end in sentences(stops, 0)} | {at + len(one)}
        at += len(one)
    whole, place = np.concatenate(documents), 0
    for index in range(len(rows)):
        one = rows.example(index, random_of(index))
        read, labels = one["input_ids"], one["labels"]
        asked = labels != IGNORE
        size = len(read)
        assert size <= length and read[0] == words.cls and read[-1] == words.sep and not asked[[0, -1]].any()
        count = min(max(1, round(rate * size)), size - 2)
        assert asked.sum() == (count if most is None else min(count, most))
        text = np.where(asked, labels, read)[1:-1]
        assert np.array_equal(text, whole[place : place + size - 2])  # sentences follow each other, across documents
        place += size - 2
        assert place in ends or size == length  # and are whole, but for those longer than a row
        assert np.array_equal(rows.example(index, random_of(index))["labels"], labels)
    assert place == len(whole)
    many = [rows.example(0, random_of(i))["labels"] != IGNORE for i in range(2000)]
    share = np.mean(many, axis=0)[1:-1]
    assert np.abs(share / share.mean() - 1).max() < 0.5 or rate < 0.05  # every place has its chance


def test_rows_of_roberta(tmp_path: Path):
    """Where what ends a document is the separator too, it stands between documents, and once at the end of a row."""
    words = bart()
    documents = texts(words, (6, 4, 12, 3, 20))
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    rows = MaskedLM().examples(data, 16)
    read: list[int] = []
    for index in range(len(rows)):
        one = rows.example(index, random_of(index))
        assert one["labels"][0] == one["labels"][-1] == IGNORE
        tokens = np.where(one["labels"] != IGNORE, one["labels"], one["input_ids"]).tolist()
        assert tokens[0] == words.bos and tokens[-1] == words.eos and tokens[-2] != words.eos
        read += tokens[1:-1]
    assert [token for token in read if token != words.eos] == np.concatenate(documents).tolist()


def test_whole_words_are_whole():
    words = bert()
    begins = ~np.array([name.startswith("##") for name in words.tokens])
    names = "w1 ##p1 ##p2 w2 w3 ##p1 [SEP] ##p9 ##p8 w4 ##p5 ##p5 ##p5 ##p5".split()
    tokens = np.array([words.tokens[name] for name in names])
    begins = np.array([not name.startswith("##") for name in names])
    groups = [{0, 1, 2}, {3}, {4, 5}, {7, 8}, {9, 10, 11, 12, 13}]
    seen = set()
    for seed in range(300):
        for count in (1, 2, 4):
            chosen = set(whole_words(np.flatnonzero(tokens != words.sep), begins, count, random_of(seed)).tolist())
            taken = [i for i, group in enumerate(groups) if group <= chosen]
            assert chosen == set().union(*(groups[i] for i in taken)) and len(chosen) <= count
            # Nothing that would still fit is left out.
            assert all(len(groups[i]) > count - len(chosen) for i in range(5) if i not in taken)
            seen |= set(taken)
    assert seen == {0, 1, 2, 3}


def test_whole_words_in_rows(tmp_path: Path):
    data, words, _ = data_of(tmp_path)
    rows = MaskedLM(whole_words=True).examples(data, 32)
    later = np.zeros(words.vocabulary, bool)
    later[[number for name, number in words.tokens.items() if name.startswith("##")]] = True
    for index in range(len(rows)):
        one = rows.example(index, random_of(index))
        asked = one["labels"] != IGNORE
        tokens = np.where(asked, one["labels"], one["input_ids"])
        for place in np.flatnonzero(later[tokens][2:]) + 2:
            assert asked[place] == asked[place - 1]


def truncated(first: list[int], second: list[int], room: int, rng: python.Random) -> None:
    """truncate_seq_pair."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        if rng.random() < 0.5:
            del longer[0]
        else:
            longer.pop()


def test_pairs_are_shortened_like_bert():
    rng, random = python.Random(0), random_of(0)
    for one, other, room in ((9, 3, 7), (3, 9, 7), (4, 4, 3), (5, 4, 4), (1, 30, 5), (6, 2, 8), (7, 1, 2)):
        fronts, mine = [], []
        for _ in range(400):
            first, second = list(range(one)), list(range(100, 100 + other))
            truncated(first, second, room, rng)
            a, b = shortened(np.arange(one), np.arange(100, 100 + other), room, random)
            assert (len(a), len(b)) == (len(first), len(second))
            assert not len(a) or np.array_equal(a, np.arange(a[0], a[0] + len(a)))
            fronts.append((first[0] if first else 0) + second[0])
            mine.append((int(a[0]) if len(a) else 0) + int(b[0]))
        assert abs(np.mean(fronts) - np.mean(mine)) < 0.05 * (one + other)


def instances(document: list[list[int]], room: int, short: float, rng: python.Random) -> list[tuple[int, int, bool]]:
    """create_instances_from_document without other documents' tokens: (first sentence, sentences of A,
    random)."""
    target = rng.randint(2, room) if rng.random() < short else room
    found, chunk, length, place = [], [], 0, 0
    while place < len(document):
        chunk.append(place)
        length += len(document[place])
        if place == len(document) - 1 or length >= target:
            end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            unrelated = len(chunk) == 1 or rng.random() < 0.5
            found.append((chunk[0], end, unrelated))
            if unrelated:
                place -= len(chunk) - end
            chunk, length = [], 0
        place += 1
    return found


def test_chunks_begin_where_bert_begins_them(tmp_path: Path):
    """How many pairs a document gives and how many of them are random, on average over many plans."""
    data, words, documents = data_of(tmp_path, (300, 40, 120))
    bodies = Bodies(data.column("text"), data.end)
    ends = bodies.sentence_ends(full_stops(words, (".",)))
    rng, room = python.Random(1), 40
    pieces = np.split(np.concatenate(documents), ends[:-1])
    firsts = np.searchsorted(ends, bodies.begins[1:])
    by_document, start = [], 0
    for last in firsts:
        by_document.append([list(one) for one in pieces[start : last + 1]])
        start = last + 1
    theirs = [[one for doc in by_document for one in instances(doc, room, 0.1, rng)] for _ in range(600)]
    segments = Segments(bodies, ends, room, 0.1)
    mine = [len(segments._plan(random_of(seed))) for seed in range(600)]
    counts = [len(one) for one in theirs]
    spread = (np.var(counts) + np.var(mine)) ** 0.5 / 600**0.5
    assert abs(np.mean(counts) - np.mean(mine)) < 4 * spread
    share = np.mean([unrelated for one in theirs for _, _, unrelated in one])
    drawn = [segments.pair(index, random_of(seed))[2] for seed in range(200) for index in range(len(segments))]
    assert share > 0.5 and np.mean(drawn) > 0.5 and abs(np.mean(drawn) - share) < 0.05


@pytest.mark.parametrize("short", [0.0, 1.0])
def test_pairs_of_segments(tmp_path: Path, short: float):
    data, words, documents = data_of(tmp_path)
    objective = MaskedLM(next_sentence=True, short=short)
    rows = objective.examples(data, 30)
    texts_ = [" ".join(map(str, one)) for one in documents]
    lengths = []
    for index in range(3 * len(rows)):
        one = rows.example(index % len(rows), random_of(index))
        tokens = np.where(one["labels"] != IGNORE, one["labels"], one["input_ids"])
        first, second = np.flatnonzero(tokens == words.sep)
        assert tokens[0] == words.cls and second == len(tokens) - 1 <= 29
        assert one["segments"].tolist() == [int(place > first) for place in range(len(tokens))]
        a, b = (" ".join(map(str, part)) for part in (tokens[1:first], tokens[first + 1 : second]))
        lengths.append(len(tokens))
        homes = [i for i, text in enumerate(texts_) if a in text and b in text]
        if int(one["other"]) == 0:
            assert homes
        elif min(first, second - first) > 6:  # five tokens in a row stand in one place
            assert not homes
    assert (max(lengths) == 30) if short == 0 else (np.mean(lengths) < 29)
    batch = objective.collate([rows.example(i, random_of(i)) for i in range(5)])
    assert batch.labels["next_sentence"].shape == (5,) and batch.asked["next_sentence"] == 5
    assert batch.inputs["token_type_ids"].shape == batch.inputs["input_ids"].shape


def test_what_is_refused(tmp_path: Path):
    data, words, _ = data_of(tmp_path / "a")
    one = prepared(tmp_path / "one", words, [{"text": [7, 8, 9]}])
    with pytest.raises(LaminaError, match="holds one document; next_sentence needs another"):
        MaskedLM(next_sentence=True).examples(one, 30)
    with pytest.raises(LaminaError, match="length=2 has no room for a masked row; 3 is the least"):
        MaskedLM().examples(data, 2)
    plain = t5()
    with pytest.raises(LaminaError, match="a masked objective needs a mask token, and this tokenizer has none"):
        MaskedLM().examples(prepared(tmp_path / "t5", plain, [{"text": [7, 8, 9]}]), 30)
    with pytest.raises(LaminaError, match="rate=0.0 must lie between 0 and 1"):
        MaskedLM(rate=0.0)
    MaskedLM().fits(spec(BERT))
    MaskedLM(next_sentence=True).fits(spec(PRETRAINING))
    for wrong, objective, why in (
        (GPT2, MaskedLM(), "needs an encoder with a language head"),
        (BERT, MaskedLM(next_sentence=True), "needs a pooler and a label head for it"),
        (PRETRAINING | {"type_vocab_size": 1}, MaskedLM(next_sentence=True), "needs two segments"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            objective.fits(spec(wrong))


def test_rows_are_padded_and_padding_asks_nothing(tmp_path: Path):
    data, _, _ = data_of(tmp_path)
    objective = MaskedLM()
    rows = objective.examples(data, 32)
    examples = [rows.example(i, random_of(i)) for i in range(len(rows))]
    batch = objective.collate(examples)
    assert batch.tokens == sum(len(one["input_ids"]) for one in examples)
    assert batch.asked["masked"] == sum(int((one["labels"] != IGNORE).sum()) for one in examples)
    model = spec(PRETRAINING).build(seed=0).eval()
    total = objective.total(model, batch).kinds["masked"]
    alone = [objective.total(model, objective.collate([one])).kinds["masked"].total for one in examples]
    torch.testing.assert_close(total.total, torch.stack(alone).sum())
