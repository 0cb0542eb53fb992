"""PaLM (arXiv:2204.02311, section 2): parallel blocks, one key head, SwiGLU, rotary positions, no biases, a tied head.

Its weights were never published, and no layout of files has it: there are sizes, and what is built from them.
"""

from __future__ import annotations

from lamina.families.family import Family, Fields, in_parallel
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FanInInitialSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    RotarySpec,
    StackSpec,
)
from lamina.model import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    """Layers, width and heads, and what all three sizes share -> spec."""
    width = fields.count("width")
    attention = AttentionSpec(
        heads=fields.count("heads"),
        key_heads=1,
        head_dim=fields.count("head_dim", 256),
        rotary=RotarySpec(interleaved=True),  # the pairs of RoFormer, which the paper cites; it names none itself
    )
    feedforward = FeedForwardSpec(hidden=4 * width, act="silu")
    norm = LayerNormSpec(bias=False)
    layer = in_parallel(attention, feedforward, shared=norm)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocabulary", 256_000)),
        decoder=StackSpec(layers=(layer,) * fields.layers("layers"), norm=norm),
        head=LanguageHeadSpec(scale=width**-0.5),
        context=fields.count("context", 2048),
        initial=FanInInitialSpec(),
    )


PALM = Family(
    model_type="palm",
    spec=spec,
    # V d + L (2 d h 256 + 2 d 256 + 12 d^2) + (L + 1) d: the scales of the norms are in the last term
    sizes={
        "palm/8b": {"layers": 32, "width": 4096, "heads": 16},
        "palm/62b": {"layers": 64, "width": 8192, "heads": 32},
        "palm/540b": {"layers": 118, "width": 18432, "heads": 48},
    },
    notes={
        "palm": "the base and the pairs of the rotary positions and the eps of the norms are not published; those of"
        " RoFormer (10,000; neighbours) and 1e-5 stand here"
    },
)
