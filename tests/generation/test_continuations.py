"""Continuations in batches, and texts after several prompts: against transformers, a row at a time."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import Sampling, Writing, continuations, perplexity, write
from lamina.generation.text import check_texts
from tests import tiny

PROMPTS = ("the cat", "a", "there, then the hill", "one two three four five", "é")


def pairs(seed: int, count: int = 9) -> list[tuple[list[int], list[int]]]:
    """Of many lengths, some with a context alike and some with the same beginning of a continuation."""
    draw = random.Random(seed)
    made = [
        (
            [draw.randrange(256) for _ in range(draw.randint(1, 20))],
            [draw.randrange(256) for _ in range(draw.randint(1, 5))],
        )
        for _ in range(count)
    ]
    context, after = made[0]
    return [*made, (context, [*after[:-1], 7]), (context, [*after[:-1], 9]), ([*context, *after], [11])]


@torch.no_grad()
def naive(theirs, before: list[int], after: list[int]) -> tuple[float, bool]:
    logits = theirs(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(after)), after]
    return float(chosen.double().sum()), logits.argmax(-1).tolist() == after


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MISTRAL, tiny.GPT2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_continuations_are_those_of_transformers(tmp_path, monkeypatch, config, batch):
    monkeypatch.setattr(perplexity, "ROWS", 5)  # so that one batch is several parts
    directory = tiny.checkpoint(tmp_path / "tiny", config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    asked = pairs(batch)
    for number, (before, _) in list(enumerate(asked))[:2]:  # what greedy decoding writes, as far as two tokens
        written = theirs.generate(torch.tensor([before]), max_new_tokens=2, do_sample=False, pad_token_id=0)
        asked[number] = (before, written[0, len(before) :].tolist())
    asked.append((asked[0][0], [asked[0][1][0], (asked[0][1][1] + 1) % 256]))  # and as far as one of two
    found = {each.index: each for each in continuations(lamina.load(directory), asked, batch=batch)}
    assert sorted(found) == list(range(len(asked)))
    for index, (before, after) in enumerate(asked):
        likelihood, greedy = naive(theirs, before, after)
        assert found[index].log_probability == pytest.approx(likelihood, abs=1e-4), index
        assert found[index].greedy == greedy, index
    assert found[0].greedy and found[1].greedy and not found[len(asked) - 1].greedy


def test_answers_of_one_token_are_one_row(monkeypatch):
    model, read = tiny.model(), []
    forward = type(model).forward

    def counted(self, ids, *rest, **more):
        read.append(tuple(ids.shape))
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    found = list(continuations(model, [([1, 2, 3], [token]) for token in (4, 5, 6, 7)] + [([1], [2, 3])], batch=8))
    assert read == [(2, 3)] and sorted(each.index for each in found) == [0, 1, 2, 3, 4]


def test_the_context_may_be_full_and_no_fuller():
    model = tiny.model()
    (whole,) = continuations(model, [([5] * 60, [1, 2, 3, 4, 5])])
    assert whole.log_probability < 0
    with pytest.raises(LaminaError, match="pair 0 has 66 tokens; this model reads 64, and predicts one more"):
        list(continuations(model, [([5] * 61, [1, 2, 3, 4, 5])]))


def test_continuations_refuse():
    model = tiny.model()
    for bad in ([([], [1])], [([1], [])]):
        with pytest.raises(LaminaError, match="both need one"):
            list(continuations(model, bad))
    with pytest.raises(LaminaError, match="holds id 263"):
        list(continuations(model, [([1], [263])]))
    with pytest.raises(LaminaError, match="batch is 0"):
        list(continuations(model, [([1], [2])], batch=0))
    with pytest.raises(UnsupportedError, match="does not predict the next token, so continuations"):
        list(continuations(tiny.model(tiny.BERT), [([1], [2])]))
    with pytest.raises(UnsupportedError, match="an encoder-decoder predicts a text from its source, so continuations"):
        list(continuations(tiny.model(tiny.T5), [([1], [2])]))


@torch.no_grad()
@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_texts_are_those_of_transformers_up_to_the_first_stop(tmp_path, config, seed):
    """Greedy, each prompt alone; then the text is cut with str.find."""
    directory = tiny.checkpoint(tmp_path / "tiny", config, seed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ours, words = lamina.load(directory), lamina.tokenizer(directory)
    prompts = [words.encode(text) for text in PROMPTS]
    whole = []
    for prompt in prompts:
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        whole.append(words.decode(ids[0, len(prompt) :].tolist()))
    cut = [text[size : size + 2] for text, size in zip(whole, (3, 5, 8), strict=False)]
    stop = [one for one in cut if one] + ["none of", "these", "is", "here"]  # a text may be shorter than that
    expected = [text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))] for text in whole]
    assert write(ours, words, prompts, max_new_tokens=24) == whole
    assert write(ours, words, prompts, max_new_tokens=24, stop=stop) == expected
    assert expected != whole and len(stop) > 4


def test_texts_end_with_their_stops_and_so_does_the_work(monkeypatch):
    """No token is read once every row has its stop text."""
    model, words = tiny.model(), tiny.tokenizer()
    prompts = [words.encode(text) for text in PROMPTS[:2]]
    alone = [Writing(model, words, prompt, max_new_tokens=20) for prompt in prompts]
    texts = ["".join(each) for each in alone]
    read, forward = [], type(model).forward

    def counted(self, ids, *rest, **more):
        read.append(ids.shape[1])
        return forward(self, ids, *rest, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    stop = [text[1] for text in texts]
    assert all(len(text) <= 1 for text in write(model, words, prompts, max_new_tokens=20, stop=stop))
    assert len(read) < 8


@torch.no_grad()
def test_a_row_that_has_ended_writes_no_padding(tmp_path):
    """Padding that is a token like any other, as where a checkpoint names none: another row goes on beside it."""
    directory = tiny.checkpoint(tmp_path / "tiny")
    words = lamina.tokenizer(directory)
    prompts = [words.encode(text) for text in PROMPTS]

    def written() -> list[list[int]]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
        rows = [theirs.generate(torch.tensor([each]), max_new_tokens=12, do_sample=False)[0] for each in prompts]
        return [row[len(each) :].tolist() for row, each in zip(rows, prompts, strict=True)]

    end = written()[0][2]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": 65}))
    expected = written()
    assert len(set(map(len, expected))) > 1 and words.decode([65])
    assert write(lamina.load(directory), words, prompts, max_new_tokens=12) == [words.decode(ids) for ids in expected]


def test_the_tokenizers_end_ends_a_row(monkeypatch):
    """Where the checkpoint's end is another one: the model's first choice is made the end of the tokenizer alone."""
    model, words = tiny.model(), tiny.tokenizer()
    read, forward = [], type(model).forward

    def counted(self, ids, *rest, **more):
        read.append(ids.shape[1])
        return forward(self, ids, *rest, **more)

    prompt = words.encode("the cat")
    with torch.no_grad():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        last = model.head.weight[first].clone()
        model.head.weight[words.eos] = last * 2
        model.head.weight[first] = 0
    model.origin = type("Origin", (), {"generation": {"eos_token_id": 5}})()
    monkeypatch.setattr(type(model), "forward", counted)
    assert write(model, words, [prompt], max_new_tokens=20) == [""]
    assert read == [len(prompt)]  # an end token that is read has no text either


def test_sampled_texts_repeat_with_their_seed_and_stops_are_checked():
    model, words = tiny.model(), tiny.tokenizer()
    prompts = [words.encode(text) for text in PROMPTS]
    given = {"max_new_tokens": 9, "sampling": Sampling(temperature=1.5, seed=3)}
    assert (
        write(model, words, prompts, **given)
        == write(model, words, prompts, **given)
        != write(model, words, prompts, max_new_tokens=9)
    )
    with pytest.raises(LaminaError, match="stop holds ''"):
        write(model, words, prompts, max_new_tokens=3, stop=[""])
    check_texts(["a"] * 9)
