"""Beam search: of each text the likeliest beginnings are kept, and each step goes on with the best of all that can
follow them (arXiv:1211.3711, section 3); longer sequences are made up for by a power of their length, as in fairseq."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.generation.feeder import Feeder, check_finite, warn_of_context
from lamina.generation.limits import Limits, begun_with
from lamina.generation.retrieval import Retrieval
from lamina.generation.sample import Sampling
from lamina.model import Model

CHUNK = 64
"""Logits whose maximum is looked at first: the k best of all lie in the k chunks with the best maxima."""


@dataclass(frozen=True, kw_only=True)
class Beaming:
    """How sequences are searched for. Raises LaminaError naming the value that is out of range."""

    beams: int
    length_penalty: float = 1.0  # a sequence of L new tokens scores log-probability / L ** length_penalty
    early_stopping: bool | Literal["never"] = False  # see `search`
    best: int = 1  # sequences that are returned for each text

    def __post_init__(self) -> None:
        if type(self.beams) is not int or self.beams < 1:
            raise LaminaError(f"beams is {self.beams!r}; it must be a whole number of at least 1")
        if type(self.best) is not int or not 1 <= self.best <= self.beams:
            raise LaminaError(f"best is {self.best!r}; it must be a whole number from 1 to beams={self.beams}")
        if type(self.length_penalty) not in (int, float) or not math.isfinite(self.length_penalty):
            raise LaminaError(f"length_penalty is {self.length_penalty!r}; it must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise LaminaError(f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'")


def check_alone(beaming: Beaming, sampling: Sampling) -> None:
    """Raise LaminaError where what is said of beams and what is said of sampling cannot both be meant."""
    one, other = (
        (beaming, "beams above 1") if beaming.beams == 1 else (sampling, "beams=1: beam search samples nothing")
    )
    for field in fields(one):
        if field.name != "beams" and getattr(one, field.name) != field.default:
            raise LaminaError(f"{field.name}={getattr(one, field.name)!r} needs {other}")


@dataclass
class Beams:
    """The best sequences of each text, the best first."""

    ids: Tensor  # (B * best, length): the prompt, what was written, and the pad id after its end
    scores: Tensor  # (B * best,): log-probability / new tokens ** length_penalty; -inf where no sequence was left
    lengths: Tensor  # (B * best,): new tokens of each, its end token included


@torch.inference_mode()
def search(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    beaming: Beaming,
    limits: Limits,
    cache: str | None = "auto",
    decoder_input_ids: Tensor | None = None,
    marked: Tensor | None = None,
    retrieval: Retrieval | None = None,
) -> Beams:
    """The best continuations of each row of `input_ids` (B, T), as `lamina.generate` with `beams` writes them; for a
    model with a stem `input_ids` are its features.

    The end token counts as a new one, the prompt (a start id) does not; a forced token costs nothing. A sequence that
    ends is kept if it is among the `beams` best of its step. A text is done as soon as `beams` sequences have ended
    (early_stopping=True); else when the best running one could no longer beat the worst of them, judged by the length
    that it has now (False), or by the length that would suit it best ("never").
    """
    begun = begun_with(model, input_ids, decoder_input_ids)
    feeder, logits, room = Feeder.begin(
        model, input_ids, attention_mask, limits, cache, decoder_input_ids, marked, engine=False, retrieval=retrieval
    )
    texts, device = logits.shape[0], logits.device
    # One row a text until it has been read; then its beams, as far as they differ.
    scores = torch.zeros((texts, 1), dtype=torch.promote_types(logits.dtype, torch.float32), device=device)
    written = torch.full((texts, 1, room), limits.pad, dtype=torch.int64, device=device)
    ended = _Ended.none(written, scores, beaming)
    searching = torch.ones(texts, dtype=torch.bool, device=device)
    for count in range(room):
        check_finite(logits, count)
        values, parent, token = _candidates(logits, scores, limits, count, feeder.begun, beaming.beams)
        ends = _ends(token, parent, written, limits, count) | (count + 1 == room)
        ended.add(values, parent, token, written, ends & searching[:, None], count)
        if count + 1 == room:
            continue
        scores, parent, token = _alive(values, parent, token, ends, beaming.beams)
        searching &= ended.may_improve(scores[:, 0], count + 1, room)
        if not bool(searching.any()):
            break
        alike = feeder.begun + _alike(written[:, :, :count])
        rows = parent + torch.arange(texts, device=device)[:, None] * written.shape[1]
        written = _follow(written, parent, token, count)
        feeder.reorder(rows.flatten(), alike)
        logits = feeder.read(token.flatten()[:, None], None)
    else:
        warn_of_context(model, room, limits)
    new, scores, lengths = ended.best()
    return Beams(torch.cat([begun.repeat_interleave(beaming.best, dim=0), new], dim=1), scores, lengths)


@dataclass
class _Ended:
    """The `beams` best sequences of each text that have ended so far; -inf where there are fewer."""

    beaming: Beaming
    scores: Tensor  # (B, beams), best first
    ids: Tensor  # (B, beams, room)
    lengths: Tensor  # (B, beams)

    @classmethod
    def none(cls, written: Tensor, scores: Tensor, beaming: Beaming) -> _Ended:
        texts, _, room = written.shape
        score = scores.new_full((texts, beaming.beams), -torch.inf)
        if room == 0:
            score[:, 0] = 0.0  # nothing is to be written, and nothing is certain
        lengths = torch.zeros_like(score, dtype=torch.int64)
        return cls(beaming, score, written.repeat(1, beaming.beams, 1), lengths)

    def add(self, values: Tensor, parent: Tensor, token: Tensor, written: Tensor, ends: Tensor, count: int) -> None:
        """Of the first `beams` candidates of each text (B, K), those that end."""
        beams, length = self.beaming.beams, count + 1
        values, parent, token, ends = (each[:, :beams] for each in (values, parent, token, ends))
        if not bool(ends.any()):
            return
        new = (values / length**self.beaming.length_penalty).masked_fill(~ends, -torch.inf)
        self.scores, pick = torch.cat([self.scores, new], dim=1).topk(beams)
        ids = torch.cat([self.ids, _follow(written, parent, token, count)], dim=1)
        self.ids = ids.gather(1, pick[:, :, None].expand(-1, -1, ids.shape[2]))
        self.lengths = torch.cat([self.lengths, torch.full_like(token, length)], dim=1).gather(1, pick)

    def may_improve(self, running: Tensor, length: int, most: int) -> Tensor:
        """(B,) bool: texts to go on with, where the best running sequences have the log-probabilities `running`."""
        worst = self.scores[:, -1]  # -inf until there are enough
        if self.beaming.early_stopping is True:
            return worst == -torch.inf
        if self.beaming.early_stopping == "never" and self.beaming.length_penalty > 0:
            length = most
        return running / length**self.beaming.length_penalty > worst

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B * best, longest) ids, (B * best,) scores and (B * best,) lengths."""
        best = self.beaming.best
        lengths = self.lengths[:, :best].flatten()
        return self.ids[:, :best, : int(lengths.max())].flatten(0, 1), self.scores[:, :best].flatten(), lengths


def _candidates(
    logits: Tensor, scores: Tensor, limits: Limits, count: int, begun: int, beams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What may follow, (B, K) each, the best first: log-probabilities of the whole, running rows, and tokens.

    K is large enough for `beams` to be left when all that can end have ended.
    """
    texts, rows = scores.shape
    forced = limits.forced(count, begun)
    if forced is not None:
        parent = torch.arange(rows, device=scores.device).expand(texts, rows)
        return scores, parent, torch.full_like(parent, forced)
    logits = logits.to(scores.dtype)
    before = scores - logits.logsumexp(dim=1).view(texts, rows)
    if held_back := limits.held_back(count):
        logits[:, held_back] = -torch.inf  # after the sum: what is held back takes its probability along
    most = beams * (1 + len({*limits.ends, *(stop[-1] for stop in limits.stops)}))
    return _top(logits.view(texts, rows, -1), before, most)


def _top(logits: Tensor, before: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` largest of before[b, r] + logits[b, r, v] of each b: values, r and v, (B, K) each, in order."""
    size = logits.shape[2]
    whole = size - size % CHUNK
    highest = logits[:, :, :whole].unflatten(2, (-1, CHUNK)).amax(dim=3)
    if whole < size:
        highest = torch.cat([highest, logits[:, :, whole:].amax(dim=2, keepdim=True)], dim=2)
    chunks = highest.shape[2]
    highest = (highest + before[:, :, None]).flatten(1)  # (B, rows * chunks)
    chunk = highest.topk(min(most, highest.shape[1]), sorted=False).indices
    row = chunk // chunks  # (B, C)
    column = (chunk % chunks * CHUNK)[:, :, None] + torch.arange(CHUNK, device=chunk.device)  # (B, C, CHUNK)
    text = torch.arange(logits.shape[0], device=chunk.device)[:, None]
    beyond, column = column >= size, column.clamp(max=size - 1)  # the last chunk may be short
    inside = logits[text[:, :, None], row[:, :, None], column] + before[text, row][:, :, None]
    inside = inside.masked_fill(beyond, -torch.inf).flatten(1)
    values, index = inside.topk(min(most, logits.shape[1] * size))
    return values, row.gather(1, index // CHUNK), column.flatten(1).gather(1, index)


def _ends(token: Tensor, parent: Tensor, written: Tensor, limits: Limits, count: int) -> Tensor:
    """(B, K) bool: candidates that end with their token."""
    ends = torch.zeros_like(token, dtype=torch.bool)
    for end in limits.ends:
        ends |= token == end
    for stop in limits.stops:
        *first, last = stop
        if len(first) <= count:
            begins = (written[:, :, count - len(first) : count] == torch.tensor(first, device=token.device)).all(dim=2)
            ends |= (token == last) & begins.gather(1, parent)
    return ends


def _alive(values: Tensor, parent: Tensor, token: Tensor, ends: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `beams` best candidates that have not ended; where there are fewer, some with the score -inf."""
    scores, pick = values.masked_fill(ends, -torch.inf).topk(min(beams, values.shape[1]))
    missing = (0, beams - pick.shape[1])
    scores, pick = F.pad(scores, missing, value=-torch.inf), F.pad(pick, missing)
    return scores, parent.gather(1, pick), token.gather(1, pick)


def _follow(written: Tensor, parent: Tensor, token: Tensor, count: int) -> Tensor:
    """(B, n, room): what the rows `parent` (B, n) have written, and `token` at column `count`."""
    followed = written.gather(1, parent[:, :, None].expand(-1, -1, written.shape[2]))
    followed[:, :, count] = token
    return followed


def _alike(written: Tensor) -> int:
    """How many columns at the beginning are the same in all beams of a text, in every text."""
    same = (written == written[:, :1]).flatten(0, 1).all(dim=0)
    return int(same.to(torch.int64).cumprod(dim=0).sum())
