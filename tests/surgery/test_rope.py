"""Rotary positions: frequencies are those of transformers for the configuration that is written, and what is promised
below the old context holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import RotarySpec, ShawSpec
from lamina.layers.rotary import table
from lamina.patterns import Causal
from lamina.surgery import apply, build, read_plan, said
from tests import small, tiny
from tests.surgery.test_operations import ids_of, operated, run, works

LONG = tuple(1.0 + 0.7 * i for i in range(4))
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "ntk": {"kind": "ntk", "factor": 4.0},
    "dynamic": {"kind": "dynamic", "factor": 4.0, "original": 64},
    "yarn": {"kind": "yarn", "factor": 4.0, "original": 64},
    "llama3": {"kind": "llama3", "factor": 4.0, "original": 64},
    "longrope": {"kind": "longrope", "factor": 4.0, "original": 64, "short": [1.0] * 4, "long": LONG, "attention": 1.0},
}


def frequencies(folder: Path, length: int) -> tuple[torch.Tensor, float]:
    """Those of transformers, for the configuration in a folder and a text of so many tokens."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        base, size = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / base ** (torch.arange(0, size, 2).float() / size), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers(kind: str, tmp_path: Path):
    base = tiny.model(scale=2.0)
    model, new = operated(base, {"op": "rope", "scaling": SCALINGS[kind], "base": 700.0})
    assert not new and model.spec.context == (64 if kind == "dynamic" else 256)
    lamina.save(model, tmp_path / "saved")
    rotary = model.spec.decoder.layers[1].steps[0].op.rotary
    ids = ids_of(base, length=70)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(run(model, ids), expected, rtol=0, atol=1e-4)
    if kind == "dynamic":
        return  # ours has no table: the frequencies come with the text, and the logits above say that they are right
    for length in (20, 70):
        wanted, scale = frequencies(tmp_path / "saved", length)
        got, factor = table(rotary, 8, kind == "longrope" and length > 64)
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=1e-6, atol=0)
        assert factor == pytest.approx(scale)


def test_ntk_is_another_base():
    """base * factor^(r / (r - 2)), r = 8 features that turn."""
    model, _ = operated(tiny.model(), {"op": "rope", "scaling": {"kind": "ntk", "factor": 3.0}})
    rotary = model.spec.decoder.layers[0].steps[0].op.rotary
    assert rotary.base == pytest.approx(10_000 * 3 ** (8 / 6)) and rotary.scaling is None
    assert model.spec.context == 192


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_up_to_the_old_context_it_is_the_old_model(kind: str):
    base = tiny.model(scale=3.0)
    plan = {"op": "rope", "scaling": SCALINGS[kind] | {"original": 20}}
    done = apply(read_plan([plan]), base.spec, dict(base.named_parameters()))
    assert done.kept == "bounded" and "20 tokens" in done.promises[0].why
    model, _ = operated(base, plan)
    ids = ids_of(base, length=20)
    assert (run(model, ids) - run(base, ids)).abs().max() <= 1e-6 * run(base, ids).abs().max()
    longer = ids_of(base, length=21)
    assert (run(model, longer) - run(base, longer)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_text_of_one_token_is_read_as_it_was(kind: str, tmp_path: Path):
    """Position 0 turns nothing; what scales the scores as well is born equal where that is 1."""
    scaling = SCALINGS[kind] | ({"attention": 1.0} if kind == "yarn" else {})
    base = tiny.model(scale=2.0)
    model, _ = operated(base, {"op": "rope", "scaling": scaling})
    ids = ids_of(base, length=1)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=1e-6, atol=1e-6)
    if kind in ("dynamic", "yarn"):
        works(model, ids_of(base), tmp_path)


def test_it_is_undone_with_all_that_a_plan_says():
    base = tiny.model()
    state = {name: one.detach() for name, one in base.named_parameters()}
    plan = read_plan([{"op": "rope", "scaling": SCALINGS[kind], "context": 100} for kind in ("yarn", "longrope")])
    assert read_plan([said(one) for one in plan]) == plan
    done = apply(plan, base.spec, state)
    assert done.spec.context == 100 and [one.kept for one in done.promises] == ["lossy", "bounded"]
    assert done.undo is not None and apply(done.undo, done.spec, done.weights).spec == base.spec
    model, _ = build(done.spec, done.weights)
    assert all(model.get_parameter(name) is not None for name in state)


def test_only_some_layers():
    base = tiny.model()
    model, _ = operated(base, {"op": "rope", "base": 500.0, "at": ["decoder.layers.1"]})
    bases = [layer.steps[0].op.rotary.base for layer in model.spec.decoder.layers]
    assert bases == [10_000.0, 500.0] and model.spec.context == 64


@pytest.mark.parametrize("config", [tiny.GPT2, tiny.BERT, tiny.BART], ids=lambda c: c["model_type"])
def test_rotary_in_place_of_learned_positions(config: dict[str, Any], tmp_path: Path):
    """Born equal where the rows of the table are equal and the text is one token; positions count in longer ones."""
    base = tiny.model(config)
    with torch.no_grad():
        for name, one in base.named_parameters():
            if name.endswith("position.weight"):
                one.zero_()
    sides = ["encoder", "decoder"] if base.spec.two_stacks else [None]
    model, new = operated(base, *({"op": "rotary", "base": 100.0, "stack": side} for side in sides))
    assert not new and not any("position" in name for name, _ in model.named_parameters())
    one, more = ids_of(base, length=1), ids_of(base, length=9)
    torch.testing.assert_close(run(model, one), run(base, one), rtol=0, atol=1e-5)
    assert (run(model, more) - run(base, more)).abs().max() > 1e-2
    works(model, ids_of(base), tmp_path)


def test_it_turns_as_in_naive_numbers():
    """GPT-2 with rotary positions, one layer: scores of turned queries and keys, written out."""
    base = tiny.model(tiny.GPT2 | {"n_layer": 1}, scale=3.0)
    model, _ = operated(base, {"op": "rotary", "base": 50.0})
    ids = ids_of(base, rows=1, length=7)
    record = lamina.Record("*.weights")
    with torch.no_grad():
        model(ids, record=record)
        op, pre = base.decoder.layers[0].attention.op, base.decoder.layers[0].attention.pre
        x = pre(base.embedding.weight[ids[0]])
        q, k = (part(x).view(7, 4, 8) for part in (op.q, op.k))
    weights = next(iter(record.values.values()))[0]  # (H, T, S)
    for head in range(4):
        for t in range(7):
            scores = []
            for s in range(t + 1):
                total = 0.0
                for i in range(4):
                    angle = (t - s) * 50.0 ** (-2 * i / 8)
                    a, b = float(q[t, head, i]), float(q[t, head, i + 4])
                    c, d = float(k[s, head, i]), float(k[s, head, i + 4])
                    total += math.cos(angle) * (a * c + b * d) - math.sin(angle) * (b * c - a * d)
                scores.append(total / math.sqrt(8))
            expected = torch.tensor(scores).softmax(0)
            torch.testing.assert_close(weights[head, t, : t + 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("known", [{"rotary": RotarySpec()}, {"relative": ShawSpec(clip=3)}])
def test_attention_that_knows_positions_already_is_left(known: dict[str, Any]):
    model = small.build(small.decoder([Causal()], "learned", **known))
    with pytest.raises(UnsupportedError, match="decoder.layers.0.attention.op: rotary positions are for"):
        operated(model, {"op": "rotary"})


@pytest.mark.parametrize(
    ("config", "plan", "said"),
    [
        (tiny.LLAMA, {"op": "rope"}, "say scaling, base or both"),
        (tiny.LLAMA, {"op": "rope", "scaling": {"factor": 2.0}}, "scaling needs a kind: linear, ntk, dynamic"),
        (tiny.LLAMA, {"op": "rope", "scaling": {"kind": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        (tiny.LLAMA, {"op": "rope", "scaling": {"kind": "linear", "factor": 0.5}}, "factor is 0.5"),
        (
            tiny.LLAMA,
            {"op": "rope", "scaling": {"kind": "llama3", "factor": 8.0}},
            "original is 8192, and this model was trained on texts of 64 tokens",
        ),
        (tiny.GPT2, {"op": "rope", "base": 5.0}, "no attention here has rotary positions"),
        (tiny.LLAMA, {"op": "rotary"}, "adds no positions to its input"),
        (tiny.T5, {"op": "rotary", "stack": "encoder"}, "adds no positions"),
        (tiny.BART, {"op": "rotary"}, "say which"),
        (tiny.GPT2 | {"n_embd": 36, "n_head": 4}, {"op": "rotary"}, "must be even"),
    ],
)
def test_what_cannot_be_done(config: dict[str, Any], plan: dict[str, Any], said: str):
    with pytest.raises((LaminaError, UnsupportedError), match=said):
        operated(tiny.model(config), plan)
