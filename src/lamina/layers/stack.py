"""A stack of layers with what belongs to it: positions, segments, the norms at its ends, a bias on all its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.bias import AlibiSpec, BucketBiasSpec
from lamina.layers.block import LayerSpec
from lamina.layers.call import Call
from lamina.layers.cross import CrossAttentionSpec
from lamina.layers.dropout import dropout
from lamina.layers.embedding import SegmentSpec
from lamina.layers.expert_choice import ExpertChoiceSpec
from lamina.layers.linear import Linear
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.layers.positions import LearnedPositionSpec, SinusoidalPositionSpec
from lamina.layers.product_keys import check_tables, share_tables
from lamina.layers.recurrent import RecurrentMemorySpec
from lamina.layers.router_loss import RouterLossSpec
from lamina.patterns import Pattern
from lamina.specs import Spec

Show = Callable[[int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class StackSpec(Spec):
    """input(dropout(norm(token + position + segment))), the layers, norm."""

    layers: tuple[LayerSpec, ...]
    position: LearnedPositionSpec | SinusoidalPositionSpec | None = None  # GPT-2, BERT; None with rotary or biases
    segment: SegmentSpec | None = None  # BERT
    input_norm: LayerNormSpec | RMSNormSpec | None = None  # BERT, BART
    dropout: float = 0.0  # of the sum: 0.1 in GPT-2 and BERT
    norm: LayerNormSpec | RMSNormSpec | None = None  # after the last layer, wherever layers are pre-norm
    output_dropout: float = 0.0  # after that norm: T5
    layer_dropout: float = 0.0  # in training a layer is left out with this chance: M2M-100 (arXiv:1909.11556)
    score_bias: BucketBiasSpec | AlibiSpec | None = None  # T5; BLOOM, MPT
    input_width: int | None = None  # of what comes in, before a linear layer takes it to the model's: ALBERT
    recurrence: RecurrentMemorySpec | None = None  # memory tokens between segments: Recurrent Memory Transformer
    repeat: int = 1  # each layer runs so many times in a row, with the same weights: ALBERT (arXiv:1909.11942)

    def check(self) -> None:
        if self.repeat < 1 or (self.input_width is not None and self.input_width < 1):
            raise LaminaError(f"repeat={self.repeat} and input_width={self.input_width} must be at least 1")
        if not 0 <= self.layer_dropout < 1:
            raise LaminaError(f"layer_dropout={self.layer_dropout} must be from 0 to below 1")
        check_tables(self)
        chooses = [part for _, part in self.walk() if isinstance(part, ExpertChoiceSpec) and not part.causal]
        patterns = [part.pattern for _, part in self.walk() if isinstance(getattr(part, "pattern", None), Pattern)]  # pyright: ignore[reportAttributeAccessIssue]
        if chooses and not all(pattern.looks_ahead() for pattern in patterns):
            raise LaminaError(
                "experts that choose their tokens (ExpertChoiceSpec) let a token see later ones, and this stack is"
                " causal; use TopKSpec, or causal=True if that is meant"
            )
        if self.recurrence is not None:
            self._check_recurrence(self.recurrence, patterns)

    def _check_recurrence(self, recurrence: RecurrentMemorySpec, patterns: list[Pattern]) -> None:
        """Refuse what a stack that reads in segments cannot have."""
        if any(pattern.looks_ahead() for pattern in patterns):
            raise LaminaError("recurrence is for causal stacks: memory is written after a segment, by what sees it all")
        for path, part in self.walk():
            if isinstance(part, CrossAttentionSpec | RouterLossSpec):
                raise LaminaError(
                    f"{path}: recurrence reads segment by segment, and {type(part).__name__} a whole text"
                )
        if self.segment is not None or self.input_width is not None:
            raise LaminaError(
                "recurrence has vectors of its own in front of the text: segment and input_width have none"
            )
        if isinstance(self.position, LearnedPositionSpec) and self.position.size < recurrence.columns:
            raise LaminaError(
                f"position.size is {self.position.size}; a segment of {recurrence.length} tokens with its memory has"
                f" {recurrence.columns} positions"
            )

    def build(self, width: int) -> Stack:
        return Stack(self, width)


class Stack(nn.Module):
    """(B, T, width) token vectors -> (B, T, width) hidden states, after the last norm."""

    def __init__(self, spec: StackSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""
        inner = width if spec.input_width is None else spec.input_width
        self.recurrence = None if spec.recurrence is None else spec.recurrence.build(width)
        self.position = None if spec.position is None else spec.position.build(inner)
        self.segment = None if spec.segment is None else spec.segment.build(inner)
        self.input_norm = None if spec.input_norm is None else spec.input_norm.build(inner)
        self.input = None if spec.input_width is None else Linear(inner, width)
        self.score_bias = None if spec.score_bias is None else spec.score_bias.build()
        self.layers = nn.ModuleList([layer.build(width) for layer in spec.layers])
        self.tables = share_tables(self.layers)  # of product-key memories
        self.norm = None if spec.norm is None else spec.norm.build(width)

    def forward(self, x: Tensor, call: Call, segments: Tensor | None = None, show: Show | None = None) -> Tensor:
        """show: called before each run of a layer, with how many have run and what they have made."""
        call = replace(call, bias=self.score_bias)
        if self.recurrence is not None:
            return self.recurrence(x, call, self.run)
        return self.run(x, call, segments, show)

    def run(self, x: Tensor, call: Call, segments: Tensor | None = None, show: Show | None = None) -> Tensor:
        """One pass over all layers: over the whole text, or, where there is a recurrence, over one of its segments."""
        outer = call.record.run  # of the stack that this one is a part of: RETRO's encoder of neighbours
        x = self.begin(x, call, segments)
        for i in range(len(self.layers) * self.spec.repeat):
            layer = i // self.spec.repeat
            if show is not None:
                show(i, x)
            call.record.run = (f"{self.path}.layers.{layer}.", f"{self.path}.layers.{i}.")
            if not self._left_out(call):
                x = self.layers[layer](x, call)
            call.record.keep(f"{self.path}.layers.{layer}.output", lambda x=x: x)
        call.record.run = outer
        return self.end(x, call)

    def begin(self, x: Tensor, call: Call, segments: Tensor | None) -> Tensor:
        """What comes before the first layer."""
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        if self.position is not None:
            x = x + self.position(call.tokens).to(x.dtype)
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = dropout(x, self.spec.dropout, self.training)
        x = x if self.input is None else self.input(x)
        call.record.keep(f"{self.path}.input", lambda: x)
        return x

    def end(self, x: Tensor, call: Call) -> Tensor:
        """What comes after the last one."""
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.spec.output_dropout, self.training)

    def _left_out(self, call: Call) -> bool:
        """Whether this run of a layer is left out. With a cache none is: its keys would be missing later."""
        rate = self.spec.layer_dropout
        return bool(rate) and self.training and call.cache is None and bool(torch.rand(()) < rate)
