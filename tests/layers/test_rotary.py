"""Rotary positions: one pair of one token at a time, transformers' frequency tables, and their invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    Call,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RotarySpec,
    YarnScaling,
)
from lamina.layers.cached import with_cache
from lamina.layers.rotary import phases, rotate, table
from lamina.patterns import Causal
from lamina.tokens import HOLE, Tokens, plain
from tests import small
from tests.oracle import rope


def turn(spec: RotarySpec, x: Tensor, tokens: Tokens) -> Tensor:
    cos, sin = phases(spec, x.shape[-1], tokens, x.dtype, {})
    return rotate(x, cos, sin, spec.interleaved)


def at(*positions: int) -> Tokens:
    position = torch.tensor([positions])
    return Tokens(position, torch.zeros_like(position))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [None, 2, 6])
def test_each_pair_turns_by_its_own_angle(interleaved: bool, width: int | None):
    x, positions = random(1, 3, 5, 8), [0, 1, 2, 7, 30]
    spec = RotarySpec(base=100.0, width=width, interleaved=interleaved)
    turned = width or 8
    frequency = [100.0 ** (-2 * i / turned) for i in range(turned // 2)]
    found = turn(spec, x, at(*positions))
    torch.testing.assert_close(found[0], rope(x[0], positions, frequency, interleaved), rtol=0, atol=2e-5)
    assert torch.equal(found[..., turned:], x[..., turned:])  # the rest passes
    assert torch.equal(found[:, :, 0], x[:, :, 0])  # position 0 is the identity
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, LinearScaling(factor=4.0), YarnScaling(factor=4.0, original=16)])
def test_scores_depend_on_distances_only(interleaved: bool, scaling: Any):
    spec = RotarySpec(base=50.0, interleaved=interleaved, scaling=scaling)
    query, key = random(1, 2, 6, 8), random(2, 2, 6, 8)[:1].flip(2)
    base = turn(spec, query, at(0, 1, 2, 3, 4, 5)) @ turn(spec, key, at(0, 1, 2, 3, 4, 5)).transpose(-1, -2)
    for shift in (1, 100, 5000):
        positions = at(*range(shift, shift + 6))
        moved = turn(spec, query, positions) @ turn(spec, key, positions).transpose(-1, -2)
        torch.testing.assert_close(moved, base, rtol=0, atol=5e-7 * max(shift, 30))  # float32 angles
    assert not torch.allclose(base, turn(spec, query, at(*[0] * 6)) @ turn(spec, key, at(*[0] * 6)).transpose(-1, -2))


def test_interleaved_is_half_split_after_a_permutation():
    """Rows [0, 2, ..., r - 2, 1, 3, ..., r - 1] of each head: what converting Meta's LLaMA files does."""
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    x, positions = random(1, 4, 5, 8), at(3, 1, 4, 1, 5)
    pairs = turn(RotarySpec(interleaved=True), x, positions)
    halves = turn(RotarySpec(), x[..., order], positions)
    torch.testing.assert_close(pairs[..., order], halves, rtol=0, atol=1e-12)
    assert not torch.allclose(turn(RotarySpec(), x, positions), pairs)
    # Partial: the slice that turns is permuted, the rest stays.
    part = [0, 2, 1, 3, 4, 5, 6, 7]
    pairs = turn(RotarySpec(interleaved=True, width=4), x, positions)
    torch.testing.assert_close(pairs[..., part], turn(RotarySpec(width=4), x[..., part], positions), rtol=0, atol=1e-12)


def test_layouts_agree_through_a_whole_attention_with_grouped_heads():
    """Projections, biases and norm scales of q and k permuted by head: interleaved and half-split give one output."""
    from lamina.layers import RMSNormSpec

    spec = small.attention(bias="all", qk_norm=RMSNormSpec(), rotary=RotarySpec(base=100.0, width=6, interleaved=True))
    pairs, halves = spec.build(16).double(), spec.replace(rotary=RotarySpec(base=100.0, width=6)).build(16).double()
    small.shake(pairs)
    state = {name: value.clone() for name, value in pairs.state_dict().items()}
    order = [0, 2, 4, 1, 3, 5, 6, 7]
    for name, heads in (("q", 4), ("k", 2)):
        rows = [8 * h + i for h in range(heads) for i in order]
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = state[f"{name}.{part}"][rows]
        state[f"{name}_norm.weight"] = state[f"{name}_norm.weight"][order]
    halves.load_state_dict(state)
    x, call = random(2, 7, 16), Call(tokens=plain(2, 7))
    torch.testing.assert_close(pairs(x, call), halves(x, Call(tokens=plain(2, 7))), rtol=0, atol=1e-12)


HEAD = 128
LONG = [float(1 + i / 7) for i in range(HEAD // 2)], [float(1 + i) for i in range(HEAD // 2)]
SCALINGS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "linear": (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}, 4096),
    "llama 3.1": (
        Llama3Scaling(factor=8.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
    "llama, others": (
        Llama3Scaling(factor=32.0, low=2.0, high=6.0, original=4096),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 4096,
        },
        131072,
    ),
    "yarn": (
        YarnScaling(factor=16.0, original=4096),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        65536,
    ),
    "yarn, others": (
        YarnScaling(factor=8.0, original=2048, beta_fast=24.0, beta_slow=2.0, attention=1.5, whole=False),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
            "truncate": False,
        },
        16384,
    ),
    "yarn, deepseek": (
        YarnScaling(factor=40.0, original=4096, scale=1.0, scale_all=0.8),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
        163840,
    ),
    "yarn, one scale": (
        YarnScaling(factor=40.0, original=4096, scale=0.7),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7},
        163840,
    ),
    "yarn, short": (
        YarnScaling(factor=2.0, original=6),  # less than a turn of the fastest pair: both ends of the ramp are at 0
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
        12,
    ),
    "yarn, beyond the last pair": (  # with base 20 the ramp would end after the last feature
        YarnScaling(factor=4.0, original=3000),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3000},
        12000,
    ),
    "yarn, factor below 1": (
        YarnScaling(factor=0.5, original=4096),
        {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
        2048,
    ),
    "longrope": (
        LongRopeScaling(short=tuple(LONG[0]), long=tuple(LONG[1]), original=4096, factor=32.0),
        {
            "rope_type": "longrope",
            "short_factor": LONG[0],
            "long_factor": LONG[1],
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        },
        131072,
    ),
    "longrope, attention": (
        LongRopeScaling(short=tuple(LONG[0]), long=tuple(LONG[1]), original=4096, factor=1.0, attention=1.3),
        {
            "rope_type": "longrope",
            "short_factor": LONG[0],
            "long_factor": LONG[1],
            "factor": 1.0,
            "attention_factor": 1.3,
            "original_max_position_embeddings": 4096,
        },
        4096,
    ),
    "longrope, not longer": (
        LongRopeScaling(short=tuple(LONG[0]), long=tuple(LONG[1]), original=4096, factor=1.0),
        {
            "rope_type": "longrope",
            "short_factor": LONG[0],
            "long_factor": LONG[1],
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
        },
        4096,
    ),
    "longrope, a little longer": (
        LongRopeScaling(short=tuple(LONG[0]), long=tuple(LONG[1]), original=4096, factor=1.5),
        {
            "rope_type": "longrope",
            "short_factor": LONG[0],
            "long_factor": LONG[1],
            "factor": 1.5,
            "original_max_position_embeddings": 4096,
        },
        6144,
    ),
    "longrope, shorter": (
        LongRopeScaling(short=tuple(LONG[0]), long=tuple(LONG[1]), original=4096, factor=0.5),
        {
            "rope_type": "longrope",
            "short_factor": LONG[0],
            "long_factor": LONG[1],
            "factor": 0.5,
            "original_max_position_embeddings": 4096,
        },
        4096,
    ),
    "dynamic": (DynamicNTKScaling(factor=2.0, original=512), {"rope_type": "dynamic", "factor": 2.0}, 512),
}


def theirs(said: dict[str, Any], context: int, base: float, length: int | None = None) -> tuple[Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        head_dim=HEAD,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": base} | said,
    )
    # Dynamic NTK is given the length as a tensor in a forward, and computes in float32 then.
    given: Any = torch.tensor(length) if said["rope_type"] == "dynamic" else length
    return ROPE_INIT_FUNCTIONS[said["rope_type"]](config, torch.device("cpu"), seq_len=given)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [20.0, 10_000.0, 500_000.0])
def test_frequencies_are_transformers(name: str, base: float):
    scaling, said, context = SCALINGS[name]
    spec = RotarySpec(base=base, scaling=scaling)
    for length in (1, 511, 512, 513, 4096, 4097, 9000) if "long" in name or name == "dynamic" else (1, 9000):
        frequency, scale = theirs(said, context, base, length)
        # What attention is given: cos of 1 radian a token each, at positions 0 .. length - 1.
        cos, sin = phases(spec, HEAD, at(0, 1, length - 1), torch.float32, {})
        angle = torch.tensor([0, 1, length - 1])[:, None].float() * frequency
        torch.testing.assert_close(cos[0, 0, :, : HEAD // 2], angle.cos() * scale, rtol=0, atol=1e-6)
        torch.testing.assert_close(sin[0, 0, :, HEAD // 2 :], angle.sin() * scale, rtol=0, atol=1e-6)
        if name != "dynamic":
            ours, factor = table(spec, HEAD, "longrope" in name and length > scaling.original)
            assert torch.equal(torch.tensor(ours), frequency) and factor == scale  # bit for bit


def test_published_numbers():
    def ratios(scaling: Any, base: float) -> list[float]:
        plain_ones, scaled = table(RotarySpec(base=base), 128)[0], table(RotarySpec(base=base, scaling=scaling), 128)[0]
        return [a / b for a, b in zip(plain_ones, scaled)]

    # Llama 3.1: pairs 0-28 unchanged, 29-34 blended, 35-63 divided by 8
    found = ratios(Llama3Scaling(factor=8.0), 500_000.0)
    assert found[:29] == [1.0] * 29 and found[35:] == pytest.approx([8.0] * 29, rel=1e-6)
    assert found[29:35] == pytest.approx([1.2075, 1.5534, 2.0263, 2.6945, 3.6843, 5.2573], abs=5e-5)
    # YaRN, factor 16, original 4096: 21 pairs unchanged, 18 divided by 16, phases 0.1 ln 16 + 1 larger
    found = ratios(YarnScaling(factor=16.0, original=4096), 10_000.0)
    assert sum(r == pytest.approx(1.0, rel=1e-6) for r in found) == 21
    assert sum(r == pytest.approx(16.0, rel=1e-6) for r in found) == 18
    assert table(RotarySpec(scaling=YarnScaling(factor=16.0, original=4096)), 128)[1] == pytest.approx(1.2772589)
    # NTK: base 10000 * 4^(128 / 126) = 40889.94
    frequency, scale = table(RotarySpec(scaling=NTKScaling(factor=4.0)), 128)
    assert frequency == pytest.approx([40889.94 ** (-i / 64) for i in range(64)], rel=1e-6) and scale == 1.0
    # LongRoPE: sqrt(1 + ln 32 / ln 4096)
    scaling = SCALINGS["longrope"][0]
    assert table(RotarySpec(scaling=scaling), 128)[1] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_the_length_is_that_of_each_row():
    """Dynamic NTK and LongRoPE: a short row beside a long one, and padding, change nothing for it."""
    for scaling in (
        DynamicNTKScaling(factor=2.0, original=8),
        LongRopeScaling(short=(1.0,) * 4, long=(3.0,) * 4, original=8, factor=4.0),
    ):
        spec = RotarySpec(base=50.0, scaling=scaling)
        position = torch.tensor([[*range(12)], [HOLE] * 6 + [*range(6)]])
        both = phases(spec, 8, Tokens(position, torch.zeros_like(position)), torch.float32, {})
        for row, real in ((0, position[0]), (1, position[1, 6:])):
            one = phases(spec, 8, at(*real.tolist()), torch.float32, {})
            for whole, part in zip(both, one):
                torch.testing.assert_close(whole[row, 0, -len(real) :], part[0, 0], rtol=0, atol=1e-6)
        short, long = phases(spec, 8, at(1, 7), torch.float32, {})[0], phases(spec, 8, at(1, 8), torch.float32, {})[0]
        assert not torch.equal(short[0, 0, 0], long[0, 0, 0])  # the ninth token changes the phases of the others


def test_the_wrong_number_of_divisors_is_refused():
    spec = RotarySpec(scaling=LongRopeScaling(short=(1.0,) * 3, long=(1.0,) * 4, original=8, factor=2.0))
    with pytest.raises(LaminaError, match="3 divisors; heads that turn 8 need 4"):
        phases(spec, 8, at(0), torch.float32, {})


@pytest.mark.parametrize("where", ["to bfloat16", "to_empty", "float16", "deepcopy"])
def test_phases_are_float32_whatever_becomes_of_the_model(where: str):
    """257 has no bfloat16: with rounded positions or frequencies, cos(4097) is 0.80 instead of 0.93."""
    import copy

    spec = small.attention(heads=1, key_heads=1, head_dim=64, rotary=RotarySpec(base=500_000.0))
    with torch.device("meta"):
        module = spec.build(64)
    module = module.to_empty(device="cpu")
    dtype = {"to bfloat16": torch.bfloat16, "float16": torch.float16}.get(where, torch.float32)
    module = copy.deepcopy(module).to(dtype)
    positions = at(257, 4097, 131_071)
    memo: dict[Any, Any] = {}
    x = torch.zeros(1, 1, 3, 64, dtype=dtype)
    x[..., :32] = 1  # (1, 0) for every pair: turns into (cos, sin)
    call = Call(tokens=positions, memo=memo)
    turned, *_ = with_cache("", call, x, x, x, module.spec.rotary, 64)
    found = turned[0, 0].double()
    assert not list(module.buffers())  # nothing that a cast could reach
    exact = [[p * 500_000.0 ** (-i / 32) for i in range(32)] for p in (257, 4097, 131_071)]
    wanted = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in exact], dtype=torch.float64)
    # float32 angles: half a unit in the last place of 131071 (2^-8), and of a frequency (2^-25) times the position
    bound = torch.tensor([257, 4097, 131_071], dtype=torch.float64)[:, None] * 2.0**-22 + {
        torch.bfloat16: 2.0**-8,
        torch.float16: 2.0**-11,
    }.get(dtype, 2.0**-23)
    assert ((found - wanted).abs() <= bound).all()
    assert bound.max() < 0.04
    assert abs(math.cos(4097) - 0.93477) < 1e-5 and abs(found[1, 0].item() - 0.93477) < 5e-3


def test_phases_are_computed_once_a_forward():
    memo: dict[Any, Any] = {}
    tokens, spec = plain(1, 4), RotarySpec()
    first = phases(spec, 8, tokens, torch.float32, memo)
    assert phases(spec, 8, tokens, torch.float32, memo)[0] is first[0]
    for other in (
        phases(RotarySpec(base=99.0), 8, tokens, torch.float32, memo),
        phases(spec, 4, tokens, torch.float32, memo),
        phases(spec, 8, plain(1, 4, start=1), torch.float32, memo),
        phases(spec, 8, tokens, torch.float64, memo),
    ):
        assert (
            other[0].shape != first[0].shape or other[0].dtype != first[0].dtype or not torch.equal(other[0], first[0])
        )


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicNTKScaling(factor=2.0, original=10),
        LongRopeScaling(short=(1.0, 1.0), long=(3.0, 3.0), original=10, factor=4.0),
    ],
)
def test_a_cache_is_refused_where_phases_depend_on_the_length(scaling: Any):
    spec = small.decoder([Causal()])
    step = spec.decoder.layers[0].steps[0]
    rotary = RotarySpec(base=100.0, width=4, scaling=scaling)
    layers = (spec.decoder.layers[0].replace(steps=(step.replace(op=step.op.replace(rotary=rotary)),)),)
    model = small.build(spec.replace(decoder=spec.decoder.replace(layers=layers)))
    assert model.cache_limit == 10
    ids = small.ids(1, 13)
    cache = model.new_cache("growing", 1)
    with torch.no_grad():
        found = torch.cat([model(ids[:, t : t + 1], cache=cache).hidden for t in range(10)], dim=1)
        torch.testing.assert_close(found, model(ids[:, :10]).hidden, rtol=0, atol=1e-12)
        with pytest.raises(UnsupportedError, match="11 tokens: beyond 10 the rotary phases depend on the length"):
            model(ids[:, 10:11], cache=cache)
        assert cache.length == 10
        longer = model(ids).hidden  # without a cache it may be longer
        assert not torch.allclose(longer[:, :10], found)
    assert small.build(spec).cache_limit is None
