"""Model: the waist of the house. Everything above sees the layers only through it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.cache import KINDS, Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    Call,
    CrossAttentionSpec,
    EmbeddingSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    PoolerSpec,
    Record,
    RotarySpec,
    StackSpec,
)
from lamina.reading import read
from lamina.specs import Spec, unknown
from lamina.tokens import Tokens, plain

NOTHING = plain(0, 0)
"""The tokens of a call that has read none yet."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens(Spec):
    """Ids with a meaning for generation."""

    start: int | None = None
    end: tuple[int, ...] = ()
    pad: int | None = None
    decoder_start: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """A model, as data: an encoder, a decoder or both over one embedding, and its heads."""

    width: int
    embedding: EmbeddingSpec  # of the decoder too, where there are both
    encoder: StackSpec | None = None
    decoder: StackSpec | None = None
    head: LanguageHeadSpec | None = None
    pooler: PoolerSpec | None = None
    labels: LabelHeadSpec | None = None
    context: int | None = None  # tokens that the model was trained to read
    special: SpecialTokens = field(default_factory=SpecialTokens)

    def check(self) -> None:
        if self.width < 1 or (self.encoder is None and self.decoder is None):
            raise LaminaError(f"a model needs width >= 1 (it is {self.width}) and an encoder or a decoder")
        reads = self.decoder is not None and any(
            isinstance(part, CrossAttentionSpec) for _, part in self.decoder.walk()
        )
        if self.encoder is not None and self.decoder is not None and not reads:
            raise LaminaError("the decoder has no CrossAttentionSpec, so it would never read what the encoder gives")

    def build(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0) -> Model:
        """The module, in training mode: without storage on "meta", else initialised from `seed`."""
        with torch.device("meta"):
            model = Model(self)
        if dtype is not None:
            model = model.to(dtype)
        if torch.device(device).type != "meta":
            model = model.to_empty(device=device)
            model.init(seed)
        return model


@dataclass
class Output:
    """What a forward returns."""

    logits: Tensor | None  # (B, T, vocabulary); (B, labels) or (B, T, labels) for classifiers; None without a head
    hidden: Tensor  # (B, T, width), after the last norm
    encoder_output: Tensor | None = None  # (B, S, width)
    pooled: Tensor | None = None  # (B, width)
    label_logits: Tensor | None = None  # (B, labels): next-sentence prediction beside a language head
    losses: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses by layer


class Model(nn.Module):
    """A model built from its spec. Parameter names are paths in the spec: decoder.layers.0.attention.op.q.weight."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.origin: Any = None  # where it was loaded from, as `lamina.source` keeps it
        self.engine: Any = None  # a compiled decoding step, as `lamina.generation.compiled` makes it
        first = spec.encoder or spec.decoder
        inner = None if first is None else first.input_width
        self.embedding = spec.embedding.build(spec.width if inner is None else inner)
        self.encoder = None if spec.encoder is None else spec.encoder.build(spec.width)
        self.decoder = None if spec.decoder is None else spec.decoder.build(spec.width)
        self.head = None if spec.head is None else spec.head.build(spec.width, spec.embedding.vocabulary)
        self.pooler = None if spec.pooler is None else spec.pooler.build(spec.width)
        self.labels = None if spec.labels is None else spec.labels.build(spec.width)
        for name, module in self.named_modules():
            if hasattr(module, "path"):
                module.path = name  # pyright: ignore[reportArgumentType]
        self.reads_memory = any(isinstance(part, CrossAttentionSpec) for _, part in spec.walk())
        rotaries = [part for _, part in (spec.decoder or spec).walk() if isinstance(part, RotarySpec)]
        limits = [rotary.limit for rotary in rotaries if rotary.limit]
        self.cache_limit = min(limits, default=None)
        """Tokens beyond which a cache is refused: the rotary phases of cached keys would depend on the length."""

    def init(self, seed: int = 0) -> None:
        """Initialise every parameter from `seed`: N(0, 0.02) weights, zero biases, unit norms (GPT-2, BERT)."""
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        for module in self.modules():
            initialise = getattr(module, "initialise", None)
            if initialise is not None:
                initialise(generator)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def new_cache(self, kind: str = "auto", batch: int = 1, capacity: int | None = None) -> Cache:
        """An empty cache for `batch` rows; `capacity` in tokens is needed for "fixed" and optional for "sinks".

        Raises UnsupportedError for an unknown kind, a model without a decoder, and a kind that a layer cannot use.
        """
        if kind not in KINDS:
            raise UnsupportedError(unknown("kind of cache", kind, KINDS))
        if self.decoder is None:
            raise UnsupportedError("an encoder reads its whole input at once; only decoders have a cache")
        if self.decoder.spec.repeat > 1:
            raise UnsupportedError("a decoder whose layers repeat has no cache: a layer would keep keys for each run")
        cache = Cache(kind, batch, capacity, device=self.embedding.weight.device)
        for name, module in self.decoder.named_modules():
            retained = getattr(module, "retained", None)
            if retained is not None:
                cache.add(f"decoder.{name}", retained())
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        encoder_output: Tensor | None = None,
        marked: Tensor | None = None,
        cache: Cache | None = None,
        record: Record | None = None,
        backend: str | None = None,
        keep_logits: int | None = None,
        **wrong: Any,
    ) -> Output:
        """Run the model on ids (B, T).

        attention_mask: (B, T), 1 for tokens and 0 for padding, on either side. position_ids: (B, T); where they
        restart, a new document begins. document_ids: (B, T); documents do not see each other. token_type_ids: (B, T)
        segments. marked: (B, T), the prefix of a prefix-LM. cache: from `new_cache`; it is extended. record: what to
        write down. backend: of attention, by name. keep_logits: only for that many last positions.

        An encoder-decoder reads `input_ids`, with all that is said of them, in its encoder, or takes `encoder_output`
        (B, S, width) instead, and `decoder_input_ids` (B, T) in its decoder; there a document reads the source of the
        same number. A cache that has seen the source keeps it, and needs only the decoder's side from then on.
        """
        if wrong:
            known = [name for name in Model.forward.__annotations__ if name not in ("wrong", "return")]
            raise LaminaError(unknown("argument of a model", next(iter(wrong)), known))
        record = Record() if record is None else record
        call = Call(tokens=NOTHING, cache=cache, backend=backend, record=record)
        source = (input_ids, attention_mask, position_ids, document_ids)
        target = (decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_document_ids)
        if self.reads_memory and self.decoder is not None:
            if self.encoder is None:  # a decoder by itself: `input_ids` are its own, and what it reads may be given
                source, target = (None, None, None, None), source
                self._only_one_stack(decoder_input_ids, decoder_attention_mask, decoder_position_ids)
            call = self._read_source(call, source, token_type_ids, encoder_output)
            if target[0] is None:
                raise LaminaError(
                    "an encoder-decoder needs decoder_input_ids; `encode` gives the encoder's output alone"
                )
            source, token_type_ids = target, None if self.encoder is not None else token_type_ids
        else:
            self._only_one_stack(decoder_input_ids, decoder_attention_mask, encoder_output, decoder_position_ids)
        ids, mask, positions, documents = source
        side = "decoder_" if self.reads_memory and self.encoder is not None else ""
        if ids is None:
            raise LaminaError("input_ids is missing")
        if ids.dim() != 2:
            raise LaminaError(f"{side}input_ids has shape {tuple(ids.shape)}; expected (batch, length)")
        if cache is not None:
            self._check_cache(cache, ids)
        call.tokens = tokens = read(ids, mask, positions, documents, marked, cache, side)
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        if call.memory is not None and (call.memory.shape[0] < 1 or ids.shape[0] % call.memory.shape[0]):
            raise LaminaError(
                f"decoder_input_ids has {ids.shape[0]} rows and the source {call.memory.shape[0]}; as many are needed,"
                " or a multiple of it (beams)"
            )
        hidden = stack(self.embedding(ids), call, token_type_ids)
        record.check()
        if cache is not None:
            cache.advance(tokens)
        out = self._heads(hidden, tokens, record, keep_logits)
        out.encoder_output = call.memory
        return out

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        """(B, S) ids -> (B, S, width): the output of an encoder-decoder's encoder, for `encoder_output`.

        Raises UnsupportedError for other models, whose forward gives `hidden`.
        """
        if self.encoder is None or self.decoder is None:
            raise UnsupportedError("encode is for encoder-decoders; the forward of this model gives its hidden states")
        call = Call(tokens=NOTHING, record=more.pop("record", None) or Record(), backend=more.pop("backend", None))
        source = (input_ids, attention_mask, more.pop("position_ids", None), more.pop("document_ids", None))
        if more:
            raise LaminaError(
                unknown("argument of encode", next(iter(more)), ("position_ids", "document_ids", "record"))
            )
        memory = self._read_source(call, source, None, None).memory
        assert memory is not None
        return memory

    def _read_source(
        self, call: Call, source: tuple[Tensor | None, ...], segments: Tensor | None, encoder_output: Tensor | None
    ) -> Call:
        """The call of the decoder: with what the encoder makes of the source, or what was given or kept of it."""
        ids, mask, positions, documents = source
        cache = call.cache
        if cache is not None and cache.memory is not None:
            self._same_source(cache.memory, ids if encoder_output is None else encoder_output)
            call.memory = cache.memory  # its tokens lie with its keys
            return call
        if encoder_output is not None:
            if encoder_output.dim() != 3:
                raise LaminaError(
                    f"encoder_output has shape {tuple(encoder_output.shape)}; expected (batch, length, width)"
                )
            ids = encoder_output.new_zeros(encoder_output.shape[:2], dtype=torch.int64) if ids is None else ids
            if ids.shape != encoder_output.shape[:2]:
                raise LaminaError(
                    f"encoder_output is of {tuple(encoder_output.shape[:2])} tokens, input_ids of {tuple(ids.shape)}"
                )
        if ids is None:
            if self.encoder is None:
                return call  # a decoder that may read a memory, and has none
            raise LaminaError("an encoder-decoder needs input_ids or encoder_output")
        if ids.dim() != 2:
            raise LaminaError(f"input_ids has shape {tuple(ids.shape)}; expected (batch, length)")
        tokens = read(ids, mask, positions, documents)
        if encoder_output is None:
            assert self.encoder is not None
            reading = Call(tokens=tokens, backend=call.backend, record=call.record, memo=call.memo)
            encoder_output = self.encoder(self.embedding(ids), reading, segments)
        call.memory, call.memory_tokens = encoder_output, tokens
        if cache is not None:
            cache.memory = encoder_output
        return call

    def _same_source(self, memory: Tensor, given: Tensor | None) -> None:
        if given is not None and given.shape[1] != memory.shape[1]:
            raise LaminaError(
                f"the cache holds a source of {memory.shape[1]} tokens, and one of {given.shape[1]} was given;"
                " a new source needs a new cache"
            )

    def _only_one_stack(self, *given: Tensor | None) -> None:
        if any(one is not None for one in given):
            raise UnsupportedError(
                "decoder_... and encoder_output are for encoder-decoders; this model has only one stack: use input_ids"
            )

    def _heads(self, hidden: Tensor, tokens: Tokens, record: Record, keep_logits: int | None) -> Output:
        out = Output(None, hidden, losses=record.losses)
        if self.head is not None:
            kept = hidden if keep_logits is None else hidden[:, hidden.shape[1] - keep_logits :]
            out.logits = self.head(kept, self.embedding.weight)
        if self.pooler is not None:
            # The first real token: with padding on the left it is not in column 0.
            first = tokens.real.to(torch.int8).argmax(dim=1)
            out.pooled = self.pooler(hidden[torch.arange(hidden.shape[0], device=hidden.device), first])
        if self.labels is not None:
            out.label_logits = self.labels(hidden if self.labels.spec.each_token else out.pooled)
            if self.head is None:
                out.logits = out.label_logits
        return out

    def _check_cache(self, cache: Cache, input_ids: Tensor) -> None:
        if self.decoder is None:
            raise UnsupportedError("an encoder reads its whole input at once; only decoders have a cache")
        if cache.batch != input_ids.shape[0]:
            raise LaminaError(f"input_ids has {input_ids.shape[0]} rows; the cache was made for {cache.batch}")
        if self.cache_limit is not None and cache.length + input_ids.shape[1] > self.cache_limit:
            raise UnsupportedError(
                f"{cache.length + input_ids.shape[1]} tokens: beyond {self.cache_limit} the rotary phases depend on the"
                " length, and cached keys would not fit; use cache=None, or a scaling that does not (YaRN, NTK)"
            )
