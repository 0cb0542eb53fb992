"""Where a long text can be cut so that its pieces have the ids that the whole has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.text.tokenizer import Tokenizer

AROUND = 240  # characters on both sides of a cut that must encode apart as they do together
BETWEEN = re.compile(r"(?<=\w)(?= \w)")  # between a word and the space before the next one


def cut_place(text: str, size: int, tokenizer: Tokenizer) -> int | None:
    """A place a little before `size` characters, between two words; None where the ids would differ everywhere."""
    start = max(size - 8 * AROUND, size // 2)
    for found in list(BETWEEN.finditer(text, start, size))[::-1][:8]:
        at = found.start()
        left, right = text[max(at - AROUND, 0) : at], text[at : at + AROUND]
        left = left[left.find(" ") :] if " " in left else left

        def encode(part: str) -> list[int]:
            return tokenizer.encode(part, special=False, control=False)

        if encode(left + right) == encode(left) + encode(right):
            return at
    return None
