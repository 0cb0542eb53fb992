"""Experts of a dense network: whole copies, slices of them, a shared part, and routers of all published kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import LaminaError
from lamina.layers import Call, CapacitySpec
from lamina.model import Model
from lamina.surgery import apply, build, read_plan, said
from lamina.tokens import plain
from tests import tiny
from tests.surgery.test_operations import SHAPES, ids_of, operated, run, works

EXACT: dict[str, dict[str, Any]] = {
    "slices": {"experts": 3, "chosen": 2, "slices": 4},
    "slices of one copy": {"experts": 1, "chosen": 1, "slices": 2},
    "slices and a shared one": {"experts": 3, "chosen": 1, "slices": 4, "shared": 1},
    "all but one in common": {"experts": 2, "chosen": 1, "slices": 4, "shared": 3},
    "places": {"experts": 3, "capacity": {"training": 1.5}, "losses": {"balance": 0.01}},
}


def biased(config: dict[str, Any]) -> Model:
    """A tiny model whose biases matter."""
    model = tiny.model(config, scale=1.0)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_it_begins_equal_and_leads_back(shape: str, name: str, tmp_path: Path):
    base = biased(SHAPES[shape])
    ids = ids_of(base)
    plan = {"op": "experts", **EXACT[name]}
    model, _ = operated(base, plan)
    expected = run(base, ids)
    assert float((run(model, ids) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    state = {key: p.detach() for key, p in base.named_parameters()}
    done = apply(read_plan([plan]), base.spec, state)
    assert done.kept == "exact" and done.undo is not None
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec and set(back.weights) == set(state)
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in state.items())
    if "shared" in name:
        works(model, ids, tmp_path)


def test_slices_in_naive_loops():
    """Each expert has its part of the hidden units, the shared network the first; the router has equal rows a copy."""
    base = tiny.model(tiny.GPT2)
    plan = {"op": "experts", "experts": 2, "chosen": 1, "slices": 4, "shared": 1}
    model, new = operated(base, plan)
    old, op = base.decoder.layers[1].feedforward.op, model.decoder.layers[1].feedforward.op
    part = old.spec.hidden // 4
    assert not new and op.router.weight.shape[0] == 6 and op.spec.router.chosen == 3 and op.spec.router.scale == 3.0
    assert torch.equal(op.shared.up.weight, old.up.weight[:part])
    for expert in range(6):
        units = slice((1 + expert % 3) * part, (2 + expert % 3) * part)
        assert torch.equal(op.experts.up.weight[expert], old.up.weight[units])
        assert torch.equal(op.experts.down.weight[expert], old.down.weight[:, units])
        assert torch.equal(op.router.weight[expert], op.router.weight[expert // 3 * 3])
    assert not torch.equal(op.router.weight[0], op.router.weight[3])
    assert float(op.router.weight.detach().std()) == pytest.approx(base.spec.initial.std, rel=0.4)
    other = model.decoder.layers[0].feedforward.op.router.weight
    assert not torch.equal(op.router.weight, other)


def test_the_mean_of_sliced_copies():
    base = tiny.model()
    plan = {"op": "experts", "experts": 3, "slices": 2, "noise": 0.5}
    experts, _ = operated(base, plan)
    model, _ = operated(base, plan, {"op": "dense", "slices": 2})
    down = experts.decoder.layers[1].feedforward.op.experts.down.weight.detach()  # (6, width, hidden / 2)
    expected = torch.cat([down[[0, 2, 4]].mean(0), down[[1, 3, 5]].mean(0)], dim=1)
    torch.testing.assert_close(model.decoder.layers[1].feedforward.op.down.weight.detach(), expected)


def test_noise_sets_experts_apart():
    base = tiny.model()
    model, _ = operated(base, {"op": "experts", "experts": 3, "noise": 0.1, "seed": 4})
    again, _ = operated(base, {"op": "experts", "experts": 3, "noise": 0.1, "seed": 4})
    weight = model.decoder.layers[0].feedforward.op.experts.up.weight.detach()
    old = base.decoder.layers[0].feedforward.op.up.weight.detach()
    assert torch.equal(weight, again.decoder.layers[0].feedforward.op.experts.up.weight)
    for one in weight:
        assert float((one - old).std()) == pytest.approx(0.1 * float(old.std()), rel=0.1)
    assert not torch.equal(weight[0], weight[1])
    later = model.decoder.layers[1].feedforward.op.experts.up.weight.detach()
    other = base.decoder.layers[1].feedforward.op.up.weight.detach()
    drawn = [(made[0] - was) / was.std() for made, was in ((weight, old), (later, other))]
    assert float((drawn[0] - drawn[1]).abs().max()) > 0.1  # each weight has its own


def test_the_mean_of_experts():
    base = tiny.model()
    model, _ = operated(base, {"op": "experts", "experts": 3, "noise": 0.5}, {"op": "dense"})
    experts, _ = operated(base, {"op": "experts", "experts": 3, "noise": 0.5})
    expected = sum(experts.decoder.layers[1].feedforward.op.experts.down.weight) / 3
    torch.testing.assert_close(model.decoder.layers[1].feedforward.op.down.weight, expected)


def test_a_part_is_drawn_anew():
    """Of 48 units 24, the same in gate, up and down of an expert, others in another; the rest is as it was."""
    base = tiny.model()
    model, _ = operated(base, {"op": "experts", "experts": 3, "redrawn": 0.5})
    old, op = (one.requires_grad_(False).decoder.layers[0].feedforward.op for one in (base, model))
    changed = [(op.experts.up.weight[e] != old.up.weight).any(1) for e in range(3)]
    for expert in range(3):
        assert int(changed[expert].sum()) == 24
        assert torch.equal((op.experts.gate.weight[expert] != old.gate.weight).any(1), changed[expert])
        assert torch.equal((op.experts.down.weight[expert] != old.down.weight).any(0), changed[expert])
        for now, was in (
            (op.experts.up.weight[expert][changed[expert]], old.up.weight[changed[expert]]),
            (op.experts.down.weight[expert][:, changed[expert]], old.down.weight[:, changed[expert]]),
        ):
            assert float(now.std()) == pytest.approx(float(was.std()), rel=0.15)
            assert abs(float(now.mean() - was.mean())) < 0.15 * float(was.std())
    assert not torch.equal(changed[0], changed[1])
    again, _ = operated(base, {"op": "experts", "experts": 3, "redrawn": 0.5, "seed": 1})
    assert not torch.equal(again.decoder.layers[0].feedforward.op.experts.up.weight, op.experts.up.weight)


def test_the_mean_that_is_drawn_from_is_that_of_what_goes():
    """Units of two kinds: what is drawn anew has the mean of those that it takes the place of."""
    base = tiny.model(tiny.GPT2)
    with torch.no_grad():
        base.decoder.layers[0].feedforward.op.up.weight.normal_(5.0, 0.1)
    model, _ = operated(base, {"op": "experts", "experts": 2, "redrawn": 0.25})
    assert float(model.decoder.layers[0].feedforward.op.experts.up.weight.detach().min()) > 4


def test_switch_and_its_places():
    """One expert a token, weighed by its probability, with places: the spec of a Switch, and the promise says lossy."""
    base = tiny.model()
    plan = {"op": "experts", "experts": 4, "chosen": 1, "normalise": False, "capacity": {"training": 1.25}}
    state = {key: p.detach() for key, p in base.named_parameters()}
    done = apply(read_plan([plan]), base.spec, state)
    model, _ = build(done.spec, done.weights)
    op = model.decoder.layers[0].feedforward.op
    assert done.promises[0].why == "gates do not sum to 1" and done.undo is None
    assert op.spec.capacity == CapacitySpec(training=1.25) and not op.spec.router.normalise
    x = torch.randn(1, 5, 32)
    call = Call(tokens=plain(1, 5))
    gate = (x @ op.router.weight.T).softmax(-1).amax(-1, keepdim=True)
    expected = gate * base.decoder.layers[0].feedforward.op(x, call)
    torch.testing.assert_close(op(x, call), expected, rtol=1e-4, atol=1e-5)
    evaluated = apply(read_plan([plan | {"normalise": True, "capacity": {"evaluation": 1.0}}]), base.spec, state)
    assert evaluated.kept == "lossy"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([{"op": "experts", "experts": 2, "slices": 5}], "has 48 hidden units, no multiple of 5"),
        ([{"op": "experts", "experts": 2, "slices": 2, "shared": 2}], "shared=2 must be from 0 to below slices=2"),
        ([{"op": "experts", "experts": 2, "redrawn": 1.5}], "redrawn=1.5 within 0 and 1"),
        ([{"op": "experts", "experts": 2, "slices": 4, "shared": 1}, {"op": "dense"}], "has a shared network beside"),
        ([{"op": "experts", "experts": 3}, {"op": "dense", "slices": 2}], "slices=2 do not fit the 3 experts"),
        ([{"op": "experts", "experts": 2, "slices": 2}, {"op": "dense", "expert": 2, "slices": 2}], "from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(plan: list[dict[str, Any]], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(), *plan)
