"""Subject: what the checks ask of a model, whichever library it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamina.conformance.report import Row
from lamina.conformance.trial import drawn


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is to try on a model. What cannot be tried is a reason, which its row of the report repeats."""

    choices: Tensor  # (N,) ids that texts are drawn from
    length: int  # tokens of a text: more than the narrowest window, where that takes little time
    context: int | None  # tokens that it was trained to read
    two_stacks: bool  # whether one reads and the other writes
    hears: bool = False  # whether the first reads features: one text a row, and padding on its right only
    first: int | None = 0  # the position that texts begin at; None: they are not told, or not heeded
    placed: bool = True  # whether any part of it knows positions
    caches: tuple[str, ...] = ()  # ways of keeping keys
    backends: tuple[str | None, ...] = ()  # of attention, the reference first; None: what is chosen by itself
    causal: str = ""  # why later tokens may change earlier ones
    exact: str = ""  # why they may change the last bits of earlier ones
    generates: str = ""  # why it cannot generate
    trains: str = ""  # why it cannot be trained here


@dataclass(frozen=True)
class Source:
    """What the encoder of an encoder-decoder reads: ids (B, S), or features (B, bins, frames)."""

    content: Tensor
    mask: Tensor | None = None  # (B, S), 1 for what is real
    positions: Tensor | None = None  # (B, S)


class Subject(Protocol):
    """A model under test, in evaluation mode. Nothing here changes it but for the time of a call."""

    model: Any  # the module

    @property
    def facts(self) -> Facts: ...

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        source: Source | None = None,
        cache: Any = None,
        backend: str | None = None,
    ) -> list[Tensor]:
        """What a forward gives for each token of `ids` (B, T): hidden states, logits, or both, (B, T, ...) each.

        In an encoder-decoder `ids` are the decoder's, and the encoder reads `source`, or one text that stays the same.
        `cache` is from `new_cache` and extended; `mask` and `positions` are then those of `ids` alone.
        """
        ...

    def new_cache(self, kind: str, batch: int, capacity: int) -> Any: ...

    def sources(self, lengths: list[int]) -> Tensor:
        """Random content of a `Source`: a row for each of `lengths`, as long as the longest."""
        ...

    def attention(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor | None], int]:
        """What `read` gives when everything is to be shown; the weights that are; how many attentions ran."""
        ...

    def generate(
        self, ids: Tensor, new: int, *, beams: int = 1, seed: int | None = None, cached: bool = True
    ) -> Tensor:
        """(B, ...) ids of which the last `new` are written, greedily without a seed. No row ends early."""
        ...

    def embedding(self) -> nn.Module:
        """The module that ids go through first."""
        ...

    def over(self, model: Any) -> Subject:
        """The same questions to another module of its class."""
        ...

    def save(self, folder: Path) -> str:
        """Write the model as its library does; returns the name of the layout."""
        ...

    def load(self, folder: Path) -> Subject:
        """Read again what `save` wrote."""
        ...

    def trained(self, texts: list[Tensor], pause: int, folder: Path) -> tuple[nn.Module, nn.Module]:
        """Copies that learned a step from each of `texts`: without a break; and with one after `pause` of them, when
        all is saved in `folder`, and read again."""
        ...

    def router_loss(self, ids: Tensor, mask: Tensor | None = None, *, asked: bool = False) -> Tensor | str | None:
        """What balances experts in the loss of `ids`, as training gives it, or `asked` for by name.

        None: nothing does, although the configuration has a coefficient for it; a str: why nothing should.
        """
        ...

    def wrong(self, name: str) -> dict[str, Callable[[], Any]]:
        """What must be refused by name: "argument", "field of the configuration", ... called `name`, which is none."""
        ...

    def asks(self) -> dict[str, Callable[[], Any]]:
        """Calls that may be refused; a refusal has to be short."""
        ...

    def of_files(self, folder: Path, again: Any) -> Iterator[Row]:
        """What else holds for the files in `folder`, which `save` wrote, and the module read from them."""
        ...

    def strangers(self) -> list[str]:
        """Fields of the configuration as it is that nothing reads."""
        ...


def random_ids(subject: Subject, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) ids that the model reads."""
    return drawn(subject.facts.choices, batch, length, seed)


def positions(subject: Subject, *lengths: int, gap: int = 0) -> Tensor:
    """(1, T): positions of texts of `lengths` in one row, each from the first on, or `gap` after the one before."""
    first, parts, start = subject.facts.first or 0, [], 0
    for length in lengths:
        parts.append(torch.arange(start, start + length) + first)
        start = start + length + gap if gap else 0
    return torch.cat(parts)[None].to(subject.facts.choices.device)


def parameters(subject: Subject) -> int:
    return sum(p.numel() for p in subject.model.parameters())


LARGE = 50_000_000  # parameters above which a model reads few and short texts
LONGEST = 1024  # tokens beyond which no text is read whole


def long(facts: Facts, parameters: int) -> int:
    """Tokens of a long text: what reads short ones in another way (BigBird) does not read this one so."""
    context = facts.length if facts.context is None else min(facts.context, LONGEST)
    return min(facts.length, context) if parameters > LARGE else max(min(facts.length, context), min(context, 768))


def stored(subject: Subject) -> int:
    """Bytes of the weights."""
    return sum(p.numel() * p.element_size() for p in subject.model.parameters())
