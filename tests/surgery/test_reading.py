"""Reading the other way: what transformers gives with that mask, window by window, and back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError
from lamina.layers import AlibiSpec
from lamina.patterns import BlockWindow, Causal, Everything, Global, Prefix, Sinks, Strided, Window
from lamina.surgery import apply, build, read_plan, said
from lamina.surgery.reading import both_ways, causal
from tests import tiny
from tests.surgery.test_operations import ids_of, operated, run, works

BOTH, ONE = {"op": "reading", "to": "bidirectional"}, {"op": "reading", "to": "causal"}
CASES = {
    "gpt2": (tiny.GPT2, BOTH),
    "llama": (tiny.LLAMA, BOTH),
    "mistral": (tiny.MISTRAL, BOTH),
    "bert": (tiny.BERT, ONE),
}


@pytest.mark.parametrize("name", CASES)
def test_it_works_is_lossy_but_for_one_token_and_leads_back(name: str, tmp_path: Path):
    config, plan = CASES[name]
    base = tiny.model(config, scale=1.5)
    state = {key: one.detach().clone() for key, one in base.named_parameters()}
    done = apply(read_plan([plan]), base.spec, state)
    assert done.kept == "lossy" and done.new == () and done.undo is not None
    model, _ = build(done.spec, done.weights)
    ids = ids_of(base)
    torch.testing.assert_close(run(model, ids[:, :1]), run(base, ids[:, :1]), rtol=0, atol=1e-6)
    assert (run(model, ids) - run(base, ids)).abs().amax(dim=-1)[:, :-1].min() > 1e-4
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec and all(torch.equal(back.weights[key], one) for key, one in state.items())
    assert {row.how for row in done.table} == {()}  # renamed alone
    works(model, ids, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_both_ways_as_transformers_with_that_mask(name: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = tiny.model(CASES[name][0], scale=2.0)
    lamina.save(base, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    model, _ = operated(base, BOTH)
    ids = ids_of(base)
    place = torch.arange(ids.shape[1])
    near = (place[:, None] - place).abs() < (5 if name == "mistral" else 99)
    for first in (0, 4):  # padding on the left of one row
        mask = torch.ones_like(ids)
        mask[1, :first] = 0
        seen = near & mask[:, None, None].bool()
        full = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = theirs(ids, attention_mask=full, position_ids=positions, use_cache=False).logits
        real = mask.bool()
        torch.testing.assert_close(run(model, ids, mask)[real], expected[real], rtol=1e-4, atol=1e-4)


def test_one_way_as_transformers_bert_decoder(tmp_path: Path):
    from transformers import BertConfig, BertLMHeadModel

    base = tiny.model(tiny.BERT, scale=2.0)
    lamina.save(base, tmp_path / "base")
    config = BertConfig.from_pretrained(tmp_path / "base", is_decoder=True)
    theirs = BertLMHeadModel.from_pretrained(tmp_path / "base", config=config).eval()
    model, _ = operated(base, ONE)
    ids = ids_of(base)
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(run(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_patterns_ahead_and_back():
    window = Causal() & Window(back=4)
    for pattern, wide in (
        (Causal(), Everything()),
        (window, Window(back=4, ahead=3)),
        (Causal() & (Window(back=4) | Sinks(count=2)), Window(back=4, ahead=3) | Sinks(count=2)),
        (Causal() & BlockWindow(size=4, back=1), BlockWindow(size=4, back=1, ahead=1)),
        (Causal() & Window(back=2, dilation=3), Window(back=2, ahead=1, dilation=3)),
    ):
        assert both_ways(pattern) == wide and both_ways(wide) == wide
        assert not causal(wide).looks_ahead() and causal(pattern) == pattern
    assert causal(Everything()) == Causal() and causal(Window(back=4, ahead=3)) == window
    assert causal(Window(back=4, ahead=3) | Global(positions=(0,))) == Causal() & (
        Window(back=4, ahead=3) | Global(positions=(0,))
    )
    for none in (Causal() & Strided(stride=3), Causal() | Prefix(length=3)):
        with pytest.raises(LaminaError, match="has no counterpart ahead"):
            both_ways(none)


def test_the_head_may_go():
    base = tiny.model(scale=1.0)
    state = {key: one.detach() for key, one in base.named_parameters()}
    done = apply(read_plan([BOTH | {"head": "drop"}]), base.spec, state)
    model, _ = build(done.spec, done.weights)
    whole, _ = operated(base, BOTH)
    ids = ids_of(base)
    with torch.no_grad():
        assert torch.equal(model(ids).hidden, whole(ids).hidden)
    assert model.head is None and "head.weight" not in done.weights and done.undo is None


def test_a_verdict_on_a_model_that_reads_and_no_longer_writes():
    base = tiny.model(scale=1.0)
    _, verdict = lamina.edit(base, [BOTH], texts=[list(range(20))])
    assert verdict.found == "changed" and verdict.before.perplexity is not None and verdict.after.perplexity is None
    assert verdict.after.cache_bytes is None and verdict.divergence is not None
    _, verdict = lamina.edit(tiny.model(tiny.BERT), [ONE], texts=[list(range(20))])
    assert verdict.before.perplexity is None and verdict.after.perplexity is not None and verdict.after.cache_bytes


@pytest.mark.parametrize(
    ("config", "plan", "said"),
    [
        (tiny.LLAMA, [ONE], "reading causal is for encoders by themselves"),
        (tiny.BERT, [BOTH], "reading bidirectional is for decoders by themselves"),
        (tiny.T5, [BOTH], "for decoders by themselves"),
        (tiny.LLAMA, [BOTH | {"to": "backwards"}], "'causal' or 'bidirectional' was expected"),
        (
            tiny.LLAMA,
            [{"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4}}, BOTH],
            r"MemoryAttentionSpec \(layers.0.steps.0.op\) read as they do",
        ),
        (tiny.BART | {"architectures": ["BartModel"]}, [BOTH], "for decoders by themselves"),
        (tiny.LLAMA, [BOTH | {"head": "drop"}, ONE | {"head": "drop"}], "this model has no language head"),
    ],
)
def test_what_cannot_be_read_the_other_way_is_said(config: dict[str, Any], plan: list[dict[str, Any]], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(config), *plan)


def test_a_bias_by_the_place_of_the_key_alone_is_refused():
    spec = tiny.spec(tiny.LLAMA)
    rounded = spec.replace(decoder=spec.decoder.replace(score_bias=AlibiSpec(heads=4, rounded=True)))
    with pytest.raises(LaminaError, match="would favour late ones"):
        apply(read_plan([BOTH]), rounded, {})
