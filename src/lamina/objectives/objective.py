"""What training asks of a model: examples cut from prepared text, batches of them, and the sum of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.layers import Record
from lamina.model import Model, ModelSpec
from lamina.objectives.loss import IGNORE
from lamina.specs import Spec

if TYPE_CHECKING:
    from lamina.data import Prepared

Example = dict[str, np.ndarray]
"""One example: arrays by name, as its objective cuts them."""


@dataclass(frozen=True)
class Batch:
    """What one forward reads, and what is asked of it."""

    inputs: dict[str, Tensor]  # arguments of Model.forward
    labels: Tensor  # (B, T), IGNORE where nothing is asked; (B,) for a class of each row
    more: dict[str, Tensor] = field(default_factory=dict)  # what an objective asks beside it

    @property
    def asked(self) -> int:
        """Labels that count."""
        return int(self.labels.ne(IGNORE).sum()) + sum(int(one.ne(IGNORE).sum()) for one in self.more.values())

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
        nothing = {name: torch.full_like(one, IGNORE) for name, one in self.more.items()}
        return replace(self, labels=torch.full_like(self.labels, IGNORE), more=nothing)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device),
            more={name: tensor.to(device) for name, tensor in self.more.items()},
        )


@dataclass(frozen=True)
class Total:
    """Sums over what a batch asks. The loss of a step is their sum by the labels of the whole global batch."""

    total: Tensor  # what is minimised
    asked: int
    parts: dict[str, Tensor]  # by name, no gradient, to be divided by `asked` for the log: "nats", ...
    auxiliary: Tensor | None = None  # means over the batch, not sums: what routers add


class Examples(Protocol):
    """A map from an index to an example. Random access, nothing remembered: `random` is the example's own."""

    def __len__(self) -> int: ...

    def example(self, index: int, random: np.random.Generator) -> Example: ...


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

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        """Run the model on the batch."""
        raise NotImplementedError


def forward(model: Model, batch: Batch, record: Record | None = None, **more: Any) -> tuple[Any, Tensor | None]:
    """The output of the model, and the sum of its auxiliary losses where it has some."""
    out = model(**batch.inputs, record=record, **more)
    losses = list(out.losses.values())
    return out, torch.stack([loss.float() for loss in losses]).sum() if losses else None


def padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """(B, longest) int64: rows of different lengths, filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return torch.from_numpy(out)


def mask_of(rows: Sequence[np.ndarray]) -> Tensor | None:
    """(B, longest): 1 for tokens, 0 for padding; None where there is none."""
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == lengths.max()).all()):
        return None
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)
