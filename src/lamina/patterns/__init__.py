"""Patterns: who may attend to whom, as predicates over token metadata that compose with & and |."""

from __future__ import annotations

from lamina.patterns.blocks import BlockTable, BlockWindow, RandomBlocks, bigbird
from lamina.patterns.near import Causal, Everything, Global, Prefix, Sinks, Window
from lamina.patterns.pattern import (
    FOREVER,
    Band,
    Both,
    Either,
    Extent,
    Pattern,
    Predicate,
    Reach,
    Retained,
    Span,
    allowed,
    extent,
)
from lamina.patterns.segments import SegmentWindow, Without
from lamina.patterns.strided import Strided, Summary, fixed, strided

__all__ = [
    "FOREVER",
    "Band",
    "BlockTable",
    "BlockWindow",
    "Both",
    "Causal",
    "Either",
    "Everything",
    "Extent",
    "Global",
    "Pattern",
    "Predicate",
    "Prefix",
    "RandomBlocks",
    "Reach",
    "Retained",
    "SegmentWindow",
    "Sinks",
    "Span",
    "Strided",
    "Summary",
    "Window",
    "Without",
    "allowed",
    "bigbird",
    "extent",
    "fixed",
    "strided",
]
