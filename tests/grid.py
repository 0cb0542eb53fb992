"""The models of the grid in docs/conformance.md: a small one for each kind of layer, and a tiny one of each family.

python -m benchmarks.conformance        writes what `verify` finds of them
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.families import Fields, family
from lamina.layers import (
    AttentionSpec,
    CapacitySpec,
    DifferentialSpec,
    ExpertChoiceSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LatentAttentionSpec,
    ProductKeySpec,
    RecurrentMemorySpec,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    StepSpec,
    TopKSpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Everything, Global, Pattern, Prefix, Sinks, Strided, Window
from lamina.specs import Spec, edit
from tests import small
from tests.layers import memories
from tests.layers.test_retrieval import TINY as RETRO

ROTARY = RotarySpec(base=100.0, width=4)
NETWORK = FeedForwardSpec(hidden=24)


def text(*patterns: Pattern, scheme: str = "rotary", **fields: Any) -> ModelSpec:
    return small.decoder(list(patterns or (Causal(), Causal())), scheme, **fields).replace(context=64)


def networks(op: Spec, spec: ModelSpec | None = None) -> ModelSpec:
    """Another network in place of each."""
    return edit(spec or text(), FeedForwardSpec, lambda path, part: op)


def attentions(op: Callable[[AttentionSpec], Spec]) -> ModelSpec:
    return edit(text(Causal() & Window(back=4), Causal()), AttentionSpec, lambda path, part: op(part))


def latent(part: AttentionSpec) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        heads=3, key_rank=12, nope_dim=6, rope_dim=4, value_dim=5, rotary=RotarySpec(base=50.0), pattern=part.pattern
    )


def differential(part: AttentionSpec) -> DifferentialSpec:
    return DifferentialSpec(
        heads=4, key_heads=2, head_dim=8, rotary=RotarySpec(base=50.0), pattern=part.pattern, start=0.2
    )


def products(**fields: Any) -> ModelSpec:
    """A step of its own after the others."""
    spec = text()
    assert spec.decoder is not None
    step = StepSpec(name="memory", op=ProductKeySpec(keys=7, key_dim=6, heads=2, chosen=3, **fields), pre=RMSNormSpec())
    layers = tuple(layer.replace(steps=(*layer.steps, step)) for layer in spec.decoder.layers)
    return spec.replace(decoder=spec.decoder.replace(layers=layers))


def recurrent() -> ModelSpec:
    spec = text()
    assert spec.decoder is not None
    return spec.replace(decoder=spec.decoder.replace(recurrence=RecurrentMemorySpec(tokens=2, length=5)))


def remembering(name: str) -> ModelSpec:
    return memories.spec(*memories.MEMORIES[name]).replace(context=64)


def mixture(**fields: Any) -> ExpertsSpec:
    chosen = {"router": TopKSpec(experts=4, chosen=2), "losses": RouterLossSpec(balance=0.01, z=0.001)}
    return ExpertsSpec(expert=NETWORK, **chosen | fields)


WINDOW = Causal() & Window(back=4)
KINDS: dict[str, Callable[[], ModelSpec]] = {
    **{f"positions: {scheme}": partial(text, scheme=scheme) for scheme in small.SCHEMES},
    "attention: a key head for each": partial(text, key_heads=4),
    "attention: one key head": partial(text, key_heads=1),
    "attention: a soft-cap": partial(text, softcap=2.0),
    "attention: a learned sink": partial(text, sink=True),
    "attention: latent": partial(attentions, latent),
    "attention: differential": partial(attentions, differential),
    "pattern: everything": partial(text, Everything(), Everything()),
    "pattern: a window": partial(text, WINDOW, WINDOW),
    "pattern: a window, then all": partial(text, WINDOW, Causal()),
    "pattern: a window and sinks": partial(text, Causal() & (Window(back=4) | Sinks(count=2)), Causal()),
    "pattern: a window and global positions": partial(text, Causal() & (Window(back=4) | Global(positions=(0, 3)))),
    "pattern: a prefix": partial(text, Causal() | Prefix()),
    "pattern: strided": partial(text, Causal() & Strided(stride=3)),
    "experts: dropless": partial(networks, mixture()),
    "experts: a capacity in training": partial(networks, mixture(capacity=CapacitySpec(training=1.0, least=1))),
    "experts: a shared one": partial(networks, mixture(shared=NETWORK, shared_gate=True)),
    "experts: they choose": lambda: networks(
        mixture(router=ExpertChoiceSpec(experts=4), losses=None), text(Everything(), Everything())
    ),
    "memory: product keys": products,
    "memory: recurrent tokens": recurrent,
    **{f"memory: {name}": partial(remembering, name) for name in memories.MEMORIES},
}

UNPUBLISHED: dict[str, dict[str, Any]] = {
    "palm": {"layers": 3, "width": 20, "heads": 3, "head_dim": 8, "vocabulary": 40, "context": 64},
    "glam": {"layers": 2, "width": 20, "hidden": 28, "heads": 2, "head_dim": 8, "experts": 4, "vocabulary": 40},
    "retro": RETRO,
}
"""Families without files, as small ones."""


def families() -> Iterator[str]:
    """One row of tests/families.py for each model type: the first that has a head."""
    from tests.families import ROWS

    seen: set[str] = set()
    for row in ROWS:
        headed = "For" in row.model or "LMHead" in row.model
        if headed and (found := model_type(row.name)) not in seen:
            seen.add(found)
            yield row.name


def model_type(name: str) -> str:
    """That of a row of tests/families.py."""
    import transformers

    from tests.families import row

    return getattr(transformers, row(name).config).model_type


def kind(name: str) -> Model:
    return small.build(KINDS[name](), dtype=torch.float32)


def unpublished(name: str) -> Model:
    return small.build(family(name).spec(Fields(UNPUBLISHED[name])), dtype=torch.float32)


def published(name: str) -> Model:
    from tests.families import Case, row

    with tempfile.TemporaryDirectory() as folder:
        model = Case(row(name), Path(folder)).ours
        for parameter in model.parameters():  # no longer in the folder's files
            parameter.data = parameter.data.clone()
        model.origin = None
        return model


def models() -> dict[str, Callable[[], Model]]:
    """Every model of the grid, by name: built when it is called."""
    found: dict[str, Callable[[], Model]] = {name: partial(kind, name) for name in KINDS}
    found |= {f"family: {name}": partial(published, name) for name in families()}
    return found | {f"family: {name}": partial(unpublished, name) for name in UNPUBLISHED}


def found(model: Model) -> dict[str, dict[str, Any]]:
    """What `verify` says of a model: by row its verdict, the worst difference, and why it was not tried."""
    said = {}
    for row in lamina.verify(model).rows:
        one: dict[str, Any] = {"verdict": row.verdict}
        one |= {} if row.worst is None else {"worst": float(f"{row.worst:.1e}")}
        said[row.property] = one | ({} if row.verdict == "holds" else {"note": row.note})
    return said
