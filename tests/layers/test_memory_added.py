"""A memory is added to a model that is trained already: nothing changes at first, then it learns, and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.layers import (
    AttentionSpec,
    CompressiveSpec,
    InfiniSpec,
    LayerSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    ProductKeySpec,
    RecurrenceSpec,
    RMSNormSpec,
    StepSpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Window
from lamina.specs import edit
from tests import small, tiny

CONFIGS = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, "mistral": tiny.MISTRAL}
SEGMENT, TEXT = 6, 17

GATED: dict[str, Any] = {
    "infini, linear": InfiniSpec(length=SEGMENT, gate="zero"),
    "infini, delta": InfiniSpec(length=SEGMENT, update="delta", gate="zero"),
    "memorizing": MemorizingSpec(length=SEGMENT, size=12, count=3, gate="zero"),
    "memorizing, clusters": MemorizingSpec(length=SEGMENT, size=12, count=3, gate="zero", clusters=3, probes=2),
    "product keys": ProductKeySpec(heads=2, keys=6, key_dim=8, chosen=4),
    "memory+": ProductKeySpec(heads=2, keys=6, key_dim=8, chosen=4, gated=True, table="facts"),
}
"""Those with a gate: exact for any text."""
WITHIN: dict[str, Any] = {"recurrence": RecurrenceSpec(length=SEGMENT, size=SEGMENT)} | {
    f"compressive, {by}": CompressiveSpec(length=SEGMENT, size=SEGMENT, count=3, rate=2, by=by)  # pyright: ignore
    for by in ("mean", "max", "convolution", "most-used")
}
"""Those in the one softmax: exact within a segment."""


def with_memory(spec: ModelSpec, memory: Any) -> ModelSpec:
    if not isinstance(memory, ProductKeySpec):
        return edit(spec, AttentionSpec, lambda path, part: MemoryAttentionSpec(attention=part, memory=memory))
    step = StepSpec(name="memory", op=memory, pre=RMSNormSpec(), gate=True)
    return edit(spec, LayerSpec, lambda path, part: part.replace(steps=(*part.steps, step)))


def added(base: Model, memory: Any) -> Model:
    model = with_memory(base.spec, memory).build(seed=1, dtype=base.embedding.weight.dtype).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and not set(missing) & set(base.state_dict())
    return model


def trained_and_saved(model: Model, ids: torch.Tensor, path: Path) -> None:
    """One step: the loss falls and so do other answers; what is saved and read again is the same model."""
    before = model(ids).logits.detach()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout
        out = model.train()(ids)
        losses.append(torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        if len(losses) == 1:
            optimiser.zero_grad()
            (losses[0] + sum(out.losses.values())).backward()
            optimiser.step()
    assert losses[1] < losses[0]
    with torch.no_grad():
        after = model.eval()(ids).logits
        assert not torch.equal(after, before)
        lamina.save(model, path, format="native")
        again = lamina.load(path, dtype=before.dtype).eval()
        assert again.spec == model.spec
        kept = again.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(again(ids).logits, after, rtol=0, atol=1e-5)  # other places in memory


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("config", CONFIGS)
def test_behind_a_gate_at_zero_it_changes_no_bit(config: str, name: str, tmp_path: Path):
    memory, base = GATED[name], tiny.model(CONFIGS[config]).eval()
    if isinstance(memory, MemorizingSpec):  # which wants something that is hidden: the models of before, with a window
        narrow = edit(base.spec, AttentionSpec, lambda path, part: part.replace(pattern=Causal() & Window(back=5)))
        windowed = narrow.build().eval()
        windowed.load_state_dict(base.state_dict())
        base = windowed
    ids = small.ids(3, TEXT, vocabulary=base.spec.embedding.vocabulary)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 15:] = 0, 0
    model = added(base, memory)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids, mask).logits, base(ids, mask).logits)
        caches = [one.new_cache(batch=3) for one in (model, base)]
        for part in ids.split([5, 1, 9, 2], dim=1):
            mine, theirs = (one(part, cache=cache).logits for one, cache in zip((model, base), caches, strict=True))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    model.train()(ids).logits.square().sum().backward()
    gates = [p for path, p in model.named_parameters() if path.endswith(".gate") and p.dim() <= 1]
    assert len(gates) == 2 and all(p.grad is not None and bool((p.grad != 0).any()) for p in gates)
    model.zero_grad()
    trained_and_saved(model, ids, tmp_path / "model")


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("config", CONFIGS)
def test_in_the_one_softmax_it_changes_nothing_within_a_segment(config: str, name: str, tmp_path: Path):
    base = tiny.model(CONFIGS[config]).double().eval()
    ids = small.ids(2, TEXT, vocabulary=base.spec.embedding.vocabulary)
    model = added(base, WITHIN[name])
    with torch.no_grad():
        near, far = (model(ids[:, :length]).logits for length in (SEGMENT, TEXT))
        torch.testing.assert_close(near, base(ids[:, :SEGMENT]).logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(far[:, :SEGMENT], near, rtol=0, atol=1e-12)
    trained_and_saved(model, ids, tmp_path / "model")
