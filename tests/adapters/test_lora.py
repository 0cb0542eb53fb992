"""LoRA on a model: what it computes, what is trained, merging and taking it off."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch

import lamina
from lamina.adapters import LoRASpec, adapted, attach, detach, merge, merged_tensors, places
from lamina.errors import LaminaError, UnsupportedError
from lamina.families import family
from lamina.layers import EmbeddingSpec, LanguageHeadSpec, LayerSpec, RMSNormSpec, StackSpec, StepSpec
from tests import tiny

IDS = torch.arange(22).reshape(2, 11) * 7 % 23


def disturbed(model: lamina.Model, seed: int = 5) -> lamina.Model:
    """The model, its B factors no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_b.normal_(std=0.3, generator=generator)
    return model


def logits(model: lamina.Model) -> torch.Tensor:
    out = model.eval()(IDS).logits
    assert out is not None
    return out.detach()


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2, tiny.BERT], ids=["llama", "gpt2", "bert"])
def test_it_begins_as_the_model_and_leaves_it_as_it_was(config: dict[str, Any]):
    model = tiny.model(config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    plain = logits(model)
    trained = attach(model, LoRASpec(rank=3), seed=1)
    assert torch.equal(logits(model), plain)  # B = 0
    side = "encoder" if config is tiny.BERT else "decoder"
    wanted = [
        f"{side}.layers.{i}.attention.op.{part}.lora_{factor}" for i in range(2) for part in "qkvo" for factor in "ab"
    ]
    assert [name for name, _ in trained] == wanted
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == set(wanted)
    assert [name for name, _ in model.named_parameters() if name not in wanted] == list(before)
    disturbed(model)
    assert (logits(model) - plain).abs().max() > 1e-3
    detach(model)
    assert not adapted(model) and model.adapter is None
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(weight.requires_grad for weight in after.values())
    assert torch.equal(logits(model), plain)


def test_a_weight_that_is_replaced_is_let_go():
    """As ranks do that share it out: nothing keeps the whole alive, and what is detached has the part."""
    model = tiny.model(tiny.LLAMA)
    attach(model, LoRASpec(rank=3))
    name, layer = next(iter(adapted(model).items()))
    gone = weakref.ref(layer.weight)
    part = layer.weight = torch.nn.Parameter(layer.weight.detach()[:4].clone(), requires_grad=False)
    gc.collect()
    assert gone() is None
    detach(model)
    assert model.get_submodule(name).weight is part


@pytest.mark.parametrize("rslora", [False, True])
def test_the_change_is_the_papers(rslora: bool):
    model = tiny.model()
    attach(model, LoRASpec(rank=3, alpha=5.0, rslora=rslora, targets=("decoder.layers.1.feedforward.op.up",)))
    (layer,) = adapted(disturbed(model)).values()
    x = torch.randn(2, 7, 32)
    scale = 5.0 / (math.sqrt(3) if rslora else 3)
    whole = layer.weight.double() + scale * (layer.lora_b.double() @ layer.lora_a.double())
    torch.testing.assert_close(layer(x).double(), x.double() @ whole.T, rtol=1e-5, atol=1e-5)
    bound = 1 / math.sqrt(32)
    assert layer.lora_a.shape == (3, 32) and 0.9 * bound < layer.lora_a.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact(dtype: torch.dtype):
    model = tiny.model().to(dtype)
    attach(model, LoRASpec(rank=4, alpha=7.0))
    disturbed(model)
    layers = adapted(model)
    wanted = {
        f"{name}.weight": (one.weight.float() + 7.0 / 4 * (one.lora_b.float() @ one.lora_a.float())).to(dtype)
        for name, one in layers.items()
    }
    beside, without = logits(model), merged_tensors(model, {})
    merge(model)
    after = dict(model.named_parameters())
    for name, weight in wanted.items():
        assert torch.equal(after[name], weight) and after[name].dtype == dtype, name
    assert list(without) == list(after) and all(torch.equal(without[name], after[name]) for name in after)
    assert all(weight.requires_grad for weight in after.values())
    close = {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]  # of logits of size 10: bfloat16 rounds to 1 in 256
    assert (logits(model).float() - beside.float()).abs().max() < close
    with pytest.raises(LaminaError, match="no adapter is attached"):
        merge(model)


def test_other_values_may_stand_for_the_factors():
    model = tiny.model()
    trained = attach(model, LoRASpec(rank=2, targets=("q",)))
    values = {name: torch.randn_like(one) for name, one in trained}
    found = merged_tensors(model, values)
    for name, layer in adapted(model).items():
        wanted = layer.weight + 16 / 2 * (values[f"{name}.lora_b"] @ values[f"{name}.lora_a"])
        assert torch.equal(found[f"{name}.weight"], wanted)


def test_gradients_reach_the_factors_alone():
    model = tiny.model()
    attach(model, LoRASpec(rank=3, dropout=0.5, targets=("q",)))
    out = disturbed(model).train()(IDS).logits
    assert out is not None
    out.square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name), name
    assert all(layer.rate == 0.5 for layer in adapted(model).values())


def test_the_seed_decides_the_beginning():
    def made(seed: int) -> list[torch.Tensor]:
        return [weight.detach() for _, weight in attach(tiny.model(), LoRASpec(rank=2), seed)]

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "targets, wanted",
    [
        (("q", "v"), {"attention.op.q", "attention.op.v"}),
        (("c_attn",), {"attention.op.q", "attention.op.k", "attention.op.v"}),
        (("c_proj",), {"attention.op.o", "feedforward.op.down"}),
        (("attn.c_proj",), {"attention.op.o"}),
        (("transformer.h.0", "transformer.h.1.mlp*"), None),
        (("decoder.layers.*.feedforward.op.up",), {"feedforward.op.up"}),
    ],
)
def test_targets_are_ours_or_the_checkpoints(targets: tuple[str, ...], wanted: set[str] | None):
    model = tiny.model(tiny.GPT2)
    attach(model, LoRASpec(rank=2, targets=targets), table=places(model, family("gpt2").rules(model.spec)))
    found = set(adapted(model))
    if wanted is None:
        assert len(found) == 6 + 2
    else:
        assert found == {f"decoder.layers.{i}.{part}" for i in range(2) for part in wanted}


def test_what_cannot_be():
    model = tiny.model()
    with pytest.raises(LaminaError, match=r"unknown target of an adapter 'qq'; did you mean 'q'"):
        attach(model, LoRASpec(targets=("qq",)))
    with pytest.raises(LaminaError, match=r"unknown target of an adapter 'own'; did you mean 'down'"):
        attach(model, LoRASpec(targets=("own",)))  # the end of a name is none
    assert not adapted(model) and all(weight.requires_grad for weight in model.parameters())
    attach(model, LoRASpec(rank=2))
    with pytest.raises(LaminaError, match="an adapter is attached already: merge it or detach it first"):
        attach(model, LoRASpec(rank=2))
    with pytest.raises(LaminaError, match="an adapter is attached: merge it or detach it first"):
        lamina.save(model, "/nowhere")
    from lamina.generation.compiled import prepare

    for more in ({"compile": True}, {"quantize": "int8"}):
        with pytest.raises(UnsupportedError, match="a model with an adapter is not compiled or rounded: merge it"):
            prepare(model, **more)
    rounded = tiny.model()
    prepare(rounded, quantize="int8")
    with pytest.raises(LaminaError, match="unknown target of an adapter 'q'"):
        attach(rounded, LoRASpec(targets=("q",)))
    for fields, message in (
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"targets": ()}, "targets is empty"),
    ):
        with pytest.raises(LaminaError, match=message):
            LoRASpec(**fields)


def test_matrices_that_a_layer_reads_whole_take_none():
    """Latent attention multiplies its up-projections into the queries: a change beside them would not be seen."""
    from lamina.layers import LatentAttentionSpec

    op = LatentAttentionSpec(heads=2, key_rank=12, nope_dim=5, rope_dim=4, value_dim=7, rotary=None)
    layer = LayerSpec(steps=(StepSpec(name="attention", op=op, pre=RMSNormSpec()),))
    stack = StackSpec(layers=(layer,), norm=RMSNormSpec())
    spec = lamina.ModelSpec(width=18, embedding=EmbeddingSpec(vocabulary=23), decoder=stack, head=LanguageHeadSpec())
    model = spec.build()
    attach(model, LoRASpec(rank=2))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"q", "kv_down", "o"}
