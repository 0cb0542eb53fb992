"""A conversation whose turns share one cache: each turn reads only what the ones before have not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.cache import Cache
from lamina.errors import UnsupportedError
from lamina.generation.compiled import Reader
from lamina.generation.sample import Sampling
from lamina.generation.text import Writing
from lamina.model import Model
from lamina.text import Tokenizer


class Chat:
    """Messages so far, and the cache of the ids that the model has read.

    The whole conversation is rendered anew for each turn; the cache is trimmed to where it begins like that. Templates
    that rewrite the past, and answers that encode to other ids than were generated, cost time only.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
        cache: str | None = "auto",
    ) -> None:
        self.model, self.tokenizer, self.kind, self.system = model, tokenizer, cache, system
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
        self.cache: Cache | Reader | None = None
        self.answer: Writing | None = None
        self.reused = 0  # tokens of the last prompt that were in the cache
        self._turns: list[dict[str, str]] = []
        self._read: list[int] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, as far as it was written."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        last = [] if self.answer is None else [{"role": "assistant", "content": self.answer.text}]
        return first + self._turns + last

    def reset(self) -> None:
        """Begin anew."""
        self.cache, self.answer, self._turns, self._read = None, None, [], []

    def say(self, text: str) -> Writing:
        """The answer to `text`, which is written while it is iterated. A message that does not fit is not kept."""
        said = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.chat_ids(said)
        if self.answer is not None and self.cache is not None:
            self._read = (self._read + self.answer.ids)[: self.cache.length]
        cache = self._prepared(ids)
        self.reused = cache.length if isinstance(cache, Cache | Reader) else 0
        # Until the answer begins, the cache may hold less than `_read` says, never something else.
        answer = Writing(self.model, self.tokenizer, ids[self.reused :], cache=cache, **self.options)
        self._turns = said if self.system is None else said[1:]
        self.answer, self._read = answer, ids
        return answer

    def take_back(self) -> None:
        """Forget the last message and its answer: it did not fit, or was not meant."""
        self._turns, self.answer = self._turns[:-1], None
        self.cache, self._read = None, []

    def _prepared(self, ids: list[int]) -> Cache | Reader | str | None:
        if self.kind is None or self.kind == "none" or self.model.spec.two_stacks:
            return self.kind  # an encoder reads its whole source anew
        same = 0
        if self.cache is not None:
            # The last id is always read: its logits choose the first new token.
            while same < min(len(ids) - 1, len(self._read)) and ids[same] == self._read[same]:
                same += 1
            if same < self.cache.length:
                try:
                    self.cache.trim(same)
                except (TypeError, UnsupportedError):  # rings and sinks have forgotten the past
                    same = 0
        if same == 0 or self.cache is None:
            engine, context = self.model.engine, self.model.spec.context
            if self.kind == "auto" and engine is not None and engine.fits(context or 0):
                self.cache = engine.start(2**31 if context is None else context)
            else:
                self.cache = self.model.new_cache(self.kind, 1, context)
        return self.cache
