"""Models on several ranks. So far: experts that lie on several of them."""

from __future__ import annotations

from lamina.parallel.experts import AllToAll, spread_experts

__all__ = ["AllToAll", "spread_experts"]
