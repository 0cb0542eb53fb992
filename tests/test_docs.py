"""The documentation is true: its Python runs and prints what it says, its transcripts are real, its links lead home.

In README.md and docs/*.md the ```python blocks of a page run one after the other in one namespace and one empty
directory; a ```text block that follows one directly is what it prints. In a ```console block, lines that begin with
`$ ` are commands of lamina, and what follows is what they print; a line `...` stands for any lines. A block after the
line `<!-- needs: NAME -->` needs a packaged model: such blocks of a page have a namespace of their own.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamina import families, specs
from lamina.cli import main
from lamina.packaged import packaged_path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<said>.*?)^```\n)?",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLES = {"layer_alone": None, "change_a_layer": None, "look_inside": "smollm2-135m"}


@dataclass(frozen=True)
class Block:
    """One fenced block that is run."""

    kind: str  # python, console
    code: str
    said: str | None  # what it prints, where the page says so
    needs: str | None  # the packaged model that it needs
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["kind"] in ("python", "console"):
            line = text.count("\n", 0, match.start("code"))
            found.append(Block(match["kind"], match["code"], match["said"], match["needs"], line))
    return found


def pages_with(weights: bool) -> list:
    chosen = [page for page in PAGES if any((block.needs is not None) is weights for block in blocks(page))]
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in chosen]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module to run a page in, in an empty directory. What the page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    registries = (specs._CLASSES, families.FAMILIES)
    before = [set(registry) for registry in registries]
    yield module
    for registry, known in zip(registries, before, strict=True):
        for name in registry.keys() - known:
            made = sys.modules.get(getattr(registry[name], "__module__", ""))
            if registry is families.FAMILIES or made is None or made is module or made.__spec__ is None:
                del registry[name]  # not what a page was the first to import
    for name in [name for name, made in sys.modules.items() if name.startswith("lamina.") and made.__spec__ is None]:
        del sys.modules[name]  # made by hand on a page
    families.family.cache_clear()
    families.sizes.cache_clear()


def run(page: Path, chosen: list[Block], room: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for block in chosen:
        where = f"{page.name}, line {block.line}"
        if block.kind == "console":
            transcript(block.code, where, capsys)
            continue
        # Empty lines in front, so that a traceback names the line of the page.
        code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
        exec(code, room.__dict__)
        printed = capsys.readouterr().out
        if block.said is not None:
            assert matches(printed, block.said), f"{where} prints:\n{printed}"
        else:
            assert printed == "", f"{where} prints what the page does not show:\n{printed}"


def transcript(text: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run each command of a transcript and compare what it prints."""
    commands = re.split(r"^\$ ", text, flags=re.M)
    assert commands[0] == "", f"{where}: a transcript begins with `$ `"
    for one in commands[1:]:
        line, _, said = one.partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "lamina", f"{where}: {line}"
        status = main(arguments)
        printed = capsys.readouterr()
        assert matches(printed.out + (printed.err if status else ""), said), f"{where}: {line}\n{printed}"


def matches(printed: str, said: str) -> bool:
    """Whether two texts are equal, spaces at the ends of lines aside, and `...` standing for any lines."""
    lines = [re.escape(line.rstrip()) for line in said.rstrip().splitlines()]
    pattern = "\n".join(".*" if line.strip() == re.escape("...") else line for line in lines)
    text = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
    return re.fullmatch(pattern, text, re.S) is not None


@pytest.mark.parametrize("page", pages_with(weights=False))
def test_page_runs(page: Path, room: types.ModuleType, capsys: pytest.CaptureFixture[str]):
    run(page, [block for block in blocks(page) if block.needs is None], room, capsys)


@pytest.mark.parametrize("page", pages_with(weights=True))
def test_page_runs_on_packaged_models(page: Path, room: types.ModuleType, capsys: pytest.CaptureFixture[str]):
    chosen = [block for block in blocks(page) if block.needs is not None]
    for name in {block.needs for block in chosen}:
        skip_without(name)
    run(page, chosen, room, capsys)


def skip_without(name: str | None) -> None:
    if name is not None and packaged_path(name) is None:
        pytest.skip(f"{name} is not here; get it with: lamina fetch {name}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, room: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys):
    skip_without(EXAMPLES[name])
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, part = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if part:
            assert part in anchors(linked), f"{page.name} links to {target}; {linked.name} has no such heading"


def anchors(page: Path) -> set[str]:
    """The names of the headings of a page, as they stand behind # in an address."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_index():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_the_tour_names_every_room():
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2].partition("\n## ")[0]
    rooms = [
        path for path in (ROOT / "src/lamina").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    for room in rooms:
        name = room.name if room.is_file() else f"{room.name}/"
        assert f"`{name}`" in tour, f"CONTRIBUTING.md, The house: no row names {name}"


def test_generated_parts_are_as_the_code_is():
    build = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
    assert build is not None and build.loader is not None
    module = importlib.util.module_from_spec(build)
    build.loader.exec_module(module)
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not as the code is: run make docs"
