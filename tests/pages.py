"""What tests look for in pages of HTML, and what they show in them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&"\'\u202e</span></div>'


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


def assert_complete(text: str) -> None:
    """A page that asks for nothing and runs nothing but what it holds."""
    elements = Elements(text).found
    assert not {"link", "img", "iframe", "object", "embed", "form", "base", "video", "audio"} & {
        tag for tag, _ in elements
    }
    for tag, attributes in elements:
        assert not {"src", "href", "action", "srcset", "background"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    outside = re.findall(r"(?:https?:)?//[\w.]+", text)
    assert set(outside) <= {"http://www.w3.org"}  # the name of SVG, which nothing loads
    assert "@import" not in text and "url(" not in text
