"""Packed sequences: the kernel is replaced by a loop over sequences, so that all that stands before and after it is
tested without a GPU; on CUDA, the kernel itself against the dense oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.attend import attend, varlen
from lamina.errors import UnsupportedError
from lamina.patterns import Causal, Everything, Global, Pattern, Window, bigbird
from lamina.tokens import HOLE, Tokens, plain
from tests import oracle, test_blocks
from tests.test_attend import TOLERANCE, gradients, leaves, make
from tests.test_flex import Elsewhere, cuda, onto, request

PATTERNS: dict[str, Pattern] = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Causal() & Window(back=3),
    "both ways": Window(back=2, ahead=1),
    "only ahead": Window(back=1, ahead=3),
    "backwards without end": Window(back=2),
    "no window": Window(back=6, ahead=6),
}


def by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's varlen_attn as its documentation has it, one query of one head at a time: (N, H, D)."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends[-1] == len(query) and key_ends[-1] == len(key) == len(value)
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    out = []
    for (a, b), (c, d) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        assert a < b and c < d
        for i in range(a, b):
            at = d - (b - i)  # the last query stands beside the last key
            first = c if left < 0 else max(c, at - left)
            last = d if right < 0 else min(d, at + right + 1)
            for head in range(query.shape[1]):
                group = head // (query.shape[1] // key.shape[1])
                share = torch.softmax(key[first:last, group] @ query[i, head] * scale, dim=0)
                out.append(share @ value[first:last, group])
    return torch.stack(out).view(query.shape[0], query.shape[1], value.shape[2])


@pytest.fixture(autouse=True)
def slow_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(varlen, "_kernel", by_sequence)


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("where", oracle.LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packing_equals_the_loop_forward_and_gradient(pattern: str, where: str, heads: int, key_heads: int):
    one, other = (make(PATTERNS[pattern], where, heads, key_heads) for _ in range(2))
    found = varlen.packed(one)
    if isinstance(found, str):
        assert where == "shuffled" and pattern != "everything"
        return
    out, expected = varlen.attend(one), oracle.attention(other)
    real = one.queries.real[:, None, :, None]
    torch.testing.assert_close(out, torch.where(real, expected, 0.0), rtol=0, atol=TOLERANCE)
    wanted = gradients(torch.where(real, expected, 0.0), other)
    for name, gradient in gradients(out, one).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=TOLERANCE)


def tokens(positions: list[list[int]], documents: list[list[int]] | None = None) -> Tokens:
    position = torch.tensor(positions)
    return Tokens(position, torch.zeros_like(position) if documents is None else torch.tensor(documents))


def test_the_example_of_the_docstring():
    both = tokens([[0, 1, 2, 0, 1], [HOLE, HOLE, 0, 1, 2]], [[0, 0, 0, 3, 3], [0] * 5])
    found = varlen.packed(request(Causal(), both))
    assert isinstance(found, varlen.Packed)
    for side in (found.queries, found.keys):
        assert side.order is not None and side.order.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
        assert side.ends.tolist() == [0, 3, 5, 8] and side.longest == 3


def test_plain_rows_are_not_moved():
    found = varlen.packed(request(Causal() & Window(back=3), plain(3, 7)))
    assert isinstance(found, varlen.Packed) and found.queries.order is None and found.keys.order is None
    assert found.queries.ends.tolist() == [0, 7, 14, 21] and found.queries.longest == 7


def test_documents_that_alternate_are_brought_together():
    both = tokens([[0, 0, 1, 1, 2]], [[5, 9, 5, 9, 5]])
    one = request(Causal(), both)
    torch.testing.assert_close(varlen.attend(one), attend(one, "dense"))
    found = varlen.packed(one)
    assert isinstance(found, varlen.Packed) and found.queries.ends.tolist() == [0, 3, 5]


def test_documents_without_keys_or_queries():
    """A query whose document has no keys sees nothing, and gives zeros; keys that no query asks are left out."""
    queries, keys = tokens([[0, 1, 0]], [[1, 1, 2]]), tokens([[0, 1, 0]], [[1, 1, 4]])
    one = request(Causal(), queries, keys)
    torch.testing.assert_close(varlen.attend(one), attend(one, "dense"))
    found = varlen.packed(one)
    assert isinstance(found, varlen.Packed) and found.keys.ends.tolist() == [0, 2]
    nothing = request(Causal(), queries, tokens([[0]], [[4]]))
    assert torch.equal(varlen.attend(nothing), torch.zeros_like(nothing.query))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_nobody_sees_is_not_packed(poison: float):
    for where, pattern in (
        ("left padding", Causal()),
        ("chunk", Causal() & Window(back=2)),
        ("fixed", Causal()),
        ("documents", Causal() & Window(back=2)),
    ):
        clean = make(pattern, where)
        unseen = ~oracle.mask(pattern, clean.queries, clean.keys).any(dim=1)[:, None, :, None]
        key, value = (x.detach().masked_fill(unseen, poison) for x in (clean.key, clean.value))
        assert torch.equal(varlen.attend(replace(clean, key=key, value=value)), varlen.attend(clean)), where
        found = varlen.packed(clean)
        assert isinstance(found, varlen.Packed) and int(found.keys.ends[-1]) == int((~unseen).sum()), where


def test_tokens_that_the_kernel_cannot_count_are_refused():
    gap, repeated = tokens([[0, 1, 3]]), tokens([[0, 1, 1]])
    for both in (gap, repeated):
        assert varlen.packed(request(Causal(), both)) == varlen.GAPS
        one = request(Everything(), both)  # where all is seen, positions do not matter
        torch.testing.assert_close(varlen.attend(one), attend(one, "dense"))
    assert varlen.packed(request(Causal(), plain(1, 3), plain(1, 5))) == varlen.UNEVEN
    assert varlen.packed(request(Causal(), tokens([[0, 1]]), tokens([[0, 1, 2]]))) == varlen.UNEVEN
    one = request(Everything(), plain(1, 3), plain(1, 5))
    torch.testing.assert_close(varlen.attend(one), attend(one, "dense"))


def test_sequences_are_found_once_a_band_and_forward():
    one = request(Causal() & Window(back=3), tokens([[0, 1, 2, HOLE]]))
    assert varlen.packed(one) is varlen.packed(replace(one, pattern=Window(back=3, ahead=0)))
    assert varlen.packed(one) is not varlen.packed(replace(one, pattern=Causal()))
    assert varlen.packed(one) is not varlen.packed(replace(one, memo={}))


def test_what_packing_cannot_do_is_refused_by_name():
    whole = request(Causal() & Window(back=3), plain(1, 6))
    with pytest.raises(UnsupportedError, match="'varlen' cannot do tensors that are not on CUDA; backend 'dense' can"):
        attend(whole, "varlen")
    half = replace(whole, query=Elsewhere(whole.query.bfloat16()))
    assert varlen.refuses(half) is None
    for change, said in (
        (
            {"value_table": (torch.zeros(1, 16), torch.zeros(1, 6, 6, dtype=torch.int64))},
            "relative terms on the values",
        ),
        ({"bias": torch.zeros(1, 1, 6, 6)}, "a bias on the scores"),
        ({"softcap": 1.0}, "a soft-cap on the scores"),
        ({"sink": torch.zeros(2)}, "a learned sink"),
        ({"dropout": 0.1}, "dropout"),
        ({"query": Elsewhere(whole.query)}, "float32 (it has float16 and bfloat16)"),
        ({"value": whole.value[..., :8]}, "heads of 16 and 8 numbers (it has equal sizes, multiples of 8 up to 256)"),
        ({"pattern": bigbird()}, "a pattern that is not one band of keys around the query"),
        ({"pattern": Window(back=2) | Global()}, "a pattern that is not one band of keys around the query"),
        ({"keys": plain(1, 7)}, varlen.UNEVEN),
    ):
        assert varlen.refuses(replace(half, **change)) == said
    for size in (12, 264):
        some = half.query.tensor.new_zeros(1, 2, 6, size)
        assert "multiples of 8" in str(varlen.refuses(replace(half, query=Elsewhere(some), value=some)))


@pytest.mark.parametrize(
    "built, capability, serves", [(True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)]
)
def test_a_gpu_without_the_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch, built: bool, capability: tuple[int, int], serves: bool
):
    whole = request(Causal() & Window(back=3), plain(1, 6))
    half = replace(whole, query=Elsewhere(whole.query.bfloat16()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert (varlen.refuses(half) is None) == serves
    assert serves or "compute capability 8.0" in str(varlen.refuses(half))


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("where", ["plain", "chunk", "left padding", "right padding", "documents", "marked"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_and_gradient_on_cuda(pattern: str, where: str):
    """bfloat16, heads of 64, 300 tokens."""
    queries, keys = oracle.layout(where, length=300, chunk=130)
    exact = test_blocks.make(PATTERNS[pattern], (queries, keys), 4, 2, sizes=(64, 64))
    near = onto(exact, "cuda")
    rounded = {name: leaf.bfloat16().detach().requires_grad_() for name, leaf in leaves(near).items()}
    near = replace(near, **rounded, scale=0.125)
    exact = replace(
        exact, **{name: x.detach().double().cpu().requires_grad_() for name, x in rounded.items()}, scale=0.125
    )
    real = exact.queries.real[:, None, :, None]
    out, expected = attend(near, "varlen"), torch.where(real, attend(exact, "dense"), 0.0)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)
    wanted = gradients(expected, exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: Any = torch.autograd.grad(out, list(leaves(near).values()), upstream.bfloat16().cuda())
    for name, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient.cpu().double(), wanted[name], rtol=2e-2, atol=5e-2)
