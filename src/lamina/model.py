"""Model: the waist of the house. Everything above sees the layers only through it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.cache import KINDS, Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AttentionSpec,
    Call,
    EmbeddingSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    PoolerSpec,
    Record,
    StackSpec,
)
from lamina.reading import read
from lamina.specs import Spec, unknown
from lamina.tokens import Tokens


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
    embedding: EmbeddingSpec
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
        if self.encoder is not None and self.decoder is not None:
            raise UnsupportedError(
                "a model with an encoder and a decoder needs cross-attention, which is not built yet"
            )

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
        self.embedding = spec.embedding.build(spec.width)
        self.encoder = None if spec.encoder is None else spec.encoder.build(spec.width)
        self.decoder = None if spec.decoder is None else spec.decoder.build(spec.width)
        self.head = None if spec.head is None else spec.head.build(spec.width, spec.embedding.vocabulary)
        self.pooler = None if spec.pooler is None else spec.pooler.build(spec.width)
        self.labels = None if spec.labels is None else spec.labels.build(spec.width)
        for name, module in self.named_modules():
            if hasattr(module, "path"):
                module.path = name  # pyright: ignore[reportArgumentType]
        attentions = [part for _, part in (spec.decoder or spec).walk() if isinstance(part, AttentionSpec)]
        limits = [part.rotary.limit for part in attentions if part.rotary is not None and part.rotary.limit]
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
        cache = Cache(kind, batch, capacity, device=self.embedding.weight.device)
        for name, module in self.decoder.named_modules():
            retained = getattr(module, "retained", None)
            if retained is not None:
                cache.add(f"decoder.{name}", retained())
        return cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
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
        write down. backend: of attention, by name. keep_logits: only for that many last positions. The decoder_ and
        encoder_ arguments are those of encoder-decoders, and refused elsewhere.
        """
        if wrong:
            known = [name for name in Model.forward.__annotations__ if name not in ("wrong", "return")]
            raise LaminaError(unknown("argument of a model", next(iter(wrong)), known))
        decoding = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_output": encoder_output,
        }
        for name, given in decoding.items():
            if given is not None:
                raise UnsupportedError(f"{name} is for encoder-decoders; this model has only one stack: use input_ids")
        if input_ids.dim() != 2:
            raise LaminaError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, length)")
        if cache is not None:
            self._check_cache(cache, input_ids)
        record = Record() if record is None else record
        tokens = read(input_ids, attention_mask, position_ids, document_ids, marked, cache)
        call = Call(tokens=tokens, cache=cache, backend=backend, record=record)
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        hidden = stack(self.embedding(input_ids), call, token_type_ids)
        record.check()
        if cache is not None:
            cache.advance(tokens)
        return self._heads(hidden, tokens, record, keep_logits)

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
