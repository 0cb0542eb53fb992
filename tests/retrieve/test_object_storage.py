"""Rows in object storage, by a server of S3 on this machine (skipped without lancedb and moto[server])."""

from __future__ import annotations

import http.client
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lamina.errors import CheckpointError, LaminaError
from lamina.retrieve import Embedder, Engine, add, build, copy, open_database, remove
from tests.retrieve import made

needed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lancedb", "moto", "flask")),
    reason="lancedb (extra lamina[retrieval]) and moto[server] are needed",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer  # pyright: ignore[reportMissingImports]

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("ACCESS_KEY_ID", "key"),
        ("SECRET_ACCESS_KEY", "secret"),
        ("REGION", "us-east-1"),
        ("ENDPOINT", f"http://{host}:{port}"),
        ("ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()
    yield "s3://bucket/databases"
    server.stop()


@needed
@pytest.mark.slow
def test_rows_in_object_storage(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch):
    documents, more = made.texts(60), made.texts(5, seed=1)
    exact, text = made.database(tmp_path, documents)
    model, engine, there = Embedder(tmp_path / "bert"), Engine("lance", bucket), tmp_path / "there"
    monkeypatch.setattr("lamina.retrieve.lance.FEWEST", 50)
    monkeypatch.setattr("lamina.retrieve.lance.LIST", 64)

    def stop(progress) -> None:
        if progress.rows == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(text, there, model, chunk=made.CHUNK, engine=engine, batch=16, report=stop)
    seen = []
    build(text, there, model, chunk=made.CHUNK, engine=engine, batch=200, report=lambda p: seen.append(p.begun))
    assert seen[0] == 32
    found = open_database(there)
    assert found.spec.table.uri == bucket and found.spec.table.lists > 1
    assert not list(there.rglob("*.lance"))  # nothing of the rows lies here
    rows = torch.arange(len(exact))
    assert torch.equal(found.values(rows), exact.values(rows))
    assert torch.equal(found.store.vectors(torch.arange(len(exact))), exact.store.vectors(torch.arange(len(exact))))
    found.store.spec = found.spec.table.replace(probes=found.spec.table.lists)
    queries = torch.nn.functional.normalize(torch.randn(7, 32), dim=1)
    torch.testing.assert_close(found.search(queries, 5).distances, exact.search(queries, 5).distances)
    found.verify()
    made.prepared(tmp_path / "more", made.rows(tmp_path / "b.jsonl", more))
    from lamina.data import open_prepared

    add(found, open_prepared(tmp_path / "more"))
    remove(open_database(there), [exact.name_of(0)])
    last = open_database(there)
    expected = made.chunks_of([*documents[1:], *more], made.CHUNK)
    assert last.spec.table.uri == bucket
    assert last.store.tokens(torch.arange(len(last))).tolist() == [made.filled(a, made.CHUNK) for _, a, _ in expected]
    assert found.search(queries, 5).rows.shape == (7, 5)  # who reads keeps the table that was opened
    copy(last, tmp_path / "here", Engine("lance"))
    here = open_database(tmp_path / "here")
    assert torch.equal(here.values(torch.arange(len(here))), last.values(torch.arange(len(here))))


@needed
@pytest.mark.slow
def test_storage_that_is_not_there_is_named(tmp_path: Path, bucket: str):
    _, text = made.database(tmp_path, made.texts(3))
    model = Embedder(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"^s3://none/databases/lamina-\w+: .*") as raised:
        build(text, tmp_path / "there", model, chunk=9, engine=Engine("lance", "s3://none/databases"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["s3://bucket/index", "gs://bucket/index", "memory://x"])
def test_a_database_itself_is_in_a_directory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    database, text = made.database(tmp_path, ["the cat sat"])
    said = r"a database's directory is in a file system; .* --engine lance --uri s3://"
    with pytest.raises(LaminaError, match=said):
        open_database(name)
    with pytest.raises(LaminaError, match=said):
        build(text, name, database.embedder)
    with pytest.raises(LaminaError, match=said):
        copy(database, name, Engine())
    assert not any(path.name.startswith(("s3:", "gs:", "memory:")) for path in tmp_path.iterdir())
