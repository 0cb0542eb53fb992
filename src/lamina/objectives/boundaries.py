"""What the names of tokens say: which ids begin words, which end sentences, which stand around a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.text import Tokenizer

SPACES = ("Ġ", "Ċ", "ĉ", "č")
"""What a byte-level token that begins a word begins with: a space, a line feed, a tab, a carriage return."""


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) bool: ids that begin a word. WordPiece: those without ##; byte-level: those with a space; Unigram:
    those with ▁. Special tokens are words of their own. Raises LaminaError for tokens that do not say it."""
    names = tokenizer.tokens
    if tokenizer.byte_level:
        begin = {name for name in names if name.startswith(SPACES)}
    elif any(name.startswith("##") for name in names):
        begin = {name for name in names if not name.startswith("##")}
    elif any(name.startswith("▁") for name in names):
        begin = {name for name in names if name.startswith("▁")}
    else:
        raise LaminaError(f"{tokenizer.name}: its tokens do not say where words begin: none begins with ##, Ġ or ▁")
    return _table((names[name] for name in begin | (tokenizer.control & names.keys())), tokenizer.vocabulary)


def full_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> np.ndarray:
    """(vocabulary,) bool: the tokens of these names, with or without a space. Raises LaminaError where there is
    none."""
    names = tokenizer.tokens
    ids = [names[space + stop] for stop in stops for space in ("", "Ġ", "▁") if space + stop in names]
    if not ids:
        raise LaminaError(
            f"{tokenizer.name}: has none of the tokens {', '.join(map(repr, stops))}, which end sentences"
        )
    return _table(ids, tokenizer.vocabulary)


def special(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) bool: tokens that are no text."""
    names = tokenizer.tokens
    return _table((names[name] for name in tokenizer.control if name in names), tokenizer.vocabulary)


def around(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What the tokenizer puts before and after a text: [CLS] and [SEP] of BERT, nothing of GPT-2."""
    bare, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    for at in range(len(whole) - len(bare) + 1):
        if bare and whole[at : at + len(bare)] == bare:
            return np.array(whole[:at], np.int64), np.array(whole[at + len(bare) :], np.int64)
    raise LaminaError(f"{tokenizer.name}: what it puts around a text cannot be told: 'a' becomes {whole}")


def need(tokenizer: Tokenizer, what: str, *roles: str) -> int:
    """The id of the first of these roles that the tokenizer has. Raises LaminaError where it has none."""
    for role in roles:
        if (found := getattr(tokenizer, role)) is not None:
            return found
    raise LaminaError(f"{tokenizer.name}: {what} needs a {' or '.join(roles)} token, and this tokenizer has none")


def _table(ids: Iterable[int], size: int) -> np.ndarray:
    table = np.zeros(size, bool)
    table[list(ids)] = True
    return table
