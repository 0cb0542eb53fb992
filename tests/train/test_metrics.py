"""Adapters of metrics: what they are given, and that none can stop, slow or spoil a run."""

from __future__ import annotations

import math
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import LaminaError
from lamina.train import metrics
from lamina.train.metrics import Behind, Metrics, figures

RECORD = {"step": 3, "loss": 2.5, "parts": {"router": 0.1}, "seconds": 4, "sample": "text", "flag": True, "more": None}


class Kept:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_figures_are_the_numbers_by_their_paths():
    assert dict(figures(RECORD)) == {"loss": 2.5, "parts/router": 0.1, "seconds": 4.0}
    assert dict(figures({"step": 1, "validation": {"loss": 2, "bits_per_byte": math.inf}})) == {
        "validation/loss": 2.0, "validation/bits_per_byte": math.inf
    }  # fmt: skip


def test_all_arrive_in_order():
    kept, said = Kept(), []
    behind = Behind("kept", lambda: kept, said.append)
    for step in range(300):
        behind.send({"step": step})
    behind.close()
    assert [record["step"] for record in kept.records] == list(range(300)) and kept.closed and said == []


class Raises(Kept):
    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        if record["step"] >= 2:
            raise OSError("database is locked\nby somebody")


class Exits(Kept):
    def write(self, record: Mapping[str, Any]) -> None:
        sys.exit(3)


class Ends(Kept):
    def close(self) -> None:
        raise ConnectionError("no network")


@pytest.mark.parametrize("kind, why", [(Raises, "OSError: database is locked"), (Exits, "SystemExit: 3"),
                                       (Ends, "ConnectionError: no network")])  # fmt: skip
def test_one_that_fails_is_said_once_and_left_alone(kind: type[Kept], why: str):
    adapter, said, own = kind(), [], []
    with Metrics(own.append, warn=said.append) as all_of_them:
        all_of_them.behind = (Behind("it", lambda: adapter, said.append),)
        for step in range(50):
            all_of_them.record({"step": step})
            if step == 10:
                time.sleep(0.2)
    assert len(own) == 50
    assert said == [f"it: {why}; the run goes on without it, and metrics.jsonl has all"]
    assert kind is not Raises or len(adapter.records) == 3


def test_one_that_cannot_be_made_is_said_once():
    said: list[str] = []

    def make() -> Kept:
        raise ModuleNotFoundError("No module named 'wandb'")

    behind = Behind("wandb", make, said.append)
    behind.close()
    behind.send({"step": 1})
    behind.close()
    assert len(said) == 1 and "No module named 'wandb'" in said[0]


def test_one_that_hangs_takes_no_time_and_is_left_behind():
    let_go, said, own = threading.Event(), [], []

    class Hangs(Kept):
        def write(self, record: Mapping[str, Any]) -> None:
            let_go.wait(8)
            raise OSError("too late to be said")

    all_of_them = Metrics(own.append)
    all_of_them.behind = (Behind("it", Hangs, said.append, waiting=20),)
    begin = time.perf_counter()
    steps = ({"step": step} for step in range(2000))
    sender = threading.Thread(target=lambda: [all_of_them.record(each) for each in steps], daemon=True)
    sender.start()
    sender.join(5)  # what waits for room in the queue waits for ever
    sending = time.perf_counter() - begin
    all_of_them.close(patience=0.3)
    whole = time.perf_counter() - begin
    let_go.set()
    all_of_them.behind[0]._thread.join(10)
    assert len(own) == 2000 and sending < 1.0 and whole < 3.0
    assert len(said) == 1 and "records were not taken in time" in said[0]


def test_an_error_of_the_own_file_does_stop_the_run():
    def own(record: Mapping[str, Any]) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        Metrics(own).record({"step": 1})
    with pytest.raises(LaminaError, match="'tensorbord'.*tensorboard"):
        Metrics(own, ("tensorbord",))


def test_what_each_adapter_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Against stand-ins for the packages, with the calls that their documentation names."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> Any:
        return lambda *given, **named: calls.append((name, given, named))

    writer = types.SimpleNamespace(add_scalar=note("scalar"), add_text=note("text"), flush=note("flush"),
                                   close=note("close"))  # fmt: skip
    wandb_run = types.SimpleNamespace(log=note("log"), finish=note("finish"))
    modules = {
        "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=lambda path: calls.append(path) or writer),
        "trackio": types.SimpleNamespace(init=note("init"), log=note("log"), finish=note("finish")),
        "wandb": types.SimpleNamespace(init=lambda **named: calls.append(("init", (), named)) or wandb_run),
    }
    monkeypatch.setattr(metrics, "import_module", modules.__getitem__)
    run = tmp_path / "shelf" / "first"
    for name in ("tensorboard", "trackio", "wandb"):
        calls.clear()
        with Metrics(lambda record: None, (name,), run, {"steps": 5}, calls.append) as all_of_them:
            all_of_them.record(RECORD)
        if name == "tensorboard":
            assert calls[0] == str(run / "tensorboard") and ("scalar", ("loss", 2.5, 3), {}) in calls
            assert ("scalar", ("parts/router", 0.1, 3), {}) in calls and ("text", ("sample", "text", 3), {}) in calls
            assert calls[-1] == ("close", (), {})
        else:
            begin, log, end = calls
            assert begin[2]["project"] == "shelf" and begin[2]["name"] == "first" and begin[2]["config"] == {"steps": 5}
            assert log == ("log", ({"loss": 2.5, "parts/router": 0.1, "seconds": 4.0},), {"step": 3})
            assert end[0] == "finish"


def test_tensorboard_where_it_is_installed(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    with Metrics(lambda record: None, ("tensorboard",), tmp_path, {}, said.append) as all_of_them:
        all_of_them.record(RECORD)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert said == [] and events.Scalars("loss")[0].value == 2.5
