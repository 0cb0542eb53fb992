"""Operations: what each promises holds on models of four shapes, and the model that comes out works like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.adapters import LoRASpec, attach, merge
from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model
from lamina.surgery import OPERATIONS, apply, build, read_plan, said
from lamina.surgery.heads import alike
from tests import small, tiny

SHAPES = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, "bert": tiny.BERT, "t5": tiny.T5}
EXACT: dict[str, dict[str, Any]] = {
    "as many key heads as heads": {"op": "key_heads", "heads": 4},
    "heads in another order": {"op": "heads", "keep": (1, 0, 3, 2)},
    "groups in another order": {"op": "heads", "keep": (2, 3, 1, 0)},
    "experts": {"op": "experts", "experts": 3, "chosen": 2},
    "one expert": {"op": "experts", "experts": 1, "chosen": 1},
    "layers that add nothing": {"op": "new_layers", "after": [0, 1], "stack": "decoder"},
}
BOUNDED: dict[str, dict[str, Any]] = {
    "a window": {"op": "window", "back": 18},
    "a window with sinks": {"op": "window", "back": 18, "sinks": 2},
    "a window and global tokens": {"op": "window", "back": 18, "global_positions": (0,)},
}
NOT_FOR = {
    ("t5", "heads in another order"): "belongs to its heads",
    ("t5", "groups in another order"): "belongs to its heads",
    ("bert", "layers that add nothing"): "stack is decoder, and this model has none",
}


def run(model: Model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """All that a model says of some ids; an encoder-decoder writes them backwards."""
    more = {"decoder_input_ids": ids.flip(1)} if model.spec.two_stacks else {}
    with torch.no_grad():
        out = model(ids, mask, **more)
    return out.hidden if out.logits is None else out.logits


def operated(base: Model, *plan: dict[str, Any], seed: int = 0) -> tuple[Model, list[str]]:
    done = apply(read_plan(plan), base.spec, {name: p.detach() for name, p in base.named_parameters()})
    return build(done.spec, done.weights, seed=seed)


def ids_of(model: Model, rows: int = 2, length: int = 17) -> Tensor:
    return small.ids(rows, length, vocabulary=model.spec.embedding.vocabulary)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*EXACT, *BOUNDED])
def test_what_is_promised_holds_and_the_model_works(shape: str, name: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    plan = (EXACT | BOUNDED)[name]
    if (shape, name) in NOT_FOR:
        with pytest.raises(LaminaError, match=NOT_FOR[shape, name]):
            operated(base, plan)
        return
    kept = {key: tensor.detach().clone() for key, tensor in base.state_dict().items()}
    ids = ids_of(base)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    model, new = operated(base, plan)
    for given in (None, mask):
        expected, got = run(base, ids, given), run(model, ids, given)
        rows = torch.ones_like(ids, dtype=torch.bool) if given is None or base.spec.two_stacks else mask.bool()
        scale = float(expected[rows].abs().max())
        assert float((got[rows] - expected[rows]).abs().max()) <= 1e-6 * scale
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in kept.items())
    works(model, ids, tmp_path)
    assert set(new) == {key for key, _ in model.named_parameters() if ".router." in key}


VERIFIED: set[str] = set()
"""Specs of models that were verified: but for weights that are not finite, what `lamina.verify` tries is of a spec."""


def works(model: Model, ids: Tensor, folder: Path, verified: bool = True) -> None:
    """Saved and loaded, decoded with a cache, counted, found sound, trained for a step; then a LoRA beside it."""
    folder.mkdir(exist_ok=True)
    try:
        lamina.save(model, folder / "saved")
    except UnsupportedError:
        lamina.save(model, folder / "saved", "native")
    again = lamina.load(folder / "saved")
    assert again.spec.replace(initial=model.spec.initial) == model.spec and torch.equal(
        run(again, ids), run(model, ids)
    )
    if model.decoder is not None:
        more: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5}
        with_cache = lamina.generate(model, ids, **more)
        assert torch.equal(with_cache, lamina.generate(model, ids, cache=None, **more))
    counted = lamina.account(model.spec, context=16)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    said = model.spec.to_json()
    if verified and said not in VERIFIED:
        report = lamina.verify(model)
        assert report.passed, str(report)
        VERIFIED.add(said)
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    learned(model, ids, list(model.parameters()))
    assert any(not torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    takes_an_adapter(model, ids)


def learned(model: Model, ids: Tensor, parameters: list[Tensor]) -> None:
    """A step of training."""
    model.train()
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    more = {"decoder_input_ids": ids.flip(1)} if model.spec.two_stacks else {}
    out = model(ids, **more)
    (out.logits if out.logits is not None else out.hidden).float().logsumexp(-1).mean().backward()
    optimiser.step()
    optimiser.zero_grad()
    model.eval()


def takes_an_adapter(model: Model, ids: Tensor) -> None:
    """A LoRA changes no bit where it is attached, learns alone, and merged says what it said beside the weights."""
    model = copy.deepcopy(model).double()
    expected = run(model, ids)
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    factors = attach(model, LoRASpec(rank=2))
    assert factors and torch.equal(run(model, ids), expected)
    learned(model, ids, [parameter for _, parameter in factors])
    assert any(bool(parameter.any()) for name, parameter in factors if name.endswith(".lora_b"))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    beside = run(model, ids)
    merge(model)
    assert model.adapter is None and any(not torch.equal(model.state_dict()[key], one) for key, one in before.items())
    torch.testing.assert_close(run(model, ids), beside, rtol=0, atol=1e-10 * float(beside.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*EXACT, *BOUNDED])
def test_what_is_exact_can_be_undone(shape: str, name: str):
    """To the spec and to the bit, also by way of JSON."""
    if (shape, name) in NOT_FOR:
        return
    base = tiny.model(SHAPES[shape])
    state = {key: tensor.detach() for key, tensor in base.named_parameters()}
    done = apply(read_plan([(EXACT | BOUNDED)[name]]), base.spec, state)
    assert done.undo is not None
    model, _ = build(done.spec, done.weights)
    undo = read_plan([said(operation) for operation in done.undo])
    assert undo == done.undo
    back = apply(undo, model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in state.items())


def test_a_window_is_another_model_beyond_its_length():
    base = tiny.model()
    ids = ids_of(base, length=21)
    model, _ = operated(base, {"op": "window", "back": 18})
    expected, got = run(base, ids), run(model, ids)
    torch.testing.assert_close(got[:, :18], expected[:, :18], rtol=0, atol=1e-5)
    assert (got[:, 18:] - expected[:, 18:]).abs().amax(dim=-1).min() > 1e-3
    cache = model.new_cache(batch=2)
    model(ids, cache=cache)
    assert cache.bytes() < 0.95 * _cached(base, ids)


def _cached(model: Model, ids: Tensor) -> int:
    cache = model.new_cache(batch=len(ids))
    model(ids, cache=cache)
    return cache.bytes()


def test_windows_on_every_other_layer():
    base = tiny.model(tiny.GPT2 | {"n_layer": 12})
    model, _ = operated(base, {"op": "window", "back": 5, "at": ["decoder.layers.*[13579]"]})
    patterns = [type(layer.steps[0].op.pattern).__name__ for layer in model.spec.decoder.layers]
    assert patterns == ["Causal", "Both"] * 6


def test_sinks_are_seen_from_beyond_the_window():
    """One layer, so that nothing comes through by way of others: token 0 matters to the last, token 1 does not."""
    base = tiny.model(tiny.LLAMA | {"num_hidden_layers": 1})
    model, _ = operated(base, {"op": "window", "back": 3, "sinks": 1})
    ids = ids_of(base, rows=1, length=12)
    for place, matters in ((0, True), (1, False), (9, True)):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % base.spec.embedding.vocabulary
        assert torch.equal(run(model, other)[0, -1], run(model, ids)[0, -1]) != matters


@pytest.mark.parametrize("by", ["mean", "first", "similar"])
def test_fewer_key_heads_in_naive_loops(by: str):
    """Four key heads to two; those that are alike are 0 and 2, 1 and 3, which stand apart."""
    config = tiny.LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "num_hidden_layers": 1}
    base = tiny.model(config)
    attention = base.decoder.layers[0].attention.op
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (attention.k.weight, attention.v.weight):
            heads = part.view(4, 6, 32)
            heads[2:] = heads[:2] + 1e-4 * torch.randn(2, 6, 32, generator=random)
    model, _ = operated(base, {"op": "key_heads", "heads": 2, "by": by})
    new = model.decoder.layers[0].attention.op
    old = attention.k.weight.detach().view(4, 6, 32)
    pairs = {"mean": [(0, 1), (2, 3)], "first": [(0,), (2,)]}
    if by != "similar":
        expected = [sum(old[i] for i in pair) / len(pair) for pair in pairs[by]]
        torch.testing.assert_close(new.k.weight.view(2, 6, 32), torch.stack(expected), rtol=0, atol=1e-6)
        assert torch.equal(new.q.weight, attention.q.weight)
        return
    ids = ids_of(base)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=2e-2)
    worse, _ = operated(base, {"op": "key_heads", "heads": 2, "by": "mean"})
    assert (run(worse, ids) - run(base, ids)).abs().max() > 20 * (run(model, ids) - run(base, ids)).abs().max()


def test_the_pair_that_is_most_alike_comes_first():
    """From head 0 on, 0 and 1 would go together, and 1 and 2, which are most alike, apart."""
    similarity = torch.eye(4)
    for one, other, value in ((0, 1, 0.5), (1, 2, 0.9), (2, 3, 0.2), (0, 3, 0.1)):
        similarity[one, other] = similarity[other, one] = value
    assert alike(similarity, 2).tolist() == [1, 2, 0, 3]


def test_operations_are_undone_the_last_first():
    """Two orders of heads, of which the second is of what the first left."""
    base = tiny.model(tiny.GPT2)
    state = {key: tensor.detach() for key, tensor in base.named_parameters()}
    plan = [{"op": "heads", "keep": (1, 2, 3, 0)}, {"op": "heads", "keep": (1, 0, 2, 3)}]
    done = apply(read_plan(plan), base.spec, state)
    assert done.undo is not None
    back = apply(done.undo, done.spec, done.weights)
    assert back.spec == base.spec and all(torch.equal(back.weights[key], tensor) for key, tensor in state.items())


def test_pruned_heads_leave_the_others():
    """What is left is the model in which the columns of o for the other heads are zero."""
    base = tiny.model(tiny.GPT2)
    model, _ = operated(base, {"op": "heads", "keep": (3, 1), "at": ("decoder.layers.1",)})
    for layer in base.decoder.layers[1:]:
        with torch.no_grad():
            columns = layer.attention.op.o.weight.view(32, 4, 8)
            columns[:, 0], columns[:, 2] = 0, 0
    ids = ids_of(base)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-4)
    assert [layer.steps[0].op.heads for layer in model.spec.decoder.layers] == [4, 2]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([{"op": "key_head", "heads": 2}], "unknown operation 'key_head'; did you mean 'key_heads'?"),
        ([{"op": "key_heads", "head": 2}], "unknown field of key_heads 'head'; did you mean 'heads'?"),
        ([{"op": "key_heads", "heads": "two"}], 'key_heads.heads is "two"; a whole number was expected'),
        (
            [{"op": "key_heads", "heads": 3}],
            r"operation 1 \(key_heads\): heads=3 does not fit decoder.layers.0.attention",
        ),
        ([{"op": "window", "back": 4, "at": ["encoder"]}], "unknown place 'encoder'"),
        ([{"op": "dense"}], "this model has no ExpertsSpec"),
        ([{"op": "heads", "keep": [0, 2]}, {"op": "window", "back": 0}], "back=0"),
        ([{"op": "heads", "keep": [0, 2, 3]}], "must hold equally many"),
        ([], "a plan is a list of operations"),
        ([{"experts": 4}], "an operation is a mapping with op, one of key_heads"),
    ],
)
def test_a_wrong_plan_says_where_and_what(plan: list[dict[str, Any]], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(), *plan)


def test_a_plan_is_a_file(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text("- {op: key_heads, heads: 1}\n- op: window\n  back: 9\n  at: [decoder.layers.0]\n")
    found = read_plan(path)
    assert [said(one) for one in found] == [
        {"op": "key_heads", "heads": 1, "by": "mean", "text": None, "at": ["*"]},
        {"op": "window", "back": 9, "sinks": 0, "global_positions": [], "at": ["decoder.layers.0"]},
    ]
    path.write_text("- {op: window, back: 9}\n- {op: wndow, back: 9}\n")
    with pytest.raises(LaminaError, match=r"plan.yaml:2: unknown operation 'wndow'"):
        read_plan(path)
    assert {"key_heads", "heads", "window", "experts", "dense", "restore"} <= set(OPERATIONS)
    assert {"step", "memory", "retrieval", "cross_attention", "reading", "merge"} <= set(OPERATIONS)


def test_nothing_is_made_before_it_is_asked_for():
    """A plan over weights that cannot be read: the new spec and where each weight comes from are known all the same."""
    base = tiny.model()

    class Closed(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(f"{key} was read")

    state = Closed(base.named_parameters())
    done = apply(read_plan([{"op": "key_heads", "heads": 1}, {"op": "experts", "experts": 2}]), base.spec, state)
    table = {weight.name: weight for weight in done.table}
    one = table["decoder.layers.1.attention.op.k.weight"]
    assert one.sources == (one.name,) and one.how == ("mean of 2 heads",) and one.shape == (8, 32)
    up = table["decoder.layers.0.feedforward.op.experts.up.weight"]
    assert up.sources == ("decoder.layers.0.feedforward.op.up.weight",) and up.how == ("2 copies",)
    assert done.new == tuple(f"decoder.layers.{i}.feedforward.op.router.weight" for i in range(2))
    assert done.kept == "lossy" and done.undo is None
