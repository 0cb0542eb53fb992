"""Experts that choose their tokens (arXiv:2202.09368): all are as busy, and nothing has to balance them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.router import Router, Routing, real_tokens, widened
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceSpec(Spec):
    """Each expert chooses its best n c / E of the n tokens of a text, by softmax over the experts.

    What is chosen depends on later tokens: a causal stack is refused unless `causal` says that this is meant.
    """

    experts: int
    capacity: float = 2.0  # c: experts a token has on average
    causal: bool = False

    def check(self) -> None:
        if self.experts < 1 or not 0 < self.capacity <= self.experts:
            raise LaminaError(f"capacity={self.capacity} must be above 0 and at most experts={self.experts}")

    def build(self, width: int) -> ExpertChoice:
        return ExpertChoice(self, width)


class ExpertChoice(Router):
    """Experts choose, in each document of each row by itself: other texts and padding change nothing."""

    SHARD: dict[str, str] = {}

    def __init__(self, spec: ExpertChoiceSpec, width: int) -> None:
        super().__init__(spec.experts, width)
        self.spec = spec

    def forward(self, x: Tensor, call: Call) -> Routing:
        spec, (batch, length) = self.spec, x.shape[:2]
        logits = self.logits(widened(x))
        scores = logits.softmax(-1)  # (N, E)
        real = real_tokens(call)
        if real is None:
            rows = scores.unflatten(0, (batch, length))
            gate, at = rows.topk(min(length, self._places(length)), dim=1)  # (B, places, E)
            token = at + length * torch.arange(batch, device=x.device)[:, None, None]
            expert = torch.arange(spec.experts, device=x.device).expand_as(at)
            pairs = (token.flatten(), expert.flatten(), gate.flatten())
        else:
            text = _texts(call)
            sizes = torch.bincount(text, weights=real.to(scores.dtype))
            places = torch.tensor([self._places(int(size)) for size in sizes], device=x.device)
            rank = _ranks(scores.detach(), text)
            token, expert = ((rank < places[text, None]) & real[:, None]).nonzero(as_tuple=True)
            pairs = (token, expert, scores[token, expert])
        return Routing(spec.experts, *pairs, span=(batch, length), logits=logits, scores=scores, real=real)

    def _places(self, tokens: int) -> int:
        return max(1, round(tokens * self.spec.capacity / self.spec.experts))


def _texts(call: Call) -> Tensor:
    """(N,) the number of each token's text: a document of a row, without its padding."""
    tokens = call.tokens
    row = torch.arange(len(tokens.document), device=tokens.document.device)[:, None].expand_as(tokens.document)
    whose = torch.stack([row, tokens.document, tokens.real.to(row.dtype)], dim=-1)
    return whose.flatten(0, 1).unique(dim=0, return_inverse=True)[1]


def _ranks(scores: Tensor, text: Tensor) -> Tensor:
    """(N, E): how many tokens of its text an expert (column) likes better."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, text[order].argsort(dim=0, stable=True))  # by text, the best of each first
    sizes = torch.bincount(text)
    start = (sizes.cumsum(0) - sizes)[text[order]]
    rank = torch.arange(len(text), device=text.device)[:, None] - start
    return torch.empty_like(order).scatter_(0, order, rank)
