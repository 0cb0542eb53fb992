"""A tokenizer as the metadata of a GGUF file: the inverse of `text/gguf.py`, kept only where it reads back the same."""

from __future__ import annotations

import json
from typing import Any

from lamina.errors import CheckpointError, UnsupportedError
from lamina.text.document import Document
from lamina.text.gguf import IDS, KEY, from_gguf
from lamina.text.pretokenizers import TABLE, Pre
from lamina.text.sentencepiece import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER
from lamina.text.tokenizer import Tokenizer

PROBE = (
    "The quick brown fox isn't 12345 6 years old; it'll cost $3.14, or 1,000,000!\n\n\tfor (i = 0; i < 10; ++i) {\r\n"
    '        print("höher, straße, naïve")  # a_b-C d.E\n    }\n\n\n  Ünïcödé  Привет, мир! Γειά σου '
    "你好，世界 こんにちは 안녕하세요 مرحبا नमस्ते 🦙🚀 "
    "👩\u200d👧 e\u0301 ½ ² Ⅻ\u3000x y  WE'RE CamelCase HTTPServer <|x|> ' 's 'S ...---***\n"
)
"""A text on which tokenizers that cut words in different ways differ."""


def to_gguf(tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    """The metadata of a tokenizer, for a model of `rows` embeddings.

    Raises UnsupportedError where no metadata gives the same ids: GGUF has byte-level BPE whose way of cutting words
    llama.cpp has a name for, and SentencePiece's BPE.
    """
    whole: Document = json.loads(tokenizer.backend.to_str())
    model = whole["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{tokenizer.name}: a tokenizer of type {model.get('type')}; a GGUF file keeps BPE here")
    if tokenizer.vocabulary > rows:
        raise CheckpointError(f"{tokenizer.name}: {tokenizer.vocabulary} tokens for a model of {rows} embeddings")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for token, number in tokenizer.tokens.items():
        tokens[number], kinds[number] = token, NORMAL
    for one in whole.get("added_tokens") or []:
        kinds[one["id"]] = CONTROL if one["special"] or one["content"] in tokenizer.control else USER
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    said: dict[str, object] = {f"{KEY}tokens": tokens, f"{KEY}token_type": kinds}
    for role, key in IDS.items():
        number = getattr(tokenizer, role, None)
        if number is not None:
            said[f"{KEY}{key}"] = number
    begins, bare = (tokenizer.encode("a", special=special) for special in (True, False))
    said[f"{KEY}add_bos_token"] = begins[: len(begins) - len(bare)] == [tokenizer.bos]
    said[f"{KEY}add_eos_token"] = tokenizer.eos is not None and begins[-1] == tokenizer.eos != bare[-1]
    for name, template in tokenizer.templates.items():
        said["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template.source
    found = _scored(said, tokens, merges, model) if model.get("byte_fallback") else _byte_level(said, merges)
    for candidate in found:
        again = from_gguf(candidate, tokenizer.name)
        if all(again.encode(PROBE, **how) == tokenizer.encode(PROBE, **how) for how in ({}, {"special": False})):
            return candidate
    raise UnsupportedError(
        f"{tokenizer.name}: it cuts texts in a way that llama.cpp has no name for, so a GGUF file cannot keep it"
    )


def _byte_level(said: dict[str, object], merges: list[Any]) -> list[dict[str, object]]:
    """One for each way of cutting words that has a name; of names for the same, the first."""
    names: dict[Pre, str] = {}
    for name, row in TABLE.items():
        names.setdefault(row, name)
    lines = [" ".join(one) for one in merges]
    common: dict[str, object] = {f"{KEY}model": "gpt2", **said, **({f"{KEY}merges": lines} if lines else {})}
    return [common | {f"{KEY}pre": name} for name in names.values()]


def _scored(said: dict[str, object], tokens: list[str], merges: list[Any], model: Document) -> list[dict[str, object]]:
    """Scores that have the merges in their order, with and without a space before the text."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    kinds = [*said[f"{KEY}token_type"]]  # pyright: ignore[reportGeneralTypeIssues]
    for number, token in enumerate(tokens):
        if token in BYTES:
            kinds[number] = BYTE
        elif token == model.get("unk_token"):
            kinds[number] = UNKNOWN
    last = {NORMAL: -float(len(merges))}  # of what no merge makes
    scores = [
        -float(ranks[one]) if one in ranks else last.get(kind, 0.0) for one, kind in zip(tokens, kinds, strict=True)
    ]
    common: dict[str, object] = {
        f"{KEY}model": "llama",
        **said,
        f"{KEY}token_type": kinds,
        f"{KEY}scores": scores,
    }
    return [common | {f"{KEY}add_space_prefix": space} for space in (True, False)]
