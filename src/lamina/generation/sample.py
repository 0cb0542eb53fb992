"""Choosing the next token: greedy, or sampling with temperature, top-k, top-p (arXiv:1904.09751) and min-p
(arXiv:2407.01082), applied in that order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. Raises LaminaError naming the value that is out of range."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._within("temperature", 0.0, 100.0)
        self._within("top_p", 0.0, 1.0, above=True)
        self._within("min_p", 0.0, 1.0)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise LaminaError(f"top_k is {self.top_k!r}; it must be a whole number of at least 1")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise LaminaError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^63 - 1")

    def _within(self, name: str, low: float, high: float, above: bool = False) -> None:
        value: Any = getattr(self, name)
        if value is None:
            return
        fine = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        if not fine or (above and value == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise LaminaError(f"{name} is {value!r}; it must be {bounds}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A generator seeded with `seed`; None where the global one serves."""
        return None if self.seed is None else torch.Generator(device=device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, vocabulary) logits -> (B,) ids."""
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        probabilities = self.probabilities(logits)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) logits -> the distribution that is sampled, in float32; temperature must not be 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ordered, index = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(dim=-1)
            # A token goes when those before it already reach top_p: the first one always stays.
            gone = share.cumsum(dim=-1) - share >= self.top_p
            logits = logits.masked_fill(gone.gather(1, index.argsort(dim=-1)), float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.min_p:
            least = probabilities.amax(dim=-1, keepdim=True) * self.min_p
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities
