"""Text as it is written: whole characters, stop texts across tokens, reasons, clocks, and turns on one cache."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError
from lamina.generation import Sampling
from lamina.generation.beam import Beaming
from lamina.generation.chat import Chat
from lamina.generation.text import Writing, find_texts
from tests import tiny


class Scripted:
    """A model that writes given ids: enough of one for the loop, with no weights to search for the right words."""

    def __init__(self, ids: list[int]) -> None:
        self.inner, self.ids = tiny.model(), ids
        self.spec, self.origin, self.engine, self.cache_limit = self.inner.spec, None, None, None
        self.embedding, self.decoder, self.head = self.inner.embedding, self.inner.decoder, self.inner.head
        self.at = itertools.count()

    def new_cache(self, *given):
        return self.inner.new_cache(*given)

    def __call__(self, ids, mask=None, *, cache=None, keep_logits=None, neighbours=None):
        out = self.inner(ids, mask, cache=cache, keep_logits=keep_logits)
        out.logits = torch.full_like(out.logits, -5.0)
        out.logits[..., self.ids[next(self.at)]] = 5.0
        return out


def write(text: str | list[int], end: bool = True, **options) -> Writing:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    model = Scripted([*ids, *([257] if end else [])])
    return Writing(model, tokenizer, [1, 2, 3], **{"max_new_tokens": len(ids) + end} | options)


def test_pieces_join_to_the_text():
    writing = write("over the hills")
    pieces = list(writing)
    assert "".join(pieces) == writing.text == "over the hills"
    assert len(pieces) > 5 and all(pieces)
    assert writing.finish_reason == "stop" and writing.stopped_by is None
    assert writing.ids[-1] == 257


def test_the_most_is_a_length():
    writing = write("over the hills", max_new_tokens=4)
    assert "".join(writing) == "over" and writing.finish_reason == "length" and len(writing.ids) == 4


def test_an_end_at_once_is_empty_text():
    writing = write("")
    assert list(writing) == [] and writing.text == "" and writing.finish_reason == "stop"


def test_no_piece_splits_a_character():
    text = "é日本👩‍👩‍👧ñ"
    writing = write(text)
    pieces = list(writing)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(writing.ids) == len(text.encode()) + 1


def test_half_a_character_at_the_end_is_shown_as_such():
    writing = write([104, 195], end=False, max_new_tokens=2)
    assert list(writing) == ["h", "\ufffd"] and writing.finish_reason == "length"


@pytest.mark.parametrize(
    "text, stop, kept",
    [
        ("over the hills", ["the"], "over "),  # one token, " the", holds the space and the stop text
        ("over the hills", ["r t"], "ove"),  # across tokens
        ("over the hills", ["he hi"], "over t"),
        ("over the hills", ["hills!"], "over the hills"),  # begins, never ends: nothing is lost
        ("over the hills", ["hi", "he"], "over t"),  # the first to come
        ("over the hills", ["he", "th"], "over "),  # the first of two that one token, " the", brings
        ("aab", ["ab"], "a"),  # a false start overlaps the true one
        ("日本", ["本"], "日"),
        ("over", ["o"], ""),
    ],
)
def test_stop_texts(text, stop, kept):
    writing = write(text, stop=stop)
    pieces = list(writing)
    assert "".join(pieces) == writing.text == kept
    assert (writing.stopped_by in stop) == (kept != text)
    assert writing.finish_reason == "stop"


def test_stop_texts_are_checked():
    for stop, said in (
        (["a", "b", "c", "d", "e"], "at most 4"),
        ([""], "at least one character"),
        ([3], "stop holds 3"),
    ):
        with pytest.raises(LaminaError, match=said):
            write("x", stop=stop)


def test_an_interrupted_text_is_kept():
    writing = write("over the hills", stop=["hill of"])
    for piece in writing:
        if "h" in piece:
            break
    assert writing.text + writing.flush() == writing.text or writing.text.startswith("over the")
    writing = write("over the hil", stop=["hills"])
    iterator = iter(writing)
    for _ in range(7):
        next(iterator, None)
    writing.flush()
    assert "over the hil".startswith(writing.text) and writing.text


def test_clocks_and_probabilities():
    writing = write("over the hills", probabilities=True)
    list(writing)
    assert writing.prefill_seconds > 0 and writing.decode_seconds > 0
    assert writing.tokens_per_second == pytest.approx((len(writing.ids) - 1) / writing.decode_seconds)
    assert writing.prefill_tokens_per_second == pytest.approx(3 / writing.prefill_seconds)
    assert len(writing.probabilities) == len(writing.ids)
    expected = float(torch.tensor([5.0] + [-5.0] * 262).softmax(0)[0])
    assert writing.probabilities == pytest.approx([expected] * len(writing.ids), rel=1e-5)


def test_text_equals_generate():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompt = tokenizer.encode("one two")
    writing = Writing(model, tokenizer, prompt, max_new_tokens=20, sampling=Sampling(temperature=0.8, seed=1))
    text = "".join(writing)
    ids = lamina.generate(model, torch.tensor([prompt]), max_new_tokens=20, temperature=0.8, seed=1)[0, len(prompt) :]
    assert writing.ids == ids.tolist() and text == tokenizer.decode(ids.tolist())


@torch.no_grad()
def test_texts_of_beams_end_with_their_end_token(tmp_path):
    """Those of transformers, each up to its end token, and not with the padding that the longest one brings."""
    end = 118  # which the likeliest texts have, some of them sooner
    directory = tiny.checkpoint(tmp_path / "tiny", tiny.T5 | {"eos_token_id": end})
    tokenizer = lamina.tokenizer(directory)
    prompt = tokenizer.encode("one two")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).generate(
        torch.tensor([prompt]), max_new_tokens=7, num_beams=4, num_return_sequences=3, length_penalty=0.0
    )
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in theirs[:, 1:].tolist()]
    beaming = Beaming(beams=4, best=3, length_penalty=0.0)
    found = find_texts(lamina.load(directory), tokenizer, prompt, beaming=beaming, max_new_tokens=7)
    assert [list(each.ids) for each in found] == expected and len(set(map(len, expected))) > 1
    assert [each.text for each in found] == [tokenizer.decode(ids) for ids in expected]


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("cache", ["auto", "growing", "sinks", "none"])
def test_turns_on_one_cache_equal_turns_anew(config, cache):
    model, tokenizer = tiny.model(config | {"max_position_embeddings": 512}), tiny.tokenizer()
    chat = Chat(model, tokenizer, max_new_tokens=6, cache=cache)
    said = []
    for text in ("hello", "and the other?", "bye"):
        answer = chat.say(text)
        said.append({"role": "user", "content": text})
        prompt = tokenizer.chat_ids(said)
        list(answer)
        alone = lamina.generate(model, torch.tensor([prompt]), max_new_tokens=6)[0, len(prompt) :].tolist()
        assert answer.ids == alone
        said.append({"role": "assistant", "content": answer.text})
        assert chat.messages == said
        if cache == "growing" and len(said) > 2:
            assert chat.reused > 20 and len(answer.prompt_ids) == len(prompt) - chat.reused
    chat.reset()
    assert chat.messages == []


def test_an_interrupted_turn_goes_on():
    model, tokenizer = tiny.model(tiny.LLAMA | {"max_position_embeddings": 512}), tiny.tokenizer()
    chat = Chat(model, tokenizer, max_new_tokens=30)
    for count, _ in enumerate(answer := chat.say("hello")):
        if count == 4:
            break
    answer.flush()
    again = chat.say("go on")
    list(again)
    prompt = tokenizer.chat_ids(chat.messages[:-1])
    assert again.ids == lamina.generate(model, torch.tensor([prompt]), max_new_tokens=30)[0, len(prompt) :].tolist()
    chat.take_back()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
