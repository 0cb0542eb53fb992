"""Another tokenizer: rows follow their tokens, new ones are means of pieces, and ids that are named follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.surgery import Outside, apply, read_plan, tokens
from lamina.surgery.calibration import texts_by
from lamina.surgery.tokens import spelled, text_of
from lamina.text import Tokenizer, document, from_directory
from lamina.text.document import added, bpe, byte_level
from lamina.text.tokenizer import byte_letters
from tests import tiny
from tests.surgery.test_operations import operated, run

ENDS = ("<s>", "</s>")


def byte_tokenizer(order: list[str], merges: list[tuple[str, str]], special: dict[str, str]) -> Tokenizer:
    """Byte-level BPE whose tokens have the ids of their places in `order`."""
    vocabulary = {token: number for number, token in enumerate(order)}
    names = [added(content, vocabulary[content]) for content in special.values()]
    whole = document.document(
        bpe(vocabulary, merges), added_tokens=names, pre_tokenizer=byte_level(), decoder=byte_level()
    )
    return Tokenizer(whole, special=special, name="other")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A LLaMA with the tiny tokenizer: bytes, <s> 256, </s> 257, <|start|>, <|end|>, " t", "he", " the"."""
    return tiny.checkpoint(tmp_path / "old")


def test_the_same_tokens_in_another_order(old: Path, tmp_path: Path):
    """Born equal: the same text, as other ids, has the same scores, in another order."""
    base = lamina.load(old)
    names = [token for token, _ in sorted(tiny.tokenizer().tokens.items(), key=lambda one: one[1])]
    order = [names[(7 * i + 3) % len(names)] for i in range(len(names))]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    special = {"bos": "<s>", "eos": "</s>", "unk": "<|start|>", "pad": "<|end|>"}
    other = byte_tokenizer(order, merges, special)
    other.save(tmp_path / "other")
    model, new = operated(base, {"op": "tokenizer", "folder": str(tmp_path / "other"), "old": str(old)})
    text = "the bathe of thé"
    first, second = (torch.tensor([one.encode(text)]) for one in (tiny.tokenizer(), other))
    assert not new and not torch.equal(first, second)
    place = torch.tensor([tiny.tokenizer().tokens[token] for token in order])
    torch.testing.assert_close(run(model, second), run(base, first)[..., place], rtol=0, atol=1e-5)
    assert model.spec.special.start == order.index("<s>") and model.spec.special.end == (order.index("</s>"),)
    assert torch.equal(model.embedding.weight, base.embedding.weight[place])
    assert torch.equal(model.head.weight, base.head.weight[place])


def test_what_is_fitted_after_a_swap_reads_by_the_new_tokenizer(old: Path, tmp_path: Path):
    """The same text, as other ids of the same rows: the same moments, and so the same heads."""
    base = lamina.load(old)
    names = [token for token, _ in sorted(tiny.tokenizer().tokens.items(), key=lambda one: one[1])]
    order = [names[(7 * i + 3) % len(names)] for i in range(len(names))]
    special = {"bos": "<s>", "eos": "</s>", "unk": "<|start|>", "pad": "<|end|>"}
    byte_tokenizer(order, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")], special).save(tmp_path / "other")
    (tmp_path / "text.txt").write_text("the bathe of thé, the other: the path. " * 9)
    fit = {"op": "key_heads", "heads": 1, "by": "least_squares", "text": str(tmp_path / "text.txt")}
    swap = {"op": "tokenizer", "folder": str(tmp_path / "other"), "old": str(old)}
    outside = Outside(texts=texts_by(tiny.tokenizer(), base.spec))
    state = {name: weight.detach() for name, weight in base.named_parameters()}
    alone, after = (apply(read_plan(plan), base.spec, state, outside).weights for plan in ([fit], [swap, fit]))
    for name in (name for name in alone if ".attention.op." in name):
        torch.testing.assert_close(after[name], alone[name], rtol=0, atol=1e-5)
    fewer = apply(read_plan([{"op": "vocabulary", "size": 260}, fit]), base.spec, state, outside).weights
    with pytest.raises(LaminaError, match=r"the text has the token 26\d, and the model 260 tokens by now"):
        fewer["decoder.layers.0.attention.op.k.weight"]


def test_a_new_token_is_the_mean_of_its_pieces(old: Path, tmp_path: Path):
    letters = list(byte_letters().values())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġthe", "y"), ("Ã", "©"), ("x", "Ã")]
    order = [*ENDS, *letters, *("".join(pair) for pair in merges), "<odd>"]
    special = {"bos": "<s>", "eos": "</s>", "mask": "<odd>"}
    byte_tokenizer(order, merges, special).save(tmp_path / "new")
    base = lamina.load(old)
    model, _ = operated(base, {"op": "tokenizer", "folder": str(tmp_path / "new"), "old": str(old)})
    assert model.spec.embedding.vocabulary == len(order)
    for table, before in ((model.embedding.weight, base.embedding.weight), (model.head.weight, base.head.weight)):

        def mean(*ids: int, before: torch.Tensor = before) -> torch.Tensor:
            return sum(before[one] for one in ids).detach() / len(ids)  # pyright: ignore

        expected = {
            "Ġthe": mean(262),  # both have it
            "Ġthey": mean(262, ord("y")),
            "Ã©": mean(0xC3, 0xA9),
            "xÃ": mean(ord("x"), 0xC3),  # no whole character: byte by byte
            "q": mean(ord("q")),
            "<s>": mean(256),
            "<odd>": mean(*b"<odd>"),
        }
        for token, row in expected.items():
            torch.testing.assert_close(table[order.index(token)].detach(), row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_piece_by_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """In any pieces, for tables and vectors: the mean in float32, and of no row that of all."""
    monkeypatch.setattr(tokens, "AT_ONCE", 3)
    pieces = [[1], [], [4, 0, 4], [2, 3], [5], [0], [], [3, 5, 1, 2]]
    for shape in ((6, 5), (6,)):
        table = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = tokens._rows(table, pieces)
        for row, ids in zip(got, pieces, strict=True):
            expected = table[ids or list(range(6))].float().mean(dim=0).to(dtype)
            torch.testing.assert_close(row, expected)
        assert torch.equal(got[0], table[1]) and got.dtype == dtype


def test_word_pieces_in_place_of_bytes(old: Path, tmp_path: Path):
    tiny.words().save(tmp_path / "words")
    base = lamina.load(old)
    model, _ = operated(base, {"op": "tokenizer", "folder": str(tmp_path / "words"), "old": str(old)})
    rows, ids = base.embedding.weight.detach(), tiny.words().tokens
    torch.testing.assert_close(model.embedding.weight[ids["the"]].detach(), rows[262])
    torch.testing.assert_close(model.embedding.weight[ids["##ing"]].detach(), rows[[*b"ing"]].mean(0))
    torch.testing.assert_close(model.embedding.weight[ids["cat"]].detach(), rows[[*b" cat"]].mean(0))
    assert model.spec.special.start == ids["[CLS]"] and model.spec.special.end == (ids["[SEP]"],)


def test_pieces_within_words_keep_their_rows(tmp_path: Path):
    """##ing is what it was, though the old tokenizer makes something else of a text that is ing."""
    whole = json.loads(tiny.words().backend.to_str())
    vocabulary = whole["model"]["vocab"]
    last = max(vocabulary.values())
    turned = {token: number if number < 5 else last + 5 - number for token, number in vocabulary.items()}
    whole["model"]["vocab"] = turned
    Tokenizer(whole, special=tiny.words().special).save(tmp_path / "turned")
    tiny.words().save(tmp_path / "words")
    base = tiny.model(tiny.BERT)
    plan = {"op": "tokenizer", "folder": str(tmp_path / "turned"), "old": str(tmp_path / "words")}
    model, _ = operated(base, plan)
    assert from_directory(tmp_path / "turned").tokens["##ing"] == turned["##ing"]
    for token, number in vocabulary.items():
        assert torch.equal(model.embedding.weight[turned[token]], base.embedding.weight[number]), token


@pytest.mark.parametrize("token", ["the", "##ing", "a", "!"])
def test_what_is_spelled_is_what_was_read_of_words(token: str):
    assert spelled(tiny.words(), text_of(tiny.words(), token)) == token


@pytest.mark.parametrize("token", ["Ġthe", "Ã", "A", "Ċ"])
def test_what_is_spelled_is_what_was_read_of_bytes(token: str):
    assert spelled(tiny.tokenizer(), text_of(tiny.tokenizer(), token)) == token


def test_what_cannot_be_done(old: Path, tmp_path: Path):
    base = lamina.load(old)
    with pytest.raises(LaminaError, match="old is missing"):
        operated(base, {"op": "tokenizer", "folder": str(old)})
    with pytest.raises(UnsupportedError, match="lamina edit SOURCE PLAN.yaml"):
        lamina.edit(base, [{"op": "tokenizer", "folder": str(old)}])
    letters = list(byte_letters().values())
    byte_tokenizer([*letters, "<s>"], [], {"bos": "<s>"}).save(tmp_path / "endless")
    with pytest.raises(LaminaError, match="no token that ends a text"):
        operated(base, {"op": "tokenizer", "folder": str(tmp_path / "endless"), "old": str(old)})
    with pytest.raises(LaminaError, match="has 263 tokens, and the model 24"):
        operated(tiny.model(tiny.BERT), {"op": "tokenizer", "folder": str(old), "old": str(old)})


def test_an_encoder_keeps_its_padding(tmp_path: Path):
    base = tiny.model(tiny.BERT)
    tiny.words().save(tmp_path / "words")
    letters = list(byte_letters().values())
    special = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
    byte_tokenizer([*letters, *special.values()], [], special).save(tmp_path / "bytes")
    plan = {"op": "tokenizer", "folder": str(tmp_path / "bytes"), "old": str(tmp_path / "words")}
    with pytest.raises(LaminaError, match=r"embedding.padding is 0 \(\[PAD\]\), and the new tokenizer has no token"):
        operated(base, plan)
    special |= {"pad": "[PAD]"}
    byte_tokenizer([*letters, *special.values()], [], special).save(tmp_path / "padded")
    model, _ = operated(base, plan | {"folder": str(tmp_path / "padded")})
    assert model.spec.embedding.padding == model.spec.special.pad == 260
    assert torch.equal(model.embedding.weight[258], base.embedding.weight[4])
