"""Two stacks side by side: complete in itself, inert, right in its numbers, and looked at in a real browser."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

import lamina
from lamina.report.stacks import Named, aligned, stacks
from lamina.surgery import Verdict
from tests import tiny
from tests.pages import HOSTILE, Elements, assert_complete

FOUR = tiny.LLAMA | {"num_hidden_layers": 4}
PLAN: list[dict[str, Any]] = [
    {"op": "key_heads", "heads": 1, "at": ("decoder.layers.0",)},
    {"op": "window", "back": 8, "at": ("decoder.layers.2",)},
]
DONE = [{"op": "key_heads", "heads": 1, "at": ["decoder.layers.0"], "kept": "lossy", "why": "heads are joined"}]


@cache
def edited() -> tuple[lamina.Model, lamina.Model, Verdict]:
    model = tiny.model(FOUR)
    new, verdict = lamina.edit(model, PLAN, texts=[list(range(40))])
    return model, new, verdict


def shown(name: str = "before", why: str = "heads are joined") -> tuple[str, lamina.Model, lamina.Model, Verdict]:
    model, new, verdict = edited()
    both = Named(name, model.spec), Named("after", new.spec)
    operations = [DONE[0] | {"why": why}]
    return (
        stacks(*both, operations=operations, verdict=verdict, differences=[("a.path", name, "2")]),
        model,
        new,
        verdict,
    )


def test_it_asks_for_nothing_and_runs_nothing():
    text, *_ = shown()
    assert_complete(text)
    assert Elements(text).scripts == [] and "script-src 'none'" in text


def test_what_it_shows_is_inert():
    text, *_ = shown(HOSTILE, HOSTILE)
    tags = [tag for tag, _ in Elements(text).found]
    assert "script" not in tags and "img" not in tags
    assert "".join(Elements(text).text).count("<script>alert(1)</script>") >= 5


def test_layers_that_are_equal_stand_beside_each_other():
    a, b, c = (tiny.spec(tiny.LLAMA | {"intermediate_size": n}).decoder.layers[0] for n in (8, 9, 10))  # pyright: ignore
    assert list(aligned((a, b), (c, b))) == [(0, 0), (1, 1)]
    assert list(aligned((a, b, c), (a, b, b, c))) == [(0, 0), (1, 1), (None, 2), (2, 3)]
    assert list(aligned((a, b, c), (a, c))) == [(0, 0), (1, None), (2, 1)]
    assert list(aligned((a, b, c), (c,))) == [(0, None), (1, None), (2, 0)]
    assert list(aligned((), (a,))) == [(None, 0)]


def rows(opened: Any, table: str) -> list[list[str]]:
    return [
        [cell.inner_text().strip() for cell in row.locator("th, td").all()]
        for row in opened.locator(f"#{table} tbody tr").all()
    ]


def test_the_stacks_in_a_browser(visit):
    text, model, new, verdict = shown()
    opened = visit(text)
    found = rows(opened, "decoder-stacks")
    assert [row[0] for row in found] == ["changed", "same", "changed", "same"]
    assert [row[1] for row in found] == [row[5] for row in found] == ["0", "1", "2", "3"]
    assert "GQA 4/2" in found[0][2] and "MQA 4/1" in found[0][6] and "window of 8" in found[2][6]
    each = sum(parameter.numel() for parameter in model.decoder.layers[0].parameters())  # pyright: ignore
    less = sum(parameter.numel() for parameter in new.decoder.layers[0].parameters())  # pyright: ignore
    assert [row[3] for row in found] == [f"{each / 1000:.2f} k"] * 4 and found[0][7] == f"{less / 1000:.2f} k"
    assert [float(row[9]) for row in found] == pytest.approx([one.drift for one in verdict.drift], rel=0.1)
    marks = opened.locator("#decoder-stacks mark").all_inner_texts()
    assert len(marks) == 4 and all(mark.startswith("attention: ") for mark in marks)
    tint = "getComputedStyle(document.querySelector('#decoder-stacks mark')).backgroundColor"
    assert re.findall(r"[\d.]+", opened.evaluate(tint))[3:] == ["0.22"]
    bars = [
        box.bounding_box()["width"] for box in opened.locator("#decoder-stacks tbody tr").first.locator(".bar").all()
    ]
    full = 4.5 * 16
    cache = (1 / 2, 1)  # one key head of two
    assert bars[:4] == pytest.approx([full, full, full * less / each, full * cache[0]], abs=1)
    assert opened.locator("#plan-table tbody tr").count() == 1 and opened.locator("#field-table tbody tr").count() == 1
    assert rows(opened, "verdict-table")[0][1:] == [
        f"{side.perplexity:.3f}" for side in (verdict.before, verdict.after)
    ]
    assert opened.locator("svg.lamina").count() == 2
    left, right = (one.bounding_box() for one in opened.locator("svg.lamina").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]  # side by side


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_screen(visit, width: int, dark: bool):
    opened = visit(shown()[0], width, dark)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = opened.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] })()"
    )
    shades = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (ink, paper)]
    assert (shades[0] > shades[1]) == dark and abs(shades[0] - shades[1]) > 450


def test_models_of_other_kinds(visit):
    """Another depth, another stack, no verdict."""
    deep = Named("deep", tiny.spec(FOUR | {"num_hidden_layers": 6}))
    opened = visit(stacks(Named("shallow", tiny.spec(FOUR)), deep))
    found = rows(opened, "decoder-stacks")
    assert [row[0] for row in found] == ["same"] * 4 + ["only here"] * 2 and found[4][1] == "no such layer"
    opened = visit(stacks(Named("bert", tiny.spec(tiny.BERT)), Named("t5", tiny.spec(tiny.T5))))
    assert opened.locator("#encoder-stacks tbody tr").count() == 2
    assert [row[0] for row in rows(opened, "decoder-stacks")] == ["only here"] * 2
