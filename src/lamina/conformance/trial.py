"""What is asked of a model in every check: ids to read, what a forward gives for each token, the kinds of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamina.layers import (
    AttentionSpec,
    BigBirdSpec,
    ConvolutionStem,
    DifferentialSpec,
    LatentAttentionSpec,
    LongformerSpec,
)
from lamina.model import Model

SelfAttentionSpec = AttentionSpec | DifferentialSpec | LatentAttentionSpec | LongformerSpec | BigBirdSpec

TOKENS = 16  # of each text that is read, where no window asks for more


def random_ids(model: Model, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) ids of the model's vocabulary."""
    return drawn(
        torch.arange(model.spec.embedding.vocabulary, device=model.embedding.weight.device), batch, length, seed
    )


def drawn(choices: Tensor, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) of the ids in `choices`, at random."""
    generator = torch.Generator().manual_seed(seed)
    return choices[torch.randint(len(choices), (batch, length), generator=generator).to(choices.device)]


def random_sources(model: Model, lengths: list[int], seed: int = 98) -> Tensor:
    """What the encoder of an encoder-decoder reads, a row for each of `lengths` and as long as the longest: random ids
    (B, S), or a random spectrogram (B, bins, frames)."""
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(model.stem, ConvolutionStem):
        ids = torch.randint(model.spec.source_vocabulary, (len(lengths), max(lengths)), generator=generator)
        return ids.to(model.embedding.weight.device)
    features = torch.randn(len(lengths), model.stem.spec.bins, max(lengths), generator=generator)
    return features.to(model.embedding.weight)


def read(
    model: Model, ids: Tensor, mask: Tensor | None = None, *, source: dict[str, Any] | None = None, **more: Any
) -> list[Tensor]:
    """What a forward gives for each token of `ids`: hidden states, and logits where there are some for each token.

    In an encoder-decoder `ids` are the decoder's, and the encoder reads `source`, the arguments of its side, or one
    text that stays the same.
    """
    if model.spec.two_stacks:
        if source is None:
            length = min(TOKENS, model.spec.context or TOKENS)
            one = random_sources(model, [length], seed=99)
            source = {model.reads: one.expand(ids.shape[0], *one.shape[1:])}
        out = model(**source, decoder_input_ids=ids, decoder_attention_mask=mask, **more)
    else:
        out = model(ids, mask, **more)
    return [out.hidden] if out.logits is None or out.logits.dim() != 3 else [out.hidden, out.logits]


def text_length(model: Model) -> int:
    """Tokens to read: more than the narrowest window, where that takes little time."""
    windows = [spec.pattern.retained().recent for spec in attentions(model)]
    narrowest = min((window for window in windows if window is not None), default=0)
    return min(max(TOKENS, min(narrowest + 8, 64)), model.spec.context or TOKENS)


def attentions(model: Model) -> list[SelfAttentionSpec]:
    """The different attentions of the model that read their own text."""
    return list(dict.fromkeys(part for _, part in model.spec.walk() if isinstance(part, SelfAttentionSpec)))
