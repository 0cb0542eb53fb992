"""What training asks of a model: examples cut from prepared text, batches of them, and the sum of their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Record
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.loss import IGNORE, Losses, cross_entropy, label_cross_entropy
from lamina.specs import Spec

if TYPE_CHECKING:
    from lamina.data import Prepared

Example = dict[str, np.ndarray]
"""One example: arrays by name, as its objective cuts them."""


@dataclass(frozen=True)
class Batch:
    """What one forward reads, and what is asked of it."""

    inputs: dict[str, Tensor]  # arguments of Model.forward
    labels: dict[str, Tensor]  # by kind: (B, T), IGNORE where nothing is asked; (B,) for a class of each row

    @property
    def asked(self) -> dict[str, int]:
        """Labels that count, of each kind."""
        return {kind: int(one.ne(IGNORE).sum()) for kind, one in self.labels.items()}

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding aside."""
        return sum(
            int(self.inputs[mask].sum()) if mask in self.inputs else ids.numel()
            for ids, mask in (
                (self.inputs.get("input_ids"), "attention_mask"),
                (self.inputs.get("decoder_input_ids"), "decoder_attention_mask"),
            )
            if ids is not None
        )

    def unasked(self) -> Batch:
        """The same to be read, and nothing asked."""
        return replace(self, labels={kind: torch.full_like(one, IGNORE) for kind, one in self.labels.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            labels={kind: tensor.to(device) for kind, tensor in self.labels.items()},
        )


@dataclass(frozen=True)
class Total:
    """Sums over what a batch asks, by kind of label.

    The loss of a step is the sum over kinds of `weight` times their total by the labels of that kind in the whole
    global batch: BERT's is the mean over masked tokens and the mean over pairs of sentences.
    """

    kinds: dict[str, Losses]
    auxiliary: Tensor | None = None  # means over the batch, not sums: what routers add


class Examples(Protocol):
    """A map from an index to an example. Random access, nothing remembered: `random` is the example's own."""

    def __len__(self) -> int: ...

    def example(self, index: int, random: np.random.Generator) -> Example: ...


@dataclass(frozen=True)
class ByIndex:
    """Examples that a function makes."""

    count: int
    make: Callable[[int, np.random.Generator], Example]

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, random: np.random.Generator) -> Example:
        return self.make(index, random)


class Task(Protocol):
    """What a model is trained with: an objective, with what it needs beside the data."""

    def fits(self, spec: ModelSpec) -> None: ...

    def examples(self, prepared: Prepared, length: int) -> Examples: ...

    def collate(self, examples: Sequence[Example]) -> Batch: ...

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total: ...


class Neighbours(Protocol):
    """What was found for the chunks of prepared text: chunk u of document i has the number `starts[i]` + u, as far as
    that is below `starts[i + 1]`. What continues a chunk must not be among its neighbours."""

    starts: Tensor  # (documents + 1,) int64

    def values(self, chunks: Tensor) -> Tensor:
        """Numbers (...) int64, -1 for none -> ids (..., k, r) int64, -1 where there is no token."""
        ...


class Opening(Protocol):
    """Opens what an objective may need beside the data."""

    def model(self, source: str) -> Model:
        """A model that another one learns from."""
        ...

    def neighbours(self, index: str, directories: Sequence[str]) -> tuple[Callable[[Prepared], Neighbours], int]:
        """What finds those of a prepared text, in a database, and the tokens of its chunks."""
        ...


class Objective(Spec):
    """Base of all objectives."""

    NAME = ""
    """What it is called in a configuration."""

    def fits(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError where a model of this spec cannot be asked this."""
        raise NotImplementedError

    def examples(self, prepared: Prepared, length: int) -> Examples:
        """Examples of at most `length` tokens."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of several examples."""
        raise NotImplementedError

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        """What the output of the model loses, by kind of label."""
        raise NotImplementedError

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        """Run the model on the batch."""
        out = forward(model, batch, record)
        return Total(self.losses(model, batch, out), auxiliary(out))

    def ready(self, opening: Opening) -> Task:
        """What is trained with: itself, or itself with what it needs beside the data."""
        return self


START = -1
"""In decoder_input_ids: the id that the model's decoder starts with, which the data does not know."""


def forward(model: Model, batch: Batch, record: Record | None = None) -> Output:
    """The output of the model, without scores over the vocabulary."""
    inputs = batch.inputs
    ids = inputs.get("decoder_input_ids")
    if ids is not None:
        start = model.spec.special.decoder_start
        assert start is not None  # `needs_pair` has asked for it
        inputs = inputs | {"decoder_input_ids": ids.masked_fill(ids == START, start)}
    return model(**inputs, record=record, keep_logits=0)


def auxiliary(out: Output) -> Tensor | None:
    """The sum of the auxiliary losses of a model that has some."""
    losses = list(out.losses.values())
    return torch.stack([loss.float() for loss in losses]).sum() if losses else None


def vocabulary_losses(
    model: Model, out: Output, labels: Tensor, *, z_loss: float = 0.0, smoothing: float = 0.0
) -> Losses:
    """Of the model's language head."""
    assert model.head is not None
    return cross_entropy(out.hidden, labels, model.head, model.embedding.weight, z_loss=z_loss, smoothing=smoothing)


def class_losses(out: Output, labels: Tensor, *, smoothing: float = 0.0) -> Losses:
    """Of the model's label head, and how many are right. Raises LaminaError for labels that it has none for."""
    logits = out.label_logits
    assert logits is not None
    if labels.numel() and int(labels.max()) >= logits.shape[-1]:
        raise LaminaError(
            f"the data has label {int(labels.max())}; the model's head has labels 0 to {logits.shape[-1] - 1}"
        )
    found = label_cross_entropy(logits, labels, smoothing=smoothing)
    return replace(found, more={"accuracy": correct(logits, labels)})


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels have the highest score."""
    return (logits.detach().argmax(dim=-1) == labels).sum().float()


def needs_pair(spec: ModelSpec, what: str) -> None:
    """Raise UnsupportedError where a model is not an encoder-decoder that writes."""
    if not spec.two_stacks or spec.head is None or not spec.reads_ids:
        raise UnsupportedError(f"{what} needs an encoder that reads ids and a decoder with a language head")
    if spec.source_vocabulary != spec.embedding.vocabulary:
        raise UnsupportedError(
            f"{what} needs one vocabulary for both stacks; the encoder has {spec.source_vocabulary:,} tokens and the"
            f" decoder {spec.embedding.vocabulary:,}"
        )
    if spec.special.decoder_start is None:
        raise UnsupportedError(f"{what} needs special.decoder_start: the id that the decoder begins with")


def needs_encoder(spec: ModelSpec, what: str) -> None:
    """Raise UnsupportedError where a model is not an encoder with a language head."""
    if spec.encoder is None or spec.decoder is not None or spec.head is None:
        raise UnsupportedError(f"{what} needs an encoder with a language head, and no decoder")


def pair_batch(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Batch:
    """What an encoder reads, and what its decoder is to write: rows of ids without padding."""
    return documented_batch(
        sources, targets, *([np.zeros(len(row), np.int64) for row in s] for s in (sources, targets))
    )


def documented_batch(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    of_sources: Sequence[np.ndarray],
    of_targets: Sequence[np.ndarray],
) -> Batch:
    """The same of rows that hold several pairs: the number of each token's pair in its row, growing from 0."""
    shifted = []
    for row, of in zip(targets, of_targets, strict=True):  # the one place where anything is shifted
        read = np.concatenate([[START], row[:-1]])
        read[1:][of[1:] != of[:-1]] = START
        shifted.append(read)
    inputs = {"input_ids": padded(sources, 0), "decoder_input_ids": padded(shifted, 0)}
    for side, rows in (("", sources), ("decoder_", targets)):
        if (mask := mask_of(rows)) is not None:
            inputs[f"{side}attention_mask"] = mask
    if any(one[-1] for one in of_sources):
        inputs["document_ids"], inputs["decoder_document_ids"] = padded(of_sources, 0), padded(of_targets, 0)
    return Batch(inputs, {"target": padded(targets, IGNORE)})


def padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """(B, longest) int64: rows of different lengths, filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return torch.from_numpy(out)


def inputs_of(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """What one stack is given to read: the ids (B, longest), and the mask where there is padding."""
    inputs, mask = {"input_ids": padded(rows, 0)}, mask_of(rows)
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def mask_of(rows: Sequence[np.ndarray]) -> Tensor | None:
    """(B, longest): 1 for tokens, 0 for padding; None where there is none."""
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == lengths.max()).all()):
        return None
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)
