"""The grid of docs/conformance.md: it has every family, nothing fails, and it is what is found today."""

from __future__ import annotations

import json

import pytest

from lamina.families import FAMILIES
from tests import grid
from tests.test_docs import ROOT

RESULTS = json.loads((ROOT / "benchmarks/results/conformance.json").read_text())


def test_it_has_all_of_them_and_nothing_fails():
    assert list(RESULTS) == list(grid.models())
    rows = [(name, title, row) for name, said in RESULTS.items() for title, row in said.items()]
    assert [each for each in rows if each[2]["verdict"] == "fails"] == []
    families = {grid.model_type(name) for name in grid.families()} | set(grid.UNPUBLISHED)
    families |= {"gemma3"}  # whose text model is gemma3_text
    families |= {"lamina"}  # folders with their own code, which are of any of these specs
    assert set(FAMILIES) == families, "a family has no row in the grid: tests/grid.py"
    assert all(row["note"] for _, _, row in rows if row["verdict"] == "not tried"), "what is not tried says why"


@pytest.mark.parametrize(
    "name",
    [
        "positions: shaw",
        "experts: a capacity in training",
        "memory: infini, delta",
        "pattern: a prefix",
        "family: bloom",
    ],
)
def test_a_sample_is_found_again(name: str):
    """Figures may differ with the machine; what holds, and what is not tried and why, may not."""
    now, before = grid.found(grid.models()[name]()), RESULTS[name]
    assert list(now) == list(before)
    for title, row in now.items():
        assert (row["verdict"], row.get("note")) == (before[title]["verdict"], before[title].get("note")), title
        assert ("worst" in row) == ("worst" in before[title]), title
