"""From files to prepared directories: what is read, what is left out and said, and what a kill leaves."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.data import Prepared, open_prepared
from lamina.data.division import in_validation
from lamina.data.prepare import NothingLeft, prepare
from lamina.data.sources import find
from lamina.data.training import train
from lamina.data.wishes import PrepareSpec
from lamina.errors import LaminaError, UnsupportedError
from lamina.text import Tokenizer
from tests import tiny

BYTES = train("bytes", [], special="gpt")  # ids are the bytes, so what was read is seen


def made(directory: Path, *names: Path, tokenizer: Tokenizer | str = BYTES, glob: str | None = None, **wishes):
    more = {key: wishes.pop(key) for key in ("special", "force", "train_bytes") if key in wishes}
    prepare(find(map(str, names), glob), directory, tokenizer, PrepareSpec(**wishes), **more)
    parts = ("train", "validation") if wishes.get("validation") else ("",)
    found = [open_prepared(directory / part, verify=True) for part in parts]
    return found if len(found) > 1 else found[0]


def said(prepared: Prepared, column: str = "text") -> list[str]:
    """The texts of the documents, each of which ends with the end token."""
    found = [prepared.columns[column][i].tolist() for i in range(prepared.documents)]
    assert all(ids[-1] == 256 for ids in found)
    return [bytes(ids[:-1]).decode() for ids in found]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows))
    return path


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_files_directories_and_rows_in_order(tmp_path: Path):
    root = tmp_path / "texts"
    put(root / "b.txt", "second é")
    put(root / "a/x.md", "first")
    put(root / "c.txt.gz", gzip.compress(b"third"))
    jsonl(root / "d.jsonl", [{"text": "fourth"}, {"text": "fifth", "more": 1}])
    put(root / "e.jsonl.gz", gzip.compress(b'{"text": "sixth"}\n\n{"text": "seventh"}'))
    put(root / "picture.png", b"\x89PNG\xff")
    put(root / ".hidden/x.txt", "no")
    put(root / "f.txt", "")
    prepared = made(tmp_path / "out", root)
    assert said(prepared) == ["first", "second é", "third", "fourth", "fifth", "sixth", "seventh"]
    sources = {Path(each.name).name: each for each in prepared.manifest.sources}
    assert list(sources) == ["x.md", "b.txt", "c.txt.gz", "d.jsonl", "e.jsonl.gz", "f.txt"]
    assert sources["f.txt"].empty == 1 and sources["e.jsonl.gz"].documents == 2
    assert sources["b.txt"].tokens == len("second é".encode()) + 1
    assert said(made(tmp_path / "md", root, glob="*.md")) == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out", "md"}


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lines_and_separators(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.data.sources.CHUNK", chunk)
    text = "one\n\ntwo\nthree ü\n\n\n\nfour"
    path = put(tmp_path / "t.txt", text)
    assert said(made(tmp_path / "lines", path, split_on="\n")) == ["one", "two", "three ü", "four"]
    parts = made(tmp_path / "parts", path, split_on="\n\n")
    assert said(parts) == ["one", "two\nthree ü", "four"] and parts.manifest.sources[0].empty == 1
    assert said(made(tmp_path / "whole", path)) == [text]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_long_text_has_the_ids_of_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.data.prepare.PIECE", 1000)
    monkeypatch.setattr("lamina.data.prepare.BATCH", 3000)
    text = "The cat — über all — ran over the hills, then there were 12 of them.\n\n  Well?  " * 300
    tokenizer = train(kind, [text], size=300, special="gpt") if kind == "bpe" else BYTES
    prepared = made(tmp_path / "out", put(tmp_path / "t.txt", text), tokenizer=tokenizer)
    whole = tokenizer.encode(text, special=False)
    assert prepared.columns["text"][0].tolist() == [*whole, tokenizer.eos] and prepared.manifest.notes == ()
    lines = made(tmp_path / "lines", put(tmp_path / "l.txt", text.replace("\n", " ") * 2), tokenizer=tokenizer)
    assert lines.documents == 1


def test_a_line_without_end_takes_bounded_memory(tmp_path: Path):
    """One line without a place to cut: what is held does not grow with it."""
    code = (
        f"import sys, resource; sys.path[:0] = {sys.path!r}\n"
        "from lamina.data import prepare as module\n"
        "module.PIECE, module.BATCH = 1 << 14, 1 << 17\n"
        "from lamina.data.prepare import prepare\n"
        "from lamina.data.wishes import PrepareSpec\n"
        "from lamina.data.sources import find\n"
        "from lamina.data.training import train\n"
        "prepare(find([sys.argv[1]]), sys.argv[2], train('bytes', []), PrepareSpec(split_on='\\n'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for name, size in (("small", 1), ("large", 6)):
        path = put(tmp_path / name, b"x" * (size << 20))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"{name}-out")], capture_output=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
        found = open_prepared(tmp_path / f"{name}-out")
        assert found.tokens == size << 20 and "cut where the tokenizer joins" in found.manifest.notes[0]
    assert peaks[1] - peaks[0] < 40, peaks


BAD = {"bytes": b"ab\xffcd", "half": b"ab\xed\xa0\x80cd", "nul": b"ab\0cd", "cut": b"abcd\xc3"}


@pytest.mark.parametrize("name", BAD)
def test_characters_that_are_none(tmp_path: Path, name: str):
    path = put(tmp_path / "t.txt", b"good\n" + BAD[name] + b"\nend")
    what = "a NUL" if name == "nul" else "not UTF-8"
    at = 9 if name == "cut" else 7
    with pytest.raises(LaminaError, match=rf"t\.txt: {what} at byte {at}; --characters replace or skip"):
        made(tmp_path / "refused", path, split_on="\n")
    count = 3 if name == "half" else 1
    replaced = made(tmp_path / "replaced", path, split_on="\n", characters="replace")
    middle = "abcd�" if name == "cut" else "ab" + "�" * count + "cd"
    assert said(replaced) == ["good", middle, "end"] and replaced.manifest.sources[0].mended == count
    skipped = made(tmp_path / "skipped", path, split_on="\n", characters="skip")
    assert said(skipped) == ["good", "end"] and skipped.manifest.sources[0].skipped == 1
    with pytest.raises(NothingLeft, match="1 skipped"):
        made(tmp_path / "nothing", path, characters="skip")


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    prepared = made(tmp_path / "out", put(tmp_path / "t.txt", b"\xef\xbb\xbfhello"))
    assert said(prepared) == ["hello"] and prepared.manifest.sources[0].mended == 1
    prepared = made(tmp_path / "rows", put(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n'))
    assert said(prepared) == ["hello"]


def test_halves_of_characters_in_rows(tmp_path: Path):
    rows = ['{"text": "a\\ud800b"}', {"text": "c"}, '{"text": "\\u0000"}']
    path = jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(LaminaError, match=r"t\.jsonl: line 1: a NUL, or half a character"):
        made(tmp_path / "refused", path)
    assert said(made(tmp_path / "skipped", path, characters="skip")) == ["c"]
    replaced = made(tmp_path / "replaced", path, characters="replace")
    assert said(replaced) == ["a�b", "c", "�"] and replaced.manifest.sources[0].mended == 2


def test_damaged_rows_are_counted_and_too_many_stop(tmp_path: Path):
    good = [{"text": f"row {i}"} for i in range(300)]
    bad = ["{", "[1]", {"body": "x"}]
    path = jsonl(tmp_path / "t.jsonl", [*good[:7], *bad, *good[7:]])
    prepared = made(tmp_path / "out", path)
    assert prepared.documents == 300 and prepared.manifest.sources[0].damaged == 3
    path = jsonl(tmp_path / "bad.jsonl", [*good[:100], *bad])
    words = r"bad\.jsonl: 3 of 103 rows are damaged, more than 0.01 of them \(--damaged\): line 101: not JSON.*; "
    with pytest.raises(LaminaError, match=words + "line 102: a JSON list, not an object; line 103: text is missing"):
        made(tmp_path / "stops", path)
    assert made(tmp_path / "allowed", path, damaged=0.05).documents == 100
    path = jsonl(tmp_path / "typed.jsonl", [{"text": 3}])
    with pytest.raises(LaminaError, match="line 1: text is a int"):
        made(tmp_path / "typed", path)
    many = jsonl(tmp_path / "many.jsonl", [{"text": "x"}] * 1000 + ["{"] * 30 + [{"text": "x"}] * 100_000)
    with pytest.raises(LaminaError, match=r"many\.jsonl: 11 of 1,011 rows"):  # at once, not at the end
        made(tmp_path / "early", many)


def test_a_row_too_long_to_hold_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lamina.data.sources.LONGEST", 50)
    path = jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b" * 300}, {"text": "c"}])
    prepared = made(tmp_path / "out", path, damaged=0.5)
    assert said(prepared) == ["a", "c"] and prepared.manifest.sources[0].damaged == 1


@pytest.mark.parametrize("special", ["gpt", "t5"])
def test_characters_without_a_token_are_damage(tmp_path: Path, special: str, monkeypatch: pytest.MonkeyPatch):
    """They vanish, or are the unknown token, which data.json tells of each file."""
    monkeypatch.setattr("lamina.data.prepare.PIECE", 1000)
    monkeypatch.setattr("lamina.data.prepare.BATCH", 2000)
    words = train("characters", ["the cat sat on the mat\n"], special=special)
    strange = "the cat ☃☃ sat on thé mat\n" * 7 + "the mat\n" * 900
    paths = [put(tmp_path / "a.txt", "the cat sat\n" * 50), put(tmp_path / "b.txt", strange)]
    rows = [{"text": "the cat"}, {"text": "☃"}] + [{"text": "the cat sat on the mat"}] * 20
    prepared = made(tmp_path / "out", *paths, jsonl(tmp_path / "c.jsonl", rows), tokenizer=words)
    assert [source.lost for source in prepared.manifest.sources] == [0, 21, 1]
    assert prepared.documents == (23 if special == "gpt" else 24)  # a row of which nothing is left is empty
    text = words.decode(prepared.columns["text"][1].tolist())
    assert text == strange.replace("☃", "").replace("é", "")
    named = () if special == "t5" else ("characters without a token: 'é', '☃'",)
    assert prepared.manifest.notes == named
    which = "" if special == "t5" else ", as '☃', 'é'"
    said = rf"b\.txt: the tokenizer has no token for 21 of 7,382 characters{which}; that is more than 0\.001 of them"
    with pytest.raises(LaminaError, match=said):
        made(tmp_path / "strict", *paths, tokenizer=words, damaged=0.001)
    monkeypatch.setattr("lamina.data.sources.ENOUGH", 1000)
    with pytest.raises(LaminaError, match="has no token for 250 of 1,000 "):  # at once, not at the end
        made(tmp_path / "early", put(tmp_path / "d.txt", "thé\n" * 100_000), tokenizer=words, damaged=0.005)


def test_words_without_a_token_are_damage(tmp_path: Path):
    words = train("characters", ["the cat"])
    rows = [{"tokens": ["the", "cat☃"], "labels": ["O", "A"]}]
    wish = {"kind": "token-classification", "fields": ("tokens", "labels"), "damaged": 0.2}
    prepared = made(tmp_path / "out", jsonl(tmp_path / "w.jsonl", rows), tokenizer=words, **wish)
    assert prepared.manifest.sources[0].lost == 1 and prepared.columns["tokens"][0].size == 7


def test_damaged_gzip(tmp_path: Path):
    whole = gzip.compress(os.urandom(1000).hex().encode())
    for content in (whole[:-20], whole[:50] + b"\0\0\0" + whole[53:]):
        with pytest.raises(LaminaError, match=r"t\.txt\.gz: damaged gzip"):
            made(tmp_path / "out", put(tmp_path / "t.txt.gz", content))
    with pytest.raises(LaminaError, match="damaged gzip"):
        made(tmp_path / "rows", put(tmp_path / "t.jsonl.gz", b"no gzip"))


def test_sources_that_hold_nothing(tmp_path: Path):
    with pytest.raises(NothingLeft, match="1 sources hold no document with a token: 0 damaged, 1 empty, 0 skipped"):
        made(tmp_path / "out", put(tmp_path / "t.txt", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LaminaError, match="no text, JSONL or Parquet file among 0 files"):
        made(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(LaminaError, match=r"none\.txt: no such file or directory"):
        made(tmp_path / "out", tmp_path / "none.txt")
    with pytest.raises(NothingLeft, match="2 empty"):
        made(tmp_path / "out", jsonl(tmp_path / "e.jsonl", [{"text": ""}, {"text": ""}]))
    assert not (tmp_path / "out").exists()


def test_pairs_labels_words_and_scores(tmp_path: Path):
    rows = [{"en": f"yes {i}", "de": f"ja {i}"} for i in range(5)]
    prepared = made(tmp_path / "pairs", jsonl(tmp_path / "p.jsonl", rows), kind="pairs", fields=("en", "de"))
    assert said(prepared, "source") == [row["en"] for row in rows]
    assert said(prepared, "target") == [row["de"] for row in rows]

    rows = [{"text": "a", "label": "spam"}, {"text": "b", "label": "ham"}, {"text": "c", "label": "spam"}]
    wish = {"kind": "classification", "fields": ("text", "label")}
    prepared = made(tmp_path / "classes", jsonl(tmp_path / "c.jsonl", rows), **wish)
    assert prepared.labels is not None and prepared.labels.tolist() == [0, 1, 0]
    assert prepared.label_names == ("spam", "ham")
    prepared = made(tmp_path / "named", tmp_path / "c.jsonl", labels=("ham", "spam"), **wish)
    assert prepared.labels is not None and prepared.labels.tolist() == [1, 0, 1]
    with pytest.raises(LaminaError, match="unknown label 'spam'"):
        made(tmp_path / "unknown", tmp_path / "c.jsonl", labels=("ham", "scam!"), **wish)
    prepared = made(tmp_path / "numbers", jsonl(tmp_path / "n.jsonl", [{"text": "a", "label": 2}]), **wish)
    assert prepared.labels is not None and prepared.labels.tolist() == [2] and prepared.label_names == ("0", "1", "2")

    rows = [{"first": "a", "second": "b", "score": 0.5}, {"first": "c", "second": "d", "score": 1}]
    wish = {"kind": "contrastive", "fields": ("first", "second", "score")}
    prepared = made(tmp_path / "alike", jsonl(tmp_path / "s.jsonl", rows), **wish)
    assert prepared.scores is not None and prepared.scores.tolist() == [0.5, 1]
    assert made(tmp_path / "two", tmp_path / "s.jsonl", kind="contrastive", fields=("first", "second")).scores is None
    with pytest.raises(LaminaError, match="a text file, and pairs needs rows with"):
        made(tmp_path / "text", put(tmp_path / "t.txt", "x"), kind="pairs", fields=("en", "de"))


def test_labels_of_words_stand_on_their_first_token(tmp_path: Path):
    """As transformers' is_pretokenized says where words are."""
    transformers = pytest.importorskip("transformers")
    rows = [
        {"tokens": ["The", "unbelievable", "U.N.", "spoke", "."], "labels": ["O", "O", "ORG", "O", "O"]},
        {"tokens": ["Zürich"], "labels": ["LOC"]},
    ]
    learnt = [" ".join(row["tokens"]) for row in rows] * 3 + ["un believe able spoken the"]
    tokenizer = train("wordpiece", learnt, size=60, special="bert")
    wish = {"kind": "token-classification", "fields": ("tokens", "labels")}
    prepared = made(tmp_path / "out", jsonl(tmp_path / "w.jsonl", rows), tokenizer=tokenizer, **wish)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out/tokenizer.json"))
    for i, row in enumerate(rows):
        read = theirs(row["tokens"], is_split_into_words=True, add_special_tokens=False)
        words = read.word_ids()
        firsts = [w if w not in words[:place] else None for place, w in enumerate(words)]
        names = {"O": 0, "ORG": 1, "LOC": 2}
        expected = [-100 if word is None else names[row["labels"][word]] for word in firsts]
        assert prepared.columns["tokens"][i].tolist() == read["input_ids"]
        assert prepared.columns["labels"][i].tolist() == expected
    assert prepared.label_names == ("O", "ORG", "LOC") and len(prepared.columns["tokens"][0]) > 5
    rows = [{"tokens": ["a", "b"], "labels": ["O"]}]
    with pytest.raises(LaminaError, match="1 of 1 rows are damaged.*2 tokens and 1 labels"):
        made(tmp_path / "unequal", jsonl(tmp_path / "u.jsonl", rows), tokenizer=tokenizer, **wish)


def test_the_end_of_a_text_is_for_validation(tmp_path: Path):
    text = "".join(chr(97 + i % 26) for i in range(1003)) + "é"
    training, validation = made(tmp_path / "out", put(tmp_path / "t.txt", text), validation=0.1, split="end")
    cut = int(len(text) * 0.9)
    assert said(training) == [text[:cut]] and said(validation) == [text[cut:]]
    with pytest.raises(LaminaError, match="has rows; --split end divides text files"):
        made(tmp_path / "rows", jsonl(tmp_path / "r.jsonl", [{"text": "a"}]), validation=0.1, split="end")


def test_some_documents_are_for_validation(tmp_path: Path):
    rows = [{"text": f"document {i}"} for i in range(1000)]
    training, validation = made(tmp_path / "out", jsonl(tmp_path / "r.jsonl", rows), validation=0.1)
    assert validation.documents == 100
    assert sorted(said(training) + said(validation)) == sorted(row["text"] for row in rows)
    places = [int(text.split()[1]) for text in said(validation)]
    assert places == [i for i in range(1000) if in_validation(i, 0.1)]
    assert [place // 10 for place in places] == list(range(100))
    assert len({place % 10 for place in places}) == 10  # wherever in their ten
    for part in (0.25, 0.3, 0.015, 0.7):
        assert abs(sum(in_validation(i, part) for i in range(2000)) - 2000 * part) <= 1
    with pytest.raises(LaminaError, match="2 documents and --validation 0.1 leave none for validation"):
        made(tmp_path / "few", jsonl(tmp_path / "f.jsonl", rows[:2]), validation=0.1)


def test_tiny_shakespeare_as_nanogpt_prepares_it(tmp_path: Path):
    """nanoGPT, data/shakespeare_char/prepare.py: 65 characters, sorted; 1,003,854 and 111,540 tokens."""
    path = Path(__file__).parents[3] / "shared/data/tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8") if path.is_file() else "To be, or not to be:\nthat is the question! " * 500
    source = put(tmp_path / "t.txt", text)
    training, validation = made(tmp_path / "out", source, tokenizer="characters", validation=0.1, split="end")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    ids = np.array([letters[letter] for letter in text])
    cut = int(0.9 * len(text))
    assert training.vocabulary == len(letters) and training.end is None
    assert np.array_equal(training.columns["text"].slice(0, cut), ids[:cut])
    assert np.array_equal(validation.columns["text"].slice(0, len(text) - cut), ids[cut:])
    if path.is_file():
        assert (training.vocabulary, training.tokens, validation.tokens) == (65, 1_003_854, 111_540)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_same_sources_give_the_same_bytes(tmp_path: Path):
    put(tmp_path / "in/a.txt", "some text " * 500)
    put(tmp_path / "in/b.txt", "other words " * 500)
    wish = {"validation": 0.2, "split": "end", "tokenizer": "bpe:300", "special": "gpt"}
    made(tmp_path / "one", tmp_path / "in", **wish)
    made(tmp_path / "two", tmp_path / "in", **wish)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {"tokenizer.json", "train/data.json", "validation/tokenizer.json"} <= contents(tmp_path / "one").keys()


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from lamina.data import prepare, wishes
from lamina.data.sources import find
count = 0
real = os.fsync
def fsync(handle):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
spec = wishes.PrepareSpec(kind="classification", fields=("text", "label"), validation=0.2, shard_tokens=150)
prepare.prepare(find([sys.argv[1]]), sys.argv[2], sys.argv[4], spec, special="gpt")
print(count)
"""


def test_what_was_killed_goes_on(tmp_path: Path):
    """Killed at any time: nothing is there, and the next run gives the bytes of one that was not killed."""
    for name in range(4):
        rows = [{"text": f"row {i} of {name} " * (i % 4 + 1), "label": "abc"[i % (name + 1) % 3]} for i in range(12)]
        (tmp_path / "in").mkdir(exist_ok=True)
        jsonl(tmp_path / f"in/{name}.jsonl", rows)
    code = KILLED.format(path=sys.path)

    def run(target: Path, at: int) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", code, str(tmp_path / "in"), str(target), str(at), "bpe:300"]
        return subprocess.run(command, check=False, capture_output=True)

    steps = int(run(tmp_path / "whole", 0).stdout)
    whole = contents(tmp_path / "whole")
    for at in np.linspace(1, steps - 1, 7).astype(int).tolist():
        target = tmp_path / f"killed-{at}"
        assert run(target, at).returncode == -signal.SIGKILL and not target.exists()
        assert run(target, 0).returncode == 0 and contents(target) == whole, (at, steps)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_work_for_other_sources_is_begun_anew(tmp_path: Path):
    """A journal counts only for what it was written for: a source that changed is read again."""
    put(tmp_path / "in/a.txt", "first")
    put(tmp_path / "in/b.txt", b"\xff")
    with pytest.raises(LaminaError, match="not UTF-8"):
        made(tmp_path / "out", tmp_path / "in")
    journal = json.loads((tmp_path / ".out.preparing/journal.json").read_text())
    assert len(journal["counted"]) == 1  # the whole file that was read is kept
    put(tmp_path / "in/a.txt", "changed")
    put(tmp_path / "in/b.txt", "mended")
    assert said(made(tmp_path / "out", tmp_path / "in")) == ["changed", "mended"]


def test_directories_that_are_there(tmp_path: Path):
    path = put(tmp_path / "t.txt", "text")
    made(tmp_path / "out", path)
    with pytest.raises(LaminaError, match="exists already; name another directory, or replace it with --force"):
        made(tmp_path / "out", path)
    put(path, "other")
    assert said(made(tmp_path / "out", path, force=True)) == ["other"]
    put(tmp_path / "mine/letter.txt", "dear")
    with pytest.raises(LaminaError, match="is no prepared directory, so it is not replaced"):
        made(tmp_path / "mine", path, force=True)


def test_two_at_once(tmp_path: Path):
    from lamina.data.workplace import owned

    with owned(tmp_path / ".out.preparing"), pytest.raises(LaminaError, match="another process is preparing this"):
        made(tmp_path / "out", put(tmp_path / "t.txt", "text"))


def test_control_tokens_in_a_text_are_text_unless_asked_for(tmp_path: Path):
    path = put(tmp_path / "t.txt", "a<|endoftext|>b")
    assert said(made(tmp_path / "text", path)) == ["a<|endoftext|>b"]
    assert made(tmp_path / "control", path, control=True).columns["text"][0].tolist() == [97, 256, 98, 256]
    assert made(tmp_path / "open", path, control=True, end=False).columns["text"][0].tolist() == [97, 256, 98]


def test_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"t\.parquet: Parquet needs the package pyarrow.*lamina\[data\]"):
        made(tmp_path / "out", put(tmp_path / "t.parquet", b"PAR1"))
    with pytest.raises(UnsupportedError, match=r"hf:a/b: data sets of the hub need the package datasets"):
        prepare(find(["hf:a/b"]), tmp_path / "out", BYTES, PrepareSpec())


def test_parquet(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra lamina[data]")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [f"row {i}" for i in range(1500)] + [None], "n": list(range(1501))})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=400)
    prepared = made(tmp_path / "out", tmp_path / "t.parquet")
    assert said(prepared) == [f"row {i}" for i in range(1500)] and prepared.manifest.sources[0].damaged == 1
    with pytest.raises(LaminaError, match=r"t\.parquet: no column 'body'; there are text, n"):
        made(tmp_path / "field", tmp_path / "t.parquet", fields=("body",))
    with pytest.raises(LaminaError, match=r"bad\.parquet: "):
        made(tmp_path / "bad", put(tmp_path / "bad.parquet", b"PAR1 no"))


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To `datasets` a directory of files is a data set like one of the hub, which is not asked here."""
    pytest.importorskip("datasets", reason="needs the extra lamina[data]")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"text": f"row {i}", "label": i % 2} for i in range(50)])
    jsonl(folder / "test.jsonl", [{"text": "é", "label": 1}])

    def prepared(name: str, **wishes: Any) -> Prepared:
        prepare(find([name]), tmp_path / "out", BYTES, PrepareSpec(**wishes), force=True)
        return open_prepared(tmp_path / "out", verify=True)

    assert said(prepared(f"hf:{folder}")) == [f"row {i}" for i in range(50)]
    found = prepared(f"hf:{folder}:test", kind="classification", fields=("text", "label"))
    assert said(found) == ["é"] and found.labels is not None and found.labels.tolist() == [1]
    with pytest.raises(LaminaError, match=r"set:none: .*Available splits: \['train', 'test'\]$"):
        prepared(f"hf:{folder}:none")
    with pytest.raises(LaminaError, match="1 of 1 rows are damaged.*row 1: body is missing; there are text, label"):
        prepared(f"hf:{folder}:test", fields=("body",))
    with pytest.raises(LaminaError, match="a data set is hf:owner/name"):
        prepared("hf:")
    with pytest.raises(LaminaError, match="hf:none/such: .*without a network, give a local file"):
        prepared("hf:none/such")


@pytest.mark.parametrize(
    "wishes, words",
    [
        ({"kind": "pairs"}, "fields are text; pairs has 2"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"damaged": -0.1}, "damaged=-0.1"),
        ({"split_on": ""}, "split_on is empty"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"split": "end", "split_on": "\n"}, "split='end' divides text files that are one document"),
        ({"kind": "texts"}, "PrepareSpec.kind is 'texts'"),
    ],
)
def test_wishes_that_contradict_each_other(wishes: dict, words: str):
    with pytest.raises(LaminaError, match=words):
        PrepareSpec(**wishes)


def test_a_tokenizer_that_was_given_is_kept(tmp_path: Path):
    tokenizer = tiny.tokenizer()
    prepared = made(tmp_path / "out", put(tmp_path / "t.txt", "text"), tokenizer=tokenizer)
    prepared.check_tokenizer(tokenizer)
    assert prepared.columns["text"][0].tolist() == [*tokenizer.encode("text", special=False), tokenizer.eos]
