"""Models on several ranks beside the same on one: loss and every gradient."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lamina
from lamina.adapters import LoRASpec, attach
from lamina.adapters.places import linears
from lamina.families import Fields, family
from lamina.layers import (
    BranchSpec,
    CompressiveSpec,
    DifferentialSpec,
    EmbeddingSpec,
    ExpertsSpec,
    FeedForwardSpec,
    InfiniSpec,
    LanguageHeadSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    ProductKeySpec,
    RecurrenceSpec,
    RecurrentMemorySpec,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    StepSpec,
    SumSpec,
    TopKSpec,
)
from lamina.patterns import BlockWindow, Causal, Window
from lamina.specs import edit
from tests import small, tiny

if TYPE_CHECKING:
    from lamina.parallel import Mesh, MeshSpec

ROWS, LENGTH, PADDING = 4, 11, 17
MIXTRAL = tiny.LLAMA | {
    "model_type": "mixtral",
    "vocab_size": 264,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "router_aux_loss_coef": 0.1,
}


def layers(op: Any, **stack: Any) -> lamina.ModelSpec:
    """A decoder of two layers with another attention than usual, a rank-sharing embedding and a head of its own."""
    both = SumSpec(
        branches=(
            BranchSpec(name="one", op=op, pre=RMSNormSpec()),
            BranchSpec(name="two", op=FeedForwardSpec(hidden=10)),
        )
    )
    steps = (StepSpec(name="both", op=both), StepSpec(name="feedforward", op=FeedForwardSpec(hidden=12, bias=True)))
    return lamina.ModelSpec(
        width=12,
        embedding=EmbeddingSpec(vocabulary=30, padding=PADDING, inner=10),
        decoder=StackSpec(layers=(LayerSpec(steps=steps),) * 2, norm=LayerNormSpec(), **stack),
        head=LanguageHeadSpec(tied=False, bias=True, softcap=4.0),
    )


def longformer() -> lamina.ModelSpec:
    config = tiny.BERT | {"model_type": "longformer", "architectures": ["LongformerForMaskedLM"], "attention_window": 4}
    return tiny.spec(config | {"max_position_embeddings": 60, "type_vocab_size": 1, "pad_token_id": 1})


SHARED = ExpertsSpec(
    router=TopKSpec(experts=4, chosen=2, bias=True),
    expert=FeedForwardSpec(hidden=6, bias=True, gated=False, act="gelu"),
    shared=FeedForwardSpec(hidden=4),
    shared_gate=True,
    losses=RouterLossSpec(z=0.05, balance=0.1, each_row=True),
)


def deep() -> lamina.ModelSpec:
    """Five layers, the last of them without experts."""
    spec = tiny.spec(MIXTRAL | {"num_hidden_layers": 5})
    assert spec.decoder is not None
    *layers, last = spec.decoder.layers
    dense = edit(last, ExpertsSpec, lambda _, one: one.expert)
    return spec.replace(decoder=spec.decoder.replace(layers=(*layers, dense)))


def experts() -> lamina.ModelSpec:
    spec = layers(small.attention())
    assert spec.decoder is not None
    steps = (StepSpec(name="attention", op=small.attention()), StepSpec(name="experts", op=SHARED, pre=RMSNormSpec()))
    return spec.replace(decoder=StackSpec(layers=(LayerSpec(steps=steps),) * 2))


def product_keys() -> lamina.ModelSpec:
    """Two layers that share a table, and a third with values that are networks."""
    spec = layers(small.attention())
    assert spec.decoder is not None
    memory = ProductKeySpec(heads=3, keys=6, key_dim=4, chosen=3, gated=True, norm=RMSNormSpec(), table="facts")
    found = [
        LayerSpec(steps=(StepSpec(name="attention", op=small.attention()), StepSpec(name="memory", op=op)))
        for op in (memory, memory, memory.replace(gated=False, table=None, act="gelu"))
    ]
    return spec.replace(decoder=StackSpec(layers=tuple(found), norm=LayerNormSpec()))


RETRO = {"layers": 4, "width": 18, "heads": 4, "head_dim": 6, "hidden": 24, "vocabulary": 40, "chunk": 3}
RETRO |= {"first": 2, "every": 2, "encoder_width": 14, "encoder_heads": 2, "encoder_head_dim": 6, "encoder_hidden": 20}
ROTARY = RotarySpec(base=100.0)
MODELS: dict[str, Callable[[], lamina.ModelSpec]] = {
    "gpt2": lambda: tiny.spec(tiny.GPT2 | {"vocab_size": 264}),
    "gpt2-odd": lambda: tiny.spec(tiny.GPT2),
    "llama": lambda: tiny.spec(tiny.LLAMA | {"vocab_size": 264}),
    "llama-mqa": lambda: tiny.spec(tiny.LLAMA | {"num_key_value_heads": 1, "attention_bias": True}),
    "t5": lambda: tiny.spec(tiny.T5 | {"vocab_size": 264}),
    "bart": lambda: tiny.spec(tiny.BART | {"vocab_size": 264}),
    "mixtral": lambda: tiny.spec(MIXTRAL),
    "experts": experts,
    "mixtral-deep": deep,
    "gpt2-deep": lambda: tiny.spec(tiny.GPT2 | {"n_layer": 5}),
    "product-keys": product_keys,
    "memory-tokens": lambda: layers(small.attention(rotary=ROTARY), recurrence=RecurrentMemorySpec(tokens=2, length=4)),
    "bert": lambda: tiny.spec(tiny.BERT),
    "albert": lambda: tiny.spec(
        tiny.BERT | {"model_type": "albert", "architectures": ["AlbertForMaskedLM"], "embedding_size": 10}
    ),
    "longformer": longformer,
    "retro": lambda: family("retro").spec(Fields(RETRO)),
    "latent": lambda: layers(
        LatentAttentionSpec(
            heads=4, query_rank=6, key_rank=8, nope_dim=4, rope_dim=2, value_dim=3, rotary=ROTARY, bias=True
        )
    ),
    "differential": lambda: layers(
        DifferentialSpec(heads=4, key_heads=2, head_dim=4, start=0.3, rotary=ROTARY, norm=RMSNormSpec())
    ),
    "infini": lambda: layers(
        MemoryAttentionSpec(
            attention=small.attention(rotary=ROTARY, pattern=Causal() & BlockWindow(size=3, back=1)),
            memory=InfiniSpec(length=3, update="delta"),
        )
    ),
    "memorizing": lambda: layers(
        MemoryAttentionSpec(
            attention=small.attention(rotary=ROTARY, pattern=Causal() & Window(back=2)),
            memory=MemorizingSpec(length=3, size=6, count=2),
        )
    ),
    "recurrence": lambda: layers(
        MemoryAttentionSpec(attention=small.attention(rotary=ROTARY), memory=RecurrenceSpec(length=3, size=4))
    ),
    "compressive": lambda: layers(
        MemoryAttentionSpec(
            attention=small.attention(rotary=ROTARY), memory=CompressiveSpec(length=2, size=2, count=2, rate=2)
        )
    ),
    "qk-norm": lambda: layers(
        small.attention(qk_norm=RMSNormSpec(), rotary=ROTARY, sink=True, bias="all", pattern=Causal() & Window(back=5))
    ),
    **{
        scheme: lambda scheme=scheme: layers(small.attention(**small.SCHEMES[scheme][0]), **small.SCHEMES[scheme][1])
        for scheme in ("alibi", "shaw", "transformer-xl")
    },
}


@dataclass
class Batch:
    given: dict[str, Tensor]
    labels: Tensor

    def rows(self, part: int, parts: int) -> Batch:
        size = ROWS // parts
        rows = slice(part * size, (part + 1) * size)
        return Batch({name: x[rows] for name, x in self.given.items()}, self.labels[rows])


def batch(spec: lamina.ModelSpec, seed: int = 1) -> Batch:
    """Four rows: packed documents, padding on the left, padding on the right, and packed documents again."""
    generator = torch.Generator().manual_seed(seed)

    def side(length: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(3, spec.embedding.vocabulary, (ROWS, length), generator=generator)
        ids[0, 2], ids[3, 1] = PADDING, PADDING  # as a token: it has a vector, which learns nothing
        mask, documents = torch.ones_like(ids), torch.zeros_like(ids)
        mask[1, :4], mask[2, 8:] = 0, 0
        documents[0, 5:], documents[3, 7:] = 1, 1
        return ids, mask, documents

    ids, mask, documents = side(LENGTH)
    given = {"input_ids": ids, "attention_mask": mask, "document_ids": documents}
    if spec.two_stacks:
        ids, mask, documents = side(LENGTH - 1)
        given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask, "decoder_document_ids": documents}
    if spec.retrieval is not None:  # 2 + 2, 2, 2, 2 + 1 chunks of 3 tokens end in the rows
        given["neighbours"] = torch.randint(3, spec.embedding.vocabulary, (ROWS, 3, 2, 5), generator=generator)
        given["neighbours"][[0, 1, 2], 2] = given["neighbours"][0, 1, 1] = -1
    labels = torch.randint(0, spec.embedding.vocabulary, ids.shape, generator=generator)
    return Batch(given, labels.masked_fill((mask == 0) | (labels % 3 == 0), -100))


def loss(model: lamina.Model, batch: Batch, asked: int, labels: Tensor, share: float | None) -> Tensor:
    """The rank's part of the mean over all labels, and its part of the routers' losses."""
    out = model(**batch.given)
    logits = out.logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100) / asked
    if share is not None and out.losses:
        total = total + share * sum(out.losses.values())
    return total


def tokens(batch: Batch) -> int:
    return int(batch.given["attention_mask"].sum())


def build(spec: lamina.ModelSpec, adapter: bool = False) -> lamina.Model:
    """In float64, with random values everywhere, also in the adapter of all linear layers."""
    model = spec.build(dtype=torch.float64).eval()
    if adapter:
        attach(model, LoRASpec(rank=3, alpha=5, targets=tuple(linears(model))))
    small.shake(model)
    return model


def alone(
    spec: lamina.ModelSpec, whole: Batch, parts: int, routers: bool, adapter: bool = False
) -> tuple[Tensor, lamina.Model]:
    """One process: the loss, and the model with its gradients. Routers are balanced in each of `parts` by itself."""
    model = build(spec, adapter)
    asked, total = int((whole.labels >= 0).sum()), torch.zeros((), dtype=torch.float64)
    for part in range(parts):
        one = whole.rows(part, parts)
        share = tokens(one) / tokens(whole) if routers else None
        found = loss(model, one, asked, one.labels, share)
        found.backward()
        total += found.detach()
    return total, model


def piped(model: lamina.Model, micros: list[Batch], whole: Batch) -> Tensor:
    """The loss of micro-batches, each as short as it can be, that go through a pipeline."""
    from lamina.parallel import through

    mesh, asked = model.mesh, int((whole.labels >= 0).sum())
    total = torch.zeros((), dtype=torch.float64)
    for one in micros:
        length = int(one.given["attention_mask"].any(0).nonzero().max()) + 1
        one.given = {name: x[:, :length] for name, x in one.given.items()}
        one.labels = one.labels[:, :length]

    def work(index: int) -> Tensor | None:
        one = micros[index]
        if mesh.stage < mesh.spec.pipeline - 1:
            assert model(**one.given).logits is None
            return None
        found = loss(model, one, asked, one.labels, tokens(one) / tokens(whole))
        total.add_(found.detach())
        return found

    backwards: list[bool] = []
    through(model, [tuple(one.given["input_ids"].shape) for one in micros], work, backwards.append)
    assert backwards == [False] * (len(micros) - 1) + [True]
    last = mesh.said(json.dumps(float(mesh.total(total))), mesh.spec.pipeline - 1)
    return torch.tensor(json.loads(last), dtype=torch.float64)


def mesh_of(spec: lamina.ModelSpec, fields: dict[str, int]) -> Mesh:
    """What `open_mesh` gives, but one for all models: ranks slow down with each group that they are in."""
    from lamina.parallel import MeshSpec, plan

    mesh = _opened(MeshSpec(**fields))
    plan(mesh.spec, mesh.spec.ranks, spec)
    return mesh


@functools.cache
def _opened(spec: MeshSpec) -> Mesh:
    from lamina.parallel import open_mesh

    return open_mesh(spec, deep())  # which lies on any mesh


def compare(name: str, fields: dict[str, int], pieces: int) -> None:
    """Lay `MODELS[name]` out over a mesh; its loss and all its gradients are those of one process.

    pieces: in how many micro-batches, on a pipeline."""
    from lamina.parallel import distribute, gradient_norm

    name, _, adapter = name.partition(" + ")
    spec = MODELS[name]()
    mesh = mesh_of(spec, fields)
    pieces = 1 if mesh.spec.pipeline == 1 else pieces
    routers = mesh.spec.context == 1
    whole = batch(spec)
    expected, one = alone(spec, whole, mesh.readers * pieces, routers, bool(adapter))
    model = distribute(build(spec, bool(adapter)), mesh)
    mine = whole.rows(mesh.reader, mesh.readers)
    labels = mesh.labels(mine.labels)
    asked = mesh.total((labels >= 0).sum())
    assert int(asked) == int((whole.labels >= 0).sum())
    if mesh.spec.pipeline > 1:
        found = piped(
            model, [whole.rows(mesh.reader * pieces + i, mesh.readers * pieces) for i in range(pieces)], whole
        )
    else:
        found = loss(model, mine, int(asked), labels, tokens(mine) / tokens(whole) if routers else None)
        found.backward()
        found = mesh.total(found)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    names = [path for path, _ in one.named_parameters()]
    assert [path for path, _ in model.named_parameters()] == names
    squares = torch.zeros((), dtype=torch.float64)
    for (path, parameter), other in zip(one.named_parameters(), model.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad, path
        grad = (
            other.detach() if other.is_meta and other.requires_grad else other.grad
        )  # on a pipeline, that of another stage
        assert (parameter.grad is None) == (grad is None), path
        if parameter.grad is not None and grad is not None:
            torch.testing.assert_close(
                mesh.whole(grad),
                parameter.grad,
                rtol=1e-8,
                atol=1e-10,
                msg=lambda text, path=path: f"{path}: {text}",
            )
            squares += parameter.grad.square().sum()
    torch.testing.assert_close(gradient_norm(model), squares.sqrt())
