"""The verdict on an operation: both models read the same text, and what differs is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import Record
from lamina.model import Model, Output

ROWS = 256  # positions whose scores over the vocabulary exist at one time
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""What two ways to compute the same number may differ by, as a part of the largest one."""

Found = Literal["exact to the bit", "exact", "changed"]


@dataclass(frozen=True)
class Drift:
    """How far the states after a layer are from those of the old model: the norm of the difference by their own."""

    layer: str
    drift: float


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    parameters: int
    perplexity: float | None  # None: it predicts no next token
    cache_bytes: int | None  # of the longest text that was read; None: it has no cache
    tokens_per_second: float  # reading
    decoded_per_second: float | None  # with a cache, one token after the other
    bits_per_byte: float | None = None  # of the text; None: the ids are the same, and perplexities compare


@dataclass(frozen=True)
class Verdict:
    """What an operation kept, on a text."""

    found: Found
    tokens: int
    worst: float | None  # largest difference of an output, by the largest output; None: other tokens, by other models
    divergence: float | None  # KL(before | after) of the next token, nats a token; None: no scores over a vocabulary
    agreement: float | None  # part of the tokens after which both say the same is likeliest
    drift: tuple[Drift, ...]  # layer by layer; nothing where the stacks have different layers
    before: Side
    after: Side

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[int], None]


def compare(
    before: Model, after: Model, texts: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> Verdict:
    """Both models, in evaluation mode, read each of `texts`: ids, none longer than what both can read.

    An encoder-decoder reads the first half of a text, and writes the second; one that was a decoder writes all of it,
    and its encoder is given nothing. Raises LaminaError for texts without two tokens, and for ids that the new model
    does not read. Scores are compared over the tokens that both have.
    """
    long = [text for text in texts if len(text) > 1]
    if not long:
        raise LaminaError("a verdict needs a text of at least two tokens")
    rows = after.spec.embedding.vocabulary
    if before.spec.embedding.vocabulary > rows and any(number >= rows for text in long for number in text):
        raise LaminaError(f"the new model has fewer tokens than the old one, {rows}, and the text has one that is gone")
    joined = after.spec.two_stacks and not before.spec.two_stacks
    total, sides = _Total(), (_Clock(before), _Clock(after, joined))
    for text in long:
        ids = torch.tensor([list(text)], device=before.embedding.weight.device)
        records = Record("*.output"), Record("*.output")
        with torch.inference_mode():
            one, other = (side.read(ids, record) for side, record in zip(sides, records, strict=True))
            targets = [_targets(model, ids, joined) for model in (before, after)]
            total.add(before, after, one, other, targets)
            total.layers(*(record.values for record in records))
        if progress is not None:
            progress(total.tokens)
    longest = max(long, key=len)
    figures = [
        side.figures(list(longest), nats, predicted)
        for side, nats, predicted in zip(sides, total.nats, total.predicted, strict=True)
    ]
    worst = total.worst / total.largest if total.largest else total.worst
    allowed = max(ROUNDING[next(model.parameters()).dtype] for model in (before, after))
    found: Found = "exact to the bit" if total.worst == 0 else "exact" if worst <= allowed else "changed"
    scored = total.tokens if total.scored else 0
    return Verdict(
        found,
        total.tokens,
        worst,
        total.divergence / scored if scored else None,
        total.agreed / scored if scored else None,
        tuple(Drift(name, math.sqrt(far / max(own, 1e-300))) for name, (far, own) in total.drift.items()),
        *figures,
    )


class _Clock:
    """One of the models, and how long it reads."""

    def __init__(self, model: Model, joined: bool = False) -> None:
        self.model, self.joined, self.seconds, self.tokens = model, joined, 0.0, 0

    def read(self, ids: Tensor, record: Record) -> Output:
        begun = time.perf_counter()
        out = self.model(**_inputs(self.model, ids, self.joined), record=record, keep_logits=0)
        self.seconds += time.perf_counter() - begun
        self.tokens += ids.shape[1]
        return out

    def figures(self, text: list[int], nats: float | None, predicted: int) -> Side:
        perplexity = None if nats is None or not predicted else math.exp(min(nats / predicted, 700))
        return side_of(self.model, text, perplexity, self.tokens / max(self.seconds, 1e-9))


@torch.inference_mode()
def side_of(
    model: Model, text: list[int], perplexity: float | None, rate: float, bits_per_byte: float | None = None
) -> Side:
    """The figures of a model, of which those with a cache are measured here, on a text that it reads at one time."""
    cache_bytes = decoded = None
    if model.decoder is not None and not model.spec.two_stacks and model.decoder.spec.repeat == 1:
        cache = model.new_cache()
        ids = torch.tensor([text], device=model.embedding.weight.device)
        more = min(8, len(text) - 1)
        model(ids[:, : len(text) - more], cache=cache, keep_logits=1)
        begun = time.perf_counter()
        for at in range(len(text) - more, len(text)):
            model(ids[:, at : at + 1], cache=cache, keep_logits=1)
        decoded = more / (time.perf_counter() - begun)
        cache_bytes = cache.bytes()
    count = sum(parameter.numel() for parameter in model.parameters())
    return Side(count, perplexity, cache_bytes, rate, decoded, bits_per_byte)


class _Total:
    """Sums over all texts."""

    def __init__(self) -> None:
        self.tokens = 0
        self.predicted = [0, 0]
        self.worst = self.largest = self.divergence = self.agreed = 0.0
        self.scored = False
        self.nats: list[float | None] = [None, None]
        self.drift: dict[str, tuple[float, float]] = {}

    def add(self, before: Model, after: Model, one: Output, other: Output, targets: list[Tensor | None]) -> None:
        self.tokens += one.hidden.shape[0] * one.hidden.shape[1]
        for left, right in _outputs(one, other):
            self._differ(left, right)
        if before.head is None or after.head is None:
            self._differ(one.hidden, other.hidden)
            return
        self.scored = True
        size = min(model.spec.embedding.vocabulary for model in (before, after))
        hidden = one.hidden.flatten(0, 1), other.hidden.flatten(0, 1)
        for at in range(0, hidden[0].shape[0], ROWS):
            rows = slice(at, at + ROWS)
            left, right = (
                model.head(states[rows], model.embedding.weight)[..., :size].float()  # pyright: ignore[reportOptionalCall]
                for model, states in zip((before, after), hidden, strict=True)
            )
            self._differ(left, right)
            self.agreed += float((left.argmax(dim=-1) == right.argmax(dim=-1)).sum())
            said = left.log_softmax(dim=-1), right.log_softmax(dim=-1)
            # Of the lesser probabilities rounding can make the sum a little negative.
            self.divergence += max(float((said[0].exp() * (said[0] - said[1])).double().sum()), 0.0)
            for side, wanted in enumerate(targets):
                if wanted is not None:
                    wanted = wanted[rows]
                    real = wanted >= 0
                    self.predicted[side] += int(real.sum())
                    got = said[side].gather(1, wanted.clamp(min=0)[:, None])[:, 0]
                    self.nats[side] = (self.nats[side] or 0.0) - float(got[real].double().sum())

    def layers(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        if one.keys() != other.keys():
            return
        for name, left in one.items():
            far, own = self.drift.get(name.removesuffix(".output"), (0.0, 0.0))
            difference = (other[name].double() - left.double()).square().sum()
            self.drift[name.removesuffix(".output")] = (
                far + float(difference),
                own + float(left.double().square().sum()),
            )

    def _differ(self, left: Tensor, right: Tensor) -> None:
        self.worst = max(self.worst, float((left.float() - right.float()).abs().max()))
        self.largest = max(self.largest, float(left.float().abs().max()))


def _inputs(model: Model, ids: Tensor, joined: bool) -> dict[str, Tensor]:
    if not model.spec.two_stacks:
        return {"input_ids": ids}
    if joined:
        nothing = torch.zeros(1, 1, model.spec.width, dtype=model.embedding.weight.dtype, device=ids.device)
        return {"encoder_output": nothing, "decoder_input_ids": ids}
    half = max(ids.shape[1] // 2, 1)
    start = model.spec.special.decoder_start or 0
    begun = torch.cat([ids.new_full((1, 1), start), ids[:, half:-1]], dim=1)
    return {"input_ids": ids[:, :half], "decoder_input_ids": begun}


def _targets(model: Model, ids: Tensor, joined: bool) -> Tensor | None:
    """What each state is to predict, (n,), -1 for nothing; None where a model fills in or reads only."""
    if model.decoder is None or model.head is None:
        return None
    if model.spec.two_stacks and not joined:
        return ids[0, max(ids.shape[1] // 2, 1) :]
    return torch.cat([ids[0, 1:], ids.new_full((1,), -1)])


def _outputs(one: Output, other: Output) -> list[tuple[Tensor, Tensor]]:
    """What both say beside the scores over the vocabulary."""
    pairs = [(one.label_logits, other.label_logits), (one.pooled, other.pooled)]
    return [(left, right) for left, right in pairs if left is not None and right is not None]
