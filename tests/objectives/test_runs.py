"""Each objective in a run of two steps, as a configuration says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamina
from lamina.data import Prepared, open_prepared
from lamina.document import decode, parse, write
from lamina.errors import LaminaError, UnsupportedError
from lamina.objectives import IGNORE, CausalLM, Retrieving
from lamina.retrieve import find_neighbours, open_database, open_neighbours
from lamina.train.building import plan
from lamina.train.specs import TrainSpec
from lamina.train.training import train
from tests.objectives.made import bart, bert, prepared, random_of, t5, texts
from tests.objectives.test_masked import PRETRAINING
from tests.objectives.test_pairs import CLASSES, EMBEDDING, SMALL_BART, SMALL_T5, TOKENS
from tests.retrieve import made
from tests.tiny import GPT2, LLAMA, spec

GPT = GPT2 | {"vocab_size": 166, "bos_token_id": 1, "eos_token_id": 1}


def of(directory: Path, kind: str, words: Any) -> Prepared:
    documents = texts(words, (30, 40, 90, 12, 50, 60))
    others, random = texts(words, (12, 30, 20, 45, 9, 11), 2), random_of(0)
    columns: list[dict[str, Any]] = [{"text": one} for one in documents]
    values, labels = None, ()
    if kind == "pairs":
        columns = [{"source": a, "target": b} for a, b in zip(documents, others, strict=True)]
    if kind == "contrastive":
        columns = [{"first": a, "second": b} for a, b in zip(documents, others, strict=True)]
    if kind == "classification":
        values, labels = [0, 1, 2, 0, 1, 2], ("a", "b", "c")
    if kind == "token-classification":
        asked = [np.where(random.random(len(one)) < 0.5, 3, IGNORE) for one in documents]
        columns = [{"tokens": a, "labels": b} for a, b in zip(documents, asked, strict=True)]
        labels = ("a", "b", "c", "d")
    return prepared(directory, words, columns, values, kind=kind, labels=labels)


RUNS = {
    "causal": ("text", t5, GPT, {}, {"next_token"}),
    "masked": ("text", bert, PRETRAINING, {"next_sentence": True}, {"masked", "next_sentence"}),
    "span_corruption": ("text", t5, SMALL_T5, {"z_loss": 1e-4}, {"target"}),
    "denoising": ("text", bart, SMALL_BART, {}, {"target"}),
    "prefix": ("text", t5, SMALL_T5, {"pair": True}, {"target"}),
    "pairs": ("pairs", t5, SMALL_T5, {"longer": "cut", "packed": True, "smoothing": 0.1}, {"target"}),
    "sequence_classes": ("classification", bert, CLASSES, {"longer": "cut"}, {"class", "accuracy"}),
    "token_classes": ("token-classification", bert, TOKENS, {"longer": "cut"}, {"class", "accuracy"}),
    "contrastive": ("contrastive", bert, EMBEDDING, {"longer": "cut"}, {"pair", "accuracy"}),
    "distillation": ("text", t5, GPT, {"teacher": "teacher", "mix": 0.7}, {"next_token", "teacher"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    kind, words, config, fields, parts = RUNS[name]
    of(tmp_path / "data", kind, words())
    if name == "distillation":
        lamina.save(spec(config).build(seed=1), tmp_path / "teacher")
        words().save(tmp_path / "teacher")
    (tmp_path / "spec.json").write_text(spec(config).to_json())
    said = {"kind": name} | fields
    document = f"""
model: {{spec: spec.json}}
data: {{train: data, validation: data, length: 24}}
loop: {{steps: 2, batch: 2, micro: 1}}
objective: {said}
"""
    chosen = decode(TrainSpec, parse(document.replace("True", "true"), "run.yaml"))
    assert name == chosen.objective.NAME and decode(TrainSpec, parse(write(chosen), "again")) == chosen
    found = train(chosen, tmp_path / "run")
    assert found.step == 2 and found.validation is not None and np.isfinite(found.validation.loss)
    assert set(found.validation.parts) == parts
    assert found.model is not None and lamina.load(str(found.model)).spec == spec(config)


def retrieving(root: Path, more: str = "") -> str:
    """A database of chunks of 5, a text that is in it and one that is not with their neighbours, and a configuration
    that reads them. Ends in the objective's fields."""
    found, train_text = made.database(root, made.texts(12, longest=40), chunk=5)
    held = made.prepared(root / "held", made.rows(root / "held.jsonl", made.texts(5, seed=3)))
    for name, text in (("near", train_text), ("near-held", held)):
        find_neighbours(found, text, root / name)
    (root / "spec.json").write_text(lamina.spec(made.reader_at(root / "reader", chunk=5)).to_json())
    return f"""
model: {{spec: spec.json}}
data: {{train: text, validation: held, length: 15}}
loop: {{steps: 3, batch: 2, micro: 1}}
{more}
objective: {{kind: retrieval, index: index, """


def test_a_run_that_reads_neighbours_and_its_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The twin reads the same rows in the same order, and begins with the same weights; its steps that retrieve never
    learn. Rows of the held-out text come with their own neighbours."""
    monkeypatch.chdir(tmp_path)
    text = retrieving(tmp_path) + "neighbours: [near, near-held]}"
    runs = {}
    for name, document in (
        ("retro", text),
        ("plain", text[: text.index("objective")] + "objective: {kind: causal, packed: true}"),
    ):
        chosen = decode(TrainSpec, parse(document, "run.yaml"))
        assert decode(TrainSpec, parse(write(chosen), "again")) == chosen
        assert plan(chosen)["examples"] == len(CausalLM(packed=True).examples(open_prepared("text"), 15))
        found = train(chosen, tmp_path / name)
        assert found.validation is not None and found.model is not None
        runs[name] = found.validation, lamina.load(str(found.model))
    (beside, retro), (alone, plain) = runs["retro"], runs["plain"]
    assert beside.asked == alone.asked and beside.loss != alone.loss
    began = retro.spec.build(seed=0).state_dict()
    for name, weight in plain.state_dict().items():
        moved = (not torch.equal(weight, began[name]), not torch.equal(retro.state_dict()[name], began[name]))
        assert moved == (".retrieval." not in name, True), name
    # What was held out is read as by hand, a row at a time.
    held, database = open_prepared("held"), open_database("index")
    task = Retrieving(CausalLM(packed=True), lambda text: open_neighbours("near-held", database, text), 5)
    examples, nats, asked = task.examples(held, 15), 0.0, 0
    for i in range(len(examples)):
        batch = task.collate([examples.example(i, random_of(i))])
        with torch.inference_mode():
            scores = retro(**batch.inputs).logits[0].log_softmax(-1)
        labels = batch.labels["next_token"][0]
        kept = labels != IGNORE
        nats -= float(scores[kept].gather(1, labels[kept, None]).sum())
        asked += int(kept.sum())
    assert (beside.asked, beside.loss) == (asked, pytest.approx(nats / asked, rel=1e-5))


def test_neighbours_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What does not fit is said before anything is trained, in a dry run too."""
    monkeypatch.chdir(tmp_path)
    start = retrieving(tmp_path)
    one = "held: its neighbours are not in near; find them with: lamina index neighbours index held"
    for rest, why in (
        ("neighbours: [near]}", one),
        ("neighbours: [none, near-held]}", "none: no neighbours.json, so there are no neighbours here"),
        ("neighbours: []}", "neighbours is empty; name a directory"),
        ("neighbours: [near, near-held], objective: {z_loss: 1e-4}}", "objective.packed must be true"),
    ):
        with pytest.raises(LaminaError, match=why):
            plan(decode(TrainSpec, parse(start + rest, "run.yaml")))
    whole = start + "neighbours: [near, near-held]}"
    with pytest.raises(LaminaError, match="length=16 must be a multiple of the chunk of 5"):
        plan(decode(TrainSpec, parse(whole.replace("length: 15", "length: 16"), "run.yaml")))
    for name, why in (
        ("six", "reads chunks of 6 tokens; these neighbours are of chunks of 5"),
        ("llama", "that retrieve"),
    ):
        found = spec(LLAMA) if name == "llama" else lamina.spec(made.reader_at(tmp_path / name, chunk=6))
        (tmp_path / "spec.json").write_text(found.to_json())
        with pytest.raises(UnsupportedError, match=why):
            plan(decode(TrainSpec, parse(whole, "run.yaml")))


def test_a_kind_that_is_none(tmp_path: Path):
    text = (
        "model: {size: gpt2/small}\ndata: {train: a, length: 3}\nloop: {steps: 1, batch: 1}\nobjective: {kind: mask}\n"
    )
    with pytest.raises(LaminaError, match=r"run.yaml:4: unknown kind of objective 'mask'; did you mean 'masked'"):
        decode(TrainSpec, parse(text, "run.yaml"))


def test_a_model_that_does_not_fit_and_a_teacher_of_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    of(tmp_path / "data", "text", t5())
    (tmp_path / "spec.json").write_text(spec(GPT).to_json())
    start = "model: {spec: spec.json}\ndata: {train: data, length: 24}\nloop: {steps: 2, batch: 2}\nobjective: "
    with pytest.raises(UnsupportedError, match="span corruption needs an encoder that reads ids and a decoder"):
        train(decode(TrainSpec, parse(start + "{kind: span_corruption}", "a")), tmp_path / "run")
    lamina.save(spec(GPT).build(seed=1), tmp_path / "teacher")
    t5(99).save(tmp_path / "teacher")
    with pytest.raises(LaminaError, match="prepared with another tokenizer"):
        train(decode(TrainSpec, parse(start + "{kind: distillation, teacher: teacher}", "a")), tmp_path / "run")
