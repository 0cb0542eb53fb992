"""What programs that tests start import; and a real browser for the tests of pages, which are skipped without one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
"""A program that a test starts imports the tree that is tested, whatever is installed."""
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    " --no-first-run --disable-quic"
).split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--family", action="append", default=[], help="rows of tests/families.py that a file of families/ has"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--family=opt leaves the rows that families/opt.py reads, or that a file which imports it does. A file that is
    none of a family (rope.py) leaves all."""
    from lamina.families import FAMILIES

    homes = {model_type: home.partition(":")[0] for model_type, home in FAMILIES.items()}
    wanted = config.getoption("--family")
    if not set(wanted) & set(homes.values()):
        return
    import transformers

    from tests.families import Row

    folder = ROOT / "src/lamina/families"
    use = re.compile(rf"lamina\.families(\.| import [^\n]*\b)({'|'.join(wanted)})\b")
    reads = {home for home in homes.values() if home in wanted or use.search((folder / f"{home}.py").read_text())}

    def left(item: pytest.Item) -> bool:
        one = (
            item.callspec.params.get("case")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        return not isinstance(one, Row) or homes.get(getattr(transformers, one.config).model_type) in reads

    config.hook.pytest_deselected(items=[item for item in items if not left(item)])
    items[:] = [item for item in items if left(item)]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no chromium on this machine: install it, or name it in CHROMIUM")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, tmp_path: Path) -> Iterator[Any]:
    """Open a page; anything it complains of, asks for or pops up fails the test."""
    contexts, trouble = [], []

    def call(text: str, width: int = 1200, dark: bool = False) -> Any:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        opened = context.new_page()
        opened.on("console", lambda message: trouble.append(message.text))
        opened.on("pageerror", lambda error: trouble.append(str(error)))
        opened.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        opened.on("request", lambda r: trouble.append(r.url) if r.url != path.as_uri() else None)
        opened.goto(path.as_uri())
        return opened

    yield call
    for context in contexts:
        context.close()
    assert trouble == []
