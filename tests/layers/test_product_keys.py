"""Product-key memory against brute force over all n^2 keys, a token at a time; batch normalisation against torch's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    BatchNorm,
    BatchNormSpec,
    Call,
    Draw,
    FeedForwardSpec,
    LayerNormSpec,
    LayerSpec,
    ProductKeys,
    ProductKeySpec,
    Record,
    RMSNormSpec,
    StackSpec,
    StepSpec,
)
from lamina.layers.feedforward import ACTIVATIONS
from lamina.layers.product_keys import best, best_sums
from lamina.parallel import MeshSpec, plan
from lamina.patterns import Causal
from lamina.tokens import HOLE, Tokens, plain
from tests.small import build, decoder, ids, shake

WIDTH = 10
PLAIN = ProductKeySpec(heads=3, keys=7, key_dim=6, chosen=4)
KINDS = {
    "plain": PLAIN,
    "layer-norm": PLAIN.replace(norm=LayerNormSpec()),
    "batch-norm": PLAIN.replace(norm=BatchNormSpec(), bias=False),
    "memory-plus": PLAIN.replace(gated=True, norm=RMSNormSpec()),
    "peer": PLAIN.replace(act="gelu", heads=5, bias=False),
    "all": PLAIN.replace(chosen=7),
    "one": PLAIN.replace(chosen=1, heads=1, keys=5),
}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(spec: ProductKeySpec, seed: int = 0) -> ProductKeys:
    module = spec.build(WIDTH).double().eval()
    shake(module, seed)
    if isinstance(module.norm, BatchNorm):
        with torch.no_grad():
            module.norm.variance.abs_()
    return module


def padded(*lengths: int, side: str = "left") -> Tokens:
    """A row for each length, in as many columns as the longest has."""
    widest = max(lengths)
    rows = [
        [HOLE] * (widest - n) + list(range(n)) if side == "left" else [*range(n), *[HOLE] * (widest - n)]
        for n in lengths
    ]
    position = torch.tensor(rows)
    return Tokens(position, torch.zeros_like(position))


def formula(module: ProductKeys, x: Tensor) -> Tensor:
    """Of one token, with all n^2 sums."""
    spec, n = module.spec, module.spec.keys
    query = module.query.weight @ x + (0 if module.query.bias is None else module.query.bias)
    norm = module.norm
    if isinstance(norm, BatchNorm):
        query = (query - norm.mean) / (norm.variance + spec.norm.eps).sqrt() * norm.weight + norm.bias  # pyright: ignore
    y = torch.zeros_like(x)
    for head, q in zip(module.keys, query.split(spec.key_dim), strict=True):
        q = q if norm is None or isinstance(norm, BatchNorm) else norm(q)
        sums = {i * n + j: q @ torch.cat([head[0, i], head[1, j]]) for i in range(n) for j in range(n)}
        chosen = sorted(sums, key=lambda row: -sums[row].item())[: spec.chosen]
        total = sum(sums[row].exp() for row in chosen)
        for row in chosen:
            value = module.table.weight[row]
            if module.table.up is not None and spec.act is not None:
                value = value * ACTIVATIONS[spec.act](module.table.up[row] @ x)
            y = y + sums[row].exp() / total * value
    if module.gate is None or module.output is None:
        return y
    gate = module.gate(x)
    return module.output(y * gate / (1 + (-gate).exp()))


# The search


@pytest.mark.parametrize(("n", "chosen"), [(7, 1), (7, 4), (7, 7), (33, 8), (96, 5), (160, 10), (1024, 32)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_of_all_sums_are_found(n: int, chosen: int, ties: bool, dtype: torch.dtype):
    for seed in range(1 if n > 500 else 5):
        first, second = some(2, 3, n, seed=seed).to(dtype), some(2, 3, n, seed=seed + 100).to(dtype)
        if ties:
            first, second = (2 * first).round(), (2 * second).round()
        value, index = best_sums(first, second, chosen)
        every = (first[..., :, None] + second[..., None, :]).flatten(-2)
        torch.testing.assert_close(value, every.topk(chosen, dim=-1).values, rtol=0, atol=0)
        torch.testing.assert_close(value, every.gather(-1, index), rtol=0, atol=0)
        assert all(len(set(row.tolist())) == chosen for row in index.flatten(0, 1))


@pytest.mark.parametrize(("n", "chosen"), [(64, 4), (96, 3), (256, 4), (1024, 32), (1000, 9)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_of_a_list_are_found_by_groups(n: int, chosen: int, ties: bool):
    scores = some(5, n)
    scores = scores.round() if ties else scores
    value, index = best(scores, chosen)
    torch.testing.assert_close(value, scores.sort(-1, descending=True).values[:, :chosen], rtol=0, atol=0)
    torch.testing.assert_close(value, scores.gather(-1, index), rtol=0, atol=0)
    assert all(len(set(row.tolist())) == chosen for row in index)


# The layer


@pytest.mark.parametrize("name", KINDS)
def test_the_formula(name: str):
    for seed in range(3):
        module, x = built(KINDS[name], seed), some(2, 5, WIDTH, seed=seed)
        out = module(x, Call(tokens=plain(2, 5)))
        for one, found in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
            torch.testing.assert_close(found, formula(module, one), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["memory-plus", "peer", "batch-norm"])
def test_the_gradients_are_those_of_the_formula(name: str):
    module, x = built(KINDS[name]), some(1, 4, WIDTH)
    grads = []
    for way in (
        lambda x: module(x[None], Call(tokens=plain(1, 4)))[0],
        lambda x: torch.stack([formula(module, t) for t in x]),
    ):
        module.zero_grad()
        given = x[0].clone().requires_grad_()
        (way(given) * some(4, WIDTH, seed=9)).sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad} | {"x": given.grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 3
    for name, found in grads[0].items():
        torch.testing.assert_close(found, grads[1][name], rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_that_several_heads_read_count_for_each():
    module = built(PLAIN.replace(heads=2))
    with torch.no_grad():
        module.keys[1] = module.keys[0].clone()
        module.query.weight[6:], module.query.bias[6:] = module.query.weight[:6], module.query.bias[:6]
    one = built(PLAIN.replace(heads=1))
    one.load_state_dict(
        {"keys": module.keys[:1], "query.weight": module.query.weight[:6], "query.bias": module.query.bias[:6]}
        | {"values.weight": module.table.weight}
    )
    x, call = some(1, 3, WIDTH), Call(tokens=plain(1, 3))
    torch.testing.assert_close(module(x, call), 2 * one(x, call), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "peer"])
def test_sparse_gradients_are_the_dense_ones_without_the_rows_that_nobody_read(name: str):
    module, x, found = built(KINDS[name]), some(2, 2, WIDTH), []
    record = Record("*.chosen")
    for sparse in (False, True):
        module.zero_grad()
        module.table.sparse = sparse
        module(x, Call(tokens=plain(2, 2), record=record)).square().sum().backward()
        found.append({name: p.grad for name, p in module.table.named_parameters()})
    read = record.values[".chosen"].unique()
    for name, dense in found[0].items():
        rows = found[1][name].coalesce()
        assert torch.equal(rows.indices()[0], read) and len(read) < len(dense)
        torch.testing.assert_close(rows.to_dense(), dense, rtol=0, atol=1e-12)


def test_what_is_recorded():
    module, record, x = built(PLAIN), Record("*"), some(2, 5, WIDTH)
    module.path = "here"
    module(x, Call(tokens=plain(2, 5), record=record))
    chosen, shares = record.values["here.chosen"], record.values["here.shares"]
    assert chosen.shape == shares.shape == (2, 5, 3, 4) and int(chosen.max()) < 49
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5, 3, dtype=torch.float64))
    assert bool((shares[..., :-1] >= shares[..., 1:]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "batch-norm", "memory-plus", "peer"])
def test_narrow_numbers(name: str, dtype: torch.dtype):
    module, x = built(KINDS[name]), some(1, 6, WIDTH)
    with torch.no_grad():
        wide = copy.deepcopy(module).to(dtype).double()(x.to(dtype).double(), Call(tokens=plain(1, 6)))
        found = module.to(dtype)(x.to(dtype), Call(tokens=plain(1, 6)))
    assert found.dtype == dtype
    near = (found.double() - wide).abs().amax(-1) < 60 * torch.finfo(dtype).eps * wide.abs().max()
    assert float(near.double().mean()) > 0.6  # a key that is as good as another may be chosen in its place


def test_initial_values():
    spec = ProductKeySpec(heads=4, keys=32, key_dim=50, norm=BatchNormSpec())
    module = spec.build(64)
    shake(module)
    module.norm.initialise(draw := Draw(torch.Generator().manual_seed(0)))
    module.initialise(draw)
    module.table.initialise(draw)
    bound, keys = 25**-0.5, module.keys.detach()
    assert 0.99 * bound < float(keys.max()) <= bound and -bound <= float(keys.min()) < -0.99 * bound
    assert abs(float(keys.std()) - bound / 3**0.5) < 0.01 * bound
    assert abs(float(module.table.weight.detach().std()) * 8 - 1) < 0.02
    assert isinstance(module.norm, BatchNorm)
    assert not module.norm.mean.any() and bool((module.norm.variance == 1).all() and (module.norm.weight == 1).all())


def test_what_is_refused():
    for wrong, said in (
        ({"chosen": 8}, "chosen=8 1 to keys=7"),
        ({"heads": 0}, "heads=0"),
        ({"key_dim": 5}, "key_dim is 5; it must be even"),
        ({"table": "a.b"}, "table is 'a.b'"),
        ({"norm": BatchNormSpec(momentum=1.0), "keys": 0}, "keys=0"),
    ):
        with pytest.raises(LaminaError, match=said):
            PLAIN.replace(**wrong)
    with pytest.raises(LaminaError, match=r"momentum=0.0 above 0 and at most 1"):
        BatchNormSpec(momentum=0.0)


# Batch normalisation


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_norm_is_torchs_over_the_real_tokens(side: str):
    ours, theirs = BatchNormSpec(eps=1e-3, momentum=0.3).build(6).double(), nn.BatchNorm1d(6, 1e-3, 0.3).double()
    shake(ours)
    with torch.no_grad():
        ours.variance.abs_()
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
        theirs.running_mean.copy_(ours.mean)
        theirs.running_var.copy_(ours.variance)
    for step, tokens in enumerate((plain(3, 7), padded(7, 2, 5, side=side), padded(1, 1, 4, side=side))):
        x = 3 * some(*tokens.position.shape, 6, seed=step) + 1
        real = tokens.real
        y = ours(torch.where(real[..., None], x, 100.0), Call(tokens=tokens))
        torch.testing.assert_close(y[real], theirs(x[real]), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.mean.data, theirs.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.variance.data, theirs.running_var, rtol=0, atol=1e-12)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x, Call(tokens=tokens))[real], theirs(x[real]), rtol=0, atol=1e-12)


def test_the_averages_move_once_a_step_and_only_where_they_should():
    norm = BatchNormSpec().build(4).double()
    x, call = some(2, 3, 4), Call(tokens=plain(2, 3))
    checkpoint(norm, x.requires_grad_(), call, use_reentrant=False).sum().backward()
    torch.testing.assert_close(norm.mean.data, 0.1 * x.detach().mean((0, 1)), rtol=0, atol=1e-12)
    before = norm.mean.clone(), norm.variance.clone()
    with torch.no_grad():
        norm(x + 1, call)  # no gradients
    norm(x + 1, Call(tokens=padded(0, 0, 3).select(torch.tensor([0, 1]))))  # nothing but padding
    norm(x * torch.nan, call)
    assert torch.equal(before[0], norm.mean) and torch.equal(before[1], norm.variance)
    norm.weight.requires_grad_(False)
    frozen = norm(x + 1, call)
    torch.testing.assert_close(frozen, norm.eval()(x + 1, call))
    assert torch.equal(before[0], norm.mean)


def test_one_token_is_normalised_to_the_bias():
    norm = BatchNormSpec().build(4)
    assert not norm(torch.randn(1, 1, 4), Call(tokens=plain(1, 1))).any() and bool(norm.variance.isfinite().all())


# In a model


def model_spec(op: ProductKeySpec, layers: int = 3, gate: bool = False) -> lamina.ModelSpec:
    """Attention, a feed-forward network, and the memory as a step of its own."""
    spec = decoder([Causal()] * layers)
    assert spec.decoder is not None
    step = StepSpec(name="memory", op=op, pre=RMSNormSpec(), gate=gate)
    stack = spec.decoder.replace(
        layers=tuple(layer.replace(steps=(*layer.steps, step)) for layer in spec.decoder.layers)
    )
    return spec.replace(decoder=stack, context=32)


@pytest.mark.parametrize("name", ["plain", "batch-norm", "memory-plus", "peer"])
@pytest.mark.parametrize("table", [None, "facts"])
def test_all_properties_hold(name: str, table: str | None):
    model = build(model_spec(KINDS[name].replace(table=table), layers=2))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.variance.data.abs_()
    report = lamina.verify(model)
    assert report.passed, report


@pytest.mark.parametrize("name", ["plain", "batch-norm", "memory-plus", "peer"])
def test_a_gate_at_zero_changes_no_bit_and_learns(name: str):
    spec = model_spec(KINDS[name], layers=2, gate=True)
    model, without = spec.build(seed=1).eval(), decoder([Causal()] * 2).build(seed=2).eval()
    state = model.state_dict()
    without.load_state_dict({name: state[name] for name in without.state_dict()})
    text = ids(2, 9)
    assert torch.equal(model(text).logits, without(text).logits)
    model(text).logits.square().sum().backward()
    assert float(model.decoder.layers[0]["memory"].gate.grad.abs()) > 0


def test_layers_share_a_table(tmp_path: Path):
    spec = model_spec(KINDS["memory-plus"].replace(table="facts"))
    model = build(spec)
    name = "decoder.tables.facts.weight"
    for names in (dict(model.named_parameters()), model.state_dict()):
        assert [n for n in names if "facts" in n or "values" in n] == [name]
    table = model.get_parameter(name)
    apart = build(model_spec(KINDS["memory-plus"]))
    state = {n: p for n, p in model.state_dict().items() if n != name}
    own = {n: table.detach() for n in apart.state_dict() if n.endswith("values.weight")}
    assert len(own) == 3
    apart.load_state_dict(state | own)
    text = ids(2, 9)
    losses = [one(text).logits.square().sum() for one in (model, apart)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-9)
    for loss in losses:
        loss.backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad, sum(apart.get_parameter(n).grad for n in own), rtol=1e-9, atol=1e-9)  # pyright: ignore
    lamina.save(model, tmp_path / "saved", format="native")
    again = lamina.load(tmp_path / "saved")
    twin = copy.deepcopy(model)
    for one in (again, twin):
        torch.testing.assert_close(one(text).logits, model(text).logits, rtol=0, atol=0)
        with torch.no_grad():
            one.get_parameter(name).zero_()
        assert not torch.allclose(one(text).logits, model(text).logits)  # each reads its own table


def test_tables_of_one_name_are_alike():
    one = PLAIN.replace(table="facts")
    with pytest.raises(
        LaminaError, match=r"layers.1.steps.0.op: the table 'facts' has keys=8, act=None here and keys=7"
    ):
        StackSpec(
            layers=tuple(
                LayerSpec(steps=(StepSpec(name="memory", op=op),)) for op in (one, one.replace(keys=8, heads=1))
            )
        )


def test_what_it_costs():
    rows, read, width = 49, 3 * 4, 16
    for table, active in ((None, 3 * read), ("facts", 3 * read)):
        model = model_spec(PLAIN.replace(table=table)).build(device="meta")
        account = lamina.account(model)
        parameters = sum(p.numel() for p in model.parameters())
        tables = (1 if table else 3) * rows * width
        assert account.parameters == parameters
        assert account.active_parameters == parameters - tables + active * width
    # FLOPs of the products: queries, and 2 n scores a head; reading rows is no product.
    with_memory, without = (lamina.account(spec, context=32) for spec in (model_spec(PLAIN, 1), decoder([Causal()])))
    assert with_memory.flops_prefill - without.flops_prefill == 32 * 2 * (16 * 18 + 3 * 7 * 6)
    with_networks = lamina.account(model_spec(KINDS["peer"], 1), context=32)
    assert with_networks.flops_prefill - without.flops_prefill == 32 * 2 * (16 * 30 + 5 * 7 * 6 + 5 * 4 * 16)


def test_several_ranks_refuse_averages_over_a_batch():
    with pytest.raises(UnsupportedError, match=r"decoder.layers.0.steps.2.op.norm: batch normalisation counts"):
        plan(MeshSpec(shard=2), 2, model_spec(KINDS["batch-norm"]))
    plan(MeshSpec(shard=2), 2, model_spec(KINDS["plain"]))
    plan(MeshSpec(tensor=2), 2, model_spec(KINDS["plain"]))  # of 3 heads, which are not shared out


def test_it_replaces_a_feed_forward_network():
    spec = decoder([Causal()] * 2)
    changed = lamina.specs.edit(spec, FeedForwardSpec, lambda path, part: PLAIN)
    out: Any = build(changed)(ids(1, 5))
    assert bool(out.logits.isfinite().all())
