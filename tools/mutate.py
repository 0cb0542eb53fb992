"""Mutation on entry: each numeric feature is deleted or bent in a copy of the tree, and some test must fail.

    python tools/mutate.py                  every mutation of tools/mutations/, 2 at a time
    python tools/mutate.py softcap window   those whose feature or file has one of these words
    python tools/mutate.py --generic        also operators, comparisons and numbers of the layers, one by one
    python tools/mutate.py --check          only: does every snippet still stand exactly once?

The working tree is never touched. Prints one row a mutation (`--json`: one document), exits 1 if a declared one
survives, 2 if a snippet no longer stands in its file: then the table has to follow the code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/lamina")
TIMEOUT = 240  # seconds for the tests of one mutation; a mutant that hangs is caught too


@dataclass(frozen=True)
class Mutation:
    """`old` in `file` (below src/lamina) becomes `new`; `tests` are those that must notice."""

    feature: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The mutated file. Raises LookupError when the snippet does not stand in it exactly once."""
        if text.count(self.old) != 1:
            raise LookupError(
                f"{self.file}: stands {text.count(self.old)} times, not once: {self.old!r} ({self.feature})"
            )
        mutated = text.replace(self.old, self.new)
        ast.parse(mutated)
        return mutated


NAMED = (
    "layers/longformer.py",
    "layers/bigbird.py",
    "marks.py",
    "exporting.py",
    "adapting.py",
    "accounting.py",
    "train/loader.py",
)
"""Files whose tests are those that tools/mutations/ names alone: of the families that have them, or a few of a file."""


def tests_of(file: str) -> tuple[str, ...]:
    """The tests that are there to notice a fault in a file, with options of pytest where not all of them are."""
    name = Path(file).stem
    folder = Path(file).parent.name
    if file in NAMED:
        return ()
    if name == "auto_map" or folder == "remote":
        return ("tests/test_auto_map.py",)
    if name == "gguf_writing":
        return ("tests/test_gguf_writing.py",)
    if folder == "layers":
        shared = {
            "router": "experts",
            "capacity": "experts",
            "router_loss": "experts",
            "expert_choice": "experts",
            "dispatch": "experts",
            "batch_norm": "product_keys",
            "stack": "block",
            "call": "attention",
            "cached": "attention",
            "gated_memory": "infini",
            "segments": "infini",
            "most_used": "compressive",
        }
        return (f"tests/layers/test_{shared.get(name, name)}.py",)
    if folder == "parallel":
        own = {"axes": ("tests/parallel/test_plan.py",), "checkpoint": ("tests/parallel/test_checkpoint.py",)}
        return own.get(name, ())
    if folder == "generation":
        return (f"tests/generation/test_{ {'limits': 'beam', 'feeder': 'loop'}.get(name, name) }.py",)
    if folder == "data":
        shared = {"column": "prepared", "writer": "prepared"}
        shared |= dict.fromkeys(("sources", "wishes", "workplace", "division", "learning", "lost"), "prepare")
        return (f"tests/data/test_{shared.get(name, name)}.py",)
    if folder == "weights":
        shared = {"mapped": "weights/test_ctranslate2", "rules": "test_families_ctranslate2"}
        return (f"tests/{shared.get(name, f'weights/test_{name}')}.py",)
    if folder == "objectives":
        shared = {"prefix": "spans", "next_sentence": "masked", "loss": "distillation", "causal": "retrieval"}
        known = ("masked", "spans", "denoising", "distillation", "stream", "retrieval")
        shared |= {"boundaries": "stream", "rows": "stream"} | {one: one for one in known}
        return (f"tests/objectives/test_{shared.get(name, 'pairs')}.py",)
    if folder == "train":
        through = {
            "checkpoint": ("trees", "generators", "manifest"),
            "run": ("records", "directory"),
            "report": ("curves", "past"),
            "guards": ("finite", "fitting"),
            "loop": ("sums", "optimiser", "precision"),
            "training": ("building", "around", "evaluating", "saving"),
        }
        name = next((test for test, stems in through.items() if name in stems), name)
        return (f"tests/train/test_{name}.py",)
    if folder == "retrieve":
        own = ("accelerator", "editing", "knn", "lance", "neighbours", "overlap", "recall", "states")
        return () if name in own else ("tests/retrieve/test_database.py",)
    if folder == "adapters":
        return ("tests/adapters/test_lora.py", "tests/adapters/test_peft.py")
    if folder == "conformance" and name in ("decoding", "files", "learning", "refusals", "state", "tokens", "report"):
        return ("tests/conformance/test_rows.py",)
    if folder == "conformance" and name in ("pretrained", "subject"):
        return ("tests/conformance/test_subjects.py",)
    if folder == "surgery":
        own = {"retrofit": "retrofit", "build": "retrofit", "verdict": "verdict", "stream": "depth"}
        own |= {"positions": "tables", "vocabulary": "tables"}
        own |= {one: one for one in ("depth", "rope", "norms", "tokens")}
        own |= {"encoders": "grafts", "mixture": "merging", "adapter": "merging"}
        own |= {one: one for one in ("grafts", "reading", "merging")}
        own |= dict.fromkeys(("calibration", "fitting", "least_squares", "moments"), "fitting")
        own |= {one: one for one in ("latent", "longformer", "upcycle", "width")}
        return (f"tests/surgery/test_{own.get(name, 'operations')}.py",)
    if folder == "catalogue":
        return ("tests/test_catalogue.py",)
    if folder == "families":
        return ("tests/test_families_fields.py", "tests/test_families.py", f"--family={name}")
    whole = ("attend", "cache", "model", "patterns", "report", "conformance")  # rooms with one file of tests
    name = folder if folder in whole else name
    return {"tokens": ("tests/test_patterns.py", "tests/test_cache.py")}.get(name, (f"tests/test_{name}.py",))


def declared() -> list[Mutation]:
    """The tables of tools/mutations/, a file a room."""
    rows = []
    for path in sorted(Path(__file__).with_name("mutations").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        also = getattr(module, "ALSO", {})
        for file, entries in module.MUTATIONS.items():
            tests, more = tests_of(file), also.get(file, ())
            # What is shared by a room of many files takes longest, and is tried last.
            tests = more + tests if file.startswith(("families/", "attend/")) else tests + more
            rows += [Mutation(feature, file, old, new, tests) for feature, old, new in entries]
    return rows


def stale(mutations: list[Mutation]) -> list[str]:
    """What no longer stands in its file exactly once, or no longer parses."""
    found = []
    for mutation in mutations:
        try:
            mutation.apply((ROOT / PACKAGE / mutation.file).read_text())
        except (OSError, LookupError, SyntaxError) as error:
            found.append(str(error))
    return found


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def generic(file: str) -> Iterator[tuple[str, str]]:
    """(what, mutated text) for each operator, comparison, sign and number in the functions of a file.

    Annotations, checks of specs, messages, docstrings and shapes in type comments are no numerics, and are left out.
    """
    text = (ROOT / PACKAGE / file).read_text()
    for index, (line, what) in enumerate(_places(ast.parse(text))):
        tree = ast.parse(text)
        _bend(tree, index)
        yield f"line {line}: {what}", ast.unparse(tree)


def _places(tree: ast.Module) -> list[tuple[int, str]]:
    return [(node.lineno, what) for node, what in _sites(tree)]


def _sites(tree: ast.AST) -> list[tuple[ast.expr, str]]:
    found: list[tuple[ast.expr, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name in ("check", "initialise", "_check"):
            return
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.AnnAssign | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not _types(node):
            found.append((node, type(node.op).__name__))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            found.append((node, type(node.ops[0]).__name__))
        elif (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            found.append((node, "minus"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            found.append((node, repr(node.value)))
        if isinstance(node, ast.FunctionDef):  # not the annotations, not the defaults
            children: list[ast.AST] = list(node.body)
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            visit(child)

    visit(tree)
    return found


def _types(node: ast.BinOp) -> bool:
    """`X | None` and `A | B` of classes."""
    sides = (node.left, node.right)
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(s, ast.Constant) or (isinstance(s, ast.Name) and s.id[0].isupper()) for s in sides
    )


def _bend(tree: ast.AST, index: int) -> None:
    node, _ = _sites(tree)[index]
    if isinstance(node, ast.BinOp):
        node.op = SWAPS[type(node.op)]()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()  # pyright: ignore
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Constant):
        node.value = node.value + 1  # pyright: ignore[reportOperatorIssue]


@dataclass
class Trial:
    """One mutation under way in a child process of its own."""

    feature: str
    file: str
    pid: int
    folder: Path
    started: float
    report: Path


def start(feature: str, file: str, mutated: str, tests: tuple[str, ...], folder: Path) -> Trial:
    """Run the tests on the copy in `folder`, in a fork that has torch imported already."""
    target = folder / PACKAGE / file
    target.write_text(mutated)
    report = folder / "report"
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            os.setsid()
            os.chdir(folder)
            sys.path[:0] = [str(folder / "src"), str(folder)]
            with report.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                import pytest

                there = [test for test in tests if test.startswith("--") or Path(test.split("::")[0]).exists()]
                status = int(pytest.main(["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", *there]))
        except BaseException:  # it must not go on as a second parent
            report.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return Trial(feature, file, pid, folder, time.monotonic(), report)


def finish(trial: Trial) -> tuple[str, float] | None:
    """("killed" | "survived" | "timed out" | "no tests" | "broken", seconds), or None while it runs."""
    pid, status = os.waitpid(trial.pid, os.WNOHANG)
    seconds = time.monotonic() - trial.started
    if pid == 0:
        if seconds < TIMEOUT:
            return None
        os.killpg(trial.pid, signal.SIGKILL)
        os.waitpid(trial.pid, 0)
        return "timed out", seconds
    # Pytest: 0 all passed, 1 some failed, 5 none found. All else (2: a file that cannot be imported) proves nothing.
    outcomes = {0: "survived", 1: "killed", 5: "no tests"}
    return outcomes.get(os.waitstatus_to_exitcode(status), "broken"), seconds


def unchanged(
    jobs: list[tuple[str, str, str, tuple[str, ...]]], file: str
) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """The control: each file of tests over the code as it stands, with all that any job asks of it."""
    text = (ROOT / PACKAGE / file).read_text()
    asked: dict[str, list[set[str]]] = {}
    for *_, tests in jobs:
        options = {test for test in tests if test.startswith("--")}
        for test in set(tests) - options:
            asked.setdefault(test, []).append(options)
    return [
        ("unchanged", file, text, (test, *(sorted(set().union(*found)) if all(found) else ())))
        for test, found in sorted(asked.items())
    ]


def clean_copy(folder: Path) -> None:
    """What the tests need, without history and caches."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
    for name in ("src", "tests", "benchmarks"):  # the tests take models from the benchmarks
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE"):  # the licence is a text to train on
        shutil.copy(ROOT / name, folder)


def run(jobs: list[tuple[str, str, str, tuple[str, ...]]], workers: int) -> list[dict]:
    """The outcome of each job (feature, file, mutated text, tests)."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        # Copies are made good again from a copy: the tree may change under a run of many minutes.
        pristine = Path(scratch) / "pristine"
        clean_copy(pristine)
        free = [Path(scratch) / str(number) for number in range(workers)]
        for folder in free:
            shutil.copytree(pristine, folder)
        waiting, under_way = list(reversed(jobs)), list[Trial]()
        while waiting or under_way:
            while waiting and free:
                under_way.append(start(*waiting.pop(), free.pop()))
            for trial in list(under_way):
                outcome = finish(trial)
                if outcome is None:
                    continue
                lines = trial.report.read_text().splitlines() if trial.report.exists() else []
                caught = next((line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))), "")
                row = {
                    "feature": trial.feature,
                    "file": trial.file,
                    "outcome": outcome[0],
                    "seconds": round(outcome[1], 1),
                    "by": caught,
                }
                rows.append(row)
                print(f"{outcome[0]:9} {outcome[1]:6.1f}s  {trial.file}: {trial.feature}", file=sys.stderr, flush=True)
                shutil.copy(pristine / PACKAGE / trial.file, trial.folder / PACKAGE / trial.file)
                under_way.remove(trial)
                free.append(trial.folder)
            time.sleep(0.05)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations whose feature or file has one of these")
    parser.add_argument(
        "--generic", action="store_true", help="also bend operators and numbers of the layers one by one"
    )
    parser.add_argument("--check", action="store_true", help="only see that every snippet still stands")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    mutations = declared()
    if found := stale(mutations):
        print("\n".join(found), file=sys.stderr)
        return 2
    wanted = lambda *words: not options.words or any(w in text for w in options.words for text in words)  # noqa: E731
    jobs = [
        (m.feature, m.file, m.apply((ROOT / PACKAGE / m.file).read_text()), m.tests)
        for m in mutations
        if wanted(m.feature, m.file)
    ]
    if options.check:
        print(f"{len(mutations)} mutations, each of them stands")
        return 0
    if options.generic:
        for path in sorted((ROOT / PACKAGE / "layers").glob("*.py")):
            file = f"layers/{path.name}"
            if wanted(file) and path.stem not in ("__init__", "call"):
                jobs += [(what, file, text, tests_of(file)) for what, text in generic(file)]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    import pytest  # noqa: F401 - imported here once, so that every fork has them
    import torch

    with contextlib.suppress(ImportError):
        import transformers.modeling_utils  # noqa: F401

    torch.set_num_threads(1)
    # First the code as it stands: a test that fails anyway would kill every mutant.
    control = run(unchanged(jobs, next(iter(mutations)).file), options.workers)
    if failed := [row for row in control if row["outcome"] not in ("survived", "no tests")]:
        print("\n".join(f"without any mutation: {row['outcome']} {row['by']}" for row in failed), file=sys.stderr)
        return 2
    rows = run(jobs, options.workers)
    survivors = [row for row in rows if row["outcome"] != "killed"]
    if options.json:
        print(json.dumps({"mutations": rows, "survivors": len(survivors)}, indent=1))
    else:
        print(f"{len(rows)} mutations, {len(survivors)} survive")
        for row in survivors:
            print(f"  {row['outcome']}: {row['file']}: {row['feature']}")
    # Generic ones include some that change nothing (`<` for `<=` where both sides agree): they are for reading.
    return 1 if any(not row["feature"].startswith("line ") for row in survivors) else 0


if __name__ == "__main__":
    sys.exit(main())
