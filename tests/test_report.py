"""The report: complete in itself, inert whatever it is told to show, and alive in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest
import torch

import lamina
from lamina.generation import Writing
from lamina.report import Ranking, attention_of, report
from tests import tiny
from tests.pages import HOSTILE, Elements, assert_complete


def written(prompt: str = "the hills ", most: int = 24, config: dict[str, Any] = tiny.LLAMA) -> tuple[Any, Writing]:
    model, tokenizer = tiny.model(config | {"max_position_embeddings": 256}), tiny.tokenizer()
    ids = tokenizer.encode(prompt, control=False)
    writing = Writing(model, tokenizer, ids, max_new_tokens=most, min_new_tokens=most, probabilities=True)
    list(writing)
    return model, writing


def page(title: str = "tiny", **more: Any) -> str:
    model, writing = written()
    ranking = Ranking("words", ["the cat", "a <b>dog</b>", "red"], [1.0, 0.5, -0.25])
    return report(title, model, writing=writing, ranking=ranking, **more)


def test_it_asks_for_nothing():
    assert_complete(page())


def test_the_policy_allows_its_own_script_only():
    elements = Elements(page())
    (policy,) = [a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    data, script = elements.scripts
    json.loads(data)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script and "eval" not in script


def test_what_it_shows_is_inert():
    model, writing = written(HOSTILE, 4)
    ranking = Ranking(HOSTILE, [HOSTILE, HOSTILE], [1.0, 0.5])
    elements = Elements(report(HOSTILE, model, writing=writing, prompt=HOSTILE, ranking=ranking))
    assert [tag for tag, _ in elements.found].count("script") == 2 and "img" not in [tag for tag, _ in elements.found]
    assert "".join(elements.text).count("<script>alert(1)</script>") >= 4
    assert "<" not in elements.scripts[0]
    assert "".join(json.loads(elements.scripts[0])["tokens"]).startswith("<script>alert(1)</script><img")


def test_the_numbers_are_those_of_the_account():
    model, _ = written()
    text = "".join(Elements(page()).text)
    account = lamina.account(model)
    assert f"{account.parameters:,}" in text
    for row in account.rows:
        assert row.name in text and f"{row.parameters:,}" in text


def test_attention_is_that_of_the_record():
    model, writing = written()
    ids = [*writing.prompt_ids, *writing.ids]
    found = attention_of(model, ids, [str(i) for i in ids])
    assert found is not None and found.causal and found.left_out == 0
    record = lamina.Record("*.weights")
    with torch.no_grad():
        model(torch.tensor([ids]), record=record)
    data = found.to_dict()
    assert [each["path"] for each in data["layers"]] == [name.removesuffix(".weights") for name in record.values]
    for each, weights in zip(data["layers"], record.values.values()):
        steps = torch.frombuffer(bytearray(base64.b64decode(each["weights"])), dtype=torch.uint8)
        shares = (steps.view(weights.shape[1:]).float() / 255) ** 2
        assert torch.allclose(shares, weights[0], atol=1 / 255)


def test_long_texts_and_many_layers_are_cut_and_say_so():
    model, writing = written("x" * 150, config=tiny.LLAMA | {"num_hidden_layers": 9})
    text = report("tiny", model, writing=writing)
    data = json.loads(Elements(text).scripts[0])
    assert len(data["tokens"]) == 96 and len(data["layers"]) == 4
    assert [each["path"].split(".")[2] for each in data["layers"]] == ["0", "3", "5", "8"]
    assert "The first 78 tokens are left out." in text
    assert len(text) < 700_000


def test_encoders_have_a_page_too():
    text = report("words", tiny.model(tiny.BERT), ranking=Ranking("words", ["a", "b"], [1.0, 0.2]))
    assert 'id="layer-table"' in text and 'id="ranking-table"' in text and 'id="map"' not in text


def test_the_map_in_a_browser(visit):
    model, writing = written()
    opened = visit(report("tiny", model, writing=writing))
    tokens = [*writing.prompt_ids, *writing.ids]
    readout, canvas = opened.locator("#readout"), opened.locator("#map")
    record = lamina.Record("*.weights")
    with torch.no_grad():
        model(torch.tensor([tokens]), record=record)
    opened.locator("#layer").select_option(index=1)
    opened.locator("#head").select_option("2")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    cell = box["width"] / len(tokens)
    query, key = len(tokens) - 2, 3
    canvas.hover(position={"x": (key + 0.5) * cell, "y": (query + 0.5) * cell})
    share = float(record.values["decoder.layers.1.attention.op.weights"][0, 2, query, key])
    assert f"({query})" in readout.text_content() and f"({key})" in readout.text_content()
    assert float(readout.text_content().rsplit(" ", 1)[1]) == pytest.approx(share, abs=0.01)
    rows = opened.locator("#twin tr").all_inner_texts()
    best = record.values["decoder.layers.1.attention.op.weights"][0, 2, query].max()
    assert len(rows) == 8 and float(rows[0].split()[-1]) == pytest.approx(float(best), abs=0.01)
    canvas.focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowRight")
    assert f"({query + 1})" in readout.text_content() and f"({key + 1})" in readout.text_content()
    ink = opened.evaluate(
        "(() => { const c = document.getElementById('map'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0;"
        " return n / (d.length / 4); })()"
    )
    assert ink > 0.4  # the triangle, and hatching beyond it


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_screen(visit, width, dark):
    opened = visit(page(), width, dark)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = opened.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] })()"
    )
    shades = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (ink, paper)]
    assert (shades[0] > shades[1]) == dark and abs(shades[0] - shades[1]) > 450
    text = opened.evaluate("getComputedStyle(document.querySelector('svg.lamina .name')).fill")
    assert (sum(map(int, re.findall(r"\d+", text)[:3])) > 380) == dark


def test_hostile_text_in_a_browser(visit):
    model, writing = written(HOSTILE)
    opened = visit(
        report(HOSTILE, model, writing=writing, prompt=HOSTILE, ranking=Ranking("x", [HOSTILE] * 2, [1, 0.5]))
    )
    assert opened.locator("h1").text_content() == HOSTILE
    assert opened.locator("main img").count() == 0
