"""Whole runs: a configuration and prepared text in, a model and everything that is known of the run out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lamina
from lamina.data import SourceFile, Writer
from lamina.errors import LaminaError, TrainingError
from lamina.train.document import decode, parse
from lamina.train.specs import TrainSpec
from lamina.train.training import train
from tests import tiny

TEXT = (Path(__file__).parent.parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README as two prepared directories, of several documents each."""
    folder = tmp_path_factory.mktemp("data")
    words = tiny.tokenizer()
    parts = [part for part in TEXT.split("\n\n") if part.strip()]
    for name, texts in (("train", parts[:-5]), ("validation", parts[-5:])):
        writer = Writer(folder / name, vocabulary=words.vocabulary, tokenizer=words.hash)
        for text in texts:
            writer.add({"text": np.array(words.encode(text))})
        size = sum(len(text.encode()) for text in texts)
        source = SourceFile(name="README.md", bytes=size, sha256="0" * 64, documents=len(texts), tokens=1)
        writer.close(sources=[source])
        words.save(folder / name)
    return folder


def config(data: Path, **more: Any) -> str:
    fields: dict[str, Any] = {
        "model": {
            "family": "llama",
            "config": {
                "num_hidden_layers": 2,
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 24,
                "max_position_embeddings": 32,
                "rms_norm_eps": 1e-6,
            },
        },
        "data": {"train": str(data / "train"), "validation": str(data / "validation"), "length": 24},
        "loop": {"steps": 12, "batch": 4, "micro": 2},
        "optimiser": {"kind": "adamw", "rate": 1e-2},
        "evaluation": {"every": 5, "rows": 6},
        "checkpoints": {"every": 4},
        "log": {"every": 1},
    }
    for name, value in more.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return json.dumps(fields)


def spec_of(text: str) -> TrainSpec:
    return decode(TrainSpec, parse(text, "config.yaml"))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in records(run) if "loss" in one]


def test_a_run_and_what_it_leaves(tmp_path: Path, data: Path):
    run = tmp_path / "run"
    said: list[Any] = []
    spec = spec_of(config(data, evaluation={"prompts": ["The"], "tokens": 5}))
    result = train(spec, run, command=["lamina", "train"], show=said.append)
    assert result.step == 12 and result.status == 0 and result.model is not None
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "env.json", "metrics.jsonl", "events.log", "checkpoints", "samples", "report.html", "model",
    }  # fmt: skip
    assert [step for step, _ in losses(run)] == list(range(1, 13))
    assert losses(run)[-1][1] < losses(run)[0][1] - 0.5
    held = [one for one in records(run) if "validation" in one]
    assert [one["step"] for one in held] == [5, 10, 12]
    assert result.validation is not None and held[-1]["validation"]["loss"] == result.validation.loss
    assert 0 < held[-1]["validation"]["bits_per_byte"] < 20
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-12", "step-8"]
    assert decode(TrainSpec, parse((run / "config.yaml").read_text(), "c")) == spec
    page = (run / "report.html").read_text()
    assert "validation loss" in page.lower() and "<script" not in page

    model = lamina.load(run / "model")
    words = lamina.tokenizer(run / "model")
    rows = lamina.load(run / "checkpoints" / "step-12")
    for (name, weight), other in zip(model.named_parameters(), rows.parameters(), strict=True):
        assert torch.equal(weight, other), name
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    ids = torch.tensor([words.encode("The house")])
    out = model(ids).logits
    assert out is not None
    torch.testing.assert_close(out, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, data: Path, precision: str):
    """A run that is killed between checkpoints, with kill -9, mid-step; then --resume auto."""
    more = {"loop": {"steps": 12, "batch": 4, "micro": 1, "precision": precision, "average": 0.9}}
    train(spec_of(config(data, **more)), tmp_path / "whole")
    file = tmp_path / "config.yaml"
    file.write_text(config(data, **more))
    code = (
        "import sys, os, signal, lamina.train.loop as loop; from lamina.cli import main;"
        " made = loop.Trainer._backward; count = [0]\n"
        "def killed(*given):\n    count[0] += 1\n"
        "    if count[0] == 4 * 9 + 3: os.kill(os.getpid(), signal.SIGKILL)\n    made(*given)\n"
        "loop.Trainer._backward = killed\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", str(file), "-o", str(tmp_path / "killed"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert losses(tmp_path / "killed")[-1][0] == 9  # and the newest checkpoint is of step 8
    result = train(spec_of(config(data, **more)), tmp_path / "killed", resume="auto")
    assert result.step == 12
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("model", "optimiser", "average"):
        one, other = (
            load_file(tmp_path / run / "checkpoints/step-12" / f"{name}.safetensors") for run in ("whole", "killed")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    held = [[r for r in records(tmp_path / run) if "validation" in r] for run in ("whole", "killed")]
    assert held[0] == held[1]


def test_going_on_with_other_settings_is_refused_with_the_difference(tmp_path: Path, data: Path):
    run = tmp_path / "run"
    train(spec_of(config(data, loop={"steps": 4})), run)
    for more, message in (
        ({"loop": {"steps": 4}, "optimiser": {"rate": 2e-2}}, "optimiser.rate: 0.01 -> 0.02"),
        ({"loop": {"steps": 8}}, "loop.steps: 4 -> 8"),
        ({"loop": {"steps": 4}, "seed": 3}, "seed: 0 -> 3"),
    ):
        with pytest.raises(LaminaError, match=message):
            train(spec_of(config(data, **more)), run, resume="auto")
    with pytest.raises(LaminaError, match="holds a run already; go on with it"):
        train(spec_of(config(data, loop={"steps": 4})), run)
    again = train(spec_of(config(data, loop={"steps": 4, "micro": 1}, log={"every": 2})), run, resume="auto")
    assert again.step == 4 and again.loss is None


def test_the_newest_checkpoint_is_damaged(tmp_path: Path, data: Path):
    run = tmp_path / "run"
    train(spec_of(config(data, loop={"steps": 8})), run)
    whole = losses(run)
    (run / "checkpoints/step-8/model.safetensors").write_bytes(b"nothing")
    said: list[Any] = []
    result = train(spec_of(config(data, loop={"steps": 8})), run, resume="auto", show=said.append)
    assert any("step-8 is skipped" in one for one in said if isinstance(one, str))
    assert result.step == 8 and losses(run) == whole


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path: Path, data: Path, number: int, status: int):
    file = tmp_path / "config.yaml"
    file.write_text(config(data, loop={"steps": 100_000}, checkpoints={"every": 0}, evaluation={"every": 0}))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lamina", "train", str(file), "-o", str(run), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 3:
        assert time.monotonic() < end and process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    found = json.loads(out)
    assert found["model"] is None and found["step"] >= 3
    assert (run / "checkpoints" / f"step-{found['step']}" / "manifest.json").is_file()
    assert (run / "report.html").is_file()


def test_another_process_trains_there(tmp_path: Path, data: Path):
    from lamina.train.run import Run

    with Run(tmp_path / "run", "model: x\n"):
        with pytest.raises(LaminaError, match=rf"another process trains here \(process {os.getpid()} on "):
            train(spec_of(config(data)), tmp_path / "run", resume="auto")


def test_a_loss_that_is_never_finite_ends_the_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    from lamina.layers.norm import RMSNorm

    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: forward(self, x) * (float("nan") if self.training else 1.0))
    with pytest.raises(TrainingError, match=r"step 4 is skipped: loss nan, .* max_skips allows 3"):
        train(spec_of(config(data)), tmp_path / "run")
    found = json.loads((tmp_path / "run/nonfinite/step-1.json").read_text())
    assert found["part"] == "decoder.layers.0.attention.pre"


def test_training_goes_on_from_a_checkpoint_of_a_model(tmp_path: Path, data: Path):
    first = train(spec_of(config(data)), tmp_path / "first")
    before = (tmp_path / "first/model/model.safetensors").read_bytes()
    more = {
        "model": {"source": str(first.model), "freeze": ["embedding"], "family": None, "config": {}},
        "loop": {"steps": 3},
    }
    second = train(spec_of(config(data, **more)), tmp_path / "second")
    assert second.loss is not None and first.loss is not None and second.loss < 1.2 * first.loss
    assert (tmp_path / "first/model/model.safetensors").read_bytes() == before
    one, other = (load_file(tmp_path / run / "model/model.safetensors") for run in ("first", "second"))
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert "model.embed_tokens.weight" not in moved and "model.layers.0.self_attn.q_proj.weight" in moved


@pytest.mark.parametrize(
    "more, message",
    [
        ({"data": {"length": 40}}, "data.length is 40; this model reads at most 32 tokens"),
        ({"data": {"train": "/nowhere"}}, "/nowhere"),
        ({"model": {"freeze": ["encoder"]}}, "unknown path to freeze 'encoder'"),
        ({"loop": {"batch": 5}}, r"batch=5 examples cannot be shared out evenly: 1 ranks x micro-batches of 2 = 2"),
        (
            {"model": {"config": {"vocab_size": 7}}},
            "the data has .* tokens and the model an embedding of 7",
        ),
        ({"model": {"family": "lama"}}, "model.family: unknown model_type 'lama'; did you mean 'llama'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, data: Path, more: dict[str, Any], message: str
):
    fields = json.loads(config(data))
    for name, value in more.items():
        if "config" in value:
            value = {**value, "config": {**fields[name]["config"], **value["config"]}}
        fields[name] = {**fields[name], **value}
    with pytest.raises(LaminaError, match=message):
        train(spec_of(json.dumps(fields)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(tmp_path: Path, data: Path):
    from click.testing import CliRunner

    from lamina.cli.program import program

    file = tmp_path / "config.yaml"
    file.write_text(config(data))
    runner = CliRunner()
    dry = runner.invoke(program, ["train", str(file), "--dry-run", "--json", "loop.steps=5"])
    assert dry.exit_code == 0, dry.output
    planned = json.loads(dry.stdout)
    assert planned["steps"] == 5 and planned["config"]["loop"]["steps"] == 5
    assert planned["tokens"] == 5 * 4 * 24
    built = lamina.ModelSpec.build  # the same count by another way
    assert planned["parameters"] == sum(p.numel() for p in built(_model_spec(data), device="meta").parameters())
    done = runner.invoke(program, ["train", str(file), "-o", str(tmp_path / "run"), "loop.steps=3"])
    assert done.exit_code == 0, done.output
    assert "step 3, " in done.stdout and "model: " in done.stdout and "step 1/3 · loss " in done.stderr
    assert not (tmp_path / "dry").exists()


def _model_spec(data: Path) -> lamina.ModelSpec:
    from lamina.data import open_prepared
    from lamina.train.building import spec_of as described

    found = described(spec_of(config(data)).model, open_prepared(data / "train"))
    assert found is not None
    return found
