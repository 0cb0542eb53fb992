"""Filling blanks: what a masked language model puts where the mask token stands (arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model
from lamina.text import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """One token for a blank."""

    id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Blank:
    """A mask token: where it stands in the ids, and the likeliest tokens for it, the likeliest first."""

    position: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Filled:
    """`text` has the likeliest token in every blank; each blank was judged with the others still masked."""

    text: str
    ids: tuple[int, ...]
    blanks: tuple[Blank, ...]


@torch.inference_mode()
def fill(model: Model, text: str, tokenizer: Tokenizer, *, top: int = 5) -> Filled:
    """The `top` candidates for every mask token in `text`.

    Raises UnsupportedError for a model that cannot fill, LaminaError for a text without a mask or one that is too long.
    """
    if model.spec.two_stacks:
        raise UnsupportedError("an encoder-decoder fills blanks by writing the text again: use lamina generate")
    if model.encoder is None or model.decoder is not None or model.head is None:
        raise UnsupportedError(
            "this model is no encoder with a language head, so it cannot fill blanks; try lamina generate or embed"
        )
    if tokenizer.mask is None:
        raise UnsupportedError(f"{tokenizer.name} has no mask token, so there is no blank to fill")
    # Some embeddings have more rows than there are tokens; those rows take their share and are no candidates.
    vocabulary = min(model.spec.embedding.vocabulary, tokenizer.vocabulary)
    if type(top) is not int or not 1 <= top <= vocabulary:
        raise LaminaError(f"top is {top!r}; it must be a whole number from 1 to {vocabulary}")
    mask = tokenizer.special["mask"]
    ids = tokenizer.encode(text)
    places = [i for i, token in enumerate(ids) if token == tokenizer.mask]
    if not places:
        raise LaminaError(f"the text has no {mask}; write {mask} where a word is missing")
    if model.spec.context is not None and len(ids) > model.spec.context:
        raise LaminaError(f"the text has {len(ids)} tokens; this model reads {model.spec.context}: shorten it")
    logits = model(torch.tensor([ids], device=model.embedding.weight.device)).logits[0, places].float()
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise LaminaError("the logits are not finite; the weights or the dtype are at fault")
    best = logits.softmax(dim=-1)[:, :vocabulary].topk(top, dim=-1)
    blanks = []
    for place, chosen, shares in zip(places, best.indices.tolist(), best.values.tolist(), strict=True):
        candidates = (
            Candidate(token, tokenizer.decode([token], skip_special=False).strip(), share)
            for token, share in zip(chosen, shares, strict=True)
        )
        blanks.append(Blank(place, tuple(candidates)))
    full = list(ids)
    for blank in blanks:
        full[blank.position] = blank.candidates[0].id
    return Filled(tokenizer.decode(full).strip(), tuple(ids), tuple(blanks))
