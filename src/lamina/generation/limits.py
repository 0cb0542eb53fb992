"""When a row of new text ends, and what the checkpoint says of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model

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
    never: tuple[int, ...] = ()  # ids that are not written: what is no speech, in Whisper
    not_first: tuple[int, ...] = ()  # nor these as the first new token: an end, in Whisper

    def held_back(self, count: int) -> list[int]:
        """The ids that new token `count` may not be."""
        return [*self.never, *(self.not_first if count == 0 else ()), *(self.ends if count < self.least else ())]

    def forced(self, count: int, begun: int) -> int | None:
        """The id that new token `count` has to be, after a prompt of `begun` tokens; None where it is free."""
        if count == 0 and begun == 1 and self.first is not None:
            return self.first
        return self.last if count + 1 == self.most else None


def start_ids(model: Model, batch: int) -> Tensor:
    """(batch, 1): the id that an encoder-decoder begins with. Raises LaminaError where the checkpoint names none."""
    said = {} if model.origin is None else model.origin.generation
    special = model.spec.special
    options = (said.get("decoder_start_token_id"), special.decoder_start, said.get("bos_token_id"), special.start)
    start = next((one for one in options if one is not None), None)
    if start is None:
        raise LaminaError("this checkpoint names no decoder_start_token_id: give decoder_input_ids")
    return torch.full((batch, 1), start, dtype=torch.int64, device=model.embedding.weight.device)


def begun_with(model: Model, input_ids: Tensor, decoder_input_ids: Tensor | None) -> Tensor:
    """(B, T) ids that new ones follow: the prompt, or what an encoder-decoder has written of its text.

    Raises LaminaError where the checkpoint names no start id, UnsupportedError for decoder_input_ids of one stack.
    """
    if model.spec.two_stacks:
        return start_ids(model, input_ids.shape[0]) if decoder_input_ids is None else decoder_input_ids
    if decoder_input_ids is not None:
        raise UnsupportedError("decoder_input_ids is for encoder-decoders; this model continues input_ids")
    return input_ids


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
    first, last = said.get("forced_bos_token_id") if model.spec.two_stacks else None, said.get(FORCED_END)
    last = last[0] if isinstance(last, list) else last
    held_back = {"never": _ids(model, said, "suppress_tokens"), "not_first": _ids(model, said, "begin_suppress_tokens")}
    return Limits(most=most, least=least, ends=ends, pad=pad, stops=stops, first=first, last=last, **held_back)


def _ids(model: Model, said: dict[str, Any], name: str) -> tuple[int, ...]:
    """The ids in a field of generation_config.json, without those that the model lacks."""
    ids = said.get(name) or []
    if not isinstance(ids, list) or any(type(one) is not int or one < 0 for one in ids):
        raise LaminaError(f"generation_config.json: {name} is {ids!r}; it must be a list of token ids")
    return tuple(one for one in ids if one < model.spec.embedding.vocabulary)
