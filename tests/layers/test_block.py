"""Residual wiring: every published placement of norms, written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers import (
    BranchSpec,
    Call,
    FeedForwardSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    Record,
    RMSNormSpec,
    SegmentSpec,
    StackSpec,
    StepSpec,
    SumSpec,
)
from lamina.patterns import Causal
from lamina.tokens import plain
from tests import small

NORM = LayerNormSpec(eps=1e-3)
ATTENTION, FEED = small.attention(), FeedForwardSpec(hidden=12)


def call() -> Call:
    return Call(tokens=plain(2, 5))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def made(spec) -> nn.Module:
    module = spec.build(16).double().eval()
    small.shake(module)
    return module


STEPS = {
    "bare": ({}, lambda m, x: x + m.op(x, call())),
    "pre-norm": ({"pre": NORM}, lambda m, x: x + m.op(m.pre(x), call())),
    "post-norm": ({"after": NORM}, lambda m, x: m.after(x + m.op(x, call()))),
    "sandwich": ({"pre": NORM, "post": NORM}, lambda m, x: x + m.post(m.op(m.pre(x), call()))),
    "output-only": ({"post": NORM}, lambda m, x: x + m.post(m.op(x, call()))),
    "DeepNorm": ({"after": NORM, "residual": 2.5}, lambda m, x: m.after(2.5 * x + m.op(x, call()))),
    "all": (
        {"pre": NORM, "post": NORM, "after": NORM, "residual": 0.5},
        lambda m, x: m.after(0.5 * x + m.post(m.op(m.pre(x), call()))),
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("op", [ATTENTION, FEED])
def test_steps(name: str, op):
    fields, formula = STEPS[name]
    module, x = made(StepSpec(name="attention", op=op, **fields)), random(2, 5, 16)
    torch.testing.assert_close(module(x, call()), formula(module, x), rtol=0, atol=1e-13)
    for norm in ("pre", "post", "after"):
        assert (getattr(module, norm) is not None) == (norm in fields)


def test_parallel_branches_with_one_norm_and_with_two():
    x = random(2, 5, 16)
    shared = SumSpec(branches=(BranchSpec(name="attention", op=ATTENTION), BranchSpec(name="feedforward", op=FEED)))
    palm = made(StepSpec(name="parallel", op=shared, pre=NORM))
    branches, h = palm.op.branches, palm.pre(x)
    expected = x + branches["attention"].op(h, call()) + branches["feedforward"].op(h, call())
    torch.testing.assert_close(palm(x, call()), expected, rtol=0, atol=1e-13)
    both = tuple(
        BranchSpec(name=name, op=op, pre=NORM) for name, op in (("attention", ATTENTION), ("feedforward", FEED))
    )
    neox = made(StepSpec(name="parallel", op=SumSpec(branches=both)))
    a, f = neox.op.branches["attention"], neox.op.branches["feedforward"]
    expected = x + a.op(a.pre(x), call()) + f.op(f.pre(x), call())
    torch.testing.assert_close(neox(x, call()), expected, rtol=0, atol=1e-13)
    one = made(SumSpec(branches=both[:1]))
    torch.testing.assert_close(one(x, call()), one.branches["attention"](x, call()))


def test_zero_output_projections_leave_the_identity():
    x = random(2, 5, 16)
    pre = (StepSpec(name="attention", op=ATTENTION, pre=NORM), StepSpec(name="feedforward", op=FEED, pre=NORM))
    sums = tuple(BranchSpec(name=name, op=op) for name, op in (("a", ATTENTION), ("f", FEED)))
    for steps in (pre, (StepSpec(name="parallel", op=SumSpec(branches=sums), pre=NORM),)):
        layer = made(LayerSpec(steps=steps))
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith(("op.o.weight", "op.down.weight")):
                    parameter.zero_()
        assert torch.equal(layer(x, call()), x)
    post = made(StepSpec(name="feedforward", op=FEED, after=NORM))
    with torch.no_grad():
        post.op.down.weight.zero_()
    torch.testing.assert_close(post(x, call()), post.after(x))  # post-norm is then exactly its norm


def test_steps_follow_one_another():
    spec = LayerSpec(steps=(StepSpec(name="b", op=FEED, pre=NORM), StepSpec(name="a", op=FEED, after=NORM)))
    layer, x = made(spec), random(2, 5, 16)
    assert list(layer) == ["b", "a"]
    torch.testing.assert_close(layer(x, call()), layer["a"](layer["b"](x, call()), call()))


@dataclass(frozen=True, kw_only=True)
class OnesSpec(type(FEED).__mro__[1]):  # an operation that gives ones, to see what happens to it
    def build(self, width: int) -> nn.Module:
        return Ones()


class Ones(nn.Module):
    def forward(self, x: Tensor, call: Call) -> Tensor:
        return torch.ones_like(x)


def test_dropout_is_on_the_output_of_the_operation():
    """Before the residual, after the post norm (a norm would undo its scale), and not on the stream."""
    x = torch.full((50, 20, 16), 5.0)
    torch.manual_seed(0)
    step = StepSpec(name="a", op=OnesSpec(), dropout=0.2).build(16)
    out = step(x, call()) - 5
    assert out.unique().tolist() == pytest.approx([0.0, 1.25], abs=1e-6)
    assert abs((out == 0).float().mean().item() - 0.2) < 5 * (0.16 / out.numel()) ** 0.5
    assert torch.equal(step.eval()(x, call()), x + 1)
    normed = StepSpec(name="a", op=OnesSpec(), post=LayerNormSpec(), dropout=0.2).build(16)
    with torch.no_grad():
        normed.post.bias.fill_(1.0)  # a norm of ones gives its bias
    assert (normed(x, call()) - 5).unique().tolist() == pytest.approx([0.0, 1.25], abs=1e-6)
    branch = StepSpec(name="a", op=OnesSpec(), drop_branch=0.5).build(16)
    out = branch(x, call()) - 5
    assert out.unique().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))  # rows as a whole
    assert torch.equal(branch.eval()(x, call()), x + 1)


def test_dropout_of_branches_is_drawn_for_each():
    x = torch.full((50, 20, 16), 5.0)
    torch.manual_seed(0)
    branches = tuple(BranchSpec(name=name, op=OnesSpec(), dropout=0.2) for name in "ab")
    step = StepSpec(name="parallel", op=SumSpec(branches=branches)).build(16)
    out = step(x, call()) - 5
    assert out.unique().tolist() == pytest.approx([0.0, 1.25, 2.5], abs=1e-6)  # one of the two may be dropped alone
    assert torch.equal(step.eval()(x, call()), x + 2)
    with pytest.raises(LaminaError, match="dropout=2.0 of the branch 'a' must lie within 0 and 1"):
        BranchSpec(name="a", op=FEED, dropout=2.0)


def stack(**fields) -> tuple[nn.Module, Tensor]:
    layers = (LayerSpec(steps=(StepSpec(name="feedforward", op=FEED, pre=RMSNormSpec()),)),) * 2
    return made(StackSpec(layers=layers, **fields)), random(2, 5, 16)


def test_a_stack_is_its_parts_in_order():
    parts = {
        "position": LearnedPositionSpec(size=9),
        "segment": SegmentSpec(count=2),
        "input_norm": NORM,
        "norm": RMSNormSpec(),
    }
    module, x = stack(**parts)
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    for given in (segments, None):
        told = torch.zeros_like(segments) if given is None else given
        h = x + module.segment.weight[told] + module.position.weight[:5]
        h = module.input_norm(h)
        for layer in module.layers:
            h = layer(h, call())
        torch.testing.assert_close(module(x, call(), given), module.norm(h), rtol=0, atol=1e-13)
    bare, x = stack()
    torch.testing.assert_close(bare(x, call()), bare.layers[1](bare.layers[0](x, call()), call()))


def test_a_stack_drops_its_input_and_its_output():
    for field in ("dropout", "output_dropout"):
        module, x = stack(**{field: 1.0}, norm=RMSNormSpec(), position=LearnedPositionSpec(size=9))
        record = Record("input")
        out = module.train()(x, Call(tokens=plain(2, 5), record=Record(".input")))
        assert torch.equal(out, torch.zeros_like(out))  # nothing in: no layer adds anything to zero here
        assert module.eval()(x, call()).abs().sum() > 0 and not record.values
    module, x = stack(dropout=1.0, position=LearnedPositionSpec(size=9))
    record = Record(".input")
    module.train()(x, Call(tokens=plain(2, 5), record=record))
    assert torch.equal(record.values[".input"], torch.zeros_like(x))  # of the sum, positions included


def test_a_bias_on_the_scores_is_shared_by_all_layers():
    from lamina.layers import AlibiSpec, BucketBiasSpec

    for bias in (BucketBiasSpec(heads=4, buckets=8, distance=9), AlibiSpec(heads=4)):
        step = StepSpec(name="attention", op=small.attention(pattern=Causal()), pre=RMSNormSpec())
        module = made(StackSpec(layers=(LayerSpec(steps=(step,)),) * 2, score_bias=bias))
        x = random(2, 5, 16)
        h = x
        for layer in module.layers:
            h = layer(h, Call(tokens=plain(2, 5), bias=module.score_bias))
        torch.testing.assert_close(module(x, call()), h, rtol=0, atol=1e-13)
        assert not torch.allclose(module.layers[1](module.layers[0](x, call()), call()), h)


def test_training_leaves_each_run_of_a_layer_out_by_itself():
    """LayerDrop (arXiv:1909.11556): of layers that add 1, 2 and 4 a forward keeps any sum of some of them."""
    layers = tuple(LayerSpec(steps=(StepSpec(name="feedforward", op=FEED),)) for _ in range(3))
    module = made(StackSpec(layers=layers, layer_dropout=0.3))
    x = random(2, 5, 16)
    for index, layer in enumerate(module.layers):  # pyright: ignore
        layer.forward = lambda x, call, index=index: x + 2**index
    torch.manual_seed(0)
    module.train()
    found = [float((module(x, call()) - x).mean().round()) for _ in range(2000)]
    for kept in range(8):
        count = bin(kept).count("1")
        chance = 0.7**count * 0.3 ** (3 - count)
        assert found.count(kept) / 2000 == pytest.approx(chance, abs=5 * 0.5 / 2000**0.5)
    assert float((module.eval()(x, call()) - x).mean().round()) == 7
    with pytest.raises(LaminaError, match="layer_dropout=1.0 must be from 0 to below 1"):
        StackSpec(layers=layers, layer_dropout=1.0)
