"""Reading for generation: the prompt with its padding, then one column at a time, with whatever cache is asked for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.compiled import Reader
from lamina.generation.limits import Limits, begun_with
from lamina.generation.retrieval import Retrieval
from lamina.layers import ConvolutionStem, LearnedPositionSpec
from lamina.model import Model, Output


@dataclass(frozen=True)
class Source:
    """What an encoder-decoder has read: (texts, S, width) and its padding mask. Beams of one text share its row."""

    memory: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, model: Model, input_ids: Tensor, mask: Tensor | None, marked: Tensor | None) -> Source:
        """Read `input_ids` (texts, S), padded on either side, or features."""
        if isinstance(model.stem, ConvolutionStem):
            if not input_ids.is_floating_point():
                model.check_reads(input_ids, None)
            memory = model.encode(input_features=input_ids, attention_mask=mask, marked=marked)
            return cls(memory, None if mask is None else model.stem.seen(mask))
        checked(model, input_ids, mask, model.spec.source_vocabulary)
        return cls(model.encode(input_ids, mask, marked=marked), mask)

    def arguments(self) -> dict[str, Any]:
        """What a forward has to be told of it."""
        return {"attention_mask": self.mask, "encoder_output": self.memory}


class Feeder:
    """Feeds tokens to the model and hands back the logits of the last one, with whatever cache was asked for."""

    def __init__(
        self,
        model: Model,
        cache: str | Cache | Reader | None,
        shape: torch.Size,
        room: int,
        source: Source | None = None,
        engine: bool = True,
        retrieval: Retrieval | None = None,
    ) -> None:
        """`engine`: whether a compiled step may do it, which keeps one row as it is."""
        self.model, self.source = model, source
        self.found = None if retrieval is None else retrieval.begin(model)
        if self.found is not None and isinstance(cache, Cache) and cache.length:
            raise UnsupportedError(
                "a retriever needs the whole text, and this cache holds the beginning of one already"
            )
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        total = shape[1] + room
        if cache == "auto" and model.cache_limit is not None and total > model.cache_limit:
            cache = None
        self.engine = cache if isinstance(cache, Reader) else None
        if engine and cache == "auto" and shape[0] == 1 and model.engine is not None and model.engine.fits(total):
            self.engine = model.engine.start(total)
        self.begun = shape[1]  # tokens of the prompt
        self.block = shape[1]  # that are read at once
        if isinstance(cache, str):
            kind = "growing" if cache == "none" else cache
            context = model.spec.context
            if kind == "sinks" and context is not None:
                # What is kept and what is new are numbered within the context, whatever the length of the text.
                self.block = shape[1] if shape[1] < context else max(context // 4, 1)
                total = min(total, context - 1 if shape[1] < context else context - self.block)
            self.cache = None if self.engine or cache == "none" else model.new_cache(kind, shape[0], total)
        else:
            self.cache = None if isinstance(cache, Reader) else cache

    @classmethod
    def begin(
        cls,
        model: Model,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        limits: Limits,
        cache: str | Cache | Reader | None,
        decoder_input_ids: Tensor | None,
        marked: Tensor | None = None,
        engine: bool = True,
        retrieval: Retrieval | None = None,
    ) -> tuple[Feeder, Tensor, int]:
        """A feeder that has read the prompt, the (B, vocabulary) logits after it, and how many new tokens fit."""
        begun, source = begun_with(model, input_ids, decoder_input_ids), None
        if model.spec.two_stacks:
            source, attention_mask = Source.of(model, input_ids, attention_mask, marked), None
        elif marked is not None:
            raise UnsupportedError("marked is for the source of an encoder-decoder; this model continues input_ids")
        ids, mask = checked(model, begun, attention_mask)
        used = cache.length if isinstance(cache, Cache | Reader) else 0
        room = room_for(model, ids, mask, limits, cache, used)
        feeder = cls(model, cache, ids.shape, room, source, engine, retrieval)
        return feeder, feeder.read(ids, mask), room

    def reorder(self, index: Tensor, alike: int = 0) -> None:
        """Go on with the rows `index` of what was read; the first `alike` columns of each are as before."""
        if self.cache is not None:
            self.cache.reorder(index, alike)
        if self.found is not None:
            self.found.reorder(index)
        if self.ids is not None:
            self.ids = self.ids[index]
            self.mask = None if self.mask is None else self.mask[index]

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T) new ids -> (B, vocabulary) logits after the last."""
        if self.engine is not None and mask is None:
            return self.engine.read(ids)
        neighbours = None if self.found is None else self.found.read(ids, mask)
        if self.cache is not None:
            while ids.shape[1] > self.block:
                now, ids = ids.split([self.block, ids.shape[1] - self.block], dim=1)
                seen, mask = (None, None) if mask is None else mask.split([self.block, ids.shape[1]], dim=1)
                self._forward(now, seen, 0)
            out = self._forward(ids, mask, 1, neighbours)
        else:
            self.mask = _extend_mask(self.mask, mask, ids, self.ids)
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
            out = self._forward(self.ids, self.mask, 1, None if self.found is None else self.found.all)
        assert out.logits is not None
        return out.logits[:, -1]

    def _forward(self, ids: Tensor, mask: Tensor | None, keep: int, neighbours: Tensor | None = None) -> Output:
        if self.source is None:
            return self.model(ids, mask, neighbours=neighbours, cache=self.cache, keep_logits=keep)
        more = self.source.arguments()
        return self.model(
            **more, decoder_input_ids=ids, decoder_attention_mask=mask, cache=self.cache, keep_logits=keep
        )


def checked(
    model: Model, ids: Tensor, mask: Tensor | None, vocabulary: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Ids and mask with all padding on the left, so that every row ends in its last token. vocabulary: how many ids
    there are, where they are not those that the model writes."""
    if model.decoder is None or model.head is None:
        raise UnsupportedError(
            "this model has no decoder with a language head, so it cannot generate; try lamina fill or embed"
        )
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise LaminaError(
            f"the prompt has shape {tuple(ids.shape)}; it must be (batch, length) with at least one token"
        )
    vocabulary = model.spec.embedding.vocabulary if vocabulary is None else vocabulary
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise LaminaError(f"the prompt holds id {int(ids.max())}; ids of this model are 0 to {vocabulary - 1}")
    if mask is None or bool(mask.all()):
        return ids, None
    if mask.shape != ids.shape:
        raise LaminaError(f"attention_mask has shape {tuple(mask.shape)}; input_ids has {tuple(ids.shape)}")
    if not bool(mask.bool().any(dim=1).all()):
        raise LaminaError("a row of the prompt is all padding; every row needs at least one token")
    order = mask.bool().to(torch.int8).sort(dim=1, stable=True).indices
    return ids.gather(1, order), mask.gather(1, order)


def room_for(model: Model, ids: Tensor, mask: Tensor | None, limits: Limits, cache: Any, used: int) -> int:
    """How many new tokens fit. Raises LaminaError when the prompt alone fills the context."""
    context = model.spec.context
    prompt = used + (ids.shape[1] if mask is None else int(mask.sum(dim=1).max()))
    position = model.decoder.spec.position if model.decoder is not None else None
    # Relative positions have no end: an encoder-decoder was trained at its context and goes on beyond it (T5).
    endless = (cache == "sinks" or model.spec.two_stacks) and not isinstance(position, LearnedPositionSpec)
    if context is None or endless or limits.most == 0:
        return limits.most
    if prompt >= context:
        raise LaminaError(
            f"the prompt has {prompt} tokens; this model reads {context}, the answer included: shorten it"
        )
    return min(limits.most, context - prompt)


def check_finite(logits: Tensor, count: int) -> None:
    """Raise LaminaError where no next token can be told."""
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise LaminaError(f"the logits of new token {count} are not finite; the weights or the dtype are at fault")


def warn_of_context(model: Model, room: int, limits: Limits) -> None:
    """Say that the text was cut, where it was."""
    if room < limits.most:
        warnings.warn(f"stopped after {room} new tokens: the context of {model.spec.context} is full", stacklevel=4)


def _extend_mask(mask: Tensor | None, new: Tensor | None, ids: Tensor, before: Tensor | None) -> Tensor | None:
    if before is None:
        return new
    return None if mask is None else torch.cat([mask, torch.ones_like(ids)], dim=1)
