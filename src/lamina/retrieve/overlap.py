"""How much of a text its neighbours hold already: what is copied and what is understood are told apart by it
(RETRO, arXiv:2112.04426, section 2.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.generation.perplexity import Block, Score, read_block, score, window_of
from lamina.model import Model
from lamina.retrieve.chunks import Chunks, Documents
from lamina.retrieve.neighbours import Neighbours
from lamina.text import Tokenizer

if TYPE_CHECKING:
    from lamina.data import Prepared

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Parts of a chunk: of 64 tokens the first is at most 8 in a row."""
BLOCK = 256  # chunks compared at once


def longest_common(chunks: Tensor, values: Tensor) -> Tensor:
    """(n,) int64: the longest run of tokens of each chunk (n, m) that stands in one of its neighbours (n, k, r) too.

    -1 is no token. Runs lie on diagonals of the table of equal tokens: each is laid out as a row, and the length of a
    run is the distance to the last place that differs.
    """
    n, m = chunks.shape
    r = values.shape[-1]
    found = torch.zeros(n, dtype=torch.int64)
    for start in range(0, n, BLOCK):
        one, other = chunks[start : start + BLOCK], values[start : start + BLOCK]
        equal = (one[:, None, :, None] == other[:, :, None, :]) & (one >= 0)[:, None, :, None]  # (b, k, m, r)
        # Rows of m empty places and r, read again as rows of r + m + 1: what stood one below and one right stands
        # below, so columns are diagonals.
        laid = torch.nn.functional.pad(torch.nn.functional.pad(equal, (m, 0)).flatten(2), (0, m))
        skewed = laid.unflatten(2, (m, r + m + 1))  # (b, k, m, diagonals)
        places = torch.arange(m)[:, None].expand(m, r + m + 1)
        differs = torch.where(skewed, -1, places).cummax(2).values
        found[start : start + BLOCK] = (places - differs).flatten(1).amax(1)
    return found


def overlaps(neighbours: Neighbours, prepared: Prepared) -> Tensor:
    """(chunks,) int64: the longest run that each chunk of the text shares with its neighbours; -1 for a chunk that its
    document ends in, which was not looked for."""
    documents = Documents(prepared)
    chunks = Chunks(documents, np.arange(len(documents)), neighbours.spec.chunk)
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(chunks), BLOCK):
        stop = min(start + BLOCK, len(chunks))
        tokens = chunks.tokens(start, stop)
        longest = longest_common(tokens, neighbours.values(torch.arange(start, stop)))
        parts.append(longest.masked_fill((tokens < 0).any(1), -1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Losses:
    """Of each chunk (n,): the sum of its tokens' losses in nats, how many were scored, and its bytes."""

    nats: Tensor
    tokens: Tensor
    bytes: Tensor


def losses(
    model: Model,
    prepared: Prepared,
    chunk: int,
    window: int | None = None,
    stride: int | None = None,
    neighbours: Neighbours | None = None,
) -> Losses:
    """What each chunk of prepared text costs a causal model, each document by itself and read in windows as
    `lamina evaluate` reads a file, but that windows begin where chunks do. The first token of a document has nothing
    before it and is not scored. neighbours: what a model that retrieves reads beside it."""
    window, stride = windows_of(model, chunk, window, stride)
    documents = Documents(prepared)
    chunks = Chunks(documents, np.arange(len(documents)), chunk)
    nats, counts = torch.zeros(len(chunks), dtype=torch.float64), torch.zeros(len(chunks), dtype=torch.int64)
    for i, begin in enumerate(chunks.starts[:-1].tolist()):
        ids, block = documents.bodies.document(i).tolist(), _reading(neighbours, begin, chunk)
        scores = score(model, ids, window=window, stride=stride, block=block) if len(ids) > 1 else ()
        each = torch.cat([torch.zeros(0, dtype=torch.float64), *(-part.double() for part in scores)])
        at = begin + torch.arange(1, len(each) + 1) // chunk
        nats.index_add_(0, at, each)
        counts.index_add_(0, at, torch.ones_like(at))
    sizes = _sizes(prepared.tokenizer())
    every = chunks.tokens(0, len(chunks))
    return Losses(nats, counts, sizes[every.clamp(min=0)].masked_fill(every < 0, 0).sum(1))


def windows_of(model: Model, chunk: int, window: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """The window and the stride, multiples of the chunk, so that whole chunks are read. Raises LaminaError for
    others."""
    if window is None:
        window = window_of(model)[0] // chunk * chunk
    if stride is None:
        stride = max(window // 2 // chunk * chunk, chunk)
    window_of(model, window, stride)
    if window % chunk or stride % chunk or window <= stride:
        raise LaminaError(
            f"window={window} and stride={stride}; with chunks of {chunk} tokens both must be multiples of {chunk}, and"
            " the window the larger"
        )
    return window, stride


def _reading(neighbours: Neighbours | None, first: int, chunk: int) -> Block:
    """Reads the blocks of a document, whose chunks have the numbers `first` and on, in their order."""
    read = 0

    def block(model: Model, ids: list[int], fresh: int) -> Tensor:
        nonlocal read
        read += fresh
        begin = read - len(ids)
        cut = -begin % chunk  # of the last block: a model counts chunks from the first token that it is given
        numbers = first + (begin + cut) // chunk + torch.arange((len(ids) - cut) // chunk)
        found = None if neighbours is None or len(numbers) == 0 else neighbours.values(numbers)
        return read_block(model, ids[cut:], fresh, found)

    return block


def _sizes(tokenizer: Tokenizer) -> Tensor:
    """(vocabulary,) int64: the bytes that each token stands for. A letter of a byte-level token is a byte."""
    sizes = torch.zeros(tokenizer.vocabulary, dtype=torch.int64)
    for name, number in tokenizer.tokens.items():
        letters = tokenizer.byte_level and name not in tokenizer.control
        sizes[number] = len(name) if letters else len(name.removeprefix("##").encode())
    return sizes


@dataclass(frozen=True)
class Share:
    """What a model loses on the chunks whose overlap is at most `share` of them."""

    share: float
    chunks: int
    tokens: int
    nats: float
    bytes: int

    @property
    def score(self) -> Score:
        return Score(self.tokens, self.bytes, self.nats)

    @property
    def bits_per_byte(self) -> float:
        return self.score.bits_per_byte if self.bytes else math.nan


def by_overlap(longest: Tensor, found: Losses, chunk: int, shares: Sequence[float] = SHARES) -> list[Share]:
    """Losses of chunks by the longest run that each (n,) shares with its neighbours, of `chunk` tokens. Each share
    holds the chunks of those before it too; the last, 1, is all that were looked for."""
    if len(longest) != len(found.nats):
        raise LaminaError(f"{len(longest):,} overlaps and losses of {len(found.nats):,} chunks; of the same text?")
    rows = []
    for share in shares:
        here = (longest >= 0) & (longest <= share * chunk)
        sums = int(found.tokens[here].sum()), float(found.nats[here].sum()), int(found.bytes[here].sum())
        rows.append(Share(share, int(here.sum()), *sums))
    return rows
