"""Checkpoints: exact both ways for any optimiser, whole or absent whatever happens, and damage is found and said."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lamina.errors import CheckpointError, StorageError
from lamina.train import checkpoint
from lamina.train.checkpoint import Content, newest_valid, read, save
from lamina.train.generators import generators, restore
from lamina.train.trees import flatten, unflatten

MOMENTS = ("began", "wrote model", "wrote optimiser", "wrote all", "wrote manifest", "renamed", "latest", "set aside",
           "deleted")  # fmt: skip


def small(step: int = 1) -> Content:
    return Content(
        {"model": {"a": torch.full((3, 5), float(step)), "b": torch.arange(7, dtype=torch.bfloat16)}},
        {"optimiser": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"betas": (0.9, 0.95)}]}},
        {"step": step, "samples": 8 * step},
        {"spec.json": b"{}"},
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=torch.tensor(0.01), centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, line_search_fn="strong_wolfe"),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path):
    """n steps equal k steps, a checkpoint, a new process's objects, and n - k steps, bit for bit."""
    inputs = torch.randn(9, 6, 5, generator=torch.Generator().manual_seed(1))

    def steps(model: nn.Module, optimiser: torch.optim.Optimizer, places: range) -> None:
        for place in places:

            def closure(place: int = place) -> torch.Tensor:
                optimiser.zero_grad()
                loss = model(inputs[place]).square().mean()
                loss.backward()
                return loss

            optimiser.step(closure)

    whole = network(0)
    steps(whole, OPTIMISERS[name](list(whole.parameters())), range(9))

    first = network(0)
    optimiser = OPTIMISERS[name](list(first.parameters()))
    steps(first, optimiser, range(4))
    path = save(tmp_path, 4, Content({"model": first.state_dict()}, {"optimiser": optimiser.state_dict()}))
    before = optimiser.state_dict()

    second = network(5)
    saved = read(path, verify=True)
    assert same(dict(saved.tree("optimiser")), before)
    second.load_state_dict(saved.tensors("model"))
    optimiser = OPTIMISERS[name](list(second.parameters()))
    optimiser.load_state_dict(saved.tree("optimiser"))
    steps(second, optimiser, range(4, 9))
    assert same(second.state_dict(), whole.state_dict())


def test_any_tree_comes_back():
    odd = {
        "a": {"b": torch.ones(2), "$c": 1, 3: (1, [2.5, None, True], ()), None: "x", 2.5: {}},
        "a.b": torch.zeros(1),
        "floats": [float("inf"), float("-inf"), float("nan"), 1e-300, 0.1 + 0.2],
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "$tensor": "not one",
        "ours": [{"$tensor": "x"}, {"$float": "1"}, {"$tuple": []}, {"$items": []}],
    }
    tensors, rest = flatten(odd)
    assert len(tensors) == 4
    assert same(unflatten(tensors.__getitem__, json.loads(json.dumps(rest, allow_nan=False))), odd)
    with pytest.raises(TypeError, match=r"a\.0: complex is neither"):
        flatten({"a": [1j]})


def test_what_is_read_is_not_a_view_of_the_file(tmp_path: Path):
    path = save(tmp_path, 1, small())
    tree = read(path).tree("optimiser")
    tree["state"][0]["step"] += 5
    assert float(read(path).tree("optimiser")["state"][0]["step"]) == 1.0
    assert read(path, verify=True).manifest.step == 1


def test_generators_come_back():
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)

    def draws() -> list[Any]:
        return [random.gauss(0, 1), random.random(), float(np.random.standard_normal()), torch.randn(4), torch.rand(2)]

    kept = json.loads(json.dumps(generators()))
    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore(kept)
    assert same(draws(), expected)


def test_the_manifest_says_what_it_should(tmp_path: Path):
    about = {"world": 4, "mesh": {"shard": 2, "tensor": 2}, "spec": "s" * 64, "data": "d" * 64}
    path = save(tmp_path / "deep" / "er", 12, small(12), about=about)
    said = json.loads((path / "manifest.json").read_text())
    assert said["format"] == 1 and said["step"] == 12 and said["torch"] == torch.__version__ and said["lamina"]
    assert {key: said[key] for key in about} == about
    assert set(said["files"]) == {"model.safetensors", "optimiser.safetensors", "state.json", "spec.json"}
    for name, (size, digest) in said["files"].items():
        hashed = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout
        assert (path / name).stat().st_size == size and hashed.startswith(digest)
    assert (path.parent / "latest").read_text() == "step-12\n"
    assert read(path).state == {"step": 12, "samples": 96}
    with pytest.raises(CheckpointError, match="holds no ema.safetensors; it holds model, optimiser"):
        read(path).tensors("ema")


def test_several_writers_fill_the_folder_through_a_function(tmp_path: Path):
    """What parallel/ does: all ranks write below the folder, the first records it."""

    def write(folder: Path) -> None:
        (folder / "shards").mkdir()
        for rank in range(3):
            (folder / "shards" / f"__{rank}_0.distcp").write_bytes(bytes([rank]) * 100)
        (folder / "shards" / ".metadata").write_bytes(b"m")

    path = save(tmp_path, 3, write, estimate=301, about={"world": 3})
    assert set(read(path, verify=True).manifest.files) == {
        "shards/.metadata", *(f"shards/__{rank}_0.distcp" for rank in range(3))
    }  # fmt: skip
    (path / "shards/__1_0.distcp").write_bytes(b"\x01" * 99 + b"\x00")
    with pytest.raises(CheckpointError, match="__1_0.distcp: its sha256"):
        read(path, verify=True)


def test_old_ones_go_and_the_newest_by_saving_stays(tmp_path: Path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, small(step), keep=3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-20", "step-30", "step-40"]
    # Somebody went back to step 20 and trained on: what is newest is what was saved last, not the highest step.
    path = save(tmp_path, 25, small(25), keep=2)
    assert newest_valid(tmp_path) == (path, [])
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-25", "step-40"]
    with pytest.raises(CheckpointError, match="keep is 1"):
        save(tmp_path, 26, small(26), keep=1)
    # The same step again takes the place of what is there.
    save(tmp_path, 25, small(26))
    assert read(path, verify=True).state["step"] == 26
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_one_flipped_bit_is_found(tmp_path: Path):
    path = save(tmp_path, 1, small())
    chance = random.Random(0)
    for name in sorted(os.listdir(path)):
        whole = (path / name).read_bytes()
        for _ in range(25):
            bit = chance.randrange(8 * len(whole))
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name):
                read(path, verify=True)
        (path / name).write_bytes(whole)
    read(path, verify=True)


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


DAMAGE = {
    "truncated": (truncate, r"model\.safetensors: has 100 bytes, and manifest\.json says \d+"),
    "missing": (lambda path: (path / "optimiser.safetensors").unlink(), r"optimiser\.safetensors: is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json: No such file"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 50), r"manifest\.json: "),
    "state": (lambda path: (path / "state.json").write_bytes(b"x" * (path / "state.json").stat().st_size), "state"),
    "flipped": (flip, r"model\.safetensors: its sha256 is"),
    "another folder": (lambda path: shutil.copytree(path.parent / "step-1", path, dirs_exist_ok=True), "is of step 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_one_is_passed_over_and_named(kind: str, tmp_path: Path):
    save(tmp_path, 1, small(1))
    good = save(tmp_path, 2, small(2), keep=5)
    bad = save(tmp_path, 3, small(3), keep=5)
    damage, message = DAMAGE[kind]
    damage(bad)
    newest, skipped = newest_valid(tmp_path, verify=True)
    assert newest == good
    ((path, why),) = skipped
    assert path == bad
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(why)
    # What is older than the newest is of no interest; and saving goes on over the damaged one.
    again = save(tmp_path, 3, small(3))
    assert newest_valid(tmp_path, verify=True) == (again, [])
    damage(good) if kind != "another folder" else None
    assert newest_valid(tmp_path, verify=True) == (again, [])


def test_nothing_valid_at_all(tmp_path: Path):
    assert newest_valid(tmp_path / "none") == (None, [])
    save(tmp_path, 1, small(1))
    truncate(tmp_path / "step-1")
    newest, skipped = newest_valid(tmp_path)
    assert newest is None and len(skipped) == 1


def test_a_manifest_of_a_newer_lamina_or_with_names_outside_is_refused(tmp_path: Path):
    path = save(tmp_path, 1, small())
    file = path / "manifest.json"
    said = json.loads(file.read_text())

    def rewrite(**changed: Any) -> None:
        new = {key: value for key, value in (said | changed).items() if key != "sha256"}
        digest = hashlib.sha256((json.dumps(new) + "\n").encode()).hexdigest()
        file.write_text(json.dumps(new | {"sha256": digest}) + "\n")

    rewrite(format=2)
    with pytest.raises(CheckpointError, match="its format is 2, and this lamina reads up to 1"):
        read(path)
    for name in ("../x", "/etc/passwd", "a//b", "a\\..\\b"):
        rewrite(files={name: [1, "0"]})
        with pytest.raises(CheckpointError, match="may only list files below its folder"):
            read(path)
    rewrite(files=3)
    with pytest.raises(CheckpointError, match="is no manifest"):
        read(path)
    rewrite()
    read(path, verify=True)


def test_a_full_disk_is_said_before_and_during(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, small(1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(StorageError, match=r"step-2: cannot be written: No space left on device: [\d,]+ bytes are "
                           "needed, and 10 are free; the last good checkpoint, step-1, is kept"):  # fmt: skip
            save(tmp_path, 2, small(2))
    # A tenth more than is needed must be free; nothing is begun where it is not.
    large, begun = Content({"model": {"a": torch.zeros(100_000)}}), []
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1.05 * large.nbytes)))
        patched.setattr(checkpoint, "moment", begun.append)
        with pytest.raises(StorageError, match="are needed"):
            save(tmp_path, 2, large)
    assert begun == []
    for place in ("wrote model", "wrote all"):

        def moment(name: str, place: str = place) -> None:
            if name == place:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "moment", moment)
            with pytest.raises(StorageError, match="No space left on device"):
                save(tmp_path, 2, small(2))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert newest_valid(tmp_path, verify=True)[0] == tmp_path / "step-1"


def test_the_system_refuses_bytes_in_the_middle(tmp_path: Path):
    """A real refusal, by the limit on the size of a file: the temporary folder goes, the old checkpoint stays."""
    save(tmp_path, 1, small(1))
    large = Content({"model": {"a": torch.zeros(50_000)}})
    old, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(StorageError, match="File too large.*step-1, is kept"):
            save(tmp_path, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-1"]
    assert newest_valid(tmp_path, verify=True)[0] == tmp_path / "step-1"


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("mount") is None, reason="no way to a small disk")
def test_a_small_disk_fills_up(tmp_path: Path):
    """A disk of 300 kB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save(disk, 1, small(1))
        for estimate in (0, None):  # 0: the check before does not notice
            large = Content({"model": {"a": torch.zeros(200_000)}})
            with pytest.raises(StorageError, match="are needed, and [1-9][0-9,]+ are free; the last good checkpoint"):
                save(disk, 2, large.write if estimate == 0 else large, estimate=estimate)
            assert sorted(os.listdir(disk)) == ["latest", "step-1"]
        assert newest_valid(disk, verify=True)[0] == disk / "step-1"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_savers_take_turns(tmp_path: Path):
    failed: list[BaseException] = []

    def saver(first: int) -> None:
        try:
            for step in range(first, 40, 2):
                save(tmp_path, step // 4, small(step // 4), keep=3)  # often the same step as the other's
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=saver, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(list(tmp_path.glob("step-*"))) == 3 and not list(tmp_path.glob(".*"))
    for path in tmp_path.glob("step-*"):
        assert read(path, verify=True).state["step"] == int(path.name[5:])


def killed(directory: Path, what: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.train.killed_saver", str(directory), what]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path: Path):
    rows = killed(tmp_path, "50")
    assert len(rows) == 50
    steps = [int(row["newest"].removeprefix("step-")) for row in rows if row["newest"]]
    assert len(steps) > 25 and steps == sorted(steps) and steps[-1] > 10
    for row in rows:
        assert row["consistent"] and row["skipped"] == [] and row["left"] == [], row
    assert any(row["rubbish"] for row in rows)  # some did come in the middle of a save


def test_a_kill_at_each_moment(tmp_path: Path):
    """In the third save: until its name is there, the second is the newest; nothing is ever half there."""
    rows = dict(zip(MOMENTS, killed(tmp_path, ",".join(MOMENTS)), strict=True))
    for name, row in rows.items():
        after = MOMENTS.index(name) >= MOMENTS.index("renamed")
        assert row["newest"] == ("step-3" if after else "step-2"), (name, row)
        assert row["consistent"] and row["skipped"] == [] and row["left"] == [], (name, row)
        assert len(row["kept"]) == (3 if name in ("renamed", "latest") else 2), (name, row)
        assert bool(row["rubbish"]) == (name not in ("renamed", "latest", "deleted")), (name, row)
