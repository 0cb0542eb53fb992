"""Recurrent memory tokens (Recurrent Memory Transformer, arXiv:2207.06881, section 3.2, equations 4 to 8).

A text is read in segments of L tokens, each between two copies of n memory vectors. What the stack makes of the second
copy, which has seen the whole segment, is the memory of the next one; that of the first is trained.

    [m, x_1 ... x_L, m] -> [., h_1 ... h_L, m']

Segments go by position in the document (position // L), so it changes nothing how a text is cut into forwards, padded
or packed. Within a segment positions begin anew: the memory has 0 to n - 1, the tokens n to n + L - 1 and the second
copy what follows, as in the authors' code. A segment whose last position is missing leaves no memory, and the one
before stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.cache import Progress, RecurrentSlot
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers.call import Call
from lamina.layers.initial import Draw
from lamina.layers.parameter import parameter
from lamina.patterns import Retained
from lamina.specs import Spec
from lamina.tokens import HOLE, Tokens


@dataclass(frozen=True, kw_only=True)
class RecurrentMemorySpec(Spec):
    """A stack reads segments of `length` tokens, with `tokens` memory vectors between them."""

    tokens: int  # n: 10 for WikiText-103, 1 to 35 elsewhere in the paper
    length: int  # L
    gradients: int | None = None  # gradients end where a segment begins whose number is a multiple of gradients + 1

    def check(self) -> None:
        if self.tokens < 1 or self.length < 1 or (self.gradients is not None and self.gradients < 0):
            raise LaminaError(
                f"tokens={self.tokens} and length={self.length} must be at least 1, gradients={self.gradients} at"
                " least 0, or None for all"
            )

    @property
    def columns(self) -> int:
        """What a segment is to the layers: its tokens, and the memory on both sides."""
        return self.length + 2 * self.tokens

    def build(self, width: int) -> RecurrentMemory:
        return RecurrentMemory(self, width)


class RecurrentMemory(nn.Module):
    """Runs a stack over the segments of a text: (B, T, width) -> (B, T, width). Holes come out as zeros."""

    def __init__(self, spec: RecurrentMemorySpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""
        self.memory = parameter(spec.tokens, width)

    def initialise(self, draw: Draw) -> None:
        draw.table(self.memory)

    def keeps(self, retained: Retained) -> Retained:
        """What a cache has to keep for a layer: no more than one segment."""
        recent = self.spec.columns if retained.recent is None else min(retained.recent, self.spec.columns)
        return Retained(recent)

    def forward(self, x: Tensor, call: Call, run: Callable[[Tensor, Call], Tensor]) -> Tensor:
        """run: the stack, from what comes before its first layer to its last norm."""
        if call.tokens.marked is not None:
            raise UnsupportedError(f"{self.path}: marked tokens see a whole text, and memory tokens cut it in segments")
        slot = None if call.cache is None else call.cache.slot(self.path)
        progress = slot.progress if isinstance(slot, RecurrentSlot) else None
        started = progress is not None
        progress = self._start(x) if progress is None else progress
        places, found = [], []
        padded = F.pad(x, (0, 0, 0, 1))  # the last column is for places without a token
        for piece in pieces(call.tokens, self.spec.length, progress, started):
            progress = self._begun(progress, piece)
            tokens, first = self._tokens(piece, progress)
            parts = [padded.gather(1, piece.column[:, :, None].expand(-1, -1, x.shape[2]))]
            parts = [progress.memory, *parts] if piece.some_begin else parts
            parts = [*parts, progress.memory] if piece.some_end else parts
            out = run(torch.cat(parts, dim=1), replace(call, tokens=tokens, memo={}))
            found.append(out[:, first : first + piece.column.shape[1]])
            places.append(piece.column)
            if piece.some_end:
                left = torch.where(piece.ends[:, :, None], out[:, -self.spec.tokens :], progress.memory)
                progress = replace(progress, memory=left)
        if isinstance(slot, RecurrentSlot):
            slot.progress = progress
        if not found:
            return torch.zeros_like(x)
        hidden = torch.cat(found, dim=1)
        place = torch.cat(places, dim=1)[:, :, None].expand(-1, -1, hidden.shape[2])
        empty = hidden.new_zeros(x.shape[0], x.shape[1] + 1, hidden.shape[2])
        return empty.scatter(1, place, hidden)[:, :-1].clone()  # FSDP warns of views

    def _start(self, x: Tensor) -> Progress:
        none = torch.zeros((x.shape[0], 1), dtype=torch.int64, device=x.device)
        return Progress(self.memory.expand(x.shape[0], -1, -1), none, none, none - 1)

    def _begun(self, progress: Progress, piece: Piece) -> Progress:
        """At the beginning of a piece: of a document, of a segment, or within one."""
        memory = torch.where(piece.fresh[:, :, None], self.memory, progress.memory)
        if self.spec.gradients is not None:
            ends = piece.begins & ~piece.fresh & (piece.segment % (self.spec.gradients + 1) == 0)
            memory = torch.where(ends[:, :, None], memory.detach(), memory)
        serial = progress.serial + piece.begins
        here = piece.segment >= 0
        document = torch.where(here, piece.document, progress.document)
        segment = torch.where(here, piece.segment, progress.segment)
        return Progress(memory, serial, document, segment)

    def _tokens(self, piece: Piece, progress: Progress) -> tuple[Tokens, int]:
        """What the layers see of a piece and its memory, and the column where the piece begins."""
        n, length = self.spec.tokens, self.spec.length
        each = torch.arange(n, device=piece.column.device)
        parts = [torch.where(piece.position >= 0, n + piece.position % length, HOLE)]
        if piece.some_begin:
            parts = [torch.where(piece.begins, each, HOLE), *parts]
        if piece.some_end:
            parts = [*parts, torch.where(piece.ends, n + length + each, HOLE)]
        position = torch.cat(parts, dim=1)
        span = None
        if piece.start is not None and (piece.start == 0 or not piece.some_begin):
            first = 0 if piece.some_begin else n + piece.start
            span = (first, first + position.shape[1])
        return Tokens(position, progress.serial.expand_as(position), span=span), n if piece.some_begin else 0


@dataclass(frozen=True, eq=False)
class Piece:
    """What the rows of a batch read of one segment each."""

    column: Tensor  # (B, W): where its tokens stand, T where a row has fewer
    position: Tensor  # (B, W): theirs in the document, HOLE where there is none
    document: Tensor  # (B, 1)
    segment: Tensor  # (B, 1), -1 where a row reads nothing
    begins: Tensor  # (B, 1) bool: whether the segment begins here, and not in an earlier forward
    fresh: Tensor  # (B, 1) bool: whether a document does
    ends: Tensor  # (B, 1) bool: whether its last position is here
    some_begin: bool
    some_end: bool
    start: int | None = None  # where all rows are alike and without holes: the first token's place in the segment


def pieces(tokens: Tokens, length: int, before: Progress, started: bool) -> Iterator[Piece]:
    """The pieces of a block of tokens, one after the other; rows may be in different segments. started: whether there
    was an earlier forward."""
    if tokens.span is None:
        yield from _rows(tokens, length, before)
    else:
        yield from _plain(tokens, tokens.span, length, started)


def _plain(tokens: Tokens, span: tuple[int, int], length: int, started: bool) -> Iterator[Piece]:
    """One document a row, without holes: nothing has to be looked at."""
    batch = tokens.position.shape[0]
    yes = torch.ones((batch, 1), dtype=torch.bool, device=tokens.position.device)
    document = tokens.document[:, :1]
    for segment in range(span[0] // length, (span[1] - 1) // length + 1):
        start, stop = max(span[0], segment * length), min(span[1], (segment + 1) * length)
        first = start == span[0] and not started
        begins, ends = first or start % length == 0, stop % length == 0
        yield Piece(
            column=torch.arange(start - span[0], stop - span[0], device=yes.device).expand(batch, -1),
            position=tokens.position[:, start - span[0] : stop - span[0]],
            document=document,
            segment=torch.full_like(document, segment),
            begins=yes if begins else ~yes,
            fresh=yes if first else ~yes,
            ends=yes if ends else ~yes,
            some_begin=begins,
            some_end=ends,
            start=start % length,
        )


def _rows(tokens: Tokens, length: int, before: Progress) -> Iterator[Piece]:
    """Rows with holes, or with several documents: piece k of a row is its k-th segment here, whatever its number."""
    position, real = tokens.position, tokens.real
    width = position.shape[1]
    segment = position // length
    column = torch.arange(width, device=position.device).expand_as(position)
    latest = torch.where(real, column, -1).cummax(dim=1).values
    latest = F.pad(latest[:, :-1], (1, 0), value=-1)  # the real token before, or -1
    known, at = latest >= 0, latest.clamp(min=0)
    other = torch.where(known, tokens.document.gather(1, at), before.document) != tokens.document
    earlier = torch.where(known, segment.gather(1, at), before.segment)
    begins = real & (other | (earlier != segment))
    fresh = real & (other | (earlier < 0))
    number = torch.where(real, begins.cumsum(1), -1)  # 0: it goes on from an earlier forward
    spare = F.pad(position, (0, 1), value=HOLE)
    for k in range(int(number.max()) + 1):
        here = number == k
        most = int(here.sum(1).max())
        if most == 0:
            continue
        place = torch.where(here, here.cumsum(1) - 1, most)
        columns = column.new_full((position.shape[0], most + 1), width).scatter(1, place, column)[:, :most]
        last = torch.where(here, column, 0).amax(1, keepdim=True)
        first, ends = (here & each for each in (begins, position % length == length - 1))
        yield Piece(
            column=columns,
            position=spare.gather(1, columns),
            document=tokens.document.gather(1, last),
            segment=torch.where(here, segment, -1).amax(1, keepdim=True),
            begins=first.any(1, keepdim=True),
            fresh=(here & fresh).any(1, keepdim=True),
            ends=ends.any(1, keepdim=True),
            some_begin=bool(first.any()),
            some_end=bool(ends.any()),
        )
