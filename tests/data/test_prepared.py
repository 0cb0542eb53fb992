"""The format on disk: what is written is read back, from any place of it, and what is wrong with it is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from lamina.data import Prepared, SourceFile, Writer, open_prepared
from lamina.errors import LaminaError
from tests import tiny


def texts(seed: int, documents: int = 57, vocabulary: int = 263) -> list[np.ndarray]:
    """Documents of 1 to 40 ids, made here and not by what is tested."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, random.integers(1, 41)) for _ in range(documents)]


def written(directory: Path, documents: list[np.ndarray], **more) -> Prepared:
    tokenizer = tiny.tokenizer()
    settings = {"vocabulary": tokenizer.vocabulary, "tokenizer": tokenizer.hash} | more
    writer = Writer(directory, **settings)
    for document in documents:
        writer.add({"text": document})
    writer.close()
    tokenizer.save(directory)
    return open_prepared(directory, verify=True)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return written(tmp_path / "data", texts(0), shard_tokens=100)


@pytest.mark.parametrize("shard", [1, 100, 333, 10**9])
@pytest.mark.parametrize("end", [None, 257])
def test_every_document_and_every_slice_of_the_stream(tmp_path: Path, shard: int, end: int | None):
    documents = texts(1)
    prepared = written(tmp_path / "data", documents, shard_tokens=shard, end=end)
    whole = [np.append(each, end) if end is not None else each for each in documents]
    column = prepared.columns["text"]
    assert len(column) == column.documents == prepared.documents == 57
    for i, document in enumerate(whole):
        assert column[i].dtype == np.int64 and np.array_equal(column[i], document)
    stream = np.concatenate(whole)
    assert column.tokens == prepared.tokens == len(stream)
    begins = np.cumsum([0, *map(len, whole)])[:-1]
    random = np.random.default_rng(2)
    places = [(0, len(stream)), (0, 0), (len(stream), len(stream))]
    places += [tuple(sorted(random.integers(0, len(stream) + 1, 2))) for _ in range(300)]
    places += [(int(b), int(b) + 7) for b in begins[:20] if b + 7 <= len(stream)]
    for start, stop in places:
        assert np.array_equal(column.slice(start, stop), stream[start:stop])
        expected = [b - start for b in begins if start <= b < stop]
        assert column.starts(start, stop).tolist() == expected, (start, stop)
    assert column.lengths().tolist() == [len(each) for each in whole]


def test_the_stream_has_ends(prepared: Prepared):
    column = prepared.columns["text"]
    for start, stop in ((-1, 3), (5, 4), (0, column.tokens + 1)):
        with pytest.raises(IndexError, match="there are"):
            column.slice(start, stop)
        with pytest.raises(IndexError, match="there are"):
            column.starts(start, stop)
    for document in (-1, 57):
        with pytest.raises(IndexError, match="there are 57"):
            column[document]


def test_pieces_and_what_was_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.data.writer.BUFFER", 7)
    writer = Writer(tmp_path, vocabulary=300, tokenizer="x", shard_tokens=20)
    documents = texts(3, 20)
    for i, document in enumerate(documents):
        for start in range(0, len(document), 3):
            writer.extend(document[start : start + 3])
        if i % 4 == 1:
            writer.cancel()
            writer.extend([1, 2])
            writer.cancel()
        else:
            writer.finish()
    writer.extend([5])  # of a document that never ends
    writer.close()
    column = open_prepared(tmp_path).columns["text"]
    kept = [each for i, each in enumerate(documents) if i % 4 != 1]
    assert np.array_equal(column.slice(0, column.tokens), np.concatenate(kept))


def test_uint16_up_to_65536_and_uint32_beyond(tmp_path: Path):
    for vocabulary, size in ((65_536, 2), (65_537, 4)):
        directory = tmp_path / str(vocabulary)
        writer = Writer(directory, vocabulary=vocabulary, tokenizer="x")
        writer.add({"text": [vocabulary - 1, 0]})
        writer.close()
        raw = (directory / "text-00000.tokens").read_bytes()
        assert raw == (vocabulary - 1).to_bytes(size, "little") + bytes(size)
        assert open_prepared(directory).columns["text"][0].tolist() == [vocabulary - 1, 0]


def test_pairs_labels_and_scores(tmp_path: Path):
    writer = Writer(tmp_path / "pairs", kind="pairs", vocabulary=300, tokenizer="x", shard_tokens=9, end=299)
    pairs = list(zip(texts(4, 30), texts(5, 30), strict=True))
    for source, target in pairs:
        writer.add({"source": source, "target": target})
    writer.close()
    found = open_prepared(tmp_path / "pairs")
    for i, (source, target) in enumerate(pairs):
        assert found.columns["source"][i].tolist() == [*source, 299]
        assert found.columns["target"][i].tolist() == [*target, 299]

    writer = Writer(tmp_path / "classes", kind="classification", values="labels", vocabulary=300, tokenizer="x")
    for i, text in enumerate(texts(6, 10)):
        writer.add({"text": text}, i % 3)
    writer.close(labels=("ham", "maybe", "spam"))
    found = open_prepared(tmp_path / "classes")
    assert found.labels is not None and found.labels.tolist() == [i % 3 for i in range(10)]
    assert found.label_names == ("ham", "maybe", "spam") and found.scores is None

    writer = Writer(tmp_path / "alike", kind="contrastive", values="scores", vocabulary=300, tokenizer="x")
    writer.add({"first": [1], "second": [2, 3]}, 0.25)
    writer.close()
    found = open_prepared(tmp_path / "alike")
    assert found.scores is not None and found.scores.tolist() == [0.25] and found.labels is None

    writer = Writer(tmp_path / "words", kind="token-classification", vocabulary=300, tokenizer="x", end=299)
    writer.add({"tokens": [7, 8, 9], "labels": [0, -100, 1]})
    writer.close(labels=("O", "PER"))
    found = open_prepared(tmp_path / "words")
    assert found.columns["labels"][0].tolist() == [0, -100, 1, -100] and found.columns["tokens"][0].tolist()[-1] == 299


def test_what_a_writer_refuses(tmp_path: Path):
    writer = Writer(tmp_path / "a", vocabulary=300, tokenizer="x")
    with pytest.raises(LaminaError, match="no token in column 'text'"):
        writer.finish()
    with pytest.raises(LaminaError, match="no document to write"):
        writer.close()
    writer.add({"text": [300]})
    with pytest.raises(LaminaError, match="ids 300 to 300 in column 'text'; the vocabulary has 300"):
        writer.close()
    writer.stop()
    writer = Writer(tmp_path / "b", vocabulary=300, tokenizer="x")
    with pytest.raises(LaminaError, match="value 3, and values are None"):
        writer.add({"text": [1]}, 3)
    writer.finish()
    writer.close()
    with pytest.raises(LaminaError, match="holds prepared data already"):
        Writer(tmp_path / "b", vocabulary=300, tokenizer="x")


@pytest.mark.parametrize("at", [0, 1, 23, 40])
def test_a_writer_goes_on_from_its_state(tmp_path: Path, at: int):
    """The same bytes as without the interruption, whatever was written after the state and lost."""
    documents = texts(7, 41)

    def begin(directory: Path, **more) -> Writer:
        settings = {"kind": "classification", "values": "labels", "shard_tokens": 120}
        return Writer(directory, vocabulary=263, tokenizer="x", end=257, **settings, **more)

    for name in ("whole", "killed"):
        writer = begin(tmp_path / name)
        for i, document in enumerate(documents):
            if name == "killed" and i == at:
                state = json.loads(json.dumps(writer.state()))
            writer.add({"text": document}, i % 2)
        if name == "killed":
            for document in texts(9, 200):
                writer.add({"text": document}, 1)  # more than will be, and lost
            writer.state()  # everything is on the disk; data.json is not
            writer.stop()
            writer = begin(tmp_path / name, state=state)
            for i, document in list(enumerate(documents))[at:]:
                writer.add({"text": document}, i % 2)
        writer.close(labels=("a", "b"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == files
    assert len(files) > 10


def test_a_copy_takes_no_tokens_along(prepared: Prepared):
    column = prepared.columns["text"]
    column.slice(0, column.tokens)
    assert column._maps and not copy.copy(column)._maps
    assert np.array_equal(copy.deepcopy(column).slice(3, 90), column.slice(3, 90))


def test_the_hash_is_of_the_content(tmp_path: Path, prepared: Prepared):
    assert written(tmp_path / "again", texts(0), shard_tokens=100).hash == prepared.hash
    assert written(tmp_path / "other", texts(8), shard_tokens=100).hash != prepared.hash


def test_another_tokenizer_is_refused(prepared: Prepared, tmp_path: Path):
    prepared.check_tokenizer(tiny.tokenizer())
    other = json.loads(tiny.tokenizer().backend.to_str())
    other["model"]["vocab"] |= {"a": other["model"]["vocab"]["b"], "b": other["model"]["vocab"]["a"]}
    path = prepared.directory / "tokenizer.json"
    path.write_text(json.dumps(other))
    with pytest.raises(LaminaError, match="prepared with another tokenizer"):
        open_prepared(prepared.directory, verify=True)
    with pytest.raises(LaminaError, match="prepare the data anew with --tokenizer"):
        prepared.tokenizer()


def test_sources_that_changed(tmp_path: Path):
    import hashlib

    paths = [tmp_path / name for name in ("same.txt", "longer.txt", "other.txt", "gone.txt")]
    sources = []
    for path in paths:
        path.write_bytes(b"text")
        known = hashlib.sha256(b"text").hexdigest()
        sources.append(SourceFile(name=str(path), bytes=4, sha256=known, documents=1, tokens=1))
    writer = Writer(tmp_path / "data", vocabulary=9, tokenizer="x")
    writer.add({"text": [1]})
    writer.close(sources=sources)
    paths[1].write_bytes(b"texts")
    paths[2].write_bytes(b"test")
    paths[3].unlink()
    prepared = open_prepared(tmp_path / "data")
    first, second = prepared.changed()
    assert first.startswith(f"{paths[1]}: 5 bytes now, 4 when") and second.startswith(f"{paths[2]}: another content")
    assert len(prepared.changed(contents=False)) == 1


def edit(prepared: Prepared, change) -> None:
    path = prepared.directory / "data.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shards(data) -> list[dict]:
    """Where data.json has them; each stands in a run of equal ones."""
    return [each["item"] for each in data["columns"][0]["shards"]]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda d: d.update(format=2), "format 2; this lamina reads formats 1 to 1"),
        (lambda d: d.pop("format"), "format None"),
        (lambda d: d.update(vocab=3), "unknown field of Manifest 'vocab'; did you mean 'vocabulary'"),
        (lambda d: d.pop("tokenizer"), "lacks the field 'tokenizer'"),
        (lambda d: d.update(kind="pairs"), "columns are text; pairs has source, target"),
        (lambda d: d.update(vocabulary=70_000), "column 'text' is uint16; for a vocabulary of 70,000 it is uint32"),
        (lambda d: d["columns"][0].update(dtype="uint32"), "column 'text' is uint32; for a vocabulary of 263"),
        (lambda d: d["columns"][0].update(dtype="float64"), "ColumnFiles.dtype is 'float64'"),
        (lambda d: d.update(documents=56), "column 'text' has 57 documents; there are 56"),
        (lambda d: shards(d)[1].update(tokens=0), "each document has a token"),
        (lambda d: shards(d)[1].update(tokens=3**9), "text-00001.tokens: .* bytes, data.json says 39,366"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies(prepared: Prepared, change, said: str):
    edit(prepared, change)
    with pytest.raises(LaminaError, match=said):
        open_prepared(prepared.directory)


def test_files_that_are_damaged(prepared: Prepared):
    path = prepared.directory / "text-00002.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(LaminaError, match=r"text-00002.tokens: \d+ bytes, data.json says \d+: truncated"):
        open_prepared(prepared.directory)
    path.write_bytes(whole + b"\0")
    with pytest.raises(LaminaError, match="too long"):
        open_prepared(prepared.directory)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    open_prepared(prepared.directory)
    with pytest.raises(LaminaError, match="text-00002.tokens: SHA-256 .* damaged"):
        open_prepared(prepared.directory, verify=True)
    path.unlink()
    with pytest.raises(LaminaError, match="text-00002.tokens: No such file"):
        open_prepared(prepared.directory)
    path.write_bytes(whole)
    ends = prepared.directory / "text-00000.ends"
    raw = ends.read_bytes()
    ends.write_bytes(raw[:-8] + (1).to_bytes(8, "little"))
    with pytest.raises(LaminaError, match="text-00000.ends: ends at 1; there are"):
        open_prepared(prepared.directory)


def seal(prepared: Prepared) -> None:
    """State the hashes of the files as they are, as a writer with a fault would have."""
    import hashlib

    def change(data) -> None:
        for i, shard in enumerate(shards(data)):
            for key, what in (("sha256", "tokens"), ("ends_sha256", "ends")):
                content = (prepared.directory / f"text-{i:05d}.{what}").read_bytes()
                shard[key] = hashlib.sha256(content).hexdigest()

    edit(prepared, change)


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(prepared: Prepared):
    path = prepared.directory / "text-00001.tokens"
    raw = bytearray(path.read_bytes())
    raw[10:12] = (263).to_bytes(2, "little")
    path.write_bytes(raw)
    seal(prepared)
    column = open_prepared(prepared.directory).columns["text"]
    column.slice(0, int(column.begins[1]) + 5)
    with pytest.raises(LaminaError, match=r"text-00001.tokens: token 5 is 263; the vocabulary has 263"):
        column.slice(0, int(column.begins[1]) + 6)
    with pytest.raises(LaminaError, match="token 5 is 263"):
        open_prepared(prepared.directory, verify=True)


def test_ends_that_do_not_grow(prepared: Prepared):
    path = prepared.directory / "text-00001.ends"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + raw[:8] + raw[16:])
    seal(prepared)
    with pytest.raises(LaminaError, match="text-00001.ends: a document ends where it begins"):
        open_prepared(prepared.directory, verify=True)


def test_what_is_no_prepared_directory(tmp_path: Path):
    with pytest.raises(LaminaError, match="so this is no prepared directory; make it with: lamina data prepare"):
        open_prepared(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data.json").write_text("{}")
    with pytest.raises(LaminaError, match=f"did you mean {tmp_path}/train"):
        open_prepared(tmp_path)
    for text, said in (("[]", "a JSON list"), ("{", "not JSON"), ('{"a": 1, "a": 2}', "format None")):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(LaminaError, match=said):
            open_prepared(tmp_path)
