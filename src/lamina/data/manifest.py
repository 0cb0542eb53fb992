"""data.json: what a prepared directory holds, with the size and SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamina.errors import LaminaError
from lamina.specs import Spec

NAME = "data.json"
FORMAT = 1
"""Number of the layout of a prepared directory. One with a larger number was written by a newer lamina."""

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "pairs": ("source", "target"),
    "classification": ("text",),
    "token-classification": ("tokens", "labels"),
    "contrastive": ("first", "second"),
}
"""What can be prepared, and its columns. Classification has a label a document beside, contrastive may have a score."""

VALUES = {"labels": "int32", "scores": "float32"}
"""What there may be one of a document, in a file NAME.DTYPE, and its type."""

DTYPES = ("uint16", "uint32", "int32")  # tokens of vocabularies up to 65,536, of larger ones, and labels of tokens
LARGEST = 1 << 28  # bytes of a manifest; one of a million source files has 200 million


@dataclass(frozen=True, kw_only=True)
class Shard(Spec):
    """NAME-00000.tokens and NAME-00000.ends: whole documents one after the other, and where each ends."""

    documents: int
    tokens: int
    sha256: str  # of the tokens, as they lie in the file
    ends_sha256: str  # of the ends: uint64, counted within the shard


@dataclass(frozen=True, kw_only=True)
class ColumnFiles(Spec):
    """One column: a stream of tokens, cut into shards between documents."""

    name: str
    dtype: Literal["uint16", "uint32", "int32"]
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Values(Spec):
    """One number a document: a label, or a score."""

    name: Literal["labels", "scores"]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceFile(Spec):
    """A file that was read, and what became of it."""

    name: str  # as the user wrote it, or found below what the user wrote
    bytes: int
    sha256: str
    documents: int  # of it in this directory
    tokens: int
    damaged: int = 0  # rows that could not be read
    empty: int = 0  # rows and documents without a token
    skipped: int = 0  # documents left out for a character that is none
    mended: int = 0  # characters put in place of those that are none
    lost: int = 0  # characters without a token; where there is an unknown token, how often it stands there


@dataclass(frozen=True, kw_only=True)
class Manifest(Spec):
    """Everything that is known of a prepared directory without reading a token."""

    kind: Literal["text", "pairs", "classification", "token-classification", "contrastive"]
    vocabulary: int  # ids are below it
    tokenizer: str  # SHA-256 of the tokenizer, as Tokenizer.hash gives it
    end: int | None  # the id that ends every document; None where the tokenizer has none, or it was not wanted
    documents: int
    columns: tuple[ColumnFiles, ...]
    values: tuple[Values, ...] = ()
    labels: tuple[str, ...] = ()  # names, by number
    sources: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()  # how it was made, in words

    def check(self) -> None:
        names = tuple(column.name for column in self.columns)
        if names != KINDS[self.kind]:
            raise LaminaError(f"columns are {', '.join(names)}; {self.kind} has {', '.join(KINDS[self.kind])}")
        if not 1 <= self.vocabulary <= 1 << 31:
            raise LaminaError(f"vocabulary is {self.vocabulary:,}; it must be 1 to 2,147,483,648")
        for column in self.columns:
            right = dtype_of(column.name, self.vocabulary)
            if column.dtype != right:
                raise LaminaError(
                    f"column {column.name!r} is {column.dtype}; for a vocabulary of {self.vocabulary:,} it is {right}"
                )
            for shard in column.shards:
                if not 1 <= shard.documents <= shard.tokens:
                    raise LaminaError(
                        f"column {column.name!r}: a shard of {shard.documents:,} documents and {shard.tokens:,} tokens;"
                        " each document has a token"
                    )
            counts = [shard.documents for shard in column.shards]
            if counts != [shard.documents for shard in self.columns[0].shards]:
                raise LaminaError(f"column {column.name!r} has other documents than {names[0]!r}")
            if sum(counts) != self.documents:
                raise LaminaError(f"column {column.name!r} has {sum(counts):,} documents; there are {self.documents:,}")


def dtype_of(column: str, vocabulary: int) -> Literal["uint16", "uint32", "int32"]:
    """How the numbers of a column are stored: labels of tokens may be -100, ids are as short as they can be."""
    return "int32" if column == "labels" else "uint16" if vocabulary <= 1 << 16 else "uint32"


def file_of(column: str, shard: int, what: str) -> str:
    """The name of a shard's file. `what`: tokens or ends."""
    return f"{column}-{shard:05d}.{what}"


def dump(manifest: Manifest) -> str:
    """The text of data.json."""
    return json.dumps({"format": FORMAT, **manifest.to_dict()}, indent=1, ensure_ascii=False) + "\n"


def hash_of(manifest: Manifest) -> str:
    """SHA-256 of what is in a prepared directory, wherever it lies and however its text is laid out."""
    return hashlib.sha256(json.dumps(manifest.to_dict(), sort_keys=True).encode()).hexdigest()


def load(directory: Path) -> Manifest:
    """Read data.json strictly. Raises LaminaError naming the file and the field."""
    path = directory / NAME
    data = _object(path, directory)
    number = data.pop("format", None)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise LaminaError(f"{path}: format {number!r}; this lamina reads formats 1 to {FORMAT}")
    return Manifest.from_dict(data, where=str(path))


def _object(path: Path, directory: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise LaminaError(f"{path}: {path.stat().st_size:,} bytes; {LARGEST:,} is the most")
        data = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        below = [name for name in ("train", "validation") if (directory / name / NAME).is_file()]
        hint = f"; did you mean {directory / below[0]}?" if below else "; make it with: lamina data prepare"
        raise LaminaError(f"{directory}: no {NAME}, so this is no prepared directory{hint}") from None
    except OSError as error:
        raise LaminaError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, LaminaError) else LaminaError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise LaminaError(f"{path}: a JSON {type(data).__name__}; an object is needed")
    return data
