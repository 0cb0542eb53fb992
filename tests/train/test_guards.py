"""Guards: signals of real processes, steps that are not finite, spikes, a watchdog, too little memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lamina.cli.errors import status_of
from lamina.errors import LaminaError, TrainingError
from lamina.train.finite import Finite, first_bad
from lamina.train.fitting import Fit, fitting, out_of_memory
from lamina.train.guards import Signals, Spikes, Watchdog

LOOP = """
import sys, time
from lamina.train.guards import Signals
with Signals() as signals:
    print("ready", flush=True)
    for step in range(400):
        time.sleep(0.05)
        if signals.asked == "save":
            print("saved", flush=True)
            signals.done()
        if signals.asked == "stop":
            print("stopping", flush=True)
            time.sleep(float(sys.argv[1]))
            print("saved and left", flush=True)
            sys.exit(signals.status)
"""


def listening(saving: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(saving)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_a_second_one_does_not(number: signal.Signals, status: int):
    first, second = listening(0.05), listening(60)
    with first, second:
        first.send_signal(signal.SIGUSR1)
        assert first.stdout is not None and first.stdout.readline() == "saved\n"
        first.send_signal(number)
        assert first.communicate()[0] == "stopping\nsaved and left\n" and first.returncode == status
        second.send_signal(number)
        assert second.stdout is not None and second.stdout.readline() == "stopping\n"
        second.send_signal(number)
        assert second.communicate(timeout=10)[0] == ""
        # By the signal itself, or by KeyboardInterrupt, which Python turns into the signal too.
        assert second.returncode == -number


def test_signals_are_what_they_were_afterwards_and_elsewhere_nothing_is_asked():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Signals() as signals:
        assert signals.asked is None and signals.status == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == "save"
        os.kill(os.getpid(), signal.SIGTERM)
        signals.done()
        assert signals.asked == "stop" and signals.status == 143  # stopping is not undone by having saved
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == "stop"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    thread = threading.Thread(target=lambda: Signals().__enter__().__exit__())
    thread.start(), thread.join()
    assert signal.getsignal(signal.SIGTERM) == before[0]


class Split(nn.Module):
    """A part that makes what is not finite out of what is, for inputs above 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2.0 - x.clamp(max=3.0)).sqrt()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), Split()), nn.LayerNorm(4))


def test_the_first_bad_part_is_named(tmp_path: Path):
    model = network()
    good, bad = torch.ones(2, 3), torch.full((2, 3), 1.0)
    assert first_bad(model, lambda: model(good)) is None
    with torch.no_grad():
        model[0].bias += 1e3

    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    model[1][0] = Large()
    guard = Finite(2, tmp_path)
    assert guard.check(6, 2.0, 1.0, model, lambda: model(bad)) and guard.skipped == 0
    assert not guard.check(7, math.nan, 1.0, model, lambda: model(bad))
    said = json.loads((tmp_path / "nonfinite/step-7.json").read_text())
    assert said["part"] == "1.1" and said["kind"] == "Split" and said["input_finite"] is True
    assert said["nan"] == 8 and said["inf"] == 0 and said["shape"] == [2, 4] and said["loss"] == "nan"
    assert guard.said is not None and "the first part whose output is not finite is 1.1" in guard.said
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_weights_and_bad_gradients_are_told_apart(tmp_path: Path):
    model = network()
    guard = Finite(9, tmp_path)
    model[0].weight.grad = torch.full((4, 3), math.inf)
    assert not guard.check(1, 2.0, math.inf, model, lambda: model(torch.ones(2, 3)))
    said = json.loads((tmp_path / "nonfinite/step-1.json").read_text())
    assert said["gradient"] == "0.weight" and said["inf"] == 12 and said["gradient_norm"] == "inf"
    with torch.no_grad():
        model[2].weight[1] = math.nan
    assert not guard.check(2, math.nan, math.nan, model, lambda: model(torch.ones(2, 3)))
    said = json.loads((tmp_path / "nonfinite/step-2.json").read_text())
    assert said["parameter"] == "2.weight" and said["nan"] == 1
    assert not guard.check(3, math.nan, 1.0)  # without a model it counts all the same
    assert guard.skipped == 3


def test_skips_are_bounded(tmp_path: Path):
    guard = Finite(2, tmp_path)
    assert [guard.check(step, loss, 1.0) for step, loss in enumerate((1.0, math.inf, 1.0, math.nan, 1.0))] == [
        True, False, True, False, True
    ]  # fmt: skip
    with pytest.raises(TrainingError, match="step 5 is skipped: loss nan.*3th such step, and max_skips allows 2") as e:
        guard.check(5, math.nan, 1.0)
    assert (tmp_path / "nonfinite/step-5.json").exists()
    assert status_of(e.value, debug=False) == 1


def test_a_spike_is_said_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = (3.0 + 0.2 * torch.randn(500, generator=generator)).tolist()
    spikes = Spikes()
    assert [spikes.check(step, loss) for step, loss in enumerate(noise)].count(None) == 500
    assert spikes.check(500, math.nan) is None
    said = spikes.check(501, 9.0)
    assert said is not None and "step 501: the loss is 9" in said and spikes.count == 1
    constant = Spikes(window=4)
    assert all(constant.check(step, 1.0) is None for step in range(5))
    assert constant.check(5, 1.05) is None and constant.check(6, 1.2) is not None
    assert Spikes().check(0, 1e9) is None  # there is nothing to compare it with


def test_the_watchdog_shows_what_hangs(tmp_path: Path):
    def hanging_part_of_a_step() -> None:
        time.sleep(0.6)

    path = tmp_path / "events.log"
    with Watchdog(0.2, path) as dog:
        for _ in range(10):
            time.sleep(0.05)
            dog.beat()
        assert dog.fired == 0
        hanging_part_of_a_step()
        assert dog.fired >= 2
    said = path.read_text()
    assert "no step for 0." in said and "hanging_part_of_a_step" in said
    with pytest.raises(LaminaError, match="watchdog is 0"):
        Watchdog(0, path)


def test_the_watchdog_outlives_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with capfd.disabled(), open(tmp_path / "err", "w+") as file:
        before, sys.__stderr__ = sys.__stderr__, file
        try:
            with Watchdog(0.1, tmp_path / "gone" / "events.log"):
                time.sleep(0.35)
        finally:
            sys.__stderr__ = before
        file.seek(0)
        assert "test_the_watchdog_outlives_its_file" in file.read()


@pytest.mark.parametrize("fit, smaller", [((8, 1), (4, 2)), ((9, 2), (3, 6)), ((7, 1), (1, 7)), ((1, 8), None)])
def test_smaller_pieces_are_the_same_batch(fit: tuple[int, int], smaller: tuple[int, int] | None):
    found = Fit(*fit).smaller
    assert found == (None if smaller is None else Fit(*smaller))


def limited(most: int):
    """An attempt that really asks torch for more than there is, beyond `most` at a time."""
    tried: list[Fit] = []

    def attempt(fit: Fit) -> str:
        tried.append(fit)
        torch.empty(2**58 if fit.micro > most else 1, dtype=torch.uint8)
        return f"read {fit.micro}"

    return attempt, tried


def test_too_little_memory_is_said_with_what_fits():
    attempt, tried = limited(2)
    assert fitting(Fit(2, 3), attempt) == (Fit(2, 3), "read 2")
    with pytest.raises(TrainingError, match=r"micro-batches of 12 does not fit into memory \(weights 3 GiB\); the "
                       "largest that fits is 1: set micro_batch to 1, read 12 times"):  # fmt: skip
        fitting(Fit(12, 1), limited(1)[0], budget=lambda: "weights 3 GiB")
    attempt, tried = limited(2)
    assert fitting(Fit(16, 1), attempt, auto=True) == (Fit(2, 8), "read 2")
    assert tried == [Fit(16, 1), Fit(8, 2), Fit(4, 4), Fit(2, 8)]
    with pytest.raises(TrainingError, match="not even one sample at a time fits") as error:
        fitting(Fit(4, 1), limited(0)[0], auto=True)
    assert status_of(error.value, debug=False) == 1


def test_other_errors_are_not_taken_for_it():
    def attempt(fit: Fit) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fitting(Fit(4, 1), attempt, auto=True)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
