"""Databases with the exact engine: what is found equals naive loops; what is wrong is named."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import lamina
from lamina.errors import CheckpointError, LaminaError
from lamina.retrieve import Embedder, Engine, build, open_database
from lamina.retrieve.chunks import Chunks, Documents, key_of, once
from lamina.retrieve.embedding import same
from lamina.retrieve.flat import Growing, mapped
from lamina.retrieve.store import nearest
from tests import tiny
from tests.retrieve import made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """A database not to be changed, the text that it is made of, and the documents."""
    root = tmp_path_factory.mktemp("whole")
    documents = made.texts(40)
    return *made.database(root, documents, batch=16), documents


@pytest.mark.parametrize("chunk", [1, 3, 7, 500])
def test_chunks_are_slices_of_documents(tmp_path: Path, chunk: int):
    documents = [*made.texts(9), "a", "the cat", made.texts(1)[0]]
    prepared = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", documents))
    found = Documents(prepared)
    chosen = once(found.keys)
    assert chosen.tolist() == list(range(11))  # the last is the first again
    chunks = Chunks(found, chosen, chunk)
    expected = made.chunks_of(documents[:11], chunk)
    assert len(chunks) == len(expected)
    for start, stop in ((0, len(chunks)), (2, 3), (len(chunks) // 2, len(chunks)), (1, 1)):
        rows = [made.filled(ids, chunk) for _, ids, _ in expected[start:stop]]
        assert chunks.tokens(start, stop).tolist() == rows
    numbers = np.searchsorted(chunks.starts, np.arange(len(chunks)), side="right") - 1
    assert numbers.tolist() == [number for number, _, _ in expected]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_search_is_brute_force(seed: int):
    torch.manual_seed(seed)
    vectors, queries, count = torch.randn(53, 5), torch.randn(9, 5), 6
    exclude = torch.stack([torch.randint(0, 30, (9, 2)), torch.randint(20, 53, (9, 2))], dim=2)
    blocks = [(at, vectors[at : at + 8], vectors[at : at + 8].square().sum(1)) for at in range(0, 53, 8)]
    found = nearest(iter(blocks), queries, count, exclude)
    for i in range(9):
        allowed = [j for j in range(53) if not any(a <= j < b for a, b in exclude[i].tolist())]
        distance = {j: float((queries[i].double() - vectors[j].double()).square().sum()) for j in allowed}
        best = sorted(allowed, key=lambda j: distance[j])[:count]
        assert found.rows[i, : len(best)].tolist() == best
        assert (found.rows[i, len(best) :] == -1).all() and found.distances[i, len(best) :].isinf().all()
        torch.testing.assert_close(found.distances[i, : len(best)], torch.tensor([distance[j] for j in best]))


def test_neighbours_are_those_of_a_naive_loop(whole):
    database, _, documents = whole
    expected = made.chunks_of(documents, made.CHUNK)
    assert len(database) == len(expected)
    vectors = made.vectors_of(database, [ids for _, ids, _ in expected])
    torch.testing.assert_close(database.store.vectors(torch.arange(len(database))), vectors, rtol=0, atol=1e-5)
    asked = [5, 0, len(expected) - 1, 17]
    chunks = torch.tensor([made.filled(expected[i][1], made.CHUNK) for i in asked])
    exclude = torch.tensor([[[expected[i][0], expected[i][0] + 1]] for i in asked])
    for excluded in (None, exclude):
        found = database.neighbours(chunks, count=4, exclude=excluded)
        assert found.shape == (4, 4, 2 * made.CHUNK)
        for i, place in enumerate(asked):
            distance = (vectors - vectors[place]).square().sum(1).double()
            if excluded is not None:
                distance[[j for j, each in enumerate(expected) if each[0] == expected[place][0]]] = torch.inf
            found_rows = database.search(vectors[place][None], 4, None if excluded is None else excluded[[i]]).rows[0]
            torch.testing.assert_close(distance[found_rows], distance.sort().values[:4], rtol=0, atol=1e-5)
            for k, row in enumerate(found_rows.tolist()):
                value = made.filled(expected[row][1], made.CHUNK) + made.filled(expected[row][2], made.CHUNK)
                assert database.values(torch.tensor([row]))[0].tolist() == value
                if distance.sort().values.diff()[max(k - 1, 0) : k + 1].min() > 1e-4:  # no tie: the order is certain
                    assert found[i, k].tolist() == value


def test_more_neighbours_than_there_are(tmp_path: Path):
    database, _ = made.database(tmp_path, ["the cat sat", "a dog ran over the hill"], chunk=9)
    found = database.neighbours(torch.full((1, 9), 97), count=9)
    rows = len(database)
    assert rows < 9 and (found[0, rows:] == -1).all() and (found[0, :rows, 0] >= 0).all()
    assert database.neighbours(torch.zeros(0, 9, dtype=torch.int64), count=2).shape == (0, 2, 18)
    everything = torch.tensor([[[0, 2]]])
    assert (database.neighbours(torch.full((1, 9), 97), count=2, exclude=everything) == -1).all()


def test_what_is_the_same_document(tmp_path: Path):
    """By its tokens, wherever it lies; by its file, where either is the whole of it."""
    long = "\n".join(made.texts(12, seed=5))
    (tmp_path / "a.txt").write_text(long)
    lines = made.rows(tmp_path / "b.jsonl", made.texts(5, seed=6))
    text = made.prepared(tmp_path / "text", tmp_path / "a.txt", lines)
    build(text, tmp_path / "index", Embedder(made.embedder_at(tmp_path / "bert")), chunk=4)
    database = open_database(tmp_path / "index")

    def spans(prepared) -> list[list[int]]:
        """The documents that are excluded for each document."""
        documents = Documents(prepared)
        sources = prepared.manifest.sources
        hashes = [sources[i].sha256 for i in documents.files]
        single = torch.tensor([sources[i].documents == 1 for i in documents.files])
        own = database.own(torch.from_numpy(documents.keys), hashes, single)
        return [sorted({d for low, high in each.tolist() for d in range(low, high)}) for each in own]

    assert spans(text) == [[0], [1], [2], [3], [4], [5]]
    copy = made.prepared(tmp_path / "copy", made.rows(tmp_path / "c.jsonl", ["new", made.texts(5, seed=6)[3]]))
    assert spans(copy) == [[], [4]]
    cut = made.prepared(tmp_path / "lines", tmp_path / "a.txt", split_on="\n")
    assert all(0 in each for each in spans(cut)) and len(cut.columns["text"]) == 12
    from lamina.data import open_prepared

    made.prepare(
        made.find([str(tmp_path / "a.txt")]),
        tmp_path / "end",
        tiny.tokenizer(),
        made.PrepareSpec(validation=0.2, split="end"),
    )
    assert spans(open_prepared(tmp_path / "end/train")) == spans(open_prepared(tmp_path / "end/validation")) == [[0]]


def test_documents_that_are_twice_are_kept_once_and_said(tmp_path: Path):
    documents = ["the cat sat", "a dog", "the cat sat", "the cat sat"]
    database, _ = made.database(tmp_path, documents, chunk=3)
    assert database.spec.documents == 2
    assert database.spec.notes == ("documents left out, which are the same as others: 2",)
    assert len(database) == len(made.chunks_of(documents[:2], 3))


def test_chunks_too_long_for_the_embedder_are_cut_and_said(tmp_path: Path):
    long = ". " * 40  # 40 tokens of the embedder, which reads 32 with [CLS] and [SEP]
    database, _ = made.database(tmp_path, [long, "the cat sat"], chunk=100)
    assert database.spec.notes == ("chunks cut for the embedder, which reads less: 1",)
    ids = tiny.words().encode(long, special=False)[:30]
    model = lamina.load(tmp_path / "bert")
    expected = model(torch.tensor([[2, *ids, 3]])).hidden[0].mean(0)
    torch.testing.assert_close(
        database.store.vectors(torch.arange(1))[0], expected / expected.norm(), rtol=0, atol=1e-5
    )


def test_a_document_may_be_larger_than_memory(tmp_path: Path):
    (tmp_path / "long.txt").write_text("ab" * 700_000)
    prepared = made.prepared(tmp_path / "text", tmp_path / "long.txt")
    found = Documents(prepared)  # imports and maps what there is
    tracemalloc.start()
    again = Documents(prepared)
    chunks = Chunks(again, once(again.keys), 64)
    assert chunks.tokens(9000, 9002).tolist() == [[97, 98] * 32] * 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert again.sizes.tolist() == [1_400_000] and peak < 1_400_000  # less than a byte a token
    assert found.keys.tolist() == again.keys.tolist() == [key_of([np.tile([97, 98], 700_000)])]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_not_stored(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch):
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", made.texts(9)))
    model = Embedder(made.embedder_at(tmp_path / "bert"))

    def broken(self: Embedder, texts: list[str]) -> torch.Tensor:
        vectors = torch.zeros(len(texts), 32)
        vectors[2] = value if len(calls) else 0
        calls.append(len(texts))
        return vectors

    calls: list[int] = []
    monkeypatch.setattr(Embedder, "__call__", broken)
    with pytest.raises(LaminaError, match=r"bert in float32: the vector of row 10 is not finite"):
        build(text, tmp_path / "index", model, chunk=2, batch=8)
    assert calls == [8, 8]


@pytest.mark.parametrize("field, value", [("width", 33), ("pooling", "first"), ("normalise", False),
                                          ("dtype", "bfloat16"), ("hash", "f" * 64)])  # fmt: skip
def test_whatever_differs_between_embedders_is_named_with_both(whole, field: str, value):
    known = whole[0].spec.embedder
    other = known.replace(source="other", **{field: value})
    with pytest.raises(LaminaError, match=rf"bert \({field} .*\), and this is other \({field} {str(value)[:12]}"):
        same(known, other)
    same(known, known.replace(source="moved"))


def test_nothing_to_find(tmp_path: Path):
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", ["a"]))
    with pytest.raises(LaminaError, match="chunk is 0"):
        build(text, tmp_path / "index", Embedder(made.embedder_at(tmp_path / "bert")), chunk=0)


# What does not fit.


def test_other_chunks_tokenizers_and_embedders_are_refused_with_both(whole, tmp_path: Path):
    database, _, _ = whole
    with pytest.raises(LaminaError, match=r"chunks of 7 tokens, and is asked for those of \(2, 64\)"):
        database.neighbours(torch.zeros(2, 64, dtype=torch.int64), count=1)
    with pytest.raises(LaminaError, match=rf"{database.spec.tokenizer[:12]}.*{tiny.words().hash[:12]}"):
        database.check_tokenizer(tiny.words())
    database.check_tokenizer(tiny.tokenizer())
    other = made.embedder_at(tmp_path / "other", seed=1)
    reopened = open_database(database.directory, embedder=str(other))
    with pytest.raises(LaminaError, match=r"made by .*bert \(hash .*\), and this is .*other \(hash"):
        assert reopened.embedder
    with pytest.raises(LaminaError, match=r"shape \(2, 5\); the database has vectors of 32"):
        database.search(torch.zeros(2, 5), 1)
    with pytest.raises(LaminaError, match="query 1 is not finite"):
        database.search(torch.tensor([[0.0] * 32, [torch.nan] * 32]), 1)
    for count in (0, True, 1.5):
        with pytest.raises(LaminaError, match="count is"):
            database.search(torch.zeros(1, 32), count)


def test_a_database_is_replaced_only_when_asked(tmp_path: Path):
    database, text = made.database(tmp_path, made.texts(3))
    model = Embedder(tmp_path / "bert")
    with pytest.raises(LaminaError, match="holds a database already"):
        build(text, tmp_path / "index", model, chunk=5)
    build(text, tmp_path / "index", model, chunk=5, force=True)
    newer = open_database(tmp_path / "index")
    assert (database.spec.chunk, newer.spec.chunk) == (made.CHUNK, 5)
    assert database.folder.is_dir() and database.search(torch.zeros(1, 32), 2).rows.shape == (1, 2)
    database.close()
    newer.close()
    build(text, tmp_path / "index", model, chunk=6, force=True)
    assert not database.folder.exists() and not newer.folder.exists()
    (tmp_path / "else").mkdir()
    (tmp_path / "else/file").write_text("mine")
    with pytest.raises(LaminaError, match="holds 'file', so it is no database"):
        build(text, tmp_path / "else", model)


def test_what_another_wish_left_is_not_gone_on_with(tmp_path: Path):
    documents = made.texts(20)
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", documents))
    model, seen = Embedder(made.embedder_at(tmp_path / "bert")), []

    def stop(progress) -> None:
        seen.append(progress.rows)
        if progress.rows == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(text, tmp_path / "index", model, chunk=5, batch=8, report=stop)
    seen.clear()
    build(text, tmp_path / "index", model, chunk=6, batch=1000, report=lambda p: seen.append(p.begun))
    assert seen[0] == 0
    found = open_database(tmp_path / "index")
    expected = [made.filled(ids, 6) for _, ids, _ in made.chunks_of(documents, 6)]
    assert found.store.tokens(torch.arange(len(found))).tolist() == expected
    with pytest.raises(KeyboardInterrupt):
        build(text, tmp_path / "other", model, chunk=5, batch=8, report=stop)
    build(text, tmp_path / "other", model, chunk=5, batch=8, report=lambda p: seen.append(p.begun))
    assert seen[-1] == 16  # the same wish is


# Damage.


@pytest.fixture
def copied(whole, tmp_path: Path) -> Path:
    """The generation of a copy that may be damaged."""
    database = whole[0]
    shutil.copytree(database.directory, tmp_path / "index")
    return tmp_path / "index" / database.folder.name


def test_a_whole_database_is_verified(copied: Path):
    open_database(copied.parent).verify()


FILES = ("vectors", "squares", "tokens", "documents")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1, -10_000])
def test_truncated_and_too_long_files_are_named(copied: Path, name: str, change: int):
    path = copied / f"{name}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: max(len(data) + change, 0)] if change < 0 else data + b"\0")
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors.*has [\d,]+ bytes, and index.json says"):
        open_database(copied.parent)
    # Also where the manifest was made to agree, the file's own header does not.
    said = json.loads((copied / "index.json").read_text())
    for file in said["files"]:
        if file["item"]["name"] == path.name:
            file["item"]["bytes"] = path.stat().st_size
    (copied / "index.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors"):
        open_database(copied.parent)


@pytest.mark.parametrize("name", FILES)
def test_random_damage_of_a_header_never_maps_what_is_not_there(copied: Path, name: str):
    path, random = copied / f"{name}.safetensors", np.random.default_rng(0)
    whole_file = path.read_bytes()
    size = 8 + int.from_bytes(whole_file[:8], "little")
    for _ in range(150):
        data = bytearray(whole_file)
        for at in random.integers(0, size, random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        path.write_bytes(data)
        said = name
        try:  # damage that changes nothing that counts (spaces, or the same byte) is none
            assert open_database(copied.parent).search(torch.zeros(1, 32), 3).rows.max() < 1000
        except CheckpointError as error:
            said = str(error)
        assert name in said


def _overwrite(path: Path, dtype: str, at: int, value: float) -> None:
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + at * np.dtype(dtype).itemsize
    data[start : start + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named(copied: Path, value: float):
    _overwrite(copied / "vectors.safetensors", "<f4", 32 * 3 + 5, value)
    with pytest.raises(CheckpointError, match=r"vectors.safetensors: the vector of row 3 is not finite"):
        open_database(copied.parent).search(torch.zeros(1, 32), 1)
    _overwrite(copied / "squares.safetensors", "<f4", 4, value)
    with pytest.raises(CheckpointError, match=r"the vector of row 4 is not finite"):
        open_database(copied.parent)


@pytest.mark.parametrize("value", [-2, 263, 2**31 - 1])
def test_ids_that_are_none_are_named(copied: Path, value: int):
    _overwrite(copied / "tokens.safetensors", "<i4", 2 * made.CHUNK + 1, value)
    with pytest.raises(CheckpointError, match=rf"row 2 holds id {value:,}; the vocabulary has 263"):
        open_database(copied.parent).values(torch.tensor([2]))
    with pytest.raises(CheckpointError, match=r"tokens.safetensors: SHA-256 .* damaged"):
        open_database(copied.parent).verify()


@pytest.mark.parametrize(
    "at, value, said", [(0, 1, "starts do not grow"), (3, -5, "starts do not grow"), (3, 10**9, "starts do not grow")]
)
def test_documents_that_do_not_follow_each_other(copied: Path, at: int, value: int, said: str):
    order = ["files", "keys", "starts"]
    assert order == sorted(order)
    documents = open_database(copied.parent).spec.documents
    _overwrite(copied / "documents.safetensors", "<i8", 2 * documents + at, value)
    with pytest.raises(CheckpointError, match=said):
        open_database(copied.parent)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rows": 10**15}, "starts do not grow from 0 to 1,000,000,000,000,000"),
        ({"rows": -1}, "each must be 1 or more"),
        ({"width": 33}, "vectors.safetensors: holds"),
        ({"chunk": 8}, "tokens.safetensors: holds"),
        ({"documents": 3}, "starts is not int64"),
        ({"engine": "lance"}, "lance alone has a table"),
        ({"engine": "other"}, "engine is 'other'"),
        ({"format": 2}, "format 2; this lamina reads formats 1 to 1"),
        ({"nothing": 2}, "unknown field of IndexSpec 'nothing'"),
        ({"files": [{"type": "StoredFile", "name": "../x", "bytes": 1, "sha256": ""}]}, "only files below"),
    ],
)
def test_a_manifest_that_lies(copied: Path, change: dict, said: str):
    data = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps(data | change))
    with pytest.raises(CheckpointError, match=said):
        open_database(copied.parent)


def test_what_is_not_there(copied: Path):
    index = copied.parent
    (index / "current").write_text("../../elsewhere\n")
    with pytest.raises(CheckpointError, match=r"current: names '../../elsewhere'; it must name a generation"):
        open_database(index)
    (index / "current").write_text("generation-7\n")
    with pytest.raises(CheckpointError, match="generation-7: is missing"):
        open_database(index)
    (index / "current").unlink()
    (index / ".building").mkdir()
    with pytest.raises(LaminaError, match="no database: it has no file 'current'; .building is one that was begun"):
        open_database(index)
    with pytest.raises(LaminaError, match="engine exact keeps its rows in the directory"):
        Engine("exact", "s3://bucket")


def test_a_file_that_grows_is_no_file_until_its_last_row(tmp_path: Path):
    rows = torch.arange(15, dtype=torch.float32).reshape(5, 3)
    file = Growing(tmp_path, "x", torch.float32, (5, 3))
    file.append(rows[:2])
    file.sync()
    with pytest.raises(CheckpointError, match="truncated"):
        mapped(tmp_path, "x", torch.float32, (5, 3))
    file.append(rows[2:3])  # and is killed before it is put on the disk
    file.close()
    file = Growing(tmp_path, "x", torch.float32, (5, 3), done=2)
    file.append(rows[2:])
    file.close()
    assert torch.equal(mapped(tmp_path, "x", torch.float32, (5, 3)), rows)
    with pytest.raises(CheckpointError, match=r"holds x float32 \[5, 3\]; the manifest says x float32 \[5, 4\]"):
        mapped(tmp_path, "x", torch.float32, (5, 4))
    with pytest.raises(CheckpointError, match="not what its writer left"):
        Growing(tmp_path, "x", torch.float32, (5, 3), done=6)
    with pytest.raises(CheckpointError, match="not what its writer left"):
        Growing(tmp_path, "x", torch.float32, (6, 3), done=2)
