"""RETRO-fitting: a pretrained decoder learns to read neighbours (arXiv:2112.04426, section 4.4).

Some layers get a step of chunked cross-attention between attention and feed-forward, the first of them the encoder of
neighbours; their weights alone are trained. The new steps are gated from zero (arXiv:2204.14198, section 2.2), so that
the model is the old one at first, with neighbours too; without neighbours it stays so for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lamina.errors import UnsupportedError
from lamina.layers import (
    AttentionSpec,
    ChunkedCrossAttentionSpec,
    CrossAttentionSpec,
    NeighbourEncoderSpec,
    StepSpec,
    TransformerXLSpec,
    neighbour_encoder,
    retrieving,
)
from lamina.model import ModelSpec
from lamina.surgery.weights import Made, Weights

NEW = "*.retrieval.*"
"""The new weights, as `model.train` of a run's configuration takes them: all others are frozen."""


def retrofit(
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    *,
    layers: tuple[int, ...] | None = None,
    chunk: int = 64,
    encoder: NeighbourEncoderSpec | None = None,
) -> tuple[ModelSpec, Mapping[str, Tensor]]:
    """A decoder whose `layers`, counted from 0, read neighbours: by default every third from the sixth on.

    The heads are those of the attention beside them, the norm before them is of its kind. encoder: None is RETRO's, of
    width 896; one of the decoder's own width begins with a copy of the decoder's table of tokens. Else the state stays
    as it is: what the new spec asks for beside it, `surgery.build` begins anew.
    Raises UnsupportedError for what is no decoder of pre-norm attention and feed-forward, and for one that retrieves.
    """
    stack = spec.decoder
    if stack is None or spec.two_stacks or spec.retrieval is not None:
        raise UnsupportedError("retrofit is for a decoder by itself that does not retrieve yet")
    places = tuple(range(5, len(stack.layers), 3)) if layers is None else layers
    before = stack.layers[places[0] if places and places[0] < len(stack.layers) else 0].steps[0]
    own = before.op
    if not isinstance(own, AttentionSpec) or before.pre is None or before.after is not None:
        raise UnsupportedError("retrofit needs layers of attention (AttentionSpec) and feed-forward, with norms before")
    made = neighbour_encoder(spec.width, spec.embedding.vocabulary) if encoder is None else encoder
    attention = CrossAttentionSpec(
        heads=own.heads,
        key_heads=own.key_heads,
        head_dim=own.head_dim,
        memory_width=made.width,
        relative=TransformerXLSpec(),
    )
    op = ChunkedCrossAttentionSpec(attention=attention, chunk=chunk)
    step = StepSpec(name="retrieval", op=op, pre=before.pre, dropout=before.dropout, gate=True)
    new = spec.replace(decoder=stack.replace(layers=retrieving(stack.layers, places, step, made)))
    if "embedding.weight" not in state or made.width != (spec.embedding.inner or spec.width):
        return new, state
    table = f"decoder.layers.{places[0]}.retrieval.op.encoder.embedding.weight"
    return new, Weights(state, {table: Made(("embedding.weight",), "a copy of the table of tokens", Tensor.clone)})
