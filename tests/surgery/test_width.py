"""Feed-forward networks with more units, fewer, and gates: equal where it is promised, and what is best is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import FeedForwardSpec
from lamina.surgery import apply, read_plan, said
from lamina.surgery.calibration import random_texts
from tests import tiny
from tests.surgery.test_operations import SHAPES, ids_of, operated, run, works
from tests.surgery.test_upcycle import biased

EXACT: dict[str, dict[str, Any]] = {
    "units that give nothing": {"op": "widen", "hidden": 150},
    "units split in two": {"op": "widen", "hidden": 140, "by": "split"},
    "units split in many": {"op": "widen", "hidden": 131, "by": "split"},
    "gated": {"op": "gated"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_it_begins_equal_and_leads_back(shape: str, name: str, tmp_path: Path):
    base = biased(SHAPES[shape])
    ids, plan = ids_of(base), EXACT[name]
    state = {key: p.detach() for key, p in base.named_parameters()}
    if shape == "llama" and name == "gated":
        with pytest.raises(LaminaError, match="has a gate already"):
            operated(base, plan)
        return
    model, new = operated(base, plan)
    expected, got = run(base, ids), run(model, ids)
    assert not new and float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert name != "gated" or torch.equal(got, expected)
    done = apply(read_plan([plan]), base.spec, state)
    assert done.kept == "exact" and done.undo is not None
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec and set(back.weights) == set(state)
    for key, tensor in state.items():  # thirds of what went out add up but for rounding
        torch.testing.assert_close(back.weights[key], tensor, rtol=1e-6 if "split" in name else 0, atol=0)
    if name in ("gated", "units split in two"):
        works(model, ids, tmp_path)


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ("gpt2", [{"op": "prune", "hidden": 45}]),
        ("t5", [{"op": "prune", "hidden": 45, "by": "energy"}]),
        ("llama", [{"op": "plain"}]),
        ("bert", [{"op": "gated"}, {"op": "widen", "hidden": 150}, {"op": "plain", "bias": False}]),
        ("llama", [{"op": "experts", "experts": 3, "noise": 0.1}, {"op": "dense"}]),
        ("gpt2", [{"op": "experts", "experts": 4, "slices": 2, "noise": 0.1}, {"op": "dense", "slices": 2}]),
    ],
)
def test_what_is_lossy_works_too(shape: str, plan: list[dict[str, Any]], tmp_path: Path):
    base = biased(SHAPES[shape])
    ids = ids_of(base)
    model, new = operated(base, *plan)
    assert not new and not torch.equal(run(model, ids), run(base, ids))
    works(model, ids, tmp_path)


def networks(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "spec", None), FeedForwardSpec)]


@pytest.mark.parametrize("by", ["norm", "energy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_units_that_do_nothing_go_first(shape: str, by: str):
    """Every third unit gives nothing, by what goes in or by what goes out: without them it is the same model."""
    base = biased(SHAPES[shape])
    for network in networks(base):
        with torch.no_grad():
            network.down.weight[:, ::6] = 0
            network.up.weight[3::6] = 0
            if network.up.bias is not None:
                network.up.bias[3::6] = 0
    hidden = networks(base)[0].spec.hidden
    left = hidden - len(range(0, hidden, 6)) - len(range(3, hidden, 6))
    ids = ids_of(base)
    model, _ = operated(base, {"op": "prune", "hidden": left, "by": by})
    expected = run(base, ids)
    assert float((run(model, ids) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    units = [one for one in range(hidden) if one % 3]
    for old, now in zip(networks(base), networks(model), strict=True):
        assert torch.equal(now.up.weight, old.up.weight[units]) and torch.equal(
            now.down.weight, old.down.weight[:, units]
        )


def test_the_energy_is_that_of_what_goes_out():
    """Unit by unit in a naive loop over the text; another choice than by the norm."""
    base = tiny.model(tiny.GPT2).requires_grad_(False)
    seen: list[torch.Tensor] = []
    network = base.decoder.layers[1].feedforward.op
    network.down.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for text in random_texts(base.spec)(None):
        base(torch.tensor([text]))
    rows = torch.cat(seen)
    score = [float((rows[:, unit, None] * network.down.weight[:, unit]).square().sum()) for unit in range(128)]
    best = sorted(sorted(range(128), key=lambda unit: -score[unit])[:40])
    found = {}
    for by in ("energy", "norm"):
        model, _ = operated(base, {"op": "prune", "hidden": 40, "by": by})
        found[by] = model.decoder.layers[1].feedforward.op.up.weight
    assert torch.equal(found["energy"], network.up.weight[best])
    size = [float(network.up.weight[unit].norm() * network.down.weight[:, unit].norm()) for unit in range(128)]
    best = sorted(sorted(range(128), key=lambda unit: -size[unit])[:40])
    assert torch.equal(found["norm"], network.up.weight[best])
    assert not torch.equal(found["energy"], found["norm"])


def test_new_units_are_like_the_old_ones_and_noise_sets_copies_apart():
    base = tiny.model().requires_grad_(False)
    old = base.decoder.layers[0].feedforward.op
    model, _ = operated(base, {"op": "widen", "hidden": 90})
    new = model.decoder.layers[0].feedforward.op
    assert torch.equal(new.up.weight[:48], old.up.weight) and not new.down.weight[:, 48:].any()
    for part in ("up", "gate"):
        drawn, was = getattr(new, part).weight[48:], getattr(old, part).weight
        assert float(drawn.detach().std()) == pytest.approx(float(was.std()), rel=0.1)
    assert not torch.equal(new.up.weight[48:], new.gate.weight[48:])
    model, _ = operated(base, {"op": "widen", "hidden": 96, "by": "split", "noise": 0.1})
    drawn = model.decoder.layers[0].feedforward.op.up.weight.detach()
    assert torch.equal(drawn[:48], old.up.weight)
    assert float((drawn[48:] - old.up.weight).std()) == pytest.approx(0.1 * float(old.up.weight.std()), rel=0.1)


def test_the_gate_alone():
    base = tiny.model().requires_grad_(False)
    model, _ = operated(base, {"op": "plain"})
    old, new = base.decoder.layers[1].feedforward.op, model.decoder.layers[1].feedforward.op
    assert (
        torch.equal(new.up.weight, old.gate.weight)
        and new.gate is None
        and not model.spec.decoder.layers[1].steps[1].op.gated
    )


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        ([{"op": "widen", "hidden": 40}], LaminaError, "has 48 hidden units; prune makes them fewer"),
        ([{"op": "widen", "hidden": 50, "noise": 0.1}], LaminaError, "and 0 for by: zero"),
        ([{"op": "prune", "hidden": 50}], LaminaError, "has 48 hidden units; widen makes them more"),
        ([{"op": "prune", "hidden": 9, "text": "a.txt"}], LaminaError, "text is for by: energy"),
        ([{"op": "prune", "hidden": 9, "by": "energy", "text": "a.txt"}], LaminaError, "text='a.txt': no such file"),
        ([{"op": "experts", "experts": 2}, {"op": "widen", "hidden": 50}], LaminaError, "is an expert already"),
        ([{"op": "plain"}, {"op": "plain"}], LaminaError, "has no gate"),
    ],
)
def test_what_does_not_fit_is_refused(plan: list[dict[str, Any]], error: type[LaminaError], said: str):
    with pytest.raises(error, match=said):
        operated(tiny.model(), *plan)


def test_a_model_that_reads_no_ids_has_no_text():
    import lamina

    base = lamina.spec("whisper/tiny")
    weights = dict(base.build(device="meta").named_parameters())
    apply(read_plan([{"op": "prune", "hidden": 9}]), base, weights)
    for plan in ({"op": "prune", "hidden": 9, "by": "energy"}, {"op": "latent", "rank": 9, "at": ["encoder"]}):
        with pytest.raises(UnsupportedError, match="models of plain stacks that read ids"):
            apply(read_plan([plan]), base, weights)
