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


def short(number: float) -> str:
    """1234567 -> "1.23 M"."""
    for power, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power * 0.9995:
            return f"{number / power:#.3g} {unit}".replace(". ", " ")
    return f"{number:.0f} "


def size(number: float) -> str:
    """67645734912 -> "63.0 GiB"."""
    for power, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return f"{number:.0f} B"
