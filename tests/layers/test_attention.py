"""The attention layer written out: projections, norms, phases, groups, and what it records."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.attend import Request
from lamina.layers import Call, Draw, LayerNormSpec, Record, RMSNormSpec, RotarySpec
from lamina.patterns import Causal, Everything, Window
from lamina.tokens import plain
from tests import small
from tests.oracle import ON_THE_CPU, attention, rope

CASES = {
    "plain": {},
    "many heads": {"key_heads": 4},
    "one key head": {"key_heads": 1},
    "wide heads": {"heads": 3, "key_heads": 3, "head_dim": 10},
    "biases on q, k, v": {"bias": "qkv"},
    "biases everywhere": {"bias": "all"},
    "interleaved": {"rotary": RotarySpec(base=50.0, interleaved=True)},
    "partial": {"rotary": RotarySpec(base=50.0, width=6)},
    "unscaled": {"scale": 1.0},
    "scaled": {"scale": 0.1},
    "soft-cap": {"softcap": 0.5},
    "sink": {"sink": True},
    "both ways": {"pattern": Everything()},
    "window": {"pattern": Causal() & Window(back=2)},
    "qk-norm": {"qk_norm": RMSNormSpec()},
    "qk-LayerNorm": {"qk_norm": LayerNormSpec(), "rotary": None},
    "everything": {"bias": "all", "softcap": 1.0, "sink": True, "qk_norm": RMSNormSpec(), "scale": 0.3},
    "dropout in evaluation": {"dropout": 0.9},
}


def naive(module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, width) -> (T, width)."""
    spec, length = module.spec, len(x)

    def project(layer, heads: int) -> Tensor:
        out = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        return torch.stack([out[:, h * spec.head_dim : (h + 1) * spec.head_dim] for h in range(heads)])

    def norm(t: Tensor, layer) -> Tensor:
        if isinstance(spec.qk_norm, RMSNormSpec):
            return t / (t.square().mean(-1, keepdim=True) + spec.qk_norm.eps).sqrt() * layer.weight
        centred = t - t.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + spec.qk_norm.eps).sqrt() * layer.weight + layer.bias

    query, key, value = (
        project(module.q, spec.heads),
        project(module.k, spec.key_heads),
        project(module.v, spec.key_heads),
    )
    if spec.qk_norm is not None:
        query, key = norm(query, module.q_norm), norm(key, module.k_norm)  # before the phases
    if spec.rotary is not None:
        turned = spec.rotary.width or spec.head_dim
        frequency = [spec.rotary.base ** (-2 * i / turned) for i in range(turned // 2)]
        query, key = (rope(t, list(range(length)), frequency, spec.rotary.interleaved) for t in (query, key))
    request = Request(
        query=query[None],
        key=key[None],
        value=value[None],
        queries=plain(1, length),
        keys=plain(1, length),
        pattern=spec.pattern,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        sink=module.sink,
        bias=bias,
    )
    out = torch.cat(list(attention(request)[0]), dim=-1)  # heads side by side
    return out @ module.o.weight.T + (0 if module.o.bias is None else module.o.bias)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_written_out(name: str):
    spec = small.attention(**{"rotary": RotarySpec(base=50.0)} | CASES[name])
    module = spec.build(12).double().eval()
    small.shake(module)
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = module(x, Call(tokens=plain(2, 6)))
    for row in range(2):
        torch.testing.assert_close(found[row], naive(module, x[row]), rtol=0, atol=5e-6)  # float32 phases
    bias = spec.bias
    assert [(layer.bias is not None) for layer in (module.q, module.k, module.v, module.o)] == [bias != "none"] * 3 + [
        bias == "all"
    ]


def test_a_bias_of_the_stack_is_added_to_the_scores():
    from lamina.layers import AlibiSpec, ShawSpec

    bias, tokens = AlibiSpec(heads=4).build(), plain(1, 6)
    x = torch.randn(1, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = small.attention().build(12).double()
    small.shake(module)
    found = module(x, Call(tokens=tokens, bias=bias))
    torch.testing.assert_close(found[0], naive(module, x[0], bias(tokens, tokens, {})), rtol=0, atol=1e-12)
    module = small.attention(relative=ShawSpec(clip=2, values=False)).build(12).double()  # beside one of its own
    small.shake(module)
    query = torch.stack((x @ module.q.weight.T)[0].split(8, dim=-1))[None]
    own = module.relative(query, tokens, tokens, 8**-0.5)[1]
    found = module(x, Call(tokens=tokens, bias=bias))
    both = own + bias(tokens, tokens, {})
    torch.testing.assert_close(found[0], naive(module, x[0], both), rtol=0, atol=1e-12)


def test_grouped_heads_are_many_heads_with_copies():
    grouped = small.attention(heads=6, key_heads=2).build(12).double()
    small.shake(grouped)
    many = small.attention(heads=6, key_heads=6).build(12).double()
    state = {name: value.clone() for name, value in grouped.state_dict().items()}
    for name in ("k.weight", "v.weight"):
        state[name] = state[name].view(2, 8, 12).repeat_interleave(3, dim=0).reshape(48, 12)
    many.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        grouped(x, Call(tokens=plain(2, 5))), many(x, Call(tokens=plain(2, 5))), rtol=0, atol=1e-13
    )


def test_without_positions_order_means_nothing():
    module = small.attention(pattern=Everything()).build(12).double()
    small.shake(module)
    x = torch.randn(1, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    found = module(x, Call(tokens=plain(1, 6)))
    torch.testing.assert_close(module(x[:, order], Call(tokens=plain(1, 6))), found[:, order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", [None, *ON_THE_CPU])
def test_dropout_is_on_in_training_and_off_in_evaluation(backend: str | None):
    module = small.attention(dropout=0.5).build(12).double()
    small.shake(module)
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        return module(x, Call(tokens=plain(2, 6), backend=backend))

    assert not torch.equal(run(), run())
    module.eval()
    assert torch.equal(run(), run())
    sure = small.attention().build(12).double()
    sure.load_state_dict(module.state_dict())
    assert torch.equal(run(), sure(x, Call(tokens=plain(2, 6), backend=backend)))
    module.train()
    module.spec = module.spec.replace(dropout=1.0)
    assert torch.equal(run(), torch.zeros_like(x))


def test_a_sink_takes_probability_from_the_others():
    module = small.attention(sink=True).build(12).double()
    small.shake(module)
    assert torch.equal(small.attention(sink=True).build(12).sink, torch.zeros(4))
    with torch.no_grad():
        module.sink.fill_(50.0)
    x = torch.randn(1, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert module(x, Call(tokens=plain(1, 4))).abs().max() < 1e-15
    module.initialise(Draw(torch.Generator()))
    assert torch.equal(module.sink, torch.zeros(4, dtype=torch.float64))


def test_recording_changes_no_bit_and_no_backend(monkeypatch: pytest.MonkeyPatch):
    from lamina.attend import sdpa

    model = small.build(small.decoder(small.MIXED), dtype=torch.float32)
    ids, mask = small.ids(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    calls = []
    attend = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda request: calls.append(1) or attend(request))
    expected = model(ids, mask)
    record = Record("decoder.layers.1.attention.op.weights", "*.output", "decoder.input")
    found = model(ids, mask, record=record)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.hidden, expected.hidden)
    assert len(calls) == 6
    assert set(record.values) == {
        "decoder.layers.1.attention.op.weights",
        "decoder.input",
        *(f"decoder.layers.{i}.output" for i in range(3)),
    }
    weights = record.values["decoder.layers.1.attention.op.weights"]
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weights[mask.bool()[:, None].expand(2, 4, 9)].sum(-1), torch.ones(60))
    assert (weights.triu(1) == 0).all() and (weights[0, :, :, :3] == 0).all() and (weights[0, :, :3] == 0).all()
    last = model.decoder.norm(record.values["decoder.layers.2.output"])
    assert torch.equal(last, expected.hidden)
    assert Record("a", "b.*").wants("b.c") and not Record("a").wants("b") and not Record().wants("a")
