"""benchmarks/retro.py on a tiny LLaMA as deep as its recipe asks: `layers` and `fitted` run to their ends, and their
figures are what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lamina
from benchmarks import retro
from lamina.data import open_prepared
from lamina.objectives import CausalLM, Retrieving
from lamina.retrieve import open_database, open_neighbours
from lamina.surgery import build, retrofit
from tests import tiny
from tests.retrieve.made import embedder_at
from tests.train.test_recipes import follow

pytestmark = pytest.mark.slow
LAYERS, ROWS = 24, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory):
    """Where the commands at the head of retrofit.yaml were run, the last but one of them shortened."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        embedder_at(folder / "bert")
        deep = tiny.LLAMA | {"num_hidden_layers": LAYERS, "max_position_embeddings": 256}
        tiny.checkpoint(folder / "smollm2-135m", deep)
        follow("retrofit", patch, minilm="bert", smollm2="smollm2-135m")
        yield folder


def run(work: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict:
    """What the benchmark writes beside what the file holds already."""
    monkeypatch.chdir(work)  # and back: the benchmark goes there itself
    target = work / "retro.json"
    target.write_text('{"small": 7}')
    monkeypatch.setattr(
        sys, "argv", ["retro.py", str(words[0]), str(work), *map(str, words[1:]), "--json", str(target)]
    )
    retro.main()
    return json.loads(target.read_text())


def test_layers_are_gradients_of_the_gates(work: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside differences of the loss, with one gate a little open or a little shut."""
    document = run(work, monkeypatch, "layers", "--rows", ROWS)
    found = document["layers"]
    assert document["small"] == 7 and (found["rows"], found["length"]) == (ROWS, 256)
    database, text = open_database("kernel-smol-index"), open_prepared("kernel-smol/train")
    near = open_neighbours("kernel-smol-near", database, text)
    base = lamina.load("smollm2-135m", "float32")
    objective = Retrieving(CausalLM(packed=True), lambda prepared: near, 64)
    examples = objective.examples(text, 256)
    batch = objective.collate(
        [examples.example(i * len(examples) // ROWS, np.random.default_rng(0)) for i in range(ROWS)]
    )
    reads = sum(64 for row in batch.inputs["neighbours"] for chunk in row if bool((chunk >= 0).any()))
    assert reads > 0
    model, gates = build(*retrofit(base.spec, base.state_dict(), layers=tuple(range(LAYERS)), chunk=64, begin="copied"))
    assert len(gates) == len(found["with_neighbours"]) == len(found["other_neighbours"]) == LAYERS
    for layer in (0, 18, LAYERS - 1):
        gate, sides = model.get_parameter(f"decoder.layers.{layer}.retrieval.gate"), []
        for value in (0.02, -0.02):
            with torch.no_grad():
                gate.fill_(value)
                sides.append(float(objective.total(model, batch).kinds["next_token"].total))
                gate.zero_()
        assert found["with_neighbours"][layer] == pytest.approx(
            (sides[0] - sides[1]) / 0.04 / reads, rel=0.05, abs=3e-4
        )
    assert found["with_neighbours"] != found["other_neighbours"]


def test_neighbours_of_others_are_of_chunks_alone(work: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a row ends no more chunks there is nothing to give."""
    monkeypatch.chdir(work)
    text = open_prepared("kernel-smol/train")
    found = open_neighbours("kernel-smol-near", open_database("kernel-smol-index"), text)
    given = torch.tensor([[0, 1, -1], [5, -1, -1]])
    other = retro.Other(found).values(given)
    assert other.shape == found.values(given).shape
    assert ((other >= 0).any(3).any(2) == (given >= 0)).all()
    assert not torch.equal(other, found.values(given))


def test_a_fitted_model_is_trained_and_measured(work: Path, monkeypatch: pytest.MonkeyPatch):
    (work / "other.txt").write_text("The cat sat on a hill, and the dog ran over the mat. " * 9)
    words = ("fitted", "--seeds", 1, "--documents", 3, "--tokens", 200, "--unrelated", work / "other.txt")
    document = run(work, monkeypatch, *words)
    assert document["small"] == 7 and (work / "runs/retrofit-1/model").is_dir()
    assert set(document["fitted"]) == {"related", "unrelated"}
    for part in document["fitted"].values():
        (one,) = part["runs"]
        ratio = one["with_neighbours"]["perplexity"] / one["smollm2"]["perplexity"]
        assert one["perplexity_changes_by"] == pytest.approx(ratio - 1, abs=2e-3) and ratio != 1
        assert {"other_neighbours", "overlap"} < set(one)
    column, nats, tokens = open_prepared("kernel-smol/validation").column("text"), 0.0, 0
    theirs = AutoModelForCausalLM.from_pretrained(work / "smollm2-135m", dtype=torch.float32).eval()
    count = len(column.lengths())
    for i in range(3):  # a window is longer than what is read of a page
        ids = torch.from_numpy(np.asarray(column[i * count // 3][:-1][:200], np.int64))[None]
        nats += theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    (one,) = document["fitted"]["related"]["runs"]
    assert one["smollm2"]["nats_per_token"] == pytest.approx(nats / tokens, rel=0.01)  # ours in bfloat16
    narrowed = run(work, monkeypatch, *words, "--gates", 0.5)["fitted_gates_0.5"]["related"]["runs"][0]
    assert narrowed["smollm2"] == one["smollm2"]
    assert abs(math.log1p(narrowed["perplexity_changes_by"])) < abs(math.log1p(one["perplexity_changes_by"]))
