"""tools/mutate.py: its table follows the code, and it knows a mutant that is caught from one that is not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.mutate import PACKAGE, ROOT, Mutation, declared, generic, run, stale, unchanged


def test_every_snippet_still_stands():
    mutations = declared()
    assert len(mutations) > 300
    assert stale(mutations) == []
    for mutation in mutations:
        assert all(_stands(test) for test in mutation.tests if not test.startswith("--")), mutation
    assert {m.file.split("/")[0] for m in mutations} >= {"patterns", "attend", "cache", "layers", "families"}


def _stands(test: str) -> bool:
    """Whether a file of tests is there, or the function that FILE::TEST names."""
    file, _, function = test.partition("::")
    return (ROOT / file).exists() and (not function or f"def {function}(" in (ROOT / file).read_text())


def test_a_snippet_that_is_gone_is_refused():
    gone = Mutation("gone", "patterns/near.py", "no such line", "", ())
    twice = Mutation("twice", "patterns/near.py", "def over", "", ())
    broken = Mutation("broken", "patterns/near.py", "class Causal(Pattern):", "class (", ())
    found = stale([gone, twice, broken, Mutation("no file", "none.py", "a", "b", ())])
    assert len(found) == 4 and "stands 0 times" in found[0] and "gone" in found[0]


def test_generic_mutants_differ_from_the_code_and_parse():
    text = ast.unparse(ast.parse((ROOT / PACKAGE / "layers/bias.py").read_text()))
    mutants = [mutated for _, mutated in generic("layers/bias.py")]
    assert len(mutants) > 20 and text not in mutants and len(set(mutants)) == len(mutants)
    for mutated in mutants:
        ast.parse(mutated)


def test_the_control_asks_for_no_more_than_the_mutations_do():
    """All of x.py, since one of them asks for all, and of y.py the rows of two families."""
    asked = [("x.py", "y.py", "--family=opt"), ("y.py", "--family=bart"), ("x.py",)]
    rows = unchanged([("feature", "file", "text", tests) for tests in asked], "patterns/near.py")
    assert [tests for *_, tests in rows] == [("x.py",), ("y.py", "--family=bart", "--family=opt")]
    text = (ROOT / PACKAGE / "patterns/near.py").read_text()
    assert {row[:3] for row in rows} == {("unchanged", "patterns/near.py", text)}


@pytest.mark.slow
def test_rows_of_a_family_are_those_of_what_imports_it_too():
    """LED's layers are BART's; no file but its own reads OPT."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--family=bart", "tests/test_families.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = re.findall(r"::test_logits\w+\[[\d-]*([a-z]+)", done.stdout)
    assert {"bart", "led"} <= set(rows) and not {"opt", "bloom"} & set(rows)


@pytest.mark.slow
def test_caught_and_not_caught(tmp_path: Path):
    """In a process of its own: a fork of one that has imported lamina already would test that one."""
    program = (
        "from tools.mutate import PACKAGE, ROOT, Mutation, run\n"
        "text = (ROOT / PACKAGE / 'reading.py').read_text()\n"
        "wrong = text.replace('torch.where(real, position, HOLE)', 'position')\n"
        "jobs = (('a', wrong), ('b', text), ('c', 'import nothing_at_all'))\n"
        "rows = run([(name, 'reading.py', code, ('tests/test_reading.py',)) for name, code in jobs], 2)\n"
        "print(sorted((row['feature'], row['outcome']) for row in rows))\n"
    )
    before = (ROOT / PACKAGE / "reading.py").read_bytes()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[('a', 'killed'), ('b', 'survived'), ('c', 'broken')]"
    assert (ROOT / PACKAGE / "reading.py").read_bytes() == before
    assert callable(run)
