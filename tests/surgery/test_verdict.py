"""The verdict: what is measured equals what a few plain lines of torch say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import lamina
from lamina.errors import LaminaError
from lamina.surgery import compare
from tests import small, tiny


def texts(vocabulary: int, *lengths: int) -> list[list[int]]:
    return [small.ids(1, length, vocabulary=vocabulary, seed=length)[0].tolist() for length in lengths]


def test_it_says_what_plain_torch_says():
    before, after = tiny.model(), tiny.model(seed=1)
    read = texts(263, 19, 7)
    found = compare(before, after, read)
    divergence = agreed = nats = other = 0.0
    far = own = 0.0
    for text in read:
        ids = torch.tensor([text])
        left, right = before(ids).logits[0].log_softmax(-1).detach(), after(ids).logits[0].log_softmax(-1).detach()
        for place in range(len(text)):
            divergence += float((left[place].exp() * (left[place] - right[place])).sum())
            agreed += int(left[place].argmax() == right[place].argmax())
        for place in range(len(text) - 1):
            nats -= float(left[place, text[place + 1]])
            other -= float(right[place, text[place + 1]])
        records = lamina.Record("*.output"), lamina.Record("*.output")
        for model, record in zip((before, after), records):
            model(ids, record=record)
        one, two = (record.values["decoder.layers.1.output"].detach() for record in records)
        far, own = far + float((one - two).square().sum()), own + float(one.square().sum())
    assert found.tokens == 26 and found.found == "changed"
    assert found.divergence == pytest.approx(divergence / 26, rel=1e-4)
    assert found.agreement == pytest.approx(agreed / 26)
    assert found.before.perplexity == pytest.approx(math.exp(nats / 24), rel=1e-4)
    assert found.after.perplexity == pytest.approx(math.exp(other / 24), rel=1e-4)
    assert [drift.layer for drift in found.drift] == ["decoder.layers.0", "decoder.layers.1"]
    assert found.drift[1].drift == pytest.approx(math.sqrt(far / own), rel=1e-4)
    assert (
        found.before.cache_bytes == 2 * 2 * 2 * 8 * 64 * 4
    )  # layers, k and v, heads, head_dim, room for 32 tokens, bytes


@pytest.mark.parametrize(
    "config", [tiny.LLAMA, tiny.GPT2, tiny.BERT, tiny.T5, tiny.BART], ids=lambda c: c["model_type"]
)
def test_a_model_is_itself_to_the_bit(config: dict[str, object]):
    model = tiny.model(config)
    found = compare(model, tiny.model(config), texts(model.spec.embedding.vocabulary, 15, 9))
    assert found.found == "exact to the bit" and found.worst == 0
    assert found.divergence == 0 and found.agreement == 1
    assert {drift.drift for drift in found.drift} == {0.0}
    perplexities = found.before.perplexity, found.after.perplexity
    if config["model_type"] == "bert":
        assert perplexities == (None, None)
    else:
        assert perplexities[0] is not None and perplexities[0] == perplexities[1]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LaminaError, match="at least two tokens"):
        compare(tiny.model(), tiny.model(), [[1]])
    with pytest.raises(LaminaError, match="fewer tokens"):
        compare(tiny.model(), tiny.model(tiny.BERT), [[1, 24]])


def test_edit_gives_a_model_a_verdict_and_a_history(tmp_path: Path):
    tiny.model().spec.to_json()
    base = tiny.model()
    lamina.save(base, tmp_path / "base")
    tiny.tokenizer().save(tmp_path / "base")
    source = lamina.load(tmp_path / "base")
    model, verdict = lamina.edit(source, [{"op": "experts", "experts": 2}])
    assert verdict.found == "exact" and verdict.tokens == 2048 and verdict.agreement == 1
    lamina.save(model, tmp_path / "experts")
    history = json.loads((tmp_path / "experts" / "history.json").read_text())
    assert [line["plan"][0]["op"] for line in history] == ["experts"]
    assert history[0]["verdict"]["found"] == "exact" and len(history[0]["source_sha256"]) == 64
    again = lamina.load(tmp_path / "experts")
    assert again.origin.history == history
    back, verdict = lamina.edit(again, history[0]["undo"])
    assert verdict.found == "exact" and back.spec.decoder == source.spec.decoder
    lamina.save(back, tmp_path / "back")
    assert len(lamina.load(tmp_path / "back").origin.history) == 2
    with pytest.raises(LaminaError, match="unknown argument of edit 'text'"):
        lamina.edit(source, [{"op": "dense"}], text="a")
