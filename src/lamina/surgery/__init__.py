"""Surgery: operations (spec, weights) -> (spec, weights) that change a model and never invent a tensor; plans of them,
and the verdict on what was kept."""

from __future__ import annotations

from lamina.surgery.adapter import MergeAdapter
from lamina.surgery.build import begun, build
from lamina.surgery.calibration import pieces
from lamina.surgery.depth import NewLayers, OrderLayers
from lamina.surgery.encoders import CrossGraft, FreshEncoder
from lamina.surgery.grafts import NeighbourEncoderSize, NewMemory, NewStep, Retrieval
from lamina.surgery.heads import KeyHeads, OrderHeads
from lamina.surgery.latent import LatentOperation
from lamina.surgery.longformer import LongformerOperation
from lamina.surgery.merging import Merge, Merged
from lamina.surgery.mixture import Mixture
from lamina.surgery.multi_head import MultiHead
from lamina.surgery.norms import CentreOperation, FoldNorms
from lamina.surgery.operation import Changed, FittedOperation, Joining, Operation, Other, Others, Outside, Promise
from lamina.surgery.patterns import Restore, WindowOperation
from lamina.surgery.plan import OPERATIONS, Applied, Plan, apply, read_plan, said
from lamina.surgery.positions import PositionsOperation
from lamina.surgery.reading import Reading
from lamina.surgery.retrofit import retrofit
from lamina.surgery.rope import RopeOperation, RotaryPositions
from lamina.surgery.tokens import SwapTokenizer
from lamina.surgery.upcycle import PickExpert, Upcycle
from lamina.surgery.verdict import Drift, Side, Verdict, compare
from lamina.surgery.vocabulary import TieHead, VocabularyOperation
from lamina.surgery.weights import Beside, Made, Weights
from lamina.surgery.width import Gated, Plain, Prune, Widen

SURGERIES = {"retrofit": retrofit}
"""By name. The first two arguments are a spec and what maps the names of its parameters to tensors."""

__all__ = [
    "OPERATIONS",
    "SURGERIES",
    "Applied",
    "Beside",
    "CentreOperation",
    "Changed",
    "CrossGraft",
    "Drift",
    "FittedOperation",
    "FoldNorms",
    "FreshEncoder",
    "Gated",
    "Joining",
    "KeyHeads",
    "LatentOperation",
    "LongformerOperation",
    "Made",
    "Merge",
    "MergeAdapter",
    "Merged",
    "Mixture",
    "MultiHead",
    "NeighbourEncoderSize",
    "NewLayers",
    "NewMemory",
    "NewStep",
    "Operation",
    "OrderHeads",
    "OrderLayers",
    "Other",
    "Others",
    "Outside",
    "PickExpert",
    "Plain",
    "Plan",
    "PositionsOperation",
    "Promise",
    "Prune",
    "Reading",
    "Restore",
    "Retrieval",
    "RopeOperation",
    "RotaryPositions",
    "Side",
    "SwapTokenizer",
    "TieHead",
    "Upcycle",
    "Verdict",
    "VocabularyOperation",
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
