"""A decoder becomes an encoder-decoder: its layers read what an encoder gives (arXiv:1907.12461, section 3; gated from
zero as in arXiv:2204.14198, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, CrossAttentionSpec, LayerSpec, MemoryAttentionSpec, StackSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.grafts import GATED, layers_of, with_step
from lamina.surgery.operation import Changed, Joining, Other, Others
from lamina.surgery.patterns import Restore
from lamina.surgery.places import EVERYWHERE, Place, edited
from lamina.surgery.reading import read
from lamina.surgery.weights import Beside, Made, Weights, dtype_of


@dataclass(frozen=True, kw_only=True)
class FreshEncoder(Spec):
    """A new encoder, of layers like the decoder's, which read in both directions."""

    layers: int

    def check(self) -> None:
        if self.layers < 1:
            raise LaminaError(f"layers is {self.layers}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CrossGraft(Joining):
    """Cross-attention behind the attention of some layers, with heads like those, to an encoder of the same width.

    encoder: that of another model, with its table of tokens or its stem; or a fresh one, which reads with the decoder's
    table. start: the id that the decoder begins with; None: `special.start`, else its end.
    """

    NAME = "cross_attention"

    encoder: str | FreshEncoder
    start: int | None = None
    at: tuple[str, ...] = EVERYWHERE  # layers

    def sources(self) -> tuple[str, ...]:
        return (self.encoder,) if isinstance(self.encoder, str) else ()

    def join(self, spec: ModelSpec, weights: Mapping[str, Tensor], others: Others) -> Changed:
        if spec.decoder is None or spec.two_stacks or spec.retrieval is not None:
            raise UnsupportedError("cross_attention is for a decoder by itself that does not retrieve")
        if spec.decoder.input_width is not None:
            raise UnsupportedError(
                "decoder.input_width: a table narrower than the decoder cannot stand beside an encoder"
            )
        chosen = {place.path for place in layers_of(spec, self.at)}

        def change(path: str, part: Spec) -> Spec:
            return _crossing(Place(path, part)) if path in chosen and isinstance(part, LayerSpec) else part

        decoder = edited(spec, change).decoder
        special = spec.special.replace(decoder_start=self._start(spec))
        undo = (Restore(spec=spec.to_json()),)
        if isinstance(self.encoder, FreshEncoder):
            new = spec.replace(encoder=_fresh(spec.decoder, self.encoder.layers), decoder=decoder, special=special)
            return Changed(new, weights, GATED, undo)
        other = others(self.encoder)
        encoder = _encoder_of(other, self.encoder, spec)
        stem = other.spec.embedding if other.spec.stem is None else other.spec.stem
        new = spec.replace(encoder=encoder, stem=stem, decoder=decoder, special=special, marks=other.spec.marks)
        source = {f"{self.encoder}:{name}": name for name in other.weights}
        dtype = dtype_of(weights, next(iter(weights)))
        typed = partial(Tensor.to, dtype=dtype)
        made = {
            now: Made((was,), "", typed, dtype) for was, name in source.items() if (now := _called(name, other.spec))
        }
        return Changed(new, Weights(Beside(weights, {self.encoder: other.weights}), made, [*source]), GATED, undo)

    def _start(self, spec: ModelSpec) -> int:
        ids = [self.start, spec.special.start, *spec.special.end]
        found = next((one for one in ids if one is not None), None)
        if found is None or not 0 <= found < spec.embedding.vocabulary:
            most = spec.embedding.vocabulary - 1
            raise LaminaError(f"start is {found}; it must be the id that the decoder begins with, from 0 to {most}")
        return found


def _crossing(place: Place[LayerSpec]) -> LayerSpec:
    """The layer with a step of cross-attention behind its attention."""
    for step in place.part.steps:
        own = step.op.attention if isinstance(step.op, MemoryAttentionSpec) else step.op
        if isinstance(own, AttentionSpec):
            shape: dict[str, Any] = {"heads": own.heads, "key_heads": own.key_heads, "head_dim": own.head_dim}
            op = CrossAttentionSpec(**shape, scale=own.scale, bias=own.bias)
            return with_step(place, "cross", op, step.name)
    raise UnsupportedError(f"{place.shown} has no step of AttentionSpec, whose heads cross-attention is to have")


def _fresh(decoder: StackSpec, layers: int) -> StackSpec:
    steps = tuple(step for step in decoder.layers[0].steps if not isinstance(step.op, CrossAttentionSpec))
    stack = decoder.replace(layers=(LayerSpec(steps=steps),) * layers)
    return read(stack, "bidirectional")


def _encoder_of(other: Other, source: str, spec: ModelSpec) -> StackSpec:
    """The encoder of another model. Raises LaminaError where it cannot stand beside this decoder."""
    encoder = other.spec.encoder
    if encoder is None:
        raise LaminaError(f"{source} has no encoder; the operation reading makes one of a decoder")
    if other.spec.width != spec.width:
        raise LaminaError(f"{source} has width {other.spec.width}, and this model {spec.width}; they must agree")
    same_size = other.spec.stem is None and other.spec.embedding.vocabulary == spec.embedding.vocabulary
    if same_size and other.same_tokens is False:
        raise LaminaError(
            f"{source} has as many tokens, but others: texts for the one would be read with the other's ids"
        )
    return encoder


def _called(name: str, spec: ModelSpec) -> str | None:
    """What a weight of the other model is called here; None for what is no part of its encoder."""
    if name.startswith("embedding."):
        return f"stem.{name.removeprefix('embedding.')}" if spec.stem is None else None
    return name if name.startswith(("encoder.", "stem.")) else None
