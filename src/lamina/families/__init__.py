"""The families: one dict. A family is a function from its configuration to a spec, its inverse, and a weight table."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lamina.families.family import Family, Fields
from lamina.specs import unknown

FAMILIES = {
    "albert": "albert:ALBERT",
    "bart": "bart:BART",
    "bert": "bert:BERT",
    "big_bird": "bigbird:BIGBIRD",
    "bigbird_pegasus": "bigbird_pegasus:BIGBIRD_PEGASUS",
    "bloom": "bloom:BLOOM",
    "deepseek_v2": "deepseek:V2",
    "deepseek_v3": "deepseek:V3",
    "diffllama": "diffllama:DIFFLLAMA",
    "falcon": "falcon:FALCON",
    "gemma": "gemma:GEMMA",
    "gemma2": "gemma:GEMMA2",
    "gemma3_text": "gemma:GEMMA3",
    "gemma3": "gemma:GEMMA3_MULTIMODAL",
    "glam": "glam:GLAM",
    "gpt2": "gpt2:GPT2",
    "gpt_neox": "gpt_neox:GPT_NEOX",
    "gptj": "gptj:GPTJ",
    "lamina": "auto_map:LAMINA",
    "led": "led:LED",
    "llama": "llama:LLAMA",
    "longformer": "longformer:LONGFORMER",
    "m2m_100": "m2m100:M2M100",
    "mistral": "llama:MISTRAL",
    "mixtral": "mixtral:MIXTRAL",
    "mpt": "mpt:MPT",
    "nllb-moe": "nllb_moe:NLLB_MOE",
    "opt": "opt:OPT",
    "palm": "palm:PALM",
    "qwen2": "llama:QWEN2",
    "qwen2_moe": "mixtral:QWEN2_MOE",
    "qwen3": "llama:QWEN3",
    "qwen3_moe": "mixtral:QWEN3_MOE",
    "retro": "retro:RETRO",
    "roberta": "bert:ROBERTA",
    "smollm3": "llama:SMOLLM3",
    "switch_transformers": "switch:SWITCH",
    "t5": "t5:T5",
    "mt5": "t5:MT5",  # after T5, which is what a new model is written as
    "whisper": "whisper:WHISPER",
}
"""model_type -> module:name. A family is imported when it is asked for. One without files ("palm") bears a name."""


@cache
def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises CheckpointError naming the nearest known one."""
    from lamina.errors import CheckpointError

    if model_type not in FAMILIES:
        raise CheckpointError(unknown("model_type", model_type, FAMILIES))
    module, name = FAMILIES[model_type].split(":")
    return getattr(import_module(f"lamina.families.{module}"), name)


@cache
def sizes() -> dict[str, str]:
    """Every published size and its model_type: {"llama/7b": "llama", ...}."""
    return {name: model_type for model_type in FAMILIES for name in family(model_type).sizes}


def note(size: str) -> str | None:
    """What the publication of a size leaves open, and what stands there; None where it leaves nothing open."""
    return family(sizes()[size]).notes.get(size.partition("/")[0]) if size in sizes() else None


__all__ = ["FAMILIES", "Family", "Fields", "family", "note", "sizes"]
