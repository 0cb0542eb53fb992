"""Generation: read the prompt once, then one token at a time with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.generation import beam
from lamina.generation.compiled import Reader
from lamina.generation.feeder import Feeder, check_finite, warn_of_context
from lamina.generation.limits import Limits, Stop, begun_with, limits_of
from lamina.generation.retrieval import Retrieval, Retriever
from lamina.generation.sample import Sampling
from lamina.model import Model
from lamina.specs import unknown


@dataclass
class Step:
    """One generated column."""

    ids: Tensor  # (B,): the new token of each row; the pad id in rows that have ended
    logits: Tensor  # (B, vocabulary) that it was chosen from
    done: Tensor = field(repr=False)  # (B,) bool: rows that have ended with this token or before


@torch.inference_mode()
def generate(
    model: Model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    best: int = 1,
    stop: Sequence[Stop] = (),
    seed: int | None = None,
    cache: str | None = "auto",
    decoder_input_ids: Tensor | None = None,
    marked: Tensor | None = None,
    input_features: Tensor | None = None,
    retriever: Retriever | None = None,
    neighbours: int = 2,
    **wrong: Any,
) -> Tensor:
    """Continue each row of `input_ids` (B, T); returns (B, T + new) ids.

    An encoder-decoder reads `input_ids` and writes from its start id on, or continues `decoder_input_ids` (B, T);
    it returns the decoder's ids, those included. marked: (B, T), tokens of the source (LED's global ones); None: as
    the spec says. A model with a stem reads `input_features` (B, bins, frames).

    Ids that the checkpoint suppresses (suppress_tokens in generation_config.json) are not written.
    A row ends at the checkpoint's end ids (held back for the first `min_new_tokens`) or at one of `stop` (ids, or
    sequences of ids) and is filled with the pad id. Padding may be on either side. temperature 0 is greedy.
    beams: above 1, the likeliest sequences are searched for (`lamina.generation.beam.search`), and the `best` of each
    row are returned, (B * best, T + new).
    cache: a kind (`lamina.cache.KINDS`), or None to read everything anew for each token.
    retriever: of a model that retrieves, what finds so many `neighbours` of each chunk as soon as a row has ended it
    (`lamina.generation.retrieval.Retriever`); None: it writes without.
    Raises LaminaError for values out of range, an empty prompt, or a prompt that leaves no room in the context.
    """
    if wrong:
        known = [name for name in generate.__annotations__ if name not in ("wrong", "return")]
        raise LaminaError(unknown("argument of generate", next(iter(wrong)), known))
    beaming = beam.Beaming(beams=beams, length_penalty=length_penalty, early_stopping=early_stopping, best=best)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    beam.check_alone(beaming, sampling)
    limits = limits_of(model, max_new_tokens, min_new_tokens, stop)
    model.check_reads(input_ids, input_features)
    reads = input_ids if input_features is None else input_features
    if reads is None:
        raise LaminaError(f"{model.reads} is missing")
    begun = begun_with(model, reads, decoder_input_ids)
    given: dict[str, Any] = {"limits": limits, "cache": cache, "decoder_input_ids": decoder_input_ids, "marked": marked}
    given["retrieval"] = None if retriever is None else Retrieval(retriever, neighbours)
    if beams > 1:
        return beam.search(model, reads, attention_mask, beaming=beaming, **given).ids
    steps = stream(model, reads, attention_mask, sampling=sampling, **given)
    return torch.cat([begun, *(step.ids[:, None] for step in steps)], dim=1)


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
    marked: Tensor | None = None,
    retrieval: Retrieval | None = None,
) -> Iterator[Step]:
    """`generate`, one column at a time. A `Cache`, or the `Reader` of a compiled step, that already holds the text
    before `input_ids` is continued. For a model with a stem `input_ids` are its features."""
    feeder, logits, room = Feeder.begin(
        model, input_ids, attention_mask, limits, cache, decoder_input_ids, marked, retrieval=retrieval
    )
    generator = sampling.generator(logits.device)
    done = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    written: list[list[int]] = [[] for _ in done]
    for count in range(room):
        if held_back := limits.held_back(count):
            logits = logits.index_fill(1, torch.tensor(held_back, device=logits.device), -torch.inf)
        check_finite(logits, count)
        forced = limits.forced(count, feeder.begun)
        chosen = (
            sampling.choose(logits, generator) if forced is None else torch.full_like(done, forced, dtype=torch.int64)
        )
        chosen = chosen.masked_fill(done, limits.pad)
        done = done | _ended(chosen, done, written, limits)
        yield Step(chosen, logits, done)
        if bool(done.all()):
            return
        if count + 1 < room:
            logits = feeder.read(chosen[:, None], None)
    warn_of_context(model, room, limits)


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
