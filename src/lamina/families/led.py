"""LED (arXiv:2004.05150, section 7): BART whose encoder attends as Longformer's does, with positions from row 0 on and
more of them in the encoder.

Which tokens are global the caller says (`marked`), as in transformers: to summarise, the first one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamina.families import bart, longformer
from lamina.families.family import Fields, need
from lamina.model import ModelSpec

POSITIONS = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")
FLAVOUR = replace(
    bart.BART_FLAVOUR,
    model_type="led",
    name="LED",
    base="led.",
    kinds=("ForConditionalGeneration", "ForQuestionAnswering", "Model"),
    positions=POSITIONS,
    offset=0,
    defaults=bart.DEFAULTS | dict(zip(POSITIONS, (16384, 1024), strict=True)),
    only=bart.OLD | {"scale_embedding": False},
)


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the tensors where there are any -> spec."""
    return longformer.sparse(fields, bart.spec(fields, FLAVOUR))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    like, both = longformer.dense(spec)
    said = bart.config(like, FLAVOUR) | {"attention_window": both}
    need(not said.pop("scale_embedding"), "embedding.scale", "is not 'none'")
    return said


NAMES = {"q": "longformer_self_attn.query", "k": "longformer_self_attn.key", "v": "longformer_self_attn.value"}
NAMES |= {f"global_{ours}": f"{theirs}_global" for ours, theirs in NAMES.items()} | {"o": "output"}


def _size(layers: int, width: int, heads: int) -> dict[str, Any]:
    return bart.sizes(layers, width, heads) | {"attention_window": [1024] * layers}


LED = bart.family_of(
    FLAVOUR,
    {"led/base-16384": _size(6, 768, 12), "led/large-16384": _size(12, 1024, 16)},
    spec=spec,
    config=config,
    attention=bart.projections("attention", "self_attn", NAMES),
)
