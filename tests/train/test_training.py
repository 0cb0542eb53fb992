"""Whole runs: a configuration and prepared text in, a model and everything that is known of the run out."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.cli import main
from lamina.data import SourceFile, Writer
from lamina.document import decode, parse
from lamina.errors import LaminaError, TrainingError
from lamina.train.loop import Trainer
from lamina.train.specs import TrainSpec
from lamina.train.training import train
from tests import tiny
from tests.forked import Program

TEXT = (Path(__file__).parent.parent.parent / "LICENSE").read_text()  # a text that nobody edits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The licence as two prepared directories, of several documents each."""
    folder = tmp_path_factory.mktemp("data")
    words = tiny.tokenizer()
    parts = [part for part in TEXT.split("\n\n") if part.strip()]
    for name, texts in (("train", parts[:-5]), ("validation", parts[-5:])):
        writer = Writer(folder / name, vocabulary=words.vocabulary, tokenizer=words.hash)
        for text in texts:
            writer.add({"text": np.array(words.encode(text))})
        size = sum(len(text.encode()) for text in texts)
        source = SourceFile(name="LICENSE", bytes=size, sha256="0" * 64, documents=len(texts), tokens=1)
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
    from lamina.data import open_prepared

    column = open_prepared(data / "validation").column("text")
    text = lamina.tokenizer(data / "validation").decode(column.slice(0, column.tokens).tolist())
    bits = held[-1]["validation"]["loss"] * column.tokens / np.log(2) / len(text.encode())
    assert held[-1]["validation"]["bits_per_byte"] == pytest.approx(bits)
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


def killed(file: Path, run: Path, backward: int) -> subprocess.CompletedProcess[str]:
    """`lamina train`, killed with kill -9 before the backward of this number."""
    return Program(_killed, ["train", str(file), "-o", str(run), "-q"], backward).end()


def _killed(words: list[str], backward: int) -> int:
    made, count = Trainer._loss, itertools.count(1)

    def loss(*given: Any) -> torch.Tensor:
        if next(count) == backward:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*given)

    Trainer._loss = loss
    return main(words)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, data: Path, precision: str):
    """A run that is killed between checkpoints, with kill -9, mid-step; then --resume auto."""
    more = {"loop": {"steps": 12, "batch": 4, "micro": 1, "precision": precision, "average": 0.9}}
    train(spec_of(config(data, **more)), tmp_path / "whole")
    file = tmp_path / "config.yaml"
    file.write_text(config(data, **more))
    done = killed(file, tmp_path / "killed", 4 * 9 + 3)
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


LORA = {"rank": 3, "dropout": 0.3, "targets": ["q_proj", "v", "feedforward.op.up"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A model to adapt, barely trained."""
    found = train(spec_of(config(data, loop={"steps": 2})), tmp_path_factory.mktemp("base") / "run")
    assert found.model is not None
    return found.model


def adapting(data: Path, base: Path, **more: Any) -> str:
    fields = {"adapter": LORA, "optimiser": {"kind": "adamw", "rate": 3e-2}}
    return config(data, model={"source": str(base), "family": None, "config": {}}, **fields | more)


def test_an_adapter_is_trained_and_merged(tmp_path: Path, data: Path, base: Path):
    run, before = tmp_path / "run", (base / "model.safetensors").read_bytes()
    result = train(spec_of(adapting(data, base)), run)
    assert result.model == run / "model"
    held = [one["validation"]["loss"] for one in records(base.parent) if "validation" in one][-1]
    assert result.validation is not None and result.validation.loss < held - 0.02
    assert (base / "model.safetensors").read_bytes() == before
    saved = run / "checkpoints/step-12"
    assert {path.name for path in saved.iterdir()} == {
        "adapter.safetensors", "optimiser.safetensors", "state.json", "config.yaml", "manifest.json",
    }  # fmt: skip
    parts = ("attention.op.q", "attention.op.v", "feedforward.op.up")
    kept = load_file(saved / "adapter.safetensors")
    assert set(kept) == {
        f"decoder.layers.{i}.{part}.lora_{factor}" for i in range(2) for part in parts for factor in "ab"
    }
    assert all(bool(kept[name].any()) for name in kept)
    plain, merged = lamina.load(base), lamina.load(run / "model")
    for (name, weight), other in zip(plain.named_parameters(), merged.named_parameters(), strict=True):
        changed = any(f"{part}.weight" in name for part in parts)
        path = name.removesuffix(".weight")
        wanted = weight + 16 / 3 * (kept[f"{path}.lora_b"] @ kept[f"{path}.lora_a"]) if changed else weight
        assert torch.equal(wanted, other[1]), name
    for (name, weight), other in zip(
        lamina.load(base, adapter=run / "adapter").named_parameters(), merged.parameters(), strict=True
    ):
        assert torch.equal(weight, other), name
    apart = train(spec_of(adapting(data, base, adapter=LORA | {"merge": False}, loop={"steps": 2})), tmp_path / "apart")
    assert apart.model == tmp_path / "apart/adapter" and not (tmp_path / "apart/model").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_adapter_goes_on_to_the_same_bits(tmp_path: Path, data: Path, base: Path, precision: str):
    """Dropout of the adapter, accumulation and a moving average too; the base is read anew from its source."""
    loop = {"steps": 10, "batch": 4, "micro": 1, "precision": precision, "average": 0.9}
    text = adapting(data, base, loop=loop)
    train(spec_of(text), tmp_path / "whole")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = killed(file, tmp_path / "killed", 4 * 6 + 3)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert losses(tmp_path / "killed")[-1][0] == 6  # and the newest checkpoint is of step 4
    result = train(spec_of(text), tmp_path / "killed", resume="auto")
    assert result.step == 10
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    names = ["checkpoints/step-10/" + one for one in ("adapter", "optimiser", "average")]
    for name in (*names, "model/model", "adapter/adapter_model"):
        one, other = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_an_adapter_does_not_go_on_over_another_base(tmp_path: Path, data: Path, base: Path):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    train(spec_of(adapting(data, source, loop={"steps": 4})), tmp_path / "run")
    again = spec_of(adapting(data, source, loop={"steps": 4}))
    assert train(again, tmp_path / "run", resume="auto").step == 4
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LaminaError, match=r"base: its weights differ from those that the adapter of .*step-4 was"):
        train(again, tmp_path / "run", resume="auto")
    rank = spec_of(adapting(data, source, loop={"steps": 4}, adapter=LORA | {"rank": 4}))
    with pytest.raises(LaminaError, match=r"adapter.rank: 3 -> 4"):
        train(rank, tmp_path / "run", resume="auto")


def test_an_adapter_and_freezing(tmp_path: Path, data: Path, base: Path):
    more = {"source": str(base), "family": None, "config": {}, "train": ["decoder.layers.1"]}
    text = config(data, model=more, adapter={"rank": 2}, loop={"steps": 2})
    train(spec_of(text), tmp_path / "run")
    kept = load_file(tmp_path / "run/checkpoints/step-2/adapter.safetensors")
    assert all(bool(one.any()) == ("layers.1" in name) for name, one in kept.items() if name.endswith("lora_b"))
    more["train"] = ["embedding"]
    with pytest.raises(LaminaError, match="every weight is frozen"):
        train(spec_of(config(data, model=more, adapter={"rank": 2})), tmp_path / "none")
    with pytest.raises(LaminaError, match="unknown target of an adapter 'q_prj'; did you mean 'q_proj'"):
        train(spec_of(adapting(data, base, adapter={"targets": ["q_prj"]})), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_dry_run_counts_what_an_adapter_trains(data: Path, base: Path):
    from lamina.train.building import plan

    found = plan(spec_of(adapting(data, base)))
    model = lamina.load(base)
    count = sum(weight.numel() for weight in model.parameters())
    rows = 3 * ((16 + 16) + (16 + 8) + (16 + 24))  # rank times in + out: q, v of two key heads of 4, up
    assert found["trained"] == 2 * rows and found["parameters"] == count + 2 * rows
    whole = plan(spec_of(config(data, model={"source": str(base), "family": None, "config": {}})))
    assert found["flops"] < 0.75 * whole["flops"] and found["bytes"] < whole["bytes"] / 2


def test_a_dry_run_counts_what_is_frozen_and_what_teaches(data: Path, base: Path):
    """Of the last of two layers alone: forward, its own gradients, and those that the head passes on."""
    from lamina.train.building import plan

    model = {"source": str(base), "family": None, "config": {}}
    whole, last = (
        plan(spec_of(config(data, model=model | more)))["flops"] for more in ({}, {"train": ["decoder.layers.1"]})
    )
    forward = lamina.account(base, context=24).flops_prefill / 24
    tokens = plan(spec_of(config(data, model=model)))["tokens"]
    assert tokens * forward < last < 0.7 * whole
    objective = {"kind": "distillation", "teacher": str(base)}
    assert plan(spec_of(config(data, model=model, objective=objective)))["flops"] == whole + tokens * int(forward)


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
    program = Program(main, ["train", str(file), "-o", str(run), "--json"])
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 3:
        assert time.monotonic() < end and program.process.is_alive(), program.end()
        time.sleep(0.05)
    program.signal(number)
    done = program.end()
    assert done.returncode == status, done.stderr
    found = json.loads(done.stdout)
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


PAIR = {
    "family": "t5",
    "config": {"num_layers": 1, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "pad_token_id": 256},
}


def test_prompts_of_an_encoder_decoder_are_answered(tmp_path: Path, data: Path):
    more = {"objective": {"kind": "prefix", "pair": True}, "loop": {"steps": 2}, "log": {"every": 1}}
    prompts = ["The house", "A cat and"]
    fields = json.loads(config(data, evaluation={"prompts": prompts, "tokens": 5}, **more)) | {"model": PAIR}
    train(spec_of(json.dumps(fields)), tmp_path / "run")
    model, words = lamina.load(tmp_path / "run/model"), lamina.tokenizer(tmp_path / "run/model")
    for prompt, name in zip(prompts, ("step-2.txt", "step-2-2.txt"), strict=True):
        ids = torch.tensor([words.encode(prompt)])
        answer = lamina.generate(model, ids, max_new_tokens=5, temperature=0.8, seed=0)
        assert answer[0, 0] == 256 and 2 <= answer.shape[1] <= 6
        expected = f"{prompt} -> {words.decode(answer[0].tolist())}"
        assert (tmp_path / "run/samples" / name).read_text() == expected
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    bert = {"family": "bert", "config": {"architectures": ["BertForMaskedLM"], **small}}
    more = {"model": bert, "objective": {"kind": "masked"}}
    with pytest.raises(LaminaError, match=r"evaluation\.prompts are for models that read ids and write a text"):
        train(spec_of(json.dumps(fields | more)), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    "size, special, role",
    [
        ("t5/small", "t5", "pad"),
        ("switch/base-8", "t5", "pad"),
        ("bart/base", "bart", "eos"),
        ("m2m100/418m", "bart", "eos"),
        ("bigbird-pegasus/large", "bart", "bos"),
    ],
)
def test_special_tokens_are_those_of_the_data(tmp_path: Path, size: str, special: str, role: str):
    """Ids that no published model has. What the decoder begins with is, to transformers, the token of this role."""
    from transformers import AutoConfig

    from lamina.data import open_prepared
    from lamina.data.prepare import prepare
    from lamina.data.sources import find
    from lamina.data.wishes import PrepareSpec
    from lamina.families import sizes
    from lamina.train.building import spec_of as described
    from lamina.train.specs import ModelChoice

    theirs = AutoConfig.for_model(sizes()[size])
    start = getattr(theirs, "decoder_start_token_id", theirs.pad_token_id)  # T5's class says none: it is its padding
    assert start == getattr(theirs, f"{role}_token_id")
    (tmp_path / "text.txt").write_text(TEXT)
    prepare(find([str(tmp_path / "text.txt")]), tmp_path / "data", "characters", PrepareSpec(), special=special)
    prepared = open_prepared(tmp_path / "data")
    words = prepared.tokenizer()
    assert words.pad is not None and words.pad > 2 and words.eos is not None
    made = described(ModelChoice(size=size), prepared)
    assert made is not None
    assert made.special.decoder_start == getattr(words, role)
    assert made.special.pad == words.pad and made.special.end == (words.eos,)
    own = described(ModelChoice(size=size, config={"decoder_start_token_id": 1, "eos_token_id": [5, 6]}), prepared)
    assert own is not None and own.special.decoder_start == 1 and own.special.end == (5, 6)


@pytest.mark.parametrize("size", ["gpt2/small", "palm/8b", "glam/64b-64e", "retro/172m"])
def test_a_size_has_the_vocabulary_of_the_data(data: Path, size: str):
    from lamina.data import open_prepared
    from lamina.train.building import spec_of as described
    from lamina.train.specs import ModelChoice

    prepared = open_prepared(data / "train")
    found = described(ModelChoice(size=size), prepared)
    assert found is not None and found.embedding.vocabulary == prepared.vocabulary
    encoder = found.retrieval.encoder if found.retrieval is not None else None
    assert encoder is None or encoder.embedding.vocabulary == prepared.vocabulary


def test_ids_of_a_published_size_are_not_those_of_the_data(data: Path):
    """SmolLM2's file ends texts with 2."""
    from lamina.data import open_prepared
    from lamina.train.building import spec_of as described
    from lamina.train.specs import ModelChoice

    prepared = open_prepared(data / "train")
    made = described(ModelChoice(size="smollm2/135m"), prepared)
    end = prepared.tokenizer().eos
    assert made is not None and end != 2 and made.special.end == (() if end is None else (end,))
    assert made.embedding.vocabulary == prepared.vocabulary


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
