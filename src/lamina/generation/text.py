"""Text that a model writes, piece by piece: whole characters only, cut at stop texts, with its own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lamina.cache import Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.beam import Beaming, search
from lamina.generation.compiled import Reader
from lamina.generation.limits import limits_of
from lamina.generation.loop import stream
from lamina.generation.retrieval import Retrieval
from lamina.generation.sample import Sampling
from lamina.model import Model
from lamina.text import Tokenizer
from lamina.text.stream import Stream

STOPS = 4  # stop texts that one call may have


class Cut:
    """Ids in, text out as it becomes certain, cut before the first of `stops`; `text` is all of it so far.

    A piece never ends within a character, nor within what may become a stop text.
    """

    def __init__(self, decoder: Stream, stops: Sequence[str] = ()) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.text = ""
        self.stopped_by: str | None = None
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain with this token, and was not before."""
        return self._release(self.decoder.push(token))

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
        else:
            end = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece


class Writing:
    """What follows the prompt `prompt_ids`. Iterating generates it and gives pieces of text as they become certain.

    `text` is all pieces joined. Once it has ended, `finish_reason` is "stop" (an end token or a stop text came;
    `stopped_by` has the text) or "length" (`max_new_tokens`, or the context is full). An interrupted iteration leaves
    what was written: call `flush`.
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
        retrieval: Retrieval | None = None,
    ) -> None:
        """`probabilities`: also note how likely the model found each token, at temperature 1. `retrieval`: of a model
        that retrieves, who is asked while it writes."""
        if model.spec.source_vocabulary != model.spec.embedding.vocabulary:
            raise UnsupportedError(
                "the encoder of this model has tokens of its own, not those of this tokenizer: give generate its ids"
            )
        self.model, self.tokenizer, self.prompt_ids = model, tokenizer, list(prompt_ids)
        self.sampling = Sampling() if sampling is None else sampling
        self.limits = limits_of(model, max_new_tokens, min_new_tokens)
        self.cache, self.asked, self.retrieval = cache, probabilities, retrieval
        self.cut = Cut(tokenizer.stream(skip_special), stop_texts(stop))
        self.ids: list[int] = []
        self.probabilities: list[float] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.prefill_seconds = 0.0  # until the first new token
        self.decode_seconds = 0.0  # from then on

    @property
    def text(self) -> str:
        return self.cut.text

    @property
    def stopped_by(self) -> str | None:
        return self.cut.stopped_by

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
        steps = stream(
            self.model,
            prompt,
            sampling=self.sampling,
            limits=self.limits,
            cache=self.cache,
            retrieval=self.retrieval,
        )
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
            piece = self.cut.push(token)
            if self.stopped_by is not None:
                self.finish_reason = "stop"
            if piece:
                yield piece
            if self.stopped_by is not None:
                return
        self.finish_reason = self.finish_reason or "length"
        if piece := self.flush():
            yield piece

    def flush(self) -> str:
        """What was held back: half a character, or the beginning of a stop text that never ended."""
        piece = self.cut.flush()
        if self.stopped_by is not None:
            self.finish_reason = "stop"
        return piece


def write(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """What follows each of several prompts, read and written at once; each text ends before the first stop text in it.

    A row ends at the tokenizer's end token too, where the checkpoint names another one. There may be any number of stop
    texts. Raises LaminaError as `generate` does, and for an empty stop text.
    """
    check_texts(stop)
    length = max(map(len, prompts))
    device = model.embedding.weight.device
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=device)
    limits = limits_of(model, max_new_tokens, stop=() if tokenizer.eos is None else (tokenizer.eos,))
    cuts = [Cut(tokenizer.stream(), stop) for _ in prompts]
    going = set(range(len(prompts)))
    for step in stream(model, ids, mask, sampling=Sampling() if sampling is None else sampling, limits=limits):
        over = step.done.tolist()
        tokens = step.ids.tolist()
        for row in sorted(going):
            cuts[row].push(tokens[row])
            if over[row] or cuts[row].stopped_by is not None:
                going.remove(row)
        if not going:
            break
    for cut in cuts:
        cut.flush()
    return [cut.text for cut in cuts]


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
    retrieval: Retrieval | None = None,
) -> list[Found]:
    """The likeliest texts after the prompt `prompt_ids`, the best first: `beaming.best`, or as many as there are."""
    prompt = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=model.embedding.weight.device)
    limits = limits_of(model, max_new_tokens, min_new_tokens)
    beams = search(model, prompt, beaming=beaming, limits=limits, cache=cache, retrieval=retrieval)
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
    check_texts(stop)
    return tuple(stop)


def check_texts(stop: Sequence[str]) -> None:
    """Raise LaminaError for a stop text that is empty, or none."""
    for one in stop:
        if not isinstance(one, str) or not one:
            raise LaminaError(f"stop holds {one!r}; each must be a text of at least one character")


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
