"""`lamina data prepare` and `lamina data show`."""

from __future__ import annotations

import json
from pathlib import Path

import lamina
from lamina.data import open_prepared


def test_prepare_and_show_a_text(lam, tmp_path: Path):
    text = "To be, or not to be.\n" * 100
    (tmp_path / "t.txt").write_text(text)
    out = tmp_path / "out"
    done = lam(
        "data", "prepare", tmp_path / "t.txt", "-o", out, "--tokenizer", "characters", "--validation", 0.1, "--json"
    )
    assert done.status == 0, done.err
    parts = done.document["parts"]
    cut = int(len(text) * 0.9)
    assert parts["train"]["columns"] == {"text": cut} and parts["validation"]["columns"] == {"text": len(text) - cut}
    shown = lam("data", "show", out, "--verify")
    assert shown.status == 0 and f"{cut:,}" in shown.out and "train, text 0: 'To be, or" in shown.out
    assert lamina.tokenizer(out).vocabulary == parts["train"]["vocabulary"] == len(set(text))
    one = lam("data", "show", out / "train", "--json").document["parts"]["."]
    assert one["hash"] == open_prepared(out / "train").hash and one["changed"] == []
    (tmp_path / "t.txt").write_text("another")
    shown = lam("data", "show", out)
    assert shown.status == 0 and "t.txt: 7 bytes now, 2,100 when" in shown.err


def test_fields_and_labels(lam, tmp_path: Path):
    rows = [{"body": "hello", "class": "ham"}, {"body": "buy", "class": "spam"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "prepare", tmp_path / "r.jsonl", "--tokenizer", "bytes", "--columns", "text,label"]
    fields = ["--field", "body", "--field", "label=class"]
    done = lam(*words, *fields, "-o", tmp_path / "a", "--special", "gpt")
    assert done.status == 0 and "labels: ham, spam" in done.out
    prepared = open_prepared(tmp_path / "a")
    assert prepared.columns["text"][1].tolist() == [*b"buy", 256]
    lam(*words, "-o", tmp_path / "b").refused(
        "r.jsonl: 2 of 2 rows are damaged", "text is missing; there are body, class"
    )
    lam(*words, "--field", "lable=class", "-o", tmp_path / "b").refused("unknown column 'lable'; did you mean 'label'")


def test_lines_and_what_is_wrong(lam, tmp_path: Path):
    (tmp_path / "t.txt").write_text("a b\nc d\n\ne")
    words = ["data", "prepare", tmp_path / "t.txt", "-o", tmp_path / "out"]
    done = lam(*words, "--tokenizer", "train:wordpiece:40", "--special", "bert", "--lines", "--json")
    assert done.status == 0 and done.document["parts"]["."]["documents"] == 3
    lam(*words, "--tokenizer", "bytes").refused("exists already", "--force")
    assert lam(*words, "--tokenizer", "bytes", "--force", "--split-on", r"\n\n").status == 0
    assert open_prepared(tmp_path / "out").documents == 2
    words[-1] = tmp_path / "other"
    lam(*words, "--tokenizer", "train:bpe:many").refused("'many' is no size; write bpe:8192")
    lam(*words, "--tokenizer", "bytes", "--lines", "--split-on", "x").refused("choose one")
    lam(*words, "--tokenizer", "none/such").refused("none/such")
    lam("data", "show", tmp_path).refused("no data.json, so this is no prepared directory")


def test_nothing_left_is_status_1(lam, tmp_path: Path):
    (tmp_path / "t.txt").write_text("")
    done = lam("data", "prepare", tmp_path / "t.txt", "-o", tmp_path / "out", "--tokenizer", "bytes")
    assert done.status == 1 and "hold no document with a token: 0 damaged, 1 empty, 0 skipped" in done.err
