"""`lamina index`: what it prints, and what it refuses."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path

import pytest
import torch

import lamina
from lamina.retrieve import open_database
from tests import tiny
from tests.retrieve import made

COMMON = ("--chunk", "5", "--batch", "8")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an embedder and texts of several kinds."""
    root = tmp_path_factory.mktemp("room")
    tiny.checkpoint(root / "llama")
    made.embedder_at(root / "bert")
    (root / "texts").mkdir()
    (root / "texts/a.txt").write_text("the cat sat on the hill")
    (root / "texts/b.md.gz").write_bytes(gzip.compress("the dog ran over the red mat, über".encode()))
    made.rows(root / "texts/c.jsonl", ["a cat", "the cat sat on the hill"])
    return root


@pytest.fixture
def index(room: Path, tmp_path: Path, lam) -> Path:
    done = lam("index", "build", room / "texts", "-o", tmp_path / "index", "--embedder", room / "bert",
               "--tokenizer", room / "llama", *COMMON)  # fmt: skip
    assert done.status == 0, done.err
    return tmp_path / "index"


def test_build_query_info(room: Path, index: Path, lam):
    said = lam("index", "info", index, "--json").document
    assert (said["documents"], said["chunk"], said["width"], said["engine"]) == (3, 5, 32, "exact")
    assert said["notes"] == ["documents left out, which are the same as others: 1"]
    assert said["sources"] == 3 and said["embedder"]["source"] == str(room / "bert")
    rows = [each for text in ("the cat sat on the hill", "the dog ran over the red mat, über", "a cat")
            for each in made.chunks_of([text], 5)]  # fmt: skip
    assert said["rows"] == len(rows)
    plain = lam("index", "info", index, "--verify")
    assert plain.status == 0 and "the embedder is the same" in plain.out and "left out" in plain.out
    decode = tiny.tokenizer().decode
    for place in (0, 2, len(rows) - 1):
        text = decode(rows[place][1])
        done = lam("index", "query", index, text, "--count", "3", "--json")
        assert done.status == 0, (text, done.err)
        found = done.document["neighbours"]
        distances = [each["distance"] for each in found]
        assert len(found) == 3 and distances == sorted(distances) and abs(distances[0]) < 1e-5
        for each in found:
            assert (each["text"], each["continuation"]) == tuple(decode(ids) for ids in rows[each["row"]][1:])
            assert each["source"].endswith(f"#{each['document']}")
    everything = lam("index", "query", index, "über", "--count", "99", "--json").document["neighbours"]
    assert any("über" in each["text"] + each["continuation"] for each in everything) and len(everything) == len(rows)
    warned = lam("index", "query", index, "the 日本 cat")
    assert warned.status == 0 and "this tokenizer has nothing for" in warned.err and warned.out.startswith("0.")


def test_a_prepared_directory_and_the_same_text_again(room: Path, index: Path, tmp_path: Path, lam):
    done = lam("index", "build", index / "corpus", "-o", tmp_path / "again", "--embedder", room / "bert", *COMMON)
    assert done.status == 0, done.err
    one, other = open_database(index), open_database(tmp_path / "again")
    assert torch.equal(one.store.vectors(torch.arange(len(one))), other.store.vectors(torch.arange(len(one))))
    assert not (tmp_path / "again/corpus").exists()
    before = (index / "corpus/data.json").stat().st_mtime_ns
    done = lam("index", "build", room / "texts", "-o", index, "--embedder", room / "bert", "--tokenizer",
               room / "llama", *COMMON, "--force")  # fmt: skip
    assert done.status == 0 and (index / "corpus/data.json").stat().st_mtime_ns == before


def test_progress_is_said(room: Path, tmp_path: Path, lam, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.cli.progress.EVERY", 0.0)
    words = ("index", "build", room / "texts", "-o", tmp_path / "i", "--embedder", room / "bert", "--tokenizer",
             room / "llama", "--chunk", "5", "--batch", "4")  # fmt: skip
    done = lam(*words)
    lines = done.err.splitlines()
    assert lines[0].startswith("reading: ") and any("embedding: 4 of" in line and " left" in line for line in lines)
    assert "chunks made in" in done.out
    quiet = lam(*words, "--force", "--quiet")
    assert quiet.status == 0 and quiet.err == ""


def test_neighbours_for_training(room: Path, index: Path, tmp_path: Path, lam):
    made.rows(tmp_path / "t.jsonl", ["the cat sat on the hill", "the cat sat on the hill and the dog ran"])
    lam("data", "prepare", tmp_path / "t.jsonl", "-o", tmp_path / "text", "--tokenizer", room / "llama")
    said = lam("index", "neighbours", index, tmp_path / "text", "-o", tmp_path / "n", "--json").document
    ids = [tiny.tokenizer().encode(text, special=False) for text in ("the cat sat on the hill",
           "the cat sat on the hill and the dog ran")]  # fmt: skip
    assert said["searched"] == sum(len(each) // 5 for each in ids) and said["missing"] == 0
    assert said["chunks"] == sum(-(-len(each) // 5) for each in ids)
    counts = [each["chunks"] for each in said["overlap"]]
    assert counts == sorted(counts) and counts[-1] == said["searched"]
    again = lam("index", "neighbours", index, tmp_path / "text", "-o", tmp_path / "n")
    again.refused("holds neighbours already")
    lam("data", "prepare", tmp_path / "t.jsonl", "-o", tmp_path / "other", "--tokenizer", "bytes")
    lam("index", "neighbours", index, tmp_path / "other", "-o", tmp_path / "m").refused("another tokenizer")


def test_states_and_their_perplexity(room: Path, tmp_path: Path, lam):
    done = lam("index", "build", room / "texts", "-o", tmp_path / "states", "--embedder", room / "llama", "--states",
               "--window", "32")  # fmt: skip
    assert done.status == 0 and "states made in" in done.out, done.err
    text = tmp_path / "new.txt"
    text.write_text("the cat sat on the hill. the dog ran over")
    words = ("evaluate", room / "llama", text, "--json")
    knn = ("--knn", tmp_path / "states", "--weight", "0.5", "--temperature", "0.5", "--count", "4")
    plain, mixed = lam(*words).document, lam(*words, *knn).document
    assert mixed["knn"] == str(tmp_path / "states") and plain["knn"] is None
    assert mixed["perplexity"] < 0.5 * plain["perplexity"] and mixed["tokens"] == plain["tokens"]
    known = lam("evaluate", room / "llama", room / "texts/a.txt", "--json", *knn).document  # left out: it is in there
    assert known["perplexity"] > mixed["perplexity"]
    lam(*words, "--weight", "0.5").refused("--weight is for --knn")
    lam(*words, "--knn", tmp_path / "none").refused("no database")
    lam("index", "build", room / "texts", "-o", tmp_path / "x", "--embedder", room / "bert", "--states",
        "--tokenizer", room / "llama").refused("does not predict the next token")  # fmt: skip
    lam("index", "build", room / "texts", "-o", tmp_path / "x", "--embedder", room / "bert", "--window", "8",
        "--tokenizer", room / "llama").refused("--window is for --states")  # fmt: skip
    lam("index", "query", tmp_path / "states", "cat").refused("for kNN-LM, and no chunks")


def test_writing_with_a_database(room: Path, index: Path, tmp_path: Path, lam):
    """As `lamina.generate` writes with it; what does not go together is said in a line."""
    source = made.reader_at(tmp_path / "retro", chunk=5)
    words = ("generate", source, "the cat sat on the mat", "--max-new-tokens", "12", "--json")
    model, database = lamina.load(source), open_database(index)
    ids = torch.tensor([tiny.tokenizer().encode("the cat sat on the mat")])
    written = {}
    for count in (1, 3):
        done = lam(*words, "--index", index, "--count", count)
        assert done.status == 0, done.err
        expected = lamina.generate(model, ids, max_new_tokens=12, retriever=database, neighbours=count)
        new = expected[0, ids.shape[1] :].tolist()
        written[count] = done.document["ids"]
        assert written[count] == new[: len(written[count])] and len(written[count]) > 5
    assert len({tuple(each) for each in (*written.values(), lam(*words).document["ids"])}) > 1
    assert lam(*words, "--index", index).document["ids"] == lam(*words, "--index", index, "--count", 2).document["ids"]
    beams = lam(*words, "--index", index, "--beams", "2", "--count", "1")
    expected = lamina.generate(model, ids, max_new_tokens=12, beams=2, retriever=database, neighbours=1)
    assert beams.document["ids"] == expected[0, ids.shape[1] :][: len(beams.document["ids"])].tolist()
    lam(*words, "--count", "2").refused("--count is for --index")
    lam("generate", source, "a", "--index", index, "--max-new-tokens", "0").refused("lamina evaluate --index")
    lam("generate", room / "llama", "a", "--index", index).refused("has no layer that reads neighbours")
    other = made.reader_at(tmp_path / "seven", chunk=7)
    lam("generate", other, "a", "--index", index).refused("chunks of 5 tokens", "of 7: build it anew with --chunk 7")
    lam(*words, "--index", tmp_path / "none").refused("no database")


def test_what_a_text_costs_with_its_neighbours(room: Path, index: Path, tmp_path: Path, lam):
    """Files, and the same text prepared with its neighbours; the document itself is not read from the database."""
    source = made.reader_at(tmp_path / "retro", chunk=5)
    model, database, tokenizer = lamina.load(source), open_database(index), tiny.tokenizer()
    texts = ["the cat sat on the hill and the dog ran over the mat", "the cat sat on the hill"]
    files = [tmp_path / "new.txt", tmp_path / "old.jsonl"]  # text too, whatever it is called
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)
    words = ("evaluate", source, *files, "--index", index, "--window", "20", "--stride", "10")
    found = lam(*words, "--count", "1", "--json").document
    assert (found["count"], found["chunk"], found["window"], found["stride"]) == (1, 5, 20, 10)
    nats, tokens = [0.0, 0.0], 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, special=False)])
        assert ids.shape[1] <= 20 or text is texts[0]
        chunks = ids[0, : ids.shape[1] // 5 * 5].view(-1, 5)
        own = torch.tensor([[[0, 1]]]) if text == texts[1] else torch.zeros(1, 1, 2, dtype=torch.int64)
        if text == texts[1]:
            assert database.name_of(0).endswith("a.txt#0")
        near = database.neighbours(chunks, count=1, exclude=own.expand(len(chunks), -1, -1))
        tokens += ids.shape[1] - 1
        for at in range(1, ids.shape[1]):
            last = 20 if at < 20 else 20 + -(-(at - 19) // 10) * 10
            begin = -(-max(min(last, ids.shape[1]) - 20, 0) // 5) * 5
            whole = (at - begin) // 5
            given = near[begin // 5 : begin // 5 + whole][None] if whole else None
            with torch.inference_mode():
                for i, neighbours in enumerate((None, given)):
                    logits = model(ids[:, begin:at], neighbours=neighbours).logits[0, -1]
                    nats[i] -= float(logits.log_softmax(0)[ids[0, at]])
    assert found["tokens"] == tokens and nats[0] != nats[1]
    for name, sum_ in zip(("without", "with"), nats, strict=True):
        assert found[name]["perplexity"] == pytest.approx(math.exp(sum_ / tokens), rel=1e-4)
        bits = sum_ / math.log(2) / sum(len(text.encode()) for text in texts)
        assert found[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    counts = [each["chunks"] for each in found["overlap"]]
    assert counts == sorted(counts) and counts[-1] == sum(len(tokenizer.encode(t, special=False)) // 5 for t in texts)
    plain = lam(*words)
    assert plain.status == 0 and "a neighbour holds" in plain.out and "2 neighbours of chunks of 5" in plain.out
    made.rows(tmp_path / "t.jsonl", texts)
    lam("data", "prepare", tmp_path / "t.jsonl", "-o", tmp_path / "text", "--tokenizer", source)
    lam("index", "neighbours", index, tmp_path / "text", "-o", tmp_path / "near", "--count", "1")
    again = ("evaluate", source, tmp_path / "text", "--index", index, "--window", "20", "--stride", "10", "--json")
    for more in (("--count", "1"), ("--neighbours", tmp_path / "near")):
        other = lam(*again, *more).document
        assert {name: other[name] for name in ("overlap", "with", "without")} == {
            name: found[name] for name in ("overlap", "with", "without")
        }
    lam("evaluate", source, files[0], "--neighbours", tmp_path / "near").refused("--neighbours is for --index")
    lam(*words, "--neighbours", tmp_path / "near").refused("of one prepared directory")
    lam(*words, "--knn", index).refused("--index and --knn: choose one")
    lam(*words, "--weight", "0.5").refused("--weight is for --knn")
    lam(*words[:-2], "--stride", "7").refused("must be multiples of 5")
    lam("evaluate", room / "llama", files[0], "--index", index).refused("no layer that reads neighbours")
    lam("evaluate", source, tmp_path / "none", "--index", index).refused("no such file, and no directory")


def test_copy(index: Path, tmp_path: Path, lam):
    assert lam("index", "copy", index, "-o", tmp_path / "copy", "--engine", "exact").status == 0
    one, other = open_database(index), open_database(tmp_path / "copy")
    rows = torch.arange(len(one))
    assert torch.equal(one.store.vectors(torch.arange(len(one))), other.store.vectors(torch.arange(len(one))))
    assert torch.equal(one.values(rows), other.values(rows)) and torch.equal(one.keys, other.keys)
    assert one.name_of(1) == other.name_of(1)
    lam("index", "copy", index, "-o", index, "--engine", "exact").refused("holds a database already")


def test_documents_come_and_go(room: Path, index: Path, tmp_path: Path, lam):
    before = lam("index", "info", index, "--json").document
    (tmp_path / "new").mkdir()
    (tmp_path / "new/d.txt").write_text("a red mat is on the hill\n\nthe cat ran")
    words = ("index", "add", index, tmp_path / "new", "--split-on", r"\n\n")
    done = lam(*words, "--json")
    assert done.status == 0, done.err
    said = done.document
    assert said["before"]["rows"] == before["rows"] and said["documents"] == before["documents"] + 2
    assert said["notes"][-1] == "documents added since the build: 2" and not (index / "added").exists()
    found = lam("index", "query", index, "a red mat", "--count", "1", "--json").document["neighbours"][0]
    assert found["source"] == f"{tmp_path / 'new/d.txt'}#3" and found["text"].startswith("a red")
    assert lam(*words, "--json").document["rows"] == said["rows"]  # they are there already
    plain = lam("index", "remove", index, found["source"], room / "texts/a.txt")
    assert plain.status == 0 and f"before: {said['rows']:,} rows of 5 documents" in plain.out
    assert "documents removed since the build: 2" in lam("index", "info", index, "--verify").out
    (tmp_path / "new/d.txt").write_text("the dog sat")
    last = lam("index", "add", index, tmp_path / "new", "--replace", "--json").document
    assert last["documents"] == 3 and last["sources"] == 3
    lam("index", "remove", index, "d.txt").refused("unknown document 'd.txt'")
    lam("index", "add", tmp_path / "none", room / "texts").refused("no database")
    lam("index", "add", index, tmp_path / "nothing").refused("nothing: no such file")
    lam("index", "add", index, tmp_path / "new", "--lines", "--split-on", "x").refused("--lines and --split-on")
    lam("index", "add", index, tmp_path / "new", "--embedder", room / "llama").refused("was made by", "llama")


def test_mistakes(room: Path, index: Path, tmp_path: Path, lam):
    words = ("index", "build", room / "texts", "-o", tmp_path / "x", "--embedder", room / "bert")
    lam(*words).refused("--tokenizer: name the SOURCE of the model")
    lam(*words, "--tokenizer", "nothing").refused("no source 'nothing'")
    lam(*words[:-1], "nothing", "--tokenizer", room / "llama").refused("no source 'nothing'")
    lam(*words, "--tokenizer", room / "llama", "--chunk", "0").refused("--chunk")
    lam(*words, "--tokenizer", room / "llama", "--uri", "s3://b").refused("engine exact keeps its rows")
    lam(*words[:4], index, *words[5:], "--tokenizer", room / "llama").refused("holds a database already", "--force")
    lam("index", "build", "none", *words[3:], "--tokenizer", room / "llama").refused("none: no such file")
    lam("index", "build", index / "corpus", *words[3:], "--tokenizer", room / "bert").refused("another tokenizer")
    (tmp_path / "empty.txt").write_text("")
    done = lam("index", "build", tmp_path / "empty.txt", *words[3:], "--tokenizer", room / "llama")
    assert done.status == 1 and "hold no document with a token" in done.err and not (tmp_path / "x/current").exists()
    lam("index", "query", tmp_path, "text").refused("no database: it has no file 'current'")
    lam("index", "query", index).refused("give TEXT, or --file FILE")
    lam("index", "query", index, " ").refused("the text is empty")
    lam("index", "query", index, "--file", tmp_path / "none").refused("No such file")
    lam("index", "query", index, "cat", "--embedder", room / "llama").refused("was made by", "llama")
    lam("index", "info", tmp_path / "none").refused("no database")
    moved = tmp_path / "moved"
    shutil.copytree(index, moved)
    path = moved / "generation-1/tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    lam("index", "info", moved).refused("tokens.safetensors: has", "build it anew")
