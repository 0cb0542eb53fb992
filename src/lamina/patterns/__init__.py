"""Patterns: who may attend to whom, as predicates over token metadata that compose with & and |."""

from __future__ import annotations

from lamina.patterns.blocks import BlockTable, BlockWindow, RandomBlocks, bigbird
from lamina.patterns.near import Causal, Everything, Global, Prefix, Sinks, Window
from lamina.patterns.pattern import (
    FOREVER,
    Both,
    Either,
    Extent,
    Pattern,
    Reach,
    Retained,
    Span,
    allowed,
    extent,
)
from lamina.patterns.strided import Strided, Summary, fixed, strided

__all__ = [
    "FOREVER",
    "BlockTable",
    "BlockWindow",
    "Both",
    "Causal",
    "Either",
    "Everything",
    "Extent",
    "Global",
    "Pattern",
    "Prefix",
    "RandomBlocks",
    "Reach",
    "Retained",
    "Sinks",
    "Span",
    "Strided",
    "Summary",
    "Window",
    "allowed",
    "bigbird",
    "extent",
    "fixed",
    "strided",
]
