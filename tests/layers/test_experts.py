"""Mixtures of experts against their formulas, a token at a time; capacities against a loop; losses against sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError
from lamina.layers import (
    AttentionSpec,
    Call,
    CapacitySpec,
    EmbeddingSpec,
    ExpertChoiceSpec,
    Experts,
    ExpertsSpec,
    FeedForwardSpec,
    GroupLimitSpec,
    LanguageHeadSpec,
    LayerSpec,
    Record,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    StepSpec,
    TopKSpec,
    rebalance,
)
from lamina.layers.dispatch import Groups, product
from lamina.layers.experts import Networks
from lamina.layers.feedforward import ACTIVATIONS
from lamina.patterns import Everything
from lamina.tokens import HOLE, Tokens, plain
from tests.small import shake

WIDTH, EXPERTS = 6, 5
EXPERT = FeedForwardSpec(hidden=7)


def built(router: Any = None, expert: FeedForwardSpec = EXPERT, **more: Any) -> Experts:
    spec = ExpertsSpec(router=router or TopKSpec(experts=EXPERTS), expert=expert, **more)
    module = spec.build(WIDTH).double().eval()
    shake(module)
    module.path = "decoder.layers.0.feedforward.op"
    return module


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def holes(mask: list[list[int]]) -> Tokens:
    """Tokens where the mask is 1, and padding elsewhere."""
    real = torch.tensor(mask)
    position = torch.where(real.bool(), real.cumsum(1) - 1, HOLE)
    return Tokens(position, torch.zeros_like(position))


def network(module: Experts, e: int, x: Tensor) -> Tensor:
    """F_e(x) for one token."""
    parts = module.experts

    def matrix(part: Any, h: Tensor) -> Tensor:
        return part.weight[e] @ h + (0 if part.bias is None else part.bias[e])

    h = matrix(parts.up, x)
    act = ACTIVATIONS[module.spec.expert.act]
    return matrix(parts.down, act(h) if parts.gate is None else act(matrix(parts.gate, x)) * h)


def gates(module: Experts, x: Tensor) -> dict[int, Tensor]:
    """Expert -> gate for one token, as the papers have it."""
    spec, router = module.spec.router, module.router
    assert isinstance(spec, TopKSpec)
    logits = router.weight @ x + (0 if router.bias is None else router.bias)
    scores = logits.softmax(0) if spec.score == "softmax" else 1 / (1 + (-logits).exp())
    choice = (scores if router.correction is None else scores + router.correction).tolist()
    allowed = list(range(spec.experts))
    if spec.limit is not None:
        size = spec.experts // spec.limit.groups
        members = [allowed[g * size : (g + 1) * size] for g in range(spec.limit.groups)]
        members.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[: spec.limit.best]))  # pyright: ignore
        allowed = [e for group in members[: spec.limit.kept] for e in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: spec.chosen]
    total = sum(scores[e] for e in chosen) if spec.normalise else 1
    return {e: spec.scale * scores[e] / total for e in chosen}


def formula(module: Experts, x: Tensor) -> Tensor:
    y = sum(gate * network(module, e, x) for e, gate in gates(module, x).items())
    if module.shared is not None:
        common = module.shared(x[None, None], Call(tokens=plain(1, 1)))[0, 0]
        y = y + common * (1 if module.shared_gate is None else module.shared_gate(x).sigmoid())
    return y  # pyright: ignore[reportReturnType]


ROUTERS = {
    "mixtral": TopKSpec(experts=EXPERTS),
    "switch": TopKSpec(experts=EXPERTS, chosen=1, normalise=False, jitter=0.01),
    "qwen2": TopKSpec(experts=EXPERTS, chosen=3, normalise=False),
    "biased": TopKSpec(experts=EXPERTS, bias=True),
    "all": TopKSpec(experts=EXPERTS, chosen=EXPERTS),
    "noisy": TopKSpec(experts=EXPERTS, noise=True),
    "deepseek2": TopKSpec(
        experts=6, chosen=2, normalise=False, scale=16.0, limit=GroupLimitSpec(groups=3, kept=1)
    ),
    "deepseek3": TopKSpec(
        experts=6, chosen=3, score="sigmoid", scale=2.5, correction=True,
        limit=GroupLimitSpec(groups=3, kept=2, best=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    "more",
    [{}, {"expert": FeedForwardSpec(hidden=7, act="relu", gated=False, bias=True)}, {"shared": EXPERT},
     {"shared": FeedForwardSpec(hidden=3), "shared_gate": True}],
    ids=["gated", "plain", "shared", "gated-shared"],
)  # fmt: skip
def test_the_formula(name: str, more: dict[str, Any]):
    module = built(ROUTERS[name], **more)
    x = some(2, 9, WIDTH)
    out = module(x, Call(tokens=plain(2, 9)))
    for one, found in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        torch.testing.assert_close(found, formula(module, one), rtol=0, atol=1e-12)


def test_the_correction_and_the_groups_choose_otherwise_than_the_scores():
    """Else the test above would not notice them."""
    x = some(40, WIDTH)
    for name in ("deepseek2", "deepseek3"):
        module = built(ROUTERS[name])
        free = built(ROUTERS[name].replace(limit=None, correction=False))
        free.router.weight = module.router.weight
        assert any(set(gates(module, one)) != set(gates(free, one)) for one in x)


def test_one_expert_is_the_dense_network():
    for normalise in (True, False):
        module = built(TopKSpec(experts=1, chosen=1, normalise=normalise))
        dense = dense_of(module)
        x, call = some(1, 4, WIDTH), Call(tokens=plain(1, 4))
        torch.testing.assert_close(module(x, call), dense(x, call), rtol=0, atol=1e-12)


def test_equal_experts_with_gates_that_sum_to_one_are_the_dense_network():
    module = built(TopKSpec(experts=EXPERTS, chosen=3))
    with torch.no_grad():
        for part in (module.experts.gate, module.experts.up, module.experts.down):
            assert part is not None
            part.weight[:] = part.weight[:1].clone()
    x, call = some(2, 4, WIDTH), Call(tokens=plain(2, 4))
    torch.testing.assert_close(module(x, call), dense_of(module)(x, call), rtol=0, atol=1e-12)


def dense_of(module: Experts) -> Any:
    """The first expert by itself."""
    dense = module.spec.expert.build(WIDTH).double()
    dense.load_state_dict({name: tensor[0] for name, tensor in module.experts.state_dict().items()})
    return dense


# Products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [6, 8])  # torch's grouped product takes widths of 16 bytes only
@pytest.mark.parametrize("way", ["ends", "each"])
def test_all_products_agree_with_their_gradients(way: str, bias: bool, width: int):
    sizes = [3, 0, 4, 1, 0]
    expert = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(sizes))
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    ways = {"ends": Groups(ends=ends, expert=expert), "each": Groups(each=expert)}
    results = []
    for groups in (Groups(sizes=sizes, expert=expert), ways[way]):
        x, weight, shift = (
            some(*shape, seed=n).float().requires_grad_()
            for n, shape in enumerate([(8, width), (EXPERTS, 12, width), (EXPERTS, 12)])
        )
        y = product(x, weight, shift if bias else None, groups)
        (y * some(*y.shape, seed=9).float()).sum().backward()
        results.append([y, x.grad, weight.grad, *([shift.grad] if bias else [])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert float(results[0][2][1].abs().max()) == 0  # an expert without tokens: zeros, which all ranks can add up


def test_the_gradients_of_the_product_are_those_of_differences():
    sizes = [2, 0, 3]
    x, weight = some(5, 3).requires_grad_(), some(3, 2, 3, seed=1).requires_grad_()
    groups = Groups(sizes=sizes)
    assert torch.autograd.gradcheck(lambda x, weight: product(x, weight, None, groups), (x, weight))


def test_an_exported_layer_gives_the_same_where_there_is_padding_too():
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = built(expert=FeedForwardSpec(hidden=7, bias=True))

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return self.layer(x, Call(tokens=Tokens(position, torch.zeros_like(position))))

    module, x = One().eval(), some(1, 3, WIDTH)
    position = torch.tensor([[HOLE, 0, 1]])
    with torch.no_grad():
        program = torch.export.export(module, (x, position), strict=False)
        torch.testing.assert_close(program.module()(x, position), module(x, position), rtol=0, atol=1e-12)


def test_nothing_but_padding_gives_zeros_and_no_nan():
    module = built(losses=RouterLossSpec(balance=0.1, z=0.1, each_row=True, importance=0.1))
    x = some(2, 3, WIDTH).requires_grad_()
    call = Call(tokens=holes([[0, 0, 0], [0, 0, 0]]))
    out = module(x, call)
    assert float(out.detach().abs().max()) == 0
    (out.sum() + sum(call.record.losses.values())).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) == 0, name


@pytest.mark.parametrize(
    "tokens", [plain(2, 6), holes([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]])], ids=["plain", "padded"]
)
def test_a_device_that_must_not_wait_gives_the_same(tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    results = []
    for waits in (True, False):
        monkeypatch.setattr("lamina.layers.dispatch._waits", lambda x, waits=waits: waits)
        torch.manual_seed(0)
        module = ExpertsSpec(
            router=TopKSpec(experts=EXPERTS),
            expert=FeedForwardSpec(hidden=12, bias=True),
            capacity=CapacitySpec(training=0.9),
        ).build(8)
        shake(module)
        x = some(2, 6, 8).float().requires_grad_()
        filled = torch.full((64, 64), torch.nan)  # what freed memory may hold
        del filled
        out = module(x, Call(tokens=tokens))
        (out * some(2, 6, 8, seed=3).float()).sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_token_is_routed_by_itself():
    """Neither padding, nor other rows, nor how many tokens come at once change what a token gets."""
    module = built(TopKSpec(experts=EXPERTS, chosen=1, normalise=False), capacity=CapacitySpec(training=0.01, least=1))
    x = some(2, 7, WIDTH)
    whole = module(x, Call(tokens=plain(2, 7)))
    steps = [module(x[:, t : t + 1], Call(tokens=plain(2, 1, start=t))) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-12)
    padded = module(x, Call(tokens=holes([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])))
    torch.testing.assert_close(padded[0, 2:], whole[0, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[1, :4], whole[1, :4], rtol=0, atol=1e-12)
    assert not padded[0, :2].any() and not padded[1, 4:].any()


def test_the_router_counts_in_float32_whatever_the_weights_are():
    module = built().bfloat16()
    x = some(1, 5, WIDTH).bfloat16()
    routing = module.router(x, Call(tokens=plain(1, 5)))
    assert routing.logits.dtype == routing.gate.dtype == torch.float32
    exact = x.float() @ module.router.weight.float().t()
    assert torch.equal(routing.logits, exact[0])
    assert module(x, Call(tokens=plain(1, 5))).dtype == torch.bfloat16


# Capacity


def places(
    module: Experts, x: Tensor, mask: Tensor, spec: CapacitySpec, factor: float, draw: float | None = None
) -> Tensor:
    """The layer by a loop: choices queue in the order of tokens, or of the probability of their first choice, all first
    choices before the second ones. `draw`: what every chance is, where second choices are lost by chance."""
    out = torch.zeros_like(x)
    rows = list(range(len(x)))
    for group in [[row] for row in rows] if spec.group == "row" else [rows]:
        tokens = [(row, t) for row in group for t in range(x.shape[1]) if mask[row, t]]
        most = factor if spec.places else max(spec.least, round(factor * len(tokens) / EXPERTS))
        taken = [0] * EXPERTS
        chosen = {place: list(gates(module, x[place]).items()) for place in tokens}
        shares = {place: (module.router.weight.detach() @ x[place]).softmax(0) for place in tokens}
        left: dict[Any, dict[int, Tensor]] = {place: {} for place in tokens}
        if spec.certain_first:
            tokens.sort(key=lambda place: -float(shares[place].max()))
        for turn in range(2):
            for place in tokens:
                if turn < len(chosen[place]):
                    e, gate = chosen[place][turn]
                    if turn and draw is not None and spec.second is not None:
                        chance = shares[place][e] if spec.normalise else gate
                        if draw >= float(chance) / spec.second:
                            continue
                    taken[e] += 1
                    if taken[e] <= most:
                        left[place][e] = gate
        for place, kept in left.items():
            more = sum(gate for _, gate in chosen[place]) / sum(kept.values()) if spec.normalise and kept else 1
            out[place] = sum((gate * more * network(module, e, x[place]) for e, gate in kept.items()), out[place])
    return out


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [CapacitySpec(training=1.0, least=0), CapacitySpec(training=0.6, evaluation=1.3, least=1),
     CapacitySpec(training=2.0, evaluation=3.0, places=True), CapacitySpec(training=0.7, least=0, group="batch"),
     CapacitySpec(training=0.1, least=2),
     CapacitySpec(training=0.7, evaluation=1.1, least=0, certain_first=True),
     CapacitySpec(training=0.8, evaluation=1.2, least=0, normalise=True),
     CapacitySpec(training=6, evaluation=7, places=True, group="batch", certain_first=True, normalise=True)],
    ids=["factor", "both", "places", "batch", "least", "certain", "normalised", "nllb"],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_beyond_a_capacity_gets_nothing(spec: CapacitySpec, chosen: int, padded: bool):
    module = built(TopKSpec(experts=EXPERTS, chosen=chosen), capacity=spec)
    x = some(3, 12, WIDTH)
    mask = torch.ones(3, 12, dtype=torch.int64)
    if padded:
        mask[0, :5] = mask[1, 7:] = 0
    tokens = holes(mask.tolist()) if padded else plain(3, 12)
    free = built(TopKSpec(experts=EXPERTS, chosen=chosen))(x, Call(tokens=tokens))
    for training, factor in ((True, spec.training), (False, spec.evaluation)):
        out = module.train(training)(x, Call(tokens=tokens))
        expected = free if factor is None else places(module, x, mask, spec, factor)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert factor is None or not torch.allclose(expected, free)  # it binds


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("draw", [0.1, 0.5, 0.8])
def test_a_second_choice_that_is_lost_leaves_its_gate_to_the_first_where_gates_are_normalised(
    normalise: bool, draw: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, draw))
    spec = CapacitySpec(training=1.2, least=0, second=0.5, normalise=normalise)
    module = built(capacity=spec).train()
    module.requires_grad_(False)
    x, mask = some(2, 12, WIDTH), torch.ones(2, 12)
    out = module(x, Call(tokens=plain(2, 12)))
    torch.testing.assert_close(out, places(module, x, mask, spec, 1.2, draw), rtol=0, atol=1e-12)
    assert not torch.allclose(out, places(module, x, mask, spec, 1.2))  # some are lost


def test_gates_are_normalised_to_what_they_were():
    """So that a scale of the router stays."""
    spec = CapacitySpec(training=0.8, least=0, normalise=True)
    one, other = (built(TopKSpec(experts=EXPERTS, scale=scale), capacity=spec).train() for scale in (1.0, 2.5))
    x, call = some(1, 12, WIDTH), Call(tokens=plain(1, 12))
    torch.testing.assert_close(2.5 * one(x, call), other(x, call), rtol=0, atol=1e-12)


def test_choices_after_the_first_are_drawn_in_training():
    module = built(TopKSpec(experts=EXPERTS, chosen=2, drawn=True)).train()
    p = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:, 0] = p.log()
    x = torch.zeros(1, 20_000, WIDTH, dtype=torch.float64)
    x[..., 0] = 1.0
    torch.manual_seed(0)
    call = Call(tokens=plain(1, 20_000))
    expert = module.router(x, call).expert.view(-1, 2)
    assert (expert[:, 0] == 1).all()
    share = torch.bincount(expert[:, 1], minlength=EXPERTS) / 20_000
    expected = p.index_fill(0, torch.tensor(1), 0.0) / 0.6
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=5 * 0.5 / 20_000**0.5)
    assert (module.eval().router(x, call).expert.view(-1, 2) == torch.tensor([1, 3])).all()


def test_results_are_masked_by_pair_in_training_and_made_smaller_in_evaluation():
    """NLLB's expert output masking: each of two results is lost for itself, and none is enlarged for it."""
    masked, whole = built(masked=0.3), built()
    x, call = some(1, 1, WIDTH).expand(1, 3000, WIDTH), Call(tokens=plain(1, 3000))
    with torch.no_grad():
        torch.testing.assert_close(masked(x, call), 0.7 * whole(x, call), rtol=0, atol=1e-12)
        torch.manual_seed(0)
        out = masked.train()(x, call)[0]
        one, two = (gate * network(whole, e, x[0, 0]) for e, gate in gates(whole, x[0, 0]).items())
    for result, chance in ((0 * one, 0.09), (one, 0.21), (two, 0.21), (one + two, 0.49)):
        share = torch.isclose(out, result, rtol=0, atol=1e-12).all(1).double().mean()
        assert float(share) == pytest.approx(chance, abs=5 * 0.5 / 3000**0.5)


def test_a_second_choice_is_kept_by_chance_and_leaves_its_place_to_others():
    module = built(capacity=CapacitySpec(training=1000.0, second=0.2)).train()
    with torch.no_grad():
        module.router.weight[:] = 0
        module.router.weight[0, 0], module.router.weight[1, 0] = 20.0, 20.0 + math.log(0.1 / 0.9)  # gates 0.9 and 0.1
    x = some(1, 4000, WIDTH) * 0
    x[..., 0] = 1.0
    torch.manual_seed(0)
    record = Record("*.used", "*.load")
    module(x, Call(tokens=plain(1, 4000), record=record))
    load, used = record.values[f"{module.path}.load"], record.values[f"{module.path}.used"]
    assert load.tolist() == [4000, 4000, 0, 0, 0]
    assert used[0] == 4000 and abs(int(used[1]) - 2000) < 5 * (4000 * 0.25) ** 0.5  # 0.1 / 0.2
    module.eval()
    record = Record("*.used")
    module(x, Call(tokens=plain(1, 4000), record=record))
    assert record.values[f"{module.path}.used"].tolist() == [4000, 4000, 0, 0, 0]


def test_a_first_choice_is_kept_however_small_its_gate_is():
    module = built(
        TopKSpec(experts=EXPERTS, normalise=False), capacity=CapacitySpec(training=1000.0, second=1.0)
    ).train()
    with torch.no_grad():
        module.router.weight.zero_()  # every gate is 0.2
    record = Record("*.used")
    module(some(1, 500, WIDTH), Call(tokens=plain(1, 500), record=record))
    used = int(record.values[f"{module.path}.used"].sum())
    assert abs(used - 600) < 5 * (500 * 0.16) ** 0.5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [3, 40])  # by the kernel for few rows, and by oneDNN
def test_without_a_gradient_the_numbers_are_the_same(gated: bool, rows: int):
    spec = ExpertsSpec(router=TopKSpec(experts=3), expert=FeedForwardSpec(hidden=64, gated=gated, bias=True))
    module = spec.build(32)
    shake(module)
    x, call = some(1, rows, 32).float(), Call(tokens=plain(1, rows))
    out = module(x, call).detach()
    with torch.no_grad():
        torch.testing.assert_close(module(x, call), out, rtol=1e-5, atol=1e-5)


def test_jitter_is_of_the_router_and_of_training_alone():
    module = built(TopKSpec(experts=EXPERTS, chosen=EXPERTS, jitter=0.5))
    x, call = some(1, 6, WIDTH), Call(tokens=plain(1, 6))
    quiet = module.router(x, call).logits
    module.train()
    torch.manual_seed(1)
    logits = module.router(x, call).logits
    torch.manual_seed(1)
    factor = torch.empty(6, WIDTH, dtype=torch.float64).uniform_(0.5, 1.5)
    torch.testing.assert_close(logits, (x[0] * factor) @ module.router.weight.t(), rtol=0, atol=1e-12)
    assert not torch.allclose(logits, quiet)
    with torch.no_grad():
        module.router.weight[:] = 0  # then every gate is 1 / E whatever the jitter, and the experts see x itself
    out = module(x, call)
    assert torch.equal(out, module.eval()(x, call))


def test_noise_is_of_training_alone_and_as_published():
    module = built(TopKSpec(experts=EXPERTS, noise=True))
    x, call = some(1, 6, WIDTH), Call(tokens=plain(1, 6))
    clean = module.router(x, call).logits
    module.train()
    torch.manual_seed(2)
    noisy = module.router(x, call).logits
    torch.manual_seed(2)
    normal = torch.randn(6, EXPERTS, dtype=torch.float64)
    spread = torch.log(1 + torch.exp(x[0] @ module.router.noise.t()))  # pyright: ignore
    torch.testing.assert_close(noisy, clean + normal * spread, rtol=0, atol=1e-12)


# Losses


def losses(module: Experts, x: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    call = Call(tokens=tokens)
    module(x, call)
    return {name.removeprefix(f"{module.path}."): value for name, value in call.record.losses.items()}


MASKS = {"plain": None, "padded": [[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("choices", ["all", "first", "mean"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss(mask: str, each_row: bool, choices: Any, score: Any):
    spec = RouterLossSpec(balance=0.3, choices=choices, each_row=each_row, z=0.2)
    module = built(TopKSpec(experts=EXPERTS, score=score), losses=spec)
    x, given = some(2, 6, WIDTH), MASKS[mask]
    found = losses(module, x, plain(2, 6) if given is None else holes(given))
    real = torch.ones(2, 6) if given is None else torch.tensor(given)
    rows = [[(b, t) for t in range(6) if real[b, t]] for b in range(2)]
    parts = rows if each_row else [rows[0] + rows[1]]
    balance = 0.0
    for part in parts:
        for e in range(EXPERTS):
            f = mean = 0.0
            for place in part:
                logits = module.router.weight.detach() @ x[place]
                p = logits.softmax(0) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum()
                chosen = list(gates(module, x[place]))
                f += sum(one == e for one in (chosen[:1] if choices == "first" else chosen)) / len(part)
                mean += float(p[e]) / len(part)
            balance += EXPERTS * f * mean / len(parts) / (2 if choices == "mean" else 1)
    assert found["balance"].item() == pytest.approx(0.3 * balance, abs=1e-12)
    places = rows[0] + rows[1]
    z = sum(float((module.router.weight.detach() @ x[place]).logsumexp(0)) ** 2 for place in places) / len(places)
    assert found["z"].item() == pytest.approx(0.2 * z, abs=1e-12)


def test_an_even_router_has_the_smallest_balance_loss_and_f_is_constant():
    module = built(TopKSpec(experts=EXPERTS, chosen=1), losses=RouterLossSpec(balance=0.01))
    even = torch.eye(EXPERTS, WIDTH, dtype=torch.float64)[None]  # each token for an expert of its own
    with torch.no_grad():
        module.router.weight.copy_(1e-9 * torch.eye(EXPERTS, WIDTH))
    found = losses(module, even, plain(1, EXPERTS))
    assert found["balance"].item() == pytest.approx(0.01, abs=1e-9)
    module = built(losses=RouterLossSpec(balance=0.7))
    x = some(1, 8, WIDTH)
    losses(module, x, plain(1, 8))["balance"].backward()
    weight = module.router.weight.detach().clone().requires_grad_()
    chosen = [e for one in x[0] for e in gates(module, one)]
    f = torch.tensor([chosen.count(e) / 8 for e in range(EXPERTS)], dtype=torch.float64)
    (0.7 * EXPERTS * (f * (x[0] @ weight.t()).softmax(-1).mean(0)).sum()).backward()
    torch.testing.assert_close(module.router.weight.grad, weight.grad, rtol=0, atol=1e-12)


def test_dropped_tokens_count_in_the_balance_loss():
    loss = RouterLossSpec(balance=0.1)
    one = built(losses=loss, capacity=CapacitySpec(training=0.01, least=1)).train()
    other, x = built(losses=loss).train(), some(1, 20, WIDTH)
    assert torch.equal(losses(one, x, plain(1, 20))["balance"], losses(other, x, plain(1, 20))["balance"])


def test_importance_and_load_are_those_of_the_paper():
    spec = RouterLossSpec(importance=0.1, load=0.2)
    module = built(TopKSpec(experts=EXPERTS, noise=True), losses=spec).train()
    x = some(1, 30, WIDTH)
    torch.manual_seed(4)
    found = losses(module, x, plain(1, 30))
    torch.manual_seed(4)
    module.requires_grad_(False)
    clean = x[0] @ module.router.weight.t()
    deviation = torch.nn.functional.softplus(x[0] @ module.router.noise.t())  # pyright: ignore
    noisy = clean + torch.randn(30, EXPERTS, dtype=torch.float64) * deviation
    importance, load = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
    for t in range(30):
        best = noisy[t].topk(2)
        importance[best.indices] += best.values.softmax(0)
        for e in range(EXPERTS):
            others = torch.cat([noisy[t, :e], noisy[t, e + 1 :]]).sort(descending=True).values
            load[e] += 0.5 * (1 + math.erf(float((clean[t, e] - others[1]) / deviation[t, e]) / math.sqrt(2)))

    def squared(x: Tensor) -> float:
        return float(((x - x.mean()) ** 2).mean() / x.mean() ** 2)

    assert found["importance"].item() == pytest.approx(0.1 * squared(importance), abs=1e-9)
    assert found["load"].item() == pytest.approx(0.2 * squared(load), abs=1e-9)
    module.requires_grad_(True)
    assert "load" not in losses(module.eval(), x, plain(1, 30))  # there is no noise that could be drawn anew


def test_losses_are_written_down_where_something_learns():
    module = built(losses=RouterLossSpec(balance=0.1))
    assert set(losses(module.train(), some(1, 4, WIDTH), plain(1, 4))) == {"balance"}
    assert set(losses(module.eval(), some(1, 4, WIDTH), plain(1, 4))) == {"balance"}
    with torch.no_grad():
        assert losses(module.train(), some(1, 4, WIDTH), plain(1, 4)) == {}
    assert losses(built(losses=RouterLossSpec()), some(1, 4, WIDTH), plain(1, 4)) == {}


# In a model


def model(op: Any, layers: int = 2, pattern: Any = None, **more: Any) -> lamina.Model:
    attention = AttentionSpec(
        heads=2,
        key_heads=1,
        head_dim=6,
        rotary=RotarySpec(base=10.0),
        **({} if pattern is None else {"pattern": pattern}),
    )
    layer = LayerSpec(steps=(StepSpec(name="attention", op=attention), StepSpec(name="feedforward", op=op)))
    stack = StackSpec(layers=(layer,) * layers)
    spec = lamina.ModelSpec(
        width=WIDTH,
        embedding=EmbeddingSpec(vocabulary=30),
        head=LanguageHeadSpec(),
        context=32,
        **{"encoder" if pattern is not None else "decoder": stack},
    )
    made = spec.build(dtype=torch.float64).eval()
    shake(made)
    return made


def test_losses_of_all_layers_come_out_by_layer_or_pooled():
    op = ExpertsSpec(router=TopKSpec(experts=EXPERTS), expert=EXPERT, losses=RouterLossSpec(balance=0.1, z=0.01))
    ids = torch.arange(10).view(1, 10)
    out = model(op)(ids)
    name = "decoder.layers.{}.feedforward.op.{}"
    assert set(out.losses) == {name.format(i, kind) for i in range(2) for kind in ("balance", "z")}
    pooled = op.replace(losses=RouterLossSpec(balance=0.1, z=0.01, pooled=True))
    found = model(pooled)(ids).losses
    assert set(found) == {"decoder.balance", "decoder.z"}
    z = [out.losses[name.format(i, "z")] for i in range(2)]
    torch.testing.assert_close(found["decoder.z"], (z[0] + z[1]) / 2, rtol=0, atol=1e-12)
    record = Record("*.scores", "*.load")
    model(pooled)(ids, record=record)
    scores, loads = ([v for n, v in record.values.items() if n.endswith(end)] for end in ("scores", "load"))
    shares = sum(loads).double() / 20
    balance = 0.1 * EXPERTS * (shares * torch.cat([one[0] for one in scores]).mean(0)).sum()
    torch.testing.assert_close(found["decoder.balance"], balance, rtol=0, atol=1e-12)


def test_experts_that_choose_are_a_loop():
    module = built(ExpertChoiceSpec(experts=EXPERTS, capacity=2.0))
    module.requires_grad_(False)
    x = some(2, 10, WIDTH)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 0], [1] * 10])
    for tokens in (plain(2, 10), holes([[0] * 4 + [1] * 6, [1] * 10]), Tokens(documents * 0, documents)):
        out = module(x, Call(tokens=tokens))
        expected = torch.zeros_like(x)
        for b in range(2):
            for document in range(3):
                real = [t for t in range(10) if tokens.real[b, t] and tokens.document[b, t] == document]
                scores = {t: (module.router.weight @ x[b, t]).softmax(0) for t in real}
                for e in range(EXPERTS):
                    most = max(1, round(len(real) * 2 / EXPERTS))
                    for t in sorted(real, key=lambda t: -float(scores[t][e]))[:most]:
                        expected[b, t] += scores[t][e] * network(module, e, x[b, t])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_experts_that_choose_are_refused_in_a_causal_stack_and_caught_where_they_are_meant():
    op = ExpertsSpec(router=ExpertChoiceSpec(experts=EXPERTS), expert=EXPERT)
    with pytest.raises(LaminaError, match="let a token see later ones, and this stack is causal"):
        model(op)
    assert lamina.verify(model(op, pattern=Everything())).passed
    meant = model(op.replace(router=ExpertChoiceSpec(experts=EXPERTS, causal=True)))
    failed = [row.property for row in lamina.verify(meant).rows if row.verdict == "fails"]
    assert "later tokens change no earlier bit" in failed


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
def test_an_exported_decoding_step_is_the_model_and_8_bits_are_refused():
    from lamina.errors import UnsupportedError
    from lamina.generation.compiled import Decode, prepare

    made = model(ExpertsSpec(router=TopKSpec(experts=EXPERTS), expert=EXPERT))
    ids = torch.tensor([[3, 17, 5, 8]])
    step = Decode(made, 8).eval()
    state = step.state()
    with torch.no_grad():
        program = torch.export.export(step, (ids[:, :1], *state), strict=False).run_decompositions().module()
        found = []
        for i in range(4):
            out = program(ids[:, i : i + 1], *state)
            found.append(out[0] if isinstance(out, tuple | list) else out)
        whole = made(ids).logits
    assert whole is not None
    torch.testing.assert_close(torch.cat([one.view(1, 1, -1) for one in found], dim=1), whole, rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedError, match="not built for mixtures of experts"):
        prepare(made, quantize="int8")


def test_a_model_of_experts_holds_everything():
    op = ExpertsSpec(
        router=TopKSpec(experts=EXPERTS, chosen=1, normalise=False, jitter=0.01),
        expert=EXPERT,
        shared=FeedForwardSpec(hidden=4),
        capacity=CapacitySpec(training=1.0),
        losses=RouterLossSpec(balance=0.01, z=0.001),
    )
    report = lamina.verify(model(op))
    assert report.passed, report


def test_a_correction_moves_toward_balance_and_never_by_a_gradient():
    op = ExpertsSpec(router=TopKSpec(experts=EXPERTS, score="sigmoid", correction=True), expert=EXPERT)
    made = model(op)
    record, ids = Record("*.load"), torch.arange(24).view(2, 12)
    out = made(ids, record=record)
    assert out.logits is not None
    out.logits.sum().backward()
    for name, load in record.values.items():
        correction = made.get_parameter(f"{name.removesuffix('.load')}.router.correction")
        assert correction.grad is None and not correction.requires_grad
        before = correction.clone()
        assert load.sum() == 48
        expected = before + 0.01 * torch.sign(load.double().mean() - load)
        rebalance(made, record, 0.01)
        torch.testing.assert_close(correction, expected)
        rebalance(made, record, -0.01)
    with pytest.raises(LaminaError, match=r"no decoder.layers.0.feedforward.op.load: pass record=Record\('\*.load'\)"):
        rebalance(made, Record())


def test_active_parameters_and_arithmetic_are_those_of_the_chosen():
    spec = model(ExpertsSpec(router=TopKSpec(experts=8, chosen=2), expert=EXPERT)).spec
    found = lamina.account(spec, context=16)
    assert found.parameters - found.active_parameters == 2 * 6 * 3 * WIDTH * 7
    one = lamina.account(model(ExpertsSpec(router=TopKSpec(experts=16, chosen=2), expert=EXPERT)).spec, context=16)
    assert one.flops_prefill - found.flops_prefill == 2 * 16 * 2 * WIDTH * 8  # the router's
    chosen = lamina.account(model(ExpertsSpec(router=TopKSpec(experts=8, chosen=3), expert=EXPERT)).spec, context=16)
    assert chosen.flops_prefill - found.flops_prefill == 2 * 16 * 2 * 3 * WIDTH * 7
    assert chosen.flops_train_per_token - found.flops_train_per_token == 2 * 3 * 2 * 3 * WIDTH * 7
    (row,) = [part for part in found.rows[1].parts if part.name == "feedforward"]
    (op,) = [part for part in row.parts if part.name == "op"]
    assert [part.name for part in op.parts] == ["router", "experts"]
    assert op.parts[1].active_parameters * 4 == op.parts[1].parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSpec(experts=2, chosen=3), "chosen=3 must be 1 to experts=2"),
        (lambda: TopKSpec(experts=5, limit=GroupLimitSpec(groups=2, kept=1)), "experts=5 must be a multiple"),
        (lambda: TopKSpec(experts=6, chosen=4, limit=GroupLimitSpec(groups=2, kept=1)), "the kept ones chosen=4"),
        (lambda: GroupLimitSpec(groups=2, kept=3), "kept=3 must be 1 to groups=2"),
        (lambda: CapacitySpec(training=0), "training=0.0"),
        (lambda: ExpertsSpec(router=TopKSpec(experts=2), expert=EXPERT, masked=1.0), "masked=1.0 must be from 0"),
        (lambda: CapacitySpec(training=1.5, places=True), "must be whole numbers"),
        (lambda: ExpertChoiceSpec(experts=2, capacity=3.0), "capacity=3.0 must be above 0"),
        (lambda: ExpertsSpec(router=TopKSpec(experts=2), expert=EXPERT, shared_gate=True), "needs shared="),
        (lambda: ExpertsSpec(router=ExpertChoiceSpec(experts=2), expert=EXPERT, capacity=CapacitySpec()), "TopKSpec"),
        (lambda: ExpertsSpec(router=ExpertChoiceSpec(experts=2), expert=EXPERT, losses=RouterLossSpec(balance=1.0)),
         "are for a TopKSpec"),
        (lambda: ExpertsSpec(router=TopKSpec(experts=2), expert=EXPERT, losses=RouterLossSpec(load=1.0)),
         "needs a router with noise=True"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(make: Any, message: str):
    with pytest.raises(LaminaError, match=message):
        make()


def test_parameters_are_named_by_their_place():
    names = dict(built(expert=FeedForwardSpec(hidden=7, bias=True)).named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in names.items()} == {
        "router.weight": (5, 6),
        "experts.gate.weight": (5, 7, 6),
        "experts.gate.bias": (5, 7),
        "experts.up.weight": (5, 7, 6),
        "experts.up.bias": (5, 7),
        "experts.down.weight": (5, 6, 7),
        "experts.down.bias": (5, 6),
    }


def test_dropout_stands_after_the_activation_of_an_expert():
    expert = FeedForwardSpec(hidden=4000, act="sigmoid", gated=False, dropout=0.25)
    networks = Networks(ExpertsSpec(router=TopKSpec(experts=1, chosen=1), expert=expert), 2)
    with torch.no_grad():
        networks.up.weight.zero_()
        networks.down.weight.fill_(1.0)  # sums 4000 values, each 0 or 0.5 / 0.75
    networks.requires_grad_(False)
    torch.manual_seed(0)
    total = float(networks(torch.ones(1, 2), Groups(sizes=[1]))[0, 0])
    assert total == pytest.approx(2000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5 * 2 / 3) and total != 2000
    assert float(networks.eval()(torch.ones(1, 2), Groups(sizes=[1]))[0, 0]) == 2000
