"""Perplexity and bits per byte of a text of any length, by a sliding window that is read once and never held whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model, ModelSpec

LONGEST = 2048
"""The window where none is asked for, in models that read more: attention grows with its square."""
Block = Callable[[Model, list[int], int], Tensor]
"""Log-probabilities of the last of some ids: as many as are asked for, or one less where nothing stands before them."""
ROWS = 256  # positions whose logits exist at one time


@dataclass
class Score:
    """What a text costs a model: `nats` over `tokens`, which spell `bytes`."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; depends on how the tokenizer cuts the text."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """log2 of the probability of the text for each of its UTF-8 bytes; models with other tokenizers compare."""
        return self.nats / math.log(2) / self.bytes

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nats + other.nats,
            self.seconds + other.seconds,
        )


def window_of(model: Model, window: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """The window and the stride that will be used. Raises LaminaError for values out of range."""
    context = model.spec.context
    if window is None:
        window = min(context or LONGEST, LONGEST)
    if type(window) is not int or window < 2 or (context is not None and window > context):
        most = "" if context is None else f", at most the {context} tokens that this model reads"
        raise LaminaError(f"window is {window!r}; it must be a whole number of at least 2{most}")
    stride = max(window // 2, 1) if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= window:
        raise LaminaError(f"stride is {stride!r}; it must be a whole number from 1 to window={window}")
    return window, stride


def score(
    model: Model,
    ids: Iterable[int],
    *,
    begin: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    block: Block | None = None,
) -> Iterator[Tensor]:
    """Log-probabilities (n,) float32 of the tokens of `ids`, in order, a block at a time; memory stays the same.

    The first `window` tokens are one block, each `stride` after them another; a block is read with as many tokens
    before it as the window holds. Example, window 4, stride 2, tokens 0..6: [0 1 2 3], 2 3 [4 5], 3 4 5 [6]: each is
    scored once. `begin` (the id of <s>) opens every window, where the checkpoint wants it; without it token 0 has
    nothing before it and is not scored. `block` reads a window in another way: kNN-LM.
    """
    check_predicts(model.spec, "a text alone has no perplexity")
    window, stride = window_of(model, window, stride)
    opening = [] if begin is None else [begin]
    keep = window - len(opening)
    stride = min(stride, window - 1)  # the first token of a block needs one before it
    source = iter(ids)
    held: list[int] = []
    while fresh := list(islice(source, stride if held else keep)):
        held = (held + fresh)[-keep:]
        yield (block or read_block)(model, opening + held, len(fresh))


def check_predicts(spec: ModelSpec, so: str) -> None:
    """Raise UnsupportedError, ending in `so`, for a model that does not continue texts."""
    if spec.decoder is None or spec.head is None:
        raise UnsupportedError(f"this model does not predict the next token, so {so}")
    if spec.two_stacks:
        raise UnsupportedError(f"an encoder-decoder predicts a text from its source, so {so}")


def log_probabilities(model: Model, ids: list[int]) -> list[float]:
    """The log-probability of each token after the first, given those before it."""
    return read_block(model, ids, len(ids)).tolist()


@torch.inference_mode()
def read_block(model: Model, ids: list[int], fresh: int, neighbours: Tensor | None = None) -> Tensor:
    """Log-probabilities of the last `fresh` of `ids`; of one less where nothing stands before them.

    neighbours: (N, k, r), of the chunks that end in `ids`, for a model that retrieves."""
    tensor = torch.tensor([ids], device=model.embedding.weight.device)
    check_ids(model, ids)
    first = max(len(ids) - fresh, 1)
    found = None if neighbours is None else neighbours[None].to(tensor.device)
    hidden = model(tensor, neighbours=found, keep_logits=0).hidden[0, first - 1 : -1]  # (n, width)
    return predicted(model, hidden, tensor[0, first:])[0].cpu()


def check_ids(model: Model, ids: Sequence[int]) -> None:
    """Raise LaminaError for an id that the model does not have."""
    if not 0 <= min(ids) <= max(ids) < model.spec.embedding.vocabulary:
        raise LaminaError(
            f"the text holds id {max(ids)}; ids of this model are below {model.spec.embedding.vocabulary}"
        )


def predicted(model: Model, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (n, width) and the tokens (n,) that follow them -> their log-probabilities (n,) float32, and
    whether each is the likeliest (n,). Only `ROWS` rows of logits exist at one time."""
    assert model.head is not None
    parts, likeliest = [hidden.new_empty(0, dtype=torch.float32)], [target.new_empty(0, dtype=torch.bool)]
    for at in range(0, hidden.shape[0], ROWS):
        logits = model.head(hidden[at : at + ROWS], model.embedding.weight).float()
        wanted = target[at : at + ROWS]
        parts.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0])
        likeliest.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(parts), torch.cat(likeliest)


def measure(
    model: Model,
    ids: Iterable[int],
    *,
    begin: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    block: Block | None = None,
) -> Iterator[Score]:
    """The score so far, after each block. `bytes` is left to the caller, who knows the text."""
    total, clock = Score(), time.perf_counter()
    for found in score(model, ids, begin=begin, window=window, stride=stride, block=block):
        total.tokens += len(found)
        total.nats -= float(found.double().sum())
        if not math.isfinite(total.nats):
            raise LaminaError(
                f"the loss is not finite within the first {total.tokens} tokens; the weights or the dtype are at fault"
            )
        total.seconds = time.perf_counter() - clock
        yield total
