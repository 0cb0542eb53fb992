"""The sixteen kinds of layer: what each is and why, its equation, variants, cost, pitfalls, and an example that runs.

Who uses a variant is not written here but found in the specs of the published sizes: a variant is a question to a spec.
"""

from __future__ import annotations

from functools import cache

from lamina.catalogue.attending import CROSS_ATTENTION, MULTI_HEAD, SELF_ATTENTION, SPARSE
from lamina.catalogue.inputs import EMBEDDING, POSITION, ROTARY
from lamina.catalogue.keeping import CACHE, MEMORY, RETRIEVAL
from lamina.catalogue.kind import Correction, Counted, Example, Kind, Question, Source, Variant
from lamina.catalogue.network import EXPERTS, FEED_FORWARD, GATED
from lamina.catalogue.wiring import DROPOUT, NORMALISATION, RESIDUAL
from lamina.errors import LaminaError
from lamina.model import ModelSpec
from lamina.source import spec as spec_of
from lamina.specs import unknown

CATALOGUE = (
    EMBEDDING,
    SELF_ATTENTION,
    MULTI_HEAD,
    FEED_FORWARD,
    NORMALISATION,
    RESIDUAL,
    POSITION,
    DROPOUT,
    CROSS_ATTENTION,
    SPARSE,
    MEMORY,
    EXPERTS,
    GATED,
    ROTARY,
    RETRIEVAL,
    CACHE,
)
"""In the order of the usual article on the layers of language models."""


def kind(name: str) -> Kind:
    """The kind of layer called `name`. Raises LaminaError naming the nearest."""
    found = {one.name: one for one in CATALOGUE}
    if name not in found:
        raise LaminaError(unknown("kind of layer", name, found))
    return found[name]


@cache
def published() -> dict[str, ModelSpec]:
    """The spec of every published size, each distinct layer once: the questions are whether it has something."""
    from lamina.families import sizes

    return {name: _distinct(spec_of(name)) for name in sizes()}


def _distinct(spec: ModelSpec) -> ModelSpec:
    for name in ("encoder", "decoder"):
        stack = getattr(spec, name)
        if stack is not None:
            spec = spec.replace(**{name: stack.replace(layers=tuple(dict.fromkeys(stack.layers)))})
    return spec


def families() -> list[str]:
    """The published families: ["gpt2", "llama", ...]."""
    return sorted({name.partition("/")[0] for name in published()})


def users(used: Question | None) -> list[str]:
    """The published families in whose specs the question is answered with yes."""
    if used is None:
        return []
    found: set[str] = set()
    for name, spec in published().items():
        family = name.partition("/")[0]
        if family not in found and used(spec):
            found.add(family)
    return sorted(found)
