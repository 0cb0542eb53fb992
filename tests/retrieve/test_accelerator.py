"""faiss over the rows of a database beside the exact search (skipped without faiss)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.retrieve import Embedder, build, open_database, remove
from lamina.retrieve.accelerator import stale
from lamina.retrieve.store import Found, without
from tests.retrieve import made

needed = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed: it is in the extra lamina[faiss]"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*swig.*:DeprecationWarning")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    made.database(tmp_path, made.texts(150))
    return tmp_path / "index"


def test_what_is_left_out():
    found = Found(
        torch.tensor([[5, 2, 7, 9], [1, -1, -1, -1]]), torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, *[torch.inf] * 3]])
    )
    kept = without(found, torch.tensor([[[2, 3], [9, 12]], [[0, 0], [4, 9]]]), 3)
    assert kept.rows.tolist() == [[5, 7, -1], [1, -1, -1]]
    assert kept.distances[0, :2].tolist() == found.distances[0, [0, 2]].tolist() and kept.distances[0, 2].isinf()


@needed
def test_what_is_found(index: Path):
    exact, fast = open_database(index), open_database(index)
    fast.accelerate()
    assert 0.95 <= fast.store.recall <= 1 and fast.store.index.nlist > 1
    fast.store.probes = fast.store.index.nlist  # with every list looked into it is exact
    torch.manual_seed(0)
    queries = torch.randn(40, 32)
    documents = torch.randint(0, 150, (40, 2)).sort(dim=1).values
    for exclude in (None, torch.stack([documents, documents[:, [0, 0]] + 1], dim=1)):
        for count in (6, 60):
            right, found = exact.search(queries, count, exclude), fast.search(queries, count, exclude)
            torch.testing.assert_close(found.distances, right.distances, rtol=1e-4, atol=1e-4)
    rows = torch.arange(9)
    assert torch.equal(exact.values(rows), fast.values(rows))


@needed
def test_an_index_is_made_once_and_anew_where_it_is_damaged(index: Path, tmp_path: Path):
    open_database(index).accelerate()
    (file,) = (tmp_path / "cache/faiss").glob("*/index.faiss")
    before = file.stat().st_mtime_ns
    open_database(index).accelerate()
    assert file.stat().st_mtime_ns == before
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    again = open_database(index)
    again.accelerate()
    assert again.search(torch.zeros(1, 32), 2).rows.shape == (1, 2) and len(file.read_bytes()) == len(data)
    assert json.loads((file.parent / "about.json").read_text())["recall"] == again.store.recall


@needed
def test_an_index_from_elsewhere_has_to_be_trusted(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_database(index).accelerate()
    (file,) = (tmp_path / "cache/faiss").glob("*/index.faiss")
    foreign = tmp_path / "foreign.faiss"
    file.rename(foreign)
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "other"))
    (index / "generation-1/index.faiss").write_bytes(b"not read at all")
    open_database(index).accelerate()
    trusted = open_database(index)
    trusted.accelerate(foreign)
    assert trusted.search(torch.zeros(1, 32), 2).rows.shape == (1, 2)
    foreign.write_bytes(foreign.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"foreign.faiss: faiss cannot read it"):
        open_database(index).accelerate(foreign)
    with pytest.raises(LaminaError, match="no such file"):
        open_database(index).accelerate(tmp_path / "none")
    made.database(tmp_path / "small", made.texts(3))
    open_database(tmp_path / "small/index").accelerate()
    other = next(path for path in (tmp_path / "other/faiss").glob("*/index.faiss") if path.stat().st_size < 50_000)
    with pytest.raises(CheckpointError, match=r"rows of width 32; an inverted file of [\d,]+ rows"):
        open_database(index).accelerate(other)


@needed
def test_an_index_of_an_older_generation_is_stale(index: Path, tmp_path: Path):
    one = open_database(index)
    one.accelerate()
    (file,) = (tmp_path / "cache/faiss").glob("*/index.faiss")
    kept = tmp_path / "kept.faiss"
    kept.write_bytes(file.read_bytes())
    assert stale(one.location, one.hash) == [] and one.store.stale == 0
    remove(one, [one.name_of(3)])
    other = open_database(index)
    assert stale(one.location, other.hash) == [file.parent]
    other.accelerate()
    assert other.store.stale == 1 and not file.exists() and stale(one.location, other.hash) == []
    with pytest.raises(CheckpointError, match=r"kept.faiss: .* rows of width 32; an inverted file of"):
        open_database(index).accelerate(kept)
    # As many rows of the same vectors, but with other numbers: the nearest lie as near.
    text = made.prepared(tmp_path / "back", made.rows(tmp_path / "back.jsonl", made.texts(150)[::-1]))
    build(text, tmp_path / "reversed", Embedder(tmp_path / "bert"), chunk=made.CHUNK)
    assert len(open_database(tmp_path / "reversed")) == len(one)
    with pytest.raises(CheckpointError, match=r"kept.faiss: \d+% of some rows find themselves: it is stale"):
        open_database(tmp_path / "reversed").accelerate(kept)


def test_without_the_package(index: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnsupportedError, match=r"needs the package faiss.*lamina\[faiss\]"):
        open_database(index).accelerate()
