"""LED (arXiv:2004.05150, section 7): BART whose encoder attends as Longformer's does, with positions from row 0 on and
more of them in the encoder.

Which tokens are global the caller says (`marked`), as in transformers: to summarise, the first one.
"""

from __future__ import annotations

from typing import Any

from lamina.families import bart, longformer
from lamina.families.family import Fields, need
from lamina.model import ModelSpec

PLACES = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")
FLAVOUR = bart.Flavour("led", "LED", "led.", ("ForConditionalGeneration", "ForQuestionAnswering", "Model"), PLACES, 0)
DEFAULTS: dict[str, Any] = dict(zip(PLACES, (16384, 1024), strict=True))


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the tensors where there are any -> spec."""
    fields.must("scale_embedding", False)
    return longformer.sparse(fields, bart.spec(fields.over(DEFAULTS), FLAVOUR))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    like, both = longformer.dense(spec)
    said = bart.config(like, FLAVOUR) | {"attention_window": both}
    need(not said.pop("scale_embedding"), "embedding.scale", "is not 'none'")
    return said


NAMES = {"q": "query", "k": "key", "v": "value"}
ATTENTION = {f"attention.op.{ours}": f"self_attn.longformer_self_attn.{theirs}" for ours, theirs in NAMES.items()}
ATTENTION |= {ours.replace("op.", "op.global_"): f"{theirs}_global" for ours, theirs in ATTENTION.items()}
ATTENTION |= {"attention.op.o": "self_attn.output"}


def _size(layers: int, width: int, heads: int) -> dict[str, Any]:
    return bart.sizes(layers, width, heads) | {"attention_window": [1024] * layers}


LED = bart.family_of(
    FLAVOUR,
    {"led/base-16384": _size(6, 768, 12), "led/large-16384": _size(12, 1024, 16)},
    spec=spec,
    config=config,
    attention=ATTENTION,
)
