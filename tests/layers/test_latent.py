"""Latent attention against the paper's equations in loops and transformers' modules; its two forms are one function."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.int8 import Int8Linear, quantize_int8
from lamina.layers import (
    AlibiSpec,
    Call,
    DynamicNTKScaling,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LatentAttentionSpec,
    LayerSpec,
    LinearScaling,
    Record,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
    YarnScaling,
)
from lamina.patterns import Causal, Everything, Pattern, Window
from lamina.tokens import Tokens, plain
from tests import small
from tests.oracle import rope

WIDTH = 12
ROTARY = RotarySpec(base=50.0, interleaved=True)
DEEP = YarnScaling(factor=4.0, original=8, scale=0.7, scale_all=1.3)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries from the width": {"query_rank": None},
    "without positions": {"rotary": None},
    "half-split": {"rotary": RotarySpec(base=50.0)},
    "partly turned": {"rotary": RotarySpec(base=50.0, width=4)},
    "biases": {"bias": True},
    "biases, queries from the width": {"bias": True, "query_rank": None},
    "scaled": {"scale": 0.9},
    "eps": {"norm": RMSNormSpec(eps=0.5)},
    "window": {"pattern": Causal() & Window(back=2)},
    "both ways": {"pattern": Everything()},
    "dropout in evaluation": {"dropout": 0.9},
}


def latent(**fields: Any) -> LatentAttentionSpec:
    sizes = {"heads": 3, "query_rank": 7, "key_rank": 5, "nope_dim": 4, "rope_dim": 6, "value_dim": 9}
    return LatentAttentionSpec(**sizes | {"rotary": ROTARY} | fields)


def module_of(spec: LatentAttentionSpec, dtype: torch.dtype = torch.float64) -> Any:
    module = spec.build(WIDTH).to(dtype).eval()
    small.shake(module)
    with torch.no_grad():
        module.kv_norm.weight.add_(1.0)
        if module.q_norm is not None:
            module.q_norm.weight.add_(1.0)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(module: Any, x: Tensor) -> Tensor:
    """(T, width) -> (T, width), a head, a query and a key at a time (arXiv:2405.04434, equations 37 to 47)."""
    spec, length = module.spec, len(x)

    def times(layer: Any, vector: Tensor) -> Tensor:
        return layer.weight @ vector + (0 if layer.bias is None else layer.bias)

    def norm(layer: Any, vector: Tensor) -> Tensor:
        return vector / (vector.square().mean() + spec.norm.eps).sqrt() * layer.weight

    def turned(vector: Tensor, position: int) -> Tensor:
        if spec.rotary is None:
            return vector
        size = spec.rotary.width or spec.rope_dim
        frequency = [spec.rotary.base ** (-2 * i / size) for i in range(size // 2)]
        return rope(vector[None, None], [position], frequency, spec.rotary.interleaved)[0, 0]

    size = spec.nope_dim + spec.rope_dim
    scale = size**-0.5 if spec.scale is None else spec.scale
    queries, latents, shared = [], [], []
    for t, token in enumerate(x):
        small = token if module.q_down is None else norm(module.q_norm, times(module.q_down, token))
        queries.append((times(module.q, small).view(spec.heads, size), t))
        both = times(module.kv_down, token)
        latents.append(norm(module.kv_norm, both[: spec.key_rank]))
        shared.append(turned(both[spec.key_rank :], t))
    rows = []
    for query, t in queries:
        seen = range(length) if spec.pattern == Everything() else range(t + 1)
        seen = [s for s in seen if not isinstance(spec.pattern, type(Causal() & Window(back=2))) or t - s < 2]
        out = []
        for h in range(spec.heads):
            up_k = module.k.weight[h * spec.nope_dim : (h + 1) * spec.nope_dim]
            up_v = module.v.weight[h * spec.value_dim : (h + 1) * spec.value_dim]
            own, with_position = query[h, : spec.nope_dim], turned(query[h, spec.nope_dim :], t)
            scores = torch.stack([own @ (up_k @ latents[s]) + with_position @ shared[s] for s in seen]) * scale
            values = torch.stack([up_v @ latents[s] for s in seen])
            out.append(scores.softmax(0) @ values)
        rows.append(times(module.o, torch.cat(out)))
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_the_paper_written_out(name: str, form: str, monkeypatch: pytest.MonkeyPatch):
    module = module_of(latent(**CASES[name]))
    monkeypatch.setattr(module, "absorbs", lambda queries, keys: form == "absorbed")
    x = random(2, 6, WIDTH)
    found = module(x, Call(tokens=plain(2, 6)))
    for row in range(2):
        torch.testing.assert_close(found[row], written_out(module, x[row]), rtol=0, atol=5e-6)  # float32 phases
    biased = [(part.bias is not None) for part in (module.q, module.k, module.v, module.kv_down, module.o)]
    assert biased == [False] * 3 + [module.spec.bias] * 2


LAYOUTS = {
    "plain": plain(2, 7),
    "padded": Tokens(torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, -1]]), torch.zeros(2, 7).long()),
    "packed": Tokens(
        torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]),
    ),
}


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
@pytest.mark.parametrize("where", LAYOUTS)
def test_the_forms_agree_in_values_weights_and_gradients(where: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    module, found = module_of(latent(bias=True)), []
    bias = AlibiSpec(heads=3).build()
    for absorbed in (True, False):
        monkeypatch.setattr(module, "absorbs", lambda queries, keys, absorbed=absorbed: absorbed)
        x, record = random(2, 7, WIDTH).requires_grad_(), Record("*.weights")
        module.zero_grad()
        out = module(x, Call(tokens=LAYOUTS[where], backend=backend, record=record, bias=bias))
        (out * random(2, 7, WIDTH, seed=1)).sum().backward()
        (shares,) = record.values.values()
        assert shares.shape == (2, 3, 7, 7)
        found.append([out, shares, x.grad, *(p.grad for p in module.parameters())])
    assert all(bool(each.any()) for each in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [True, False])
def test_a_bias_of_the_stack_is_added_to_the_scores(absorbed: bool, monkeypatch: pytest.MonkeyPatch):
    module, tokens, bias = module_of(latent()), plain(1, 6), AlibiSpec(heads=3).build()
    monkeypatch.setattr(module, "absorbs", lambda queries, keys: absorbed)
    x, shares = random(1, 6, WIDTH), []
    for given in (None, bias):
        record = Record("*.weights")
        module(x, Call(tokens=tokens, record=record, bias=given))
        shares += record.values.values()
    weighed = shares[0] * bias(tokens, tokens, {}).double().exp()
    torch.testing.assert_close(shares[1], weighed / weighed.sum(dim=-1, keepdim=True), rtol=0, atol=1e-12)


def test_the_form_that_multiplies_less_is_taken():
    sizes = {"heads": 128, "query_rank": 1536, "key_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    with torch.device("meta"):
        module = LatentAttentionSpec(**sizes).build(7168)
    assert module.absorbs(1, 2) and module.absorbs(1, 100_000) and module.absorbs(100, 4096)
    assert not module.absorbs(1, 1) and not module.absorbs(1000, 1000) and not module.absorbs(1000, 4096)
    # 131072 T + 1088 T S < 131072 S + 320 T S at S = 4096: T < 163.84
    assert module.absorbs(163, 4096) and not module.absorbs(164, 4096)


def model_of(pattern: Pattern, **fields: Any) -> lamina.ModelSpec:
    def layer(pattern: Pattern) -> LayerSpec:
        return LayerSpec(
            steps=(
                StepSpec(name="attention", op=latent(pattern=pattern, key_rank=12, **fields), pre=RMSNormSpec()),
                StepSpec(name="feedforward", op=FeedForwardSpec(hidden=24), pre=RMSNormSpec()),
            )
        )

    stack = StackSpec(layers=(layer(pattern), layer(pattern)), norm=RMSNormSpec())
    embedding = EmbeddingSpec(vocabulary=small.VOCABULARY)
    return lamina.ModelSpec(width=WIDTH, embedding=embedding, decoder=stack, head=LanguageHeadSpec(), context=64)


@pytest.mark.parametrize(
    "pattern, rotary",
    [(Causal(), ROTARY), (Causal() & Window(back=4), ROTARY), (Causal(), None)],
    ids=["causal", "window", "without positions"],
)
def test_in_a_model_everything_that_always_holds_does(pattern: Pattern, rotary: RotarySpec | None):
    """Every kind of cache in any split, padding, packing, causality to the bit, backends, files."""
    report = lamina.verify(small.build(model_of(pattern, rotary=rotary)))
    assert report.passed, str(report)
    tried = {row.property for row in report.rows if row.verdict == "holds"}
    kinds = {"auto", "growing", "fixed", "sinks"} | ({"ring"} if pattern != Causal() else set())
    assert tried >= {f"cached decoding = the whole text, cache '{kind}'" for kind in kinds}
    assert {"later tokens change no earlier bit", "packed = alone", "backends agree"} <= tried


@torch.no_grad()
def test_a_cache_keeps_the_latents_and_nothing_else():
    model = small.build(model_of(Causal()))
    ids, cache = small.ids(2, 9), model.new_cache("fixed", 2, 9)
    op = model.decoder.layers[0]["attention"].op  # pyright: ignore
    assert op.absorbs(1, 9) and not op.absorbs(9, 9)  # so models read with one form and write with the other
    whole = model(ids).hidden
    parts = [model(ids[:, at : at + 1], cache=cache).hidden for at in range(9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    assert cache.bytes() == 2 * 2 * 9 * (12 + 6) * 8  # layers, rows, tokens, key_rank + rope_dim, float64
    slot = cache.slot("decoder.layers.0.attention.op")
    assert slot.key is not None and slot.key.shape == (2, 1, 9, 18)
    attention = model.decoder.layers[0]["attention"]  # pyright: ignore
    x = attention.pre(model.embedding(ids))
    normed = attention.op.kv_norm(attention.op.kv_down(x)[..., :12])
    torch.testing.assert_close(slot.key[:, 0, :, :12], normed, rtol=0, atol=1e-12)
    shared = attention.op.kv_down(x)[..., 12:]
    expected = torch.stack(
        [rope(row[None], list(range(9)), [50.0 ** (-i / 3) for i in range(3)], True) for row in shared]
    )
    torch.testing.assert_close(slot.key[:, :, :, 12:], expected, rtol=0, atol=5e-6)


def test_the_cache_of_deepseek_v3_is_576_numbers_a_token_and_layer():
    sizes = {"heads": 128, "query_rank": 1536, "key_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    op = LatentAttentionSpec(**sizes, rotary=RotarySpec(interleaved=True))
    layer = LayerSpec(steps=(StepSpec(name="attention", op=op, pre=RMSNormSpec()),))
    spec = lamina.ModelSpec(
        width=7168, embedding=EmbeddingSpec(vocabulary=8), decoder=StackSpec(layers=(layer,) * 61), context=4096
    )
    found = lamina.account(spec)
    assert found.cache_bytes == 61 * 576 * 2 * 4096 == 70_272 * 4096
    # W_DQ, W_UQ, W_DKV, W_UK, W_UV, W_O and two norms; the norm of the step; the token table
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
    assert found.parameters == 61 * (attention + 7168) + 8 * 7168
    # A step: the six products of one token, absorbed, and scores and values of 4096 keys.
    step = 2 * (attention - 2048) + 2 * 128 * 4096 * (576 + 512)
    assert found.flops_per_token == 61 * step


@pytest.mark.parametrize("query_rank", [7, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["v2", "v3", "v3, half-split"])
@torch.no_grad()
def test_it_is_the_attention_of_transformers(kind: str, bias: bool, query_rank: int | None):
    from transformers import DeepseekV2Config, DeepseekV3Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    yarn = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 8}
    yarn |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    said = {"hidden_size": WIDTH, "num_attention_heads": 3, "q_lora_rank": query_rank, "kv_lora_rank": 8}
    said |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 9, "attention_bias": bias}
    said |= {"max_position_embeddings": 32, "rope_parameters": yarn, "num_key_value_heads": 3}
    if kind == "v2":
        config = DeepseekV2Config(**said)
        theirs, phases = v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
    else:
        config = DeepseekV3Config(**said, rope_interleave=kind == "v3")
        theirs, phases = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    config._attn_implementation = "eager"
    rotary = RotarySpec(base=50.0, interleaved=kind != "v3, half-split", scaling=DEEP)
    ours = module_of(latent(query_rank=query_rank, key_rank=8, bias=bias, rotary=rotary), torch.float32)
    state = {f"o_proj.{name}": value for name, value in ours.o.named_parameters()}
    state |= {f"kv_a_proj_with_mqa.{name}": value for name, value in ours.kv_down.named_parameters()}
    state["kv_a_layernorm.weight"] = ours.kv_norm.weight
    up = (ours.k.weight.view(3, 4, 8), ours.v.weight.view(3, 9, 8))  # transformers' V2 needs an even row
    state["kv_b_proj.weight"] = torch.cat(up, dim=1).flatten(0, 1)
    if query_rank is None:
        state["q_proj.weight"] = ours.q.weight
    else:
        state |= {f"q_a_proj.{name}": value for name, value in ours.q_down.named_parameters()}
        state |= {"q_a_layernorm.weight": ours.q_norm.weight, "q_b_proj.weight": ours.q.weight}
    theirs.load_state_dict(state)
    x = random(2, 20, WIDTH).float()
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    expected, shares = theirs(
        x, position_embeddings=phases(x, torch.arange(20)[None]), attention_mask=mask, past_key_values=None
    )
    record = Record("*.weights")
    found = ours(x, Call(tokens=plain(2, 20), record=record))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next(iter(record.values.values())), shares, rtol=1e-5, atol=1e-6)


def test_yarn_sharpens_the_scores():
    temperature = 0.1 * 1.3 * math.log(4.0) + 1.0
    assert latent(rotary=RotarySpec(scaling=DEEP)).build(WIDTH).scale == pytest.approx(10**-0.5 * temperature**2)
    for scaling in (None, LinearScaling(factor=4.0), YarnScaling(factor=4.0, original=8)):
        assert latent(rotary=RotarySpec(scaling=scaling)).build(WIDTH).scale == 10**-0.5
    assert latent(rotary=RotarySpec(scaling=DEEP), scale=0.3).build(WIDTH).scale == 0.3


def test_dropout_is_on_in_training_only():
    module = module_of(latent(dropout=1.0))
    x, call = random(1, 4, WIDTH), Call(tokens=plain(1, 4))
    assert bool(module(x, call).any())
    assert not bool(module.train()(x, call).any())


@torch.no_grad()
def test_8_bits_leave_what_is_absorbed_as_it_is():
    model = small.build(model_of(Causal()), torch.float32)
    ids = small.ids(1, 9)
    before = model(ids).logits
    kept = model.decoder.layers[0]["attention"].op.k.weight.clone()  # pyright: ignore
    quantize_int8(model)
    op = model.decoder.layers[0]["attention"].op  # pyright: ignore
    assert isinstance(op.q, Int8Linear) and isinstance(op.kv_down, Int8Linear) and torch.equal(op.k.weight, kept)
    after = model(ids).logits
    assert 0 < float((after - before).abs().max()) < 0.2 * float(before.abs().max())
    cache = model.new_cache()
    parts = [model(ids[:, at : at + 1], cache=cache).logits for at in range(9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 0}, "heads is 0"),
        ({"query_rank": 0}, "query_rank is 0"),
        ({"rope_dim": 5}, "rotary.width=5 must be even"),
        ({"rotary": RotarySpec(width=8)}, "rotary.width=8 must be even and at most rope_dim=6"),
        ({"dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(LaminaError, match=message):
        latent(**fields)


def test_what_has_no_cache_says_so():
    with pytest.raises(UnsupportedError, match="its tokens see later ones"):
        model_of(Everything()).build().new_cache()
    limited = model_of(Causal(), rotary=RotarySpec(scaling=DynamicNTKScaling(factor=2.0, original=8))).build()
    assert limited.cache_limit == 8
