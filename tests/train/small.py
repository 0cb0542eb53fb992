"""Small models and examples that tests of training share."""

from __future__ import annotations

from typing import Any

import numpy as np

import lamina
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    StepSpec,
    TopKSpec,
)
from lamina.objectives import CausalLM, Example
from lamina.train.loader import Loader
from lamina.train.loop import Trainer
from lamina.train.optimiser import AdamW
from lamina.train.schedule import Constant
from lamina.train.specs import LoopSpec

VOCABULARY, LENGTH = 31, 13


class Rows:
    """Rows of 14 tokens that hold one to three documents."""

    def __len__(self) -> int:
        return 40

    def example(self, index: int, random: np.random.Generator) -> Example:
        own = np.random.default_rng(index)
        tokens = own.integers(VOCABULARY, size=LENGTH + 1)
        starts = np.zeros(LENGTH + 1, dtype=np.int64)
        starts[own.integers(1, LENGTH, size=index % 3)] = 1
        return {"tokens": tokens, "documents": starts.cumsum()}


def _stack(feedforward: Any, dropout: float, layers: int = 2) -> StackSpec:
    attention = AttentionSpec(heads=4, key_heads=2, head_dim=6, rotary=RotarySpec(), dropout=dropout)
    steps = (
        StepSpec(name="attention", op=attention, pre=RMSNormSpec(), dropout=dropout),
        StepSpec(name="feedforward", op=feedforward, pre=RMSNormSpec(), dropout=dropout),
    )
    return StackSpec(layers=(LayerSpec(steps=steps),) * layers, norm=RMSNormSpec())


def _model(stack: StackSpec) -> lamina.ModelSpec:
    return lamina.ModelSpec(
        width=16,
        embedding=EmbeddingSpec(vocabulary=VOCABULARY),
        decoder=stack,
        head=LanguageHeadSpec(),
        context=64,
    )


def decoder(dropout: float = 0.0) -> lamina.ModelSpec:
    """Two layers like LLaMA's."""
    return _model(_stack(FeedForwardSpec(hidden=24, gated=True, act="silu"), dropout))


def experts(correction: bool = False) -> lamina.ModelSpec:
    """Two layers like Mixtral's; with a correction, like DeepSeek's."""
    router = TopKSpec(
        experts=4, chosen=2, normalise=True, correction=correction, score="sigmoid" if correction else "softmax"
    )
    op = ExpertsSpec(
        router=router, expert=FeedForwardSpec(hidden=10, gated=True, act="silu"), losses=RouterLossSpec(balance=0.01)
    )
    return _model(_stack(op, 0.0))


def trainer(
    spec: lamina.ModelSpec,
    *,
    model: lamina.Model | None = None,
    model_seed: int = 0,
    batch: int = 4,
    micro: int = 2,
    rate: float = 1e-3,
    optimiser: Any = None,
    workers: int = 0,
    **loop: Any,
) -> Trainer:
    """A trainer over `Rows`."""
    model = spec.build(seed=model_seed) if model is None else model
    loader = Loader(CausalLM(), Rows(), range(10_000), batch=batch, micro=micro, seed=0, workers=workers)
    loader.order = _Round()
    return Trainer(
        model,
        CausalLM(),
        loader,
        optimiser or AdamW(rate=rate),
        Constant(),
        LoopSpec(steps=100, batch=batch, micro=micro, **loop),
    )


class _Round:
    def __getitem__(self, position: int) -> int:
        return position * 7 % 40
