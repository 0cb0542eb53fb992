"""BigBird-Pegasus (arXiv:2007.14062, section 4): a pre-norm BART whose encoder sees by blocks, as BigBird's does.

Its decoder is dense. As in transformers, its encoder has no dropout between the two matrices of a feed-forward step,
and a decoder by itself has a head of its own whatever `tie_word_embeddings` says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamina.families import bart, bigbird
from lamina.families.family import Fields
from lamina.layers import AttentionSpec, FeedForwardSpec
from lamina.model import ModelSpec
from lamina.specs import edit

DEFAULTS = (
    bart.DEFAULTS
    | bart.sizes(16, 1024, 16)
    | {
        "vocab_size": 96103,
        "max_position_embeddings": 4096,
        "activation_function": "gelu_new",
        "scale_embedding": True,
    }
)
FLAVOUR = replace(
    bart.BART_FLAVOUR,
    model_type="bigbird_pegasus",
    name="BigBirdPegasus",
    special=(2, 1, 0),
    place="pre",
    offset=0,
    defaults=DEFAULTS,
    only={},
)


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the tensors where there are any -> spec."""
    made = bart.spec(fields, FLAVOUR, "all" if fields.flag("use_bias", False) else "none")
    if made.encoder is None:
        return made if made.head is None else made.replace(head=made.head.replace(tied=False))
    plain = edit(made.encoder, FeedForwardSpec, lambda path, part: part.replace(dropout=0.0))
    made = made.replace(encoder=plain)
    full = fields.choice("attention_type", {"block_sparse": False, "original_full": True}, "block_sparse")
    return made if full else bigbird.sparse(fields, made)


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    made, blocks = bigbird.dense(spec)
    biased = any(part.bias != "none" for _, part in made.walk() if isinstance(part, AttentionSpec))
    return bart.config(made, FLAVOUR) | blocks | {"use_bias": biased}


NAMES = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output"}
BIGBIRD_PEGASUS = bart.family_of(
    FLAVOUR,
    {"bigbird-pegasus/large": bart.sizes(16, 1024, 16)},
    spec=spec,
    config=config,
    attention=bart.projections("attention", "self_attn", NAMES),
)
