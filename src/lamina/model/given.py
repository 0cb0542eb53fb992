"""What a forward is given, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import ChunkedCrossAttentionSpec, Neighbours
from lamina.reading import read
from lamina.tokens import Tokens

ONE_STACK = "is for encoder-decoders; this model has only one stack: use input_ids"


@dataclass(frozen=True)
class Given:
    """What a forward is told of the text of one stack; `side` is "decoder_" where the names of arguments begin so."""

    side: str
    ids: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None
    marked: Tensor | None = None
    features: Tensor | None = None

    @property
    def content(self) -> Tensor | None:
        """What is read: ids (B, T), or features (B, bins, frames)."""
        return self.ids if self.features is None else self.features

    def refuse(self) -> None:
        """Raise UnsupportedError naming an argument that was given."""
        parts = {"input_ids": self.ids, "attention_mask": self.mask}
        for name, value in {**parts, "position_ids": self.positions, "document_ids": self.documents}.items():
            if value is not None:
                raise UnsupportedError(f"{self.side}{name} {ONE_STACK}")

    def checked_ids(self) -> Tensor:
        """The ids, (B, T)."""
        assert self.ids is not None
        if self.ids.dim() != 2:
            raise LaminaError(f"{self.side}input_ids has shape {tuple(self.ids.shape)}; expected (batch, length)")
        return self.ids

    def read(self, cache: Cache | None = None) -> Tokens:
        """The tokens that layers see."""
        return read(self.checked_ids(), self.mask, self.positions, self.documents, self.marked, cache, self.side)

    def shifted(self, start: int | None) -> Given:
        """What the decoder of a classifier reads (arXiv:1910.13461, section 3.1): the source, one place on after the
        start id, which each text of a row has for itself."""
        if start is None:
            raise LaminaError("this checkpoint names no decoder_start_token_id: give decoder_input_ids")
        tokens, ids = self.read(), self.checked_ids()
        begins = tokens.real.clone()
        begins[:, 1:] &= ~tokens.real[:, :-1] | (tokens.document[:, 1:] != tokens.document[:, :-1])
        return replace(self, side="decoder_", ids=ids.roll(1, dims=1).masked_fill(begins, start), marked=None)


def checked_neighbours(ids: Tensor, retrieval: ChunkedCrossAttentionSpec | None, rows: int) -> Neighbours:
    """Ids of neighbours (B, N, k, r), for what reads them in the model."""
    if retrieval is None or retrieval.encoder is None:
        raise UnsupportedError("neighbours is for models that retrieve; this one has no ChunkedCrossAttentionSpec")
    if ids.dim() != 4 or ids.shape[0] != rows or ids.is_floating_point():
        raise LaminaError(
            f"neighbours is {ids.dtype} {tuple(ids.shape)}; expected ids (batch={rows}, chunks, neighbours, tokens)"
        )
    most = retrieval.encoder.embedding.vocabulary
    if not ids.is_meta and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < most:
        raise LaminaError(f"neighbours holds ids beyond 0 to {most - 1}, and -1 where there is no token")
    return Neighbours(ids)
