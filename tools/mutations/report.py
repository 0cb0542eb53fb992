"""Features of `report/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "report/frame.py": ("tests/train/test_report.py",),
    "report/stacks.py": ("tests/test_report_stacks.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "report/stacks.py": [
        ("stacks: steps that changed are marked", "if step in beside", "if True or step in beside"),
        ("stacks: costs of one layer", "row.parameters // len(places)", "row.parameters"),
        ("stacks: layers beside their equals", "if len(before) == len(after):", "if len(before) >= len(after):"),
    ],
    "report/frame.py": [
        ("report: no script", "if script else \"script-src 'none'\"", 'if script else "script-src *"'),
    ],
}
