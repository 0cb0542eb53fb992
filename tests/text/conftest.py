"""Real artefacts for the tests that want them; without them those tests are skipped, with the reason."""

import os
from pathlib import Path

import pytest


def data() -> Path:
    return Path(os.environ.get("LAMINA_DATA") or Path.home() / ".local/share/lamina")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    found = sorted((data() / "smollm2-135m").glob("*.gguf"))
    if not found:
        pytest.skip(f"no {data() / 'smollm2-135m'}/*.gguf: lamina fetch smollm2-135m")
    return found[0]


@pytest.fixture(scope="session")
def minilm() -> Path:
    directory = data() / "minilm-l6"
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"no {directory}/tokenizer.json: lamina fetch minilm-l6")
    return directory
