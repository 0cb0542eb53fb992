"""Grafts: what is new changes no bit until it is trained, learns from the first step, and goes again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.text import Writing
from lamina.layers import MemoryAttentionSpec, neighbour_encoder
from lamina.model import Model
from lamina.objectives import SequenceToSequence
from lamina.pictures import text_twin
from lamina.surgery import Other, Outside, apply, build, read_plan, retrofit, said
from tests import small, tiny
from tests.surgery.test_operations import SHAPES, ids_of, operated, run, works

ADAPTER = {"kind": "FeedForwardSpec", "hidden": 5, "gated": False, "act": "gelu"}
KEYS = {"kind": "ProductKeySpec", "heads": 2, "keys": 5, "key_dim": 4, "chosen": 3}
EXPERTS = {"kind": "ExpertsSpec", "router": {"kind": "TopKSpec", "experts": 3, "chosen": 2}, "expert": {"hidden": 4}}
NEIGHBOURS = {"width": 16, "heads": 2, "head_dim": 8, "hidden": 24, "layers": 2}
DECODERS = ("gpt2", "llama")
GRAFTS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "adapters": ([{"op": "step", "name": "adapter", "part": ADAPTER}], tuple(SHAPES)),
    "two adapters": (
        [
            {"op": "step", "name": "first", "part": ADAPTER, "after": "attention"},
            {"op": "step", "name": "second", "part": ADAPTER, "after": "feedforward"},
        ],
        ("gpt2",),
    ),
    "product keys": ([{"op": "step", "name": "memory", "part": KEYS, "after": "attention"}], tuple(SHAPES)),
    "experts": ([{"op": "step", "name": "more", "part": EXPERTS}], tuple(SHAPES)),
    "Infini": ([{"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4, "gate": "zero"}}], DECODERS),
    "Infini in T5": (
        [{"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4, "gate": "zero"}, "at": ["decoder"]}],
        ("t5",),
    ),
    "retrieval": ([{"op": "retrieval", "chunk": 4, "encoder": NEIGHBOURS, "at": ["decoder"]}], DECODERS),
}
CASES = [(name, shape) for name, (_, shapes) in GRAFTS.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_it_is_the_base_bit_for_bit_works_and_goes_again(name: str, shape: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    kept = {key: tensor.detach().clone() for key, tensor in base.state_dict().items()}
    plan, ids = GRAFTS[name][0], ids_of(base)
    done = apply(read_plan(plan), base.spec, {key: one.detach() for key, one in base.named_parameters()})
    assert done.kept == "exact" and all(promise.bits for promise in done.promises) and done.undo is not None
    assert read_plan([said(one) for one in done.operations]) == done.operations
    model, new = build(done.spec, done.weights, seed=1)
    assert set(new) == {key for key, _ in model.named_parameters()} - set(kept) and new
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    for given in (None, mask):
        assert torch.equal(run(model, ids, given), run(base, ids, given))
    model.train()
    more = {"decoder_input_ids": ids.flip(1)} if base.spec.two_stacks else {}
    out = model(ids, **more)
    (out.hidden if out.logits is None else out.logits).square().sum().backward()
    gates = [one for key, one in model.named_parameters() if key in new and key.endswith(".gate")]
    learning = [one for one in gates if one.grad is not None and float(one.grad.abs().max()) > 0]
    if name != "retrieval":  # without neighbours the steps are left out
        assert gates and learning == gates
    straight = apply(done.undo, done.spec, done.weights)
    assert straight.spec == base.spec and set(straight.weights) == set(kept)
    assert all(torch.equal(straight.weights[key], tensor) for key, tensor in kept.items())
    model.zero_grad()
    with torch.no_grad():
        for gate in gates:
            gate.fill_(0.4)
    model.eval()
    if name != "retrieval":
        assert not torch.equal(run(model, ids), run(base, ids))
    works(model, ids, tmp_path)
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec and back.kept == "lossy"
    assert set(back.weights) == set(kept)


def test_an_adapter_is_the_papers_formula():
    """h + tanh(gate) (W_2 gelu(W_1 norm(h) + b_1) + b_2) after what the layer gave."""
    base = tiny.model(tiny.GPT2, scale=1.0)
    part = ADAPTER | {"bias": True}
    model, new = operated(base, {"op": "step", "name": "adapter", "part": part, "at": ["decoder.layers.1"]})
    assert all(key.startswith("decoder.layers.1.adapter.") for key in new)
    weights = {key.removeprefix("decoder.layers.1.adapter."): one.detach() for key, one in model.named_parameters()}
    with torch.no_grad():
        for key in new:
            model.get_parameter(key).normal_(generator=torch.Generator().manual_seed(len(key)))
    ids = ids_of(base)
    before, after = lamina.Record("*.output"), lamina.Record("*.output")
    with torch.no_grad():
        base(ids, record=before), model(ids, record=after)
    h = before.values["decoder.layers.1.output"]
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights["pre.weight"] + weights["pre.bias"]
    inner = F.gelu(normed @ weights["op.up.weight"].T + weights["op.up.bias"])
    change = inner @ weights["op.down.weight"].T + weights["op.down.bias"]
    expected = h + math.tanh(float(weights["gate"])) * change
    torch.testing.assert_close(after.values["decoder.layers.1.output"], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.values["decoder.layers.0.output"], before.values["decoder.layers.0.output"])


def test_a_step_after_a_norm_has_none_before_it():
    model, _ = operated(tiny.model(tiny.BERT), {"op": "step", "name": "adapter", "part": ADAPTER})
    step = model.spec.encoder.layers[0].steps[2]
    assert step.name == "adapter" and step.pre is None and step.after is None and step.gate


@pytest.mark.parametrize("shape", DECODERS)
@pytest.mark.parametrize(
    "memory",
    [
        {"kind": "RecurrenceSpec", "length": 8, "size": 8},
        {"kind": "CompressiveSpec", "length": 8, "size": 8, "count": 4, "rate": 2, "by": "mean"},
    ],
    ids=lambda memory: memory["kind"],
)
def test_a_memory_in_the_same_softmax_is_bounded_by_its_segment(shape: str, memory: dict[str, Any], tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    plan = [{"op": "memory", "memory": memory}]
    done = apply(read_plan(plan), base.spec, {key: one.detach() for key, one in base.named_parameters()})
    assert done.kept == "bounded" and "8 tokens" in done.promises[0].why
    model, _ = build(done.spec, done.weights)
    ids = ids_of(base, length=40)
    torch.testing.assert_close(run(model, ids[:, :8]), run(base, ids[:, :8]), rtol=0, atol=1e-6)
    assert float((run(model, ids) - run(base, ids))[:, 24:].abs().max()) > 1e-3
    works(model, ids_of(base), tmp_path)
    assert done.undo is not None and apply(done.undo, done.spec, done.weights).spec == base.spec


@pytest.mark.parametrize("shape", DECODERS)
def test_a_memorizing_attention_stands_beside_a_window(shape: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    memory = {"kind": "MemorizingSpec", "length": 4, "size": 16, "count": 3, "gate": "zero"}
    narrow, _ = operated(base, {"op": "window", "back": 5})
    model, new = operated(base, {"op": "window", "back": 5}, {"op": "memory", "memory": memory})
    ids = ids_of(base)
    assert torch.equal(run(model, ids), run(narrow, ids)) and len(new) == 4
    with torch.no_grad():
        for key in new:
            if key.endswith(".gate"):
                model.get_parameter(key).fill_(0.5)
    assert not torch.allclose(run(model, ids), run(narrow, ids))
    works(model, ids, tmp_path)
    with pytest.raises(LaminaError, match="leaves nothing to a MemorizingSpec; give it a window"):
        operated(base, {"op": "memory", "memory": memory})


def test_a_gate_that_begins_half_open_is_no_exact_one():
    base = tiny.model()
    plan = [{"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4}}]
    done = apply(read_plan(plan), base.spec, {key: one.detach() for key, one in base.named_parameters()})
    assert done.kept == "lossy" and "gate: zero" in done.promises[0].why
    model, _ = build(done.spec, done.weights)
    assert not torch.allclose(run(model, ids_of(base)), run(base, ids_of(base)))


def test_operations_find_the_attention_inside_a_memory():
    """Its weights are called as they were, so key heads and windows work as before."""
    base = tiny.model(scale=1.0)
    memory = {"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4, "gate": "zero"}}
    both, _ = operated(base, memory, {"op": "key_heads", "heads": 1}, {"op": "window", "back": 6})
    plain, _ = operated(base, {"op": "key_heads", "heads": 1}, {"op": "window", "back": 6})
    ids = ids_of(base)
    assert torch.equal(run(both, ids), run(plain, ids))
    op = both.spec.decoder.layers[0].steps[0].op
    assert isinstance(op, MemoryAttentionSpec) and op.attention == plain.spec.decoder.layers[0].steps[0].op


def test_retrieval_is_retrofit():
    base = tiny.model(scale=1.0)
    encoder = neighbour_encoder(32, 263, **NEIGHBOURS)
    expected, names = build(*retrofit(base.spec, dict(base.named_parameters()), layers=(1,), chunk=4, encoder=encoder))
    plan = {"op": "retrieval", "chunk": 4, "encoder": NEIGHBOURS, "at": ["decoder.layers.1"]}
    model, new = operated(base, plan)
    assert model.spec == expected.spec and new == names
    wide, fresh = operated(base, plan | {"encoder": NEIGHBOURS | {"width": 32}})
    table = wide.get_parameter("decoder.layers.1.retrieval.op.encoder.embedding.weight")
    assert torch.equal(table, base.embedding.weight) and not any(key.endswith("embedding.weight") for key in fresh)


# Cross-attention to an encoder.


def joined(base: Model, encoder: Model, **more: Any) -> tuple[Model, list[str]]:
    plan = read_plan([{"op": "cross_attention", "encoder": "somewhere", **more}])
    others = {"somewhere": Other(encoder.spec, dict(encoder.named_parameters()))}
    state = {key: one.detach() for key, one in base.named_parameters()}
    done = apply(plan, base.spec, state, Outside(others.__getitem__))
    assert done.kept == "exact" and set(done.others) == {"somewhere"}
    rows = {row.name: row for row in done.table}
    assert rows["stem.weight"].sources == ("somewhere:embedding.weight",)
    assert rows["embedding.weight"].sources == ("embedding.weight",)
    return build(done.spec, done.weights, seed=1)


def opened(model: Model, value: float) -> None:
    with torch.no_grad():
        for key, one in model.named_parameters():
            if key.endswith("cross.gate"):
                one.fill_(value)


@pytest.mark.parametrize("shape", DECODERS)
def test_a_decoder_reads_the_encoder_of_another_model(shape: str, tmp_path: Path):
    base, encoder = tiny.model(SHAPES[shape], scale=1.0), tiny.model(tiny.BERT, seed=3)
    model, new = joined(base, encoder)
    assert all(".cross." in key for key in new)
    ids, source = ids_of(base), small.ids(2, 9, vocabulary=24, seed=5)
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(model(source, decoder_input_ids=ids).logits, expected)
        assert torch.equal(model.encode(source), encoder(source).hidden)
        opened(model, 1.0)
        read = model(source, decoder_input_ids=ids).logits
        other = model((source + 1) % 24, decoder_input_ids=ids).logits
    assert not torch.allclose(read, expected) and not torch.allclose(read, other)
    assert model.spec.special.decoder_start == 256 and model.spec.source_vocabulary == 24
    works(model, source, tmp_path)
    with pytest.raises(LaminaError, match="the prompt holds id 24; ids of this model are 0 to 23"):
        lamina.generate(model, torch.tensor([[3, 24]]), max_new_tokens=1)


@pytest.mark.parametrize("shape", DECODERS)
def test_a_fresh_encoder_reads_in_both_directions(shape: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    model, new = operated(base, {"op": "cross_attention", "encoder": {"layers": 3}, "start": 7})
    assert len(model.spec.encoder.layers) == 3 and model.spec.stem is None
    own, cross = (step.op for step in model.spec.decoder.layers[1].steps[:2])
    assert (cross.heads, cross.key_heads, cross.head_dim) == (own.heads, own.key_heads, own.head_dim)
    assert any(key.startswith("encoder.layers.2.") for key in new) and model.spec.special.decoder_start == 7
    ids = ids_of(base)
    with torch.no_grad():
        assert torch.equal(model(ids.flip(1), decoder_input_ids=ids).logits, base(ids).logits)
        first = model.encode(ids)[:, 0]
        assert not torch.allclose(first, model.encode(torch.cat([ids[:, :-1], ids[:, :1]], dim=1))[:, 0])
    opened(model, 0.7)
    works(model, ids, tmp_path)


def test_joined_models_are_those_of_transformers(tmp_path: Path):
    """BERT's encoder and GPT-2 with cross-attention as transformers has them; tanh(20) is 1 in float32."""
    from transformers import BertModel, GPT2Config, GPT2LMHeadModel

    base, encoder = tiny.model(tiny.GPT2, scale=1.5), tiny.model(tiny.BERT, seed=3, scale=2.0)
    model, _ = joined(base, encoder)
    opened(model, 20.0)
    lamina.save(base, tmp_path / "gpt2")
    lamina.save(encoder, tmp_path / "bert")
    config = GPT2Config.from_pretrained(tmp_path / "gpt2", add_cross_attention=True)
    theirs = GPT2LMHeadModel(config).eval()
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").state_dict()
    state = theirs.state_dict() | plain
    for i in range(2):
        ours = {key: model.get_parameter(f"decoder.layers.{i}.cross.{key}") for key in _CROSS}
        at = f"transformer.h.{i}"
        state[f"{at}.ln_cross_attn.weight"], state[f"{at}.ln_cross_attn.bias"] = ours["pre.weight"], ours["pre.bias"]
        state[f"{at}.crossattention.q_attn.weight"] = ours["op.q.weight"].T
        state[f"{at}.crossattention.q_attn.bias"] = ours["op.q.bias"]
        state[f"{at}.crossattention.c_attn.weight"] = torch.cat([ours["op.k.weight"], ours["op.v.weight"]]).T
        state[f"{at}.crossattention.c_attn.bias"] = torch.cat([ours["op.k.bias"], ours["op.v.bias"]])
        state[f"{at}.crossattention.c_proj.weight"] = ours["op.o.weight"].T
        state[f"{at}.crossattention.c_proj.bias"] = ours["op.o.bias"]
    theirs.load_state_dict(state)
    bert = BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False).eval()
    ids, source = ids_of(base), small.ids(2, 9, vocabulary=24, seed=5)
    mask = torch.ones_like(source)
    mask[0, 6:] = 0
    with torch.no_grad():
        memory = bert(source, attention_mask=mask).last_hidden_state
        expected = theirs(ids, encoder_hidden_states=memory, encoder_attention_mask=mask).logits
        got = model(source, mask, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    written = lamina.generate(model, source, mask, max_new_tokens=6, min_new_tokens=6)
    text = torch.full((2, 1), 256)
    for _ in range(6):
        with torch.no_grad():
            out = theirs(text, encoder_hidden_states=memory, encoder_attention_mask=mask).logits[:, -1]
        out[:, 257] = -torch.inf
        text = torch.cat([text, out.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written[:, -6:], text[:, 1:])


_CROSS = ("pre.weight", "pre.bias", *(f"op.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")))


def test_weights_of_the_other_model_take_the_type_of_this_one():
    base, encoder = tiny.model(scale=1.0), tiny.model(tiny.BERT).double()
    model, _ = joined(base, encoder)
    assert {one.dtype for one in model.parameters()} == {torch.float32}


def test_edit_joins_checkpoints_and_remembers_both(tmp_path: Path):
    base, encoder = tiny.checkpoint(tmp_path / "base"), tiny.checkpoint(tmp_path / "bert", tiny.BERT)
    model, verdict = lamina.edit(lamina.load(base), [{"op": "cross_attention", "encoder": str(encoder)}])
    assert verdict.found == "exact to the bit" and verdict.divergence == 0 and len(verdict.drift) == 2
    assert verdict.before.perplexity == verdict.after.perplexity
    lamina.save(model, tmp_path / "joined", "native")
    (line,) = lamina.load(tmp_path / "joined").origin.history
    assert list(line["others_sha256"]) == [str(encoder)] and len(line["others_sha256"][str(encoder)]) == 64
    assert line["others_sha256"][str(encoder)] != line["source_sha256"]
    with pytest.raises(UnsupportedError, match="has tokens of its own"):
        Writing(model, tiny.tokenizer(), [1, 2], max_new_tokens=2)


@pytest.mark.parametrize(
    ("base", "plan", "said"),
    [
        (tiny.BERT, {"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4}}, "encoder.layers.0.attention: a m"),
        (tiny.LLAMA, {"op": "memory", "memory": {"kind": "Infini", "length": 4}}, "unknown kind of memory.memory 'In"),
        (tiny.LLAMA, {"op": "memory", "memory": {"length": 4}}, "memory.memory needs a kind: InfiniSpec, Memorizing"),
        (tiny.LLAMA, {"op": "step", "name": "keys", "part": KEYS}, "torch's modules have already"),
        (tiny.LLAMA, {"op": "step", "name": "feedforward", "part": KEYS}, "has a step 'feedforward' already"),
        (tiny.LLAMA, {"op": "step", "name": "a", "part": KEYS, "after": "attend"}, "did you mean 'attention'"),
        (tiny.LLAMA, {"op": "step", "name": "a", "part": KEYS, "at": ["decoder.layers.7"]}, "unknown place"),
        (tiny.T5, {"op": "retrieval"}, "a decoder by itself"),
        (tiny.T5, {"op": "cross_attention", "encoder": {"layers": 1}}, "a decoder by itself"),
        (tiny.LLAMA, {"op": "cross_attention", "encoder": {"layers": 0}}, "layers is 0"),
        (tiny.LLAMA, {"op": "cross_attention", "encoder": {"layers": 1}, "start": 263}, "start is 263"),
        (tiny.LLAMA, {"op": "cross_attention", "encoder": "somewhere"}, "somewhere is to be opened"),
        (tiny.BERT, {"op": "restore", "spec": tiny.spec(tiny.GPT2).to_json()}, "the spec to restore asks for decoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(base: dict[str, Any], plan: dict[str, Any], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(base), plan)


def test_a_second_memory_is_refused():
    memory = {"op": "memory", "memory": {"kind": "InfiniSpec", "length": 4, "gate": "zero"}}
    with pytest.raises(LaminaError, match="decoder.layers.0.attention has a memory already"):
        operated(tiny.model(), memory, memory)


def test_encoders_that_do_not_fit_are_refused():
    base, decoder = tiny.model(), tiny.model(tiny.GPT2)
    wide = tiny.model(tiny.BERT | {"hidden_size": 40})
    for other, why in ((decoder, "has no encoder; the operation reading"), (wide, "width 40, and this model 32")):
        with pytest.raises(LaminaError, match=why):
            joined(base, other)
    alike = tiny.model(tiny.BERT | {"vocab_size": 263})
    plan = read_plan([{"op": "cross_attention", "encoder": "x"}])
    state: dict[str, Tensor] = dict(base.named_parameters())
    others = {"x": Other(alike.spec, dict(alike.named_parameters()), same_tokens=False)}
    with pytest.raises(LaminaError, match="as many tokens, but others"):
        apply(plan, base.spec, state, Outside(others.__getitem__))


def test_a_table_of_its_own_is_for_an_encoder_beside_a_decoder():
    bert = tiny.spec(tiny.BERT)
    with pytest.raises(LaminaError, match="by itself it has `embedding`"):
        bert.replace(stem=bert.embedding)
    base = tiny.model(scale=1.0)
    other, _ = joined(base, tiny.model(tiny.BERT))
    alike, _ = joined(base, tiny.model(tiny.BERT | {"vocab_size": 263}))
    SequenceToSequence().fits(alike.spec)
    with pytest.raises(UnsupportedError, match="the encoder has 24 tokens and the decoder 263"):
        SequenceToSequence().fits(other.spec)
    counted = lamina.account(other.spec, context=16)
    assert counted.parameters == sum(one.numel() for one in other.parameters())
    assert any("stem" in line for line in text_twin(other.spec))


def test_layers_are_those_of_the_model_and_not_of_an_encoder_inside_them():
    base = tiny.model(scale=1.0)
    retrieval = GRAFTS["retrieval"][0][0]
    model, new = operated(base, retrieval, {"op": "step", "name": "adapter", "part": ADAPTER})
    added = [key for key in new if ".adapter." in key]
    assert added and all(key.startswith(("decoder.layers.0.adapter.", "decoder.layers.1.adapter.")) for key in added)
    assert model.spec.retrieval == operated(base, retrieval)[0].spec.retrieval
