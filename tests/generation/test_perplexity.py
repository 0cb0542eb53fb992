"""Perplexity by a sliding window: against the definition, against transformers, and in pieces of a file."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.files import TextFile
from lamina.generation.perplexity import Score, log_probabilities, measure, score, window_of
from tests import tiny

IDS = torch.randint(256, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def naive(model: lamina.Model, ids: list[int], window: int, stride: int, begin: int | None) -> list[float]:
    """Every token by itself: the end of its block, and the window that ends there."""
    keep = window - (begin is not None)
    stride = min(stride, window - 1)  # one place is for what stands before the first token of a block
    out = []
    for place, token in enumerate(ids):
        block = 0 if place < keep else (place - keep) // stride + 1
        end = min(keep + block * stride, len(ids))
        seen = ids[max(end - keep, 0) : place]
        seen = seen if begin is None else [begin, *seen]
        if seen:
            out.append(float(model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token]))
    return out


@pytest.mark.parametrize("begin", [None, 256])
@pytest.mark.parametrize("window, stride", [(64, 32), (16, 8), (16, 16), (16, 1), (7, 3), (64, 64)])
def test_every_token_is_scored_once_with_what_fits(window, stride, begin):
    model = tiny.model()
    ids = IDS[:60] if stride == 1 else IDS[:100]
    blocks = list(score(model, iter(ids), begin=begin, window=window, stride=stride))
    ours, expected = torch.cat(blocks), torch.tensor(naive(model, ids, window, stride, begin))
    assert ours.shape == expected.shape == (len(ids) - (begin is None),)
    assert torch.allclose(ours, expected, atol=2e-4)


@torch.no_grad()
def test_one_window_is_the_loss_of_transformers(tmp_path):
    directory = tiny.checkpoint(tmp_path / "tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([IDS[:64]])
    (*_, last) = measure(lamina.load(directory), IDS[:64], window=64)
    assert last.tokens == 63
    assert last.perplexity == pytest.approx(math.exp(float(theirs(ids, labels=ids).loss)), rel=1e-5)


@torch.no_grad()
def test_a_sliding_window_is_the_recipe_of_transformers(tmp_path):
    """huggingface.co/docs/transformers/perplexity: labels of -100 where a token was scored before."""
    directory = tiny.checkpoint(tmp_path / "tiny", tiny.GPT2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids, window, stride, total, before = torch.tensor([IDS[:144]]), 48, 24, 0.0, 0
    for start in range(0, 144, stride):
        end = min(start + window, 144)
        part, labels = ids[:, start:end], ids[:, start:end].clone()
        labels[:, : -(end - before)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        total += float(theirs(part, labels=labels).loss) * scored
        before = end
        if end == 144:
            break
    (*_, last) = measure(lamina.load(directory), IDS[:144], window=window, stride=stride)
    assert last.tokens == 143 and last.nats == pytest.approx(total, rel=1e-5)


def test_figures():
    made = Score(tokens=10, bytes=40, nats=10 * math.log(8), seconds=2.0)
    assert made.perplexity == pytest.approx(8) and made.bits_per_byte == pytest.approx(30 / 40)
    assert made.tokens_per_second == 5.0
    assert (made + made).tokens == 20
    assert Score(tokens=1, nats=1e4).perplexity == math.inf


def test_prompt_log_probabilities():
    model = tiny.model()
    assert log_probabilities(model, IDS[:9]) == pytest.approx(naive(model, IDS[:9], 64, 64, None), abs=2e-4)
    assert log_probabilities(model, IDS[:1]) == []


def test_windows_are_checked():
    model = tiny.model()
    assert window_of(model) == (64, 32)
    for window, stride, said in (
        (1, None, "window is 1"),
        (65, None, "the 64 tokens"),
        (8, 9, "stride is 9"),
        (8, 0, "stride"),
    ):
        with pytest.raises(LaminaError, match=said):
            window_of(model, window, stride)
    bad = tiny.model()
    with torch.no_grad():
        bad.head.weight.fill_(torch.nan)
    with pytest.raises(LaminaError, match="loss is not finite"):
        list(measure(bad, IDS))
    with pytest.raises(LaminaError, match="ids of this model are below"):
        list(measure(model, [5, 400]))


def test_encoders_have_no_perplexity():
    bert = tiny.model(tiny.BERT)
    with pytest.raises(UnsupportedError, match="does not predict the next token"):
        list(measure(bert, IDS))


@pytest.mark.parametrize("piece", [400, 1000, 5000])
def test_pieces_of_a_file_are_the_ids_of_the_whole(tmp_path, piece):
    text = "The cat — über all — ran over the hills, then there were 12 of them.\n\n  Well?  " * 120
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    file = TextFile(tmp_path / "text.txt", tiny.tokenizer(), piece=piece)
    pieces = list(file)
    assert [i for part in pieces for i in part] == tiny.tokenizer().encode(text, special=False)
    assert file.bytes == len(text.encode()) and file.lost == {}
    assert len(pieces) >= len(text) // piece and max(map(len, pieces)) <= piece + 4 * 240


def test_control_tokens_in_a_file_are_text(tmp_path):
    (tmp_path / "text.txt").write_text("a</s>b")
    assert list(TextFile(tmp_path / "text.txt", tiny.tokenizer())) == [[97, 60, 47, 115, 62, 98]]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(LaminaError, match=r"none\.txt: No such file"):
        list(TextFile(tmp_path / "none.txt", tiny.tokenizer()))
    (tmp_path / "bad.txt").write_bytes(b"abc" * 500 + b"\xff" + b"x")
    with pytest.raises(LaminaError, match=r"bad\.txt: not UTF-8 at byte 1,500"):
        list(TextFile(tmp_path / "bad.txt", tiny.tokenizer(), piece=401))
