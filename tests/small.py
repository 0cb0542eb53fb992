"""Small models of our own for properties that hold for any: made of the parts under test, with weights large enough
that every part of them shows in the output."""

from __future__ import annotations

import torch
from torch import nn

from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BucketBiasSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    LearnedPositionSpec,
    RMSNormSpec,
    RotarySpec,
    ShawSpec,
    SinusoidalPositionSpec,
    StackSpec,
    StepSpec,
    TransformerXLSpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Pattern, Window

WINDOW = 4
VOCABULARY = 40

SCHEMES = {
    "rotary": ({"rotary": RotarySpec(base=100.0, width=4)}, {}),
    "interleaved": ({"rotary": RotarySpec(base=100.0, interleaved=True)}, {}),
    "learned": ({}, {"position": LearnedPositionSpec(size=64, offset=2)}),
    "sinusoidal": ({}, {"position": SinusoidalPositionSpec(base=100.0)}),
    "buckets": ({}, {"score_bias": BucketBiasSpec(heads=4, buckets=8, distance=12)}),
    "alibi": ({}, {"score_bias": AlibiSpec(heads=4)}),
    "shaw": ({"relative": ShawSpec(clip=3)}, {}),
    "transformer-xl": ({"relative": TransformerXLSpec(base=100.0)}, {}),
}
"""Ways of knowing positions: fields of an attention, fields of a stack."""


def attention(**fields: object) -> AttentionSpec:
    return AttentionSpec(**({"heads": 4, "key_heads": 2, "head_dim": 8} | fields))


def decoder(
    patterns: list[Pattern], scheme: str = "rotary", vocabulary: int = VOCABULARY, **fields: object
) -> ModelSpec:
    """A pre-norm decoder with one layer for each pattern; `fields` are those of its attentions."""
    of_attention, of_stack = SCHEMES[scheme]
    layers = tuple(
        LayerSpec(
            steps=(
                StepSpec(name="attention", op=attention(pattern=pattern, **of_attention, **fields), pre=RMSNormSpec()),
                StepSpec(name="feedforward", op=FeedForwardSpec(hidden=24), pre=RMSNormSpec()),
            )
        )
        for pattern in patterns
    )
    stack = StackSpec(layers=layers, norm=RMSNormSpec(), **of_stack)
    return ModelSpec(width=16, embedding=EmbeddingSpec(vocabulary=vocabulary), decoder=stack, head=LanguageHeadSpec())


def build(spec: ModelSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """In evaluation, with every parameter drawn from N(0, 0.4), norms from N(1, 0.4)."""
    model = spec.build(dtype=dtype).eval()
    shake(model, seed)
    return model


def shake(module: nn.Module, seed: int = 0) -> None:
    """Random values everywhere, so that a bias, a scale or an order that is wrong shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn + (name.endswith("norm.weight") or ".pre.weight" in f".{name}"))


def ids(*shape: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


MIXED = [Causal() & Window(back=WINDOW), Causal(), Causal() & Window(back=WINDOW)]
WINDOWED = [Causal() & Window(back=WINDOW), Causal() & Window(back=2)]
