"""The page of one kind of layer, as a document: what is written of it, and what specs and accounts say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from lamina.accounting import Account, Row, account
from lamina.catalogue import users
from lamina.catalogue.kind import Counted, Kind
from lamina.families import sizes

counting = cache(account)
"""An account for each model, however many pages ask."""


def page(kind: Kind, *, costs: bool = True) -> dict[str, Any]:
    """Everything that is known of a kind of layer, ready for JSON; without costs, no model is counted for it."""
    asked = [one for one in kind.counted if one.model in sizes()] if costs else []
    return {
        "name": kind.name,
        "title": kind.title,
        "what": kind.what,
        "why": kind.why,
        "equation": kind.equation,
        "symbols": [{"symbol": symbol, "means": means} for symbol, means in kind.symbols],
        "built": kind.built,
        "files": [f"lamina/{file}" for file in kind.files],
        "families": users(kind.used) if kind.built else [],
        "variants": [
            {
                "name": variant.name,
                "rule": variant.rule,
                "built": kind.built and variant.built,
                "told_by_specs": variant.used is not None,
                "families": users(variant.used),
            }
            for variant in kind.variants
        ],
        "cost": {"rule": kind.cost, "counted": [counted(one) for one in asked]},
        "pitfalls": list(kind.pitfalls),
        "corrections": [asdict(one) for one in kind.corrections],
        "sources": [asdict(one) for one in kind.sources],
        "example": {"about": kind.example.about, "code": kind.example.code, "prints": kind.example.prints},
    }


def counted(what: Counted) -> dict[str, Any]:
    """The parts of a published model that fit, counted together."""
    found: Account = counting(what.model, context=what.context)
    rows = [row for path, row in _flat(found.rows) if any(fnmatchcase(path, part) for part in what.parts)]
    return {
        "model": what.model,
        "what": what.called,
        "parts": sum(row.repeat for row in rows),
        "parameters": sum(row.parameters for row in rows),
        "parameters_of_model": found.parameters,
        "flops_per_token": sum(row.flops_per_token for row in rows),
        "flops_per_token_of_model": found.flops_per_token,
        "cache_bytes": sum(row.cache_bytes for row in rows),
        "context": found.context,
        "shows": list(what.shows),
        "dtype": found.dtype,
    }


def _flat(rows: Iterable[Row], above: str = "") -> Iterator[tuple[str, Row]]:
    for row in rows:
        path = f"{above}{row.name}"
        yield path, row
        yield from _flat(row.parts, f"{path}.")
