"""Cross-attention against its formula, and what must hold of it: no order of keys, no padding, beams share a source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.layers import Call, CrossAttention, CrossAttentionSpec, Record, RMSNormSpec, StepSpec
from lamina.tokens import HOLE, Tokens, plain
from tests import small
from tests.oracle import ON_THE_CPU

WIDTH, SOURCE = 12, 7
CASES = {
    "grouped": {},
    "many heads": {"key_heads": 4},
    "one key head": {"key_heads": 1},
    "unscaled": {"scale": 1.0},
    "biases": {"bias": "all"},
    "biases on q, k, v": {"bias": "qkv"},
    "no bias on k": {"bias": "qvo"},
    "narrow memory": {"memory_width": 5},
    "qk-norm": {"qk_norm": RMSNormSpec()},
    "dropout in evaluation": {"dropout": 0.9},
}


def made(**fields: object) -> CrossAttention:
    spec = CrossAttentionSpec(**({"heads": 4, "key_heads": 2, "head_dim": 6} | fields))  # pyright: ignore[reportArgumentType]
    module = spec.build(WIDTH).double().eval()
    small.shake(module)
    return module


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(module: CrossAttention, x: Tensor, memory: Tensor, real: list[int]) -> Tensor:
    """(T, width) reading the rows `real` of memory (S, width), one head and one token at a time."""
    spec, outs = module.spec, []

    def project(layer: torch.nn.Linear, row: Tensor, head: int) -> Tensor:
        out = layer.weight @ row + (0 if layer.bias is None else layer.bias)
        return out[head * spec.head_dim : (head + 1) * spec.head_dim]

    def norm(t: Tensor, layer: torch.nn.Module | None) -> Tensor:
        return t if layer is None else t / (t.square().mean() + 1e-6).sqrt() * layer.weight

    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    for row in x:
        heads = []
        for head in range(spec.heads):
            shared = head // (spec.heads // spec.key_heads)
            query = norm(project(module.q, row, head), module.q_norm)
            scores = [scale * query @ norm(project(module.k, memory[j], shared), module.k_norm) for j in real]
            values = torch.stack([project(module.v, memory[j], shared) for j in real])
            heads.append(torch.stack(scores).softmax(0) @ values)
        out = module.o.weight @ torch.cat(heads)
        outs.append(out if module.o.bias is None else out + module.o.bias)
    return torch.stack(outs)


@pytest.mark.parametrize("backend", ON_THE_CPU)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_and_never_sees_padding_of_the_source(case: str, backend: str):
    module = made(**CASES[case])
    x, memory = noise(2, 5, WIDTH), noise(2, SOURCE, CASES[case].get("memory_width", WIDTH), seed=1)
    position = torch.arange(SOURCE).expand(2, -1).clone()
    position[1, :2] = position[1, 6] = HOLE
    tokens = Tokens(position, torch.zeros_like(position))
    call = Call(tokens=plain(2, 5), memory=memory, memory_tokens=tokens, backend=backend)
    out = module(x, call)
    torch.testing.assert_close(out[0], naive(module, x[0], memory[0], list(range(SOURCE))))
    torch.testing.assert_close(out[1], naive(module, x[1], memory[1], [2, 3, 4, 5]))


@pytest.mark.parametrize(("bias", "biased"), [("none", ""), ("qkv", "qkv"), ("qvo", "qvo"), ("all", "qkvo")])
def test_which_projections_have_a_bias(bias: str, biased: str):
    module = made(bias=bias)
    assert "".join(name for name in "qkvo" if getattr(module, name).bias is not None) == biased


def test_the_order_of_the_source_does_not_matter():
    module, order = made(), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    x, memory, position = noise(1, 5, WIDTH), noise(1, SOURCE, WIDTH, seed=1), torch.arange(SOURCE)[None].clone()
    position[0, 4] = HOLE
    whole = [
        module(x, Call(tokens=plain(1, 5), memory=memory[:, by], memory_tokens=Tokens(where, torch.zeros_like(where))))
        for by, where in ((slice(None), position), (order, position[:, order]))
    ]
    torch.testing.assert_close(*whole)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_a_source_of_nothing_but_padding_gives_zeros(backend: str):
    position = torch.full((1, SOURCE), HOLE)
    call = Call(
        tokens=plain(1, 3),
        memory=noise(1, SOURCE, WIDTH) * torch.nan,
        memory_tokens=Tokens(position, torch.zeros_like(position)),
        backend=backend,
    )
    assert torch.equal(made()(noise(1, 3, WIDTH), call), torch.zeros(1, 3, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_beams_share_their_source_and_the_source_is_read_once(kind: str, padded: bool):
    module = made()
    module.path = "cross"
    memory, x = noise(2, SOURCE, WIDTH, seed=1), noise(6, 4, WIDTH)
    tokens = plain(2, SOURCE)
    if padded:
        position = tokens.position.clone()
        position[1, :3] = HOLE
        tokens = Tokens(position, tokens.document)
    apart = Tokens(tokens.position.repeat_interleave(3, 0), tokens.document.repeat_interleave(3, 0), span=tokens.span)
    wide = memory.repeat_interleave(3, 0)
    record, expected = Record("cross.weights"), Record("cross.weights")
    whole = module(x, Call(tokens=plain(6, 4), memory=wide, memory_tokens=apart, record=expected))
    cache = Cache(kind, 6, 9)
    cache.add("cross", module.retained())
    first = Call(tokens=plain(6, 3), memory=memory, memory_tokens=tokens, cache=cache, record=record)
    torch.testing.assert_close(module(x[:, :3], first), whole[:, :3])
    torch.testing.assert_close(record.values["cross.weights"], expected.values["cross.weights"][:, :, :3])
    module.k.weight.zero_()  # nothing asks for keys any more
    later = Call(tokens=plain(6, 1, start=3), cache=cache)
    torch.testing.assert_close(module(x[:, 3:], later), whole[:, 3:])
    assert cache.slots["cross"].key is not None and cache.slots["cross"].key.shape == (2, 2, SOURCE, 6)


def test_gradients_reach_the_memory_and_a_gate_starts_at_nothing():
    step = StepSpec(name="cross", op=CrossAttentionSpec(heads=2, key_heads=2, head_dim=4), gate=True).build(WIDTH)
    memory, x = torch.randn(1, SOURCE, WIDTH, requires_grad=True), torch.randn(1, 3, WIDTH)
    call = Call(tokens=plain(1, 3), memory=memory, memory_tokens=plain(1, SOURCE))
    assert torch.equal(step(x, call), x)
    with torch.no_grad():
        step.gate.fill_(0.5)
        torch.testing.assert_close(step(x, call), x + step.op(x, call) * torch.tensor(0.5).tanh())
    step(x, call).sum().backward()
    assert memory.grad is not None and float(memory.grad.abs().min()) > 0 and float(step.gate.grad.abs()) > 0


def test_a_decoder_by_itself_leaves_the_step_out_and_the_layer_alone_says_what_it_lacks():
    step = StepSpec(name="cross", op=CrossAttentionSpec(heads=2, key_heads=2, head_dim=4), after=RMSNormSpec())
    x = torch.randn(1, 3, WIDTH)
    assert torch.equal(step.build(WIDTH)(x, Call(tokens=plain(1, 3))), x)
    with pytest.raises(LaminaError, match="no encoder output"):
        step.op.build(WIDTH)(x, Call(tokens=plain(1, 3)))  # pyright: ignore[reportAttributeAccessIssue]
    for wrong in ({"heads": 3}, {"head_dim": 0}, {"dropout": 2.0}):
        with pytest.raises(LaminaError):
            made(**wrong)
