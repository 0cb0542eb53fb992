"""Cross-entropy of a language head, without the scores of all tokens at one time.

A vocabulary of 50,000 makes 800 MB of float32 scores from 4,096 tokens, and as much for their gradient. Here some rows
at a time are scored, their gradient taken at once, and the scores forgotten; labels that ask nothing cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina.layers.head import LanguageHead

IGNORE = -100
"""The label of a place where nothing is asked, as in torch."""

SCORES = 1 << 21
"""So many scores are held at one time (8 MB in float32, about what a core has of its own), or those of 64 rows."""


@dataclass(frozen=True)
class Losses:
    """Sums over the labels of one kind that ask something."""

    total: Tensor  # what is minimised: smoothed, and with the z-loss
    nats: Tensor  # -log p of the labels, or what stands in its place, for the log; no gradient
    asked: int
    weight: float = 1.0  # of the mean over these labels in the loss of a step
    more: dict[str, Tensor] = field(default_factory=dict)  # other sums over the same labels, for the log


def cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: LanguageHead,
    table: Tensor,
    *,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> Losses:
    """Sums of -log softmax(head(hidden))[label] over labels other than IGNORE, in float32 or wider.

    hidden: (..., width). labels: (...), already shifted: row t is asked for labels[t]. table: the embedding, for a tied
    head. z_loss: + z_loss * log(Z)^2 a label (PaLM, arXiv:2204.02311, section 5; 1e-4 there). smoothing: that share of
    the probability is spread over the whole vocabulary (arXiv:1512.00567, section 7).
    """
    matrix = table if head.weight is None else head.weight
    if type(matrix.data) is not Tensor:  # a part of the vocabulary, whose head gathers the scores of all ranks
        return label_cross_entropy(head(hidden, table), labels, z_loss=z_loss, smoothing=smoothing)
    rows = asking(labels)
    wanted = labels.reshape(-1)[rows]

    def score(scores: Tensor, start: int, sums: tuple[Tensor, Tensor], need: bool) -> Tensor | None:
        total, nats = sums
        labels = wanted[start : start + len(scores), None]
        probability = scores.softmax(dim=-1)
        # The largest probability is at least 1 / V, so its logarithm is safe where that of the label's may not be.
        # Two maxima without their places take a tenth of the time of one with it.
        log_z = scores.amax(dim=-1, keepdim=True) - probability.amax(dim=-1, keepdim=True).log()
        lost = (log_z - scores.gather(1, labels)).sum()
        nats += lost
        total += (1 - smoothing) * lost + z_loss * log_z.square().sum()
        if smoothing:
            total += smoothing * (log_z - scores.mean(dim=-1, keepdim=True)).sum()
        if not need:
            return None
        grad = probability if z_loss == 0 else probability * (1 + 2 * z_loss * log_z)
        grad.scatter_add_(1, labels, torch.full_like(log_z, smoothing - 1))
        if smoothing:
            grad -= smoothing / scores.shape[1]
        return grad

    total, nats = scored(chosen(hidden, rows), head, table, score)
    return Losses(total, nats, len(rows))


def asking(labels: Tensor) -> Tensor:
    """(asked,): the places of labels that ask something, in the flattened labels."""
    return labels.reshape(-1).ne(IGNORE).nonzero()[:, 0]


def chosen(hidden: Tensor, rows: Tensor) -> Tensor:
    """(..., width) -> (rows, width)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if len(rows) == len(flat) else flat.index_select(0, rows)


Score = Callable[[Tensor, int, tuple[Tensor, Tensor], bool], Tensor | None]
"""(scores (n, V) of rows from `start` on, start, two sums to add to, whether a gradient is needed) -> that of the first
sum with respect to the scores."""


def scored(hidden: Tensor, head: LanguageHead, table: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Two sums over rows (N, width) of what `score` makes of their scores, some rows at a time. Only the first has a
    gradient, which is taken on the way forward."""
    matrix = table if head.weight is None else head.weight
    return _Fused.apply(head.begin(hidden), matrix, head.bias, head.spec.softcap, score)  # pyright: ignore


def label_cross_entropy(logits: Tensor, labels: Tensor, *, z_loss: float = 0.0, smoothing: float = 0.0) -> Losses:
    """The same sums from scores (..., labels) that are there already: classifiers, whose labels are few."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    nats = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="sum")
    total = nats
    if smoothing:
        total = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * flat.logsumexp(-1)[wanted != IGNORE].square().sum()
    return Losses(total, nats.detach(), int(wanted.ne(IGNORE).sum()))


class _Fused(torch.autograd.Function):
    """x (N, width), W (V, width) -> the two sums; the gradients of the first are taken on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float | None, score: Score
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        to_x, to_matrix, to_bias = ctx.needs_input_grad[:3]
        total, nats = torch.zeros((), dtype=wide, device=x.device), torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if to_x else None
        grad_matrix = torch.zeros(matrix.shape, dtype=wide, device=x.device) if to_matrix else None
        grad_bias = torch.zeros(matrix.shape[0], dtype=wide, device=x.device) if bias is not None and to_bias else None
        size = max(SCORES // matrix.shape[0], 64)
        for start in range(0, len(x), size):
            part = x[start : start + size]
            scores = F.linear(part, matrix, bias).to(wide)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            grad = score(scores, start, (total, nats), to_x or to_matrix or grad_bias is not None)
            if grad is None:
                continue
            if softcap is not None:
                grad *= 1 - (scores / softcap).square()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, matrix, out=grad_x[start : start + size])
            if grad_matrix is not None and grad_matrix.dtype == x.dtype:
                grad_matrix.addmm_(grad.T, part)
            elif grad_matrix is not None:
                grad_matrix += grad.T @ part
        ctx.save_for_backward(grad_x, grad_matrix, grad_bias)
        ctx.dtypes = (matrix.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_nats: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, bias = ctx.saved_tensors
        of_matrix, of_bias = ctx.dtypes
        return (
            None if x is None else x * of_total.to(x.dtype),
            None if matrix is None else (matrix * of_total).to(of_matrix),
            None if bias is None else (bias * of_total).to(of_bias),
            None,
            None,
        )
