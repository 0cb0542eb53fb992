"""Recurrent memory tokens against transformers, segment by segment; cut, padded, packed and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import generate
from lamina.layers import (
    Call,
    CrossAttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    LearnedPositionSpec,
    RecurrentMemorySpec,
    RouterLossSpec,
    SegmentSpec,
    StackSpec,
    StepSpec,
    TopKSpec,
)
from lamina.parallel import MeshSpec, plan
from lamina.patterns import Causal, Everything, Window
from lamina.specs import edit
from lamina.tokens import Tokens, plain
from tests.small import MIXED, build, decoder, ids
from tests.tiny import checkpoint

N, LENGTH = 3, 5
MEMORY = RecurrentMemorySpec(tokens=N, length=LENGTH)


def recurrent(spec: lamina.ModelSpec, memory: RecurrentMemorySpec = MEMORY) -> lamina.ModelSpec:
    return edit(spec, StackSpec, lambda path, part: part.replace(recurrence=memory))


def text_model(scheme: str = "rotary", memory: RecurrentMemorySpec = MEMORY, seed: int = 0) -> lamina.Model:
    return build(recurrent(decoder(MIXED, scheme), memory).replace(context=64), seed=seed)


def theirs(model: Any, memory: Tensor, ids: Tensor, detach: tuple[int, ...] = ()) -> Tensor:
    """Logits, with a decoder of transformers that reads one segment after the other."""
    state, out = memory.expand(ids.shape[0], -1, -1), []
    for number, segment in enumerate(ids.split(LENGTH, dim=1)):
        state = state.detach() if number in detach else state
        vectors = model.get_input_embeddings()(segment)
        found = model.model(inputs_embeds=torch.cat([state, vectors, state], dim=1)).last_hidden_state
        out.append(model.lm_head(found[:, N:-N]))
        state = found[:, -N:]
    return torch.cat(out, dim=1)


def pair(tmp_path: Path, memory: RecurrentMemorySpec = MEMORY) -> tuple[lamina.Model, Any]:
    """A tiny LLaMA with memory tokens here, and the same weights there."""
    transformers = pytest.importorskip("transformers")
    directory = checkpoint(tmp_path / "tiny")
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    plain = lamina.load(directory, dtype="float64")
    model = recurrent(plain.spec, memory).build(dtype=torch.float64).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["decoder.recurrence.memory"] and not missing.unexpected_keys
    with torch.no_grad():
        model.get_parameter("decoder.recurrence.memory").normal_(generator=torch.Generator().manual_seed(1))
    return model, reference


def near(ours: Tensor | None, theirs: Tensor | None) -> None:
    """To 1e-5 of the largest: norms and rotary phases of transformers are in float32, whatever the model is in."""
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("length", [1, 4, 5, 6, 17, 20])
def test_it_is_transformers_segment_by_segment(length: int, tmp_path: Path):
    model, reference = pair(tmp_path)
    text = ids(2, length, seed=length)
    memory = model.get_parameter("decoder.recurrence.memory")
    with torch.no_grad():
        near(model(text).logits, theirs(reference, memory, text))
        if length > LENGTH:  # and what was read before the segment matters
            changed = text.clone()
            changed[:, 0] = (changed[:, 0] + 1) % 40
            assert float((model(changed).logits - model(text).logits)[:, LENGTH:].abs().max()) > 1e-6


@pytest.mark.parametrize(("gradients", "detached"), [(None, ()), (0, (1, 2, 3, 4)), (1, (2, 4)), (2, (3,))])
def test_gradients_end_where_the_spec_says(gradients: int | None, detached: tuple[int, ...], tmp_path: Path):
    model, reference = pair(tmp_path, MEMORY.replace(gradients=gradients))
    text = ids(2, 22)
    memory = model.get_parameter("decoder.recurrence.memory")
    outside = memory.detach().clone().requires_grad_()
    weigh = torch.randn(2, 22, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (model(text).logits * weigh).sin().sum().backward()
    (theirs(reference, outside, text, detached) * weigh).sin().sum().backward()
    assert memory.grad is not None and outside.grad is not None
    near(memory.grad, outside.grad)
    q, other = (one.get_parameter(name).grad for one, name in (
        (model, "decoder.layers.0.attention.op.v.weight"), (reference, "model.layers.0.self_attn.v_proj.weight")
    ))  # fmt: skip
    near(q, other)
    if detached != (1, 2, 3, 4):  # where gradients end shows
        outside.grad = None
        (theirs(reference, outside, text, (1, 2, 3, 4)) * weigh).sin().sum().backward()
        assert float((memory.grad - outside.grad).abs().max()) > 1e-3 * float(memory.grad.abs().max())


@pytest.mark.parametrize("scheme", ["rotary", "learned", "sinusoidal", "buckets", "alibi", "shaw", "transformer-xl"])
def test_all_properties_hold(scheme: str):
    report = lamina.verify(text_model(scheme))
    assert report.passed, report


SPLITS = [[1] * 23, [5, 5, 5, 5, 3], [4, 6, 1, 9, 3], [7, 16], [22, 1], [3, 2, 5, 13]]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", ["auto", "growing", "ring"])
def test_rows_of_different_lengths_and_documents_in_every_split(split: list[int], kind: str):
    """Left padding puts the rows out of step; the third begins a new document in the middle."""
    model = text_model()
    text, mask = ids(3, 23), torch.ones(3, 23, dtype=torch.int64)
    mask[0, :4] = mask[1, :11] = 0
    documents = torch.zeros(3, 23, dtype=torch.int64)
    documents[2, 9:] = 1
    with torch.no_grad():
        alone = [
            torch.cat([model(part[None]).logits[0] for part in parts])
            for parts in ((text[0, 4:],), (text[1, 11:],), (text[2, :9], text[2, 9:]))
        ]
        out = model(text, mask, document_ids=documents)
        whole = out.logits
        assert not out.hidden[mask == 0].any()
        cache, start, out = model.new_cache(kind, 3), 0, []
        for size in split:
            at = slice(start, start := start + size)
            out.append(model(text[:, at], mask[:, at], document_ids=documents[:, at], cache=cache).logits)
    cached = torch.cat(out, dim=1)
    for row, reference in enumerate(alone):
        for found in (whole, cached):
            torch.testing.assert_close(found[row, 23 - len(reference) :], reference, rtol=0, atol=1e-10)


def test_beams_take_their_memory_with_them():
    model, text = text_model(), ids(3, 12)
    index = torch.tensor([2, 0, 0, 1])
    for at in (1, 5, 7, 10):
        with torch.no_grad():
            cache = model.new_cache(batch=3)
            model(text[:, :at], cache=cache)
            cache.reorder(index)
            found = model(text[index, at:], cache=cache).logits
            torch.testing.assert_close(found, model(text[index]).logits[:, at:], rtol=0, atol=1e-10)


def test_generation_goes_on_beyond_a_segment():
    model, text = text_model(), ids(2, 4)
    with torch.no_grad():
        for beams in (1, 3):
            long = generate(model, text, max_new_tokens=14, beams=beams)
            again = generate(model, text, max_new_tokens=14, beams=beams, cache=None)
            assert torch.equal(long, again)


def test_positions_may_have_gaps():
    """A segment without its last position leaves no memory, however the text is cut."""
    model, text = text_model(), ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        whole = model(text, position_ids=positions).logits
        cache = model.new_cache()
        parts = [model(text[:, i : i + 1], position_ids=positions[:, i : i + 1], cache=cache).logits for i in range(8)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)
        alone = model(text[:, 3:]).logits  # the first segment has left nothing
        torch.testing.assert_close(whole[:, 3:], alone, rtol=0, atol=1e-10)


def test_a_text_may_begin_in_the_middle_of_a_segment():
    """Told by a span, or by positions alone."""
    stack, x = text_model().decoder, torch.randn(2, 12, 16, dtype=torch.float64)
    assert stack is not None
    known = plain(2, 12, start=3)
    with torch.no_grad():
        found = [stack(x, Call(tokens=tokens)) for tokens in (known, Tokens(known.position, known.document))]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_a_cache_holds_one_segment_and_the_memory():
    model, sizes = text_model(), []
    with torch.no_grad():
        cache = model.new_cache("auto")
        for part in ids(1, 40).split(10, dim=1):
            model(part, cache=cache)
            sizes.append(cache.bytes())
    assert len(set(sizes)) == 1
    # 3 layers of 2 key heads of 8, keys and values, of 4, 11 and 4 tokens with a spare place each; 3 vectors of 16
    assert sizes[0] == 8 * (2 * 2 * 8 * (5 + 12 + 5) + 3 * 16)
    account = lamina.account(model, context=40)
    assert account.cache_bytes == 8 * (2 * 2 * 8 * (4 + 11 + 4) + 3 * 16)


def test_gradients_flow_through_a_cache_and_can_be_cut():
    model, text = text_model(), ids(1, 12)
    found = []
    for way in ("whole", "cache", "cut"):
        model.zero_grad()
        if way == "whole":
            out = model(text).logits[:, 7:]
        else:
            cache = model.new_cache("growing")
            model(text[:, :7], cache=cache)
            slot = cache.slot("decoder.recurrence")
            if way == "cut":
                slot.detach()  # pyright: ignore[reportAttributeAccessIssue]
                assert not slot.progress.memory.requires_grad  # pyright: ignore[reportAttributeAccessIssue]
            out = model(text[:, 7:], cache=cache).logits
        out.sin().sum().backward()
        found.append(model.get_parameter("decoder.recurrence.memory").grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[1], found[2])


def test_what_it_costs():
    with_memory, without = (lamina.account(spec, context=20) for spec in (
        recurrent(decoder([Causal()])), decoder([Causal()])
    ))  # fmt: skip
    assert with_memory.parameters - without.parameters == N * 16
    layer = 16 * (32 + 16 + 16 + 32) + 3 * 16 * 24  # products of a token: attention, feed-forward network
    head, seen = 16 * 40, 4 * 8 * 2
    columns = 4 * (LENGTH + 2 * N)  # four segments
    assert with_memory.flops_prefill == 2 * (columns * layer + 20 * head + 4 * (LENGTH + 2 * N) ** 2 * seen)


def test_what_it_cannot_be_is_refused():
    model = text_model()
    cache = model.new_cache()
    with torch.no_grad():
        model(ids(1, 3), cache=cache)
    with pytest.raises(UnsupportedError, match="cannot be trimmed"):
        cache.trim(2)
    growing = model.new_cache("growing")
    with pytest.raises(UnsupportedError, match="the memory of a recurrent stack"):
        growing.trim(0)
    for kind in ("fixed", "sinks"):
        with pytest.raises(UnsupportedError, match=f"keeps one segment, which cache='{kind}' cannot"):
            model.new_cache(kind, capacity=30)
    with pytest.raises(UnsupportedError, match="marked tokens see a whole text"):
        model(ids(1, 3), marked=torch.ones(1, 3, dtype=torch.bool))
    for axis in ("replicate", "shard", "context"):
        with pytest.raises(UnsupportedError, match="decoder.recurrence: layers run once for each segment"):
            plan(MeshSpec(**{axis: 2}), 2, model.spec)
    plan(MeshSpec(tensor=2), 2, model.spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MEMORY.replace(tokens=0), "tokens=0 and length=5 must be at least 1"),
        (lambda: MEMORY.replace(gradients=-1), "gradients=-1 at least 0"),
        (lambda: recurrent(decoder([Everything()])), "recurrence is for causal stacks"),
        (lambda: recurrent(decoder([Causal() & Window(back=3), Everything()])), "recurrence is for causal stacks"),
        (lambda: stack(CrossAttentionSpec(heads=2, key_heads=2, head_dim=4)), "op: .* CrossAttentionSpec a whole text"),
        (
            lambda: stack(
                ExpertsSpec(router=TopKSpec(experts=2), expert=FeedForwardSpec(hidden=3), losses=RouterLossSpec(z=0.1))
            ),
            "op.losses: .* RouterLossSpec a whole text",
        ),
        (lambda: stack(segment=SegmentSpec(count=2)), "segment and input_width have none"),
        (lambda: stack(input_width=4), "segment and input_width have none"),
        (lambda: stack(position=LearnedPositionSpec(size=10)), "position.size is 10; a segment of 5 tokens .* 11 pos"),
    ],
)
def test_what_contradicts_it_is_refused(make: Any, message: str):
    with pytest.raises(LaminaError, match=message):
        make()


def stack(op: Any = None, **more: Any) -> StackSpec:
    step = StepSpec(name="step", op=FeedForwardSpec(hidden=3) if op is None else op)
    return StackSpec(layers=(LayerSpec(steps=(step,)),), recurrence=MEMORY, **more)


def test_new_memory_is_drawn_as_tokens_are():
    spec = recurrent(decoder([Causal()]), RecurrentMemorySpec(tokens=200, length=5))
    memory = spec.build(seed=1).get_parameter("decoder.recurrence.memory").detach()
    assert abs(float(memory.std()) / 0.02 - 1) < 0.05
