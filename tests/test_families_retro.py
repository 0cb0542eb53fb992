"""RETRO, whose weights were never published: what is built from its sizes has the counts of the paper's table 10."""

from __future__ import annotations

import json

import pytest
import torch

import lamina
from lamina.conformance import verify
from lamina.errors import UnsupportedError
from lamina.exporting import exportable
from lamina.families import Fields, family, note
from lamina.generation.compiled import prepare
from lamina.report import attention_of
from lamina.words import say
from tests import small
from tests.layers.test_retrieval import TINY, found

TABLE = {  # d, i = heads head_dim, layers, the paper's millions
    "retro/172m": (896, 1024, 12, 172),
    "retro/425m": (1536, 1536, 12, 425),
    "retro/1.5b": (2048, 2048, 24, 1451),
    "retro/7.5b": (4096, 4096, 32, 7532),
}
UNCOUNTED = ("embedding.weight", "norm.weight", "pre.weight", "relative.content", "relative.position")


@pytest.mark.parametrize("size", TABLE)
def test_the_counts_are_those_of_the_paper_to_the_digit(size: str):
    d, i, layers, millions = TABLE[size]
    spec = lamina.spec(size)
    assert spec.decoder is not None
    places = [n + 1 for n, layer in enumerate(spec.decoder.layers) if len(layer.steps) == 3]
    assert places == list(range(6, layers + 1, 3))
    encoder, between = 2 * (5 * 896 * 1024 + 2 * 896 * 3584), 3 * 896 * 1024 + 2 * d * 1024
    counted = layers * (5 * d * i + 8 * d * d) + encoder + between + len(places) * (3 * d * i + 2 * 896 * i)
    built = dict(spec.build(device="meta").named_parameters())
    own = sum(parameter.numel() for name, parameter in built.items() if not name.endswith(UNCOUNTED))
    assert own == counted and round(own / 1e6) == millions
    # `account` counts what is there: beside that the two tables, a scale for each norm, u and v of each attention.
    encoder_attentions = 3
    norms = (2 * layers + len(places) + 1) * d + 6 * 896
    terms = 2 * i * (layers + len(places)) + 2 * 1024 * encoder_attentions
    assert lamina.account(spec).parameters == counted + 128_000 * (d + 896) + norms + terms


def test_what_it_costs_is_what_its_products_are():
    """By hand: a chunk's two neighbours, and the tokens that read them."""
    spec = family("retro").spec(Fields(TINY))
    context, rows = 24, 3
    m, r, k, e = TINY["chunk"], 2 * TINY["chunk"], 2, TINY["encoder_width"]
    chunks, width, heads, size = context // m, TINY["width"], TINY["heads"], TINY["head_dim"]
    account = lamina.account(spec, rows, context, dtype="float32")
    layers = {row.name: row for row in account.rows}
    last = layers["decoder.layers.3"].parts[1].parts[1].parts[0]
    assert last.name == "attention"
    i, distances = heads * size, 3 * m - 1  # from m - r to 2 m - 2
    groups = rows * chunks
    by_hand = groups * (2 * m * width * i + 2 * k * r * e * i)  # q, o; k, v
    by_hand += groups * m * i * (2 * k * r + distances) + distances * width * i  # scores, values; positions
    assert last.flops == 2 * by_hand
    assert last.cache_bytes == rows * 2 * i * k * r * 4
    first = layers["decoder.layers.1"].parts[1]
    assert first.cache_bytes == rows * (2 * i * k * r + m * width) * 4
    encoder = first.parts[1].parts[0]
    assert encoder.flops_per_token == 0 < encoder.flops  # a step that ends no chunk encodes nothing
    assert last.flops_per_token > 0


def test_in_words():
    spec = lamina.spec("retro/7.5b")
    assert say(spec.retrieval) == (
        "neighbours of the chunk of 64 tokens before, cross-attention, 32 heads of 128, memory of width 896,"
        " Transformer-XL positions, encoder of 2 layers, width 896"
    )
    assert "table 10" in str(note("retro/7.5b")) and len(json.loads(spec.to_json())["decoder"]["layers"]) == 19
    with pytest.raises(UnsupportedError, match="save with format=.native."):
        exportable(spec)


@pytest.fixture(scope="module")
def model() -> lamina.Model:
    return small.build(family("retro").spec(Fields(TINY)))


def test_all_that_holds_for_a_model_holds_for_it(model: lamina.Model):
    report = verify(model)
    assert report.passed, str(report)
    held = {row.property for row in report.rows if row.verdict == "holds"}
    assert held >= {
        "later tokens change no earlier bit",
        "without neighbours it is the model without retrieval",
        "neighbours are read from the end of their chunk on",
        "decoding with neighbours = the whole text",
    }


def test_a_model_that_reads_too_early_fails(model: lamina.Model, monkeypatch: pytest.MonkeyPatch):
    op = type(model.decoder.layers[1]["retrieval"].op)  # pyright: ignore
    honest = op._readers

    def early(self, found, tokens, memo):
        moved = type(tokens)(tokens.position + 1, tokens.document)
        index, queries, apart = honest(self, found, moved, memo)
        return index, queries, (apart[0], apart[1] + 1)

    monkeypatch.setattr(op, "_readers", early)
    wrong = {row.property for row in verify(model).rows if row.verdict == "fails"}
    assert "neighbours are read from the end of their chunk on" in wrong


def test_gates_at_zero_are_said(model: lamina.Model):
    layers = model.spec.decoder.layers  # pyright: ignore
    gated = tuple(
        layer.replace(steps=tuple(s.replace(gate=True) if s.name == "retrieval" else s for s in layer.steps))
        for layer in layers
    )
    new = model.spec.replace(decoder=model.spec.decoder.replace(layers=gated)).build()  # pyright: ignore
    report = verify(new.eval())
    (row,) = [row for row in report.rows if row.property == "neighbours are read from the end of their chunk on"]
    assert report.passed and row.verdict == "not tried" and "gates at zero" in row.note


def test_what_it_is_not_for(model: lamina.Model):
    with pytest.raises(UnsupportedError, match="models that retrieve"):
        prepare(model, compile=True)


def test_a_report_shows_its_own_attention(model: lamina.Model):
    with torch.inference_mode():
        shown = attention_of(model, [1, 2, 3], ["a", "b", "c"])
    assert shown is not None and all("retrieval" not in path for path in shown.weights) and len(shown.weights) == 4


def test_saved_and_loaded_in_the_native_layout_it_is_the_same(model: lamina.Model, tmp_path):
    lamina.save(model, tmp_path / "retro", format="native")
    again = lamina.load(tmp_path / "retro")
    ids, neighbours = small.ids(2, 9), found(2, 2, 8)
    expected = model(ids, neighbours=neighbours).logits
    torch.testing.assert_close(again(ids, neighbours=neighbours).logits, expected, rtol=0, atol=1e-10)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in again.state_dict().items())
