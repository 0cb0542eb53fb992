"""Generation: read the prompt once, then one token at a time with a cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.compiled import Reader
from lamina.generation.sample import Sampling
from lamina.layers import LearnedPositionSpec
from lamina.model import Model, Output
from lamina.specs import unknown

Stop = int | Sequence[int]

FORCED_END = "forced_eos_token_id"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a row ends: at an end id, at a stop sequence, or after `most` new tokens."""

    most: int
    least: int = 0
    ends: tuple[int, ...] = ()
    pad: int = 0
    stops: tuple[tuple[int, ...], ...] = ()
    first: int | None = None  # the first new token of an encoder-decoder, after its start id alone: BART's <s>
    last: int | None = None  # and so is the last one, where `most` is reached: BART's </s>


@dataclass
class Step:
    """One generated column."""

    ids: Tensor  # (B,): the new token of each row; the pad id in rows that have ended
    logits: Tensor  # (B, vocabulary) that it was chosen from
    done: Tensor = field(repr=False)  # (B,) bool: rows that have ended with this token or before


@torch.inference_mode()
def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    beams: int = 1,
    stop: Sequence[Stop] = (),
    seed: int | None = None,
    cache: str | None = "auto",
    decoder_input_ids: Tensor | None = None,
    **wrong: Any,
) -> Tensor:
    """Continue each row of `input_ids` (B, T); returns (B, T + new) ids.

    An encoder-decoder reads `input_ids` and writes from its start id on, or continues `decoder_input_ids` (B, T);
    it returns the decoder's ids, those included.

    A row ends at the checkpoint's end ids (held back for the first `min_new_tokens`) or at one of `stop` (ids, or
    sequences of ids) and is filled with the pad id. Padding may be on either side. temperature 0 is greedy.
    cache: a kind (`lamina.cache.KINDS`), or None to read everything anew for each token.
    Raises LaminaError for values out of range, an empty prompt, or a prompt that leaves no room in the context.
    """
    if wrong:
        known = [name for name in generate.__annotations__ if name not in ("wrong", "return")]
        raise LaminaError(unknown("argument of generate", next(iter(wrong)), known))
    if beams != 1:
        raise UnsupportedError(f"beams={beams}: beam search is not part of this version; beams=1 is")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    limits = limits_of(model, max_new_tokens, min_new_tokens, stop)
    if two_stacks(model):
        decoder_input_ids = start_ids(model, input_ids.shape[0]) if decoder_input_ids is None else decoder_input_ids
    elif decoder_input_ids is not None:
        raise UnsupportedError("decoder_input_ids is for encoder-decoders; this model continues input_ids")
    steps = stream(
        model,
        input_ids,
        attention_mask,
        sampling=sampling,
        limits=limits,
        cache=cache,
        decoder_input_ids=decoder_input_ids,
    )
    begun = input_ids if decoder_input_ids is None else decoder_input_ids
    return torch.cat([begun, *(step.ids[:, None] for step in steps)], dim=1)


def two_stacks(model: Model) -> bool:
    """Whether it is an encoder-decoder: what it writes does not continue what it reads."""
    return model.spec.encoder is not None and model.spec.decoder is not None


def start_ids(model: Model, batch: int) -> Tensor:
    """(batch, 1): the id that an encoder-decoder begins with. Raises LaminaError where the checkpoint names none."""
    said = {} if model.origin is None else model.origin.generation
    special = model.spec.special
    options = (said.get("decoder_start_token_id"), special.decoder_start, said.get("bos_token_id"), special.start)
    start = next((one for one in options if one is not None), None)
    if start is None:
        raise LaminaError("this checkpoint names no decoder_start_token_id: give decoder_input_ids")
    return torch.full((batch, 1), start, dtype=torch.int64, device=model.embedding.weight.device)


def limits_of(model: Model, most: int, least: int = 0, stop: Sequence[Stop] = ()) -> Limits:
    """The limits with the end and pad ids that the checkpoint names. Raises LaminaError for values out of range."""
    if type(most) is not int or most < 0:
        raise LaminaError(f"max_new_tokens is {most!r}; it must be a whole number of at least 0")
    if type(least) is not int or least < 0 or least > most:
        raise LaminaError(f"min_new_tokens is {least!r}; it must be a whole number from 0 to max_new_tokens={most}")
    stops = tuple((one,) if isinstance(one, int) else tuple(one) for one in stop)
    for one in stops:
        if not one or not all(isinstance(part, int) for part in one):
            raise LaminaError(f"stop holds {one!r}; each must be a token id or a non-empty sequence of token ids")
    special = model.spec.special
    said = {} if model.origin is None else model.origin.generation
    ends = said.get("eos_token_id", special.end)
    ends = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
    pad = said.get("pad_token_id", special.pad)
    pad = pad if pad is not None else ends[0] if ends else 0
    first, last = said.get("forced_bos_token_id") if two_stacks(model) else None, said.get(FORCED_END)
    last = last[0] if isinstance(last, list) else last
    return Limits(most=most, least=least, ends=ends, pad=pad, stops=stops, first=first, last=last)


@torch.inference_mode()
def stream(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sampling: Sampling,
    limits: Limits,
    cache: str | Cache | Reader | None = "auto",
    decoder_input_ids: Tensor | None = None,
) -> Iterator[Step]:
    """`generate`, one column at a time. A `Cache`, or the `Reader` of a compiled step, that already holds the text
    before `input_ids` is continued."""
    source = None
    if two_stacks(model):
        if decoder_input_ids is None:
            decoder_input_ids = start_ids(model, input_ids.shape[0])
        source = Source.of(model, input_ids, attention_mask)
        ids, mask = _checked(model, decoder_input_ids, None)
    else:
        ids, mask = _checked(model, input_ids, attention_mask)
    used = cache.length if isinstance(cache, Cache | Reader) else 0
    room = _room(model, ids, mask, limits, cache, used)
    generator = sampling.generator(ids.device)
    reader = _Feeder(model, cache, ids.shape, room, source)
    logits = reader.read(ids, mask)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    written: list[list[int]] = [[] for _ in range(ids.shape[0])]
    for count in range(room):
        if count < limits.least:
            logits = logits.index_fill(
                1, torch.tensor(limits.ends, dtype=torch.int64, device=logits.device), -torch.inf
            )
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise LaminaError(f"the logits of new token {count} are not finite; the weights or the dtype are at fault")
        begins = count == 0 and ids.shape[1] == 1
        forced = limits.first if begins else limits.last if count + 1 == limits.most else None
        chosen = (
            sampling.choose(logits, generator) if forced is None else torch.full_like(done, forced, dtype=ids.dtype)
        )
        chosen = chosen.masked_fill(done, limits.pad)
        done = done | _ended(chosen, done, written, limits)
        yield Step(chosen, logits, done)
        if bool(done.all()):
            return
        if count + 1 < room:
            logits = reader.read(chosen[:, None], None)
    if room < limits.most:
        warnings.warn(f"stopped after {room} new tokens: the context of {model.spec.context} is full", stacklevel=3)


@dataclass(frozen=True)
class Source:
    """What an encoder-decoder has read: (texts, S, width) and its padding mask. Beams of one text share its row."""

    memory: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, model: Model, input_ids: Tensor, mask: Tensor | None) -> Source:
        """Read `input_ids` (texts, S), padded on either side."""
        _checked(model, input_ids, mask)
        return cls(model.encode(input_ids, mask), mask)

    def arguments(self) -> dict[str, Any]:
        """What a forward has to be told of it."""
        return {"attention_mask": self.mask, "encoder_output": self.memory}


class _Feeder:
    """Feeds tokens to the model and hands back the logits of the last one, with whatever cache was asked for."""

    def __init__(
        self,
        model: Model,
        cache: str | Cache | Reader | None,
        shape: torch.Size,
        room: int,
        source: Source | None = None,
    ) -> None:
        self.model, self.source = model, source
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        total = shape[1] + room
        if cache == "auto" and model.cache_limit is not None and total > model.cache_limit:
            cache = None
        self.engine = cache if isinstance(cache, Reader) else None
        if cache == "auto" and shape[0] == 1 and model.engine is not None and model.engine.fits(total):
            self.engine = model.engine.start(total)
        self.block = shape[1]  # tokens of the prompt that are read at once
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

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T) new ids -> (B, vocabulary) logits after the last."""
        if self.engine is not None and mask is None:
            return self.engine.read(ids)
        if self.cache is not None:
            while ids.shape[1] > self.block:
                now, ids = ids.split([self.block, ids.shape[1] - self.block], dim=1)
                seen, mask = (None, None) if mask is None else mask.split([self.block, ids.shape[1]], dim=1)
                self._forward(now, seen, 0)
            out = self._forward(ids, mask, 1)
        else:
            self.mask = _extend_mask(self.mask, mask, ids, self.ids)
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
            out = self._forward(self.ids, self.mask, 1)
        assert out.logits is not None
        return out.logits[:, -1]

    def _forward(self, ids: Tensor, mask: Tensor | None, keep: int) -> Output:
        if self.source is None:
            return self.model(ids, mask, cache=self.cache, keep_logits=keep)
        more = self.source.arguments()
        return self.model(
            **more, decoder_input_ids=ids, decoder_attention_mask=mask, cache=self.cache, keep_logits=keep
        )


def _checked(model: Model, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ids and mask with all padding on the left, so that every row ends in its last token."""
    if model.decoder is None or model.head is None:
        raise UnsupportedError(
            "this model has no decoder with a language head, so it cannot generate; try lamina fill or embed"
        )
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise LaminaError(
            f"the prompt has shape {tuple(ids.shape)}; it must be (batch, length) with at least one token"
        )
    vocabulary = model.spec.embedding.vocabulary
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


def _room(model: Model, ids: Tensor, mask: Tensor | None, limits: Limits, cache: Any, used: int) -> int:
    """How many new tokens fit. Raises LaminaError when the prompt alone fills the context."""
    context = model.spec.context
    prompt = used + (ids.shape[1] if mask is None else int(mask.sum(dim=1).max()))
    position = model.decoder.spec.position if model.decoder is not None else None
    endless = cache == "sinks" and not isinstance(position, LearnedPositionSpec)
    if context is None or endless or limits.most == 0:
        return limits.most
    if prompt >= context:
        raise LaminaError(
            f"the prompt has {prompt} tokens; this model reads {context}, the answer included: shorten it"
        )
    return min(limits.most, context - prompt)


def _ended(chosen: Tensor, done: Tensor, written: list[list[int]], limits: Limits) -> Tensor:
    """(B,) bool: rows that end with the token just chosen."""
    ended = torch.zeros_like(done)
    for end in limits.ends:
        ended |= chosen == end
    if limits.stops:
        for row, (token, over) in enumerate(zip(chosen.tolist(), done.tolist(), strict=True)):
            written[row].append(token)
            if not over and any(tuple(written[row][-len(stop) :]) == stop for stop in limits.stops):
                ended[row] = True
    return ended & ~done


def _extend_mask(mask: Tensor | None, new: Tensor | None, ids: Tensor, before: Tensor | None) -> Tensor | None:
    if before is None:
        return new
    return None if mask is None else torch.cat([mask, torch.ones_like(ids)], dim=1)
