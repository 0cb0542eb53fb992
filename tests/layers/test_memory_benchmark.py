"""benchmarks/memory.py: its texts ask for what lies beyond the window, and a model without a memory cannot know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.memory import KEYS, LENGTH, MODELS, SEGMENT, TASKS, VALUES, spec_of, texts


@pytest.mark.parametrize("task", TASKS)
def test_texts_ask_for_a_value_of_the_first_segment(task: str):
    ids, asked = texts(task, 200, torch.Generator().manual_seed(0))
    pairs = TASKS[task]
    ends = (1, 2, 3, 4) if pairs == 1 else (1, 4)  # segments at whose end something is asked
    for row, answers in zip(ids.tolist(), asked.tolist(), strict=True):
        places = [at for at, one in enumerate(answers) if one >= 0]
        assert len(places) == pairs * len(ends) and sorted({at // SEGMENT + 1 for at in places}) == list(ends)
        stand = [at for at, one in enumerate(row) if VALUES <= one < VALUES + KEYS and at not in places]
        assert len(stand) == pairs and max(stand) < SEGMENT - 2
        pair = {row[at]: row[at + 1] for at in stand}
        assert len(pair) == pairs and all(pair[row[at]] == answers[at] for at in places)
        known = {*places, *stand, *(at + 1 for at in stand)}
        assert all(one >= VALUES + KEYS for at, one in enumerate(row) if at not in known)


@torch.no_grad()
@pytest.mark.parametrize("name", ["no memory", "recurrence, too short", "recurrence", "infini, linear"])
def test_who_can_know_it(name: str):
    """Two layers of a memory of 16 relay 32 positions: the first segment stays hidden."""
    model = spec_of(*MODELS[name]).build(seed=0).eval()
    ids = torch.randint(32, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[1, SEGMENT:] = ids[0, SEGMENT:]
    one, other = model(ids, keep_logits=1).logits
    assert torch.equal(one, other) is (name in ("no memory", "recurrence, too short"))


def test_results_are_of_models_that_there_are():
    found = json.loads((Path(__file__).parents[2] / "benchmarks/results/memory.json").read_text())
    assert found["chance"] == 1 / VALUES
    assert {run["model"] for run in found["runs"]} <= set(MODELS) and {run["task"] for run in found["runs"]} <= set(
        TASKS
    )
