"""Rows for kNN-LM (arXiv:1911.00172, section 2): the state of a causal model at each token, and the token after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.errors import UnsupportedError
from lamina.generation.embed import rounded
from lamina.generation.perplexity import check_ids, check_predicts, window_of
from lamina.layers.experts import Experts
from lamina.layers.feedforward import FeedForward
from lamina.model import Model
from lamina.retrieve.chunks import Documents, once
from lamina.retrieve.embedding import EmbedderSpec, fingerprint

if TYPE_CHECKING:
    from lamina.data import Prepared


def keyed(model: Model) -> nn.Module:
    """The part whose input is the key: the last feed-forward, or experts, of the decoder. What it reads has been
    normalised where the model normalises before its parts. Raises UnsupportedError for a model without one."""
    check_predicts(model.spec, "it has no states to keep")
    assert model.decoder is not None
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.decoder.layers[-1].named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)  # an expert is a part of its layer
        if isinstance(module, FeedForward | Experts) and not inside:
            found.append((name, module))
    if not found:
        raise UnsupportedError("the last layer of this model has no feed-forward, whose input is the key of kNN-LM")
    return found[-1][1]


@contextmanager
def watched(model: Model) -> Iterator[list[Tensor]]:
    """Inside, what each forward gives to the last feed-forward is appended to the list: (B, T, width)."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].detach())

    handle = keyed(model).register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def key_spec(model: Model, source: str, tokenizer: str, window: int, stride: int) -> EmbedderSpec:
    """What made the keys of a database of states."""
    return EmbedderSpec(
        source=source,
        width=model.spec.width,
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        pooling="state",
        normalise=False,
        hash=fingerprint(model, tokenizer),
        window=window,
        stride=stride,
    )


class StateContent:
    """One row for each token but the first of each document: the state before it, and the token itself.

    A document is read in windows: the first `window` tokens, then `stride` new ones at a time with as many before them
    as fit. Documents that are the same as others are left out.
    """

    chunk, notes, given = 1, (), 0

    def __init__(
        self,
        prepared: Prepared,
        model: Model,
        source: str,
        window: int | None,
        stride: int | None,
        known: np.ndarray | None = None,
    ) -> None:
        """known: keys of documents that are left out, as they are there already."""
        keyed(model)
        self.model = model
        self.window, self.stride = window_of(model, window, stride)
        documents = Documents(prepared)
        self.chosen = once(documents.keys, known)
        self.hash, self.tokenizer, self.origins = prepared.hash, prepared.tokenizer(), documents.origins
        self.keys, self.files = documents.keys[self.chosen], documents.files[self.chosen]
        self.column = prepared.column("text")  # with the tokens that end documents, which are predicted too
        lengths = self.column.lengths()
        self.begins = (np.cumsum(lengths) - lengths)[self.chosen]
        self.starts = np.concatenate([[0], np.cumsum(lengths[self.chosen] - 1)]).astype(np.int64)
        self.embedder = key_spec(model, source, prepared.tokenizer_hash, self.window, self.stride)
        self.left, self.cut = len(documents) - len(self.chosen), 0

    def tokens(self, start: int, stop: int) -> Tensor:
        parts = [self._read(i, 1 + low, 1 + high) for i, low, high in self._parts(start, stop)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))[:, None]

    def vectors(self, start: int, stop: int) -> Tensor:
        parts = [torch.empty(0, self.embedder.width)]
        for i, low, high in self._parts(start, stop):
            size = int(self.starts[i + 1] - self.starts[i])
            read = partial(self._read, i)
            parts.append(states_of(self.model, read, size, low, high, self.window, self.stride))
        return torch.cat(parts)

    def _read(self, document: int, low: int, high: int) -> np.ndarray:
        """Some tokens of a document, which may be larger than memory."""
        begin = int(self.begins[document])
        return self.column.slice(begin + low, begin + high)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(document, from, to before): places in documents that rows are of."""
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            begin, end = int(self.starts[document]), min(int(self.starts[document + 1]), stop)
            if start < end:
                yield document, start - begin, end - begin
            start, document = max(end, start), document + 1


@torch.inference_mode()
def states_of(
    model: Model, read: Callable[[int, int], np.ndarray], size: int, low: int, high: int, window: int, stride: int
) -> Tensor:
    """(high - low, width) float32: the keys at places `low` to `high` of a text of `size` tokens, wherever the two are.
    read: (from, to before) -> its tokens; only windows that the places are in are read."""
    assert 0 <= low < high <= size
    parts = []
    first = 0 if low < window else window + (low - window) // stride * stride
    while first < high:
        last = min(first + (stride if first else window), size)
        begin = max(last - window, 0)
        ids = read(begin, last).tolist()
        check_ids(model, ids)
        rest, device = rounded(len(ids), window) - len(ids), model.embedding.weight.device
        row = torch.tensor([ids + [0] * rest], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * rest], device=device)
        with watched(model) as seen:
            model(row, mask, keep_logits=0)
        state = seen[-1][0, first - begin :].float().cpu()
        parts.append(state[max(low - first, 0) : max(high - first, 0)])
        first = last
    return torch.cat(parts)
