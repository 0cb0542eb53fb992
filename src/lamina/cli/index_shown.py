"""What the commands of `lamina index` say of a database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.cli.output import table
from lamina.figures import size

if TYPE_CHECKING:
    from lamina.retrieve import IndexSpec
    from lamina.retrieve.manifest import TableSpec


def about(spec: IndexSpec) -> dict[str, Any]:
    embedder = {key: value for key, value in spec.embedder.to_dict().items() if key != "type"}
    found = {name: getattr(spec, name) for name in ("rows", "chunk", "documents", "width", "engine", "tokenizer")}
    found |= {"embedder": embedder, "sources": len(spec.origins), "notes": list(spec.notes)}
    return found | {"bytes": sum(file.bytes for file in spec.files), "table": _table(spec.table)}


def _table(found: TableSpec | None) -> dict[str, Any] | None:
    return None if found is None else {key: value for key, value in found.to_dict().items() if key != "type"}


def lines_of(directory: Path, spec: IndexSpec) -> list[str]:
    embedder, rows = spec.embedder, [(f"{spec.rows:,}", f"{spec.documents:,}", str(spec.chunk), str(spec.width))]
    lines = [str(directory), *table(("rows", "documents", "chunk", "width"), rows)]
    lines.append(f"embedder {embedder.source} ({embedder.dtype}, {embedder.pooling}, SHA-256 {embedder.hash[:12]}...)")
    lines.append(f"tokenizer SHA-256 {spec.tokenizer[:12]}...; {size(sum(file.bytes for file in spec.files))} of files")
    if spec.table is None:
        lines.append("engine exact: every row is compared")
        if spec.rows > 500_000:
            lines.append("that is slow for so many rows: --engine lance has an index")
    elif spec.table.lists:
        at = f"{spec.table.probes} of {spec.table.lists} lists are looked into"
        lines.append(f"engine lance: {at}; recall of the 10 nearest {spec.table.recall:.3f}, measured at the build")
    else:
        lines.append("engine lance: too few rows for an index, so every row is compared")
    return [*lines, *spec.notes]
