"""What is wanted of the sources when they are prepared, and what each kind of data has in a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lamina.data.writer import SHARD
from lamina.errors import LaminaError
from lamina.specs import Spec

TYPES: dict[str, tuple[Any, ...]] = {
    "text": (str,),
    "pairs": (str, str),
    "classification": (str, (str, int)),
    "token-classification": ("words", "labels"),
    "contrastive": (str, str, (int, float)),
}
"""Of each kind, what the fields of a row hold, in the order of the columns; then the label or score."""


@dataclass(frozen=True, kw_only=True)
class PrepareSpec(Spec):
    """What is wanted of the sources."""

    kind: Literal["text", "pairs", "classification", "token-classification", "contrastive"] = "text"
    fields: tuple[str, ...] = ("text",)  # of a row, in the order of the columns; then the label or score
    split_on: str | None = None  # what separates the documents of a text file; None: the file is one
    characters: Literal["error", "replace", "skip"] = "error"  # bytes that are no UTF-8, NULs, halves of characters
    damaged: float = 0.01  # part of the rows of a file that may be damaged
    validation: float = 0.0  # part that is kept for validation
    split: Literal["documents", "end"] = "documents"  # which part: some documents, or the end of each text file
    end: bool = True  # each document ends with the tokenizer's end token, where it has one
    control: bool = False  # names of control tokens in a text mean the token
    labels: tuple[str, ...] = ()  # names of labels by number; none: in the order in which they are met
    shard_tokens: int = SHARD

    def check(self) -> None:
        wanted = len(TYPES[self.kind]) - (self.kind == "contrastive" and len(self.fields) == 2)
        if len(self.fields) != wanted:
            raise LaminaError(f"fields are {', '.join(self.fields)}; {self.kind} has {wanted}")
        if not 0 <= self.validation < 1 or not 0 <= self.damaged <= 1:
            raise LaminaError(f"validation={self.validation}, damaged={self.damaged}; parts of the whole, 0 to 1")
        if self.split_on == "":
            raise LaminaError("split_on is empty; it is the text between two documents")
        if self.shard_tokens < 1:
            raise LaminaError(f"shard_tokens={self.shard_tokens}; it must be 1 or more")
        if self.split == "end" and (self.kind != "text" or self.split_on is not None):
            raise LaminaError("split='end' divides text files that are one document; others are divided by documents")

    @property
    def values(self) -> str | None:
        """What there is one of a document."""
        return "labels" if self.kind == "classification" else "scores" if len(self.fields) == 3 else None
