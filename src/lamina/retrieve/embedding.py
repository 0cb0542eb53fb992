"""What makes vectors of chunks: any source that `lamina.embed` reads, and how it is told from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.generation.embed import longest_for, pooling_for, vectors_of
from lamina.model import Model
from lamina.objectives.boundaries import around
from lamina.source import load, tokenizer
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class EmbedderSpec(Spec):
    """An embedder, as a database remembers it: vectors of another one lie elsewhere, and distances mean nothing."""

    source: str  # as the user wrote it
    width: int
    dtype: str  # that it computes in
    pooling: Literal["mean", "first", "state"]  # state: of each token, for kNN-LM
    normalise: bool
    hash: str  # of its weights and its tokenizer
    window: int | None = None  # of states: tokens that are read at once,
    stride: int | None = None  # and how many of them are new


class Embedder:
    """Texts to vectors (n, width) float32. What is longer than the model reads is cut, and counted in `cut`."""

    def __init__(
        self,
        source: str | os.PathLike[str],
        dtype: str | None = None,
        device: torch.device | str = "cpu",
        batch: int = 64,
    ) -> None:
        self.tokenizer = tokenizer(source)
        self.model = load(source, dtype, device)
        self.batch, self.cut = batch, 0
        self.pooling = pooling_for(self.model)
        self.before, self.after = (part.tolist() for part in around(self.tokenizer))
        self.room = longest_for(self.model, self.pooling) - len(self.before) - len(self.after)
        self.spec = EmbedderSpec(
            source=os.fspath(source),
            width=self.model.spec.width,
            dtype=str(self.model.embedding.weight.dtype).removeprefix("torch."),
            pooling=self.pooling.mode,  # pyright: ignore[reportArgumentType]
            normalise=self.pooling.normalise,
            hash=fingerprint(self.model, self.tokenizer.hash),
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raises LaminaError for a text without a token, where nothing stands around it either."""
        rows = self.tokenizer.encode_batch(texts, special=False, control=False)
        self.cut += sum(len(row) > self.room for row in rows)
        rows = [[*self.before, *row[: self.room], *self.after] for row in rows]
        if empty := [text for text, row in zip(texts, rows) if not row]:
            raise LaminaError(f"the text {empty[0][:40]!r} has no token for {self.spec.source}")
        return vectors_of(self.model, rows, self.pooling, self.batch)


def same(known: EmbedderSpec, given: EmbedderSpec) -> None:
    """Raise LaminaError, with both, unless an embedder is the one that made the vectors."""
    names = ("width", "pooling", "normalise", "dtype", "hash")
    for name in names:
        one, other = getattr(known, name), getattr(given, name)
        if one != other:
            one, other = (f"{each[:12]}..." if name == "hash" else each for each in (one, other))
            raise LaminaError(
                f"the database was made by {known.source} ({name} {one}), and this is {given.source} ({name} {other}):"
                " use the first, or build it anew"
            )


def fingerprint(model: Model, more: str = "") -> str:
    """SHA-256 of every weight with its name and dtype, and of `more`. The spec is left out: it is written with every
    field there is, so a release that adds one would make strangers of all databases."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(more.encode())
    return digest.hexdigest()
