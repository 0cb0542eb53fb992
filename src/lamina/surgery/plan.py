"""Plans: operations as data, read from YAML or from Python, checked as a whole, and applied one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lamina.document import Node, decode, encode, open_document
from lamina.errors import LaminaError
from lamina.model import ModelSpec
from lamina.specs import Spec, unknown
from lamina.surgery.adapter import MergeAdapter
from lamina.surgery.depth import NewLayers, OrderLayers
from lamina.surgery.encoders import CrossGraft
from lamina.surgery.grafts import NewMemory, NewStep, Retrieval
from lamina.surgery.heads import KeyHeads, OrderHeads
from lamina.surgery.latent import LatentOperation
from lamina.surgery.longformer import LongformerOperation
from lamina.surgery.merging import Merge
from lamina.surgery.mixture import Mixture
from lamina.surgery.multi_head import MultiHead
from lamina.surgery.norms import CentreOperation, FoldNorms
from lamina.surgery.operation import Changed, Kept, Operation, Other, Outside, Promise
from lamina.surgery.patterns import Restore, WindowOperation
from lamina.surgery.places import parts
from lamina.surgery.positions import PositionsOperation
from lamina.surgery.reading import Reading
from lamina.surgery.rope import RopeOperation, RotaryPositions
from lamina.surgery.tokens import SwapTokenizer
from lamina.surgery.upcycle import PickExpert, Upcycle
from lamina.surgery.vocabulary import TieHead, VocabularyOperation
from lamina.surgery.weights import origin
from lamina.surgery.width import Gated, Plain, Prune, Widen

OPERATIONS: dict[str, type[Operation]] = {
    kind.NAME: kind
    for kind in (
        KeyHeads,
        OrderHeads,
        LatentOperation,
        MultiHead,
        LongformerOperation,
        WindowOperation,
        Upcycle,
        PickExpert,
        Widen,
        Prune,
        Gated,
        Plain,
        OrderLayers,
        NewLayers,
        RopeOperation,
        RotaryPositions,
        PositionsOperation,
        VocabularyOperation,
        SwapTokenizer,
        TieHead,
        CentreOperation,
        FoldNorms,
        Restore,
        NewStep,
        NewMemory,
        Retrieval,
        CrossGraft,
        Reading,
        Merge,
        Mixture,
        MergeAdapter,
    )
}
"""By the name that a plan has for them."""

ALONE = Outside()
Plan = str | os.PathLike[str] | Sequence[Mapping[str, Any] | Operation]


@dataclass(frozen=True)
class Weight:
    """Where a weight of the new model comes from."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # names of the old model; none: it begins as `spec.initial` says
    how: tuple[str, ...]  # what was done, in order; nothing: it is the old one


@dataclass(frozen=True)
class Applied:
    """A model after all operations of a plan: nothing has been read yet."""

    operations: tuple[Operation, ...]
    promises: tuple[Promise, ...]
    before: ModelSpec
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    table: tuple[Weight, ...]
    changed: tuple[str, ...]
    """Weights that are not the old ones, or that belong to a part whose spec is another: what healing trains."""
    undo: tuple[Operation, ...] | None
    others: Mapping[str, Other]  # other models that weights come from, by SOURCE
    fits: tuple[dict[str, float], ...] = ()
    """Of each operation, what its fit lost by place: the root of the squared error of what is read, by all of it. It is
    known when its weights have been made."""

    @property
    def kept(self) -> Kept:
        """What the whole promises: the least of what its operations do."""
        kept = {promise.kept for promise in self.promises}
        return "lossy" if "lossy" in kept else "bounded" if "bounded" in kept else "exact"

    @property
    def new(self) -> tuple[str, ...]:
        """Weights that begin as `spec.initial` says."""
        return tuple(weight.name for weight in self.table if not weight.sources)


def read_plan(plan: Plan) -> tuple[Operation, ...]:
    """The operations of a YAML file, or of a list of mappings {"op": name, ...}.

    Raises LaminaError naming the file and line, the operation, the field and what would be right.
    """
    if isinstance(plan, str | os.PathLike):
        root = open_document(Path(plan))
        items, where = root.value, root.where
        if isinstance(items, dict) and set(items) == {"operations"}:
            items = items["operations"].value
    else:
        items, where = (
            [one if isinstance(one, Operation) else _node(one, f"plan[{i}]") for i, one in enumerate(plan)],
            "plan",
        )
    if not isinstance(items, list) or not items:
        raise LaminaError(f"{where}: a plan is a list of operations: - {{op: key_heads, heads: 1}}")
    return tuple(one if isinstance(one, Operation) else _operation(one) for one in items)


def said(operation: Operation) -> dict[str, Any]:
    """The inverse of `read_plan` for one operation."""
    fields = encode(operation)
    return {"op": fields.pop("kind"), **fields}


def apply(
    operations: Sequence[Operation],
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    outside: Outside = ALONE,
) -> Applied:
    """Every operation after the one before. None of the weights is made; that they fit the new spec is checked.

    Raises LaminaError naming the operation that cannot be done.
    """
    now = Changed(spec, weights, Promise("exact", "nothing was changed", bits=True), ())
    promises: list[Promise] = []
    fits: list[dict[str, float]] = []
    undo: tuple[Operation, ...] | None = ()
    opened: dict[str, Other] = {}

    def once(source: str) -> Other:
        assert outside.others is not None
        if source not in opened:
            opened[source] = outside.others(source)
        return opened[source]

    around = outside if outside.others is None else replace(outside, others=once)
    for number, operation in enumerate(operations):
        try:
            now = operation.change_with(now.spec, now.weights, around)
        except LaminaError as error:
            raise type(error)(f"operation {number + 1} ({operation.NAME}): {error}") from None
        promises.append(now.promise)
        fits.append(now.fits)
        if now.texts is not None:
            around = replace(around, texts=now.texts)
        undo = None if undo is None or now.undo is None else (*now.undo, *undo)
    table = _table(now.spec, now.weights)
    changed = _changed(spec, now.spec, table)
    state = now.spec, now.weights, table, changed
    return Applied(tuple(operations), tuple(promises), spec, *state, undo, opened, tuple(fits))


def _table(spec: ModelSpec, weights: Mapping[str, Tensor]) -> tuple[Weight, ...]:
    shapes = {name: tuple(parameter.shape) for name, parameter in spec.build(device="meta").named_parameters()}
    extra = [name for name in weights if name not in shapes]
    if extra:
        raise LaminaError(f"{extra[0]} is left over: the new spec has no place for it")
    rows = []
    for name, shape in shapes.items():
        sources, how = origin(weights, name) if name in weights else ((), ())
        rows.append(Weight(name, shape, sources, how))
    return tuple(rows)


def _changed(before: ModelSpec, after: ModelSpec, table: Sequence[Weight]) -> tuple[str, ...]:
    """By the weights themselves, and by the innermost part that each belongs to: a window changes no weight."""
    old, new = parts(before), parts(after)

    def owner(parts: Mapping[str, Spec], name: str) -> Spec | None:
        path = name
        while path and path not in parts:
            path = path.rpartition(".")[0]
        return parts.get(path) if path else None

    return tuple(
        weight.name
        for weight in table
        if weight.how
        or not weight.sources
        or any(owner(new, weight.name) != owner(old, source) for source in weight.sources)
    )


def _operation(node: Node) -> Operation:
    if not isinstance(node.value, dict) or "op" not in node.value:
        raise LaminaError(f"{node.where}: an operation is a mapping with op, one of {', '.join(OPERATIONS)}")
    name = node.value["op"]
    if name.value not in OPERATIONS:
        raise LaminaError(f"{name.where}: {unknown('operation', str(name.plain()), OPERATIONS)}")
    fields = {key: value for key, value in node.value.items() if key != "op"}
    return decode(OPERATIONS[name.value], Node(fields, node.where, node.keys), name.value)


def _node(value: Any, where: str) -> Node:
    if isinstance(value, Mapping):
        return Node({str(key): _node(one, f"{where}.{key}") for key, one in value.items()}, where)
    if isinstance(value, list | tuple):
        return Node([_node(one, f"{where}[{i}]") for i, one in enumerate(value)], where)
    return Node(value, where)
