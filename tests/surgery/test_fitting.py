"""Fits to a text: what was planted is found, what is found is the best there is, and a text is read as a model does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina import editing
from lamina.cli.edit import fit_lines
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LayerNormSpec, RMSNormSpec
from lamina.model import Model
from lamina.packaged import packaged_path
from lamina.patterns import Causal
from lamina.surgery import Outside, apply, read_plan
from lamina.surgery.calibration import Calibration, energy, random_texts
from lamina.surgery.fitting import lost, one_key, root_of
from lamina.surgery.moments import moments
from lamina.surgery.places import Place
from tests import small, tiny
from tests.surgery.test_operations import SHAPES, ids_of, operated, run, works

FIT = {"op": "key_heads", "heads": 1, "by": "least_squares"}


def attentions(model: Model) -> list[Any]:
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    return [step.op for stack in stacks for layer in stack.layers for step in layer.values() if hasattr(step.op, "k")]


def planted(model: Model, seed: int = 0) -> Model:
    """Key heads that are linear maps of the first one: of its keys such as turn along, of its values any."""
    draw = torch.Generator().manual_seed(seed)
    for attention in attentions(model):
        spec = attention.spec
        rotary, size = getattr(spec, "rotary", None), spec.head_dim
        width = 0 if rotary is None else rotary.width or size
        with torch.no_grad():
            for part in (attention.k, attention.v):
                for tensor in (part.weight, part.bias):
                    if tensor is None:
                        continue
                    state = draw.get_state()
                    heads = tensor.view(spec.key_heads, size, -1)
                    for head in range(1, spec.key_heads):
                        map = torch.randn(size, size, generator=draw)
                        if part is attention.k:
                            map[:width], map[:, :width] = 0, 0
                            for pair in range(width // 2):
                                a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + width // 2)
                                re, im = torch.randn(2, generator=draw)
                                map[a, a], map[a, b], map[b, a], map[b, b] = re, -im, im, re
                        heads[head] = map @ heads[0]
                    if tensor is part.weight and part.bias is not None:
                        draw.set_state(state)  # the same maps for the bias
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_heads_that_are_maps_of_one_become_one(shape: str, seed: int):
    base = planted(tiny.model(SHAPES[shape], seed, scale=1.0), seed)
    ids = ids_of(base)
    expected = run(base, ids)
    model, new = operated(base, FIT)
    assert not new and {attention.spec.key_heads for attention in attentions(model)} == {1}
    assert float((run(model, ids) - expected).abs().max() / expected.abs().max()) < 1e-5
    worse, _ = operated(base, FIT | {"by": "mean"})
    assert float((run(worse, ids) - expected).abs().max() / expected.abs().max()) > 1e-3


@pytest.mark.parametrize("scheme", ["rotary", "interleaved", "learned"])
@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
def test_keys_that_turn_in_part_or_beside_each_other(scheme: str, bias: str):
    """Eight query heads of four key heads to two, of which each stands for two."""
    spec = small.decoder([Causal(), Causal()], scheme, heads=8, key_heads=4, bias=bias)
    base = small.build(spec.replace(context=48))
    for part in ("k", "v"):
        for attention in attentions(base):
            own = getattr(attention, part)
            with torch.no_grad():
                for tensor in (own.weight, *([own.bias] if own.bias is not None else [])):
                    heads = tensor.view(4, 8, -1)
                    heads[1], heads[3] = 0.7 * heads[0], -2 * heads[2]
    ids = small.ids(2, 11)
    model, _ = operated(base, FIT | {"heads": 2})
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_best_of_its_rank(seed: int):
    """Values: what is lost is what the singular values that are left out say of all products, taken whole."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 9, generator=draw, dtype=torch.float64) @ torch.randn(9, 9, generator=draw, dtype=torch.float64)
    v = torch.randn(3, 4, 9, generator=draw, dtype=torch.float64)
    o = torch.randn(3, 2, 9, 4, generator=draw, dtype=torch.float64)  # two query heads read each
    gram = torch.einsum("gdx,xy,hey->gdhe", v, x.T @ x, v)
    read = torch.einsum("ghwd,ghwe->gde", o, o)
    down, up = one_key(gram, read, None)
    whole = torch.cat([x @ v[g].T @ o[g, h].T for g in range(3) for h in range(2)], dim=1)
    few = torch.einsum("ngd,gdx,tx->tn", down, v, x)
    got = torch.cat([few @ up[g].T @ o[g, h].T for g in range(3) for h in range(2)], dim=1)
    left = torch.linalg.svdvals(whole)[4:].square().sum()
    assert float((whole - got).square().sum()) == pytest.approx(float(left), rel=1e-8)
    root = torch.block_diag(*root_of(read))
    said = lost(gram.flatten(2).flatten(0, 1), root, down.flatten(1), up.flatten(0, 1))
    assert said == pytest.approx((float(left), float(whole.square().sum())), rel=1e-8)
    assert float(few.square().mean()) == pytest.approx(float((x @ v.flatten(0, 1).T).square().mean()), rel=1e-8)


def test_keys_that_turn_are_the_best_pair_by_pair():
    """The mean over all distances of the squared error of the scores, against many other complex maps."""
    draw = torch.Generator().manual_seed(3)
    key = torch.randn(60, 2, 2, generator=draw, dtype=torch.float64) @ torch.randn(
        2, 2, generator=draw, dtype=torch.float64
    )
    query = torch.randn(60, 2, 2, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 3.0])[:, None]
    rotary = lamina.layers.RotarySpec()
    gram = torch.einsum("tgd,the->gdhe", key, key)
    down, up = one_key(gram, torch.einsum("tgd,tge->gde", query, query), rotary)

    def lost(down: Tensor, up: Tensor) -> float:
        few = torch.einsum("ngd,tgd->tn", down, key)
        rest = key - torch.einsum("gdn,tn->tgd", up, few)
        total = 0.0
        for turns in range(24):
            angle = torch.tensor(2 * torch.pi * turns / 24)
            turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            for head in range(2):
                total += float((query[:, head] @ turn.double() @ rest[:, head].T).square().sum())
        return total

    best = lost(down, up)
    for _ in range(200):
        bent = [torch.complex(*torch.randn(2, 2, generator=draw, dtype=torch.float64).unbind()) * 0.3 for _ in range(2)]
        other = [one.clone() for one in (down, up)]
        for tensor, change, of in ((other[0], bent[0], (0, 2)), (other[1], bent[1], (1, 2))):
            for head in range(2):
                real = torch.tensor([[change[head].real, -change[head].imag], [change[head].imag, change[head].real]])
                if of == (0, 2):
                    tensor[:, head] += real
                else:
                    tensor[head] += real
        assert lost(*other) >= best * (1 - 1e-9)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
def test_the_moments_of_heads_are_those_of_what_the_layer_makes(shape: str):
    """Keys, values and queries as the layer has them, biases too; the columns of o in naive loops."""
    base = tiny.model(SHAPES[shape], scale=1.0).requires_grad_(False)
    for attention in attentions(base):
        for part in (attention.q, attention.k, attention.v):
            if part.bias is not None:
                part.bias.normal_(generator=torch.Generator().manual_seed(1))
    attention = attentions(base)[-1]  # in T5 what reads the encoder
    ids = ids_of(base, rows=1)
    state, spec = dict(base.named_parameters()), attention.spec
    calibration = Calibration(base.spec, state, lambda: ids.tolist(), [attention.path])
    found = moments(Place(attention.path, spec), state, calibration)
    seen: dict[str, Tensor] = {}
    for name in "qkv":
        getattr(attention, name).register_forward_hook(
            lambda _, given, out, name=name: seen.__setitem__(name, out[0].double().unflatten(-1, (-1, spec.head_dim)))
        )
    half = ids.shape[1] // 2
    begun = torch.cat([torch.full((1, 1), base.spec.special.decoder_start or 0), ids[:, half:-1]], dim=1)
    base(ids[:, :half], decoder_input_ids=begun) if base.spec.two_stacks else base(ids)
    each, size = spec.heads // spec.key_heads, spec.head_dim
    for name, got in (("k", found.key), ("v", found.value)):
        torch.testing.assert_close(got, torch.einsum("tgd,the->gdhe", seen[name], seen[name]), rtol=1e-4, atol=1e-5)
    for head in range(spec.key_heads):
        query, output = torch.zeros(size, size).double(), torch.zeros(size, size).double()
        for one in range(head * each, (head + 1) * each):
            query += seen["q"][:, one].T @ seen["q"][:, one]
            columns = attention.o.weight[:, one * size : (one + 1) * size].double()
            output += columns.T @ columns
        torch.testing.assert_close(found.query[head], query, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.output[head], output, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_is_read_as_the_model_reads_it(shape: str):
    """Layer by layer, and in any order: what hooks on the whole model see, and each weight is read once a pass."""
    base = tiny.model(SHAPES[shape])
    spec, reads = base.spec, []

    class Counted(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            reads.append(key)
            return super().__getitem__(key)

    paths = [attention.path for attention in attentions(base)]
    texts = [small.ids(1, length, seed=length, vocabulary=spec.embedding.vocabulary)[0].tolist() for length in (9, 14)]
    state = Counted({name: p.detach() for name, p in base.named_parameters()})
    found = Calibration(spec, state, lambda: texts, paths)
    seen: dict[str, Tensor] = {}

    def see(module: Any, given: Any) -> None:
        rows = {module.path: given[0]} | ({f"{module.path}.memory": given[1].memory} if "cross" in module.path else {})
        for name, x in rows.items():
            x = torch.cat([x[0], torch.ones(x.shape[1], 1)], dim=1).double()
            seen[name] = seen.get(name, 0) + x.T @ x

    for attention in attentions(base):
        attention.register_forward_pre_hook(see)
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            if spec.two_stacks:
                half = len(text) // 2
                begun = torch.cat([torch.full((1, 1), spec.special.decoder_start), ids[:, half:-1]], dim=1)
                base(ids[:, :half], decoder_input_ids=begun)
            else:
                base(ids)
    assert set(seen) >= set(paths)
    for name in seen:
        torch.testing.assert_close(found(name), seen[name], rtol=1e-5, atol=1e-4)
    twice = [name for name in set(reads) if reads.count(name) > 1 and name != "embedding.weight"]
    assert not twice
    torch.testing.assert_close(found(paths[0]), seen[paths[0]], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found(paths[-1]), seen[paths[-1]], rtol=1e-5, atol=1e-4)


def test_another_measure_and_the_text_of_a_model_without_words():
    base = tiny.model()
    name = "decoder.layers.1.feedforward.op.down"
    state = {key: p.detach() for key, p in base.named_parameters()}
    texts = random_texts(base.spec)
    assert [len(text) for text in texts(None)] == [64] * 32
    found = Calibration(base.spec, state, lambda: texts(None)[:2], [name], energy)(name)
    rows: list[Tensor] = []
    base.get_submodule(name).register_forward_pre_hook(lambda _, given: rows.append(given[0].detach()))
    for text in texts(None)[:2]:
        base(torch.tensor([text]))
    torch.testing.assert_close(found, torch.cat(rows).flatten(0, 1).double().square().sum(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(LaminaError, match="reads ids, not a text"):
        texts("book.txt")


def test_the_model_that_comes_out_works(tmp_path: Any):
    for shape in SHAPES:
        model, _ = operated(tiny.model(SHAPES[shape], scale=1.0), FIT)
        works(model, ids_of(model), tmp_path / shape)


def test_what_a_fit_lost_is_said(tmp_path: Any):
    """In the history of what is written: nothing of planted heads, more of others, and never more than all."""
    figures = []
    for name, base in (("planted", planted(tiny.model(scale=1.0))), ("random", tiny.model())):
        lamina.save(base, tmp_path / name)
        tiny.tokenizer().save(tmp_path / name)
        opened, done = editing.planned(tmp_path / name, [FIT, {"op": "window", "back": 9}])
        assert done.fits == ({}, {})
        editing.write(opened, done, tmp_path / f"{name}-one")
        line = json.loads((tmp_path / f"{name}-one" / "history.json").read_text())[-1]
        assert set(line["fits"][0]) == {f"decoder.layers.{i}.attention" for i in range(2)} and line["fits"][1] == {}
        figures.append(max(line["fits"][0].values()))
        model, _ = lamina.edit(lamina.load(tmp_path / name), [FIT], texts=[[1, 2, 3]])
        assert model.origin.history[-1]["fits"][0] == pytest.approx(line["fits"][0], abs=1e-6)
    assert figures[0] < 1e-5 and 0.05 < figures[1] < 1
    said = fit_lines(done)
    assert said[1].startswith("key_heads: of what is fitted ") and "at most" in said[1] and len(said) == 2


def test_nothing_is_read_before_a_weight_is_asked_for():
    class Closed(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(f"{key} was read")

    base = tiny.model()
    done = apply(read_plan([FIT]), base.spec, Closed(base.named_parameters()))
    table = {weight.name: weight for weight in done.table}
    name = "decoder.layers.1.attention.op.k.weight"
    assert table[name].how == ("least squares of 2 heads",) and table[name].shape == (8, 32)
    assert done.promises[0].kept == "lossy" and done.undo is None


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([FIT | {"text": "absent.txt"}], r"text='absent.txt': no such file"),
        ([FIT | {"by": "mean", "text": "a.txt"}], "text is for by: least_squares"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(plan: list[dict[str, Any]], said: str):
    with pytest.raises(LaminaError, match=said):
        operated(tiny.model(), *plan)


NORMED = {
    "RMSNorm": {"qk_norm": RMSNormSpec(eps=1e-14)},
    "Gemma's": {"qk_norm": RMSNormSpec(eps=1e-14, plus_one=True), "bias": "qkv"},
    "LayerNorm": {"qk_norm": LayerNormSpec(eps=1e-14), "bias": "qkv"},
}


@pytest.mark.parametrize("name", NORMED)
def test_normed_keys_of_one_direction_lose_nothing(name: str):
    """Keys that are multiples of each other have one direction; values are any maps of the first head's."""
    base = small.build(small.decoder([Causal(), Causal()], heads=6, key_heads=3, **NORMED[name]))
    draw = torch.Generator().manual_seed(3)
    for attention in attentions(base):
        maps = [torch.randn(8, 8, generator=draw, dtype=torch.float64) for _ in range(2)]
        with torch.no_grad():
            for tensor, of in ((attention.k, (0.2, 7.0)), (attention.v, maps)):
                for one in (one for one in (tensor.weight, tensor.bias) if one is not None):
                    heads = one.view(3, 8, -1)
                    for head, map in enumerate(of, 1):
                        heads[head] = map * heads[0] if isinstance(map, float) else map @ heads[0]
    ids = small.ids(2, 13)
    model, _ = operated(base, FIT)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-5)
    mean, _ = operated(base, FIT | {"by": "mean"})
    assert (run(mean, ids) - run(base, ids)).abs().max() > 1e-2


def test_normed_keys_are_the_mean_of_directions_in_naive_numbers():
    base = small.build(small.decoder([Causal()], heads=6, key_heads=3, qk_norm=LayerNormSpec(), bias="qkv"))
    attention = attentions(base)[0]
    texts, rows = [small.ids(1, 40, seed=5)[0].tolist()], []
    hook = attention.register_forward_pre_hook(lambda _, given: rows.append(given[0].detach()))
    run(base, torch.tensor(texts))
    hook.remove()
    state = {name: one.detach() for name, one in base.named_parameters()}
    done = apply(read_plan([FIT]), base.spec, state, Outside(texts=lambda path: texts))
    expected = torch.zeros(8, 16, dtype=torch.float64)
    for head in range(3):
        keys = rows[0][0] @ attention.k.weight[8 * head : 8 * head + 8].T + attention.k.bias[8 * head : 8 * head + 8]
        variance = (keys - keys.mean(-1, keepdim=True)).square().mean()
        expected += (attention.k.weight[8 * head : 8 * head + 8] / variance.sqrt() / 3).detach()
    got = done.weights["decoder.layers.0.attention.op.k.weight"]
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=0, atol=1e-6)
    query = "decoder.layers.0.attention.op.q.weight"
    assert torch.equal(done.weights[query], state[query]) and 0 < done.fits[0]["decoder.layers.0.attention"] < 1


def test_what_lies_between_projections_and_scores_is_refused():
    with pytest.raises(UnsupportedError, match="its relative lies between"):
        operated(small.build(small.decoder([Causal()], "shaw"), torch.float32), FIT)
    with pytest.raises(LaminaError, match=r"router.weight is new and has no values yet"):
        operated(tiny.model(), {"op": "experts", "experts": 2}, FIT)


@pytest.mark.slow
def test_smollm2_keeps_much_more_than_by_the_mean():
    """Three key heads to one in its first layers, fitted to the packaged sample; the verdict is on another text."""
    if packaged_path("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not here: lamina fetch smollm2-135m")
    model = lamina.load("smollm2-135m")
    text = "The river had been rising since noon, and by evening the bridge was closed. Nobody in the village slept."
    ids = [lamina.tokenizer("smollm2-135m").encode(text)]
    at = [f"decoder.layers.{i}" for i in range(6)]
    found = {
        by: lamina.edit(model, [{"op": "key_heads", "heads": 1, "by": by, "at": at}], texts=ids)[1].divergence
        for by in ("mean", "least_squares")
    }
    assert found["least_squares"] < 0.5 * found["mean"]
