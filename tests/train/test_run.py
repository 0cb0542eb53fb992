"""A run directory: what is in it, who owns it, and what happens when it goes from under the run."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.errors import LaminaError, StorageError
from lamina.train.records import cut_back, read_records, smooth
from lamina.train.run import Run, Voice, git


def test_what_a_run_leaves(tmp_path: Path):
    with Run(tmp_path / "a" / "run", "steps: 3\n", command=["lamina", "train", "x.yaml"]) as run:
        run.record({"step": 1, "loss": 2.5, "parts": {"router": float("nan")}, "rate": float("inf")})
        # Each record is there for others at once.
        assert (run.directory / "metrics.jsonl").read_text().endswith('"rate": "inf"}\n')
        run.sample(1, "a <b> \ud800 text\n")
        run.event("two\nlines")
    names = sorted(os.listdir(run.directory))
    assert names == ["config.yaml", "env.json", "events.log", "metrics.jsonl", "run.lock", "samples"]
    assert (run.directory / "config.yaml").read_text() == "steps: 3\n"
    found = json.loads((run.directory / "env.json").read_text())
    assert found["command"] == ["lamina", "train", "x.yaml"] and found["host"] == socket.gethostname()
    assert found["packages"]["torch"] and found["cores"] >= 1 and "git" in found
    assert (run.directory / "samples/step-1.txt").read_text() == "a <b> \\ud800 text\n"
    events = (run.directory / "events.log").read_text().splitlines()
    assert len(events) == 2 and "began: lamina train x.yaml" in events[0] and events[1].endswith("two lines")
    with pytest.raises(LaminaError, match="this run is closed"):
        run.record({"step": 2})


def test_a_new_run_does_not_go_into_an_old_one(tmp_path: Path):
    with Run(tmp_path, "") as run:
        run.record({"step": 1})
    with pytest.raises(LaminaError, match="holds a run already; go on with it"):
        Run(tmp_path, "")
    with Run(tmp_path, "b: 1\n", resume=True) as run:
        run.record({"step": 2})
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl").records] == [1, 2]
    assert "resumed" in (tmp_path / "events.log").read_text()


def test_a_second_owner_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path):
    program = (
        "import sys, time\nfrom lamina.train.run import Run\nrun = Run(sys.argv[1], '')\nprint('mine', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"mine\n"
        with pytest.raises(LaminaError, match=rf"process {owner.pid} on {socket.gethostname()}, since .*; stop it"):
            Run(tmp_path, "", resume=True)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with Run(tmp_path, "", resume=True):
        with pytest.raises(LaminaError, match=f"process {os.getpid()} on"):  # not in the same process either
            Run(tmp_path, "", resume=True)


def test_the_directory_is_deleted_under_the_run(tmp_path: Path):
    with Run(tmp_path / "run", "steps: 3\n") as run:
        run.record({"step": 1})
        shutil.rmtree(run.directory)
        run.record({"step": 2})
        os.rename(run.directory, tmp_path / "elsewhere")
        run.sample(3, "text")
        run.event("still here")
        assert [r["step"] for r in read_records(run.directory / "metrics.jsonl").records] == [3]
        assert [r["step"] for r in read_records(tmp_path / "elsewhere/metrics.jsonl").records] == [2]
        assert (run.directory / "config.yaml").read_text() == "steps: 3\n"
        assert "had been deleted or moved away" in (run.directory / "events.log").read_text()
        # Where another run has begun in its place, this one stops.
        shutil.rmtree(run.directory)
        with Run(run.directory, ""):
            with pytest.raises(LaminaError, match="another process trains here"):
                run.record({"step": 4})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path):
    with Run(tmp_path / "run", "") as run:
        run._files["metrics.jsonl"].close()
        run._files["metrics.jsonl"] = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written: No space left"):
            run.record({"step": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: "):
        Run(tmp_path / "file" / "run", "")


LINES = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2, 3, 3, 4)]


@pytest.mark.parametrize("damage", ["", '{"step": 5, "lo', "\x00\x00\x00", "\n"])
def test_metrics_are_cut_back_to_the_step(damage: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step, kept in ((0, 0), (2, 2), (3, 4), (9, 5)):
        path.write_text("".join(LINES) + damage)
        removed = cut_back(path, step)
        left = path.read_text()
        assert left == "".join(LINES[:kept]) + ("\n" if damage == "\n" and step == 9 else "")
        assert removed == 5 - kept + (damage not in ("", "\n")) + (damage == "\n" and step != 9)


def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    bad = [
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": "3"}\n',
        b'{"step": true}\n',
        b'{"step": 3, "loss": 2.',
    ]
    path.write_bytes(LINES[0].encode() + b"".join(bad[:3]) + LINES[1].encode() + b"".join(bad[3:]))
    found = read_records(path)
    assert [record["step"] for record in found.records] == [1, 2]
    assert found.damaged == (2, 3, 4, 6, 7, 8)
    path.write_bytes(b"")
    assert read_records(path).records == ()


def test_curves(tmp_path: Path):
    with Run(tmp_path, "") as run:
        for step in range(1, 7):
            run.record({"step": step, "loss": math.nan if step == 3 else float(step), "parts": {"z": step}})
            if step % 2 == 0:
                run.record({"step": step, "validation": {"loss": 10.0 * step}})
        run.sample(6, "text")
    found = read_records(tmp_path / "metrics.jsonl")
    assert [step for step, _ in found.curve("loss")] == [1, 2, 3, 4, 5, 6] and math.isnan(found.curve("loss")[2][1])
    assert found.curve("validation", "loss") == [(2, 20.0), (4, 40.0), (6, 60.0)] and found.last("parts", "z") == 6
    assert found.curve("sample") == [] and found.last("none") is None
    assert smooth(found.curve("loss"), 2) == [(1, 1.0), (2, 1.5), (4, 3.0), (5, 4.5), (6, 5.5)]


def test_nobody_listens_any_more():
    class Broken(io.StringIO):
        def write(self, s: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    voice = Voice(Broken())
    voice.say("a"), voice.say("b")
    assert voice.lost is not None and "Broken pipe" in voice.lost
    closed = io.StringIO()
    voice = Voice(closed)
    voice.say("a")
    assert closed.getvalue() == "a\n" and voice.lost is None
    closed.close()
    voice.say("b")
    assert voice.lost is not None


def test_git_says_the_commit_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git() is None
    for words in (["init", "-q"], ["add", "a"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        (tmp_path / "a").write_text("a")
        subprocess.run(["git", *words], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git() == {"commit": commit, "changed": False}
    (tmp_path / "a").write_text("b")
    assert git() == {"commit": commit, "changed": True}
    monkeypatch.setenv("PATH", "")
    assert git() is None
