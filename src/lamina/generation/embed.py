"""Sentence embeddings: an encoder's hidden states, pooled as the checkpoint says (Sentence-BERT, arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lamina.errors import CheckpointError, LaminaError
from lamina.layers import mean_of
from lamina.model import Model
from lamina.weights.files import read_json

STEP = 16
"""Tokens: lengths are multiples of it. For each new shape of a matrix product in 16 bits the library of the CPU makes a
kernel and keeps it: 2 MiB for each length that MiniLM reads."""


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one vector: the mean over tokens, or the first token; and the longest input."""

    mode: str = "mean"
    normalise: bool = True
    longest: int | None = None


def pooling_of(directory: Path) -> Pooling:
    """The pooling that a sentence-transformers directory describes; the mean, normalised, where it says nothing."""
    said = directory / "1_Pooling" / "config.json"
    length = directory / "sentence_bert_config.json"
    longest = read_json(length).get("max_seq_length") if length.is_file() else None
    if not said.is_file():
        return Pooling(longest=longest)
    config = read_json(said)
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    chosen = [mode for name, mode in modes.items() if config.get(name)]
    others = [n for n, on in config.items() if n.startswith("pooling_mode_") and on is True and n not in modes]
    if len(chosen) != 1 or others:
        raise CheckpointError(
            f"{said}: only pooling by the mean or by the first token is supported; it says {others or chosen}"
        )
    return Pooling(mode=chosen[0], longest=longest)


def embed(
    model: Model, texts: Sequence[str], tokenizer: Encoder, *, pooling: Pooling | None = None, batch: int = 32
) -> Tensor:
    """(texts, width) vectors of length 1, in the order of `texts`. Texts of like length are read together.

    Raises LaminaError when a text is longer than the model reads; nothing is cut in silence.
    """
    pooling = pooling_for(model) if pooling is None else pooling
    if not texts:
        return torch.empty(0, model.spec.width)
    rows = [tokenizer.encode(text) for text in texts]
    longest = longest_for(model, pooling)
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise LaminaError(f"the text {text[:40]!r} has no tokens")
        if len(ids) > longest:
            raise LaminaError(f"the text {text[:40]!r}... has {len(ids)} tokens; this model reads {longest}: split it")
    return vectors_of(model, rows, pooling, batch)


def pooling_for(model: Model) -> Pooling:
    """The pooling of the directory that a model was loaded from."""
    located: Any = None if model.origin is None else model.origin.located
    directory = located.path if located is not None and located.path.is_dir() else None
    return Pooling() if directory is None else pooling_of(directory)


def longest_for(model: Model, pooling: Pooling) -> int:
    """Tokens of the longest text that is embedded."""
    return min(n for n in (pooling.longest, model.spec.source_context, 2**31) if n is not None)


@torch.inference_mode()
def vectors_of(model: Model, rows: Sequence[list[int]], pooling: Pooling, batch: int = 32) -> Tensor:
    """(rows, width) float32: the vectors of texts that are ids already, in order. Rows of like length go together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = torch.empty(len(rows), model.spec.width)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        vectors[chosen] = _vectors(model, [rows[i] for i in chosen], pooling).cpu()
    return vectors


def rounded(length: int, most: int | None) -> int:
    """The next multiple of `STEP`, or `most` where that is less: what a row of so many tokens is padded to."""
    up = -(-length // STEP) * STEP
    return up if most is None else max(min(up, most), length)


def _vectors(model: Model, rows: list[list[int]], pooling: Pooling) -> Tensor:
    length = rounded(max(map(len, rows)), model.spec.source_context)
    device = model.embedding.weight.device
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    # Of two stacks the encoder reads: Sentence-T5, arXiv:2108.08877, section 3.
    hidden = (
        model.encode(ids, mask) if model.spec.two_stacks else model(ids, mask, keep_logits=0).hidden
    )  # (B, T, width)
    vectors = (hidden[:, 0] if pooling.mode == "first" else mean_of(hidden, mask)).float()
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalise else vectors
