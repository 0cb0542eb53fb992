"""What a GGUF file says of a LLaMA, Mistral, Qwen 2 or Qwen 3 (llama.cpp's convert_hf_to_gguf.py): the inverse of
`families/gguf.py` and `families/gguf_config.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, UnsupportedError
from lamina.families import family
from lamina.families.family import Fields
from lamina.families.gguf import ATTENTION_BIAS, MLP_BIAS, PARTS, GGUFCheckpoint
from lamina.families.gguf_config import MODELS, llama3_divisors
from lamina.model import ModelSpec
from lamina.specs import diff

ARCHITECTURES = {model: name for name, (model, _) in MODELS.items() if model in ("llama", "qwen2", "qwen3")} | {
    "mistral": "llama"
}
"""model_type -> the architecture in GGUF."""
TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's number of a file whose matrices are of one type."""
FREQUENCIES = "rope_freqs.weight"


def metadata(config: Mapping[str, Any], kind: str) -> dict[str, object]:
    """The settings that a config.json stands for, its matrices stored as `kind`."""
    name = ARCHITECTURES[config["model_type"]]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or width // heads
    rope = config["rope_parameters"]
    said: dict[str, object] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": width,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("sliding_window"):
        said["attention.sliding_window"] = config["sliding_window"]
    said |= _scaling(rope)
    general: dict[str, object] = {"general.architecture": name, "general.file_type": TYPES[kind]}
    general |= {"general.quantization_version": 2} if kind == "Q8_0" else {}
    return general | {f"{name}.{key}": value for key, value in said.items()}


def _scaling(rope: Mapping[str, Any]) -> dict[str, object]:
    kind = rope["rope_type"]
    unsaid = {"partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate"} & rope.keys()
    if unsaid or kind not in ("default", "linear", "yarn", "llama3"):
        what = f"rope_parameters has {sorted(unsaid)[0]}" if unsaid else f"rope_type is {kind}"
        raise UnsupportedError(f"{what}, and GGUF's metadata have no word for it")
    if kind in ("default", "llama3"):  # Llama 3's are a tensor
        return {}
    said: dict[str, object] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        said["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        said |= {f"rope.scaling.yarn_{end}": float(rope[end]) for end in ("beta_fast", "beta_slow")}
    return said


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's name of every tensor that such a model may have -> GGUF's."""
    found = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for part, (theirs, _) in PARTS[ARCHITECTURES[config["model_type"]]].items():
        for kind in ("weight", "bias") if part in ATTENTION_BIAS + MLP_BIAS else ("weight",):
            for layer in range(config["num_hidden_layers"]):
                found[f"model.layers.{layer}.{theirs}.{kind}"] = f"blk.{layer}.{part}.{kind}"
    return found


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: with 6 rows a head, 0 3 1 4 2 5, rotary pair by rotary pair."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned(config: Mapping[str, Any], stored: str, weight: Tensor) -> Tensor:
    """A tensor as the file has it, which calls it `stored`."""
    part = stored.split(".")[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if ARCHITECTURES[config["model_type"]] == "llama" and part in heads:
        return permute(weight, heads[part])
    return weight


def frequencies(config: Mapping[str, Any]) -> Tensor | None:
    """The divisors of the frequencies, where they are Llama 3's."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fields = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    return torch.tensor(llama3_divisors(rope["rope_theta"], size // 2, **{name: rope[name] for name in fields}))


def check(path: Path, spec: ModelSpec) -> None:
    """Raise UnsupportedError where a file says another model than `spec`, naming the field.

    Of several ids that end a text a file keeps the first.
    """
    try:
        with GGUFCheckpoint(path) as checkpoint:
            config = dict(checkpoint.config)
            fields = Fields(config, frozenset(checkpoint.entries), path.name, checkpoint.read)
            back = family(str(config["model_type"])).spec(fields)
    except CheckpointError as error:
        why = str(error).removeprefix(f"{path.name}: ")
        raise UnsupportedError(f"a GGUF file cannot say this model: {why}") from None
    meant = spec.replace(
        initial=back.initial,
        context=back.context if spec.context is None else spec.context,
        special=spec.special.replace(end=spec.special.end[:1]),
    )
    if back != meant:
        where, said, wanted = diff(back, meant)[0]
        raise UnsupportedError(f"{where} is {wanted!r}, and a GGUF file of this model would say {said!r}")
