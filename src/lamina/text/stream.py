"""Text as its tokens arrive, never in the middle of a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.text.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what bytes that are no character decode to
WINDOW = 24  # tokens decoded together; then the oldest are let go
CONTEXT = 4  # tokens kept, so that the first of the next window is not taken for the first of the text


class Stream:
    """An incremental decoder: what `push` and a last `flush` give, joined, is what `decode` gives at once.

    A token may end within a character. `é` is two bytes, so after the first one the window decodes to "caf" and U+FFFD:
    "caf" goes out, the rest waits for the second byte, or for `flush` when it never comes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.window: list[int] = []
        self.shown = ""  # the part of the window's text that went out

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.window.append(token)
        text = self.decode(self.window)
        certain = text
        if text.endswith(BROKEN):
            # Bytes of byte-level tokens decode one character at a time: only the last can change. With byte fallback
            # a run of bytes is decoded as one, and a byte that fits nowhere spoils all of it.
            certain = text[:-1] if self.tokenizer.byte_level else text.rstrip(BROKEN)
        new = certain[len(self.shown) :] if certain.startswith(self.shown) else self.spoilt(text)
        self.shown = certain if new else self.shown
        if len(self.window) >= WINDOW:
            self.shorten(text)
        return new

    def spoilt(self, text: str) -> str:
        """The new part of a text in which characters that went out are no longer whole."""
        if text.endswith(BROKEN) or BROKEN not in text:
            return ""  # perhaps they will be
        self.shown = text
        return BROKEN + text[text.rindex(BROKEN) + 1 :]

    def shorten(self, text: str) -> None:
        held = len(text) - len(self.shown) if text.startswith(self.shown) else len(text)
        for kept in range(CONTEXT, WINDOW - CONTEXT):
            tail = self.decode(self.window[-kept:])
            if len(tail) > held and text.endswith(tail) and (self.tokenizer.byte_level or not text.endswith(BROKEN)):
                self.window, self.shown = self.window[-kept:], tail[: len(tail) - held]
                return

    def flush(self) -> str:
        """What was held back, complete or not. The stream is then as new."""
        text, shown = self.decode(self.window), self.shown
        self.window, self.shown = [], ""
        return text[len(shown) :] if text.startswith(shown) else BROKEN

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, self.skip_special)
