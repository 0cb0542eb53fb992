"""Text that a model writes, piece by piece: whole characters only, cut at stop texts, with its own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.generation.beam import Beaming, search
from lamina.generation.compiled import Reader
from lamina.generation.limits import limits_of
from lamina.generation.loop import stream
from lamina.generation.sample import Sampling
from lamina.model import Model
from lamina.text import Tokenizer

STOPS = 4  # stop texts that one call may have


class Writing:
    """What follows the prompt `prompt_ids`. Iterating generates it and gives pieces of text as they become certain.

    A piece never ends within a character, nor within what may become a stop text; `text` is all pieces joined. Once it
    has ended, `finish_reason` is "stop" (an end token or a stop text came; `stopped_by` has the text) or "length"
    (`max_new_tokens`, or the context is full). An interrupted iteration leaves what was written: call `flush`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        cache: str | Cache | Reader | None = "auto",
        skip_special: bool = True,
        probabilities: bool = False,
    ) -> None:
        """`probabilities`: also note how likely the model found each token, at temperature 1."""
        self.model, self.tokenizer, self.prompt_ids = model, tokenizer, list(prompt_ids)
        self.sampling = Sampling() if sampling is None else sampling
        self.stops = stop_texts(stop)
        self.limits = limits_of(model, max_new_tokens, min_new_tokens)
        self.cache, self.asked = cache, probabilities
        self.decoder = tokenizer.stream(skip_special)
        self.ids: list[int] = []
        self.probabilities: list[float] = []
        self.text = ""
        self.finish_reason: Literal["stop", "length"] | None = None
        self.stopped_by: str | None = None
        self.prefill_seconds = 0.0  # until the first new token
        self.decode_seconds = 0.0  # from then on
        self._held = ""

    @property
    def prefill_tokens_per_second(self) -> float:
        return len(self.prompt_ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the first one; a single token counts with its prompt."""
        if len(self.ids) > 1:
            return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0
        return len(self.ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    def __iter__(self) -> Iterator[str]:
        prompt = torch.tensor([self.prompt_ids], dtype=torch.int64, device=self.model.embedding.weight.device)
        clock = time.perf_counter()
        steps = stream(self.model, prompt, sampling=self.sampling, limits=self.limits, cache=self.cache)
        for step in steps:
            token, now = int(step.ids[0]), time.perf_counter()
            if not self.ids:
                self.prefill_seconds = now - clock
            self.decode_seconds = now - clock - self.prefill_seconds
            self.ids.append(token)
            if self.asked:
                self.probabilities.append(math.exp(float(step.logits[0].float().log_softmax(dim=-1)[token])))
            if token in self.limits.ends:
                self.finish_reason = "stop"
            piece = self._release(self.decoder.push(token))
            if piece:
                yield piece
            if self.stopped_by is not None:
                return
        self.finish_reason = self.finish_reason or "length"
        if piece := self.flush():
            yield piece

    def flush(self) -> str:
        """What was held back: half a character, or the beginning of a stop text that never ended."""
        piece = self._release(self.decoder.flush())
        rest, self._held = ("" if self.stopped_by is not None else self._held), ""
        self.text += rest
        return piece + rest

    def _release(self, new: str) -> str:
        """Text that is certain: up to a stop text, or up to what may be the beginning of one."""
        self._held += new
        found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, self.stopped_by = min(found)
            self.finish_reason = "stop"
        else:
            end = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece


@dataclass(frozen=True)
class Found:
    """A text that beam search found."""

    text: str
    ids: tuple[int, ...]  # its new tokens, the end token included
    score: float  # log-probability / new tokens ** length_penalty


def find_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    beaming: Beaming,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    cache: str | None = "auto",
    skip_special: bool = True,
) -> list[Found]:
    """The likeliest texts after the prompt `prompt_ids`, the best first: `beaming.best`, or as many as there are."""
    prompt = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=model.embedding.weight.device)
    limits = limits_of(model, max_new_tokens, min_new_tokens)
    beams = search(model, prompt, beaming=beaming, limits=limits, cache=cache)
    begun = beams.ids.shape[1] - int(beams.lengths.max())
    found = []
    for row, score, length in zip(beams.ids.tolist(), beams.scores.tolist(), beams.lengths.tolist(), strict=True):
        if score > -math.inf:
            new = row[begun : begun + length]
            found.append(Found(tokenizer.decode(new, skip_special=skip_special), tuple(new), score))
    return found


def stop_texts(stop: Sequence[str]) -> tuple[str, ...]:
    """Checked stop texts. Raises LaminaError for an empty one, or for more than four."""
    if isinstance(stop, str):
        stop = (stop,)
    if len(stop) > STOPS:
        raise LaminaError(f"stop has {len(stop)} texts; at most {STOPS} are looked for")
    for one in stop:
        if not isinstance(one, str) or not one:
            raise LaminaError(f"stop holds {one!r}; each must be a text of at least one character")
    return tuple(stop)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
