"""Names and help texts that others rely on: a change of them is a change of the diff of a snapshot."""

import pytest

from tests.update import SNAPSHOTS, TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_snapshots_are_what_is(name: str):
    assert TEXTS[name]() == (SNAPSHOTS / name).read_text(encoding="utf-8"), (
        "if this is meant: python -m tests.update, and read the diff"
    )
