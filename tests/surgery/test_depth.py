"""Depth: layers that go, come twice or add nothing, by running the layers of the old model one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    BranchSpec,
    Call,
    LayerNormSpec,
    LayerSpec,
    ProductKeySpec,
    StepSpec,
    SumSpec,
    neighbour_encoder,
)
from lamina.model import Model
from lamina.patterns import Causal
from lamina.reading import read
from lamina.surgery import apply, build, read_plan, retrofit, said
from tests import small, tiny
from tests.families import ALBERT
from tests.surgery.test_operations import ids_of, operated, run, works

QWEN_SHARED = tiny.LLAMA | {
    "model_type": "qwen2_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 22,
    "shared_expert_intermediate_size": 26,
}
DEEP = {
    "gpt2": tiny.GPT2 | {"n_layer": 5},
    "llama": tiny.LLAMA | {"num_hidden_layers": 5},
    "bert": tiny.BERT | {"num_hidden_layers": 5},
}


def one_by_one(model: Model, order: list[int], ids: Tensor) -> Tensor:
    """The layers of a model in this order."""
    stack = model.decoder or model.encoder
    assert stack is not None
    call = Call(tokens=read(ids, None))
    with torch.no_grad():
        x = stack.begin(model.embedding(ids), call, None)
        for number in order:
            x = stack.layers[number](x, call)
        hidden = stack.end(x, call)
        return hidden if model.head is None else model.head(hidden, model.embedding.weight)


@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize(
    ("order", "numbers"),
    [
        ([0, 1, 2, 2, 3], [0, 1, 2, 2, 3]),
        (["0-3", "2-4"], [0, 1, 2, 3, 2, 3, 4]),
        ([4, 0], [4, 0]),
        (["1-3", 0, 4], [1, 2, 3, 0, 4]),
    ],
)
def test_layers_in_another_order(shape: str, order: list[int | str], numbers: list[int]):
    base = tiny.model(DEEP[shape], scale=2.0)
    ids = ids_of(base)
    model, new = operated(base, {"op": "layers", "order": order})
    assert not new
    assert torch.equal(run(model, ids), one_by_one(base, numbers, ids))
    if len(set(numbers)) == len(numbers) or shape == "bert":
        assert not torch.equal(run(model, ids), run(base, ids))


def test_copies_are_weights_of_their_own(tmp_path):
    base = tiny.model(DEEP["llama"])
    model, _ = operated(base, {"op": "layers", "order": [0, 1, 1]})
    with torch.no_grad():
        model.decoder.layers[2].attention.op.q.weight.add_(1.0)
    assert not torch.equal(model.decoder.layers[1].attention.op.q.weight, model.decoder.layers[2].attention.op.q.weight)
    assert torch.equal(model.decoder.layers[1].attention.op.q.weight, base.decoder.layers[1].attention.op.q.weight)
    works(model, ids_of(model), tmp_path)


def test_what_no_layer_was_lost_from_can_be_undone():
    base = tiny.model(DEEP["gpt2"])
    state = {name: one.detach() for name, one in base.named_parameters()}
    done = apply(read_plan([{"op": "layers", "order": [2, "0-3", 4, 2]}]), base.spec, state)
    assert done.undo is not None and done.kept == "lossy"
    back = apply(done.undo, done.spec, done.weights)
    assert back.spec == base.spec and all(torch.equal(back.weights[name], one) for name, one in state.items())
    assert apply(read_plan([{"op": "layers", "order": [0, 1]}]), base.spec, state).undo is None


def test_a_new_layer_learns():
    """It adds nothing before a step of training, and something after; the old layers can be frozen."""
    base = tiny.model(DEEP["llama"])
    ids = ids_of(base)
    for begin in ("zero", "gate"):
        model, new = operated(base, {"op": "new_layers", "after": [1, 3], "begin": begin})
        assert len(model.decoder.layers) == 7 and torch.equal(run(model, ids), run(base, ids))
        assert set(new) == (
            {f"decoder.layers.{i}.{step}.gate" for i in (2, 5) for step in ("attention", "feedforward")}
            if begin == "gate"
            else set()
        )
        for layer, (number, parameter) in [
            (i, item) for i in (2, 5) for item in model.decoder.layers[i].named_parameters()
        ]:
            if not number.endswith("gate"):
                old = dict(base.decoder.layers[{2: 1, 5: 3}[layer]].named_parameters())[number]
                zero = begin == "zero" and (".o." in number or ".down." in number)
                assert torch.equal(parameter, torch.zeros_like(old) if zero else old)
        learning = [one for i in (2, 5) for one in model.decoder.layers[i].parameters()]
        model(ids).logits.logsumexp(-1).mean().backward()
        torch.optim.SGD(learning, lr=0.5).step()
        assert not torch.equal(run(model, ids), run(base, ids))


def test_layers_stay_what_they_are_at_another_place():
    """Windows go with their layers, and the cache of each is the one that its pattern asks for."""
    base = small.build(small.decoder(small.MIXED))
    ids = small.ids(2, 15)
    model, _ = operated(base, {"op": "layers", "order": [1, 0, 2, 1]})
    assert torch.equal(run(model, ids), one_by_one(base, [1, 0, 2, 1], ids))
    kinds = [type(one).__name__ for one in model.new_cache().ledgers.values()]
    assert len(kinds) == len({id(one) for one in model.new_cache().ledgers.values()})
    cache = model.new_cache(batch=2)
    parts = [model(ids[:, at : at + 5], cache=cache).logits for at in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(parts, dim=1).detach(), run(model, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_bias_of_a_stack_of_t5_stays_with_the_stack(stack: str, tmp_path):
    """In files of T5 layer 0 has it; here the stack does, so that layer 0 may go."""
    base = tiny.model(tiny.T5 | {"num_layers": 3}, scale=1.0)
    model, _ = operated(base, {"op": "layers", "order": [2, 0], "stack": stack})
    assert torch.equal(getattr(model, stack).score_bias.weight, getattr(base, stack).score_bias.weight)
    works(model, ids_of(model), tmp_path)


def test_neighbours_are_encoded_in_the_first_layer_that_reads_them():
    base = tiny.model(DEEP["gpt2"])
    encoder = neighbour_encoder(32, 263, width=16, heads=2, head_dim=8, hidden=24, layers=1)
    state = dict(base.named_parameters())
    fitted, _ = build(*retrofit(base.spec, state, layers=(1, 3), chunk=4, encoder=encoder))
    small.shake(fitted)
    ids = ids_of(base)
    found = torch.randint(263, (2, 4, 2, 8), generator=torch.Generator().manual_seed(2))
    kept = {name: one.detach() for name, one in fitted.named_parameters()}
    plan = read_plan([{"op": "layers", "order": [0, 2, 3, 1, 3]}])
    done = apply(plan, fitted.spec, kept)
    model, new = build(done.spec, done.weights)
    assert not new and done.spec.decoder is not None
    made = [layer.steps[1].op.encoder is not None for layer in done.spec.decoder.layers if len(layer.steps) == 3]  # pyright: ignore
    assert made == [True, False, False]
    moved = model.decoder.layers[2].retrieval.op.encoder.embedding.weight
    assert torch.equal(moved, fitted.decoder.layers[1].retrieval.op.encoder.embedding.weight)
    whole = model(ids, neighbours=found).logits
    assert not torch.equal(whole, model(ids).logits)
    without, _ = operated(fitted, {"op": "layers", "order": [0, 2, 4]})
    assert without.spec.retrieval is None and torch.equal(run(without, ids), one_by_one(fitted, [0, 2, 4], ids))
    same, _ = operated(fitted, {"op": "layers", "order": ["0-4"]})
    assert torch.equal(same(ids, neighbours=found).logits, fitted(ids, neighbours=found).logits)
    grown, _ = operated(fitted, {"op": "new_layers", "after": [1, 2]})
    assert torch.equal(grown(ids, neighbours=found).logits, fitted(ids, neighbours=found).logits)


def test_a_table_that_layers_share_stays_one():
    base = small.build(small.decoder(small.MIXED))
    keys = ProductKeySpec(heads=2, keys=4, key_dim=6, chosen=3, table="shared")
    layers = [
        layer.replace(steps=(layer.steps[0], layer.steps[1].replace(op=keys))) if i != 1 else layer
        for i, layer in enumerate(base.spec.decoder.layers)
    ]
    model = small.build(base.spec.replace(decoder=base.spec.decoder.replace(layers=tuple(layers))))
    ids = small.ids(2, 9)
    more, _ = operated(model, {"op": "layers", "order": [0, 1, 2, 2]})
    assert [name for name, _ in more.named_parameters() if ".tables." in name] == ["decoder.tables.shared.weight"]
    assert torch.equal(run(more, ids), one_by_one(model, [0, 1, 2, 2], ids))
    none, _ = operated(model, {"op": "layers", "order": [1]})
    assert torch.equal(run(none, ids), one_by_one(model, [1], ids))
    with pytest.raises(UnsupportedError, match="layers.0.feedforward has no output projection"):
        operated(model, {"op": "new_layers", "after": [0]})
    gated, _ = operated(model, {"op": "new_layers", "after": [0], "begin": "gate"})
    assert torch.equal(run(gated, ids), run(model, ids))


def test_a_branch_without_an_output_projection_cannot_begin_at_zero():
    spec = tiny.spec(tiny.GPT2)
    keys = ProductKeySpec(heads=2, keys=4, key_dim=6, chosen=3)
    branches = tuple(
        BranchSpec(name=step.name, op=keys if step.name == "feedforward" else step.op)
        for step in spec.decoder.layers[0].steps
    )
    step = StepSpec(name="parallel", op=SumSpec(branches=branches), pre=LayerNormSpec())
    model = small.build(spec.replace(decoder=spec.decoder.replace(layers=(LayerSpec(steps=(step,)),))))
    with pytest.raises(UnsupportedError, match="decoder.layers.0.parallel has no output projection"):
        operated(model, {"op": "new_layers", "after": [0]})


def test_parallel_layers_and_experts_begin_at_zero_too():
    for config in (
        {
            "model_type": "gptj",
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 4,
            "n_positions": 64,
        },
        tiny.LLAMA
        | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
        QWEN_SHARED,
    ):
        base = tiny.model(config)
        model, _ = operated(base, {"op": "new_layers", "after": [0, 1]})
        assert torch.equal(run(model, ids_of(base)), run(base, ids_of(base)))


@pytest.mark.parametrize("begin", ["zero", "gate"])
@pytest.mark.parametrize("config", [tiny.BERT, tiny.BART], ids=["bert", "bart"])
def test_after_post_norm_layers_a_new_one_has_no_norm(config: dict[str, Any], begin: str, tmp_path: Path):
    """Equal to the bit; with the norm of its own after each step, it is another model even if the step adds nothing."""
    base = tiny.model(config, scale=1.0)
    small.shake(base)
    ids = ids_of(base)
    plan = {"op": "new_layers", "after": [1], "begin": begin, "stack": "encoder"}
    state = {name: one.detach() for name, one in base.named_parameters()}
    done = apply(read_plan([plan]), base.spec, state)
    model, new = build(done.spec, done.weights)
    assert torch.equal(run(model, ids), run(base, ids)) and done.promises[0].bits and len(new) == 2 * (begin == "gate")
    new_layer, old = done.spec.encoder.layers[2], done.spec.encoder.layers[1]
    assert all(step.after is None for step in new_layer.steps) and all(step.after is not None for step in old.steps)
    layers = (*done.spec.encoder.layers[:2], base.spec.encoder.layers[1])
    normed = done.spec.replace(encoder=done.spec.encoder.replace(layers=layers))
    kept = {name: done.weights[name] for name in done.weights if not name.endswith("gate")}
    kept |= {
        name.replace("layers.1.", "layers.2."): one
        for name, one in state.items()
        if name.startswith("encoder.layers.1.") and ".after." in name
    }
    if begin == "zero":
        assert not torch.allclose(run(build(normed, kept)[0], ids), run(base, ids), atol=1e-3)
    assert done.undo is not None
    back = apply(done.undo, done.spec, done.weights)
    assert back.spec == base.spec and all(torch.equal(back.weights[name], one) for name, one in state.items())
    learning = [one for name, one in model.named_parameters() if name.startswith("encoder.layers.2.")]
    before = run(model, ids)
    model(ids, **({"decoder_input_ids": ids} if model.spec.two_stacks else {})).logits.logsumexp(-1).mean().backward()
    torch.optim.SGD(learning, lr=0.5).step()
    assert not torch.equal(run(model, ids), before)
    works(model, ids, tmp_path, verified=begin == "gate" and config is tiny.BERT)


def test_what_passes_multiplied_is_refused():
    base = small.build(small.decoder([Causal()]))
    layer = base.spec.decoder.layers[0]
    layer = layer.replace(steps=(layer.steps[0].replace(residual=0.5), layer.steps[1]))
    model = small.build(base.spec.replace(decoder=base.spec.decoder.replace(layers=(layer,))))
    with pytest.raises(UnsupportedError, match="layers.0.attention multiplies what passes by 0.5"):
        operated(model, {"op": "new_layers", "after": [0]})


@pytest.mark.parametrize(
    ("config", "plan", "why"),
    [
        (tiny.LLAMA, {"op": "layers", "order": [0, 2]}, "order has 2; a layer from 0 to 1"),
        (tiny.LLAMA, {"op": "layers", "order": ["1-0"]}, "order has '1-0'"),
        (tiny.LLAMA, {"op": "layers", "order": []}, "order is empty"),
        (tiny.LLAMA, {"op": "layers", "order": [0], "stack": "encoder"}, "stack is encoder, and this model has none"),
        (tiny.T5, {"op": "layers", "order": [0]}, "an encoder and a decoder; say which"),
        (tiny.LLAMA, {"op": "new_layers", "after": [0, "0-1"]}, "names a layer twice"),
    ],
)
def test_what_cannot_be_done(config: dict[str, Any], plan: dict[str, Any], why: str):
    with pytest.raises(LaminaError, match=why):
        operated(tiny.model(config), plan)


def test_a_layer_that_repeats_repeats_wherever_it_is():
    """ALBERT: each layer runs so many times in a row."""
    config = ALBERT | {"model_type": "albert", "num_hidden_groups": 1, "architectures": ["AlbertModel"]}
    base = tiny.model(config, scale=2.0)
    assert base.spec.encoder.repeat == 4
    ids = ids_of(base)
    assert torch.equal(run(base, ids), one_by_one(base, [0] * 4, ids))
    model, _ = operated(base, {"op": "layers", "order": [0, 0]})
    assert torch.equal(run(model, ids), one_by_one(base, [0] * 8, ids))


def test_a_plan_has_ranges(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("- {op: layers, order: [0-1, 1]}\n")
    assert said(read_plan(path)[0]) == {"op": "layers", "order": ["0-1", 1], "stack": None}
    assert read_plan([said(read_plan(path)[0])]) == read_plan(path)
    path.write_text("- {op: layers, order: [0.5]}\n")
    with pytest.raises(LaminaError, match=r"plan.yaml:1: layers.order.0 is 0.5; a whole number or text"):
        read_plan(path)


def test_it_is_counted():
    base = tiny.model(DEEP["gpt2"])
    model, _ = operated(base, {"op": "layers", "order": ["0-3", "1-4"]})
    before, after = (lamina.account(one.spec, context=16) for one in (base, model))
    assert after.cache_bytes * 5 == before.cache_bytes * 8
