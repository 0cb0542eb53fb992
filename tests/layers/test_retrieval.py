"""Chunked cross-attention and the encoder of neighbours, against loops over single tokens (arXiv:2112.04426)."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, UnsupportedError
from lamina.families import Fields, family
from lamina.layers import (
    AttentionSpec,
    Call,
    ChunkedCrossAttention,
    ChunkedCrossAttentionSpec,
    CrossAttentionSpec,
    Neighbours,
    Record,
    RMSNormSpec,
    RotarySpec,
    SinusoidalPositionSpec,
    StepSpec,
    TransformerXLSpec,
    neighbour_encoder,
    retrieving,
)
from lamina.model import Model, ModelSpec
from lamina.specs import edit
from lamina.tokens import HOLE, Tokens, plain
from lamina.train.recompute import recompute
from tests import small
from tests.oracle import ON_THE_CPU

WIDTH, CHUNK, LENGTH, VOCABULARY = 10, 3, 11, 40
EXACT = {"rtol": 0, "atol": 1e-10}
TINY = {
    "layers": 5, "width": 18, "heads": 3, "head_dim": 8, "hidden": 24, "vocabulary": VOCABULARY, "context": 64,
    "chunk": 4, "first": 2, "every": 2,
    "encoder_width": 14, "encoder_heads": 2, "encoder_head_dim": 6, "encoder_hidden": 20, "encoder_layers": 2,
}  # fmt: skip


TERMS = {"none": None, "Transformer-XL": TransformerXLSpec(base=50.0), "rotary": RotarySpec(base=30.0, width=4)}


def layer(
    key_heads: int = 2, relative: str = "Transformer-XL", depths: tuple[int, ...] = (), **fields: int
) -> ChunkedCrossAttention:
    encoder = neighbour_encoder(WIDTH, VOCABULARY, width=6, heads=3, head_dim=4, hidden=9, layers=2)
    encoder = encoder.replace(depths=depths)
    attention = CrossAttentionSpec(
        heads=4,
        key_heads=key_heads,
        head_dim=5,
        memory_width=encoder.gives,
        relative=TERMS[relative],
    )
    spec = ChunkedCrossAttentionSpec(attention=attention, chunk=CHUNK, encoder=encoder, **fields)
    module = spec.build(WIDTH).double().eval()
    small.shake(module)
    return module


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(batch: int, chunks: int, length: int = 7, seed: int = 0, count: int = 2) -> Tensor:
    """(B, N, k, r) ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, chunks, count, length), generator=generator)


def attended(
    module: nn.Module, queries: list[tuple[int, Tensor]], keys: list[tuple[int, Tensor]], base: float
) -> list[Tensor]:
    """One row for each query; queries and keys are (position, vector). Transformer-XL's four terms, one by one; pairs
    of rotary phases as complex numbers."""
    spec, size, outs = module.spec, module.spec.head_dim, []
    term = module.relative
    for at, x in queries:
        heads = []
        for head in range(spec.heads):
            part = slice(head * size, (head + 1) * size)
            shared = head // (spec.heads // spec.key_heads)
            read = slice(shared * size, (shared + 1) * size)
            query, scores = (module.q.weight @ x)[part], []
            for place, y in keys:
                key = (module.k.weight @ y)[read]
                score = query @ key
                if (rotary := getattr(spec, "rotary", None)) is not None:
                    half = rotary.width // 2
                    angles = torch.tensor([(at - place) * rotary.base ** (-i / half) for i in range(half)])
                    pair = torch.complex(query[:half], query[half : 2 * half]) * torch.polar(torch.ones(half), angles)
                    other = torch.complex(key[:half], key[half : 2 * half])
                    score = (pair * other.conj()).real.sum() + query[2 * half :] @ key[2 * half :]
                if term is not None:
                    angles = torch.tensor([(at - place) * base ** (-2 * i / len(x)) for i in range(len(x) // 2)])
                    far = (term.project.weight @ torch.cat([angles.sin(), angles.cos()]).double())[part]
                    score = (query + term.content[head]) @ key + (query + term.position[head]) @ far
                scores.append(score / math.sqrt(size))
            shares = torch.stack(scores).softmax(0)
            heads.append(sum(share * (module.v.weight @ y)[read] for share, (_, y) in zip(shares, keys, strict=True)))
        outs.append(module.o.weight @ torch.cat(heads))
    return outs


def normed(module: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * module.weight


def encoded(module: nn.Module, ids: list[int], chunk: list[Tensor]) -> list[Tensor]:
    """One neighbour, read beside its chunk: its tokens see each other all, and the chunk in the first layer. What is
    between two layers is given as well, to the left of the end, where the specification asks for it."""
    stream, given = [module.embedding.weight[i] for i in ids], [list[Tensor]() for _ in ids]

    def give(norm: nn.Module) -> None:
        for features, x in zip(given, stream, strict=True):
            features.append(normed(norm, x))

    for number, steps in enumerate(module.stack.layers):
        if number in module.spec.depths:
            give(module.norms[module.spec.depths.index(number)])
        for name, step in steps.items():
            inner = [normed(step.pre, x) for x in stream]
            if name == "feedforward":
                out = [step.op.down.weight @ nn.functional.gelu(step.op.up.weight @ x) for x in inner]
            else:
                keys = chunk if name == "cross" else inner
                out = attended(step.op, list(enumerate(inner)), list(enumerate(keys)), 10_000.0)
            stream = [x + y for x, y in zip(stream, out, strict=True)]
    give(module.stack.norm)
    return [torch.cat(features) for features in given]


def naive(module: ChunkedCrossAttention, x: Tensor, neighbours: dict[int, list[list[int]]]) -> Tensor:
    """(T, width) of one document, with the neighbours of some of its chunks."""
    m, out = module.spec.chunk, torch.zeros_like(x)
    before = m if module.spec.attention.rotary is not None else 0  # as self-attention has it, nothing is ahead
    for chunk, several in neighbours.items():
        beside = [x[t] for t in range(chunk * m, (chunk + 1) * m)]
        keys = [
            (chunk * m - before + place, vector)
            for ids in several
            for place, vector in enumerate(encoded(module.encoder, ids, beside))
        ]
        for t in range(len(x)):
            if (t + 1) // m - 1 == chunk:
                out[t] = attended(module.attention, [(t, x[t])], keys, 50.0)[0]
    return out


def lists(ids: Tensor) -> dict[int, list[list[int]]]:
    """(N, k, r) as chunk -> neighbours."""
    return {chunk: several.tolist() for chunk, several in enumerate(ids)}


@cache
def by_loop(
    key_heads: int, relative: str, depths: tuple[int, ...]
) -> tuple[ChunkedCrossAttention, Tensor, Tensor, Tensor]:
    """A layer, what it reads, the neighbours, and what the loop makes of both."""
    module, x, ids = layer(key_heads, relative, depths), noise(2, LENGTH, WIDTH), found(2, 3)
    return module, x, ids, torch.stack([naive(module, x[row], lists(ids[row])) for row in range(2)])


@pytest.mark.parametrize("backend", ON_THE_CPU)
@pytest.mark.parametrize(
    ("key_heads", "relative", "depths"),
    [
        (4, "Transformer-XL", ()),
        (2, "Transformer-XL", ()),
        (1, "Transformer-XL", (0, 1)),
        (2, "none", ()),
        (2, "rotary", (1,)),
    ],
)
@torch.no_grad()
def test_it_is_the_loop_over_tokens(key_heads: int, relative: str, depths: tuple[int, ...], backend: str):
    module, x, ids, expected = by_loop(key_heads, relative, depths)
    out = module(x, Call(tokens=plain(2, LENGTH), memory=Neighbours(ids), backend=backend))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)  # phases are in float32
    assert torch.equal(out[:, : CHUNK - 1], torch.zeros_like(out[:, : CHUNK - 1]))
    assert bool((out[:, CHUNK - 1 :].abs().amax(dim=2) > 1e-3).all())


@torch.no_grad()
def test_padding_documents_and_absent_tokens_are_not_seen():
    """Three documents in two rows with holes between; a neighbour that is short, one that is not there, and a chunk
    without any."""
    module, x = layer(), noise(2, 16, WIDTH)
    position = torch.tensor(
        [
            [HOLE, HOLE, 0, 1, 2, 3, HOLE, 4, 5, 6, 7, HOLE, HOLE, HOLE, HOLE, HOLE],
            [0, 1, 2, 3, 4, 0, 1, 2, 3, HOLE, 4, 5, 6, 7, 8, 9],
        ]
    )
    document = torch.tensor([[5] * 16, [5] * 5 + [9] * 11])
    tokens = Tokens(position, document)
    ids = found(2, 4)
    ids[0, 0, 0, 4:] = -1
    ids[0, 1, 1] = -1
    ids[0, 2:] = -1  # two chunks end in this row
    ids[1, 1] = -1  # the first chunk of the second document has none
    out = module(x, Call(tokens=tokens, memory=Neighbours(ids)))
    texts = {  # (row, document) -> the neighbours of its chunks
        (0, 5): {0: [ids[0, 0, 0, :4].tolist(), ids[0, 0, 1].tolist()], 1: [ids[0, 1, 0].tolist()]},
        (1, 5): {0: ids[1, 0].tolist()},
        (1, 9): {1: ids[1, 2].tolist(), 2: ids[1, 3].tolist()},
    }
    for (row, number), neighbours in texts.items():
        keep = (position[row] >= 0) & (document[row] == number)
        torch.testing.assert_close(out[row][keep], naive(module, x[row][keep], neighbours), rtol=0, atol=2e-6)
    assert torch.equal(out[position < 0], torch.zeros_like(out[position < 0]))


def test_what_is_padding_never_counts():
    """Not even where it is not a number."""
    module, ids, x = layer(), found(1, 2), noise(1, 8, WIDTH)
    position = torch.tensor([[HOLE, 0, 1, 2, 3, 4, 5, HOLE]])
    x[0, 0] = x[0, 7] = torch.nan
    out = module(x, Call(tokens=Tokens(position, torch.zeros_like(position)), memory=Neighbours(ids)))
    torch.testing.assert_close(out[0, 1:7], naive(module, x[0, 1:7], lists(ids[0])), rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def model() -> Model:
    return small.build(family("retro").spec(Fields(TINY)))


M, TEXT = TINY["chunk"], 14


@torch.no_grad()
def test_without_neighbours_it_is_the_model_without_retrieval_bit_for_bit(model: Model):
    ids, spec = small.ids(2, TEXT), model.spec
    steps = lambda layer: layer.replace(steps=tuple(s for s in layer.steps if s.name != "retrieval"))  # noqa: E731
    bare = spec.replace(decoder=spec.decoder.replace(layers=tuple(map(steps, spec.decoder.layers)))).build()
    bare = bare.double().eval()
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    expected = bare(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, neighbours=torch.full((2, 3, 2, 8), -1)).logits, expected)
    assert torch.equal(model(ids, neighbours=found(2, 0, 8)).logits, expected)
    assert torch.equal(
        model(ids, cache=model.new_cache(batch=2)).logits, bare(ids, cache=bare.new_cache(batch=2)).logits
    )
    one = found(2, 3, 8)
    one[0] = -1
    read = model(ids, neighbours=one).logits
    torch.testing.assert_close(read[0], expected[0], **EXACT)
    assert float((read[1] - expected[1])[M - 1 :].abs().max(dim=1).values.min()) > 1e-3


@torch.no_grad()
def test_nothing_that_comes_later_counts(model: Model):
    """Another token at t changes nothing before t; other neighbours of chunk c nothing before token (c + 1) m - 1."""
    ids, neighbours = small.ids(1, TEXT), found(1, 3, 8)
    whole = model(ids, neighbours=neighbours).logits
    for t in range(TEXT):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % VOCABULARY
        changed = model(other, neighbours=neighbours).logits
        torch.testing.assert_close(changed[:, :t], whole[:, :t], **EXACT)
        assert not torch.allclose(changed[:, t], whole[:, t])
    for chunk in range(3):
        other = neighbours.clone()
        other[0, chunk] = (other[0, chunk] + 1) % VOCABULARY
        changed, first = model(ids, neighbours=other).logits, (chunk + 1) * M - 1
        torch.testing.assert_close(changed[:, :first], whole[:, :first], **EXACT)
        apart = (changed - whole)[0, first : first + M].abs().amax(dim=1)
        assert bool((apart > 1e-3).all())  # from the last token of the chunk on, all that read it


SPLITS = {
    "at once": [TEXT],
    "tokens": [1] * TEXT,
    "prompt and tokens": [5] + [1] * 9,
    "two chunks": [2 * M, 1, 1, 4],
    "inside a chunk": [2, 1, 4, 1, 6],
    "to the end of one": [3, 1, 3, 1, 6],
    "almost all": [TEXT - 1, 1],
}
MASKS = {
    "none": [[1] * TEXT] * 3,
    "left": [[0] * 5 + [1] * 9, [1] * 14, [0] * 2 + [1] * 12],
    "right": [[1] * 9 + [0] * 5, [1] * 14, [1] * 13 + [0]],
    "between": [[0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1], [1] * 14],
}


def ending(mask: Tensor, position: Tensor, neighbours: Tensor, start: int, stop: int) -> Tensor | None:
    """(B, n, k, r): of each row the neighbours of its chunks that end in the columns start..stop."""
    rows = []
    for row in range(len(mask)):
        ends = [
            int(position[row, t]) // M for t in range(start, stop) if mask[row, t] and (position[row, t] + 1) % M == 0
        ]
        rows.append(neighbours[row, ends])
    if not any(len(row) for row in rows):
        return None
    most = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (0, 0, 0, 0, 0, most - len(row)), value=-1) for row in rows])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["auto", "growing", "fixed"])
@torch.no_grad()
def test_any_pieces_with_a_cache_are_the_whole(model: Model, kind: str, split: str):
    """Also where padding puts the rows out of step, so that each ends its chunks at other times."""
    ids, neighbours = small.ids(3, TEXT), found(3, 3, 8)
    neighbours[2, 1] = -1
    for name, rows in MASKS.items():
        mask = torch.tensor(rows)
        position = mask.cumsum(1) - 1
        cache = model.new_cache(kind, 3, TEXT + 2 if kind == "fixed" else None)
        given = None if name == "none" else mask
        start, parts = 0, []
        for size in SPLITS[split]:
            stop = start + size
            part = None if given is None else given[:, start:stop]
            more = ending(mask, position, neighbours, start, stop)
            parts.append(model(ids[:, start:stop], part, neighbours=more, cache=cache).logits)
            start = stop
        out = torch.cat(parts, dim=1)
        for row in range(3):
            keep = mask[row].bool()
            alone = model(ids[row, keep][None], neighbours=neighbours[row : row + 1, : int(keep.sum()) // M]).logits[0]
            torch.testing.assert_close(out[row, keep], alone, **EXACT)


@torch.no_grad()
def test_documents_of_a_row_have_their_own_chunks_with_and_without_a_cache(model: Model):
    ids, documents = small.ids(1, TEXT), torch.tensor([[3] * 5 + [4] * 9])
    neighbours = found(1, 3, 8)
    parts = [model(ids[:, :5], neighbours=neighbours[:, :1]), model(ids[:, 5:], neighbours=neighbours[:, 1:])]
    expected = torch.cat([part.logits for part in parts], dim=1)
    whole = model(ids, document_ids=documents, neighbours=neighbours).logits
    torch.testing.assert_close(whole, expected, **EXACT)
    restarted = torch.tensor([[*range(5), *range(9)]])
    torch.testing.assert_close(model(ids, position_ids=restarted, neighbours=neighbours).logits, expected, **EXACT)
    cache, found_here, ends = model.new_cache(), [], {3: 0, 8: 1, 12: 2}
    for t in range(TEXT):
        more = neighbours[:, ends[t] : ends[t] + 1] if t in ends else None
        given = {"document_ids": documents[:, t : t + 1], "neighbours": more}
        found_here.append(model(ids[:, t : t + 1], cache=cache, **given).logits)
    torch.testing.assert_close(torch.cat(found_here, dim=1), expected, **EXACT)


@torch.no_grad()
def test_beams_take_what_was_retrieved_along(model: Model):
    ids, neighbours, order = small.ids(3, TEXT), found(3, 3, 8), torch.tensor([2, 0, 0, 1])
    cache = model.new_cache(batch=3)
    model(ids[:, :6], neighbours=neighbours[:, :1], cache=cache)
    cache.reorder(order)
    ids, neighbours = ids[order], neighbours[order]
    out = [
        model(ids[:, 6:7], cache=cache).logits,
        model(ids[:, 7:10], cache=cache, neighbours=neighbours[:, 1:2]).logits,
    ]
    expected = model(ids[:, :10], neighbours=neighbours[:, :2]).logits[:, 6:]
    torch.testing.assert_close(torch.cat(out, dim=1), expected, **EXACT)


@torch.no_grad()
def test_other_numbers_of_neighbours_may_follow(model: Model):
    ids = small.ids(2, TEXT)
    few, many = found(2, 1, 8, seed=1, count=1), found(2, 1, 8, seed=2, count=3)
    few[1] = -1
    cache = model.new_cache(batch=2)
    parts = [
        model(ids[:, :5], neighbours=few, cache=cache),
        model(ids[:, 5:9], neighbours=many, cache=cache),
        model(ids[:, 9:11], cache=cache),
    ]
    both = torch.full((2, 2, 3, 8), -1)
    both[:, :1, :1], both[:, 1:] = few, many
    expected = model(ids[:, :11], neighbours=both).logits
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), expected, **EXACT)


def test_what_a_cache_holds_and_what_it_refuses(model: Model):
    cache = model.new_cache(batch=2)
    with torch.no_grad():
        model(small.ids(2, 9), neighbours=found(2, 2, 8), cache=cache)
    spec = model.spec.retrieval
    assert spec is not None and spec.encoder is not None
    place = "decoder.layers.{}.retrieval.op"
    kept = {path: slot.bytes() for path, slot in cache.slots.items() if "retrieval" in path}
    parts = [place.format(1) + ".attention", place.format(3) + ".attention", place.format(1) + ".encoder"]
    assert sorted(kept) == sorted(parts)
    assert kept[parts[1]] == 2 * 2 * 3 * (2 * 8) * 8 * 8  # k, v; rows; heads; tokens; features; bytes
    assert kept[parts[2]] == 2 * (M + 1) * TINY["width"] * 8
    with pytest.raises(UnsupportedError, match=r"a cache of what was retrieved overwrites .*; a new cache reads"):
        cache.trim(7)
    with pytest.raises(UnsupportedError, match="counts chunks by position, and a sinks cache renumbers them"):
        model.new_cache("sinks", 2)
    with pytest.raises(UnsupportedError, match="looks back without limit"):
        model.new_cache("ring", 2)


def test_gradients_reach_everything_and_layers_that_run_again_give_the_same(model: Model):
    spec, ids, neighbours = model.spec, small.ids(2, TEXT), found(2, 3, 8)
    grads = []
    for again in (False, True):
        module = small.build(spec).train()
        if again:
            recompute(module)
        module(ids, neighbours=neighbours).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and float(grad.abs().max()) > 0, name
        assert torch.equal(grad, grads[1][name]), name


@torch.no_grad()
def test_a_record_shows_the_encoder_and_changes_nothing(model: Model):
    ids, neighbours = small.ids(1, TEXT), found(1, 3, 8)
    path = "decoder.layers.1.retrieval.op"
    record = Record("*.weights", "decoder.layers.*.output")
    assert torch.equal(
        model(ids, neighbours=neighbours, record=record).logits, model(ids, neighbours=neighbours).logits
    )
    assert record.values[f"{path}.attention.weights"].shape == (3, 3, M, 16)
    assert record.values[f"{path}.encoder.stack.layers.0.cross.op.weights"].shape == (6, 2, 8, M)
    assert "decoder.layers.4.output" in record.values


def test_wrong_input_is_named(model: Model):
    ids = small.ids(2, TEXT)
    with pytest.raises(LaminaError, match=r"neighbours\[0, 3\] belong to no chunk: 3 chunks of 4 tokens end in row 0"):
        model(ids, neighbours=found(2, 4, 8))
    with pytest.raises(LaminaError, match=r"neighbours is torch.int64 \(1, 3, 2, 8\); expected ids \(batch=2, chunks"):
        model(ids, neighbours=found(1, 3, 8))
    with pytest.raises(LaminaError, match="neighbours is torch.float32"):
        model(ids, neighbours=found(2, 3, 8).float())
    for wrong in (VOCABULARY, -2):
        with pytest.raises(LaminaError, match="neighbours holds ids beyond 0 to 39, and -1"):
            model(ids, neighbours=torch.full((2, 3, 2, 8), wrong))
    twice = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10]])
    with pytest.raises(LaminaError, match="more than 4 tokens in a chunk: its positions are not all different"):
        model(ids[:1], position_ids=twice, document_ids=torch.zeros_like(twice), neighbours=found(1, 2, 8))
    with pytest.raises(UnsupportedError, match="this one has no ChunkedCrossAttentionSpec"):
        small.build(small.decoder(small.MIXED))(ids, neighbours=found(2, 3, 8))


def test_specs_that_contradict_themselves(model: Model):
    spec = model.spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    layers, op = spec.decoder.layers, spec.retrieval
    assert op is not None and op.encoder is not None

    def swap(step: StepSpec) -> ModelSpec:
        changed = layers[1].replace(steps=(layers[1].steps[0], step))
        return spec.replace(decoder=spec.decoder.replace(layers=(layers[0], changed, *layers[2:])))

    step = layers[1].steps[1]
    for wrong, why in (
        (lambda: swap(step.replace(op=op.replace(encoder=None))), "needs an encoder"),
        (lambda: spec.replace(decoder=spec.decoder.replace(layers=layers + layers[1:2])), "needs an encoder"),
        (lambda: swap(step.replace(op=op.replace(chunk=5))), r"one length, not \[4, 5\]"),
        (lambda: swap(step.replace(after=RMSNormSpec())), "leave tokens that read nothing"),
        (lambda: swap(step.replace(residual=2.0)), "leave tokens that read nothing"),
        (lambda: swap(StepSpec(name="cross", op=op.attention)), "without CrossAttentionSpec|needs an encoder"),
        (lambda: spec.replace(decoder=spec.decoder.replace(layer_dropout=0.1)), "drop out"),
        (lambda: spec.replace(decoder=spec.decoder.replace(repeat=2)), "repeat"),
        (lambda: spec.replace(decoder=None, encoder=spec.decoder), "for steps of a decoder by itself"),
        (lambda: op.replace(chunk=0), "at least 1"),
        (
            lambda: op.replace(attention=op.attention.replace(memory_width=3)),
            "width 14, and attention.memory_width is 3",
        ),
        (lambda: op.encoder.replace(depths=(1, 1)), "they must grow, from 0 to 1"),
        (lambda: op.encoder.replace(depths=(2,)), "they must grow, from 0 to 1"),
        (
            lambda: op.encoder.replace(depths=(1,), stack=op.encoder.stack.replace(repeat=2)),
            "whose layers run once",
        ),
        (
            lambda: op.replace(encoder=op.encoder.replace(depths=(1,))),
            "gives width 28, and attention.memory_width is 14",
        ),
        (lambda: op.attention.replace(relative=RotarySpec(width=10)), "at most head_dim=8"),
        (lambda: op.encoder.replace(width=0), "at least 1"),
        (lambda: op.build(5), "memory_width is 18; the text that it reads has 5"),
        (lambda: retrieving(layers, (), step, op.encoder), "they must grow, from 0 to 4"),
        (lambda: retrieving(layers, (1, 1), step, op.encoder), "they must grow"),
        (lambda: retrieving(layers, (2, 5), step, op.encoder), "they must grow"),
    ):
        with pytest.raises(LaminaError, match=why):
            wrong()


def test_an_encoder_with_absolute_positions_serves_as_well():
    """No part of it asks for the terms of Transformer-XL."""
    spec = family("retro").spec(Fields(TINY))
    op = spec.retrieval
    assert op is not None and op.encoder is not None
    stack = op.encoder.stack
    for kind in (AttentionSpec, CrossAttentionSpec):
        stack = edit(stack, kind, lambda _, s: s.replace(relative=None))
    encoder = op.encoder.replace(stack=stack.replace(position=SinusoidalPositionSpec()))
    module = op.replace(encoder=encoder).build(TINY["width"]).double()
    out = module(noise(1, 8, TINY["width"]), Call(tokens=plain(1, 8), memory=Neighbours(found(1, 2, 8))))
    assert out.shape == (1, 8, TINY["width"])
