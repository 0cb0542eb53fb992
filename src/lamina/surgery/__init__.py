"""Surgery: operations (spec, weights) -> (spec, weights) that change a model and never invent a tensor; plans of them,
and the verdict on what was kept."""

from __future__ import annotations

from lamina.surgery.build import begun, build
from lamina.surgery.heads import KeyHeads, OrderHeads
from lamina.surgery.latent import LatentOperation
from lamina.surgery.longformer import LongformerOperation
from lamina.surgery.operation import Changed, FittedOperation, Operation, Promise
from lamina.surgery.patterns import Restore, WindowOperation
from lamina.surgery.plan import OPERATIONS, Applied, Plan, apply, read_plan, said
from lamina.surgery.retrofit import retrofit
from lamina.surgery.upcycle import PickExpert, Upcycle
from lamina.surgery.verdict import Drift, Side, Verdict, compare, pieces
from lamina.surgery.weights import Made, Weights
from lamina.surgery.width import Gated, Plain, Prune, Widen

SURGERIES = {"retrofit": retrofit}
"""By name. The first two arguments are a spec and what maps the names of its parameters to tensors."""

__all__ = [
    "OPERATIONS",
    "SURGERIES",
    "Applied",
    "Changed",
    "Drift",
    "FittedOperation",
    "Gated",
    "KeyHeads",
    "LatentOperation",
    "LongformerOperation",
    "Made",
    "Operation",
    "OrderHeads",
    "PickExpert",
    "Plain",
    "Plan",
    "Promise",
    "Prune",
    "Restore",
    "Side",
    "Upcycle",
    "Verdict",
    "Weights",
    "Widen",
    "WindowOperation",
    "apply",
    "begun",
    "build",
    "compare",
    "pieces",
    "read_plan",
    "retrofit",
    "said",
]
