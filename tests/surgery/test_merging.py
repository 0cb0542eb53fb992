"""Merging: the papers' formulas number by number, in plain Python, and what may not be merged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lamina
from lamina.adapters import LoRASpec, attach
from lamina.adapting import write_adapter
from lamina.errors import LaminaError
from lamina.layers import Record
from lamina.model import Model
from lamina.surgery import Applied, Other, Outside, apply, build, read_plan
from tests import tiny
from tests.surgery.test_operations import SHAPES, ids_of, operated, run, works

Numbers = list[float]


def merged(
    own: Model, plan: dict[str, Any], others: Mapping[str, Model], same_tokens: bool | None = None
) -> tuple[Applied, Mapping[str, Tensor]]:
    opened = {
        name: Other(one.spec, {key: p.detach() for key, p in one.named_parameters()}, same_tokens)
        for name, one in others.items()
    }
    state = {key: one.detach() for key, one in own.named_parameters()}
    done = apply(read_plan([{"op": "merge", **plan}]), own.spec, state, Outside(opened.__getitem__))
    return done, done.weights


def models(config: dict[str, Any] = tiny.LLAMA) -> dict[str, Model]:
    """A base, and two that were changed a little."""
    found = {"base": tiny.model(config, scale=2.0)}
    for seed, name in ((1, "a"), (2, "b")):
        found[name] = tiny.model(config, scale=2.0)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in found[name].parameters():
                one.add_(0.05 * torch.randn(one.shape, generator=random))
    return found


# The papers, one number after the other.


def mean(x: list[Numbers], w: Numbers) -> Numbers:
    return [sum(a * n for a, n in zip(w, numbers)) / sum(w) for numbers in zip(*x)]


def arc(x: list[Numbers], w: Numbers) -> Numbers:
    a, b = x
    lengths = [math.sqrt(sum(n * n for n in one)) for one in x]
    dot = sum(p * q for p, q in zip(a, b)) / max(lengths[0] * lengths[1], 1e-300)
    angle, t = math.acos(max(-1.0, min(1.0, dot))), w[1] / sum(w)
    if min(lengths) == 0 or math.sin(angle) < 1e-6:
        return [p + t * (q - p) for p, q in zip(a, b)]
    one, other = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [one * p + other * q for p, q in zip(a, b)]


def arithmetic(base: Numbers, x: list[Numbers], w: Numbers, scale: float) -> Numbers:
    return [b + scale * sum(a * (n - b) for a, n in zip(w, numbers)) for b, *numbers in zip(base, *x)]


def ties(base: Numbers, x: list[Numbers], w: Numbers, densities: Numbers, scale: float) -> Numbers:
    trimmed = []
    for one, density in zip(x, densities):
        change = [n - b for n, b in zip(one, base)]
        order = sorted(range(len(change)), key=lambda i: -abs(change[i]))
        kept = set(order[: max(round(density * len(change)), 1)])
        trimmed.append([n if i in kept else 0.0 for i, n in enumerate(change)])
    new = []
    for b, *numbers in zip(base, *trimmed):
        total = sum(a * n for a, n in zip(w, numbers))
        chosen = [(a, n) for a, n in zip(w, numbers) if n * total > 0]
        new.append(b + scale * (sum(a * n for a, n in chosen) / sum(a for a, _ in chosen) if chosen else 0.0))
    return new


def parts(tensor: Tensor, name: str) -> list[Numbers]:
    """What a method looks at as a whole: a weight, or one of an expert."""
    rows = tensor.shape[0] if ".experts." in name else 1
    return tensor.detach().double().reshape(rows, -1).tolist()


def of(found: dict[str, Model], name: str, which: str, row: int) -> Numbers:
    return parts(found[which].get_parameter(name), name)[row]


@pytest.mark.parametrize("shape", [*SHAPES, "experts"])
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_the_papers_formulas(shape: str, method: str):
    found = models(tiny.LLAMA if shape == "experts" else SHAPES[shape])
    if shape == "experts":
        plan = {"op": "experts", "experts": 3, "chosen": 2, "noise": 0.3}
        found = {name: operated(one, {**plan, "seed": seed})[0] for seed, (name, one) in enumerate(found.items())}
    w, densities, scale = [0.3, 0.9], [0.2, 0.6], 0.7
    if method in ("linear", "slerp"):
        own, others = found["a"], {"b": found["b"]}
        plan = {"method": method, "models": [{"weight": w[0]}, {"source": "b", "weight": w[1]}]}
    else:
        own, others = found["base"], {"a": found["a"], "b": found["b"]}
        sources = [
            {"source": one, "weight": a, **({"density": density} if method == "ties" else {})}
            for one, a, density in zip("ab", w, densities)
        ]
        plan = {"method": method, "models": sources, "scale": scale}
    done, weights = merged(own, plan, others)
    assert set(weights) == {name for name, _ in own.named_parameters()} and done.spec == own.spec
    assert done.kept == "lossy" and done.undo is None
    names = [name for name in weights if "layers.1." in name or name.endswith("norm.weight") or ".position" in name]
    for name in names[:14]:
        for row, got in enumerate(parts(weights[name], name)):
            base, *x = (of(found, name, which, row) for which in ("base", "a", "b"))
            expected = {
                "linear": lambda x=x: mean(x, w),
                "slerp": lambda x=x: arc(x, w),
                "task_arithmetic": lambda x=x, base=base: arithmetic(base, x, w, scale),
                "ties": lambda x=x, base=base: ties(base, x, w, densities, scale),
            }[method]()
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=2e-6)


def test_the_model_that_is_operated_on_may_be_one_of_them_beside_a_base():
    found = models()
    plan: dict[str, Any] = {"method": "ties", "scale": 0.5}
    one, first = merged(found["base"], plan | {"models": [{"source": "a"}, {"source": "b", "density": 0.3}]}, found)
    other, second = merged(found["a"], plan | {"base": "base", "models": [{}, {"source": "b", "density": 0.3}]}, found)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = {row.name: row for row in other.table}
    assert rows["decoder.norm.weight"].sources == (
        "decoder.norm.weight", "base:decoder.norm.weight", "b:decoder.norm.weight"
    )  # fmt: skip
    assert rows["decoder.norm.weight"].how == ("ties of 2 models",) and set(one.others) == {"a", "b"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_model_and_itself_are_itself_to_the_bit(shape: str, method: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    plan = {"method": method, "models": [{"weight": 0.3}, {"source": "again", "weight": 0.55}]}
    done, weights = merged(base, plan, {"again": base})
    assert all(torch.equal(weights[name], one) for name, one in base.named_parameters())
    model, new = build(done.spec, done.weights)
    assert not new
    if method == "linear" and shape == "t5":
        works(model, ids_of(base), tmp_path)


def test_more_models_than_two_and_one_alone():
    found = models()
    plan = {"models": [{"weight": 2.0}, {"source": "a", "weight": -0.5}, {"source": "b"}]}
    _, weights = merged(found["base"], plan, found)
    name = "decoder.layers.0.feedforward.op.up.weight"
    x = [found[which].get_parameter(name).detach() for which in ("base", "a", "b")]
    torch.testing.assert_close(weights[name], (2 * x[0] - 0.5 * x[1] + x[2]) / 2.5, rtol=0, atol=1e-6)
    _, weights = merged(found["base"], {"models": [{}]}, found)
    assert torch.equal(weights[name], x[0])


def test_dare_drops_by_chance_and_makes_up_for_it():
    found = models()
    name = "decoder.layers.0.feedforward.op.up.weight"
    base, change = found["base"].get_parameter(name), found["a"].get_parameter(name) - found["base"].get_parameter(name)

    def dropped(source: str = "a", **more: Any) -> Mapping[str, Tensor]:
        plan = {"method": "dare", "models": [{"source": source, "density": 0.25}]} | more
        return merged(found["base"], plan, {source: found["a"]})[1]

    weights = dropped()
    kept = (weights[name] - base).abs() > 0
    torch.testing.assert_close(weights[name][kept], (base + change / 0.25)[kept].detach(), rtol=0, atol=1e-6)
    assert abs(float(kept.float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / kept.numel())
    assert torch.equal(weights[name], dropped()[name])  # the same seed
    for other in (dropped(seed=1)[name], dropped("again")[name]):  # another seed, another model
        assert 0.2 < float(((other - base).abs() > 0)[kept].float().mean()) < 0.3
    second = "decoder.layers.0.feedforward.op.gate.weight"
    assert not torch.equal((weights[second] - found["base"].get_parameter(second)).abs() > 0, kept)
    whole = sum(dropped(seed=seed)[name] - base for seed in range(200)) / 200
    spread = change.abs() * math.sqrt(3 / 200)  # of the mean of 200, each change / density with the chance density
    assert float(((whole - change).abs() <= 5 * spread).float().mean()) > 0.999


def test_where_all_is_kept_dare_is_task_arithmetic_and_one_model_of_ties_its_change():
    found = models()
    two = [{"source": "a", "weight": 0.8}, {"source": "b", "weight": 0.3}]
    expected = merged(found["base"], {"method": "task_arithmetic", "models": two, "scale": 0.4}, found)[1]
    got = merged(found["base"], {"method": "dare", "models": two, "scale": 0.4}, found)[1]
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    alone = merged(found["base"], {"method": "ties", "models": two[:1]}, found)[1]
    for name, one in found["a"].named_parameters():
        torch.testing.assert_close(alone[name], one.detach(), rtol=0, atol=1e-6)


def test_it_is_computed_in_float32_and_rounded_once():
    found = {name: one.bfloat16() for name, one in models().items()}
    plan = {"method": "task_arithmetic", "models": [{"source": "a", "weight": 0.3}, {"source": "b", "weight": 0.4}]}
    done, weights = merged(found["base"], plan, found)
    for name, base in found["base"].named_parameters():
        wide = base.float() + sum(
            share * (found[which].get_parameter(name).float() - base.float())
            for which, share in (("a", 0.3), ("b", 0.4))
        )
        assert weights[name].dtype == torch.bfloat16 and done.weights.dtype(name) == torch.bfloat16  # pyright: ignore
        difference = (weights[name].float() - wide).abs()
        assert bool((difference <= wide.abs() * 2**-8 + 1e-6).all())
    mixed = found | {"a": models()["a"]}
    assert merged(found["base"], plan, mixed)[1]["decoder.norm.weight"].dtype == torch.bfloat16


def test_one_tensor_of_each_is_read_for_a_weight():
    found = models(tiny.GPT2)
    read: list[tuple[str, str]] = []

    class Counted(Mapping[str, Tensor]):
        def __init__(self, which: str) -> None:
            self.which = which

        def __getitem__(self, key: str) -> Tensor:
            read.append((self.which, key))
            return found[self.which].get_parameter(key).detach()

        def __contains__(self, key: object) -> bool:
            return key in list(self)

        def __iter__(self) -> Iterator[str]:
            return (name for name, _ in found[self.which].named_parameters())

        def __len__(self) -> int:
            return len(list(iter(self)))

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32

    others = {name: Other(found[name].spec, Counted(name)) for name in "ab"}
    plan = read_plan([{"op": "merge", "method": "ties", "models": [{"source": "a"}, {"source": "b"}]}])
    done = apply(plan, found["base"].spec, Counted("base"), Outside(others.__getitem__))
    assert read == [] and "head.weight" not in done.weights  # tied, and so once
    done.weights["embedding.weight"]
    assert read == [(which, "embedding.weight") for which in ("base", "a", "b")]


def test_experts_are_merged_expert_by_expert():
    """Two experts in other places of the arc: as one long vector they would be turned by one angle."""
    plan = {"op": "experts", "experts": 2, "noise": 1.0}
    base = tiny.model()
    one, other = (operated(base, {**plan, "seed": seed})[0] for seed in (0, 1))
    name = "decoder.layers.0.feedforward.op.experts.up.weight"
    with torch.no_grad():
        other.get_parameter(name)[0] = one.get_parameter(name)[0]
    _, weights = merged(one, {"method": "slerp", "models": [{}, {"source": "other"}]}, {"other": other})
    assert torch.equal(weights[name][0], one.get_parameter(name)[0])
    halved = ((one.get_parameter(name)[1] + other.get_parameter(name)[1]) / 2).detach()
    assert not torch.allclose(weights[name][1], halved)
    assert float(weights[name][1].norm()) > 1.02 * float(halved.norm())


# Adapters.


def adapter(tmp_path: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint, and a LoRA of rank 3 for it that changes what it computes."""
    tiny.checkpoint(tmp_path / "base", config)
    model = lamina.load(tmp_path / "base")
    random = torch.Generator().manual_seed(0)
    for _, one in attach(model, LoRASpec(rank=3, alpha=5.0)):
        with torch.no_grad():
            one.normal_(generator=random)
    write_adapter(model, tmp_path / "lora")
    return tmp_path / "base", tmp_path / "lora"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_is_merged_as_load_merges_it(shape: str, tmp_path: Path):
    """Bit for bit, and W + s B A of the file's own tensors; GPT-2 packs q, k and v into one."""
    base, lora = adapter(tmp_path, SHAPES[shape])
    own, expected = lamina.load(base), lamina.load(base, adapter=lora)
    model, verdict = lamina.edit(own, [{"op": "adapter", "source": str(lora)}], texts=[list(range(4, 20))])
    assert verdict.found == "changed"
    assert all(torch.equal(one, expected.get_parameter(name)) for name, one in model.named_parameters())
    changed = [name for name, one in own.named_parameters() if not torch.equal(one, model.get_parameter(name))]
    assert changed and all(".attention." in name or ".cross." in name for name in changed)
    assert str(lora) in model.origin.history[-1]["others_sha256"]
    if shape == "llama":
        file = load_file(lora / "adapter_model.safetensors")
        first, second = (
            file[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{letter}.weight"] for letter in "AB"
        )
        name = "decoder.layers.1.attention.op.q.weight"
        wanted = own.get_parameter(name) + 5 / 3 * second @ first
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=0, atol=1e-5)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path):
    base, lora = adapter(tmp_path, tiny.LLAMA)
    own = lamina.load(base)
    merge = {"op": "adapter", "source": str(lora)}
    for plan, why in (
        (
            [{"op": "key_heads", "heads": 1}, merge],
            r"changes decoder.layers.0.attention.op.k.weight of shape \[16, 32\]",
        ),
        ([{"op": "reading", "to": "bidirectional"}, merge], "the model has none such"),
        ([{"op": "adapter", "source": str(base)}], "is a whole model, and no adapter"),
    ):
        with pytest.raises(LaminaError, match=why):
            lamina.edit(own, plan, texts=[[1, 2]])
    with pytest.raises(LaminaError, match="this model was not read from one"):
        lamina.edit(tiny.model(), [merge], texts=[[1, 2]])


# Several models as experts.


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_of_equal_models_are_that_model(shape: str, tmp_path: Path):
    base = tiny.model(SHAPES[shape], scale=1.0)
    done, _ = mixed(base, ["a", "b"], {"a": base, "b": base})
    model, new = build(done.spec, done.weights, seed=3)
    assert new and all(name.endswith(".router.weight") for name in new)
    ids = ids_of(base)
    expected = run(base, ids)
    assert float((run(model, ids) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    if shape == "gpt2":
        works(model, ids, tmp_path)


def test_experts_of_several_models_are_their_networks():
    """Whatever the router chooses: with one choice, a token has the network of one of the models."""
    found = models(tiny.LLAMA | {"num_hidden_layers": 1})
    base = found.pop("base")
    done, weights = mixed(base, ["a", "b"], found, chosen=1)
    for part in ("gate", "up", "down"):
        stacked = weights[f"decoder.layers.0.feedforward.op.experts.{part}.weight"]
        for one, row in zip((base, found["a"], found["b"]), stacked, strict=True):
            assert torch.equal(row, one.get_parameter(f"decoder.layers.0.feedforward.op.{part}.weight"))
    model, _ = build(done.spec, weights)
    ids = ids_of(base, rows=3)
    record = Record("*.used", "*.scores")
    with torch.no_grad():
        got = model(ids, record=record).logits
    choice = record.values["decoder.layers.0.feedforward.op.scores"].argmax(-1)
    assert set(choice.flatten().tolist()) == {0, 1, 2}
    each = []
    for network in (base, found["a"], found["b"]):
        state = {name: one.detach() for name, one in base.named_parameters()}
        state |= {name: one.detach() for name, one in network.named_parameters() if ".feedforward.op." in name}
        each.append(run(build(base.spec, state)[0], ids))
    expected = torch.stack(each).gather(0, choice[None, :, :, None].expand(1, *got.shape))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def mixed(
    own: Model, sources: list[str], others: Mapping[str, Model], **more: Any
) -> tuple[Applied, Mapping[str, Tensor]]:
    opened = {name: Other(one.spec, dict(one.named_parameters())) for name, one in others.items()}
    state = {key: one.detach() for key, one in own.named_parameters()}
    plan = read_plan([{"op": "mixture", "models": sources, **more}])
    done = apply(plan, own.spec, state, Outside(opened.__getitem__))
    return done, done.weights


def test_experts_that_do_not_fit_are_refused():
    base = tiny.model()
    for sources, others, more, why in (
        ([], {}, {}, "at least one is needed"),
        (["a", "a"], {"a": base}, {}, "each once"),
        (["a"], {"a": base}, {"chosen": 3}, "chosen=3 must be from 1 to the 2 models"),
        (["a"], {"a": tiny.model(tiny.MISTRAL)}, {}, "only models of one spec"),
    ):
        with pytest.raises(LaminaError, match=why):
            mixed(base, sources, others, **more)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"models": [{"source": "a"}]}, "one of models, and not 0, is the model that is operated on"),
        ({"models": [{}, {}]}, "one of models, and not 2"),
        ({"models": []}, "one of models, and not 0"),
        ({"models": [{}, {"source": "a"}, {"source": "a"}]}, "each is to be there once"),
        ({"models": [{}, {"source": "a", "weight": -1.0}]}, "add up to 0"),
        ({"models": [{}, {"source": "a"}], "base": "b"}, "linear has neither base nor scale"),
        ({"models": [{}, {"source": "a", "density": 0.5}]}, "density=0.5: above 0 and at most 1, and 1 where"),
        ({"models": [{}, {"source": "a"}, {"source": "b"}], "method": "slerp"}, "slerp is for two models, and not 3"),
        ({"models": [{}, {"source": "a", "weight": -0.5}], "method": "slerp"}, "weight=-0.5 must be at least 0"),
        ({"models": [{}, {"source": "a"}], "method": "ties"}, "is the base, and so none of models"),
        ({"models": [{"source": "a", "density": 0.0}], "method": "ties"}, "density=0.0: above 0"),
        ({"models": [{"source": "a"}], "method": "tie"}, "'linear' or 'slerp' or"),
        ({"models": [{"source": "a"}], "method": "dare", "base": "b"}, "one of models, and not 0"),
    ],
)
def test_what_makes_no_sense_is_said(plan: dict[str, Any], said: str):
    with pytest.raises(LaminaError, match=said):
        merged(tiny.model(), plan, models())


def test_other_specs_and_other_tokens_are_refused():
    own = tiny.model()
    plan = {"models": [{}, {"source": "x"}]}
    longer = tiny.model(tiny.LLAMA | {"num_hidden_layers": 3})
    theta = tiny.model(tiny.LLAMA | {"rope_theta": 5e5})
    for other, why in (
        (tiny.model(tiny.MISTRAL), r"x: decoder.layers.0.steps.0.op.pattern is .*only models of one spec"),
        (longer, "x: decoder.layers is "),
        (theta, r"x: decoder.layers.0.steps.0.op.rotary.* is 500000.0, and here 10000.0"),
    ):
        with pytest.raises(LaminaError, match=why):
            merged(own, plan, {"x": other})
    changed = {"eos_token_id": 3, "max_position_embeddings": 99, "initializer_range": 0.5, "attention_dropout": 0.1}
    chat = tiny.model(tiny.LLAMA | changed)
    assert merged(own, plan, {"x": chat})[0].spec == own.spec
    with pytest.raises(LaminaError, match="x has other tokens"):
        merged(own, plan, {"x": own}, same_tokens=False)
    assert merged(own, plan, {"x": own}, same_tokens=True)[0].spec == own.spec
