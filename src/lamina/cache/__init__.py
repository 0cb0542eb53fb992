"""Key-value caches. A slot (one layer) meets attention in one method, `extend`; the cache holds the slots of a model.

    extend(key, value, tokens) -> (keys, values, their tokens)

Order does not matter, holes have position -1, evicted keys are absent. Layers see nothing else of a cache.
"""

from __future__ import annotations

from lamina.cache.cache import Cache
from lamina.cache.expiring import ExpiringLedger
from lamina.cache.fixed import FixedLedger
from lamina.cache.growing import GrowingLedger
from lamina.cache.memory import MemoryLedger, MemorySlot
from lamina.cache.neighbours import Found, NeighbourLedger, NeighbourSlot
from lamina.cache.recurrent import Progress, RecurrentLedger, RecurrentSlot
from lamina.cache.ring import RingLedger
from lamina.cache.sinks import SinksLedger
from lamina.cache.slot import Ledger, Slot
from lamina.cache.summed import SummedLedger, SummedSlot

KINDS = ("auto", "growing", "fixed", "ring", "sinks")
"""auto: a ring where the layer's pattern is a window; one that forgets what no later token can see where the pattern
tells (sinks, blocks, prefixes beside a window); growing elsewhere. fixed: preallocated, for compiled steps. ring: as
auto, and refused where a layer looks back without limit. sinks: StreamingLLM, the first and the last keys."""

__all__ = [
    "KINDS",
    "Cache",
    "ExpiringLedger",
    "FixedLedger",
    "Found",
    "GrowingLedger",
    "Ledger",
    "MemoryLedger",
    "MemorySlot",
    "NeighbourLedger",
    "NeighbourSlot",
    "Progress",
    "RecurrentLedger",
    "RecurrentSlot",
    "RingLedger",
    "SinksLedger",
    "Slot",
    "SummedLedger",
    "SummedSlot",
]
