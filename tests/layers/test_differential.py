"""Differential attention against the paper's formula, a head and a query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AlibiSpec,
    Call,
    DifferentialSpec,
    Draw,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    Record,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)
from lamina.layers.differential import start_at
from lamina.patterns import Causal, Everything, Pattern, Window
from lamina.tokens import plain
from tests import small
from tests.oracle import rope

WIDTH = 10
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared keys": {"heads": 6, "key_heads": 2},
    "one key head": {"key_heads": 1},
    "rotary": {"rotary": RotarySpec(base=50.0)},
    "interleaved": {"rotary": RotarySpec(base=50.0, interleaved=True)},
    "partial": {"rotary": RotarySpec(base=50.0, width=2)},
    "biases": {"bias": True},
    "scaled": {"scale": 0.9},
    "start": {"start": 0.2},
    "norm without weight": {"norm": RMSNormSpec(eps=0.1, weight=False)},
    "both ways": {"pattern": Everything()},
}


def differential(**fields: Any) -> DifferentialSpec:
    return DifferentialSpec(**{"heads": 3, "key_heads": 3, "head_dim": 4, "start": 0.6} | fields)


def module_of(spec: DifferentialSpec) -> Any:
    module = spec.build(WIDTH).double().eval()
    small.shake(module)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(module: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, width) -> (T, width) (arXiv:2410.05258, equations 1 to 3)."""
    spec, length, size = module.spec, len(x), module.spec.head_dim

    def project(layer: Any, heads: int) -> Tensor:
        out = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        return out.view(length, 2, heads, size)  # first and second; all heads in each

    query, key, value = (
        project(module.q, spec.heads),
        project(module.k, spec.key_heads),
        project(module.v, spec.key_heads),
    )
    if spec.rotary is not None:
        turned = spec.rotary.width or size
        frequency = [spec.rotary.base ** (-2 * i / turned) for i in range(turned // 2)]
        turn = lambda t: rope(t.flatten(1, 2).transpose(0, 1), list(range(length)), frequency, spec.rotary.interleaved)  # noqa: E731
        query, key = (turn(t).transpose(0, 1).view(t.shape) for t in (query, key))
    weight = math.exp(module.a1 @ module.b1) - math.exp(module.a2 @ module.b2) + spec.start
    scale = size**-0.5 if spec.scale is None else spec.scale
    rows = []
    for t in range(length):
        seen = length if spec.pattern == Everything() else t + 1
        out = []
        for h in range(spec.heads):
            g = h // (spec.heads // spec.key_heads)
            scores = [key[:seen, i, g] @ query[t, i, h] * scale for i in (0, 1)]
            scores = scores if bias is None else [one + bias[h, t, :seen] for one in scores]
            shares = scores[0].softmax(0) - weight * scores[1].softmax(0)
            mixed = shares @ torch.cat([value[:seen, 0, g], value[:seen, 1, g]], dim=-1)
            mixed = mixed / (mixed.square().mean() + spec.norm.eps).sqrt()
            mixed = mixed if module.norm.weight is None else mixed * module.norm.weight
            out.append(mixed * (1 - spec.start))
        rows.append(module.o.weight @ torch.cat(out) + (0 if module.o.bias is None else module.o.bias))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_the_paper_written_out(name: str, backend: str):
    module = module_of(differential(**CASES[name]))
    x = random(2, 6, WIDTH)
    found = module(x, Call(tokens=plain(2, 6), backend=backend))
    for row in range(2):
        torch.testing.assert_close(found[row], written_out(module, x[row]), rtol=0, atol=5e-6)  # float32 phases
    assert [part.bias is not None for part in (module.q, module.k, module.v, module.o)] == [module.spec.bias] * 4


@torch.no_grad()
def test_lambda_is_summed_wide_and_exact_in_float64():
    module, x = module_of(differential()), random(1, 5, WIDTH)
    torch.testing.assert_close(module(x, Call(tokens=plain(1, 5)))[0], written_out(module, x[0]), rtol=0, atol=1e-12)
    low = differential(head_dim=1000).build(WIDTH).to(torch.bfloat16)
    for vector, value in ((low.a1, 0.03125), (low.b1, 0.0625), (low.a2, 0.0), (low.b2, 0.0)):
        vector.fill_(value)
    assert float(low.mix()) == pytest.approx(math.exp(1000 * 0.03125 * 0.0625) - 1.0 + 0.6, rel=1e-6)


@torch.no_grad()
def test_a_bias_of_the_stack_is_added_to_both_maps():
    module, tokens, bias = module_of(differential()), plain(1, 6), AlibiSpec(heads=3).build()
    x = random(1, 6, WIDTH)
    found = module(x, Call(tokens=tokens, bias=bias))
    expected = written_out(module, x[0], bias(tokens, tokens, {}).expand(1, 3, 6, 6)[0])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


def test_what_is_recorded_are_both_maps():
    module, record = module_of(differential()), Record("*.weights")
    module(random(1, 5, WIDTH), Call(tokens=plain(1, 5), record=record))
    (shares,) = record.values.values()
    assert shares.shape == (1, 6, 5, 5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 6, 5, dtype=torch.float64))
    assert not torch.equal(shares[:, :3], shares[:, 3:])


def test_gradients_reach_everything():
    module, x = module_of(differential(bias=True)), random(1, 5, WIDTH).requires_grad_()
    (module(x, Call(tokens=plain(1, 5))) * random(1, 5, WIDTH, seed=1)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    for name in ("a1", "b2"):  # against a difference quotient
        vector, step, values = getattr(module, name), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                vector[2] += sign * step
                values.append(float((module(x, Call(tokens=plain(1, 5))) * random(1, 5, WIDTH, seed=1)).sum()))
                vector[2] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(vector.grad[2]), rel=1e-5)


def model_of(pattern: Pattern) -> lamina.ModelSpec:
    layers = tuple(
        LayerSpec(
            steps=(
                StepSpec(
                    name="attention",
                    op=differential(
                        heads=4, key_heads=2, rotary=RotarySpec(base=50.0), pattern=pattern, start=start_at(depth)
                    ),
                    pre=RMSNormSpec(),
                ),
                StepSpec(name="feedforward", op=FeedForwardSpec(hidden=24), pre=RMSNormSpec()),
            )
        )
        for depth in range(2)
    )
    stack, embedding = StackSpec(layers=layers, norm=RMSNormSpec()), EmbeddingSpec(vocabulary=small.VOCABULARY)
    return lamina.ModelSpec(width=WIDTH, embedding=embedding, decoder=stack, head=LanguageHeadSpec(), context=64)


@pytest.mark.parametrize("pattern", [Causal(), Causal() & Window(back=4)], ids=["causal", "window"])
def test_in_a_model_everything_that_always_holds_does(pattern: Pattern):
    """Every kind of cache in any split, padding, packing, causality to the bit, backends, files."""
    report = lamina.verify(small.build(model_of(pattern)))
    assert report.passed, str(report)
    tried = {row.property for row in report.rows if row.verdict == "holds"}
    kinds = {"auto", "growing", "fixed", "sinks"} | ({"ring"} if pattern != Causal() else set())
    assert tried >= {f"cached decoding = the whole text, cache '{kind}'" for kind in kinds}
    assert {"NaN in keys that nobody sees does not leak", "packed = alone", "backends agree"} <= tried


@torch.no_grad()
def test_lambda_starts_where_the_paper_says():
    """0.8 - 0.6 exp(-0.3 depth), depth from 0: 0.2, 0.36, 0.47, ..., 0.8."""
    assert [round(start_at(depth), 2) for depth in (0, 1, 2, 30)] == [0.2, 0.36, 0.47, 0.8]
    module = differential(head_dim=500).build(WIDTH)
    module.initialise(Draw(torch.Generator().manual_seed(0)))
    for vector in (module.a1, module.b1, module.a2, module.b2):
        assert 0.09 < float(vector.std()) < 0.11
    assert abs(float(module.mix()) - 0.6) < 0.9


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"key_heads": 2}, "heads=3 must be a multiple of key_heads=2"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"rotary": RotarySpec(width=6)}, "rotary.width=6 must be even and at most head_dim=4"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(LaminaError, match=message):
        differential(**fields)


def test_what_sees_later_tokens_has_no_cache():
    with pytest.raises(UnsupportedError, match="its tokens see later ones"):
        model_of(Everything()).build().new_cache()
