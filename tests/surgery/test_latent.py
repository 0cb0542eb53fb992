"""Latent attention made of grouped: exact where it is promised, the best low rank elsewhere, and it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LatentAttentionSpec, RMSNormSpec, RotarySpec, YarnScaling
from lamina.layers.rotary import table
from lamina.patterns import Causal, Everything, Window
from lamina.surgery import Outside, apply, build, read_plan, said
from lamina.surgery.latent import standstill
from tests import small, tiny
from tests.surgery.test_fitting import attentions
from tests.surgery.test_operations import ids_of, operated, run, works

WHOLE = {
    "gpt2": (tiny.GPT2, 33),  # the layer reads 32 features, and has biases
    "bert": (tiny.BERT, 33),
    "t5": (tiny.T5, 32),
    "llama with one key head": (tiny.LLAMA | {"num_key_value_heads": 1}, 8),  # its values; its key is what turns
}


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_exact_at_full_rank(name: str, tmp_path: Path):
    config, rank = WHOLE[name]
    base = tiny.model(config, scale=1.0)
    small.shake(base)  # biases that matter
    ids = ids_of(base)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    plan = {"op": "latent", "rank": rank}
    model, new = operated(base.double(), plan)
    for given in (None, mask):
        rows = torch.ones_like(ids).bool() if given is None or base.spec.two_stacks else mask.bool()
        expected, got = run(base, ids, given)[rows], run(model, ids, given)[rows]
        assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    state = {key: p.detach() for key, p in base.named_parameters()}
    done = apply(read_plan([plan]), base.spec, state)
    assert not new and done.promises[0].kept == "exact"
    assert (done.undo is None) == ("llama" in name)  # its heads would be larger
    less, _ = operated(base, plan | {"rank": rank // 2})
    assert float((run(less, ids) - run(base, ids)).abs().max()) > 1e-4
    works(model.float(), ids, tmp_path)


BACK = {
    "gpt2": (tiny.spec(tiny.GPT2), 33),
    "bert": (tiny.spec(tiny.BERT), 33),
    "t5": (tiny.spec(tiny.T5), 32),
    "fewer key heads": (small.decoder([Causal(), Causal()], "learned", heads=6, key_heads=3).replace(context=40), 16),
    "positions in the scores": (small.decoder([Causal()], "alibi", heads=4, key_heads=1, scale=0.4), 16),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BACK)
def test_what_does_not_turn_leads_back(name: str, seed: int):
    """To the spec, and to the weights but for rounding; in plans of JSON too."""
    spec, rank = BACK[name]
    base = small.build(spec, seed=seed)
    ids, state = ids_of(base), {key: p.detach() for key, p in base.named_parameters()}
    done = apply(read_plan([{"op": "latent", "rank": rank}]), base.spec, state)
    model, _ = build(done.spec, done.weights)
    assert done.kept == "exact" and done.undo is not None
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    again, new = build(back.spec, back.weights)
    assert back.spec == base.spec and not new and set(back.weights) == set(state)
    expected = run(base, ids)
    assert float((run(again, ids) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    for key in state:  # keys and values come back by themselves, not only what is made of them
        scale = float(state[key].abs().max())
        torch.testing.assert_close(again.get_parameter(key), base.get_parameter(key), rtol=0, atol=1e-5 * scale)


LATENT: dict[str, dict[str, Any]] = {
    "all of it": {"query_rank": 7, "bias": True, "rotary": RotarySpec(base=50.0, interleaved=True)},
    "wide values": {"value_dim": 13, "rotary": RotarySpec(base=50.0)},
    "some of it turns": {"rope_dim": 6, "rotary": RotarySpec(base=50.0, width=4), "bias": True},
    "YaRN": {"rotary": RotarySpec(base=50.0, scaling=YarnScaling(factor=4.0, original=16, scale_all=0.7))},
    "nothing turns": {"rope_dim": 0, "scale": 0.3, "query_rank": 5},
}


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_is_multi_head_attention(name: str, tmp_path: Path):
    """By the layer that knows of no small vector, with padding on either side, whole and token by token."""
    fields = {"heads": 3, "key_rank": 5, "nope_dim": 6, "rope_dim": 4, "value_dim": 3, "norm": None} | LATENT[name]
    spec = small.decoder([Causal(), Causal() & Window(back=5)])
    layers = tuple(
        layer.replace(
            steps=(
                layer.steps[0].replace(op=LatentAttentionSpec(**fields, pattern=layer.steps[0].op.pattern)),
                layer.steps[1],
            )
        )
        for layer in spec.decoder.layers
    )
    base = small.build(spec.replace(decoder=spec.decoder.replace(layers=layers), context=40))
    ids = ids_of(base)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    model, new = operated(base, {"op": "multi_head"})
    assert not new and model.spec.decoder.layers[0].steps[0].op.key_heads == 3
    for given in (None, mask):
        rows = torch.ones_like(ids).bool() if given is None else mask.bool()
        expected, got = run(base, ids, given)[rows], run(model, ids, given)[rows]
        assert float((got - expected).abs().max()) <= 1e-11 * float(expected.abs().max())
    works(model.float(), ids, tmp_path, verified=name == "all of it")


def test_a_norm_of_the_small_vector_is_no_part_of_a_matrix():
    spec = small.decoder([Causal()])
    step = spec.decoder.layers[0].steps[0]
    op = LatentAttentionSpec(heads=2, key_rank=5, nope_dim=6, rope_dim=0, value_dim=3)
    layer = spec.decoder.layers[0].replace(steps=(step.replace(op=op),))
    model = small.build(spec.replace(decoder=spec.decoder.replace(layers=(layer,))))
    with pytest.raises(UnsupportedError, match="decoder.layers.0.attention: a norm stands between the maps"):
        operated(model, {"op": "multi_head"})


@pytest.mark.parametrize("name", WHOLE)
def test_in_float32(name: str):
    config, rank = WHOLE[name]
    base = tiny.model(config, scale=1.0)
    model, _ = operated(base, {"op": "latent", "rank": rank})
    expected = run(base, ids_of(base))
    assert float((run(model, ids_of(base)) - expected).abs().max() / expected.abs().max()) <= 1e-6


@pytest.mark.parametrize("scheme", ["rotary", "interleaved"])
@pytest.mark.parametrize("bias", ["none", "qkv"])
def test_heads_that_turn_alike_lose_nothing(scheme: str, bias: str, tmp_path: Path):
    """Keys of all heads are multiples of the first one's where they turn: that is all that a cache has to keep turning.
    Four of eight features turn in "rotary", all in "interleaved"."""
    base = small.build(small.decoder([Causal(), Causal()], scheme, heads=6, key_heads=3, bias=bias).replace(context=40))
    for attention in attentions(base):
        with torch.no_grad():
            for tensor in (attention.k.weight, attention.k.bias):
                if tensor is not None:
                    heads, turned = tensor.view(3, 8, -1), 4 if scheme == "rotary" else 8
                    heads[1, :turned], heads[2, :turned] = 0.5 * heads[0, :turned], -3 * heads[0, :turned]
    ids = small.ids(2, 13)
    model, _ = operated(base, {"op": "latent", "rank": 48})
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-5)
    works(model.float(), ids, tmp_path)


def test_what_is_lost_falls_with_the_rank():
    base = tiny.model(tiny.GPT2, scale=1.0)
    ids = ids_of(base)
    lost = [
        float((run(operated(base, {"op": "latent", "rank": rank})[0], ids) - run(base, ids)).norm())
        for rank in (2, 8, 24, 32)
    ]
    assert lost == sorted(lost, reverse=True) and lost[0] > 100 * lost[3]


def test_what_a_text_does_not_show_is_kept_at_full_rank():
    """Fitted to five tokens, which span five of 32 directions."""
    base = tiny.model(tiny.GPT2, scale=1.0).double()
    state = {key: p.detach() for key, p in base.named_parameters()}
    done = apply(
        read_plan([{"op": "latent", "rank": 33}]), base.spec, state, Outside(texts=lambda path: [[1, 2, 3, 4, 5]])
    )
    model, _ = build(done.spec, done.weights)
    torch.testing.assert_close(run(model, ids_of(base)), run(base, ids_of(base)), rtol=0, atol=1e-5)


def test_what_is_lost_is_said():
    """Nothing at full rank; with a key that turns for several heads, something at any rank."""
    for config, ranks in ((tiny.GPT2, (4, 16, 33)), (tiny.LLAMA, (4, 16, 32))):
        base, found = tiny.model(config, scale=1.0), []
        for rank in ranks:
            state = {key: p.detach() for key, p in base.named_parameters()}
            done = apply(read_plan([{"op": "latent", "rank": rank}]), base.spec, state)
            build(done.spec, done.weights)
            found.append(max(done.fits[0].values()))
        assert 1 > found[0] > found[1] > found[2] >= 0
        assert (found[2] < 1e-5) == (config is tiny.GPT2)


def test_the_cache_is_as_small_as_it_says():
    base = tiny.model(tiny.LLAMA | {"num_key_value_heads": 4})
    model, _ = operated(base, {"op": "latent", "rank": 10})
    ids = ids_of(base)
    sizes = []
    for one in (base, model):
        cache = one.new_cache(batch=2)
        one(ids, cache=cache)
        sizes.append(sum(slot.key.numel() + slot.value.numel() for slot in cache.slots.values()))
    assert sizes[1] * 2 * 4 * 8 == sizes[0] * (10 + 8)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_constant_in_place_of_a_phase_errs_least(ahead: bool):
    """The mean of the phases over all pairs that see each other, pair by pair."""
    rotary = RotarySpec(base=50.0)
    part = small.attention(rotary=rotary)
    if ahead:
        part = part.replace(pattern=Everything())
    values, _ = table(rotary, 8)
    found = standstill(part, 9)
    for pair, frequency in enumerate(values):
        angles = torch.tensor(
            [frequency * (key - query) for query in range(9) for key in range(9) if ahead or key <= query]
        )
        assert float(found[pair].real) == pytest.approx(float(angles.cos().mean()), abs=1e-6)
        assert float(found[pair].imag) == pytest.approx(float(angles.sin().mean()), abs=1e-6)
        phase = torch.complex(angles.cos(), angles.sin())
        assert float((phase - found[pair]).abs().square().mean()) == pytest.approx(1 - float(found[pair].abs()) ** 2)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"softcap": 9.0}, UnsupportedError, "latent attention has no softcap"),
        ({"sink": True}, UnsupportedError, "latent attention has no sink"),
        ({"qk_norm": RMSNormSpec()}, UnsupportedError, "its qk_norm lies between"),
        ({}, LaminaError, "its keys and values have 32 features"),
    ],
)
def test_what_it_cannot_be_made_of(fields: dict[str, Any], error: type[LaminaError], said: str):
    base = small.build(small.decoder([Causal()], **fields), torch.float32)
    with pytest.raises(error, match=said):
        operated(base, {"op": "latent", "rank": 33})
