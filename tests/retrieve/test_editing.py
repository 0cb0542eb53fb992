"""Documents added and taken out: what comes of it is what a build of the same ones is; readers are not disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamina.errors import LaminaError
from lamina.retrieve import Database, Embedder, Engine, add, build, build_states, open_database, remove
from lamina.retrieve.chunks import Documents
from lamina.retrieve.manifest import hash_of
from tests import tiny
from tests.retrieve import made
from tests.retrieve.test_faults import ENGINES, run

FIRST, MORE = made.texts(25), made.texts(11, seed=1)


@pytest.fixture(params=ENGINES)
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A database of the first texts, a.jsonl, and others as prepared text, b.jsonl."""
    engine = Engine(request.param)
    made.embedder_at(tmp_path / "bert")
    first = made.prepared(tmp_path / "text", made.rows(tmp_path / "a.jsonl", FIRST))
    build(first, tmp_path / "index", Embedder(tmp_path / "bert"), chunk=made.CHUNK, engine=engine, batch=16)
    made.prepared(tmp_path / "more", made.rows(tmp_path / "b.jsonl", MORE))
    return tmp_path


def prepared(path: Path):
    from lamina.data import open_prepared

    return open_prepared(path)


def check_equal(found: Database, documents: list[str], room: Path) -> None:
    """Rows, and what is found, are those of the documents by themselves."""
    expected = made.chunks_of(documents, made.CHUNK)
    rows = torch.arange(len(found))
    assert [found.document_of(row).item() for row in rows] == [number for number, _, _ in expected]
    pairs = [made.filled(a, made.CHUNK) + made.filled(b, made.CHUNK) for _, a, b in expected]
    assert found.values(rows).tolist() == pairs
    if found.spec.engine == "lance":
        table = found.store.table.to_arrow().sort_by("row").to_pydict()  # pyright: ignore[reportAttributeAccessIssue]
        assert [a + b for a, b in zip(table["tokens"], table["next_tokens"])] == pairs
        assert table["document"] == [number for number, _, _ in expected]
    vectors = made.vectors_of(found, [ids for _, ids, _ in expected])
    torch.testing.assert_close(found.store.vectors(rows), vectors, rtol=0, atol=1e-5)
    near = found.search(vectors[::5], 3)
    right = (vectors[::5, None] - vectors).square().sum(2).sort().values[:, :3]
    torch.testing.assert_close(near.distances, right, rtol=0, atol=1e-4)
    found.verify()


def test_what_is_added_follows_what_was_there(room: Path):
    before = open_database(room / "index")
    seen = []
    spec = add(before, prepared(room / "more"), batch=5, report=lambda p: seen.append((p.what, p.rows, p.begun)))
    after = open_database(room / "index")
    assert after.spec == spec and hash_of(spec) == after.hash != before.hash
    check_equal(after, FIRST + MORE, room)
    assert [each.name for each in spec.origins] == [str(room / "a.jsonl"), str(room / "b.jsonl")]
    assert after.name_of(24).endswith("a.jsonl#24") and after.name_of(25).endswith("b.jsonl#25")
    assert spec.notes == ("documents added since the build: 11",)
    assert seen[0] == ("copying", 0, len(before)) and seen[1] == ("embedding", len(before), len(before))
    check_equal(before, FIRST, room)  # it stays what it was
    again = add(after, prepared(room / "more"))
    assert again == spec and open_database(room / "index").folder == after.folder


def test_what_is_taken_out_was_never_there(room: Path):
    add(open_database(room / "index"), prepared(room / "more"), close=True)
    assert [path.name for path in (room / "index").glob("generation-*")] == ["generation-2"]
    database = open_database(room / "index")
    names = [database.name_of(number) for number in (0, 7, 8, 24, 30)]
    spec = remove(database, [*names, names[0]])
    left = [text for number, text in enumerate(FIRST + MORE) if number not in (0, 7, 8, 24, 30)]
    check_equal(open_database(room / "index"), left, room)
    assert spec.notes == ("documents added since the build: 11", "documents removed since the build: 5")
    spec = remove(open_database(room / "index"), [str(room / "a.jsonl")])
    found = open_database(room / "index")
    check_equal(found, left[-10:], room)
    assert [each.name for each in spec.origins] == [str(room / "b.jsonl")] and int(found.files.max()) == 0
    assert spec.notes[1] == "documents removed since the build: 26"
    with pytest.raises(LaminaError, match=r"unknown document '.*b.json'.*b\.jsonl"):
        remove(found, [str(room / "b.json")])
    for name in (f"{room / 'b.jsonl'}#10", f"{room / 'a.jsonl'}#1", "#3", ""):
        with pytest.raises(LaminaError, match="unknown document"):
            remove(found, [name])
    with pytest.raises(LaminaError, match="nothing would be left"):
        remove(found, [str(room / "b.jsonl")])


def test_files_are_replaced_in_one_step(room: Path):
    made.prepared(room / "again", made.rows(room / "a.jsonl", [FIRST[3], "new", *MORE[:2]]))
    spec = add(open_database(room / "index"), prepared(room / "again"), replace=True)
    check_equal(open_database(room / "index"), [FIRST[3], "new", *MORE[:2]], room)
    assert spec.documents == 4 and len(spec.origins) == 1
    assert spec.notes == ("documents added since the build: 4", "documents removed since the build: 25")


def test_what_was_interrupted_goes_on_and_nothing_is_lost(room: Path):
    def stop(progress) -> None:
        if progress.what == "embedding" and progress.rows > progress.begun + 10:
            raise KeyboardInterrupt

    before = open_database(room / "index")
    with pytest.raises(KeyboardInterrupt):
        add(before, prepared(room / "more"), batch=8, report=stop)
    check_equal(open_database(room / "index"), FIRST, room)
    seen = []
    add(open_database(room / "index"), prepared(room / "more"), batch=8, report=lambda p: seen.append(p.begun))
    assert seen[0] == len(before) + 16
    check_equal(open_database(room / "index"), FIRST + MORE, room)
    with pytest.raises(LaminaError, match="another process has replaced generation-1 meanwhile"):
        add(before, made.prepared(room / "third", made.rows(room / "c.jsonl", ["new"])))
    with pytest.raises(LaminaError, match="another process has replaced generation-1 meanwhile"):
        remove(before, [before.name_of(0)])


def test_a_file_in_two_ways_is_left_out_whole(room: Path):
    """What is the same as a document by its file lies in two places then."""
    long = "\n".join(made.texts(6, seed=5))
    (room / "d.txt").write_text(long)
    whole, lines = made.prepared(room / "whole", room / "d.txt"), None
    add(open_database(room / "index"), whole)
    lines = made.prepared(room / "lines", room / "d.txt", split_on="\n")
    add(open_database(room / "index"), lines)
    database = open_database(room / "index")
    assert database.spec.documents == 25 + 1 + 6
    documents = Documents(whole)
    own = database.own(torch.from_numpy(documents.keys), [whole.manifest.sources[0].sha256], torch.tensor([True]))
    assert {i for low, high in own[0].tolist() for i in range(low, high)} == set(range(25, 32))


def test_other_embedders_and_tokenizers_are_refused(room: Path):
    other = made.embedder_at(room / "other", seed=1)
    with pytest.raises(LaminaError, match=r"was made by .*bert \(hash .*\), and this is .*other"):
        add(open_database(room / "index", embedder=str(other)), prepared(room / "more"))
    foreign = room / "foreign"
    made.prepare(made.find([str(room / "b.jsonl")]), foreign, "bytes", made.PrepareSpec())
    with pytest.raises(LaminaError, match="ids of another tokenizer"):
        add(open_database(room / "index"), prepared(foreign))
    assert [path.name for path in (room / "index").glob("generation-*")] == ["generation-1"]


def test_states_are_added_too(tmp_path: Path):
    import lamina

    llama = tiny.checkpoint(tmp_path / "llama")
    first = made.prepared(tmp_path / "text", made.rows(tmp_path / "a.jsonl", FIRST[:4]))
    more = made.prepared(tmp_path / "more", made.rows(tmp_path / "b.jsonl", [FIRST[1], *MORE[:3]]))
    both = made.prepared(tmp_path / "both", made.rows(tmp_path / "c.jsonl", FIRST[:4] + MORE[:3]))
    model = lamina.load(llama)
    for name, text in (("one", first), ("right", both)):
        build_states(text, tmp_path / name, model, source=str(llama), window=24)
    add(open_database(tmp_path / "one"), more)
    found, right = open_database(tmp_path / "one"), open_database(tmp_path / "right")
    rows = torch.arange(len(right))
    assert len(found) == len(right) and torch.equal(found.values(rows), right.values(rows))
    torch.testing.assert_close(found.store.vectors(rows), right.store.vectors(rows))
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(LaminaError, match="was made by"):
        add(open_database(tmp_path / "one", embedder=str(other)), both)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_kills_of_changes_lose_nothing(tmp_path: Path, engine: str):
    made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", made.texts(16)))
    made.prepared(tmp_path / "more", made.rows(tmp_path / "m.jsonl", made.texts(8, seed=1)))
    made.embedder_at(tmp_path / "bert")
    kills, same, generations = run("killed_editor.py", tmp_path, engine, 0).split()
    assert (kills, same, generations) == ("20", "True", "1")
