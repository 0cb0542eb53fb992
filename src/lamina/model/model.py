"""The module that a spec of a model builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.cache import KINDS, Cache, RecurrentLedger
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Call, ConvolutionStem, Draw, Embedding, Record, RotarySpec
from lamina.marks import FirstToken, after_question
from lamina.model.given import ONE_STACK, Given, checked_neighbours
from lamina.model.spec import ModelSpec, reads_memory
from lamina.patterns import Retained
from lamina.reading import read
from lamina.specs import unknown
from lamina.tokens import Tokens


@dataclass
class Output:
    """What a forward returns."""

    logits: Tensor | None  # (B, T, vocabulary); (B, labels) or (B, T, labels) for classifiers; None without a head
    hidden: Tensor  # (B, T, width), after the last norm
    encoder_output: Tensor | None = None  # (B, S, width)
    pooled: Tensor | None = None  # (B, width)
    label_logits: Tensor | None = None  # (B, labels): next-sentence prediction beside a language head
    losses: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses by layer


def initialise(module: nn.Module, draw: Draw) -> None:
    """Give the parameters of one module, not of those inside it, their initial values."""
    own = getattr(module, "initialise", None)
    if own is not None:
        own(draw)
    elif isinstance(module, nn.Linear):
        draw.matrix(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Model(nn.Module):
    """A model built from its spec. Parameter names are paths in the spec: decoder.layers.0.attention.op.q.weight."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.origin: Any = None  # where it was loaded from, as `lamina.source` keeps it
        self.engine: Any = None  # a compiled decoding step, as `lamina.generation.compiled` makes it
        self.mesh: Any = None  # the ranks that it lies on, as `lamina.parallel` keeps them
        self.stage: Any = None  # which of its layers lie on this one, where ranks share them out; likewise
        self.adapter: Any = None  # what is attached to its layers, as `lamina.adapters` keeps it
        first = spec.encoder or spec.decoder
        assert first is not None
        inner = spec.width if first.input_width is None else first.input_width
        self.stem = None if spec.stem is None else spec.stem.build(inner)
        self.embedding = spec.embedding.build(inner if spec.stem is None else spec.width)
        self.reads = "input_ids" if spec.reads_ids else "input_features"
        """The argument that the first stack reads."""
        self.encoder = None if spec.encoder is None else spec.encoder.build(spec.width)
        self.decoder = None if spec.decoder is None else spec.decoder.build(spec.width)
        self.head = None if spec.head is None else spec.head.build(spec.width, spec.embedding.vocabulary)
        self.pooler = None if spec.pooler is None else spec.pooler.build(spec.width)
        self.labels = None if spec.labels is None else spec.labels.build(spec.width)
        for name, module in self.named_modules():
            if hasattr(module, "path"):
                module.path = name  # pyright: ignore[reportArgumentType]
        self.reads_memory = reads_memory(spec)
        rotaries = [part for _, part in (spec.decoder or spec).walk() if isinstance(part, RotarySpec)]
        limits = [rotary.limit for rotary in rotaries if rotary.limit]
        self.cache_limit = min(limits, default=None)
        """Tokens beyond which a cache is refused: the rotary phases of cached keys would depend on the length."""

    def init(self, seed: int = 0) -> None:
        """Initialise every parameter from `seed`: weights as `spec.initial` says, zero biases, unit norms."""
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        draw = Draw(generator, self.spec.initial, self)
        for module in self.modules():
            initialise(module, draw)

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
        recurrence = self.decoder.recurrence
        if recurrence is not None and kind in ("fixed", "sinks"):
            raise UnsupportedError(
                f"a stack with memory tokens keeps one segment, which cache={kind!r} cannot; use 'auto'"
            )
        cache = Cache(kind, batch, capacity, device=self.embedding.weight.device)
        for path, retained in _retained(self.decoder, "decoder"):
            cache.add(path, retained if recurrence is None else recurrence.keeps(retained))
        if recurrence is not None:
            cache.add_own(recurrence.path, RecurrentLedger())
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
        encoder_output: Tensor | None = None,
        neighbours: Tensor | None = None,
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
        segments; None: 0, or, where `labels.after` is given, 1 after the question. marked: (B, T), the prefix of a
        prefix-LM, Longformer's global tokens; None: as `spec.marks` says.
        cache: from `new_cache`; it is extended. record: what to write down. backend: of attention, by name.
        keep_logits: only for that many last positions.

        An encoder-decoder reads `input_ids`, with all that is said of them, in its encoder, or takes `encoder_output`
        (B, S, width) instead, and `decoder_input_ids` (B, T) in its decoder; there a document reads the source of the
        same number. A cache that has seen the source keeps it, and needs only the decoder's side from then on. With a
        label head the decoder reads the source too, one place on after the start id, unless it is told otherwise.

        A model that retrieves reads `neighbours` (B, N, k, r) beside the text: of each row the k neighbours, ids of r
        tokens, of the chunks that end in this forward, in their order; -1 where there is no token. Without them it is
        the model without retrieval.

        A model with a stem reads `input_features` (B, bins, frames) in place of `input_ids`: each row is one text, and
        attention_mask is (B, frames) with padding on the right only. Beside `encoder_output` it is (B, S).
        """
        if wrong:
            known = [name for name in Model.forward.__annotations__ if name not in ("wrong", "return")]
            raise LaminaError(unknown("argument of a model", next(iter(wrong)), known))
        record = Record() if record is None else record
        source = Given("", input_ids, attention_mask, position_ids, document_ids, marked, input_features)
        self.check_reads(input_ids, input_features)
        target = Given(
            "decoder_", decoder_input_ids, decoder_attention_mask, decoder_position_ids, decoder_document_ids
        )
        pair = self.spec.two_stacks
        if not pair:
            target.refuse()
            if encoder_output is not None and not self.reads_memory:
                raise UnsupportedError(f"encoder_output {ONE_STACK}")
        if pair and self.labels is not None and target == Given("decoder_") and source.ids is not None:
            target = source.shifted(self.spec.special.decoder_start)
        given = target if pair else source
        if given.content is None:
            raise LaminaError(
                "an encoder-decoder needs decoder_input_ids; `encode` gives the encoder's output alone"
                if pair
                else f"{self.reads} is missing"
            )
        if cache is not None:
            self._check_cache(cache, given)
        memory, memory_tokens = None, None
        if self.reads_memory:
            reading = source if pair else Given("")
            memory, memory_tokens = self._memory(reading, token_type_ids, encoder_output, cache, record, backend)
        x, tokens = self._embedded(given, cache)
        if memory is not None and (memory.shape[0] < 1 or x.shape[0] % memory.shape[0]):
            raise LaminaError(
                f"{given.side}input_ids has {x.shape[0]} rows and the source {memory.shape[0]}; as many are needed,"
                " or a multiple of it (beams)"
            )
        call = Call(
            tokens=tokens,
            cache=cache,
            memory=memory if neighbours is None else checked_neighbours(neighbours, self.spec.retrieval, x.shape[0]),
            memory_tokens=memory_tokens,
            backend=backend,
            record=record,
        )
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        context = self._context(given, tokens)
        if token_type_ids is None and context is not None:
            token_type_ids = context.to(torch.int64)
        hidden = stack(x, call, None if pair else token_type_ids)
        record.check()
        if cache is not None:
            cache.advance(tokens)
            if cache.memory is None and memory is not None:  # now that its keys lie in the cache, and not before
                cache.memory, cache.source = memory, source.content
        if context is not None:  # the first token says that there is no answer
            context |= FirstToken().mark(given.checked_ids(), tokens)
        out = self.heads(hidden, call, keep_logits, context)
        out.encoder_output = memory
        return out

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        marked: Tensor | None = None,
        record: Record | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """(B, S) ids, or features, -> (B, S, width): an encoder-decoder's encoder alone, for `encoder_output`.

        Raises UnsupportedError for other models, whose forward gives `hidden`.
        """
        if not self.spec.two_stacks:
            raise UnsupportedError("encode is for encoder-decoders; the forward of this model gives its hidden states")
        record = Record() if record is None else record
        source = Given("", input_ids, attention_mask, position_ids, document_ids, marked, input_features)
        self.check_reads(input_ids, input_features)
        memory, _ = self._memory(source, token_type_ids, None, None, record, backend)
        assert memory is not None
        return memory

    def _memory(
        self,
        source: Given,
        segments: Tensor | None,
        encoder_output: Tensor | None,
        cache: Cache | None,
        record: Record,
        backend: str | None,
    ) -> tuple[Tensor | None, Tokens | None]:
        """What cross-attention reads: what the cache has kept, what was given, or what the encoder makes of the source.

        The tokens are None where the cache has them beside its keys, both where a decoder by itself is given nothing.
        """
        if cache is not None and cache.memory is not None:
            self._refuse_another(cache, source.content, encoder_output)
            return cache.memory, None
        if encoder_output is not None:
            if encoder_output.dim() != 3:
                raise LaminaError(
                    f"encoder_output has shape {tuple(encoder_output.shape)}; expected (batch, length, width)"
                )
            shape = encoder_output.shape[:2]
            if source.content is not None and self._size(source.content) != shape:
                size = f"{self.reads} of {self._size(source.content)}"
                raise LaminaError(f"encoder_output is of {tuple(shape)} tokens, {size}")
            ids = encoder_output.new_zeros(shape, dtype=torch.int64)
            return encoder_output, replace(source, ids=ids).read()
        if source.content is None:
            if self.encoder is None:
                return None, None
            raise LaminaError(f"an encoder-decoder needs {self.reads} or encoder_output")
        x, tokens = self._embedded(source)
        assert self.encoder is not None
        return self.encoder(x, Call(tokens=tokens, backend=backend, record=record), segments), tokens

    def check_reads(self, input_ids: Tensor | None, input_features: Tensor | None) -> None:
        """Refuse, by name, the one of the two that this model does not read."""
        if self.spec.reads_ids and input_features is not None:
            raise UnsupportedError("input_features is for models with a stem; this one reads input_ids")
        if not self.spec.reads_ids and input_ids is not None:
            raise UnsupportedError("input_ids is for models without a stem; this one reads input_features")

    def _embedded(self, given: Given, cache: Cache | None = None) -> tuple[Tensor, Tokens]:
        """The vectors (B, T, width) that a stack begins with, and the tokens that they are."""
        if given.features is None:
            ids, tokens = given.checked_ids(), given.read(cache)
            table = self.stem if isinstance(self.stem, Embedding) and not given.side else self.embedding
            return table(ids), tokens if given.side else self._marked(given, tokens)
        told = {"position_ids": given.positions, "document_ids": given.documents, "marked": given.marked}
        for name, value in told.items():
            if value is not None:
                raise UnsupportedError(f"{name} is not for input_features: each row is one text")
        assert isinstance(self.stem, ConvolutionStem)
        x, mask = self.stem(given.features, given.mask)
        return x, read(x[:, :, 0], mask)

    def _size(self, content: Tensor) -> tuple[int, ...]:
        """(B, S) of what the encoder reads, or its shape where that is none that it could read."""
        if not isinstance(self.stem, ConvolutionStem) or content.dim() != 3:
            return tuple(content.shape)
        return content.shape[0], self.stem.length(content.shape[2])

    def _refuse_another(self, cache: Cache, content: Tensor | None, memory: Tensor | None) -> None:
        """A cache holds one source. It may be given again with each step, and another one is refused."""
        held = cache.memory
        assert held is not None
        one, other, what = (held, memory, "encoder_output") if content is None else (cache.source, content, self.reads)
        if other is None or one is other:
            return
        size = tuple(other.shape[:2]) if content is None else self._size(other)
        if size != tuple(held.shape[:2]) or (one is not None and not torch.equal(one, other)):
            raise LaminaError(f"{what} is not the source that this cache holds; a new source needs a new cache")

    def _marked(self, given: Given, tokens: Tokens) -> Tokens:
        """What is read, marked by the model's own rule where the caller has not marked it."""
        if self.spec.marks is None or given.marked is not None:
            return tokens
        return self.spec.marks.put(given.checked_ids(), tokens)

    def _context(self, given: Given, tokens: Tokens) -> Tensor | None:
        """(B, T) bool: what follows the question, where the model reads a question and what may answer it."""
        after = None if self.labels is None else self.labels.spec.after
        return None if after is None else after_question(after, given.checked_ids(), tokens)

    def heads(self, hidden: Tensor, call: Call, keep_logits: int | None, answers: Tensor | None) -> Output:
        """What the heads make of the hidden states."""
        out, tokens = Output(None, hidden, losses=call.record.losses), call.tokens
        if self.head is not None:
            kept = hidden if keep_logits is None else hidden[:, hidden.shape[1] - keep_logits :]
            out.logits = self.head(kept, self.embedding.weight)
        if self.pooler is not None:
            # The first or last real token: with padding on that side it is not in the column at the end.
            real, last = tokens.real.to(torch.int8), self.pooler.spec.token == "last"
            at = real.shape[1] - 1 - real.flip(1).argmax(dim=1) if last else real.argmax(dim=1)
            out.pooled = self.pooler(hidden[torch.arange(hidden.shape[0], device=hidden.device), at])
        if self.labels is not None:
            out.label_logits = self.labels(hidden if self.labels.spec.each_token else out.pooled, call, answers)
            if self.head is None:
                out.logits = out.label_logits
        return out

    def _check_cache(self, cache: Cache, given: Given) -> None:
        if self.decoder is None:
            raise UnsupportedError("an encoder reads its whole input at once; only decoders have a cache")
        input_ids = given.checked_ids()
        if cache.batch != input_ids.shape[0]:
            raise LaminaError(f"input_ids has {input_ids.shape[0]} rows; the cache was made for {cache.batch}")
        if self.cache_limit is not None and cache.length + input_ids.shape[1] > self.cache_limit:
            raise UnsupportedError(
                f"{cache.length + input_ids.shape[1]} tokens: beyond {self.cache_limit} the rotary phases depend on the"
                " length, and cached keys would not fit; use cache=None, or a scaling that does not (YaRN, NTK)"
            )


def _retained(module: nn.Module, path: str) -> Iterator[tuple[str, Retained]]:
    """What a cache keeps of each layer, by its path. A layer that gives several speaks for what is in it too."""
    retained = getattr(module, "retained", None)
    kept = {} if retained is None else retained()
    if isinstance(kept, dict) and kept:
        yield from ((f"{path}{below}", one) for below, one in kept.items())
        return
    if isinstance(kept, Retained):
        yield path, kept
    for name, child in module.named_children():
        yield from _retained(child, f"{path}.{name}")
