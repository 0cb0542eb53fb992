"""lamina runs: list, show and compare, of whole, running, killed and damaged runs."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lamina
from lamina.train.checkpoint import Content, save
from lamina.train.run import Run
from tests import tiny
from tests.pages import assert_complete
from tests.test_startup import imported_by


def run_of(directory: Path, losses: list[float], config: str = "seed: 1\n") -> Run:
    run = Run(directory, config, command=["lamina", "train", "a.yaml"])
    for step, loss in enumerate(losses, 1):
        run.record({"step": step, "tokens": 512 * step, "loss": loss, "tokens_per_second": 2000.0, "seconds": 1.5})
        run.record({"step": step, "validation": {"loss": loss + 1}})
    return run


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    run_of(tmp_path / "shelf/a", [3.0, 2.0, 2.5]).close()
    b = run_of(tmp_path / "shelf/b", [4.0, math.nan], "seed: 2\nmodel: {width: 8}\nend: .inf\nday: 2026-01-01\n")
    b.warn("a loss that is odd")
    b.sample(2, "one\x1b[31m\ntwo")
    b.close()
    (b.checkpoints / "step-2").mkdir(parents=True)
    return tmp_path / "shelf"


def test_list(lam, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shelf.parent)
    done = lam("runs", "list", "shelf")
    assert done.status == 0 and done.err == ""
    header, a, b = done.out.splitlines()
    assert "validation loss" in header
    assert a.split() == ["shelf/a", "3", "1.54", "k", "2.5000", "3.5000", "2.00", "k", "-"]
    assert b.split() == ["shelf/b", "2", "1.02", "k", "nan", "nan", "2.00", "k", "step-2"]
    found = lam("runs", "list", shelf / "b", shelf / "a", "--json").document["runs"]
    assert [each["name"] for each in found] == ["b", "a"]
    assert found[1]["best_validation_loss"] == 3.0 and found[1]["best_step"] == 2 and found[1]["running"] is None
    assert found[0]["loss"] == "nan" and found[0]["best_step"] == 1 and found[0]["checkpoints"] == [2]
    assert len(found[0]["warnings"]) == 1 and found[0]["warnings"][0].endswith("warning: a loss that is odd")
    monkeypatch.chdir(shelf)
    assert len(lam("runs", "list", "--json").document["runs"]) == 2
    with Run(shelf / "a", "", resume=True):
        assert "running" in lam("runs", "list", shelf).out
        assert "process" in lam("runs", "list", shelf, "--json").document["runs"][0]["running"]
    monkeypatch.chdir(shelf.parent)
    assert lam("runs", "list").out == "no runs here\n"


def test_the_best_loss_is_a_finite_one(lam, tmp_path: Path):
    run_of(tmp_path / "a", [math.nan, 4.0, 3.0, 3.5]).close()
    found = lam("runs", "show", tmp_path / "a", "--json").document
    assert (found["best_validation_loss"], found["best_step"]) == (4.0, 3)


def test_half_written_and_damaged_runs_are_read(lam, shelf: Path):
    with open(shelf / "a/metrics.jsonl", "ab") as file:
        file.write(b'\x00\xff\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    (shelf / "a/env.json").write_text("{")
    (shelf / "a/config.yaml").unlink()
    done = lam("runs", "show", shelf / "a")
    assert done.status == 0 and "damaged lines" in done.out
    found = lam("runs", "show", shelf / "a", "--json").document
    assert found["steps"] == 4 and found["loss"] == 1.0 and found["damaged_lines"] == 2
    assert lam("runs", "compare", shelf).status == 0


def test_a_configuration_that_says_more_than_it_holds_is_left_out(lam, shelf: Path):
    """Five lines of references for 9^5 words; seven more of them would not end."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcde"))
    (shelf / "a/config.yaml").write_text(bomb)
    found = lam("runs", "compare", shelf, "--json").document
    assert found["differences"]["seed"] == [None, 2] and not found["differences"].keys() & set("abcde")


def test_show(lam, shelf: Path, tmp_path: Path):
    done = lam("runs", "show", shelf / "b", "-o", tmp_path / "b.html")
    assert done.status == 0
    for words in ("lamina train a.yaml", "warning: a loss that is odd", "one", "  two", str(tmp_path / "b.html")):
        assert words in done.out
    assert_complete((tmp_path / "b.html").read_text())
    found = lam("runs", "show", shelf / "b", "--json").document
    assert found["environment"]["command"] == ["lamina", "train", "a.yaml"] and len(found["events"]) == 2


def test_compare(lam, shelf: Path, tmp_path: Path):
    done = lam("runs", "compare", shelf / "a", shelf / "b", "-o", tmp_path / "both.html")
    assert done.status == 0 and "model.width" in done.out and "best validation loss" in done.out
    text = (tmp_path / "both.html").read_text()
    assert_complete(text)
    assert "b, validation" in text
    found = lam("runs", "compare", shelf, "--json").document
    assert found["differences"] == {
        "seed": [1, 2], "model.width": [None, 8], "end": [None, "inf"], "day": [None, "2026-01-01"]
    }  # fmt: skip
    assert [each["name"] for each in found["runs"]] == ["a", "b"]


def test_mistakes(lam, shelf: Path, tmp_path: Path):
    lam("runs", "show", shelf).refused("show is for one run, and there are 2: a, b")
    lam("runs", "compare", shelf / "a").refused("compare is for two runs or more, and there is one: a")
    lam("runs", "show", tmp_path / "none").refused("none: no such directory")
    lam("runs", "show", tmp_path).refused("no runs in")
    lam("runs", "list", shelf, "-o", "x.html").refused("list writes no report")
    lam("runs", "lst").refused("lst")
    (tmp_path / "dir").mkdir()
    assert lam("runs", "show", shelf / "a", "-o", tmp_path / "a" / "b.html").status == 0


def test_a_checkpoint_is_a_source_and_verify_finds_one_flipped_bit(lam, tmp_path: Path):
    model = tiny.model(tiny.LLAMA)
    content = Content(
        {"model": dict(model.named_parameters())},
        {"optimiser": torch.optim.AdamW(model.parameters()).state_dict()},
        {"step": 5},
        {"spec.json": model.spec.to_json().encode()},
    )
    path = save(tmp_path, 5, content)
    loaded = lamina.load(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert lam("verify", path).status == 0
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 16
    (path / "model.safetensors").write_bytes(data)
    lam("verify", path).refused("model.safetensors: its sha256 is", "manifest.json says", "it was damaged")


def test_looking_at_runs_imports_no_torch(shelf: Path):
    for words in (["list", str(shelf)], ["compare", str(shelf), "--json"]):
        program = f"from lamina.cli import main\nassert main({['runs', *words]!r}) == 0"
        assert imported_by(program) <= {"yaml"}


def test_json_is_one_document(lam, shelf: Path):
    assert json.loads(lam("runs", "compare", shelf, "--json").out)["schema"] == "lamina/RESULT/1"
