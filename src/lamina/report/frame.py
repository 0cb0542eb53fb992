"""The page around a report: complete in itself, and forbidden to load anything or to run any script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from importlib.resources import files


def page(title: str, subtitle: str, body: str, script: str = "", style: str = "") -> str:
    """The whole document. `body` is HTML, in which everything that others wrote is escaped already; the title and
    the subtitle are text. `script`, if any, is the only one that the page's own policy lets run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'" if script else "script-src 'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; {allowed}; base-uri 'none'"
    name = escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">
<title>{name} · lamina</title><style>{asset("page.css")}{style}</style></head>
<body><header><h1>{name}</h1><p class="soft">{escape(subtitle)}</p></header>
<main>{body}</main>
<footer class="soft">Written by lamina. This file is complete in itself: it loads nothing.</footer>
{f"<script>{script}</script>" if script else ""}</body></html>
"""


def asset(name: str) -> str:
    """A file of this folder, as text."""
    return files(__package__ or "lamina.report").joinpath(name).read_text(encoding="utf-8")


def facts(named: Mapping[str, str]) -> str:
    """The large figures at the head of a page."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in named.items())
    return f'<dl class="facts">{cells}</dl>'
