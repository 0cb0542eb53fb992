"""Small databases, made on the spot: a tiny BERT embeds the chunks of texts of a few words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lamina
from lamina.data import Prepared, open_prepared
from lamina.data.prepare import PrepareSpec, prepare
from lamina.data.sources import find
from lamina.families import Fields, family
from lamina.retrieve import Database, Embedder, Engine, build, open_database
from tests import small, tiny

CHUNK = 7
EXACT = Engine()


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Sentences of random words, with letters that take several bytes."""
    random = np.random.default_rng(seed)
    words = [*tiny.WORDS[5:], "über", "日本", "𝒳"]
    return [" ".join(random.choice(words, random.integers(1, longest))) for _ in range(count)]


def rows(path: Path, documents: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


def prepared(directory: Path, *sources: Path, **wishes: Any) -> Prepared:
    prepare(find(map(str, sources)), directory, tiny.tokenizer(), PrepareSpec(**wishes))
    return open_prepared(directory)


def embedder_at(directory: Path, seed: int = 0) -> Path:
    """A tiny BERT that sees at most 32 tokens."""
    return tiny.checkpoint(directory, tiny.BERT, seed)


def database(
    root: Path, documents: Sequence[str], chunk: int = CHUNK, engine: Engine = EXACT, **more: Any
) -> tuple[Database, Prepared]:
    """A database of documents, and the text that it is made of."""
    source = prepared(root / "text", rows(root / "texts.jsonl", documents))
    model = Embedder(embedder_at(root / "bert"))
    build(source, root / "index", model, chunk=chunk, engine=engine, **more)
    return open_database(root / "index"), source


def reader_at(directory: Path, chunk: int = CHUNK, context: int = 64) -> Path:
    """A tiny RETRO that reads chunks of the tiny tokenizer, with weights as large as show what it reads."""
    fields = {
        "layers": 3,
        "width": 18,
        "heads": 3,
        "head_dim": 8,
        "hidden": 24,
        "vocabulary": tiny.tokenizer().vocabulary,
    }
    fields |= {"context": context, "chunk": chunk, "first": 2, "every": 1, "encoder_width": 14, "encoder_heads": 2}
    fields |= {"encoder_head_dim": 6, "encoder_hidden": 20, "encoder_layers": 1}
    lamina.save(small.build(family("retro").spec(Fields(fields))).float(), directory, "native")
    tiny.tokenizer().save(directory)
    return directory


def chunks_of(documents: Sequence[str], chunk: int) -> list[tuple[int, list[int], list[int]]]:
    """(document, chunk, the chunk after it) of each, by slicing."""
    found = []
    for number, text in enumerate(documents):
        ids = tiny.tokenizer().encode(text, special=False, control=False)
        for at in range(0, len(ids), chunk):
            found.append((number, ids[at : at + chunk], ids[at + chunk : at + 2 * chunk]))
    return found


def filled(ids: Sequence[int], size: int) -> list[int]:
    return [*ids, *([-1] * (size - len(ids)))]


def vectors_of(found: Database, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Of each chunk by itself, from its text."""
    model, tokenizer = lamina.load(found.spec.embedder.source), tiny.words()
    said = [tiny.tokenizer().decode(ids).strip("�") for ids in chunks]
    return torch.cat([lamina.embed(model, [text], tokenizer) for text in said])
