"""Streams without end tokens, sentences, rows, and what the names of tokens say: against loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamina.errors import LaminaError
from lamina.objectives import stream
from lamina.objectives.boundaries import around, full_stops, special, word_starts
from lamina.objectives.rows import Texts, kept
from lamina.objectives.stream import Bodies, cut, ends_of, fill
from tests.objectives.made import bart, bert, prepared, t5, texts
from tests.tiny import tokenizer


def sentences(tokens: list[int], stop: int) -> list[int]:
    """Where they end, step by step."""
    ends = []
    for place, token in enumerate(tokens):
        if token == stop and (place == 0 or tokens[place - 1] != stop):
            ends.append(place + 1)
    return ends


@pytest.mark.parametrize("ended", [True, False])
def test_a_stream_without_ends(tmp_path: Path, ended: bool):
    words = t5()
    documents = texts(words)
    data = prepared(tmp_path, words, [{"text": one} for one in documents], ended=ended)
    bodies = Bodies(data.column("text"), data.end)
    whole = np.concatenate(documents)
    assert bodies.tokens == len(whole) and data.column("text").tokens == len(whole) + 8 * ended
    for start in range(len(whole) + 1):
        for stop in {start, min(start + 1, len(whole)), min(start + 30, len(whole)), len(whole)}:
            assert np.array_equal(bodies.slice(start, stop), whole[start:stop])
    assert all(np.array_equal(bodies.document(i), one) for i, one in enumerate(documents))
    assert bodies.rows(7) == len(whole) // 7
    with pytest.raises(LaminaError, match=f"{len(whole)} tokens; a row needs 999"):
        bodies.rows(999)


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_sentences_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(stream, "BLOCK", block)
    words = t5()
    documents = [*texts(words), *texts(words, (1, 1, 4), 3)]
    stop = words.tokens["."]
    documents[2][-1] = documents[3][0] = stop  # a document begins with what ends the one before
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    bodies = Bodies(data.column("text"), data.end)
    expected, start = set(), 0
    for one in documents:
        expected |= {start + end for end in sentences(one.tolist(), stop)}
        start += len(one)
        expected.add(start)
    assert bodies.sentence_ends(full_stops(words, (".",))).tolist() == sorted(expected)


def test_sentences_of_a_row():
    for bits, ends in (("00100", [3, 5]), ("0010", [3]), ("0011", [3]), ("1", [1]), ("1101", [1, 4]), ("0", [1])):
        assert ends_of(np.array([bit == "1" for bit in bits])).tolist() == ends


def test_rows_are_filled_in_order():
    assert cut(np.array([3, 10, 12]), 3).tolist() == [3, 6, 9, 10, 12]
    assert fill([np.array([3, 6, 9, 10, 12])], 6).tolist() == [0, 2, 5]
    assert fill([np.array([2, 4, 6]), np.array([5, 6, 11])], 6).tolist() == [0, 2, 3]
    random = np.random.default_rng(0)
    for room in (5, 9, 30):
        sizes = random.integers(1, 25, size=200)
        ends = cut(np.cumsum(sizes), room)
        rows = fill([ends], room)
        places = np.concatenate([[0], ends])[rows]
        assert np.diff(places).max() <= room and places[-1] == sizes.sum()
        # No row has room for the piece after it.
        assert all(ends[first] - places[i] > room for i, first in enumerate(rows[1:-1]))


def test_what_names_say():
    words = bert()
    starts = word_starts(words)
    assert starts[words.tokens["w3"]] and not starts[words.tokens["##p3"]] and starts[words.tokens["[CLS]"]]
    assert special(words).sum() == 5 and np.flatnonzero(full_stops(words, (".", "!", "?"))).tolist() == [65, 66]
    assert [one.tolist() for one in around(words)] == [[2], [3]]
    assert [one.tolist() for one in around(tokenizer())] == [[], []]
    bytes_ = word_starts(tokenizer())
    assert bytes_[260] and bytes_[262] and not bytes_[261] and bytes_[256] and not bytes_[ord("a")]
    with pytest.raises(LaminaError, match="has none of the tokens '。'"):
        full_stops(words, ("。",))


def test_texts_in_rows(tmp_path: Path):
    for words in (bert(), t5(), bart()):
        documents = texts(words)
        data = prepared(tmp_path / str(words.hash), words, [{"text": one} for one in documents])
        long = Texts(data, "text", 70)
        before, after = around(words)
        for i, one in enumerate(documents):
            assert long.row(i).tolist() == [*before, *one, *after]
        short = Texts(data, "text", 20)
        room = 20 - len(before) - len(after)
        assert all(short.row(i).tolist() == [*before, *one[:room], *after] for i, one in enumerate(documents))
        assert kept("skip", short).tolist() == [0, 1, 2, 5, 7] and len(kept("cut", short)) == 8
        with pytest.raises(LaminaError, match=rf"3 documents .* the {room} that fit .* document 6 of 'text' with 61"):
            kept("refuse", short)
        with pytest.raises(LaminaError, match="has no room for a token"):
            Texts(data, "text", len(before) + len(after))
