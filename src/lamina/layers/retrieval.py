"""RETRO's layers: an encoder of neighbours, and chunked cross-attention to what it gives (arXiv:2112.04426,
sections 2.3 and 2.4).

A text is read in chunks of m tokens, counted within its document. Neighbours were found with a whole chunk, so the
token that ends it is the first to read them, and the last but one token of the next chunk is the last: token t reads
those of chunk (t + 1) // m - 1, and nothing where that is below 0. Example, m = 4:

    token   0 1 2  3 4 5 6  7 8 9 10  11
    reads   -      chunk 0  chunk 1   chunk 2

A neighbour lies beside its chunk, so its token j counts as position m chunk + j, and the distance i - i' + m - 1 of the
paper is that of two positions.

Heads with rotary phases, which were copied from causal self-attention, have only ever read what stands before them. For
them a neighbour lies m tokens earlier: the last token of its 2 m lies beside the last of the chunk.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.cache import Found, NeighbourLedger
from lamina.errors import LaminaError
from lamina.layers.attention import AttentionSpec
from lamina.layers.block import LayerSpec, StepSpec
from lamina.layers.call import Call, Neighbours
from lamina.layers.cross import CrossAttentionSpec
from lamina.layers.embedding import EmbeddingSpec
from lamina.layers.feedforward import FeedForwardSpec
from lamina.layers.norm import RMSNormSpec
from lamina.layers.relative import TransformerXLSpec
from lamina.layers.stack import StackSpec
from lamina.patterns import Everything, Retained
from lamina.specs import Spec
from lamina.tokens import HOLE, Tokens, plain


@dataclass(frozen=True, kw_only=True)
class NeighbourEncoderSpec(Spec):
    """A stack that reads each neighbour: RETRO's in both directions and, by cross-attention, beside the chunk that it
    was found for; any other by itself."""

    width: int  # 896 in all sizes of RETRO
    embedding: EmbeddingSpec  # of its own: the model's tokens, in another width
    stack: StackSpec
    depths: tuple[int, ...] = ()  # what it gives beside its last states, on their left: those after so many layers

    def check(self) -> None:
        if self.width < 1:
            raise LaminaError(f"NeighbourEncoderSpec.width is {self.width}; it must be at least 1")
        if sorted(set(self.depths)) != list(self.depths) or any(
            not 0 <= depth < len(self.stack.layers) for depth in self.depths
        ):
            raise LaminaError(
                f"NeighbourEncoderSpec.depths is {self.depths}; they must grow, from 0 to {len(self.stack.layers) - 1}"
            )
        if self.depths and (self.stack.recurrence is not None or self.stack.repeat > 1):
            raise LaminaError("NeighbourEncoderSpec.depths are for a stack without recurrence whose layers run once")

    @property
    def gives(self) -> int:
        """Features of a token that it has read."""
        return self.width * (len(self.depths) + 1)

    def build(self, width: int) -> NeighbourEncoder:
        return NeighbourEncoder(self, width)


@dataclass(frozen=True, kw_only=True)
class ChunkedCrossAttentionSpec(Spec):
    """Cross-attention of the tokens t with (t + 1) // chunk - 1 = c to the encoded neighbours of chunk c."""

    attention: CrossAttentionSpec  # `memory_width` is the encoder's
    chunk: int = 64  # tokens
    encoder: NeighbourEncoderSpec | None = None  # in the first such layer of a stack; the others read what it has made

    def check(self) -> None:
        if self.chunk < 1:
            raise LaminaError(f"ChunkedCrossAttentionSpec.chunk is {self.chunk}; it must be at least 1")
        made, read = None if self.encoder is None else self.encoder.gives, self.attention.memory_width
        if made is not None and made != read:
            raise LaminaError(f"the encoder of neighbours gives width {made}, and attention.memory_width is {read}")

    def build(self, width: int) -> ChunkedCrossAttention:
        return ChunkedCrossAttention(self, width)


@dataclass
class Encoded:
    """What the encoder has made of the neighbours of one forward, for the chunks that have some."""

    found: Found  # (R, k r) tokens of the neighbours, k of r tokens one after the other
    memory: Tensor  # (R, k r, features)


class NeighbourEncoder(nn.Module):
    """ids (R, k, r), and what their chunks are in the text (R, m, width) -> (R, k r, features), the width of
    the encoder for each depth and for the end, each after a norm of its own."""

    def __init__(self, spec: NeighbourEncoderSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of the slot of the chunk that is being written
        for path, part in spec.stack.walk():
            read = part.memory_width if isinstance(part, CrossAttentionSpec) else width
            if read != width:
                raise LaminaError(f"encoder.stack.{path}.memory_width is {read}; the text that it reads has {width}")
        self.embedding = spec.embedding.build(spec.width)
        self.stack = spec.stack.build(spec.width)
        norm = spec.stack.norm
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm.build(spec.width) for _ in spec.depths)

    def forward(self, ids: Tensor, chunk: Tensor, places: Tokens, call: Call) -> Tensor:
        rows, count, length = ids.shape
        ids = ids.flatten(0, 1)  # (R k, r)
        tokens = plain(rows * count, length, device=ids.device)
        if _shows(ids) and bool((ids < 0).any()):
            tokens = Tokens(torch.where(ids >= 0, tokens.position, HOLE), tokens.document)
        inner = Call(tokens=tokens, memory=chunk, memory_tokens=places, backend=call.backend, record=call.record)
        states: list[Tensor] = []

        def show(depth: int, x: Tensor) -> None:
            if depth in self.spec.depths:
                states.append(self.norms[len(states)](x))

        last = self.stack(self.embedding(ids.clamp(min=0)), inner, show=show if self.spec.depths else None)
        return torch.cat([*states, last], dim=-1).unflatten(0, (rows, count)).flatten(1, 2)


class ChunkedCrossAttention(nn.Module):
    """x (B, T, width), and as `call.memory` the neighbours (B, N, k, r) of the chunks that end in these tokens, in
    their order -> (B, T, width). What reads nothing gets exactly 0.

    With a cache the chunk that is being written and the neighbours of the last whole one are kept, so a text may come
    in any pieces. In a record, weights are by chunk: (R, H, tokens of it, k r).
    """

    def __init__(self, spec: ChunkedCrossAttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = None if spec.encoder is None else spec.encoder.build(width)
        self.attention = spec.attention.build(width)
        self.before = 0 if spec.attention.rotary is None else spec.chunk  # tokens from a neighbour to its chunk

    def retained(self) -> dict[str, Retained]:
        """What a cache keeps for the parts of this layer."""
        kept = {".attention": Retained(None, of="found")}
        return kept if self.encoder is None else {**kept, ".encoder": Retained(self.spec.chunk)}

    def reads(self, call: Call) -> bool:
        """Whether there is anything to read, or may be later; where there is not, the step is left out."""
        return isinstance(call.memory, Neighbours) or call.cache is not None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        given = call.memory if isinstance(call.memory, Neighbours) else None
        encoded = None if given is None else given.encoded
        if self.encoder is not None:
            encoded = self._encoded(self.encoder, x, call, given)
            if given is not None:
                given.encoded = encoded
        new, memory = (None, None) if encoded is None else (encoded.found, encoded.memory)
        found = new
        if call.cache is not None:
            ledger = call.cache.slot(self.attention.path).ledger
            assert isinstance(ledger, NeighbourLedger)
            found = ledger.visible_with(new)
        if found is None:
            return torch.zeros_like(x)
        index, queries, apart = self._readers(found, call.tokens, call.memo)
        grouped = x.flatten(0, 1)[index.clamp(min=0)]  # (R, W, width)
        out = self.attention(grouped, replace(call, tokens=queries, memory=memory, memory_tokens=new), apart)
        flat = x.new_zeros(x.shape[0] * x.shape[1] + 1, x.shape[2])  # the last row is for what is no token
        flat = flat.index_copy(0, torch.where(index >= 0, index, flat.shape[0] - 1).flatten(), out.flatten(0, 1))
        return flat[:-1].unflatten(0, x.shape[:2])

    def _encoded(self, encoder: NeighbourEncoder, x: Tensor, call: Call, given: Neighbours | None) -> Encoded | None:
        """The neighbours that came with this forward, encoded; None where there are none."""
        hidden, tokens, m = x, call.tokens, self.spec.chunk
        if call.cache is not None:  # the beginning of the chunk may have been read before
            kept, _, tokens = call.cache.slot(encoder.path).extend(x[:, None], x[:, None, :, :0], tokens)
            hidden = kept[:, 0]
        if given is None:
            return None
        row, document, chunk, ids = _given(given.ids, call.tokens, m)
        if len(row) == 0:
            return None
        inside = (tokens.document[row] == document[:, None]) & (tokens.position[row] // m == chunk[:, None])
        column = _columns(torch.where(inside, tokens.position[row] % m, m), m)  # (R, m)
        there = column >= 0
        states = hidden[row[:, None], column.clamp(min=0)].masked_fill(~there[:, :, None], 0.0)  # (R, m, width)
        places = plain(len(row), m, device=x.device)
        if _shows(there) and not bool(there.all()):
            places = Tokens(torch.where(there, places.position, HOLE), places.document)
        memory = encoder(ids, states, places, call)
        position = torch.where(ids >= 0, torch.arange(ids.shape[2], device=ids.device), HOLE).flatten(1)
        found = Found(position, document[:, None].expand_as(position), row=row, chunk=chunk)
        return Encoded(found, memory)

    def _readers(
        self, found: Found, tokens: Tokens, memo: MutableMapping[Any, Any]
    ) -> tuple[Tensor, Tokens, tuple[int, int]]:
        """Of each chunk the tokens that read it, as numbers in the batch laid flat, -1 where there is none, and who
        they are: (R, W) both. Positions are those of the text, less m times the chunk, which lie from m - 1 to 2 m - 2,
        and `before` more; so much less those of the neighbours is how far apart they can be."""
        name = ("readers", id(found), id(tokens), self.before)
        if name not in memo:
            m, length = self.spec.chunk, tokens.position.shape[1]
            position, document = tokens.position[found.row], tokens.document[found.row]  # (R, T)
            reads = ((position + 1) // m - 1 == found.chunk[:, None]) & (found.chunk >= 0)[:, None]  # holes: of none
            reads &= (found.position >= 0).any(dim=1, keepdim=True) & (document == found.document[:, :1])
            width = min(m, length)
            serial = reads.cumsum(1) - 1
            if _shows(reads) and int(serial[:, -1].amax()) >= width:
                raise LaminaError(
                    f"a document has more than {m} tokens in a chunk: its positions are not all different"
                )
            column = _columns(torch.where(reads, serial, width), width)
            there, place = column >= 0, column.clamp(min=0)
            at = torch.where(there, position.gather(1, place) - m * found.chunk[:, None] + self.before, HOLE)
            queries = Tokens(at, document.gather(1, place))
            longest = int(found.position.amax()) + 1 if _shows(reads) else 2 * m
            apart = self.before + m - max(longest, 1), self.before + 2 * m - 2
            memo[name] = (torch.where(there, column + length * found.row[:, None], HOLE), queries, apart, found, tokens)
        return memo[name][:3]


def _given(ids: Tensor, tokens: Tokens, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the chunks that have neighbours: their rows (R,), documents, numbers, and the neighbours (R, k, r)."""
    batch, count = ids.shape[:2]
    ends = tokens.real & ((tokens.position + 1) % m == 0)
    column = _columns(torch.where(ends, ends.cumsum(1) - 1, count).clamp(max=count), count)  # (B, N)
    there, place = column >= 0, column.clamp(min=0)
    has = (ids >= 0).flatten(2).any(dim=2)
    if not _shows(ids):
        rows, which = (each.flatten() for each in torch.meshgrid(*map(torch.arange, (batch, count)), indexing="ij"))
        row, which = rows.to(ids.device), which.to(ids.device)
    else:
        if bool((has & ~there).any()):
            row, which = (has & ~there).nonzero()[0].tolist()
            raise LaminaError(
                f"neighbours[{row}, {which}] belong to no chunk: {int(there[row].sum())} chunks of {m} tokens end in"
                f" row {row} of this forward"
            )
        row, which = has.nonzero().unbind(dim=1)
    at = place[row, which]
    return row, tokens.document[row, at], tokens.position[row, at] // m, ids[row, which]


def _columns(place: Tensor, places: int) -> Tensor:
    """(R, T) the place of each column, `places` for none -> (R, places) the column at each place, -1 for none."""
    column = torch.arange(place.shape[1], device=place.device).expand_as(place)
    out = torch.full((place.shape[0], places + 1), HOLE, dtype=torch.int64, device=place.device)
    return out.scatter(1, place, column)[:, :places]


def _shows(tensor: Tensor) -> bool:
    """Whether its values can be looked at."""
    return not tensor.is_meta


def neighbour_encoder(
    text: int,
    vocabulary: int,
    *,
    width: int = 896,
    heads: int = 16,
    head_dim: int = 64,
    hidden: int = 3584,
    layers: int = 2,
) -> NeighbourEncoderSpec:
    """The encoder of RETRO (section 2.3 and table 10) for a text of width `text`: the first layer reads the chunk."""
    norm, relative = RMSNormSpec(), TransformerXLSpec()
    ops = {
        "attention": AttentionSpec(
            heads=heads, key_heads=heads, head_dim=head_dim, relative=relative, pattern=Everything()
        ),
        "cross": CrossAttentionSpec(
            heads=heads, key_heads=heads, head_dim=head_dim, relative=relative, memory_width=text
        ),
        "feedforward": FeedForwardSpec(hidden=hidden, act="gelu", gated=False),
    }
    first, cross, last = (StepSpec(name=name, op=op, pre=norm) for name, op in ops.items())
    stack = (LayerSpec(steps=(first, cross, last)), *(LayerSpec(steps=(first, last)),) * (layers - 1))
    embedding = EmbeddingSpec(vocabulary=vocabulary)
    return NeighbourEncoderSpec(width=width, embedding=embedding, stack=StackSpec(layers=stack, norm=norm))


def retrieving(
    layers: tuple[LayerSpec, ...], places: tuple[int, ...], step: StepSpec, encoder: NeighbourEncoderSpec
) -> tuple[LayerSpec, ...]:
    """The layers with `step`, whose op is chunked cross-attention, after the first step of those at `places`, counted
    from 0; the first of them gets the encoder. Raises LaminaError for places that there are not."""
    check_places(layers, places)
    found = list(layers)
    for place in places:
        made = encoder if place == places[0] else None
        before, *after = layers[place].steps
        if not after:
            raise LaminaError(f"layer {place} is one step: neighbours are read between attention and feed-forward")
        op = step.op.replace(encoder=made)
        found[place] = LayerSpec(steps=(before, step.replace(op=op), *after))
    return tuple(found)


def check_places(layers: tuple[LayerSpec, ...], places: tuple[int, ...]) -> None:
    """Raise LaminaError for places, counted from 0, that are none of these layers, or not in order."""
    if not places or sorted(set(places)) != list(places) or not 0 <= places[0] <= places[-1] < len(layers):
        raise LaminaError(f"layers {list(places)} are to retrieve; they must grow, from 0 to {len(layers) - 1}")
