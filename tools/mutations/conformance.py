"""Features of `conformance/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "conformance/retrieval.py": ("tests/test_families_retro.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "conformance/retrieval.py": [
        ("verify: neighbours too early", "early = max(early, gap(ours[:, :first], before[:, :first]))", "pass"),
        ("verify: gates at zero", "if unmoved and", "if False and"),
    ],
}
