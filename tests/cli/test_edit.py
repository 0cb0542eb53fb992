"""lamina edit: what a plan would do, what it does, the way back, and what is refused before anything is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import lamina
from lamina.text.tokenizer import byte_letters
from tests import tiny
from tests.surgery.test_tokens import ENDS, byte_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lamina.save(tiny.model(), tmp_path / "source")
    tiny.tokenizer().save(tmp_path / "source")
    return tmp_path / "source"


def plan(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


def test_a_dry_run_says_what_would_be_and_writes_nothing(lam, source, tmp_path):
    path = plan(tmp_path, "- {op: experts, experts: 4}\n- {op: key_heads, heads: 1}\n")
    there = set(tmp_path.rglob("*"))
    found = lam("edit", source, path, "--dry-run", "--json").document
    assert set(tmp_path.rglob("*")) == there
    assert [one["kept"] for one in found["operations"]] == ["exact", "lossy"] and found["kept"] == "lossy"
    assert found["undo"] is None
    old, new = lamina.account(source), lamina.account(source)
    assert found["before"]["parameters"] == old.parameters
    copied = 3 * 2 * 3 * 32 * 48 + 2 * 4 * 32 - 2 * 2 * 8 * 32  # copies, routers, key heads
    assert found["after"]["parameters"] == new.parameters + copied
    assert found["after"]["cache_bytes"] * 2 == found["before"]["cache_bytes"]
    rows = {row["name"]: row for row in found["weights"]}
    assert rows["decoder.layers.0.feedforward.op.router.weight"]["sources"] == []
    up = rows["decoder.layers.1.feedforward.op.experts.up.weight"]
    assert up["sources"] == ["decoder.layers.1.feedforward.op.up.weight"] and up["how"] == ["4 copies"]
    assert "decoder.layers.0.attention.op.q.weight" not in rows
    text = " ".join(lam("edit", source, path, "--dry-run").out.split())
    assert "1. experts: exact" in text and "mean of 2 heads" in text and "begins as the spec says" in text


def test_what_is_written_is_judged_remembered_and_undone(lam, source, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    path = plan(tmp_path, "- {op: experts, experts: 2}\n")
    done = lam("edit", source, path, "-o", out, "--tokens", "100", "--json")
    found = done.document
    assert found["verdict"]["found"] == "exact" and found["verdict"]["tokens"] == 100
    assert found["format"] == "hf" and lamina.load(out).origin.family.model_type == "mixtral"
    history = json.loads((out / "history.json").read_text())
    assert history[-1]["verdict"] == found["verdict"] and history[-1]["plan"] == [
        {"op": "experts", "experts": 2, "chosen": 2, "slices": 1, "shared": 0, "normalise": True}
        | {"capacity": None, "losses": None, "noise": 0.0, "redrawn": 0.0, "seed": 0, "at": ["*"]}
    ]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    text = lam("edit", out, "--undo", "-o", back)
    assert "verdict: exact" in text.out and "KL divergence" in text.out
    one, other = lamina.load(source), lamina.load(back)
    assert one.spec == other.spec
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())
    assert len(json.loads((back / "history.json").read_text())) == 2


def test_the_text_of_the_user(lam, source, tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 30)
    path = plan(tmp_path, "- {op: window, back: 4}\n")
    given = ("edit", source, path, "--text", tmp_path / "book.txt", "--format", "native", "--json")
    found = lam(*given, "-o", tmp_path / "out").document
    expected = len(lamina.tokenizer(source).encode("the cat sat on the mat. " * 30))
    assert found["verdict"]["tokens"] == expected and found["verdict"]["found"] == "changed"
    assert (tmp_path / "out" / "spec.json").is_file()
    short = lam(*given, "-o", tmp_path / "short", "--length", "4").document["verdict"]
    assert short["found"] == "exact to the bit" and short["tokens"] == expected  # no piece is longer than the window
    assert lam(*given, "-o", tmp_path / "fast", "--no-verdict").document.get("verdict") is None


def test_mistakes_are_one_line_and_leave_nothing(lam, source, tmp_path):
    out = tmp_path / "out"
    good = plan(tmp_path, "- {op: window, back: 4}\n")
    lam("edit", source, "-o", out).refused("name a PLAN.yaml, or --undo")
    lam("edit", source, good).refused("no --output")
    lam("edit", source, good, "-o", out, "--text", tmp_path / "none.txt").refused("none.txt: no such file")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    lam("edit", source, good, "-o", source).refused("is there already", "--force")
    lam("edit", source, good, "-o", out, "--html", tmp_path / "no" / "page.html").refused("its directory is not there")
    lam("edit", source, "--undo", "-o", out).refused("has no history.json")
    lam("edit", "llama/7b", good, "--dry-run").refused("is a published architecture")
    lam("edit", source, tmp_path / "no.yaml", "-o", out).refused("no.yaml", "no such file")
    bad = plan(tmp_path, "- {op: window, back: 4}\n- {op: key_heads, heads: 3}\n")
    lam("edit", source, bad, "-o", out).refused("operation 2 (key_heads)", "heads=3 does not fit")
    assert not out.exists()
    fit = plan(tmp_path, f"- {{op: key_heads, heads: 1, by: least_squares, text: {tmp_path / 'image.png'}}}\n")
    done = lam("edit", source, fit, "-o", out)
    assert done.status == 2 and done.err.endswith("image.png is no text in UTF-8\n") and not out.exists()
    lossy = plan(tmp_path, "- {op: key_heads, heads: 1}\n")
    assert lam("edit", source, lossy, "-o", out, "--no-verdict").status == 0
    lam("edit", out, "--undo", "-o", tmp_path / "back").refused("cannot be undone")


def test_checkpoints_are_merged_and_remembered(lam, tmp_path):
    a, b = tiny.checkpoint(tmp_path / "a"), tiny.checkpoint(tmp_path / "b", seed=1)
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"- op: merge\n  models: [{{weight: 0.25}}, {{source: {b}, weight: 0.75}}]\n")
    shown = lam("edit", a, plan, "--dry-run")
    assert "1. merge: lossy: 2 models became one" in shown.out and "linear of 2 models" in shown.out
    found = lam("edit", a, plan, "-o", tmp_path / "out", "--tokens", "50", "--json").document
    assert found["format"] == "hf" and found["verdict"]["found"] == "changed"
    one, other, new = (lamina.load(path) for path in (a, b, tmp_path / "out"))
    for name, weight in new.named_parameters():
        expected = 0.25 * one.get_parameter(name) + 0.75 * other.get_parameter(name)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    (line,) = json.loads((tmp_path / "out" / "history.json").read_text())
    assert list(line["others_sha256"]) == [str(b)]
    live, _ = lamina.edit(one, plan, texts=[[1, 2, 3]])
    assert all(torch.equal(weight, new.get_parameter(name)) for name, weight in live.named_parameters())
    lam("edit", tmp_path / "out", "--undo", "-o", tmp_path / "back").refused("cannot be undone")
    tiny.words().save(tmp_path / "b")
    lam("edit", a, plan, "--dry-run").refused("has other tokens", "swap the tokenizer")
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    lam("edit", a, plan, "--dry-run").refused("tokenizer.json")
    plan.write_text("- {op: merge, models: [{}, {source: llama/7b}]}\n")
    lam("edit", a, plan, "--dry-run").refused("published architecture")
    plan.write_text("- {op: merge, models: [{}, {source: nowhere}]}\n")
    lam("edit", a, plan, "--dry-run").refused("nowhere")


def test_another_tokenizer_goes_with_the_model(lam, source, tmp_path):
    """Its files alone, and every id that a configuration names; transformers opens both."""
    (source / "merges.txt").write_text("left by another tokenizer")
    said = {"bos_token_id": 256, "eos_token_id": [257, 259], "max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(said))
    letters = list(byte_letters().values())
    order = [*ENDS, *letters, "he", "qu", "<pad>"]
    new = byte_tokenizer(order, [("h", "e"), ("q", "u")], {"bos": "<s>", "eos": "</s>", "pad": "<pad>"})
    new.save(tmp_path / "new")
    path = plan(tmp_path, f"- {{op: tokenizer, folder: {tmp_path / 'new'}}}\n- {{op: vocabulary, multiple: 64}}\n")
    done = lam("edit", source, path, "-o", tmp_path / "out", "--json")
    assert done.document["kept"] == "lossy"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} <= names and "merges.txt" not in names
    assert lamina.tokenizer(tmp_path / "out").tokens == new.tokens
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1], "max_new_tokens": 7}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (0, 1, 320)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words("the quiet", return_tensors="pt").input_ids
    ours = lamina.load(tmp_path / "out")
    assert ids[0].tolist() == lamina.tokenizer(tmp_path / "out").encode("the quiet")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history[-1]["plan"][0]["old"] == str(source)


def test_the_verdict_on_another_tokenizer_is_bits_per_byte(lam, source, tmp_path):
    """Of both models what a loop over windows gives; in JSON, the history, the table and the page."""
    new = byte_tokenizer([*ENDS, *byte_letters().values(), "he"], [("h", "e")], {"bos": "<s>", "eos": "</s>"})
    new.save(tmp_path / "new")
    text = tmp_path / "text.txt"
    text.write_text("the héron ate the quiet fish, the other one. " * 6)
    path = plan(tmp_path, f"- {{op: tokenizer, folder: {tmp_path / 'new'}}}\n")
    page = tmp_path / "page.html"
    done = lam("edit", source, path, "-o", tmp_path / "out", "--text", text, "--length", "32", "--html", page, "--json")
    verdict = done.document["verdict"]
    assert verdict["found"] == "changed" and verdict["worst"] is verdict["divergence"] is verdict["agreement"] is None
    for side, place in (("before", source), ("after", tmp_path / "out")):
        model, words, raw = lamina.load(place), lamina.tokenizer(place), text.read_bytes()
        ids, nats = words.encode(raw.decode()), 0.0
        for at in range(1, len(ids)):  # 32 tokens at first, then 16 at a time with 16 before them
            end = 32 if at < 32 else 32 + 16 * ((at - 32) // 16 + 1)
            begin = max(min(end, len(ids)) - 32, 0)
            with torch.no_grad():
                said = model(torch.tensor([ids[begin:at]])).logits[0, -1].log_softmax(-1)
            nats -= float(said[ids[at]])
        assert verdict[side]["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
        first = len(words.decode(ids[:1]).encode())
        assert verdict[side]["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(raw) - first), rel=1e-5)
        assert verdict[side]["cache_bytes"] > 0
    assert verdict["before"]["bits_per_byte"] != verdict["after"]["bits_per_byte"]
    assert json.loads((tmp_path / "out" / "history.json").read_text())[-1]["verdict"] == verdict
    shown = [f"{verdict[side]['bits_per_byte']:.4f}" for side in ("before", "after")]
    assert f"bits per byte</th><td>{'</td><td>'.join(shown)}" in page.read_text()
    few = lam("edit", source, path, "-o", tmp_path / "few", "--text", text, "--tokens", "40").out
    assert "bits per byte" in few and "each by its own tokenizer" in few
    count = int(few.split(" tokens (each")[0].split()[-1])
    assert 60 <= count <= 90  # of both
    text.write_bytes(b"\xff\xfe")
    no = lam("edit", source, path, "-o", tmp_path / "no", "--text", text)
    assert no.status == 2 and no.err.splitlines()[-1].endswith("text.txt is no text in UTF-8")


def test_a_tokenizer_that_is_nowhere(lam, source, tmp_path):
    path = plan(tmp_path, "- {op: tokenizer, folder: nowhere}\n")
    lam("edit", source, path, "-o", tmp_path / "out").refused("no source 'nowhere'")


def test_a_page_of_what_was_done(lam, source, tmp_path):
    path = plan(tmp_path, "- {op: key_heads, heads: 1, at: [decoder.layers.1]}\n- {op: window, back: 4}\n")
    page = tmp_path / "page.html"
    found = lam("edit", source, path, "-o", tmp_path / "out", "--tokens", "60", "--html", page, "--json").document
    text = page.read_text(encoding="utf-8")
    assert found["written"] == [str(page)] and found["format"] == "auto_map"
    assert f"{found['verdict']['divergence']:.3g} nats a token" in text
    assert all(one["why"] in text and one["kept"] in text for one in found["operations"])
    assert "2 of 2 layers differ" in text
    lam("edit", source, path, "--dry-run", "--html", page)
    assert "Verdict" not in page.read_text(encoding="utf-8") and "What was done" in page.read_text(encoding="utf-8")
