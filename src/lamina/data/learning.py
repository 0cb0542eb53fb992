"""The tokenizer that a preparation learns from its own sources, kept beside the journal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lamina.data.sources import CHUNK, Source, Tally, rows, texts
from lamina.data.training import train
from lamina.data.wishes import TYPES, PrepareSpec
from lamina.data.workplace import JOURNAL
from lamina.durable import write_file
from lamina.errors import LaminaError
from lamina.text import Tokenizer, from_directory


def learnt_tokenizer(
    work: Path,
    journal: dict[str, Any],
    key: str,
    wish: str,
    sources: Sequence[Source],
    spec: PrepareSpec,
    special: str,
    most: int,
) -> Tokenizer:
    """Train a tokenizer, or take the one that an earlier run had trained when it was killed."""
    if journal.get("tokenizer"):
        return from_directory(work / "tokenizer")
    kind, _, size = wish.partition(":")
    if size and not size.isdecimal():
        raise LaminaError(f"tokenizer {wish!r}: {size!r} is no size; write bpe:8192")
    # All characters are needed, and to collect them is quick; the others learn from the beginning.
    learnt = _learnt(sources, spec, None if kind == "characters" else most)
    made = train(kind, learnt, size=int(size) if size else None, special=special)
    made.save(work / "tokenizer")
    write_file(work / JOURNAL, json.dumps({"key": key, "tokenizer": True}).encode())
    return from_directory(work / "tokenizer")


def _learnt(sources: Sequence[Source], spec: PrepareSpec, most: int | None) -> Iterator[str]:
    taken = 0
    for source in sources:
        tally = Tally()
        if source.kind == "text":
            found = texts(source, tally, split_on=spec.split_on, characters="replace", end=0.0)
            parts = (part.texts for part in found)
        else:
            parts = rows(source, tally, spec.fields, TYPES[spec.kind], "replace")
        for values in parts:
            for value in values:
                for text in value if isinstance(value, list) else [value]:
                    if not isinstance(text, str):
                        continue
                    for start in range(0, len(text), CHUNK >> 4):
                        yield text[start : start + (CHUNK >> 4)]
                    taken += len(text.encode())
            if most is not None and taken >= most:
                return
