"""RETRO (arXiv:2112.04426, sections 2.3 to 2.5 and table 10): a decoder that reads what a database found for the chunk
before, in every third layer from the sixth.

Its weights were never published, and no layout of files has it: there are sizes, and what is built from them.
"""

from __future__ import annotations

from lamina.families.family import Family, Fields, in_turn
from lamina.layers import (
    AttentionSpec,
    ChunkedCrossAttentionSpec,
    CrossAttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    RMSNormSpec,
    StackSpec,
    StepSpec,
    TransformerXLSpec,
    neighbour_encoder,
    retrieving,
)
from lamina.model import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    """Layers, width, hidden, heads and head_dim, and what all four sizes share -> spec."""
    width, layers = fields.count("width"), fields.layers("layers")
    vocabulary, norm = fields.count("vocabulary", 128_000), RMSNormSpec()
    heads, head_dim, relative = fields.count("heads"), fields.count("head_dim", 128), TransformerXLSpec()
    attention = AttentionSpec(heads=heads, key_heads=heads, head_dim=head_dim, relative=relative)
    feedforward = FeedForwardSpec(hidden=fields.count("hidden", 4 * width), act="gelu", gated=False)
    encoder = neighbour_encoder(
        width,
        vocabulary,
        width=fields.count("encoder_width", 896),
        heads=fields.count("encoder_heads", 16),
        head_dim=fields.count("encoder_head_dim", 64),
        hidden=fields.count("encoder_hidden", 3584),
        layers=fields.layers("encoder_layers", 2),
    )
    op = ChunkedCrossAttentionSpec(
        attention=CrossAttentionSpec(
            heads=heads, key_heads=heads, head_dim=head_dim, memory_width=encoder.width, relative=relative
        ),
        chunk=fields.count("chunk", 64),
    )
    places = tuple(range(fields.count("first", 6) - 1, layers, fields.count("every", 3)))
    stack = (in_turn(attention, feedforward, pre=norm),) * layers
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=vocabulary),
        decoder=StackSpec(
            layers=retrieving(stack, places, StepSpec(name="retrieval", op=op, pre=norm), encoder), norm=norm
        ),
        head=LanguageHeadSpec(tied=True),
        context=fields.count("context", 2048),
    )


RETRO = Family(
    model_type="retro",
    spec=spec,
    # L (5 d i + 2 d f) + 2 (5 d' i' + 2 d' f') + 3 d' i' + 2 d i' + |P| (3 d i + 2 d' i), i = heads head_dim, of the
    # encoder with a stroke; five and three, because each attention has a matrix for its distances. Beside that norms,
    # the u and v of Transformer-XL and the two tables of tokens, which the paper does not count.
    sizes={
        "retro/172m": {"layers": 12, "width": 896, "heads": 16, "head_dim": 64},
        "retro/425m": {"layers": 12, "width": 1536, "heads": 12},
        "retro/1.5b": {"layers": 24, "width": 2048, "heads": 16},
        "retro/7.5b": {"layers": 32, "width": 4096, "heads": 32},
    },
    notes={
        "retro": "the paper's table 10 has the two large sizes retrieve from layer 9 on; its section 2.5 says 6, which"
        " alone gives its counts and stands here; the counts leave out tables, norms and u and v; activation, eps,"
        " biases and initial values are not published: GELU, 1e-6, none and N(0, 0.02); the encoder reads the chunk as"
        " the cross-attention beside it does, after its norm"
    },
)
