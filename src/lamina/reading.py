"""Reading: from ids, padding mask, positions and documents, as a user gives them, to the tokens that layers see."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.tokens import HOLE, Tokens, earlier, plain


def read(
    ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    marked: Tensor | None = None,
    cache: Cache | None = None,
    side: str = "",
) -> Tokens:
    """The tokens of `ids` (B, T), which continue what is in `cache`.

    Without `position_ids`, each document's real tokens count from 0 (padding on the left shifts nothing); the document
    that the cache ended with goes on, and an earlier one cannot be resumed. Positions that restart without
    `document_ids` begin a new document, so packed rows never see each other.
    `attention_mask` is (B, T), or (B, cached + T), whose last T columns are read. `side`: what
    the arguments are called before their names, in an encoder-decoder. Raises LaminaError for other shapes.
    """
    batch, length = ids.shape
    mask = _mask(attention_mask, ids, cache, side)
    for name, given in (("position_ids", position_ids), ("document_ids", document_ids), ("marked", marked)):
        if given is not None and given.shape not in ((batch, length), (1, length)):
            raise LaminaError(f"{side}{name} has shape {tuple(given.shape)}; {side}input_ids has {(batch, length)}")
    if mask is None and position_ids is None and document_ids is None:
        tokens = _plain(ids, cache)
        return tokens if marked is None else Tokens(tokens.position, tokens.document, _rows(marked, ids).bool())
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    before = torch.zeros((batch, 1), dtype=torch.int64, device=ids.device) if cache is None else cache.next_position
    document = torch.zeros_like(before) if cache is None else cache.document
    documents = document.expand(batch, length) if document_ids is None else _rows(document_ids, ids)
    if position_ids is None:
        position = earlier(real, documents) + torch.where(documents == document, before, 0)
    else:
        position = _rows(position_ids, ids)
        if document_ids is None:
            documents = document + _restarts(real, position, before - 1)
    marks = None if marked is None else _rows(marked, ids).bool()
    return Tokens(torch.where(real, position, HOLE), documents, marks)


def _plain(ids: Tensor, cache: Cache | None) -> Tokens:
    batch, length = ids.shape
    if cache is None:
        return plain(batch, length, device=ids.device)
    if cache.plain:
        return plain(batch, length, start=cache.length, device=ids.device)
    position = cache.next_position + torch.arange(length, device=ids.device)
    return Tokens(position, cache.document.expand(batch, length))


def _mask(mask: Tensor | None, ids: Tensor, cache: Cache | None, side: str) -> Tensor | None:
    if mask is None:
        return None
    past = 0 if cache is None else cache.length
    if mask.shape not in ((ids.shape[0], ids.shape[1]), (ids.shape[0], past + ids.shape[1])):
        expected = f"{tuple(ids.shape)}" + (f" or {(ids.shape[0], past + ids.shape[1])}" if past else "")
        raise LaminaError(f"{side}attention_mask has shape {tuple(mask.shape)}; expected {expected}")
    mask = mask[:, -ids.shape[1] :].bool()
    # Looking at the data is free on the CPU, and lets a mask of ones take the fast path.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _rows(given: Tensor, ids: Tensor) -> Tensor:
    return given.expand(ids.shape)


def _restarts(real: Tensor, position: Tensor, last: Tensor) -> Tensor:
    """(B, T): how often positions have failed to grow so far, holes aside; `last` (B, 1) came before the first."""
    column = torch.arange(real.shape[1], device=real.device).expand_as(real)
    latest = torch.where(real, column, -1).cummax(dim=1).values
    latest = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)  # column of the real token before, or -1
    previous = torch.where(latest >= 0, position.gather(1, latest.clamp(min=0)), last)
    return (real & (position <= previous)).to(torch.int64).cumsum(1)
