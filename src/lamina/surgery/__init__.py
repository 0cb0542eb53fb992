"""Surgery: operations (spec, weights) -> (spec, weights) that change a model and never invent a tensor; plans of them,
and the verdict on what was kept."""

from __future__ import annotations

from lamina.surgery.adapter import MergeAdapter
from lamina.surgery.build import begun, build
from lamina.surgery.encoders import CrossGraft, FreshEncoder
from lamina.surgery.grafts import NeighbourEncoderSize, NewMemory, NewStep, Retrieval
from lamina.surgery.heads import KeyHeads, OrderHeads
from lamina.surgery.merging import Merge, Merged
from lamina.surgery.mixture import Mixture
from lamina.surgery.operation import Changed, Joining, Operation, Other, Others, Promise
from lamina.surgery.patterns import Restore, WindowOperation
from lamina.surgery.plan import OPERATIONS, Applied, Plan, apply, read_plan, said
from lamina.surgery.reading import Reading
from lamina.surgery.retrofit import retrofit
from lamina.surgery.upcycle import PickExpert, Upcycle
from lamina.surgery.verdict import Drift, Side, Verdict, compare, pieces
from lamina.surgery.weights import Beside, Made, Weights

SURGERIES = {"retrofit": retrofit}
"""By name. The first two arguments are a spec and what maps the names of its parameters to tensors."""

__all__ = [
    "OPERATIONS",
    "SURGERIES",
    "Applied",
    "Beside",
    "Changed",
    "CrossGraft",
    "Drift",
    "FreshEncoder",
    "Joining",
    "KeyHeads",
    "Made",
    "Merge",
    "MergeAdapter",
    "Merged",
    "Mixture",
    "NeighbourEncoderSize",
    "NewMemory",
    "NewStep",
    "Operation",
    "OrderHeads",
    "Other",
    "Others",
    "PickExpert",
    "Plan",
    "Promise",
    "Reading",
    "Restore",
    "Retrieval",
    "Side",
    "Upcycle",
    "Verdict",
    "Weights",
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
