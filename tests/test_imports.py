"""Who may import whom (CONTRIBUTING.md, "The house"), and what no file may do at all."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/lamina"
FILES = sorted(SOURCE.rglob("*.py"))

# From the top. A file may import from rows below its own; files and packages of one row may not import each other;
# within a package everything may import everything. `__init__` is lamina/__init__.py, which hands out the public names.
ROWS = (
    "__main__",
    "cli",
    "__init__",
    "train serve harness",
    "retrieve",
    "conformance catalogue report",
    "pictures",
    "editing",
    "accounting",
    "source",
    "adapting",
    "filling exporting",
    "opening",
    "locate",
    "surgery families parallel adapters objectives generation words",
    "model",
    "reading",
    "layers",
    "attend",
    "cache",
    "patterns",
    "marks data",
    "native document",
    "specs tokens weights text packaged machine",
    "durable figures",
    "errors",
)
FLOOR = {name: floor for floor, row in enumerate(reversed(ROWS)) for name in row.split()}

# A package that only some places may import, or none: (what, where).
RESERVED = (
    ("transformers", ("conformance",)),  # where a model of it is tried, and nothing of ours is made with it
    ("safetensors", ("weights",)),
    ("torch.distributed", ("parallel",)),
    ("pyarrow", ("data", "retrieve")),
    ("lancedb", ("retrieve",)),
    ("faiss", ("retrieve",)),
    ("datasets", ("data",)),
    ("lm_eval", ("harness",)),
    ("pickle", ("parallel",)),  # an unpickler that knows a list of names, for torch's own metadata
    ("cPickle", ()),
    ("dill", ()),
    ("shelve", ()),
    ("marshal", ()),
)
# Names that pip knows by another name than import does.
PACKAGES = {"yaml": "pyyaml", "lm_eval": "lm-eval", "faiss": "faiss-cpu"}


def home(path: Path) -> str:
    """The row member a file belongs to: the first part of its path below lamina/."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, wherever it stands: in functions and for type checkers too."""
    package = ("lamina", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def member(name: str) -> str:
    """The row member that `lamina.x.y` comes from: x where that is one, else the public names of lamina."""
    parts = name.split(".")
    inner = parts[1] if len(parts) > 1 else ""
    return inner if inner in FLOOR else "__init__"


def upward(path: Path, tree: ast.AST | None = None) -> Iterator[str]:
    here = home(path)
    for line, name in imported(path, tree):
        if name.split(".")[0] != "lamina":
            continue
        there = member(name)
        if there != here and FLOOR[there] >= FLOOR[here]:
            yield f"{path.relative_to(ROOT)}:{line}: {here} may not import {there}"


def test_every_file_has_a_row():
    assert {home(path) for path in FILES} <= FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path):
    assert list(upward(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_some_packages_are_for_some_places_only(path: Path):
    tree = ast.parse(path.read_text())
    names = [*imported(path, tree), *((node.lineno, ast.unparse(node)) for node in ast.walk(tree) if _is_path(node))]
    for line, name in names:
        for package, places in RESERVED:
            inside = name == package or name.startswith(f"{package}.")
            assert not inside or home(path) in places, f"{path.relative_to(ROOT)}:{line}: {name}"


def _is_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute)


def test_every_package_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    entries = [
        *project["dependencies"],
        *(each for name in ("data", "eval", "retrieval", "faiss", "transformers") for each in extras[name]),
    ]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for entry in entries}
    used = {name.split(".")[0] for path in FILES for _, name in imported(path)}
    foreign = used - sys.stdlib_module_names - {"lamina"}
    assert {PACKAGES.get(name, name) for name in foreign} <= declared


OUTSIDE = [
    path for name in ("benchmarks", "docs", "examples", "tests", "tools") for path in (ROOT / name).rglob("*.py")
]


def missing(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a file outside src/ takes from lamina and that are not there (lamina.x.__all__ is not asked)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "lamina"]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "lamina":
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            try:
                whole = importlib.import_module(module)
                if name and not hasattr(whole, name):
                    importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError as error:
                if str(error.name).split(".")[0] == "lamina":  # else it is a package of an extra
                    yield node.lineno, f"{module}.{name}".strip(".")


def test_what_scripts_and_tests_import_is_there():
    """Also where the script itself is not run on this machine: for want of weights, a device or a package."""
    found = [f"{path}:{line}: {what}" for path in OUTSIDE for line, what in missing(ast.parse(path.read_text()))]
    assert found == []


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that run what a file holds, or a shell."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen", "builtins.eval", "builtins.exec"):
            yield node.lineno, called
        if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "jit.load", "torch.jit.load"):
            yield node.lineno, called
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "dcp.load", "FileSystemReader"):
            yield node.lineno, called
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle"
        if keywords.get("shell", "False") != "False":
            yield node.lineno, "shell=True"
        if keywords.get("trust_remote_code", "False") != "False":
            yield node.lineno, "trust_remote_code"


def test_nothing_runs_what_a_file_holds():
    places = [
        *FILES,
        *(path for folder in ("examples", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")),
    ]
    found = [f"{path}:{line}: {what}" for path in places for line, what in forbidden(ast.parse(path.read_text()))]
    assert found == []


def test_these_tests_see_what_they_should():
    bad = (
        "import pickle\nfrom lamina.cli import main\ndef f():\n  from ..source import load\nfrom lamina import generate"
    )
    path = SOURCE / "layers/norm.py"
    tree = ast.parse(bad)
    assert [name for _, name in imported(path, tree)] == [
        "pickle", "lamina.cli.main", "lamina.generate", "lamina.source.load",
    ]  # fmt: skip
    assert {line.split(" may not import ")[1] for line in upward(path, tree)} >= {"__init__"}
    for line in (
        "eval('1')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
        "run(a, shell=True)",
        "pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "FileSystemReader(path)",
    ):
        assert len(list(forbidden(ast.parse(line)))) == 1, line
    for line in ("from lamina.cli.output import short", "import lamina.cli.outputs", "from lamina import nothing"):
        assert len(list(missing(ast.parse(line)))) == 1, line
    for line in (
        "from lamina import Model, surgery",
        "import lamina.cli.output",
        "from lamina.errors import LaminaError",
    ):
        assert list(missing(ast.parse(line))) == [], line
    for line in ("model.eval()", "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "run(a, shell=False)"):
        assert list(forbidden(ast.parse(line))) == [], line
