"""Healing: what operations changed of a model learns again what the original said, and nothing else moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina import editing, exporting
from lamina.errors import LaminaError
from lamina.train.specs import TrainSpec
from lamina.train.training import Result, train
from tests import tiny
from tests.train.test_training import config, data, spec_of

__all__ = ["data"]

TEACHER = {"kind": "distillation", "mix": 1.0}


def edited(folder: Path, plan: list[dict[str, Any]], source: Path) -> Path:
    opened, done = editing.planned(source, plan)
    editing.write(opened, done, folder, exporting.layout(done.spec, opened.origin.family))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healing") / "original"
    lamina.save(tiny.model(), folder)
    tiny.tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """One key head in the second layer."""
    plan = [{"op": "key_heads", "heads": 1, "at": ["decoder.layers.1"]}]
    return edited(tmp_path_factory.mktemp("healing") / "changed", plan, original)


def spec(data: Path, source: Path, original: Path, **more: Any) -> TrainSpec:
    fields = json.loads(config(data, **more))
    fields["model"] = {"source": str(source), "unfreeze": "changed"}
    fields["objective"] = {**TEACHER, "teacher": str(original)}
    return spec_of(json.dumps(fields))


def teaching(done: Result) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (done.directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation"]["teacher"]) for line in lines if "validation" in line]


def test_only_what_was_changed_learns_what_the_original_says(tmp_path: Path, data: Path, changed: Path, original: Path):
    long = {"steps": 40}
    done = train(spec(data, changed, original, loop=long), tmp_path / "run")
    before, after = lamina.load(changed), lamina.load(done.directory / "model")
    moved = {name for name, one in before.named_parameters() if not torch.equal(one, after.get_parameter(name))}
    # Of fewer key heads not only the keys are other ones: queries and output belong to a part that has changed.
    assert moved == {f"decoder.layers.1.attention.op.{part}.weight" for part in "qkvo"}
    found = [nats for _, nats in teaching(done)]
    assert found[-1] < 0.5 * found[0]
    # By hand, on the data: what the run calls the teacher's loss is KL(original | healed).
    healed, old = after.double(), lamina.load(original, dtype="float64")
    ids = torch.randint(old.spec.embedding.vocabulary, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        far = [
            torch.nn.functional.kl_div(
                model(ids).logits.log_softmax(-1), old(ids).logits.log_softmax(-1), log_target=True, reduction="sum"
            )
            for model in (before.double(), healed)
        ]
    assert far[1] < far[0]


def test_it_stops_at_a_stated_divergence_and_goes_on_for_a_lower_one(
    tmp_path: Path, data: Path, changed: Path, original: Path
):
    whole = train(spec(data, changed, original, loop={"steps": 40}), tmp_path / "whole")
    found = teaching(whole)
    step, goal = next((step, nats) for step, nats in found if nats < 0.7 * found[0][1])
    said: list[Any] = []
    done = train(
        spec(data, changed, original, loop={"steps": 40}, evaluation={"until": {"teacher": goal}}),
        tmp_path / "run",
        show=said.append,
    )
    assert done.step == step and done.model is not None and done.status == 0
    assert f"step {step}: {{'teacher': {goal}}} is reached" in said
    again = train(
        spec(data, changed, original, loop={"steps": 40}, evaluation={"until": {"teacher": goal}}),
        tmp_path / "run",
        resume="auto",
    )
    assert again.step == step and again.loss is None  # there was nothing left to do
    lower = train(
        spec(data, changed, original, loop={"steps": 40}, evaluation={"until": {"teacher": 0.0}}),
        tmp_path / "run",
        resume="auto",
    )
    assert lower.step == 40 and teaching(lower) == found
    one, other = (lamina.load(each.directory / "model") for each in (whole, lower))
    assert all(torch.equal(weight, other.get_parameter(name)) for name, weight in one.named_parameters())


def test_a_window_changes_no_weight_and_its_attention_learns(tmp_path: Path, data: Path, original: Path):
    window = edited(tmp_path / "window", [{"op": "window", "back": 3, "at": ["decoder.layers.0"]}], original)
    assert json.loads((window / "history.json").read_text())[-1]["changed"] == [
        f"decoder.layers.0.attention.op.{part}.weight" for part in "qkvo"
    ]
    done = train(spec(data, window, original), tmp_path / "run")
    history = json.loads((done.directory / "model" / "history.json").read_text())
    assert history[-1]["promises"] == [{"kept": "lossy", "why": "trained"}]
    with pytest.raises(LaminaError, match="cannot be undone"):
        editing.undoing(done.directory / "model")
    # What has been healed can be healed further, and what is changed after that is changed too.
    more = edited(
        tmp_path / "more", [{"op": "key_heads", "heads": 1, "at": ["decoder.layers.1"]}], done.directory / "model"
    )
    assert json.loads((more / "history.json").read_text())[-1]["changed"] == [
        f"decoder.layers.{i}.attention.op.{part}.weight" for i in (0, 1) for part in "qkvo"
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": {"unfreeze": "changed", "source": "ORIGINAL"}}, "has no history.json"),
        ({"model": {"unfreeze": "changed", "train": ["decoder"], "source": "CHANGED"}}, "takes the place of train"),
        ({"model": {"unfreeze": "all", "source": "CHANGED"}}, "unfreeze"),
        ({"evaluation": {"until": {"teecher": 0.1}}}, "loss 'teecher'.*did you mean 'teacher'"),
        ({"evaluation": {"until": {"teacher": "low"}}}, "until.teacher is 'low'"),
        ({"evaluation": {"until": {"teacher": 0.1}}, "validation": None}, "needs data.validation"),
    ],
)
def test_mistakes(tmp_path: Path, data: Path, changed: Path, original: Path, fields: dict, said: str):
    whole = json.loads(config(data, **{name: value for name, value in fields.items() if name == "evaluation"}))
    if "validation" in fields:
        whole["data"]["validation"] = None
    places = {"ORIGINAL": str(original), "CHANGED": str(changed)}
    chosen = fields.get("model", {"source": "CHANGED", "unfreeze": "changed"})
    whole["model"] = {**chosen, "source": places[chosen["source"]]}
    whole["objective"] = {**TEACHER, "teacher": str(original)}
    with pytest.raises(LaminaError, match=said):
        train(spec_of(json.dumps(whole)), tmp_path / "run")
