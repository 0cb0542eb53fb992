"""Rows for training: against the same done token by token, in plain Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamina.data import Column, Packed, Windows, Writer, open_prepared
from lamina.errors import LaminaError


def column(directory: Path, sizes: list[int], shard: int = 25) -> Column:
    """Document i holds the ids 100 i, 100 i + 1, ..."""
    with Writer(directory, vocabulary=1 << 16, tokenizer="x", shard_tokens=shard) as writer:
        for i, size in enumerate(sizes):
            writer.add({"text": np.arange(size) + 100 * i})
        writer.close()
    return open_prepared(directory).columns["text"]


def naive(row: np.ndarray) -> tuple[list[int], list[int]]:
    documents, positions = [], []
    for i, token in enumerate(row.tolist()):
        same = i > 0 and token // 100 == row[i - 1] // 100
        documents.append(documents[-1] + (not same) if i else 0)
        positions.append(positions[-1] + 1 if same else 0)
    return documents, positions


SIZES = [3, 9, 1, 1, 17, 30, 2, 8, 5, 11, 1]


@pytest.mark.parametrize("length", [1, 2, 7, 29, 87])
def test_windows_are_slices_of_the_stream(tmp_path: Path, length: int):
    found = column(tmp_path, SIZES)
    stream = np.concatenate([np.arange(size) + 100 * i for i, size in enumerate(SIZES)])
    for aligned in (True, False):
        windows = Windows(found, length, aligned=aligned)
        starts = range(0, len(stream) - length, length if aligned else 1)
        assert len(windows) == len(starts)
        for i, start in enumerate(starts):
            row = windows[i]
            assert np.array_equal(row["tokens"], stream[start : start + length + 1])
            documents, positions = naive(row["tokens"])
            assert row["documents"].tolist() == documents and row["positions"].tolist() == positions
            assert {each.dtype for each in row.values()} == {np.dtype(np.int64)}
    aligned = Windows(found, length)
    asked = np.concatenate([aligned[i]["tokens"][1:] for i in range(len(aligned))])
    assert np.array_equal(asked, stream[1 : 1 + len(asked)])  # each token is asked for once


def test_fewer_tokens_than_one_row(tmp_path: Path):
    found = column(tmp_path, SIZES)
    assert len(Windows(found, 87)) == len(Windows(found, 87, aligned=False)) == 1
    with pytest.raises(LaminaError, match="88 tokens; a row of 88 needs 89: give more text, or a shorter length"):
        Windows(found, 88)
    for kind in (Windows, Packed):
        with pytest.raises(LaminaError, match="length=0; it must be a whole number"):
            kind(found, 0)
    with pytest.raises(IndexError, match="row 1; there are 1"):
        Windows(found, 87)[1]
    with pytest.raises(IndexError, match="row -1"):
        Packed(found, 87)[-1]


@pytest.mark.parametrize("lookahead", [1, 2, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_rows_hold_whole_documents(tmp_path: Path, lookahead: int, seed: int):
    sizes = np.random.default_rng(seed).integers(1, 33, 90).tolist()
    packed = Packed(column(tmp_path, sizes), 31, lookahead=lookahead)
    rows: list[list[int]] = []
    open_rows: list[int] = []
    for i, size in enumerate(sizes):  # first fit, as a person would do it
        fits = [row for row in open_rows if sum(sizes[j] for j in rows[row]) + size <= 32]
        if not fits:
            if len(open_rows) == lookahead:
                open_rows.pop(0)
            rows.append([])
            open_rows.append(len(rows) - 1)
            fits = [len(rows) - 1]
        rows[fits[0]].append(i)
        if sum(sizes[j] for j in rows[fits[0]]) == 32:
            open_rows.remove(fits[0])
    assert len(packed) == len(rows) and packed.long == 0
    for i, documents in enumerate(rows):
        row = packed[i]
        expected = np.concatenate([np.arange(sizes[j]) + 100 * j for j in documents])
        real = row["documents"] >= 0
        assert np.array_equal(row["tokens"][real], expected) and real.sum() == real.argmin() % 33 + 32 * real.all()
        documents, positions = naive(expected)
        assert row["documents"][real].tolist() == documents and row["positions"][real].tolist() == positions
        assert (row["positions"][~real] == -1).all() and (row["tokens"][~real] == 0).all()


def test_documents_that_no_row_holds(tmp_path: Path):
    found = column(tmp_path, [3, 23, 8, 9])
    with pytest.raises(LaminaError, match="2 documents have more than 8 tokens, as document 1 with 23: longer='cut'"):
        Packed(found, 7)
    skipped = Packed(found, 7, longer="skip")
    assert skipped.long == 2 and [skipped[i]["tokens"][0] for i in range(len(skipped))] == [0, 200]
    cut = Packed(found, 7, longer="cut", lookahead=1)
    held = [cut[i]["tokens"][cut[i]["documents"] >= 0] for i in range(len(cut))]
    assert sorted(np.concatenate(held).tolist()) == sorted(found.slice(0, found.tokens).tolist())
    assert [len(each) for each in held] == [3, 8, 8, 7, 8, 8, 1]
    over = Packed(found, 7, longer="overlap", lookahead=1)
    rows = [over[i]["tokens"][over[i]["documents"] >= 0] for i in range(len(over))]
    text = [found[i].tolist() for i in range(4)]
    pieces = [text[0], text[1][:8], text[1][7:15], text[1][14:22], text[1][21:], text[2], text[3][:8], text[3][7:]]
    assert [one.tolist() for one in rows] == [*pieces[:4], pieces[4], *pieces[5:]]
    for row, one in enumerate(rows):
        begins, sizes = over.pieces(row)
        assert [found.slice(int(b), int(b + n)).tolist() for b, n in zip(begins, sizes, strict=True)] == [one.tolist()]
    with pytest.raises(LaminaError, match="longer='drop'; it must be 'refuse', 'cut', 'skip' or 'overlap'"):
        Packed(found, 7, longer="drop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LaminaError, match="lookahead=0"):
        Packed(found, 7, lookahead=0)
