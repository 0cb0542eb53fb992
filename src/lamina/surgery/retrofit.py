"""RETRO-fitting: a pretrained decoder learns to read neighbours (arXiv:2112.04426, section 4.4).

Some layers get a step of chunked cross-attention between attention and feed-forward, the first of them the encoder of
neighbours; their weights alone are trained. The new steps are gated from zero (arXiv:2204.14198, section 2.2), so that
the model is the old one at first, with neighbours too; without neighbours it stays so for ever.

How to read what was found can be learned from nothing, which takes long, or begin as a copy of what the decoder knows
already: heads that find what stood before in its own text, and copy what came next (induction heads,
arXiv:2209.11895).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lamina.errors import UnsupportedError
from lamina.layers import (
    AttentionSpec,
    ChunkedCrossAttentionSpec,
    CrossAttentionSpec,
    NeighbourEncoderSpec,
    StackSpec,
    StepSpec,
    TransformerXLSpec,
    neighbour_encoder,
    retrieving,
)
from lamina.layers.retrieval import check_places
from lamina.model import ModelSpec
from lamina.surgery.weights import Made, Weights

NEW = "*.retrieval.*"
"""The new weights, as `model.train` of a run's configuration takes them: all others are frozen."""
BEFORE_LAYERS = ("position", "input_norm")  # parts of a stack


def retrofit(
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    *,
    layers: tuple[int, ...] | None = None,
    chunk: int = 64,
    encoder: NeighbourEncoderSpec | None = None,
    begin: Literal["new", "copied"] = "new",
) -> tuple[ModelSpec, Mapping[str, Tensor]]:
    """A decoder whose `layers`, counted from 0, read neighbours: by default every third from the sixth on.

    The heads are those of the attention beside them, the norm before them is of its kind. encoder: None is RETRO's, of
    width 896; one of the decoder's own width begins with a copy of the decoder's table of tokens. Else the state stays
    as it is: what the new spec asks for beside it, `surgery.build` begins anew.

    begin="copied": the encoder is the decoder up to the last of `layers`, and each new step a copy of the attention
    before it, rotary phases included, that reads the states of a neighbour in front of its own layer: keys like those
    of its own text. Only gates begin anew.
    Raises UnsupportedError for what is no decoder of pre-norm attention and feed-forward, for one that retrieves, and
    for heads that cross-attention does not have or that differ between `layers`; LaminaError for layers that there are
    not.
    """
    stack = spec.decoder
    if stack is None or spec.two_stacks or spec.retrieval is not None:
        raise UnsupportedError("retrofit is for a decoder by itself that does not retrieve yet")
    places = tuple(range(5, len(stack.layers), 3)) if layers is None else layers
    check_places(stack.layers, places)
    before = stack.layers[places[0]].steps[0]
    own = before.op
    if not isinstance(own, AttentionSpec) or before.pre is None or before.after is not None:
        raise UnsupportedError("retrofit needs layers of attention (AttentionSpec) and feed-forward, with norms before")
    if begin == "copied":
        if encoder is not None:
            raise UnsupportedError('begin="copied" has the decoder for its encoder; leave encoder out')
        made, attention = _encoder(spec, stack, places), _reading(spec.width, stack, places)
    else:
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
    if begin == "copied":
        return new, Weights(state, _copies(stack, places, state))
    if "embedding.weight" not in state or made.width != (spec.embedding.inner or spec.width):
        return new, state
    table = f"decoder.layers.{places[0]}.retrieval.op.encoder.embedding.weight"
    return new, Weights(state, {table: Made(("embedding.weight",), "a copy of the table of tokens", Tensor.clone)})


def _encoder(spec: ModelSpec, stack: StackSpec, places: tuple[int, ...]) -> NeighbourEncoderSpec:
    """What the attention of each place reads: the decoder's layers before it, and the norm in front of it."""
    *depths, last = places
    below = stack.replace(layers=stack.layers[:last], norm=stack.layers[last].steps[0].pre, output_dropout=0.0)
    return NeighbourEncoderSpec(width=spec.width, embedding=spec.embedding, stack=below, depths=tuple(depths))


def _reading(width: int, stack: StackSpec, places: tuple[int, ...]) -> CrossAttentionSpec:
    """The heads of self-attention as heads of cross-attention. What a pattern hides of the text is no neighbour's."""
    steps = [stack.layers[place].steps[0] for place in places]
    ops = [step.op for step in steps]
    own = ops[0]
    assert isinstance(own, AttentionSpec)
    for place, step in zip(places, steps):
        op = step.op
        if (
            step.replace(op=own) != steps[0]
            or not isinstance(op, AttentionSpec)
            or op.replace(pattern=own.pattern) != own
        ):
            raise UnsupportedError(f"the attention of layer {place} is not that of layer {places[0]}: copy like heads")
    has = {name: getattr(own, name) for name in ("relative", "softcap", "sink")}
    has |= {"post": steps[0].post, "score_bias": stack.score_bias}
    for name, value in has.items():
        if value:
            raise UnsupportedError(f"a step that reads neighbours has no {name}, so this attention cannot be copied")
    if steps[0].residual != 1.0:
        raise UnsupportedError("a step that reads neighbours adds to what there is: residual=1.0 is needed")
    return CrossAttentionSpec(
        heads=own.heads,
        key_heads=own.key_heads,
        head_dim=own.head_dim,
        memory_width=width * len(places),
        relative=own.rotary,
        scale=own.scale,
        qk_norm=own.qk_norm,
        bias=own.bias,
        dropout=own.dropout,
    )


def _copies(stack: StackSpec, places: tuple[int, ...], state: Mapping[str, Tensor]) -> dict[str, Made]:
    """The weights of new steps and of their encoder, by name; no tensor is shared with those of the decoder."""
    encoder = f"decoder.layers.{places[0]}.retrieval.op.encoder"
    renamed = [("embedding.", f"{encoder}.embedding.")]
    renamed += [(f"decoder.layers.{i}.", f"{encoder}.stack.layers.{i}.") for i in range(places[-1])]
    renamed += [(f"decoder.{part}.", f"{encoder}.stack.{part}.") for part in BEFORE_LAYERS]
    for i, place in enumerate(places):
        own = f"decoder.layers.{place}.{stack.layers[place].steps[0].name}"
        norm = f"{encoder}.stack.norm." if place == places[-1] else f"{encoder}.norms.{i}."
        renamed += [(f"{own}.pre.", norm), (f"{own}.pre.", f"decoder.layers.{place}.retrieval.pre.")]
        renamed += [(f"{own}.op.", f"decoder.layers.{place}.retrieval.op.attention.")]
    copies = {
        new + name.removeprefix(old): Made((name,), "a copy", Tensor.clone)
        for old, new in renamed
        for name in state
        if name.startswith(old)
    }
    for i, place in enumerate(places):  # of what the encoder gives, the part of its own depth
        for part in ("k", "v"):
            name = f"decoder.layers.{place}.retrieval.op.attention.{part}.weight"
            if name in copies:
                wide = partial(_widened, before=i, parts=len(places))
                copies[name] = Made(copies[name].sources, "a copy, for one of the depths", wide)
    return copies


def _widened(x: Tensor, before: int, parts: int) -> Tensor:
    """(n, width) -> (n, parts * width): zeros but for the part that so many are before."""
    width = x.shape[1]
    return F.pad(x, (before * width, (parts - 1 - before) * width))
