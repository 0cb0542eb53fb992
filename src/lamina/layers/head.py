"""Heads: from hidden states to scores over the vocabulary, or over the labels of a sequence or of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.dropout import dropout
from lamina.layers.feedforward import ACTIVATIONS, Activation, FeedForwardSpec
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear, linear
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.layers.parameter import parameter
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class TransformSpec(Spec):
    """norm(act(dense(x))) before the vocabulary: BERT's masked-LM head (arXiv:1810.04805, its code)."""

    act: Activation = "identity"
    norm: LayerNormSpec | RMSNormSpec | None = None  # None in OPT-350m
    width: int | None = None  # of what comes out, where the table is narrower than the model: ALBERT, OPT-350m
    bias: bool = True  # False in OPT-350m

    def build(self, width: int) -> Transform:
        return Transform(self, width)


@dataclass(frozen=True, kw_only=True)
class LanguageHeadSpec(Spec):
    """logits = softcap(scale * transform(x) W^T + bias); W is the embedding table where tied (arXiv:1608.05859)."""

    tied: bool = True
    bias: bool = False  # True in BERT and RoBERTa
    scale: float = 1.0  # width^-0.5 in PaLM and T5 v1.0
    softcap: float | None = None  # 30 in Gemma 2
    transform: TransformSpec | None = None  # BERT, RoBERTa

    def check(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise LaminaError(f"softcap is {self.softcap}; it must be above 0, or None")

    def build(self, width: int, vocabulary: int) -> LanguageHead:
        return LanguageHead(self, width, vocabulary)


@dataclass(frozen=True, kw_only=True)
class PoolerSpec(Spec):
    """act(dense(one token)): BERT's summary of a sequence; RoBERTa's and BART's classifiers have dropout first."""

    token: Literal["first", "last"] = "first"  # of the real ones; the last in BART, whose decoder is causal
    dropout: float = 0.0  # before the dense layer
    act: Activation = "tanh"  # that of the layers in BigBird's classifier

    def build(self, width: int) -> Pooler:
        return Pooler(self, width)


@dataclass(frozen=True, kw_only=True)
class LabelStepSpec(Spec):
    """norm(x + dropout(feedforward(dropout(x)))) before the labels: where BigBird answers questions (arXiv:2007.14062,
    its code)."""

    feedforward: FeedForwardSpec
    norm: LayerNormSpec | RMSNormSpec
    dropout: float = 0.0

    def check(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise LaminaError(f"dropout={self.dropout} must lie within 0 and 1")

    def build(self, width: int) -> LabelStep:
        return LabelStep(self, width)


Task = Literal["sequence", "next_sentence", "choice", "token", "span"]
"""What labels are of: a row, a pair of sentences, a row that is one of several choices; each token, or each token as
the start and the end of an answer."""


@dataclass(frozen=True, kw_only=True)
class LabelHeadSpec(Spec):
    """A linear layer over labels: of the pooled sequence, or of each token."""

    labels: int
    task: Task = "sequence"
    dropout: float = 0.0  # before it
    step: LabelStepSpec | None = None  # before that: BigBird's answers
    after: int | None = None  # answers stand after the first such id, or are the first token (there is none): BigBird

    def check(self) -> None:
        if self.labels < 1 or not 0 <= self.dropout <= 1:
            raise LaminaError(f"labels={self.labels} must be at least 1, dropout={self.dropout} within 0 and 1")
        if self.after is not None and self.task != "span":
            raise LaminaError(f"after={self.after} is for answers (task 'span'), and these labels are of a {self.task}")
        if self.task == "choice" and self.labels != 1:
            raise LaminaError(f"labels={self.labels} must be 1: each choice is a row, and has one score")

    @property
    def each_token(self) -> bool:
        """Whether there is one result a token; else there is one a row, from the pooled sequence."""
        return self.task in ("token", "span")

    def build(self, width: int) -> LabelHead:
        return LabelHead(self, width)


class Transform(nn.Module):
    """(B, T, width) -> (B, T, table's width)."""

    def __init__(self, spec: TransformSpec, width: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.width = width if spec.width is None else spec.width
        self.dense = Linear(width, self.width, bias=spec.bias)
        self.norm = None if spec.norm is None else spec.norm.build(self.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dense(x))
        return x if self.norm is None else self.norm(x)


class LanguageHead(nn.Module):
    """(B, T, width) -> (B, T, vocabulary)."""

    SHARD = {"weight": "vocabulary.out", "bias": "vocabulary.out"}

    def __init__(self, spec: LanguageHeadSpec, width: int, vocabulary: int) -> None:
        super().__init__()
        self.spec = spec
        self.transform = None if spec.transform is None else spec.transform.build(width)
        width = width if self.transform is None else self.transform.width
        self.weight = None if spec.tied else parameter(vocabulary, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if spec.bias else None

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """`table`: the embedding, (vocabulary, width), used where the head is tied."""
        return self.finish(linear(self.begin(x), table if self.weight is None else self.weight, self.bias))

    def begin(self, x: Tensor) -> Tensor:
        """What comes before the matrix."""
        x = x if self.transform is None else self.transform(x)
        return x if self.spec.scale == 1.0 else x * self.spec.scale

    def finish(self, logits: Tensor) -> Tensor:
        """What comes after it."""
        cap = self.spec.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def initialise(self, draw: Draw) -> None:
        if self.weight is not None:
            draw.matrix(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Pooler(nn.Module):
    """(B, T, width) -> (B, width)."""

    def __init__(self, spec: PoolerSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.spec.act](self.dense(dropout(x, self.spec.dropout, self.training)))


class LabelStep(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    def __init__(self, spec: LabelStepSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.feedforward = spec.feedforward.build(width)
        self.norm = spec.norm.build(width)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        h = self.feedforward(dropout(x, self.spec.dropout, self.training), call)
        return self.norm(x + dropout(h, self.spec.dropout, self.training))


LOWERED = 1e6
"""What the scores of tokens lose at which no answer may stand: transformers' number, so that sums over them agree."""


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, width), (B, T) of 1 and 0 -> (B, width): the mean over real tokens (Sentence-BERT, arXiv:1908.10084)."""
    weight = mask[:, :, None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


class LabelHead(nn.Module):
    """(..., width) -> (..., labels)."""

    def __init__(self, spec: LabelHeadSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.step = None if spec.step is None else spec.step.build(width)
        self.dense = nn.Linear(width, spec.labels)

    def forward(self, x: Tensor, call: Call, answers: Tensor | None = None) -> Tensor:
        """`answers`: (B, T) bool, where one may stand; None: anywhere."""
        x = x if self.step is None else self.step(x, call)
        scores = self.dense(dropout(x, self.spec.dropout, self.training))
        return scores if answers is None else torch.where(answers[:, :, None], scores, scores - LOWERED)
