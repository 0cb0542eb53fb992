"""Commands answer at once: nothing heavy is imported until it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

import lamina

HEAVY = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "yaml")


def imported_by(program: str) -> set[str]:
    """What of the heavy packages a new interpreter has imported when this program is done."""
    tail = f"\nimport sys\nprint('heavy', *(name for name in {HEAVY!r} if name in sys.modules))"
    command = [sys.executable, "-c", program + tail]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_a_program_that_a_test_starts_imports_what_the_test_does(tmp_path: Path):
    program = [sys.executable, "-c", "import lamina; print(lamina.__file__)"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == lamina.__file__


def test_importing_lamina_imports_nothing_heavy():
    assert imported_by("import lamina") == set()


def test_listing_the_public_names_imports_nothing_heavy():
    assert imported_by("import lamina; dir(lamina); getattr(lamina, '__version__', None)") == set()


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str):
    program = f"""
import sys
from lamina.cli import main
sys.argv = ["lamina", {option!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert imported_by(program) == set()


def test_attention_does_not_bring_the_compiler():
    """FlexAttention is compiled at its first use on CUDA, and not before."""
    program = "import sys, lamina.attend; assert 'torch._dynamo' not in sys.modules"
    assert "torch" in imported_by(program)
