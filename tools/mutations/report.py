"""Features of `report/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "report/frame.py": ("tests/train/test_report.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "report/frame.py": [
        ("report: no script", "if script else \"script-src 'none'\"", 'if script else "script-src *"'),
    ],
}
