"""FlexAttention: its tables of tiles against torch's own, what is kept and what is compiled; on CUDA its gradients.

Its numbers on the CPU are in the grid of test_attend. Tiles are a few tokens here, so that texts of forty have many.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from lamina.attend import BACKENDS, Request, attend, flex, tiles
from lamina.errors import UnsupportedError
from lamina.patterns import Causal, Everything, Global, Pattern, Window, bigbird
from lamina.tokens import HOLE, Tokens, plain
from tests import oracle, test_attend, test_blocks
from tests.test_attend import gradients, make

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIZE", 8)
    monkeypatch.setattr(tiles, "AT_ONCE", 5 * 8**2)
    tiles._plain.cache_clear()
    yield
    tiles._plain.cache_clear()


def request(pattern: Pattern, queries: Tokens, keys: Tokens | None = None, **more: Any) -> Request:
    keys = queries if keys is None else keys
    length, columns = queries.position.shape[1], keys.position.shape[1]
    generator = torch.Generator().manual_seed(0)
    batch = len(queries.position)
    query, key, value = (torch.randn(batch, 2, n, 16, generator=generator) for n in (length, columns, columns))
    return Request(query, key, value, queries, keys, pattern, 0.25, **more)


def listed(count: Tensor, order: Tensor) -> list[list[list[int]]]:
    """The tiles of each row and tile of queries, ascending."""
    return [
        [sorted(which[:n].tolist()) for n, which in zip(counts.tolist(), orders, strict=True)]
        for counts, orders in zip(count[:, 0], order[:, 0], strict=True)
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", test_blocks.LAYOUTS)
@pytest.mark.parametrize("pattern", test_blocks.PATTERNS)
def test_tiles_are_those_that_torch_finds_in_the_whole_mask(pattern: str, where: str):
    queries, keys = test_blocks.tokens(where)
    one = request(test_blocks.PATTERNS[pattern], queries, keys)
    found = tiles.tiled(one)
    whole = oracle.mask(one.pattern, queries, keys)
    length, columns = whole.shape[1:]
    batch = found.mask.kv_num_blocks.shape[0]
    wanted = create_block_mask(lambda b, h, i, j: whole[b, i, j], batch, None, length, columns, "cpu", 8)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    names += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    for count, order in zip(names[::2], names[1::2], strict=True):
        ours, theirs = (listed(getattr(x, count), getattr(x, order)) for x in (found.mask, wanted))
        assert ours == theirs, count
    unseen = ~whole.any(dim=1)
    assert torch.equal(
        torch.zeros_like(unseen) if found.blind is None else found.blind[:, 0, :, 0].expand_as(unseen), unseen
    )
    assert (found.blind is None) == (not unseen.any())


def test_tiles_cost_what_the_pattern_does(monkeypatch: pytest.MonkeyPatch):
    """Of 2^28 pairs of a text of 16,384 tokens, a window of 512 has 2^23 looked at; nothing is larger than a chunk."""
    looked = []
    call = Window.__call__
    monkeypatch.setattr(
        Window, "__call__", lambda self, q, k: looked.append((found := call(self, q, k)).numel()) or found
    )
    found = tiles.tiled(
        Request(*[torch.zeros(1, 1, 16384, 1)] * 3, *[plain(1, 16384)] * 2, Window(back=512, ahead=0), 1.0)
    )
    assert sum(looked) < 2**22.5 and max(looked) <= tiles.AT_ONCE
    assert int(found.mask.kv_num_blocks.sum() + found.mask.full_kv_num_blocks.sum()) < 128 * 5 + 1


def test_plain_tokens_share_their_tiles_across_forwards_and_modes():
    pattern = Causal() & Window(back=77)
    with torch.inference_mode():
        first = tiles.tiled(request(pattern, plain(2, 200)))
    again = tiles.tiled(request(pattern, plain(3, 200)))
    assert again is first and not first.mask.kv_indices.is_inference()
    assert tiles.tiled(request(pattern, plain(2, 201))) is not first
    assert tiles.tiled(request(Causal() & Window(back=78), plain(2, 200))) is not first
    assert tiles.tiled(request(pattern, plain(1, 200, start=100), plain(1, 300))) is not first


def test_other_tokens_share_their_tiles_within_a_forward():
    marked = plain(1, 40)
    marked = Tokens(marked.position, marked.document, marked.position == 3, marked.span)
    one = request(Window(back=3) | Global(), marked)
    first = tiles.tiled(one)
    assert tiles.tiled(replace(one, query=one.query + 1)) is first
    assert tiles.tiled(replace(one, memo={})) is not first  # of another forward, whose marks may be others
    assert tiles.tiled(replace(one, pattern=Window(back=4) | Global())) is not first
    assert tiles.tiled(replace(one, pattern=Causal())) is not first
    other = Tokens(marked.position, marked.document, marked.position == 30, marked.span)
    assert tiles.tiled(replace(one, queries=other, keys=other)) is not first


def test_rows_that_are_alike_are_planned_once():
    position = torch.tensor([[*range(20)], [HOLE] * 5 + [*range(15)], [*range(20)]])
    tokens = Tokens(position, torch.zeros_like(position))
    assert len(tiles.tiled(request(Causal(), tokens)).mask.kv_num_blocks) == 3
    same = Tokens(position[1:2].expand(3, -1), torch.zeros_like(position))
    assert len(tiles.tiled(request(Causal(), same)).mask.kv_num_blocks) == 1
    with torch.no_grad():
        for one in (request(Causal(), tokens), request(Causal(), same)):
            torch.testing.assert_close(attend(one, "flex"), attend(one, "dense"))


def test_what_flex_cannot_do_is_refused_by_name():
    grown = make(Causal(), "plain")
    with pytest.raises(UnsupportedError, match="'flex' cannot do gradients on the CPU; backend 'dense' can"):
        attend(grown, "flex")
    quiet = request(Causal(), plain(1, 6))
    for part in ("bias", "sink"):  # a gradient of what modifies the scores is one too
        tensor = torch.zeros(1, 1, 1, 6) if part == "bias" else torch.zeros(2)
        with pytest.raises(UnsupportedError, match="gradients on the CPU"):
            attend(replace(quiet, **{part: tensor.requires_grad_()}), "flex")
    for change, said in (
        ({"dropout": 0.1}, "dropout"),
        (
            {"value_table": (torch.zeros(1, 16), torch.zeros(1, 6, 6, dtype=torch.int64))},
            "relative terms on the values",
        ),
        ({"query": quiet.query.to("meta")}, "neither on the CPU nor on CUDA"),
        ({"query": Elsewhere(quiet.query.double())}, "float64 on CUDA"),
        ({"query": Elsewhere(quiet.query[..., :8])}, "heads of fewer than 16 numbers on CUDA"),
        ({"query": Elsewhere(quiet.query), "value": quiet.value[..., :8]}, "heads of fewer than 16 numbers on CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=f"'flex' cannot do {said}|'flex' cannot do .*{said}"):
            attend(replace(quiet, **change), "flex")


class Elsewhere:
    """A tensor that says it is on CUDA: for what is decided before anything is computed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.device = tensor, torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU takes the way of CUDA, with a compiler that compiles nothing; the list grows by one a kernel."""
    graphs: list[int] = []

    def compiler(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(len(examples))
        assert not any(isinstance(x, Tensor) and x.dim() == 0 for x in examples)  # numbers are constants of a kernel
        return graph

    kernel = torch.compile(flex._flex, backend=compiler, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    monkeypatch.setattr(flex, "_eager", flex._kernel)
    return graphs


@pytest.mark.parametrize("pattern, where", [("bigbird", "plain"), ("longformer", "marked"), ("causal", "documents")])
def test_what_is_compiled_is_the_same_function(monkeypatch: pytest.MonkeyPatch, pattern: str, where: str):
    graphs = traced(monkeypatch)
    one = make(test_attend.PATTERNS[pattern], where, modifiers=("bias", "softcap", "sink"))
    with torch.no_grad():
        torch.testing.assert_close(attend(one, "flex"), oracle.attention(one), rtol=0, atol=test_attend.TOLERANCE)
    assert graphs
    torch.compiler.reset()


def test_few_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch):
    """One for a kind of layer; one more when its lengths, or its number of rows, first change."""
    torch.compiler.reset()
    graphs = traced(monkeypatch)

    def run(pattern: Pattern, length: int, batch: int = 2, **more: Any) -> int:
        before, one = len(graphs), request(pattern, plain(batch, length), **more)
        with torch.no_grad():
            torch.testing.assert_close(attend(one, "flex"), attend(one, "dense"))
        return len(graphs) - before

    window = Causal() & Window(back=50)
    assert [run(window, length) for length in (300, 300, 450, 500, 700)] == [1, 0, 1, 0, 0]
    assert [run(window, 500, batch) for batch in (2, 3, 4)] == [0, 1, 0]
    assert [run(window, 500, softcap=cap) for cap in (3.0, 4.0, 4.0)] == [1, 1, 0]
    assert [run(Causal() & Window(back=back), 500) for back in (50, 60, 60)] == [0, 1, 0]
    drawn = [bigbird(size=32, random_blocks=2, seed=seed) for seed in (1, 2)]
    assert [run(pattern, 700) for pattern in drawn] == [1, 0]  # what was drawn is a tensor, not a constant
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, of its inductor
def test_a_kernel_of_the_cpu_compiles_too(monkeypatch: pytest.MonkeyPatch):
    """By inductor and not only by name: one kernel, whose tiles the compiled code skips by their table."""
    monkeypatch.setattr(flex, "_eager", flex._kernel)
    monkeypatch.setattr(tiles, "SIZE", 64)
    marked = plain(2, 300)
    marked = Tokens(marked.position, marked.document, marked.position % 100 == 7)
    one = request(Causal() & (Window(back=40) | Global()), marked, softcap=2.0)
    with torch.no_grad():
        torch.testing.assert_close(attend(one, "flex"), attend(one, "dense"))
    torch.compiler.reset()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CUDA = [(name, where, "none") for name in test_blocks.PATTERNS for where in ("plain", "left padding", "documents")]
ON_CUDA += [(name, "marked", modifiers) for name in test_blocks.PATTERNS for modifiers in ("none", "all")]
ON_CUDA += [("window", where, modifiers) for where in test_blocks.LAYOUTS for modifiers in test_blocks.MODIFIERS]


def onto(one: Request, device: str) -> Request:
    """The request with leaves of its own on another device."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().to(device).requires_grad_()

    tokens = tuple(tiles._on(x, torch.device(device)) for x in (one.queries, one.keys))
    parts = {name: moved(getattr(one, name)) for name in ("query", "key", "value", "bias", "sink")}
    return replace(one, **parts, queries=tokens[0], keys=tokens[1], memo={})


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("pattern, where, modifiers", dict.fromkeys(ON_CUDA))
def test_forward_and_gradient_on_cuda(pattern: str, where: str, modifiers: str):
    """float32, heads of 16 and values of 24, 300 tokens: three tiles a side."""
    names = test_blocks.MODIFIERS[modifiers]
    queries, keys = oracle.layout(where, length=300, chunk=130)
    exact = test_blocks.make(test_blocks.PATTERNS[pattern], (queries, keys), 4, 2, names, sizes=(16, 24))
    near = onto(exact, "cuda")
    expected, found = attend(exact, "dense"), attend(near, "flex")
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)
    wanted = gradients(expected, exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, gradient in zip(
        wanted,
        torch.autograd.grad(found, list(test_attend.leaves(near).values()), upstream.float().cuda()),
        strict=True,
    ):
        torch.testing.assert_close(
            gradient.cpu().double(), wanted[name], rtol=1e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_nobody_sees_does_not_leak_on_cuda(poison: float):
    for where in ("left padding", "chunk"):
        queries, keys = oracle.layout(where, length=300, chunk=130)
        clean = onto(test_blocks.make(Causal() & Window(back=9), (queries, keys), 4, 2, sizes=(16, 16)), "cuda")
        unseen = clean.mask().any(dim=2).logical_not()[..., None].cuda()
        spoilt = replace(
            clean, key=clean.key.masked_fill(unseen, poison), value=clean.value.masked_fill(unseen, poison)
        )
        assert torch.equal(attend(spoilt, "flex"), attend(clean, "flex"))


@pytest.mark.gpu
@cuda
def test_long_windows_on_cuda_need_no_mask_of_all_pairs():
    """65,536 tokens, of which a mask alone would be 4 GiB."""
    torch.cuda.reset_peak_memory_stats()
    length = 65536
    query = torch.randn(1, 12, length, 64, device="cuda", dtype=torch.float16)
    tokens = plain(1, length, device="cuda")
    marked = Tokens(tokens.position, tokens.document, tokens.position == 0)
    attend(Request(query, query, query, marked, marked, Window(back=257, ahead=256) | Global(), 0.125), "flex")
    assert torch.cuda.max_memory_allocated() < 2**31


def chosen(monkeypatch: pytest.MonkeyPatch, one: Request) -> str:
    """Which backend is taken for a request of tensors that say they are on CUDA."""
    taken = []
    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "attend", lambda request, name=name: taken.append(name))
    attend(replace(one, query=Elsewhere(one.query)))
    return taken[0]


def test_which_backend_is_taken_on_cuda(monkeypatch: pytest.MonkeyPatch):
    """In the order of what each leaves out: nothing to mask, bands of documents, any pattern, all pairs."""
    length = 512
    whole = plain(2, length)
    position = torch.arange(length).repeat(2, 1)
    left = torch.where(position < 100, HOLE, position - 100)
    padded = Tokens(left, torch.zeros_like(left))
    packed = Tokens(position % 128, position // 128)
    marked = Tokens(whole.position, whole.document, whole.position == 0)
    window, bias = Causal() & Window(back=50), torch.zeros(1, 2, length, length)
    for said, pattern, tokens, more in (
        ("sdpa", Causal(), whole, {}),
        ("sdpa", Everything(), whole, {}),
        ("sdpa", Causal() & Window(back=length), whole, {}),
        ("varlen", window, whole, {}),
        ("varlen", Causal(), padded, {}),
        ("varlen", Everything(), packed, {}),
        ("flex", bigbird(), whole, {}),
        ("flex", Window(back=50, ahead=49) | Global(), marked, {}),
        ("flex", Causal(), whole, {"bias": bias}),
        ("flex", Causal(), whole, {"softcap": 3.0}),
        ("flex", window, whole, {"sink": torch.zeros(2)}),
        ("sdpa", window, whole, {"dropout": 0.1}),
        ("dense", window, whole, {"dropout": 0.1, "softcap": 3.0}),
    ):
        half = request(pattern, tokens, **more)
        half = replace(half, query=half.query.bfloat16(), key=half.key.bfloat16(), value=half.value.bfloat16())
        assert chosen(monkeypatch, half) == said, (pattern, more)
    assert chosen(monkeypatch, request(window, whole)) == "flex"  # float32, which the packed kernel does not have
    small = request(Window(back=5) | Global(positions=(0,)), plain(2, 40))
    assert chosen(monkeypatch, small) == "sdpa"
    step = request(window, plain(2, 1, start=length - 1), whole)
    assert chosen(monkeypatch, step) == "sdpa"


def test_neither_is_taken_on_the_cpu():
    one = request(Causal() & Window(back=5), plain(2, 512))
    assert not flex.suits(one) and not flex.suits(replace(one, softcap=2.0))


def test_the_benchmark_runs_in_a_small_size_and_refuses_without_a_gpu(tmp_path: Path):
    program = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--json", str(tmp_path / "figures.json")]
    small = ["--device", "cpu", "--lengths", "256", "--window", "32", "--rounds", "1"]
    done = subprocess.run([*program, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["forward, 256"]
    assert {"dense", "Longformer", "BigBird"} < figures["seconds"].keys()
    assert figures["refused"] == {"causal window, packed": "tensors that are not on CUDA"}
    if not torch.cuda.is_available():
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "there is no CUDA device here" in done.stderr
