"""Small checkpoints in both layouts, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli import main
from lamina.families import Fields, family

MISTRAL = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "sliding_window": 5,
    "max_position_embeddings": 64,
}


@dataclass
class Done:
    """What a command gave."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        found = json.loads(self.out)
        assert found["schema"] == "lamina/RESULT/1"
        return found

    def refused(self, *said: str) -> None:
        """A mistake of the user: status 2, one line that says all of this, nothing on standard output."""
        assert self.status == 2 and self.out == "" and self.err.count("\n") == 1, self
        assert self.err.startswith("lamina: error: ")
        for words in said:
            assert words in self.err, self.err


@pytest.fixture
def lam(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command: lam("show", path, "--json")."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        status = main([str(word) for word in words])
        seen = capsys.readouterr()
        return Done(status, seen.out, seen.err)

    return run


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral in the Hugging Face layout. Not to be changed."""
    directory = tmp_path_factory.mktemp("sources") / "mistral"
    lamina.save(family("mistral").spec(Fields(MISTRAL)).build(seed=0), directory)
    return directory


@pytest.fixture(scope="session")
def native(mistral: Path) -> Path:
    """The same in the native layout. Not to be changed."""
    directory = mistral.parent / "native"
    lamina.save(lamina.load(mistral), directory, format="native")
    return directory
