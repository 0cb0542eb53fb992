"""A GGUF file presented as a Hugging Face checkpoint (llama.cpp's convert_hf_to_gguf.py, undone).

llama.cpp's converter changes three things besides names. It reorders the rows of q and k of the architecture `llama`,
so that rotary pairs lie side by side; it adds 1 to Gemma's norms; and it writes Llama 3's rotary scaling as a tensor
of factors. Reading undoes each. A key or a tensor that is not in the tables below is refused: it would change the
numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor

from lamina.errors import CheckpointError
from lamina.families.gguf_config import Facts
from lamina.weights.gguf import Entry, GGUFFile
from lamina.weights.mapped import show

# GGUF's name of a part of a layer -> Hugging Face's, and its shape: Width, Queries, Keys, hidden F, one head D.
LLAMA = {
    "attn_norm": ("input_layernorm", "W"),
    "attn_q": ("self_attn.q_proj", "QW"),
    "attn_k": ("self_attn.k_proj", "KW"),
    "attn_v": ("self_attn.v_proj", "KW"),
    "attn_output": ("self_attn.o_proj", "WQ"),
    "ffn_norm": ("post_attention_layernorm", "W"),
    "ffn_gate": ("mlp.gate_proj", "FW"),
    "ffn_up": ("mlp.up_proj", "FW"),
    "ffn_down": ("mlp.down_proj", "WF"),
}
QK_NORM = {"attn_q_norm": ("self_attn.q_norm", "D"), "attn_k_norm": ("self_attn.k_norm", "D")}
GEMMA2 = LLAMA | {
    "post_attention_norm": ("post_attention_layernorm", "W"),
    "ffn_norm": ("pre_feedforward_layernorm", "W"),
    "post_ffw_norm": ("post_feedforward_layernorm", "W"),
}
PARTS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | QK_NORM,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2 | QK_NORM,
}
ATTENTION_BIAS = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_BIAS = ("ffn_gate", "ffn_up", "ffn_down")


class GGUFCheckpoint:
    """`config`, `entries` and `read(name)` of a GGUF file, under Hugging Face's names."""

    def __init__(self, path: str | Path):
        self.file = GGUFFile(path)
        self.metadata = self.file.metadata
        facts = Facts(self.file)
        self.heads = {"attn_q": facts.heads, "attn_k": facts.key_heads} if facts.architecture == "llama" else {}
        self.shifted = facts.architecture.startswith("gemma")
        self.sources = sources_of(facts)  # Hugging Face's name -> GGUF's
        self.config: dict[str, object] = facts.config()
        self.entries: dict[str, Entry] = {
            name: replace(self.file.entries[source], name=name) for name, source in self.sources.items()
        }

    def read(self, name: str) -> Tensor:
        """A weight as the Hugging Face checkpoint had it; quantised ones in float32."""
        if name not in self.sources:
            raise CheckpointError(f"{self.file.path.name}: no tensor {show(name)}; `entries` lists what it has")
        source = self.sources[name]
        weight = self.file.read(source)
        part = source.split(".")[-2]
        if part in self.heads:
            return unpermute(weight, self.heads[part])
        if self.shifted and part.endswith("norm"):
            return weight - 1
        return weight

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order to Hugging Face's, or a bias likewise.

    With 6 rows a head, the file has them in the order 0 3 1 4 2 5: rotary pair by rotary pair.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def sources_of(facts: Facts) -> dict[str, str]:
    """Hugging Face's name of every tensor -> GGUF's. Each tensor of the file is used, and none is missing."""
    sizes = {
        "W": facts.width, "F": facts.hidden, "D": facts.head, "V": facts.vocabulary,
        "Q": facts.heads * facts.head, "K": facts.key_heads * facts.head,
    }  # fmt: skip
    expected = {
        "token_embd.weight": ("model.embed_tokens.weight", "VW"),
        "output_norm.weight": ("model.norm.weight", "W"),
    }
    if facts.output:
        expected["output.weight"] = ("lm_head.weight", "VW")
    biased = ATTENTION_BIAS[: 3 if facts.architecture == "qwen2" else 4] if facts.attention_bias else ()
    biased += MLP_BIAS if facts.mlp_bias else ()
    for layer in range(facts.layers):
        for part, (name, shape) in PARTS[facts.architecture].items():
            expected[f"blk.{layer}.{part}.weight"] = (f"model.layers.{layer}.{name}.weight", shape)
            if part in biased:
                expected[f"blk.{layer}.{part}.bias"] = (f"model.layers.{layer}.{name}.bias", shape[0])
    known, present = expected.keys(), facts.file.entries.keys() - {"rope_freqs.weight"}
    for names, what in ((present - known, "unknown"), (known - present, "missing")):
        if names:
            listed = ", ".join(show(name) for name in sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            right = f"{facts.architecture} with {facts.layers} layers has {len(known)} tensors"
            raise facts.refuse(f"{len(names)} tensors are {what}: {listed}", right)
    for source, (_, letters) in expected.items():
        shape, found = tuple(sizes[letter] for letter in letters), facts.file.entries[source].shape
        if found != shape:
            raise facts.refuse(f"{source} has shape {found}", f"the metadata ask for {shape}")
    return {name: source for source, (name, _) in expected.items()}
