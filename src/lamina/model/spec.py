"""A model, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lamina.errors import LaminaError
from lamina.layers import (
    ChunkedCrossAttentionSpec,
    ConvolutionStemSpec,
    CrossAttentionSpec,
    EmbeddingSpec,
    FanInInitialSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    LearnedPositionSpec,
    NormalInitialSpec,
    PoolerSpec,
    StackSpec,
    StepSpec,
)
from lamina.marks import AfterToken, BeforeToken, EndBlocks, FirstToken
from lamina.specs import Spec

if TYPE_CHECKING:
    from lamina.model.model import Model


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
    # What the encoder reads with where that is not `embedding`: a spectrogram's convolutions, or a table of its own.
    stem: ConvolutionStemSpec | EmbeddingSpec | None = None
    context: int | None = None  # tokens that the model was trained to read
    special: SpecialTokens = field(default_factory=SpecialTokens)
    marks: FirstToken | BeforeToken | AfterToken | EndBlocks | None = None  # where the caller gives none: Longformer
    initial: NormalInitialSpec | FanInInitialSpec = field(default_factory=NormalInitialSpec)  # what new weights are

    @property
    def two_stacks(self) -> bool:
        """Whether it is an encoder-decoder: what it writes does not continue what it reads."""
        return self.encoder is not None and self.decoder is not None

    @property
    def source_context(self) -> int | None:
        """Tokens that the first stack reads: LED's encoder has 16,384 positions, and its decoder 1,024 (`context`)."""
        position = self.encoder.position if self.encoder is not None and self.two_stacks else None
        return position.size if isinstance(position, LearnedPositionSpec) else self.context

    @property
    def reads_ids(self) -> bool:
        """Whether the first stack reads ids, and no spectrogram."""
        return not isinstance(self.stem, ConvolutionStemSpec)

    @property
    def source_vocabulary(self) -> int:
        """How many ids the first stack knows."""
        return (self.stem if isinstance(self.stem, EmbeddingSpec) else self.embedding).vocabulary

    def check(self) -> None:
        if self.width < 1 or (self.encoder is None and self.decoder is None):
            raise LaminaError(f"a model needs width >= 1 (it is {self.width}) and an encoder or a decoder")
        reads = self.decoder is not None and reads_memory(self.decoder)
        if self.stem is not None and self.encoder is None:
            raise LaminaError("stem is for an encoder, and this model has none")
        if isinstance(self.stem, EmbeddingSpec) and self.decoder is None:
            raise LaminaError("a stem that is a table is for an encoder beside a decoder; by itself it has `embedding`")
        if self.two_stacks and not reads:
            raise LaminaError("the decoder has no CrossAttentionSpec, so it would never read what the encoder gives")
        if any(isinstance(part, ChunkedCrossAttentionSpec) for _, part in self.walk()):
            self._check_retrieval(reads)

    def _check_retrieval(self, reads: bool) -> None:
        stack = self.decoder
        steps = [step for _, step in ([] if stack is None else stack.walk()) if isinstance(step, StepSpec)]
        retrieving = [step for step in steps if isinstance(step.op, ChunkedCrossAttentionSpec)]
        ops = [part for _, part in self.walk() if isinstance(part, ChunkedCrossAttentionSpec)]
        if stack is None or len(retrieving) < len(ops) or self.encoder is not None or reads:
            raise LaminaError(
                "ChunkedCrossAttentionSpec is for steps of a decoder by itself, without CrossAttentionSpec: neighbours"
                " are its memory"
            )
        if [op.encoder is not None for op in ops] != [True] + [False] * (len(ops) - 1):
            raise LaminaError("the first ChunkedCrossAttentionSpec of a decoder needs an encoder, the others have none")
        if len({op.chunk for op in ops}) > 1:
            raise LaminaError(f"the chunks of one decoder have one length, not {sorted({op.chunk for op in ops})}")
        if stack.repeat > 1 or stack.layer_dropout:
            raise LaminaError(
                "layers that repeat or drop out do not go with neighbours, which one layer encodes for all"
            )
        for step in retrieving:
            if step.post is not None or step.after is not None or step.residual != 1.0:
                raise LaminaError(
                    f"the step {step.name!r} is to leave tokens that read nothing: post, after and residual"
                )

    @property
    def retrieval(self) -> ChunkedCrossAttentionSpec | None:
        """What reads neighbours, where something does; its `chunk` and its `encoder` are those of all layers."""
        parts = [] if self.decoder is None else [part for _, part in self.decoder.walk()]
        return next((part for part in parts if isinstance(part, ChunkedCrossAttentionSpec)), None)

    def build(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0) -> Model:
        """The module, in training mode: without storage on "meta", else initialised from `seed`."""
        from lamina.model.model import Model

        with torch.device("meta"):
            model = Model(self)
        if dtype is not None:
            model = model.to(dtype)
        if torch.device(device).type != "meta":
            model = model.to_empty(device=device)
            model.init(seed)
        return model


def of_text(spec: Spec) -> Iterator[Spec]:
    """The parts of a spec that see the text that is read or written, and not what was retrieved beside it."""
    inner = tuple(f"{path}." for path, part in spec.walk() if isinstance(part, ChunkedCrossAttentionSpec))
    return (part for path, part in spec.walk() if not (inner and path.startswith(inner)))


def reads_memory(spec: Spec) -> bool:
    """Whether it reads what an encoder gives."""
    return any(isinstance(part, CrossAttentionSpec) for part in of_text(spec))
