"""What a tokenizer loses of a text, counted without a second look at most of it."""

from __future__ import annotations

from lamina.data.sources import Tally
from lamina.text import Tokenizer


class Lacks:
    """What a tokenizer loses of texts: characters that vanish, or, where it has an unknown token, what became that."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unknown = tokenizer.tokens.get(tokenizer.unk_of_model() or "")
        self.known: dict[str, bool] = {}  # of each character that was met, whether it vanishes

    def count(self, text: str, ids: list[int], tally: Tally) -> None:
        """Add to a tally what `text` has and its ids lack. Raises LaminaError where the tally has too much of it."""
        tally.characters += len(text)
        if self.unknown is not None:
            tally.lose(ids.count(self.unknown))
            return
        letters = set(text)
        if new := letters - self.known.keys():
            vanish = self.tokenizer.lost("".join(sorted(new)))
            self.known |= dict.fromkeys(new, False) | dict.fromkeys(vanish, True)
        for letter in sorted(letter for letter in letters if self.known[letter]):
            tally.lose(text.count(letter), letter)
