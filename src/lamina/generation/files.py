"""A text file as token ids, read piece by piece, with the ids that the whole text would have."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lamina.errors import LaminaError
from lamina.text import Tokenizer, cut_place

PIECE = 1 << 20  # characters encoded at once


class TextFile:
    """Iterating gives lists of ids. `bytes` counts what was read so far, `lost` what the tokenizer cannot say.

    A piece ends between two words, at a place where the text around it has the same ids cut as whole. A tokenizer for
    which there is no such place (SentencePiece marks the beginning of a text) gets the text in one piece.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, piece: int = PIECE) -> None:
        self.path, self.tokenizer, self.piece = Path(path), tokenizer, piece
        self.bytes = 0
        self.lost: dict[str, None] = {}

    def __iter__(self) -> Iterator[list[int]]:
        try:
            with self.path.open("rb") as file:
                text = ""
                for part in self._decoded(file):
                    text += part
                    while len(text) > self.piece:
                        cut = cut_place(text, self.piece, self.tokenizer)
                        if cut is None:
                            break
                        yield self._ids(text[:cut])
                        text = text[cut:]
                if text:
                    yield self._ids(text)
        except OSError as error:
            raise LaminaError(f"{self.path}: {error.strerror or error}") from None

    def _decoded(self, file: BinaryIO) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        pending = 0
        while True:
            block = file.read(self.piece)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = self.bytes - pending + error.start
                raise LaminaError(f"{self.path}: not UTF-8 at byte {at:,}; texts are UTF-8") from None
            self.bytes += len(block)
            pending = len(decoder.getstate()[0])
            if not block:
                return
            yield text

    def _ids(self, text: str) -> list[int]:
        self.lost |= dict.fromkeys(self.tokenizer.lost(text))
        return self.tokenizer.encode(text, special=False, control=False)


class Ids:
    """The ids of a text one by one, as `measure` takes them. `begin`: what opens a text, or None."""

    def __init__(self, parts: Iterable[Sequence[int]], tokenizer: Tokenizer) -> None:
        around = tokenizer.encode("")
        self.begin = around[0] if around and around[0] == tokenizer.bos else None
        self.parts, self.tokenizer, self.first = parts, tokenizer, 0

    def __iter__(self) -> Iterator[int]:
        begun = False
        for part in self.parts:
            if part and not begun:
                self.first, begun = part[0], True
            yield from part

    def predicted(self, count: int) -> int:
        """Of `count` bytes those that were predicted: without the first token's, where nothing stands before it."""
        if self.begin is not None:
            return count
        return count - len(self.tokenizer.decode([self.first], skip_special=False).encode())
