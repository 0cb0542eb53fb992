"""Every attention backend against a loop over single rows of scores, in float64, forward and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lamina.attend import BACKENDS, Request, attend, weights
from lamina.errors import UnsupportedError
from lamina.patterns import Causal, Everything, Global, Pattern, Prefix, Sinks, Window, bigbird, strided
from lamina.tokens import HOLE, Tokens, plain
from tests.oracle import LAYOUTS, attention, layout, mask

PATTERNS = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Causal() & Window(back=3),
    "both ways": Window(back=2, ahead=1),
    "prefix": Prefix() | Causal(),
    "streaming": Causal() & (Window(back=2) | Sinks(count=1)),
    "dilated": Window(back=2, ahead=1, dilation=2),
    "longformer": Window(back=2, ahead=1) | Global(),
    "strided": strided(2)[1],
    "bigbird": bigbird(size=2, random_blocks=1),
}
MODIFIERS = {
    "none": (),
    "shared bias": ("bias of one row",),
    "bias": ("bias",),
    "softcap": ("softcap",),
    "sink": ("sink",),
    "value table": ("value_table",),
    "all": ("bias", "softcap", "sink", "value_table"),
}
GRID = [
    (pattern, where, heads, key_heads, modifiers)
    for pattern in PATTERNS
    for where in LAYOUTS
    for heads, key_heads in ((4, 2), (3, 3), (4, 1))
    for modifiers in (("none",) if key_heads != 2 else MODIFIERS if pattern == "window" else ("none", "bias", "all"))
]
TOLERANCE = 1e-11  # float64; scores below 10 in size, sums over at most 6 keys


def make(
    pattern: Pattern,
    where: str,
    heads: int = 4,
    key_heads: int = 2,
    modifiers: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int] = (4, 5),
) -> Request:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    queries, keys = layout(where)
    length, columns = queries.position.shape[1], keys.position.shape[1]
    size, value_size = sizes
    query, key = random(2, heads, length, size), random(2, key_heads, columns, size)
    value = random(2, key_heads, columns, value_size)
    bias = sink = table = None
    if "bias" in modifiers or "bias of one row" in modifiers:
        bias = random(2 if "bias" in modifiers else 1, heads, length, columns)
    if "sink" in modifiers:
        sink = random(heads)
    if "value_table" in modifiers:
        bucket = (keys.position[:, None] - queries.position[:, :, None]).clamp(-2, 2) + 2
        table = (random(5, value_size), bucket)
    return Request(
        query=query,
        key=key,
        value=value,
        queries=queries,
        keys=keys,
        pattern=pattern,
        scale=0.7,
        bias=bias,
        value_table=table,
        softcap=1.5 if "softcap" in modifiers else None,
        sink=sink,
    )


def leaves(request: Request) -> dict[str, Tensor]:
    found = {"query": request.query, "key": request.key, "value": request.value}
    optional = {"bias": request.bias, "sink": request.sink}
    optional["table"] = None if request.value_table is None else request.value_table[0]
    return found | {name: value for name, value in optional.items() if value is not None}


def gradients(out: Tensor, request: Request) -> dict[str, Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves(request).values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves(request).items(), found, strict=True)
    }


@pytest.mark.parametrize("pattern, where, heads, key_heads, modifiers", GRID)
def test_every_backend_equals_the_loop(pattern: str, where: str, heads: int, key_heads: int, modifiers: str):
    def request() -> Request:
        return make(PATTERNS[pattern], where, heads, key_heads, MODIFIERS[modifiers])

    expected = attention(one := request())
    expected_gradients = gradients(expected, one) if expected.requires_grad else {}
    served = [name for name, module in BACKENDS.items() if module.refuses(request()) is None]
    assert "dense" in served
    for backend in (*served, None):
        one = request()
        out = attend(one, backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE, msg=lambda m, b=backend: f"{b}: {m}")
        for name, gradient in gradients(out, one).items():
            want = expected_gradients.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(
                gradient, want, rtol=0, atol=TOLERANCE, msg=lambda m, b=backend, n=name: f"{b} {n}: {m}"
            )
    for backend in forward_only(one := request()):
        with torch.no_grad():
            torch.testing.assert_close(attend(one, backend), expected.detach(), rtol=0, atol=TOLERANCE)


def forward_only(request: Request) -> list[str]:
    """The backends that serve a request only where no gradient is asked for."""
    served = [name for name, module in BACKENDS.items() if module.refuses(request) is None]
    with torch.no_grad():
        return [name for name, module in BACKENDS.items() if name not in served and module.refuses(request) is None]


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_weights_are_the_probabilities(where: str, modifiers: str):
    request = make(Causal(), where, modifiers=MODIFIERS[modifiers])
    # With the identity for values, attention gives out its probabilities.
    columns = request.key.shape[2]
    eye = torch.eye(columns, dtype=torch.float64).expand(2, 2, -1, -1)
    expected = attention(replace(request, value=eye, value_table=None))
    found = weights(request)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    total = torch.where(mask(Causal(), request.queries, request.keys).any(-1), 1.0, 0.0)[:, None].expand(
        found.shape[:3]
    )
    if request.sink is None:
        torch.testing.assert_close(found.sum(-1), total.double())
    else:
        assert (found.sum(-1) <= total - 1e-3 * total).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("modifiers", MODIFIERS)
def test_lower_precision_stays_near_the_loop(dtype: torch.dtype, tolerance: float, modifiers: str):
    for where in ("plain", "left padding", "step"):
        request = make(Causal() & Window(back=4), where, modifiers=MODIFIERS[modifiers], dtype=dtype)
        exact = make(Causal() & Window(back=4), where, modifiers=MODIFIERS[modifiers])
        with torch.no_grad():
            for name in BACKENDS:
                if BACKENDS[name].refuses(request) is None:
                    out = attend(request, name)
                    assert out.dtype == dtype
                    torch.testing.assert_close(out.double(), attention(exact), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["plain", "left padding", "step"])
def test_a_bias_may_have_another_dtype_than_the_query(dtype: torch.dtype, where: str):
    """ALiBi's is float32 in every model; a table of T5's may be bfloat16 beside float32 queries."""
    request = make(Everything(), where, modifiers=("bias",), dtype=dtype)
    assert request.bias is not None
    bias = request.bias.float() if dtype != torch.float32 else request.bias.bfloat16()
    other, same = replace(request, bias=bias, memo={}), replace(request, bias=bias.to(dtype), memo={})
    with torch.no_grad():
        for backend, module in BACKENDS.items():
            if module.refuses(other) is None:
                assert torch.equal(attend(other, backend), attend(same, backend)), backend


def blinded(row: int) -> tuple[Tokens, Tokens]:
    """Queries of which one sees nothing at all, keys with two holes."""
    position = torch.tensor([[0, 1, 2, 3, HOLE], [HOLE, HOLE, 0, 1, 2]])
    keys = Tokens(position, torch.zeros_like(position))
    document = torch.zeros_like(position)
    document[:, row] = 7  # of a document without keys
    return Tokens(position, document), keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("length", [5, 1])
def test_a_row_that_sees_nothing_gives_zeros_and_zero_gradients(dtype: torch.dtype, modifiers: str, length: int):
    queries, keys = blinded(2)
    names = MODIFIERS[modifiers]
    for backend, module in BACKENDS.items():
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape, g=generator: torch.randn(*shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
        row = 2 if length == 5 else 0
        some = queries if length == 5 else Tokens(queries.position[:, 2:3], queries.document[:, 2:3])
        request = Request(
            query=random(2, 4, length, 8),
            key=random(2, 2, 5, 8),
            value=random(2, 2, 5, 8),
            queries=some,
            keys=keys,
            pattern=Causal(),
            scale=1.0,
            bias=random(1 if "bias of one row" in names else 2, 4, length, 5) if "bias" in " ".join(names) else None,
            softcap=2.0 if "softcap" in names else None,
            sink=random(4) if "sink" in names else None,
            value_table=(random(3, 8), torch.zeros(2, length, 5, dtype=torch.int64))
            if "value_table" in names
            else None,
        )
        if backend in forward_only(request):
            with torch.no_grad():
                out = attend(request, backend)
            assert torch.equal(out[:, :, row], torch.zeros_like(out[:, :, row])), backend
            assert out.isfinite().all()
        if module.refuses(request) is not None:
            continue
        out = attend(request, backend)
        assert torch.equal(out[:, :, row], torch.zeros_like(out[:, :, row])), backend
        assert out.isfinite().all()
        # Only what comes back through the row that sees nothing: nothing at all.
        upstream = torch.zeros_like(out)
        upstream[:, :, row] = 1
        for name, gradient in zip(leaves(request), torch.autograd.grad(out, list(leaves(request).values()), upstream)):
            assert torch.equal(gradient, torch.zeros_like(gradient)), (backend, name)
        for name, gradient in gradients(attend(replace(request, memo={}), backend), request).items():
            assert gradient.isfinite().all(), (backend, name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_nobody_sees_does_not_leak(poison: float, modifiers: str, dtype: torch.dtype):
    """torch's issue 101967: 0 * NaN is NaN. Keys in holes, and keys out of every query's window."""
    for where, pattern in (("left padding", Causal()), ("shuffled", Causal()), ("chunk", Causal() & Window(back=2))):
        clean = make(pattern, where, modifiers=MODIFIERS[modifiers], dtype=dtype)
        unseen = ~mask(pattern, clean.queries, clean.keys).any(dim=1)[:, None, :, None]
        assert unseen.any()
        spoilt = make(pattern, where, modifiers=MODIFIERS[modifiers], dtype=dtype)
        with torch.no_grad():
            spoilt.key.masked_fill_(unseen, poison)
            spoilt.value.masked_fill_(unseen, poison)
        for backend, module in BACKENDS.items():
            if module.refuses(clean) is None:
                expected, out = attend(clean, backend), attend(spoilt, backend)
                assert torch.equal(out, expected), backend
                wanted = gradients(expected, clean)
                for name, gradient in gradients(out, spoilt).items():
                    assert torch.equal(gradient, wanted[name]), (backend, name)
        for backend in forward_only(clean):
            with torch.no_grad():
                assert torch.equal(attend(spoilt, backend), attend(clean, backend)), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["plain", "left padding", "step"])
def test_dropout_zeroes_probabilities_and_scales_the_others(backend: str, where: str):
    torch.manual_seed(0)
    columns, heads = 6, 64
    queries, keys = layout(where)
    request = Request(
        query=torch.randn(2, heads, queries.position.shape[1], 4),
        key=torch.randn(2, heads // 2, columns, 4),
        value=torch.eye(columns).expand(2, heads // 2, -1, -1),  # out = the probabilities after dropout
        queries=queries,
        keys=keys,
        pattern=Everything(),
        scale=0.5,
        dropout=0.25,
    )
    if BACKENDS[backend].refuses(request) is not None:
        pytest.skip(f"{backend} refuses dropout")
    kept = attend(request, backend)
    whole = attend(replace(request, dropout=0.0), backend)
    dropped = (kept == 0) & (whole > 0)
    torch.testing.assert_close(kept[~dropped], whole[~dropped] / 0.75)
    share = dropped[whole > 0].float().mean().item()
    count = int((whole > 0).sum())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert not torch.equal(attend(request, backend), kept)
    assert torch.equal(attend(replace(request, dropout=1.0), backend), torch.zeros_like(whole))
    assert torch.equal(attend(replace(request, dropout=0.0), backend), whole)


def test_dropout_spares_no_term_of_the_values():
    request = replace(make(Causal(), "plain", modifiers=("value_table",)), dropout=1.0)
    assert torch.equal(attend(request, "dense"), torch.zeros(2, 4, 6, 5, dtype=torch.float64))


def test_a_backend_that_cannot_serve_says_what():
    for modifiers, said in (("softcap", "soft-cap"), ("sink", "sink"), ("value table", "values")):
        request = make(Causal(), "plain", modifiers=MODIFIERS[modifiers])
        with pytest.raises(UnsupportedError, match=f"'sdpa' cannot do .*{said}.*dense"):
            attend(request, "sdpa")
        torch.testing.assert_close(attend(request), attention(request))  # unasked, another one serves


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(UnsupportedError, match="did you mean 'sdpa'"):
        attend(make(Causal(), "plain"), "spda")


def test_the_mask_is_left_out_where_the_spans_allow_it(monkeypatch: pytest.MonkeyPatch):
    """A fast path that is never taken gives the right numbers too, so it needs a test of its own."""
    monkeypatch.setattr(Request, "mask", lambda self: pytest.fail("a mask was built"))
    for where, pattern in (("plain", Causal()), ("plain", Everything()), ("step", Causal()), ("step", Window(back=6))):
        request = make(pattern, where)
        torch.testing.assert_close(attend(request, "sdpa"), attention(request))
    torch.testing.assert_close(attend(one := make(Causal(), "step", modifiers=("bias",)), "sdpa"), attention(one))


def test_masks_are_built_once_a_pattern_and_forward(monkeypatch: pytest.MonkeyPatch):
    built = []
    call = Causal.__call__
    monkeypatch.setattr(Causal, "__call__", lambda self, q, k: built.append(1) or call(self, q, k))
    request = make(Causal() & Window(back=2), "left padding", modifiers=("bias",))
    for _ in range(3):
        attend(request, "sdpa")
        attend(request, "dense")
    assert len(built) == 1
    other = make(Causal() & Window(back=3), "left padding", modifiers=("bias",))
    other = replace(other, queries=request.queries, keys=request.keys, memo=request.memo)
    torch.testing.assert_close(attend(other, "sdpa"), attention(other))  # another pattern, another mask
    third = replace(request, bias=torch.randn_like(request.bias))
    torch.testing.assert_close(attend(third, "sdpa"), attention(third))  # another bias on the same mask
    assert sum(1 for name in request.memo if name[0] == "biased") == 2  # a layer's own bias is not kept for the next


def test_large_scores_do_not_overflow():
    queries = plain(1, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.full((1, 1, 3, 4), 100.0, dtype=dtype)
        request = Request(q, q, torch.ones_like(q), queries, queries, Causal(), 1.0)
        for backend in (name for name, module in BACKENDS.items() if module.refuses(request) is None):
            assert torch.equal(attend(request, backend), torch.ones_like(q)), (backend, dtype)
