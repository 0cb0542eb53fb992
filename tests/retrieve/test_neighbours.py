"""Neighbours found before training, what is left out of them, and how much of a text they hold."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lamina
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.retrieve import Embedder, build, find_neighbours, open_database, open_neighbours
from lamina.retrieve.chunks import Documents
from lamina.retrieve.neighbours import of_text
from lamina.retrieve.overlap import Losses, by_overlap, longest_common, losses, overlaps, windows_of
from tests import tiny
from tests.retrieve import made


def naive(chunk: list[int], neighbours: list[list[int]]) -> int:
    """The longest run of `chunk` that is in one of the others, by trying all of them."""
    best = 0
    for i in range(len(chunk)):
        for j in range(i + 1, len(chunk) + 1):
            run = chunk[i:j]
            if -1 not in run and any(
                run == other[at : at + len(run)] for other in neighbours for at in range(len(other))
            ):
                best = max(best, len(run))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("m, r, k", [(5, 10, 3), (1, 2, 1), (8, 3, 2), (6, 12, 1)])
def test_the_longest_common_run_is_that_of_a_naive_search(seed: int, m: int, r: int, k: int):
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.randint(-1, 3, (9, m), generator=generator)
    values = torch.randint(-1, 3, (9, k, r), generator=generator)
    chunks[0], values[1] = -1, -1
    if r > m:
        values[2, k - 1, r - m :] = chunks[2] = torch.arange(m)
    expected = [naive(chunks[i].tolist(), values[i].tolist()) for i in range(9)]
    assert longest_common(chunks, values).tolist() == expected
    assert expected[0] == expected[1] == 0 and (r <= m or expected[2] == m)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory):
    """A database, and a text of which some documents are in it: whole, and as they are."""
    root = tmp_path_factory.mktemp("room")
    documents = made.texts(30)
    database, text = made.database(root, documents)
    other = made.prepared(root / "other", made.rows(root / "o.jsonl", [*made.texts(4, seed=9), documents[3], "a"]))
    return root, database, text, other, documents


def test_neighbours_are_those_of_a_search_without_the_document(room, tmp_path: Path):
    _, database, text, _, documents = room
    found = find_neighbours(database, text, tmp_path / "n", count=3, batch=16)
    expected = made.chunks_of(documents, made.CHUNK)
    rows = made.chunks_of(documents, made.CHUNK)
    vectors = made.vectors_of(database, [ids for _, ids, _ in expected])
    assert found.starts.tolist() == [0, *np.cumsum(np.bincount([number for number, _, _ in expected])).tolist()]
    for i, (number, ids, _) in enumerate(expected):
        if len(ids) < made.CHUNK:
            assert (found.rows[i] == -1).all() and (found.values(torch.tensor([i])) == -1).all()
            continue
        others = torch.tensor([row[0] != number for row in rows])
        distance = (vectors - vectors[i]).square().sum(1).masked_fill(~others, torch.inf)
        assert all(rows[row][0] != number for row in found.rows[i].tolist())
        torch.testing.assert_close(distance[found.rows[i]], distance.sort().values[:3], rtol=0, atol=1e-5)
        value = [made.filled(rows[row][1], 7) + made.filled(rows[row][2], 7) for row in found.rows[i].tolist()]
        assert found.values(torch.tensor([[i]]))[0, 0].tolist() == value
    again = open_neighbours(tmp_path / "n", database, text)
    assert torch.equal(again.rows, found.rows)
    assert (found.values(torch.tensor([-1, 0]))[0] == -1).all()


def test_nothing_leaks_from_the_document_itself(room, tmp_path: Path):
    """A document of the text that is in the database too: without the exclusion its own next chunk would be found."""
    _, database, _, other, documents = room
    found = find_neighbours(database, other, tmp_path / "n", count=2)
    low, high = found.starts[4:6].tolist()
    own = {row for row in range(len(database)) if database.document_of(torch.tensor(row)) == 3}
    whole = [i for i in range(low, high) if (found.rows[i] >= 0).all()]
    assert len(whole) >= 1 and not own & set(found.rows[low:high].flatten().tolist())
    ids = tiny.tokenizer().encode(documents[3], special=False, control=False)
    chunk = torch.tensor([ids[: made.CHUNK]])
    leaked = database.neighbours(chunk, count=1)[0, 0]
    assert leaked[: len(ids)].tolist() == ids[: 2 * made.CHUNK]  # what would be found


def test_what_is_in_the_database_is_not_embedded_again(room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of `other` one document is in it, token by token, and its chunks were embedded when it was built."""
    _, database, text, other, documents = room
    asked: list[str] = []
    embed = Embedder.__call__

    def noting(self: Embedder, texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(Embedder, "__call__", noting)
    find_neighbours(database, text, tmp_path / "text", batch=16)
    assert not asked
    find_neighbours(database, other, tmp_path / "other")
    decode = tiny.tokenizer().decode
    whole = [decode(ids) for _, ids, _ in made.chunks_of(documents[3:4], made.CHUNK) if len(ids) == made.CHUNK]
    assert whole and asked and not set(whole) & set(asked)


def test_a_search_goes_on_after_a_kill(room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, database, text, _, _ = room
    whole = find_neighbours(database, text, tmp_path / "whole", batch=16)
    calls = []

    def stop(progress) -> None:
        calls.append(progress.rows)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_neighbours(database, text, tmp_path / "n", batch=16, report=stop)
    with pytest.raises(LaminaError, match=r"no neighbours.json.*lamina index neighbours"):
        open_neighbours(tmp_path / "n", database, text)
    calls.clear()
    found = find_neighbours(database, text, tmp_path / "n", batch=16, report=lambda p: calls.append(p.rows))
    assert calls[0] == 48 and torch.equal(found.rows, whole.rows)
    with pytest.raises(LaminaError, match="holds neighbours already"):
        find_neighbours(database, text, tmp_path / "n")


def test_neighbours_of_something_else_are_refused(room, tmp_path: Path):
    root, database, text, other, _ = room
    find_neighbours(database, text, tmp_path / "n")
    with pytest.raises(LaminaError, match=r"neighbours of another text \(SHA-256"):
        open_neighbours(tmp_path / "n", database, other)
    build(text, tmp_path / "newer", Embedder(root / "bert"), chunk=made.CHUNK + 1)
    with pytest.raises(LaminaError, match=r"neighbours of another database \(SHA-256"):
        open_neighbours(tmp_path / "n", open_database(tmp_path / "newer"), text)
    path = tmp_path / "n/rows.safetensors"
    data = bytearray(path.read_bytes())
    data[-8:] = (10**6).to_bytes(8, "little")
    path.write_bytes(data)
    found = open_neighbours(tmp_path / "n", database, text)
    with pytest.raises(CheckpointError, match=r"rows -?\d+ to 1,000,000; the database has"):
        found.values(torch.arange(found.spec.chunks))


def window_at(at: int, size: int, window: int, stride: int, chunk: int = made.CHUNK) -> int:
    """Where the window begins that the token `at` of a text of `size` is read in."""
    last = window if at < window else window + -(-(at - window + 1) // stride) * stride
    begin = max(min(last, size) - window, 0)
    return -(-begin // chunk) * chunk


@pytest.mark.parametrize("count", [1, 3])
def test_losses_with_neighbours_are_those_of_each_token_alone(room, tmp_path: Path, count: int):
    """By hand: the model is given the window and the neighbours of its whole chunks anew for each token."""
    _, database, text, other, _ = room
    model = lamina.load(made.reader_at(tmp_path / "retro")).double()
    for number, prepared in enumerate((text, other)):
        found = find_neighbours(database, prepared, tmp_path / f"n{number}", count=count)
        lost = losses(model, prepared, made.CHUNK, 14, 7, found)
        plain = losses(model, prepared, made.CHUNK, 14, 7)
        assert not torch.allclose(lost.nats, plain.nats) and torch.equal(lost.tokens, plain.tokens)
        chunks = Documents(prepared).bodies
        for document in range(0, len(found.starts) - 1, 3):
            ids, low = chunks.document(document).tolist(), int(found.starts[document])
            expected = torch.zeros(-(-len(ids) // made.CHUNK), dtype=torch.float64)
            for at in range(1, len(ids)):
                begin = window_at(at, len(ids), 14, 7)
                whole = (at - begin) // made.CHUNK
                numbers = low + begin // made.CHUNK + torch.arange(whole)
                with torch.inference_mode():
                    given = found.values(numbers)[None] if whole else None
                    logits = model(torch.tensor([ids[begin:at]]), neighbours=given).logits[0, -1]
                expected[at // made.CHUNK] -= float(logits.log_softmax(0)[ids[at]])
            torch.testing.assert_close(lost.nats[low : low + len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_windows_hold_whole_chunks(tmp_path: Path):
    model = lamina.load(made.reader_at(tmp_path / "retro"))  # of 64 tokens
    assert windows_of(model, 7) == (63, 28) and windows_of(model, 7, 14) == (14, 7)
    for window, stride in ((15, 7), (14, 5), (14, 14), (7, None)):
        with pytest.raises(LaminaError, match=rf"window={window} .* must be multiples of 7"):
            windows_of(model, 7, window, stride)
    with pytest.raises(LaminaError, match="at most the 64 tokens"):
        windows_of(model, 7, 70)


def test_a_text_is_told_by_its_hash(room, tmp_path: Path):
    _, database, text, other, _ = room
    one, two = tmp_path / "one", tmp_path / "two"
    find_neighbours(database, text, one)
    with pytest.raises(LaminaError, match=r"its neighbours are not in .*one; find them with: lamina index neighbours"):
        of_text([one], database, other)
    find_neighbours(database, other, two)
    assert of_text([one, two], database, other).directory == two
    assert of_text([one, two], database, text).directory == one
    with pytest.raises(LaminaError, match="none: no neighbours.json"):
        of_text([tmp_path / "none", one], database, text)


def test_who_may_read_a_database(room, tmp_path: Path):
    _, database, _, _, _ = room
    spec = lamina.spec(made.reader_at(tmp_path / "retro"))
    database.check_reader(spec, tiny.tokenizer())
    with pytest.raises(LaminaError, match="has chunks of 7 tokens, and this model reads the neighbours of 5: build"):
        database.check_reader(lamina.spec(made.reader_at(tmp_path / "five", chunk=5)), tiny.tokenizer())
    with pytest.raises(UnsupportedError, match="no layer that reads neighbours"):
        database.check_reader(tiny.spec(tiny.LLAMA), tiny.tokenizer())
    with pytest.raises(LaminaError, match="ids of another tokenizer"):
        database.check_reader(spec, tiny.words())


def test_overlaps_and_losses_by_chunk(room, tmp_path: Path):
    _, database, text, _, documents = room
    found = find_neighbours(database, text, tmp_path / "n", count=2)
    longest = overlaps(found, text)
    chunks = made.chunks_of(documents, made.CHUNK)
    model = lamina.load(tiny.checkpoint(tmp_path / "llama"))
    lost = losses(model, text, made.CHUNK, window=21, stride=7)
    for number in (0, 7):
        ids = tiny.tokenizer().encode(documents[number], special=False, control=False)
        nats = []
        for at in range(1, len(ids)):  # token by token, with what the window holds, from the beginning of a chunk on
            begin = window_at(at, len(ids), 21, 7)
            with torch.inference_mode():
                logits = model(torch.tensor([ids[begin:at]])).logits[0, -1]
            nats.append(-float(logits.log_softmax(0)[ids[at]]))
        low = int(found.starts[number])
        for at in range(int(found.starts[number + 1]) - low):
            here = nats[max(at * 7 - 1, 0) : at * 7 + 6]
            assert math.isclose(float(lost.nats[low + at]), sum(here), rel_tol=1e-4, abs_tol=1e-5)
            assert int(lost.tokens[low + at]) == len(here)
    text_bytes = sum(len(document.encode()) for document in documents)
    assert int(lost.bytes.sum()) == text_bytes
    for i, (_, ids, _) in enumerate(chunks):
        values = found.values(torch.tensor([i]))[0].tolist()
        assert int(longest[i]) == (naive(ids, values) if len(ids) == made.CHUNK else -1)
    rows = by_overlap(longest, lost, made.CHUNK, (0.3, 1.0))
    chosen = [[i for i in range(len(chunks)) if 0 <= longest[i] <= most] for most in (2, 7)]
    for row, here in zip(rows, chosen, strict=True):
        assert (row.chunks, row.tokens) == (len(here), int(lost.tokens[here].sum()))
        bits = float(lost.nats[here].sum()) / math.log(2) / int(lost.bytes[here].sum()) if here else math.nan
        assert row.bits_per_byte == pytest.approx(bits, nan_ok=True)
    assert rows[1].chunks == sum(len(ids) == made.CHUNK for _, ids, _ in chunks)
    with pytest.raises(LaminaError, match="of the same text"):
        by_overlap(longest[:3], Losses(lost.nats, lost.tokens, lost.bytes), made.CHUNK)
