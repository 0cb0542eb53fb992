"""The engine lance beside the exact one (tests that need lancedb are skipped without it)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from lamina.errors import CheckpointError, UnsupportedError
from lamina.retrieve import Embedder, Engine, Found, build, open_database
from lamina.retrieve.recall import exactly, fewest, recall, sampled
from tests.retrieve import made
from tests.retrieve.test_faults import without_lance


@pytest.fixture(scope="module", params=["all", "lists"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The same text with both engines; lance compares all rows, or has an index of 16 lists."""
    root = tmp_path_factory.mktemp("both")
    exact, text = made.database(root, made.texts(150))
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "lists":
            patched.setattr("lamina.retrieve.lance.FEWEST", 50)
            patched.setattr("lamina.retrieve.lance.LIST", 64)
        build(text, root / "lance", Embedder(root / "bert"), chunk=made.CHUNK, engine=Engine("lance"), batch=100)
    return exact, open_database(root / "lance"), request.param


@without_lance
def test_rows_are_the_same(both):
    exact, lance, _ = both
    rows = torch.tensor([3, 0, len(exact) - 1, 3, 11])
    assert torch.equal(exact.store.tokens(rows), lance.store.tokens(rows))
    assert torch.equal(exact.values(rows), lance.values(rows))
    assert torch.equal(exact.store.vectors(rows), lance.store.vectors(rows))
    table = lance.store.table.to_arrow()  # a row can be read by itself
    for row in (0, 5, len(exact) - 1):
        values = [table[name][row].as_py() for name in ("tokens", "next_tokens")]
        assert values[0] + values[1] == exact.values(torch.tensor([row]))[0].tolist()
        assert table["document"][row].as_py() == int(exact.document_of(torch.tensor(row)))
    lance.verify()


@without_lance
def test_what_is_found(both):
    """With every list looked into, what is found is exact: what a query leaves out is made up for."""
    exact, lance, kind = both
    torch.manual_seed(0)
    if kind == "lists":
        assert lance.spec.table.lists == 16
        lance.store.spec = lance.spec.table.replace(probes=16)
    queries = torch.nn.functional.normalize(exact.store.vectors(torch.arange(40)) + 0.1 * torch.randn(40, 32), dim=1)
    documents = torch.randint(0, 150, (40, 2)).sort(dim=1).values  # some exclude nearly everything
    for exclude in (None, torch.stack([documents, documents[:, [0, 0]] + 1], dim=1)):
        right, found = exact.search(queries, 6, exclude), lance.search(queries, 6, exclude)
        torch.testing.assert_close(found.distances, right.distances, rtol=1e-4, atol=1e-5)
        if exclude is not None:
            of = lance.document_of(found.rows.clamp(min=0))[:, :, None]
            inside = (of >= exclude[:, None, :, 0]) & (of < exclude[:, None, :, 1])
            assert not (inside.any(2) & (found.rows >= 0)).any()
        assert ((found.rows >= 0) == (right.rows >= 0)).all()
    lance.store.spec = lance.spec.table
    oracle = exactly(lance.store, queries, 6)
    torch.testing.assert_close(oracle.distances, exact.search(queries, 6).distances, rtol=1e-4, atol=1e-5)


@without_lance
def test_recall_is_measured(both):
    _, lance, kind = both
    said = lance.spec.table
    if kind == "all":
        assert (said.lists, said.probes, said.recall) == (0, 0, 1.0)
        return
    assert 0.95 <= said.recall <= 1 and 1 <= said.probes <= 16
    queries, spans = sampled(lance.store)
    right = exactly(lance.store, queries, 10, spans)
    assert not (right.rows == spans[:, 0, :1]).any()  # none finds itself
    assert recall(lance.store.search(queries, 10, spans), right) == pytest.approx(said.recall, abs=1e-4)


def test_recall():
    inf = torch.inf
    exact = Found(torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.tensor([[0.1, 0.2, 0.4], [0.3, 0.5, inf]]))
    some = Found(torch.tensor([[3, 1, 9], [5, 8, 7]]), torch.tensor([[0.4, 0.1, 0.41], [0.5, 0.6, 0.7]]))
    assert recall(some, exact) == pytest.approx(3 / 5)
    tie = Found(torch.tensor([[1, 2, 7]]), torch.tensor([[0.1, 0.2, 0.4]]))  # row 7 lies where row 3 does
    assert recall(tie, Found(exact.rows[:1], exact.distances[:1])) == 1
    nothing = Found(torch.full((2, 3), -1), torch.full((2, 3), inf))
    assert recall(exact, exact) == recall(exact, nothing) == 1 and recall(nothing, exact) == 0
    tried = []

    def found(probes: int) -> Found:
        tried.append(probes)
        return exact if probes >= 4 else nothing

    assert fewest(found, exact, 100) == (4, 1.0) and tried == [1, 2, 4, 3]  # doubled, and then between the last two
    assert fewest(found, exact, 3) == (3, 0.0)
    tried.clear()
    steep = lambda probes: (tried.append(probes), exact if probes >= 37 else nothing)[1]  # noqa: E731
    assert fewest(steep, exact, 100) == (40, 1.0) and tried == [1, 2, 4, 8, 16, 32, 64, 48, 40, 36]


class Counted:
    """A store that counts how often vectors are asked for."""

    def __init__(self, store) -> None:
        self.store, self.rows, self.asked = store, store.rows, 0

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return self.store.vectors(rows)


@without_lance
def test_some_rows_are_one_request(both):
    """Each is a way to object storage and back."""
    exact, lance, _ = both
    counted = Counted(lance.store)
    vectors, spans = sampled(counted, 60)  # pyright: ignore[reportArgumentType]
    assert counted.asked == 1 and len(spans[:, 0, 0].unique()) == 60
    assert torch.equal(vectors, exact.store.vectors(spans[:, 0, 0]))
    some = torch.tensor([5, 3, 3])
    assert torch.equal(lance.store.vectors(some), exact.store.vectors(torch.arange(6))[some])
    assert lance.store.vectors(some[:0]).shape == (0, 32)


@without_lance
def test_rows_elsewhere_and_tables_that_are_gone(tmp_path: Path):
    _, text = made.database(tmp_path, made.texts(6))
    model, elsewhere = Embedder(tmp_path / "bert"), tmp_path / "elsewhere"
    engine = Engine("lance", f"file://{elsewhere}")
    build(text, tmp_path / "there", model, chunk=9, engine=engine)
    build(text, tmp_path / "there", model, chunk=9, engine=engine, force=True)  # beside the one that is read
    assert len(list(elsewhere.glob("*.lance"))) == 2
    found = open_database(tmp_path / "there")
    assert found.search(torch.zeros(1, 32), 2).rows.shape == (1, 2)
    for table in elsewhere.glob("*.lance"):
        shutil.rmtree(table)
    with pytest.raises(CheckpointError, match=rf"{found.spec.table.name}.*not found"):
        open_database(tmp_path / "there")


@without_lance
def test_a_table_with_other_rows_is_refused(tmp_path: Path):
    _, text = made.database(tmp_path, made.texts(6))
    build(text, tmp_path / "lance", Embedder(tmp_path / "bert"), chunk=9, engine=Engine("lance"))
    found = open_database(tmp_path / "lance")
    found.store.table.delete("row = 3")
    with pytest.raises(CheckpointError, match=rf"has {len(found) - 1} rows .* index.json says {len(found)}"):
        open_database(tmp_path / "lance")


@without_lance
def test_numbers_that_are_there_twice_are_named(tmp_path: Path):
    _, text = made.database(tmp_path, made.texts(6))
    build(text, tmp_path / "lance", Embedder(tmp_path / "bert"), chunk=9, engine=Engine("lance"))
    table = open_database(tmp_path / "lance").store.table
    table.update(where="row = 3", values={"row": 2})
    found = open_database(tmp_path / "lance")
    with pytest.raises(CheckpointError, match=r"rows are not numbered 0 to \d+ in order; build it anew"):
        found.verify()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, text = made.database(tmp_path, made.texts(2))
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(UnsupportedError, match=r"engine lance needs the package lancedb.*lamina\[retrieval\]"):
        build(text, tmp_path / "lance", Embedder(tmp_path / "bert"), engine=Engine("lance"))
