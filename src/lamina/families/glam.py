"""GLaM (arXiv:2112.06905, section 4 and table 4): a decoder with 64 experts in every second layer, top-2.

Dense layers have GEGLU and experts two matrices with GELU. Its weights were never published, and no layout of files has
it: there are sizes, and what is built from them.
"""

from __future__ import annotations

from lamina.families.family import Family, Fields, in_turn
from lamina.layers import (
    AttentionSpec,
    BucketBiasSpec,
    CapacitySpec,
    EmbeddingSpec,
    ExpertsSpec,
    FanInInitialSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    RouterLossSpec,
    StackSpec,
    TopKSpec,
)
from lamina.model import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    """Layers, width, hidden, heads and experts (none where they are left out) -> spec."""
    width, heads = fields.count("width"), fields.count("heads")
    norm = RMSNormSpec(eps=1e-6)
    attention = AttentionSpec(heads=heads, key_heads=heads, head_dim=fields.count("head_dim", 128))
    dense = FeedForwardSpec(hidden=fields.count("hidden"), act="gelu")
    layers = [in_turn(attention, dense, pre=norm)] * fields.layers("layers")
    if "experts" in fields:
        op = ExpertsSpec(
            router=TopKSpec(experts=fields.count("experts")),
            expert=dense.replace(gated=False),
            capacity=CapacitySpec(training=2.0),
            losses=RouterLossSpec(balance=0.01, choices="first"),
        )
        first, second = layers[0].steps
        layers[1::2] = [LayerSpec(steps=(first, second.replace(op=op)))] * (len(layers) // 2)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocabulary", 32_000)),
        decoder=StackSpec(layers=tuple(layers), norm=norm, score_bias=BucketBiasSpec(heads=heads, bidirectional=False)),
        head=LanguageHeadSpec(tied=True),
        context=fields.count("context", 1024),
        initial=FanInInitialSpec(embedding=width**-0.5, relative=width**-0.5),
    )


def _size(layers: int, width: int, hidden: int, heads: int, experts: int | None = None, **more: int) -> dict[str, int]:
    said = {"layers": layers, "width": width, "hidden": hidden, "heads": heads, **more}
    return said if experts is None else said | {"experts": experts}


BASE, XL, LARGEST = (24, 2048, 8192, 16), (32, 4096, 16384, 32), (64, 8192, 32768, 128)

GLAM = Family(
    model_type="glam",
    spec=spec,
    # V M + 4 L M h d + 3/2 L M H + L/2 (2 E M H + M E), and norms and position biases, which are small
    sizes={
        "glam/0.1b": _size(12, 768, 3072, 12, head_dim=64),
        "glam/0.1b-64e": _size(12, 768, 3072, 12, 64, head_dim=64),
        "glam/1.7b": _size(*BASE),
        **{f"glam/1.7b-{experts}e": _size(*BASE, experts) for experts in (32, 64, 128, 256)},
        "glam/8b": _size(*XL),
        "glam/8b-64e": _size(*XL, 64),
        "glam/137b": _size(64, 8192, 65536, 128),
        "glam/64b-64e": _size(*LARGEST, 64, vocabulary=256_000),
    },
    notes={
        "glam": "the paper's counts fit 32,000 tokens in the small models and 256,000 in the largest, its 20 billion of"
        " 1.7b-32e fit neither; its position bias is called Transformer-XL's, the public code has T5's, which stands"
        " here; eps, which layers have experts and how gates are scaled are not published: 1e-6, every second, to 1;"
        " nor are the initial values: by fan-in, with width^-0.5 for the table, so that the logits begin at size one"
    },
)
