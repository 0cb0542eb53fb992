"""Another tokenizer: rows of tokens that both have are kept, a new token begins as the mean of the old tokenizer's
pieces of its text (Fast Vocabulary Transfer: Gee et al., EMNLP 2022)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.model import ModelSpec
from lamina.surgery.calibration import texts_by
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.vocabulary import tables, with_vocabulary
from lamina.surgery.weights import Made, Weights
from lamina.text import Tokenizer, from_directory, from_gguf
from lamina.text.directory import FILES
from lamina.text.tokenizer import ROLES, byte_letters
from lamina.weights.gguf import GGUFFile

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that no token has."""


@dataclass(frozen=True, kw_only=True)
class SwapTokenizer(Operation):
    """The tokenizer of `folder`, and tables whose rows are those of its tokens.

    A token that spells the same text in both has its old row, as has one with the same part (bos, eos, ...); any other
    the mean of the rows of the pieces that the old tokenizer makes of its text; one of no text the mean of all rows.
    Ids that the model names follow. Either place is a folder or a GGUF file. old: where the tokenizer is that the model
    has now; `lamina edit` knows it.
    """

    NAME = "tokenizer"

    folder: str
    old: str | None = None  # None: beside the weights

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        if self.old is None:
            raise LaminaError("old is missing: the folder of the tokenizer that this model has")
        of, rows = self.counterparts(), spec.embedding.vocabulary
        old, new = of.old, of.new
        if old.vocabulary > rows:
            raise LaminaError(f"{old.name} has {old.vocabulary} tokens, and the model {rows}: it is another model's")
        pieces = _pieces(old, new)
        copied = sum(len(one) == 1 for one in pieces)
        how = f"rows by token: {copied} of {len(pieces)} as they were, others the mean of pieces"
        made = {name: Made((name,), how, partial(_rows, pieces=pieces)) for name in tables(spec, weights)}
        why = f"another tokenizer: {copied} of {len(pieces)} tokens keep their rows"
        changed = _renumbered(spec, of)
        return Changed(changed, Weights(weights, made), Promise("lossy", why), texts=texts_by(new, changed))

    def counterparts(self) -> Counterparts:
        """Which tokens have the parts of which."""
        assert self.old is not None
        return Counterparts(_opened(self.old), _opened(self.folder))


class Counterparts:
    """Which token of the new tokenizer has the part of one of the old."""

    def __init__(self, old: Tokenizer, new: Tokenizer) -> None:
        self.old, self.new = old, new
        self.names = {number: token for token, number in old.tokens.items()}

    def __call__(self, number: int | None, *parts: str) -> int | None:
        """The id in place of `number`; `parts`: those that it has by its field, where the tokenizers leave it open."""
        if number is None:
            return None
        for role in (*parts, *ROLES):
            if getattr(self.old, role) == number and getattr(self.new, role) is not None:
                return getattr(self.new, role)
        if self.names.get(number) in self.new.tokens:
            return self.new.tokens[self.names[number]]
        return next((found for role in parts if (found := getattr(self.new, role)) is not None), None)

    def needed(self, field: str, number: int | None, *parts: str) -> int | None:
        """The same. Raises LaminaError where there is none."""
        found = self(number, *parts)
        if number is not None and found is None:
            token = self.names.get(number, number)
            raise LaminaError(f"{field} is {number} ({token}), and the new tokenizer has no token of that part")
        return found

    def config(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the ids that it names as they are now; null, or none in a list, where there is none."""
        found = dict(said)
        for name, value in said.items():
            if name.endswith("_token_id"):
                parts = [role for role in ROLES if name == f"{role}_token_id"]
                ids = value if isinstance(value, list) else [value]
                now = [new for one in ids if type(one) is int and (new := self(one, *parts)) is not None]
                found[name] = list(dict.fromkeys(now)) if isinstance(value, list) else now[0] if now else None
        return found

    def files(self) -> dict[str, bytes | None]:
        """The files of the new tokenizer; None for those that another one may have left."""
        with tempfile.TemporaryDirectory() as folder:
            self.new.save(folder)
            written = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        return {**dict.fromkeys(FILES), **written}


def _opened(path: str) -> Tokenizer:
    if not path.endswith(".gguf"):
        return from_directory(path)
    with GGUFFile(Path(path)) as file:
        return from_gguf(file.metadata)


def _renumbered(spec: ModelSpec, of: Counterparts) -> ModelSpec:
    """The spec with a row for each token, and the ids that it names as they are now."""
    special, embedding = spec.special, spec.embedding
    new = spec.replace(
        special=special.replace(
            start=of(special.start, "bos", "cls"),
            end=tuple(dict.fromkeys(one for n in special.end if (one := of(n, "eos", "sep")) is not None)),
            pad=of(special.pad, "pad"),
            decoder_start=of.needed("special.decoder_start", special.decoder_start),
        ),
        embedding=embedding.replace(padding=None),
    )
    if special.end and not new.special.end:
        raise LaminaError(f"special.end is {list(special.end)}, and the new tokenizer has no token that ends a text")
    new = with_vocabulary(new, of.new.vocabulary)
    padding = of.needed("embedding.padding", embedding.padding, "pad")
    new = new.replace(embedding=new.embedding.replace(padding=padding))
    if spec.labels is not None and spec.labels.after is not None:
        after = of.needed("labels.after", spec.labels.after, "sep", "eos")
        new = new.replace(labels=spec.labels.replace(after=after))
    number = getattr(spec.marks, "id", None)
    if spec.marks is not None and number is not None:
        new = new.replace(marks=spec.marks.replace(id=of.needed("marks.id", number, "sep", "eos")))
    return new


def _pieces(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each id of the new tokenizer the old ids whose rows it is the mean of."""
    found: list[list[int]] = [[] for _ in range(new.vocabulary)]
    asked: list[tuple[int, str]] = []
    parts = {getattr(new, role): getattr(old, role) for role in ROLES if getattr(old, role) is not None}
    for token, number in new.tokens.items():
        text = token if token in new.control else text_of(new, token)
        same = token if token in new.control else spelled(old, text)
        if same in old.tokens:
            found[number] = [old.tokens[same]]
        elif number in parts:
            found[number] = [parts[number]]
        elif isinstance(text, bytes):
            found[number] = [old.tokens[one] for byte in text if (one := spelled(old, bytes([byte]))) in old.tokens]
        else:
            # What puts a space before a text by itself is given none.
            asked.append((number, text if old.byte_level else text.removeprefix(" ")))
    for (number, _), ids in zip(asked, old.encode_batch([text for _, text in asked], special=False), strict=True):
        found[number] = ids
    return found


def text_of(tokenizer: Tokenizer, token: str) -> str | bytes:
    """What a token stands for within a text; bytes that are no whole characters as such."""
    if tokenizer.byte_level:
        numbers = {letter: byte for byte, letter in byte_letters().items()}
        if not all(letter in numbers for letter in token):
            return token  # an added one
        raw = bytes(numbers[letter] for letter in token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw
    if (byte := BYTE.fullmatch(token)) is not None:
        return bytes.fromhex(byte[1])
    if _word_pieces(tokenizer):
        return token[2:] if token.startswith("##") else f" {token}"
    return token.replace("▁", " ")


def spelled(tokenizer: Tokenizer, text: str | bytes) -> str:
    """How a tokenizer would write a token that stands for this, whether it has it or not."""
    if tokenizer.byte_level:
        letters = byte_letters()
        return "".join(letters[byte] for byte in (text.encode() if isinstance(text, str) else text))
    if isinstance(text, bytes):
        return "".join(f"<0x{byte:02X}>" for byte in text)
    if _word_pieces(tokenizer):
        return text[1:] if text.startswith(" ") else f"##{text}"
    return text.replace(" ", "▁")


def _word_pieces(tokenizer: Tokenizer) -> bool:
    return type(tokenizer.backend.model).__name__ == "WordPiece"


AT_ONCE = 4096
"""Rows that are made at one time, in float32."""


def _rows(table: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """(V, ...) -> (V', ...): the mean of the rows that each names; of all where it names none."""
    wide = torch.promote_types(table.dtype, torch.float32)
    flat = table if table.dim() == 2 else table[:, None]
    whole, made = flat.mean(dim=0, dtype=wide), flat.new_empty(len(pieces), flat.shape[1])
    for start in range(0, len(pieces), AT_ONCE):
        some = pieces[start : start + AT_ONCE]
        sizes = torch.tensor([len(one) for one in some], device=table.device)
        ids = torch.tensor([number for one in some for number in one], dtype=torch.long, device=table.device)
        places = torch.arange(len(ids), device=table.device)
        rows = F.embedding_bag(places, flat[ids].to(wide), sizes.cumsum(0) - sizes, mode="mean")
        rows[sizes == 0] = whole
        made[start : start + AT_ONCE] = rows.to(table.dtype)
    return made.view(len(pieces), *table.shape[1:])
