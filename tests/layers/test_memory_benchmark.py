"""benchmarks/memory.py: its texts ask for what lies beyond the window, and a model without a memory cannot know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.memory import KEYS, LENGTH, MODELS, SEGMENT, TASKS, VALUES, spec_of, texts


@pytest.mark.parametrize("task", TASKS)
def test_texts_ask_for_a_value_of_the_first_segment(task: str):
    ids, value, near = texts(task, 200, torch.Generator().manual_seed(0))
    pairs, keys = TASKS[task]
    for row, answer, other in zip(ids.tolist(), value.tolist(), near.tolist(), strict=True):
        stand = [
            at for at, one in enumerate(row) if VALUES <= one < VALUES + keys and at not in (SEGMENT - 1, LENGTH - 1)
        ]
        assert len(stand) == pairs and max(stand) < SEGMENT - 2
        pair = {row[at]: row[at + 1] for at in stand}
        assert len(pair) == pairs and pair[row[-1]] == answer and all(one < VALUES for one in pair.values())
        assert other == (-100 if pairs == 1 else pair[row[SEGMENT - 1]])
        rest = [one for at, one in enumerate(row) if at not in stand and at - 1 not in stand]
        assert sum(one < VALUES + KEYS for one in rest) == (1 if pairs == 1 else 2)  # the questions


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
